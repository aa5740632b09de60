"""The shape vocabulary and the one structural type that every part of tvlens shares.

Dimension names are the same everywhere: in jaxtyping strings, as xarray dimensions, as DataFrame columns
and as plot keywords. A function that takes a model takes anything that satisfies `Model`: a
HookedTransformer or a TransformerBridge.
"""

from typing import Any, Protocol, runtime_checkable

DIMS = (
    "task",
    "model",
    "layer",
    "head",
    "position",
    "token",
    "seed",
    "shots",
    "prompt",
    "metric",
    "site",
    "batch",
    "d_model",
    "d_head",
    "d_vocab",
)


@runtime_checkable
class Model(Protocol):
    """A TransformerLens model: hook points, a cache, and a configuration."""

    cfg: Any
    tokenizer: Any

    def run_with_cache(self, *model_args: Any, **model_kwargs: Any) -> Any:
        """Run forward and keep the activations at the hook points."""
        ...

    def run_with_hooks(self, *model_args: Any, **model_kwargs: Any) -> Any:
        """Run forward with functions that read or edit the activations at hook points."""
        ...

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Turn text into token ids."""
        ...
