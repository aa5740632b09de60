"""Pictures in context: are rare characters read off the context, and for how long?

The paper's experiment on Omniglot, with frozen features in place of a ResNet that is trained along, and
with exemplars that are truly held out: training shows some pictures of a character, every probe shows
others.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tvlens.icl.data import Setting
from tvlens.icl.features import features
from tvlens.icl.glyphs import glyphs
from tvlens.icl.image_data import ImageData
from tvlens.icl.images import Images, omniglot
from tvlens.icl.presets import at_least, settle, several
from tvlens.icl.probes import MEASURES, PROBES, Probe
from tvlens.icl.studies import study
from tvlens.icl.studies._images import DIMS, ImageSweep
from tvlens.icl.studies._sweep import TRAINED, share_of
from tvlens.icl.training import Plan, fingerprint, on_grid, train
from tvlens.icl.transformer import Transformer
from tvlens.models._places import resolve_device
from tvlens.provenance import ATTRIBUTE, collect, encode

# They ask for a rare class as often as the authors' 1e4, 1e5 and 1e6 sequences do.
_QUICK_SIZES = (1_100, 11_000, 110_000)
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"sizes": _QUICK_SIZES, "trained": tuple(TRAINED), "seeds": 2, "steps": 800, "n_high": 20,
              "n_low": 180, "n_novel": 100, "length": 1, "noise": 0.05, "p_high": 0.9, "p_relevant": 0.9,
              "lr": 1e-3, "label_scale": 5.0, "n_train": 15, "vectors": "discriminant", "n_items": 300},
    "paper": {"sizes": (10_000, 100_000, 1_000_000), "trained": tuple(TRAINED), "seeds": 3, "steps": 100_000,
              "n_high": 20, "n_low": 1603, "n_novel": 500, "length": 2, "noise": 0.1, "p_high": 0.9,
              "p_relevant": 0.9, "lr": 3e-4, "label_scale": 1.0, "n_train": 15, "vectors": "discriminant",
              "n_items": 1000},
}  # fmt: skip
_SHOWN = 40  # classes on the sheet, with so many exemplars each
_SHOWN_EXEMPLARS = 2


@study("images")
def images(
    *,
    preset: str = "quick",
    seed: int = 0,
    progress: bool = True,
    device: str | None = None,
    out: Path | None = None,
    folder: str | Path | None = None,
    sizes: int | Sequence[int] | None = None,
    trained: str | Sequence[str] | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    n_high: int | None = None,
    n_low: int | None = None,
    n_novel: int | None = None,
    length: int | None = None,
    noise: float | None = None,
    p_high: float | None = None,
    p_relevant: float | None = None,
    lr: float | None = None,
    label_scale: float | None = None,
    n_train: int | None = None,
    vectors: str | None = None,
    n_items: int | None = None,
) -> ImageSweep:
    """Train transformers on pictures of common and of rare classes, on datasets of growing size.

    Args:
        preset: ``"quick"``: 200 classes, one pair in the context and larger first label embeddings, for
            two CPU cores. ``"paper"``: the authors' 1,623 classes, two pairs and 100,000 steps, meant for
            a GPU.
        seed: The first seed; the others follow. Pictures and features are of the first one.
        progress: Whether to show a progress bar.
        device: Where to train; the first GPU where there is one, else the CPU, where None.
        out: Folder for the training's state; a run that was stopped goes on from it.
        folder: Omniglot, laid out as torchvision unpacks it; characters of a font where None.
        sizes: Sequences in the dataset; None, here and below, for what the preset says.
        trained: ``"transformer"`` (the setting's own share of relevant sequences), ``"in-weight"`` (none),
            or ``"in-context"`` (only those); one or several.
        seeds: How many seeds.
        steps: Training steps.
        n_high: Common classes.
        n_low: Rare classes.
        n_novel: Classes that are never trained on; 0 leaves the probes of novel classes out.
        length: Pairs in the context.
        noise: Standard deviation of the noise on every number of a vector of length 1.
        p_high: Share of draws that go to common classes.
        p_relevant: Share of sequences whose context holds the query's class.
        lr: Learning rate of Adam.
        label_scale: Factor on the first label embeddings, see `tvlens.icl.Transformer`.
        n_train: Exemplars of a class that training shows; the others are for probes.
        vectors: Kind of features, see `tvlens.icl.features.features`.
        n_items: Sequences for each probe.

    Returns:
        Errors of every model, as a result that draws itself.

    Raises:
        FileNotFoundError: The folder is not laid out like that.
        ImportError: Pillow or matplotlib is missing.
        ValueError: Settings that contradict each other, or a state of another run.

    Example:
        >>> images(steps=20, progress=False).finding()  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv:2410.23042, section 5.
    """
    started = time.perf_counter()
    given = {name: value for name, value in locals().items() if name in PRESETS["quick"]}
    used = settle(PRESETS, preset, **given)
    at_least(1, seeds=used["seeds"], n_high=used["n_high"], n_low=used["n_low"])
    at_least(0, seed=seed, n_novel=used["n_novel"])
    trainings, sizes_used = several("trained", used["trained"]), several("sizes", used["sizes"])
    used |= {"trained": trainings, "sizes": sizes_used}
    seeds_used = tuple(range(seed, seed + used["seeds"]))
    cells = list(product(trainings, sizes_used, seeds_used))
    settings = [_setting(used, how, n, member) for how, n, member in cells]
    n_seen = used["n_high"] + used["n_low"]
    pictures = _pictures(folder, n_seen, used["n_novel"], seed, exactly=n_novel is not None)
    used["n_novel"] = len(pictures.pixels) - n_seen
    plan = _plan(used, tuple(p for p in PROBES.values() if used["n_novel"] or p.group != "novel"))
    table = features(
        pictures, n_seen=n_seen, n_train=used["n_train"], kind=used["vectors"], seed=seed
    )
    drawn_at = time.perf_counter()
    where = resolve_device(device)
    data = ImageData(settings, table, device=where)
    model = Transformer(label_scale=used["label_scale"])
    state = None if out is None else Path(out) / f"images-{_mark(data, plan, model)}.safetensors"
    done = train(
        settings,
        plan,
        model=model,
        data=data,
        device=where,
        out=state,
        progress=progress,
        label="images",
    )
    note = collect(
        kind=ImageSweep.kind, preset=preset, seed=seed, device=str(where), **used, batch=plan.batch,
        source=pictures.source, pictures=pictures.digest, train_seconds=round(done.seconds, 1),
        picture_seconds=round(drawn_at - started, 1), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    labels = {
        "trained": list(used["trained"]),
        "n_sequences": list(used["sizes"]),
        "seed": list(seeds_used),
    }
    grid = on_grid(done.measures[[*MEASURES, "train_loss"]], labels)
    shown = pictures.pixels[:_SHOWN, [0, used["n_train"]]]
    found = grid.transpose(*DIMS, missing_dims="ignore").assign(
        sheet=(("class", "exemplar", "height", "width"), shown),
        nearest=("of", np.array([table.accuracy(), table.accuracy(novel=True)])),
    )  # fmt: skip
    found = found.assign_coords(
        {
            "class": list(pictures.names[:_SHOWN]),
            "exemplar": ["training", "held out"],
            "of": ["seen", "novel"],
        }
    )
    return ImageSweep(found.assign_attrs({ATTRIBUTE: encode(note)}))


def _setting(used: dict[str, Any], trained: str, size: int, seed: int) -> Setting:
    names = ("n_high", "n_low", "length", "noise", "p_high")
    return Setting(
        **{name: used[name] for name in names}, n_sequences=size, seed=seed,
        p_relevant=share_of(trained, usual=used["p_relevant"]),
    )  # fmt: skip


def _plan(used: dict[str, Any], probes: tuple[Probe, ...]) -> Plan:
    steps = used["steps"]
    at = (
        tuple(sorted({max(1, round(steps * part)) for part in (0.1, 0.3, 0.6)}))
        if steps > 0
        else ()
    )
    return Plan(steps=steps, at=at, probes=probes, n_items=used["n_items"], lr=used["lr"])


def _mark(data: ImageData, plan: Plan, model: Transformer) -> str:
    """A short name for a state's file, so that other pictures or settings get another file."""
    parts = [data.digest, fingerprint(data, plan, model)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def _pictures(
    folder: str | Path | None, n_seen: int, n_novel: int, seed: int, *, exactly: bool
) -> Images:
    """Pictures of all classes; where a folder has fewer novel ones than the preset wants, those."""
    if folder is None:
        return glyphs(n_seen + n_novel, seed=seed)
    found = omniglot(folder, seed=seed)
    there = len(found.pixels)
    if there < n_seen or (exactly and there < n_seen + n_novel):
        wanted = f"{n_seen} common and rare ones" + (
            f" and {n_novel} novel ones" if exactly else ""
        )
        raise ValueError(
            f"{folder} holds {there} classes; {wanted} were asked for. Nearest: n_low smaller by "
            f"{n_seen + (n_novel if exactly else 0) - there}."
        )
    # A probe of novel classes needs two.
    rest = min(n_novel, there - n_seen)
    return found.first(n_seen + (rest if rest > 1 else 0))
