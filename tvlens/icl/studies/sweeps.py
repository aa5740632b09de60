"""The paper's grids: what of the data decides whether a transformer uses its context or its weights.

Each study turns one dial and trains models on datasets of growing size. Where classes are rare the context is
used first, and given up when the weights have seen enough.

References:
    Chan et al. 2025, arXiv:2410.23042, section 4.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tvlens.icl.studies import study
from tvlens.icl.studies._sweep import TRAINED, Dial, Sweep, sweep

_ALL = tuple(TRAINED)
_PAPER = {"sizes": (6, 8, 10, 12, 14, 16, 18, 20), "trained": _ALL, "seeds": 5, "steps": 100_000,
          "n_items": 3000, "label_scale": 1.0}  # fmt: skip
# Larger first label embeddings stand in for the many steps that copying otherwise needs.
_QUICK = {"sizes": (6, 8, 10, 12, 14), "trained": ("transformer",), "seeds": 2, "steps": 1000,
          "n_items": 300, "label_scale": 2.0}  # fmt: skip


def _dial(
    name: str, sets: str, says: str, quick: dict[str, Any], paper: dict[str, Any], **base: Any
) -> Dial:
    presets = {"quick": _QUICK | quick, "paper": _PAPER | paper}
    return Dial(name=name, sets=sets, says=says, presets=presets, base=base)


_own = {"trained": ("transformer",)}
_few = {"sizes": (8, 10, 12)}
_GRIDS = (
    _dial("noise", "noise", "input noise", {"values": (0.2,), "trained": _ALL},
          {"values": (0.0, 0.02, 0.2, 0.4)}),
    _dial("p_high", "p_high", "share of common classes", {"values": (0.5, 0.9)},
          {"values": (0.5, 0.9, 0.99)}),
    _dial("p_relevant", "p_relevant", "share of relevant sequences", {"values": (0.1, 0.5, 0.9)},
          {"values": (0.0, 0.1, 0.5, 0.9, 0.99, 1.0), **_own}),
    _dial("label_noise", "label_noise", "label noise", {"values": (0.01, 0.1)},
          {"values": (0.001, 0.01, 0.1)}, noise=0.0),
    _dial("length", "length", "pairs in the context", {"values": (1, 2, 4), **_few},
          {"values": (1, 2, 4, 8, 16)}),
    _dial("relevant", "n_relevant", "relevant pairs among four", {"values": (1, 4), **_few},
          {"values": (1, 2, 3, 4)}, length=4),
    _dial("rare", "n_low", "number of rare classes", {"values": (5, 45), **_few},
          {"values": (5, 45, 95, 495), "sizes": (10, 12, 14, 16, 18, 20), "steps": 1_000_000}),
)  # fmt: skip
DIALS = {dial.name: dial for dial in _GRIDS}


def _study(dial: Dial) -> Callable[..., Sweep]:
    def run(
        *,
        preset: str = "quick",
        seed: int = 0,
        progress: bool = True,
        device: str | None = None,
        out: Path | None = None,
        values: Sequence[float | int] | float | int | None = None,
        sizes: Sequence[int] | int | None = None,
        trained: Sequence[str] | str | None = None,
        seeds: int | None = None,
        steps: int | None = None,
        n_items: int | None = None,
        label_scale: float | None = None,
    ) -> Sweep:
        return sweep(
            dial, preset=preset, seed=seed, progress=progress, device=device, out=out, values=values,
            sizes=sizes, trained=trained, seeds=seeds, steps=steps, n_items=n_items, label_scale=label_scale,
        )  # fmt: skip

    run.__name__ = run.__qualname__ = dial.name
    run.presets = dial.presets  # pyright: ignore[reportFunctionMemberAccess]
    run.__doc__ = f"""Turn a dial of the data over dataset sizes: {dial.says}.

    Args:
        preset: ``"quick"`` for two CPU cores, ``"paper"`` for what the authors ran.
        seed: The first seed.
        progress: Whether to show progress bars.
        device: Where to train; the first GPU where there is one, else the CPU, where None.
        out: Folder for states; a run that was stopped goes on from it.
        values: Values of ``{dial.sets}``; None, here and below, for what the preset says.
        sizes: Sequences in the dataset, as powers of two.
        trained: ``"transformer"`` (the setting's own share of relevant sequences), ``"in-weight"`` (none),
            or ``"in-context"`` (only those); one or several.
        seeds: How many seeds.
        steps: Training steps.
        n_items: Sequences for each probe.
        label_scale: Factor on the first label embeddings, see `tvlens.icl.Transformer`.

    Returns:
        Errors of every model, as a result that draws itself.

    Raises:
        ValueError: Settings that contradict each other, or a state of another run.

    References:
        Chan et al. 2025, arXiv:2410.23042, section 4.
    """
    return study(dial.name)(run)


noise, p_high, p_relevant, label_noise, length, relevant, rare = map(_study, DIALS.values())
