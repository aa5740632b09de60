"""TaskVector: theta(S), the vector that demonstrations S leave at the last token, with where it came from.

One TaskVector holds theta of every layer for every set of demonstrations, so that nothing is averaged
before someone decides to: ``.mean()`` averages over S. It is stored as safetensors with its origin, and it
refuses to meet a model of another width or another weight processing, where the same numbers would mean
something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import needs, unknown, whole
from tvlens._tensors import load_tensors, save_tensors
from tvlens.sites import SITES


def random_directions(
    values: Float[Tensor, "*row d_model"], generator: torch.Generator
) -> Float[Tensor, "*row d_model"]:
    """Draw Gaussian directions as long as some vectors, one for each.

    Args:
        values: The vectors.
        generator: Where random numbers come from; one of the CPU.

    Returns:
        The directions, scaled, where the vectors are.

    Example:
        >>> drawn = random_directions(torch.full((2, 4), 3.0), torch.Generator().manual_seed(0))
        >>> drawn.norm(dim=-1).tolist()
        [6.0, 6.0]
    """
    noise = torch.randn(values.shape, generator=generator).to(values)
    return noise * (values.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


@dataclass(frozen=True, eq=False, repr=False)
class TaskVector:
    """Task vectors of one task from one model.

    Attributes:
        values: theta for every set of demonstrations (``prompt``) and layer.
        layers: Which layer each slice belongs to.
        site: Where it was read, see `tvlens.sites.SITES`.
        made: Origin: model, processing, task, template, shots, seed and more.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> theta = tv.extract(model, tv.build_prompts(tv.load_task("to_upper"), model, n=3))
        >>> theta.mean().at(0).shape == (1, model.cfg.d_model)
        True

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916.
    """

    values: Float[Tensor, "prompt layer d_model"]
    layers: tuple[int, ...]
    site: str = "resid_post"
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needs("values", self.values, Tensor, "a tensor (prompt, layer, d_model)")
        needs("layers", self.layers, tuple, "a tuple with the number of each layer")
        if self.site not in SITES:
            raise unknown("site", self.site, SITES)
        if self.values.ndim != 3 or 0 in self.values.shape:
            raise ValueError(
                "a task vector has values of shape (prompt, layer, d_model), none of them 0; "
                f"{tuple(self.values.shape)} arrived."
            )
        if len(self.layers) != self.values.shape[1]:
            raise ValueError(
                f"layers has {len(self.layers)} numbers for {self.values.shape[1]} layers of values; "
                "give one for each."
            )
        if len({whole("layer", layer) for layer in self.layers}) < len(self.layers):
            raise ValueError(f"layers must be different; {self.layers} arrived.")
        bad = ~torch.isfinite(self.values).all(dim=-1)
        if bad.any():
            layers = sorted({self.layers[i] for i in bad.nonzero()[:, 1].tolist()})
            raise ValueError(
                f"a task vector must be finite; NaN or infinity arrived in {int(bad.sum())} of "
                f"{bad.numel()} vectors, at layers {layers[:8]}."
            )

    def __repr__(self) -> str:
        n = len(self.values)
        return (
            f"TaskVector(task={self.made.get('task')!r}, model={self.made.get('model')!r}, "
            f"site={self.site!r}, layers {_ranges(self.layers)}, {n} set{'s' * (n != 1)} of "
            f"demonstrations, width {self.d_model})"
        )

    @property
    def d_model(self) -> int:
        """Width of the residual stream it was read from."""
        return self.values.shape[-1]

    def at(self, layer: int) -> Float[Tensor, "prompt d_model"]:
        """Take one layer.

        Args:
            layer: The layer's number; negative counts from the last one stored.

        Returns:
            theta at that layer for every set of demonstrations.

        Raises:
            ValueError: That layer is not stored.
        """
        if -len(self.layers) <= whole("layer", layer) < 0:
            return self.values[:, layer]
        if layer not in self.layers:
            raise ValueError(
                f"layer {layer} asked for; this vector has layers {_ranges(self.layers)}."
            )
        return self.values[:, self.layers.index(layer)]

    def mean(self) -> "TaskVector":
        """Average over the sets of demonstrations: one theta for the whole task."""
        return replace(self, values=self.values.mean(dim=0, keepdim=True))

    def random_like(self, *, seed: int) -> "TaskVector":
        """Draw random directions with the same norm, vector by vector: the control for an injection.

        Args:
            seed: Decides the directions.

        Returns:
            Gaussian directions, scaled to the norm of the vector they stand in for.
        """
        generator = torch.Generator().manual_seed(whole("seed", seed))
        drawn = random_directions(self.values, generator)
        return replace(self, values=drawn, made={**self.made, "control": f"random {seed}"})

    def __add__(self, other: "TaskVector") -> "TaskVector":
        return self._with(other, 1.0, "+")

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self._with(other, -1.0, "-")

    def __mul__(self, factor: float | int) -> "TaskVector":
        needs("the factor of a task vector", factor, Real, "a number")
        return replace(self, values=factor * self.values)

    __rmul__ = __mul__

    def __neg__(self) -> "TaskVector":
        return -1.0 * self

    def _with(self, other: "TaskVector", sign: float, symbol: str) -> "TaskVector":
        needs("what is added to a task vector", other, TaskVector, "another one")
        for what in ("model", "processing"):
            mine, theirs = self.made.get(what), other.made.get(what)
            if mine != theirs:
                raise ValueError(
                    f"vectors of different {what} do not add: {mine!r} and {theirs!r}."
                )
        if (self.site, self.layers, self.d_model) != (other.site, other.layers, other.d_model):
            raise ValueError(
                f"vectors of different places do not add: {self._place()} and {other._place()}."
            )
        if 1 not in (len(self.values), len(other.values)) and len(self.values) != len(other.values):
            raise ValueError(
                f"{len(self.values)} and {len(other.values)} sets of demonstrations do not match; "
                "take .mean() of one."
            )
        tasks = f"{self.made.get('task')} {symbol} {other.made.get('task')}"
        return replace(
            self,
            values=self.values + sign * other.values.to(self.values),
            made={**self.made, "task": tasks},
        )

    def _place(self) -> str:
        return f"{self.site}, layers {_ranges(self.layers)}, width {self.d_model}"

    def check(self, model: Any) -> None:
        """Refuse a model in which these numbers would mean something else.

        Args:
            model: The model the vector is meant for.

        Raises:
            ValueError: Another width, fewer layers, or another weight processing.
        """
        from tvlens.models import facts

        known = facts(model)
        if known.d_model != self.d_model:
            raise ValueError(
                f"this vector has width {self.d_model} (from {self.made.get('model')!r}), but "
                f"{known.name!r} has d_model = {known.d_model}."
            )
        if max(self.layers) >= known.n_layers:
            raise ValueError(
                f"this vector has layers {_ranges(self.layers)} (from {self.made.get('model')!r}), "
                f"but {known.name!r} has {known.n_layers} layers."
            )
        made = self.made.get("processing")
        if made is not None and made != known.processing:
            raise ValueError(
                f"this vector was made under weight processing {made!r}, but {known.name!r} is loaded "
                f"with {known.processing!r}. Load it with load_model(..., processing={made!r})."
            )

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file, with its origin; never half a file.

        Args:
            path: Where; the suffix is ``.safetensors``.

        Returns:
            The path.

        Raises:
            ValueError: Another suffix.
        """
        meta = {
            "site": self.site,
            "layers": list(self.layers),
            "made": dict(self.made),
        }
        return save_tensors(path, {"values": self.values}, meta, what="a task vector")

    @classmethod
    def load(cls, path: str | Path) -> "TaskVector":
        """Read a saved task vector.

        Args:
            path: A file written by `save`.

        Returns:
            The vector, equal to the one saved.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is cut short or changed, no task vector, of a newer schema, or holds NaN.
        """
        meta, tensors = load_tensors(path, ["values"], what="task vector")
        values = tensors["values"]
        if values.ndim != 3:
            raise ValueError(
                f"{str(Path(path))!r} should hold values of shape (prompt, layer, d_model); "
                f"{tuple(values.shape)} arrived."
            )
        return cls(values, tuple(meta["layers"]), meta["site"], meta.get("made", {}))


def check_vector(vector: Any, model: Any) -> None:
    """Refuse what is no task vector, or one of another model."""
    needs("vector", vector, TaskVector, "a TaskVector, as tv.extract(model, prompts) gives")
    vector.check(model)


def _ranges(layers: tuple[int, ...]) -> str:
    """Say which layers there are, briefly."""
    if len(layers) > 1 and layers == tuple(range(min(layers), max(layers) + 1)):
        return f"{min(layers)} to {max(layers)}"
    return ", ".join(map(str, layers))
