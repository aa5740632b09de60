"""When does the context serve, and when the weights? The theory's bounds, and Algorithm 1 that obeys them.

The first figure is the paper's: what the in-weight predictor loses falls with samples, what the in-context
predictor loses does not, and where they cross the context is given up. Then the bi-level algorithm runs on
tables, and its gates are held against that crossing: each class should switch after N_x* of its own samples,
a class that is nine times rarer nine times later, and never where labels have no noise.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from tvlens.icl.predictors import bayes_risk, kt_excess, kt_regret, label_distribution
from tvlens.icl.presets import at_least, settle, several
from tvlens.icl.studies import study
from tvlens.icl.studies._theory import LEVELS, Theory
from tvlens.icl.tabular import Stream, algorithm1, switching_times
from tvlens.icl.theory import crossover, in_context_bounds, in_weight_bound
from tvlens.provenance import ATTRIBUTE, collect, encode

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"rounds": 2**17, "seeds": 5, "label_noises": (0.0, 0.01, 0.05, 0.1),
              "p_highs": (0.5, 0.8, 0.9, 0.95, 0.98)},
    "paper": {"rounds": 2**20, "seeds": 10, "label_noises": (0.0, 0.001, 0.01, 0.05, 0.1, 0.2),
              "p_highs": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)},
}  # fmt: skip


@study("theory")
def theory(
    *,
    preset: str = "quick",
    seed: int = 0,
    progress: bool = True,
    rounds: int | None = None,
    seeds: int | None = None,
    label_noises: float | Sequence[float] | None = None,
    p_highs: float | Sequence[float] | None = None,
    label_noise: float = 0.05,
    length: int = 8,
    n_classes: int = 10,
    epsilon: float = 1e-3,
    b: float = 1.0,
    figure_noise: float = 1e-3,
    constant: float = 4096.0,
) -> Theory:
    """Compute the bounds of the paper's Figure 1, and run Algorithm 1 against their crossing.

    Args:
        preset: ``"quick"``: 2^17 rounds and five seeds. ``"paper"``: 2^20 and ten. Figure 1 is the same;
            the paper shows no run of Algorithm 1.
        seed: The first seed; the others follow.
        progress: Whether to show a progress bar.
        rounds: Rounds of Algorithm 1; None, here and below, for what the preset says.
        seeds: How many runs of each setting.
        label_noises: Shares of wrong labels that are tried, with p_high = .9.
        p_highs: Shares of draws that go to common classes that are tried, with ``label_noise``.
        label_noise: See ``p_highs``.
        length: Items in a context of Figure 1; Algorithm 1 has one.
        n_classes: Classes in Figure 1; Algorithm 1 has five common and five rare ones.
        epsilon: The least probability that the in-context predictor gives a class.
        b: Similarities lie within plus and minus sqrt(b).
        figure_noise: Share of wrong labels in Figure 1, spread over all other classes.
        constant: What is drawn for the theorem's open term: plus and minus constant / N.

    Returns:
        Bounds, gates, losses and regret, as a result that draws itself.

    Raises:
        ValueError: A preset that does not exist, or settings that contradict each other.
        TypeError: A number that is none.

    Example:
        >>> found = theory(rounds=2000, seeds=1, progress=False)
        >>> found.data["alpha"].sizes["label_noise"]
        4

    References:
        Chan et al. 2025, arXiv:2410.23042, Figure 1, Corollary 1 and Algorithm 1.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    used = settle(
        PRESETS, preset, rounds=rounds, seeds=seeds, label_noises=label_noises, p_highs=p_highs
    )
    at_least(1, rounds=used["rounds"], seeds=used["seeds"])
    at_least(0, seed=seed)
    told: dict[str, Any] = {"epsilon": epsilon, "b": b}
    data = _figure_1(length, n_classes, figure_noise=figure_noise, constant=constant, **told)
    noises, shares = (
        several("label_noises", used["label_noises"]),
        several("p_highs", used["p_highs"]),
    )
    for share in shares:
        if not 0 < share < 1:
            raise ValueError(
                f"p_highs lie above 0 and below 1, so that both kinds come; {share} arrived."
            )
    by_noise = [Stream(label_noise=rho, **told) for rho in noises]
    by_share = [Stream(label_noise=label_noise, p_high=share, **told) for share in shares]
    runs = {"rounds": used["rounds"], "seeds": range(seed, seed + used["seeds"])}
    with tqdm(total=len(noises) + len(shares), disable=not progress, leave=False) as bar:
        noisy = _runs(by_noise, bar, label_noise=noises, **runs)
        shared = _runs(by_share, bar, p_high=shares, **runs)
    data = data.merge(noisy.drop_vars("frequency_ratio")).assign(
        {f"p_{name}": shared[name] for name in ("switch", "switch_of_mean", "predicted")}
        | {"frequency_ratio": shared["frequency_ratio"]}
    )
    note = collect(
        kind=Theory.kind, preset=preset, seed=seed, rounds=used["rounds"], seeds=used["seeds"], length=length,
        n_classes=n_classes, epsilon=epsilon, b=b, figure_noise=figure_noise, constant=constant,
        label_noise=label_noise, seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Theory(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _runs(
    streams: Sequence[Stream],
    bar: Any,
    *,
    rounds: int,
    seeds: Sequence[int],
    **axis: Sequence[float],
) -> xr.Dataset:
    """Run streams along one axis, and add when their gates switch, and when they should."""
    found, ((name, values),) = [], axis.items()
    for stream in streams:
        found.append(algorithm1(stream, rounds=rounds, seeds=seeds).isel(stream=0))
        bar.update()
    data = xr.concat(found, name).assign_coords({name: list(values)})
    dims, shares = (name, "frequency"), [one.probabilities for one in streams]
    return data.assign(
        switch=_switches(data["alpha"]),
        switch_of_mean=_switches(data["alpha"].mean("seed")),
        predicted=(dims, [predicted(one) for one in streams]),
        predicted_exact=(dims, [_exact(one, rounds) for one in streams]),
        frequency_ratio=(name, [float(p[0] / p[-1]) for p in shares]),
    )


def predicted(stream: Stream) -> tuple[float, float]:
    """Say after how many rounds a common and a rare class should switch: N_x* over the class's share.

    Args:
        stream: Sequences with one item in the context.

    Returns:
        Rounds for C_H and C_L; infinity where there is no crossing, or no such class.

    Example:
        >>> print([round(t) for t in predicted(Stream(label_noise=0.05))])
        [189, 1704]
    """
    share = stream.probabilities[[0, -1]]
    told: Any = {"label_noise": stream.label_noise}
    _, loss = in_context_bounds(1, 0, stream.n_classes, stream.epsilon, stream.b, **told)
    with np.errstate(divide="ignore"):
        high, low = crossover(loss, stream.n_classes, **told) / share
    return float(high), float(low)


def _exact(stream: Stream, rounds: int) -> tuple[float, float]:
    """The same with KT's regret in place of its logarithm.

    Samples of a query are tried up to as many as the more frequent class has in the rounds, and infinity is
    given beyond: a rare class may be said to switch long after the last round.
    """
    told: Any = {"label_noise": stream.label_noise}
    _, loss = in_context_bounds(1, 0, stream.n_classes, stream.epsilon, stream.b, **told)
    gap = float(loss) - bayes_risk(stream.n_classes, **told)
    share = stream.probabilities[[0, -1]]
    n = max(int(rounds * share.max()), 1)
    behind = np.flatnonzero(
        kt_regret(n, label_distribution(stream.n_classes, **told)) > gap * np.arange(1, n + 1)
    )
    found = behind[-1] + 2 if len(behind) else 1
    high, low = (found if found <= n else np.inf) / share
    return float(high), float(low)


def _figure_1(
    length: int, n_classes: int, *, epsilon: float, b: float, figure_noise: float, constant: float
) -> xr.Dataset:
    n = np.unique(np.geomspace(2**4, 2**24, 81).round().astype(int))
    told: Any = {"label_noise": figure_noise, "noise": "uniform"}
    risk, falls = bayes_risk(n_classes, **told), label_distribution(n_classes, **told)
    k = np.arange(length)
    low, high = in_context_bounds(length, k, n_classes, epsilon, b)
    bands = {name: in_weight_bound(n, n_classes, constant=c, **told)
             for name, c in (("", 0.0), ("_low", -constant), ("_high", constant))}  # fmt: skip
    meet = np.stack([crossover(end, n_classes, **told) for end in (high, low)], axis=-1)
    exact = [risk + kt_excess(int(one), falls) for one in n]
    return xr.Dataset(
        {f"in_weight{name}": ("n", band) for name, band in bands.items()}
        | {
            "in_weight_next": ("n", in_weight_bound(n, n_classes, form="instantaneous", **told)),
            "in_weight_exact": ("n", exact),
            "in_context_low": ("irrelevant", low),
            "in_context_high": ("irrelevant", high),
            "crossover": (("irrelevant", "end"), meet),
        },
        coords={"n": n, "irrelevant": k, "end": ["first", "last"]},
    )


def _switches(alpha: xr.DataArray) -> xr.DataArray:
    """When gates of relevant contexts pass each level, by frequency, and by seed where there are seeds."""
    gates = alpha.sel(context="relevant", drop=True).transpose(..., "time")
    times = [switching_times(gates.values, gates["time"].values, level=level) for level in LEVELS]
    coords = {name: gates[name].values for name in gates.dims[:-1]} | {"level": list(LEVELS)}
    return xr.DataArray(np.stack(times, axis=-1), dims=(*gates.dims[:-1], "level"), coords=coords)
