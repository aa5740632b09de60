"""What the engine needs of a model, one implementation for each TransformerLens model kind.

A block is taken apart at its hook sites. Norms, projections and MLP act on each token alone, so the engine
may hand them the tokens of thousands of rows as one long list; only attention knows which rows and
positions they belong to, and that is the engine's own.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Block(Protocol):
    """One block in parts that act on tokens, each for itself.

    Attributes:
        device: Where the block's weights are.
        scale: What attention scores are divided by.
        soft_cap: Bound of the attention scores; 0 where there is none.
        window: How many positions back a query sees, its own included; None for all.
        parallel: Whether the MLP reads the residual before the block, so that there is no resid_mid.
    """

    device: torch.device
    scale: float
    soft_cap: float
    window: int | None
    parallel: bool

    def project(
        self, resid: Float[Tensor, "token d_model"]
    ) -> tuple[
        Float[Tensor, "token head d_head"],
        Float[Tensor, "token kv_head d_head"],
        Float[Tensor, "token kv_head d_head"],
    ]:
        """Give queries, keys and values as they are at their hook sites."""
        ...

    def rotate(
        self,
        queries: Float[Tensor, "token head d_head"],
        keys: Float[Tensor, "token kv_head d_head"],
        position: Int[Tensor, " token"],
    ) -> tuple[Float[Tensor, "token head d_head"], Float[Tensor, "token kv_head d_head"]]:
        """Do what happens to queries and keys between their hook sites and the scores."""
        ...

    def attn_out(self, z: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token d_model"]:
        """Turn head outputs into what attention adds to the residual stream."""
        ...

    def project_out(self, z: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token d_model"]:
        """Multiply head outputs by W_O and add its bias; what follows is `norm_attn_out`."""
        ...

    def norm_attn_out(self, out: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Do what stands between W_O and the residual stream: a norm in some models, else nothing."""
        ...

    def mlp_out(self, resid: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Give what the MLP, which reads this residual, adds to it; its norms included."""
        ...


@runtime_checkable
class Runner(Protocol):
    """Drives a TransformerLens model whole, through its hook points, or in parts."""

    model: Any
    n_layers: int

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream."""
        ...

    @property
    def steppable(self) -> bool:
        """Whether the model can be run in parts."""
        ...

    def has_user_hooks(self) -> bool:
        """Whether someone's own hooks sit on the model."""
        ...

    def site_shape(self, site: str) -> tuple[int, ...]:
        """Shape of a site's activation after batch and position; of ``pattern``, without its keys."""
        ...

    def has(self, site: str, layer: int) -> bool:
        """Whether the model has this site."""
        ...

    def hook_name(self, site: str, layer: int) -> str:
        """Name of the hook point where the model keeps a site."""
        ...

    def hooked(self, hooks: list[tuple[str, Any]]) -> AbstractContextManager[Any]:
        """Context in which functions sit on hook points, beside the user's own; see `whole`."""
        ...

    def whole(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Int[Tensor, "row position"],
        hooks: list[tuple[str, Any]],
    ) -> Float[Tensor, "row position d_model"]:
        """Run every block over left-padded prompts through the model's own forward, with hooks.

        A hook function gets the activation as HookedTransformer has it at that site: batch, position, then
        `site_shape`; ``pattern`` as batch, head, query, key.
        """
        ...

    def prepare(self, width: int) -> None:
        """Make ready for prompts of this many tokens, where tables of positions must grow."""
        ...

    def embed(
        self, tokens: Int[Tensor, " token"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token d_model"]:
        """Embed tokens that stand at these positions of their prompts."""
        ...

    def embed_position(
        self, tokens: Int[Tensor, " token"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token d_model"]:
        """Give that part of `embed` which is an embedding of the position; zeros where there is none."""
        ...

    def block(self, layer: int) -> Block:
        """Give one block in parts."""
        ...

    def logits(
        self,
        resid: Float[Tensor, "row d_model"],
        columns: Int[Tensor, "row column"] | None = None,
    ) -> Float[Tensor, "row column"]:
        """Read final residuals out through final norm, unembedding and soft cap.

        With columns, only these tokens' logits are computed, each row its own; else all of them.
        """
        ...

    @property
    def soft_cap(self) -> float:
        """Bound of the logits; 0 where there is none."""
        ...

    def last_norm(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Give final residuals as the unembedding reads them."""
        ...

    def unembed(
        self,
        normed: Float[Tensor, "row d_model"],
        columns: Int[Tensor, "row column"] | None = None,
    ) -> Float[Tensor, "row column"]:
        """Unembed what `last_norm` gives, up to the soft cap; columns as in `logits`."""
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
    from tvlens.models.bridge.convert import is_bridge
    from tvlens.models.hooked.convert import is_hooked

    if is_hooked(model):
        from tvlens.models.hooked.run import HookedRunner

        return HookedRunner(model)
    if is_bridge(model):
        from tvlens.models.bridge.run import BridgeRunner

        return BridgeRunner(model)
    raise TypeError(
        f"a HookedTransformer or TransformerBridge is needed; {type(model).__name__} arrived. "
        "Turn it into one with tvlens.load_model(model, tokenizer=...)."
    )
