"""What the engine needs of a model: to be run block by block. One implementation for each model kind."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Runner(Protocol):
    """Drives a TransformerLens model one block at a time, through its own hook points."""

    model: Any
    n_layers: int

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        ...

    @property
    def steppable(self) -> bool:
        """Whether blocks can be run one by one."""
        ...

    def has_user_hooks(self) -> bool:
        """Whether someone's own hooks sit on the model."""
        ...

    def site_shape(self, site: str) -> tuple[int, ...]:
        """Shape of a site's activation after batch and position."""
        ...

    def has(self, site: str, layer: int) -> bool:
        """Whether the model has this site."""
        ...

    def bytes_of_rows(self, rows: int, positions: int, width: int) -> int:
        """Estimate what rows that run some positions of longer prompts take inside a block, in bytes."""
        ...

    def hooked(self, hooks: list[tuple[str, Any]]) -> AbstractContextManager[Any]:
        """Context in which functions sit on hook points."""
        ...

    def embed(
        self, tokens: Int[Tensor, "row position"], mask: Int[Tensor, "row whole"]
    ) -> Float[Tensor, "row position d_model"]:
        """Embed the last tokens of rows whose whole mask, prefix included, is given."""
        ...

    def block(
        self,
        layer: int,
        resid: Float[Tensor, "row position d_model"],
        mask: Int[Tensor, "row whole"],
        *,
        past: Any = None,
        rows: Int[Tensor, " row"] | None = None,
    ) -> tuple[Float[Tensor, "row position d_model"], Any]:
        """Run one block, on top of a prefix's keys and values if there is one; give both back."""
        ...

    def whole(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Int[Tensor, "row position"],
        hooks: list[tuple[str, Any]],
    ) -> Float[Tensor, "row position d_model"]:
        """Run every block over whole prompts through the model's own forward, with hooks."""
        ...

    def logits(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Read final residuals out through the model's own final norm, unembedding and soft cap."""
        ...


def runner(model: Any) -> Runner:
    """Give the runner for a model.

    Args:
        model: A TransformerLens model.

    Returns:
        The runner for its kind.

    Raises:
        TypeError: It is no TransformerLens model that tvlens can drive.
    """
    from transformer_lens import HookedTransformer

    if isinstance(model, HookedTransformer):
        from tvlens.models.hooked.run import HookedRunner

        return HookedRunner(model)
    raise TypeError(
        f"a HookedTransformer is needed; {type(model).__name__} arrived. "
        "Turn it into one with tvlens.load_model(model, tokenizer=...)."
    )
