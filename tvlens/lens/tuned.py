"""The tuned lens: one affine map for each layer into the basis that the unembedding reads.

A map is kept as what it adds, so that zeros are the logit lens. It is stored as safetensors with the model it
belongs to, and refuses another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import needs
from tvlens._tensors import load_tensors, save_tensors
from tvlens.engine.probe import SAME, apart, probe
from tvlens.lens.reading import STREAM, wide_site
from tvlens.models.runner import runner
from tvlens.sites import check_layers

KIND = "tuned_lens"
# Half precision moves logits by about a hundredth of their spread, another model by all of it.


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Affine translators of a model's layers: ``h + h @ weight + bias`` is read out in place of ``h``.

    Attributes:
        weight: For each layer what is added to the identity; input by output.
        bias: For each layer.
        layers: Which layer each slice belongs to.
        site: Where it reads.
        made: Origin: model, processing, how it was trained, and KL on held-out text.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> lens = TunedLens.train(model, "to be or not to be, " * 40, steps=5)
        >>> lens.heldout["kl"].dims
        ('lens', 'layer')

    References:
        Belrose et al. 2023, arXiv:2303.08112.
    """

    weight: Float[Tensor, "layer d_in d_model"]
    bias: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    site: str = STREAM
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            needs(name, tensor, Tensor, "a tensor")
        n, width = self.bias.shape if self.bias.ndim == 2 else (-1, -1)
        if self.weight.shape != (n, width, width) or len(self.layers) != n:
            raise ValueError(
                "a tuned lens has a square matrix and a bias for each layer; "
                f"{tuple(self.weight.shape)}, {tuple(self.bias.shape)} and {len(self.layers)} layers arrived."
            )
        if not (torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all()):
            raise ValueError("a tuned lens must be finite; NaN or infinity arrived.")

    @classmethod
    def identity(
        cls, model: Any, *, site: str = STREAM, layers: int | Sequence[int] | None = None
    ) -> "TunedLens":
        """Begin with translators that change nothing: the logit lens.

        Args:
            model: A TransformerLens model.
            site: Where it reads.
            layers: Which layers; all by default.

        Returns:
            The lens.

        Raises:
            ValueError: There is no such site or layer.
        """
        drive = runner(model)
        deep, width = (
            check_layers(layers, drive.n_layers),
            drive.site_shape(wide_site(drive, site))[0],
        )
        weight = torch.zeros(len(deep), width, width, device=drive.device)
        return cls(weight, weight[:, 0].clone(), deep, site, _made(model))

    @classmethod
    def train(
        cls,
        model: Any,
        texts: Any = None,
        *,
        steps: int = 60,
        lr: float = 1e-3,
        seed: int = 0,
        site: str = STREAM,
        layers: int | Sequence[int] | None = None,
        batch: int = 64,
        context: int = 128,
        ridge: float | None = 0.3,
        heldout: float = 0.15,
        n_heldout: int = 192,
        plan: str = "auto",
        memory: int | None = None,
    ) -> "TunedLens":
        """Train translators so that each layer's prediction comes near the final one, in KL.

        The model reads the text once. Translators begin at a weighted ridge regression from each layer onto
        the final residual, which needs no unembedding, and are then trained on the divergence itself.

        Args:
            model: A TransformerLens model.
            texts: A text, a list of texts, token ids ``prompt position``, or a `TokenBatch`; by default the
                passages that come with tvlens, 15 kB of English. More text makes a better lens.
            steps: Steps of Adam on the divergence; 0 leaves the regression.
            lr: Learning rate at the first step; it falls to zero linearly.
            seed: Decides which positions each step sees, and at which held-out ones the gain is measured.
            site: Where it reads, a site of width d_model.
            layers: Which layers; all by default.
            batch: Positions that a step sees; the cost is that of so many rows of the unembedding by layer.
            context: Tokens of each piece that texts are cut into.
            ridge: Strength of the regression's pull towards the identity; None begins at the identity.
            heldout: Share of the pieces that are not trained on.
            n_heldout: Positions of these on which the gain is measured, at most.
            plan: How the engine runs the texts, see `tvlens.engine.run`.
            memory: Bytes that residuals may take; longer texts are not read to their end.

        Returns:
            The lens, with its divergence and that of the logit lens on held-out text.

        Raises:
            ValueError: There is too little text, or a number makes no sense.

        References:
            Belrose et al. 2023, arXiv:2303.08112; Yom Din et al. 2023, arXiv:2303.09435.
        """
        from tvlens.lens.training import Settings, train

        settings = Settings(
            steps=steps, lr=lr, seed=seed, batch=batch, context=context, ridge=ridge, heldout=heldout,
            n_heldout=n_heldout, plan=plan, memory=memory,
        )  # fmt: skip
        return train(model, texts, cls.identity(model, site=site, layers=layers), settings)

    @property
    def d_model(self) -> int:
        """Width of the residual stream it reads."""
        return self.bias.shape[-1]

    def index(self, layer: int) -> int:
        """Say which slice belongs to a layer.

        Args:
            layer: The layer, from 0.

        Returns:
            The slice's number.

        Raises:
            ValueError: The lens has no translator for it.
        """
        if layer not in self.layers:
            raise ValueError(
                f"layer {layer} asked for; this tuned lens has layers {', '.join(map(str, self.layers))}."
            )
        return self.layers.index(layer)

    def translate(
        self, resid: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Carry residuals of a layer over into the last layer's basis.

        Args:
            resid: Residuals.
            layer: The layer they were read from.

        Returns:
            What the read-out takes in their place.

        Raises:
            ValueError: The lens has no translator for this layer.
        """
        at = self.index(layer)
        weight, bias = self.weight[at].to(resid.device), self.bias[at].to(resid.device)
        # In single precision: what is added is small beside what is there.
        wide = resid.to(torch.promote_types(resid.dtype, weight.dtype))
        added = wide @ weight.to(wide) + bias.to(wide)
        return (wide + added).to(resid.dtype)

    @property
    def heldout(self) -> xr.Dataset:
        """KL from the final distribution on held-out text, in nats: ``kl`` by lens and layer."""
        known = self.made.get("heldout")
        if not known:
            raise ValueError("this lens was not trained, so nothing was held out.")
        return xr.Dataset(
            {"kl": (("lens", "layer"), [known["logit"], known["tuned"]])},
            coords={"lens": ["logit", "tuned"], "layer": list(self.layers)},
            attrs={"positions": known["positions"]},
        )

    @property
    def gain(self) -> xr.DataArray:
        """By how many nats it is nearer to the final distribution than the logit lens, on held-out text."""
        kl = self.heldout["kl"]
        return (kl.sel(lens="logit", drop=True) - kl.sel(lens="tuned", drop=True)).rename("gain")

    def __repr__(self) -> str:
        low, high = min(self.layers), max(self.layers)
        said = f"TunedLens of {self.made.get('model')!r}: {self.site}, layers {low} to {high}"
        if not self.made.get("heldout"):
            return said
        kl = self.heldout["kl"].mean("layer")
        return (
            f"{said}; mean KL on held-out text {float(kl.sel(lens='tuned')):.2f} nats, through the logit "
            f"lens {float(kl.sel(lens='logit')):.2f}"
        )

    def check(self, model: Any) -> None:
        """Refuse a model that this lens was not made for.

        Args:
            model: The model.

        Raises:
            ValueError: Another width, number of layers, weight processing, or other weights.
        """
        from tvlens.models import facts

        known, origin = facts(model), self.made.get("model")
        for what, mine, theirs in (
            ("width", self.d_model, known.d_model),
            ("layers", self.made.get("n_layers"), known.n_layers),
            ("tokens", self.made.get("d_vocab"), known.d_vocab),
        ):
            if mine is not None and mine != theirs:
                raise ValueError(
                    f"this tuned lens belongs to {origin!r} with {what} {mine}; {known.name!r} has {theirs}."
                )
        processing = self.made.get("processing")
        if processing is not None and processing != known.processing:
            raise ValueError(
                f"this tuned lens was made under weight processing {processing!r}, but {known.name!r} is "
                f"loaded with {known.processing!r}. Load it with load_model(..., processing={processing!r})."
            )
        known_by = self.made.get("probe")
        # Someone's own hooks change what the model says; it is the same model.
        if known_by is None or runner(model).has_user_hooks():
            return
        away = apart(known_by, probe(model))
        if not away < SAME:
            raise ValueError(
                f"this tuned lens belongs to {origin!r} with other weights than {known.name!r}: logits of a "
                f"probe are {away:.0%} of their spread away. Train one for it: TunedLens.train(model)."
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
            "kind": KIND,
            "site": self.site,
            "layers": list(self.layers),
            "made": dict(self.made),
        }
        tensors = {"weight": self.weight, "bias": self.bias}
        return save_tensors(path, tensors, meta, what="a tuned lens")

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "TunedLens":
        """Read a saved lens for a model.

        Args:
            path: A file written by `save`.
            model: The model it was trained on.

        Returns:
            The lens, equal to the one saved.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is cut short or changed, no tuned lens, of a newer schema or another model.
        """
        meta, tensors = load_tensors(path, ["weight", "bias"], what="tuned lens", kind=KIND)
        found = cls(
            **tensors, layers=tuple(meta["layers"]), site=meta["site"], made=meta.get("made", {})
        )
        found.check(model)
        return found


def _made(model: Any) -> dict[str, Any]:
    """What a lens must know of its model."""
    from tvlens.models import facts

    known = facts(model)
    return {
        **known.origin,
        "n_layers": known.n_layers,
        "d_vocab": known.d_vocab,
        "probe": probe(model),
    }
