"""What is known about a model: where it came from, and what was done to its weights."""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from tvlens._typing import Model


@dataclass(frozen=True, repr=False)
class ModelFacts:
    """What tvlens knows about a model.

    Attributes:
        name: What the model goes by.
        source: ``"wheel"``, ``"package"`` (tvlens itself), ``"folder"``, ``"gguf"``, ``"memory"``, ``"hub"``
            or ``"in hand"``.
        architecture: The Hugging Face class the weights come from, or ``"custom"``.
        backend: The TransformerLens class that runs it: ``"hooked"`` or ``"bridge"``.
        processing: ``"none"`` for raw weights, ``"fold"`` for TransformerLens' standard processing.
        prepend_bos: Whether prompts begin with the BOS token.
        revision: The commit of a model from the hub, or the checkpoint of a packaged one.
        n_layers: Number of blocks.
        n_heads: Number of attention heads in a block.
        d_model: Width of the residual stream.
        d_vocab: Number of tokens.
        n_ctx: The longest prompt, in tokens.
        dtype: The weights' dtype, e.g. ``"float32"``.
        device: The weights' device, e.g. ``"cpu"``.
        weights_sha256: SHA-256 of the file the weights were read from, where that is known.
        transformer_lens: Version of TransformerLens.
    """

    name: str
    source: str
    architecture: str
    backend: str
    processing: str
    prepend_bos: bool
    revision: str | None
    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int
    n_ctx: int
    dtype: str
    device: str
    weights_sha256: str | None
    transformer_lens: str

    def __repr__(self) -> str:
        lines = (f"  {name}: {value!r}" for name, value in self.to_dict().items())
        return "\n".join(("ModelFacts", *lines))

    @property
    def origin(self) -> dict[str, Any]:
        """Which weights these are, and how they were prepared."""
        return {
            "model": self.name,
            "processing": self.processing,
            "weights_sha256": self.weights_sha256,
            "dtype": self.dtype,
        }

    def to_dict(self) -> dict[str, str | int | bool | None]:
        """Give the facts as plain values, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Origin:
    """The part of the facts that cannot be read off the model itself."""

    name: str
    source: str
    revision: str | None = None
    weights_sha256: str | None = None


_origins: WeakKeyDictionary[Any, Origin] = WeakKeyDictionary()


def remember(model: Any, origin: Origin) -> None:
    """Keep where a model came from for as long as the model lives."""
    _origins[model] = origin


def facts(model: Model) -> ModelFacts:
    """Say what is known about a model, however it was made.

    What can be read off the model (shape, dtype, device, processing, BOS) is read now, so it stays
    true after ``model.to(...)``; only the origin is remembered from loading.

    Args:
        model: A HookedTransformer or TransformerBridge from `load_model` or from anywhere else.

    Returns:
        The facts.

    Raises:
        TypeError: The object is neither.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> facts(tiny_model()).processing
        'none'
    """
    kind = kind_of(model)
    if kind is None:
        raise TypeError(
            f"facts needs a HookedTransformer or TransformerBridge, got a {type(model).__name__}: "
            "load it with tvlens.load_model first."
        )
    cfg = model.cfg
    weight = next(iter(model.parameters()))  # pyright: ignore[reportAttributeAccessIssue]
    origin = _origins.get(model) or Origin(name=cfg.model_name, source="in hand")
    return ModelFacts(
        **dataclasses.asdict(origin),
        architecture=_architecture(model) or "custom",
        backend=kind,
        processing=_processing(model),
        prepend_bos=bool(cfg.default_prepend_bos and model.tokenizer is not None),
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
        transformer_lens=_lens_version(),
    )


@cache
def _lens_version() -> str:
    """Version of TransformerLens; to look it up in its metadata takes milliseconds."""
    from importlib.metadata import version

    return version("transformer-lens")


def kind_of(model: Any) -> str | None:
    """Say which TransformerLens class a model is: ``"hooked"``, ``"bridge"``, or None for neither."""
    from tvlens.models.bridge.convert import is_bridge
    from tvlens.models.hooked.convert import is_hooked

    if is_hooked(model):
        return "hooked"
    return "bridge" if is_bridge(model) else None


def _architecture(model: Any) -> str | None:
    # A bridge keeps the Hugging Face model itself.
    inner = getattr(model, "original_model", None)
    return model.cfg.original_architecture if inner is None else type(inner).__name__


def _processing(model: Any) -> str:
    from tvlens.models.bridge import convert as bridge
    from tvlens.models.hooked import convert as hooked

    return (hooked if kind_of(model) == "hooked" else bridge).processing_of(model)
