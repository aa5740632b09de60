"""Algorithm 1 on tables: two predictors learn side by side, and a gate learns which one to trust where.

Sequences arrive one by one. The in-weight predictor counts labels (KT), the in-context predictor copies, and
the gate of each input, a weight between the two, is moved by exponentiated gradient towards the one that has
lost less there. Nothing is trained twice and nothing is tuned, yet the gate shows the whole story: the
context is trusted while counts are small, and given up where they have caught up, first for common classes.

All of a round's losses follow from counts and sums over earlier rounds with the same query or input. So no
loop goes over rounds: they are sorted by query or input, and summed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, Integer

from tvlens._errors import whole
from tvlens.icl._checks import check_others, check_smoothing, share

FREQUENCIES, CONTEXTS = ("C_H", "C_L"), ("relevant", "irrelevant")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Where sequences come from, and what the in-context predictor is.

    Inputs are the prototypes themselves: there is no input noise, and every input is the same as any other
    one of its class.

    Args:
        n_high: Common classes, C_H.
        n_low: Rare classes, C_L.
        p_high: Share of draws that go to common classes.
        p_relevant: Share of sequences whose context holds the query's class.
        label_noise: Share of labels, of context and query, that are moved on to the next class.
        length: Items in the context, L.
        n_relevant: How many of them are of the query's class in a relevant sequence; at least one where None.
        epsilon: The least probability that the in-context predictor gives a class.
        b: Items of the query's class have similarity sqrt(b) to it, others minus that.

    Raises:
        ValueError: The numbers contradict each other.

    Example:
        >>> Stream(label_noise=0.01).probabilities.round(2)
        array([0.18, 0.18, 0.18, 0.18, 0.18, 0.02, 0.02, 0.02, 0.02, 0.02])
    """

    n_high: int = 5
    n_low: int = 5
    p_high: float = 0.9
    p_relevant: float = 0.9
    label_noise: float = 0.05
    length: int = 1
    n_relevant: int | None = None
    epsilon: float = 1e-3
    b: float = 1.0

    def __post_init__(self) -> None:
        for name in ("n_high", "n_low", "length"):
            if whole(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1; {getattr(self, name)} arrived.")
        for name in ("p_high", "p_relevant", "label_noise"):
            share(name, getattr(self, name))
        check_smoothing(self.epsilon, self.n_classes)
        if not self.b >= 0:
            raise ValueError(f"b bounds squared similarities, so b >= 0; {self.b} arrived.")
        asked = self.n_relevant
        if asked is not None and not 1 <= whole("n_relevant", asked) <= self.length:
            raise ValueError(
                f"a context of length {self.length} holds 1 to {self.length} relevant items; "
                f"n_relevant = {asked} arrived."
            )
        check_others(self, self.probabilities.max())

    @property
    def n_classes(self) -> int:
        """Common and rare classes together."""
        return self.n_high + self.n_low

    @property
    def probabilities(self) -> Float[np.ndarray, " classes"]:
        """How often each class is drawn: first the common ones."""
        high = np.full(self.n_high, self.p_high / self.n_high)
        return np.concatenate([high, np.full(self.n_low, (1 - self.p_high) / self.n_low)])


@dataclass(frozen=True)
class Rounds:
    """Sequences in the order in which they arrive.

    Args:
        query: The query's class.
        target: Its label.
        context: Classes of the context's items.
        labels: Their labels.
    """

    query: Int[np.ndarray, " round"]
    target: Int[np.ndarray, " round"]
    context: Int[np.ndarray, "round item"]
    labels: Int[np.ndarray, "round item"]


def draw(stream: Stream, rounds: int, *, seed: int = 0) -> Rounds:
    """Draw sequences.

    Args:
        stream: Where they come from.
        rounds: How many.
        seed: Decides them.

    Returns:
        The sequences; relevant items stand first, which no predictor here can see.

    Raises:
        ValueError: Fewer than one round.

    Example:
        >>> drawn = draw(Stream(length=4, n_relevant=2, p_relevant=1.0), 100)
        >>> (drawn.context == drawn.query[:, None]).sum(axis=1).tolist() == [2] * 100
        True
    """
    if whole("rounds", rounds) < 1:
        raise ValueError(f"at least one round is needed; rounds = {rounds} arrived.")
    rng, p, length = np.random.default_rng(seed), stream.probabilities, stream.length
    query = _pick(p, rng.random(rounds))
    relevant = rng.random(rounds) < stream.p_relevant
    n_same = np.zeros(rounds, int)
    if stream.n_relevant is None:
        # A binomial number of the query's class, given that it is not 0: what rejecting contexts gives.
        none = (1 - p[query]) ** length
        n_same[:] = 1
        chance, left = none, none + rng.random(rounds) * (1 - none)
        for n in range(1, length):
            at_n = _binomial(length, n, p[query])
            chance = chance + at_n
            n_same += left >= chance
    else:
        n_same[:] = stream.n_relevant
    n_same *= relevant
    # Another class than the query's: the query's stretch of the unit interval is cut out.
    starts = p.cumsum() - p
    at = rng.random((rounds, length)) * (1 - p[query])[:, np.newaxis]
    at += np.where(at >= starts[query][:, np.newaxis], p[query][:, np.newaxis], 0)
    same = np.arange(length) < n_same[:, np.newaxis]
    context = np.where(same, query[:, np.newaxis], _pick(p, at))
    noisy = rng.random((rounds, length + 1)) < stream.label_noise
    labels = (context + noisy[:, 1:]) % stream.n_classes
    return Rounds(query, (query + noisy[:, 0]) % stream.n_classes, context, labels)


def algorithm1(
    streams: Stream | Sequence[Stream],
    *,
    rounds: int = 2**17,
    seeds: Sequence[int] = (0,),
    n_times: int = 64,
) -> xr.Dataset:
    """Let the two predictors and the gate learn on streams of sequences, and keep what it cost.

    Args:
        streams: One or several.
        rounds: Sequences of each.
        seeds: Each decides one more run of every stream.
        n_times: At how many times, evenly on a logarithmic scale, the run is looked at.

    Returns:
        By ``stream``, ``seed`` and ``time`` (rounds so far): ``alpha``, the gate by ``frequency`` of the
        query's class and ``context``, averaged over inputs as often as they come; ``loss`` of the mixture
        and ``best``, that of the better predictor of each input chosen in hindsight, per round;
        ``regret``, the difference in sum; ``bound``, what exponentiated gradient guarantees without knowing
        how long it will run; ``bound_known``, the sum over inputs of sqrt(n log(2) / 2) log(1 / epsilon), as
        if it knew, and no loss were above log(1 / epsilon).

    Raises:
        ValueError: No stream, no seed, or numbers below 1.

    Example:
        >>> found = algorithm1(Stream(), rounds=4096)
        >>> alpha = found["alpha"].isel(stream=0, seed=0, time=-1)
        >>> high, low = alpha.sel(context="relevant").values
        >>> bool(high > 0.8 > low)
        True

    References:
        Chan et al. 2025, arXiv:2410.23042, Algorithm 1; Cesa-Bianchi and Lugosi 2006, Prediction, learning,
        and games [cesabianchi2006prediction].
    """
    streams = [streams] if isinstance(streams, Stream) else list(streams)
    if not streams or not len(seeds):
        raise ValueError("at least one stream and one seed are needed.")
    if min(whole("rounds", rounds), whole("n_times", n_times)) < 1:
        raise ValueError(f"rounds and n_times must be at least 1; {rounds} and {n_times} arrived.")
    times = np.unique(np.geomspace(1, rounds, n_times).round().astype(int))
    runs = [[_run(one, draw(one, rounds, seed=seed), times) for seed in seeds] for one in streams]
    dims = ("stream", "seed", "time")
    more = {"alpha": ("frequency", "context")}
    return xr.Dataset(
        {
            name: ((*dims, *more.get(name, ())), np.array([[r[name] for r in row] for row in runs]))
            for name in runs[0][0]
        },
        coords={
            "seed": list(seeds), "time": times, "frequency": list(FREQUENCIES), "context": list(CONTEXTS),
        },
    )  # fmt: skip


def gate(
    lead: Float[np.ndarray, " *input"],
    visits: Int[np.ndarray, " *input"],
    seen: Int[np.ndarray, " *input"],
    *,
    n_classes: int,
    epsilon: float,
) -> Float[np.ndarray, " *input"]:
    """Give the gate of inputs by exponentiated gradient between two predictors, at a rate that falls.

    The rate at the n-th visit is 2 sqrt(log(2) / n) / R; R is the highest loss that was possible: log(1 /
    epsilon) in context, log(2 seen + C) in weights. The regret is then at most R sqrt(n log(2)).

    Args:
        lead: By how much the in-context predictor has lost more there, in sum.
        visits: How often the input was met.
        seen: How often its query was met.
        n_classes: C.
        epsilon: The in-context predictor's least probability.

    Returns:
        Weights of the in-weight predictor at the next visit.

    Example:
        >>> gate(np.zeros(1), np.zeros(1, int), np.zeros(1, int), n_classes=10, epsilon=1e-3)
        array([0.5])
    """
    reach = np.maximum(np.log(1 / epsilon), np.log(2 * seen + n_classes))
    rate = 2 * np.sqrt(np.log(2) / (visits + 1)) / reach
    return 1 / (1 + np.exp(-rate * lead))


def switching_times(
    alpha: Float[np.ndarray, "*run time"], times: Int[np.ndarray, " time"], *, level: float = 0.5
) -> Float[np.ndarray, "*run"]:
    """Find when gates pass a level for good.

    Args:
        alpha: Gates over time.
        times: The times.
        level: Which level.

    Returns:
        Rounds, interpolated on a logarithmic scale; the first time where the gate never lies below, NaN where
        it lies below at the end.

    Raises:
        ValueError: The level lies outside 0..1.

    Example:
        >>> switching_times(np.array([[0.5, 0.4, 0.6], [0.5, 0.4, 0.4]]), np.array([1, 10, 1000])).round(3)
        array([100.,  nan])
    """
    share("level", level)
    log_times, found = np.log(times), np.full(alpha.shape[:-1], np.nan)
    for where in np.ndindex(found.shape):
        below = np.flatnonzero(~(alpha[where] >= level))
        last = below[-1] if len(below) else -1
        if last < 0:
            found[where] = times[0]
        elif last + 1 < len(times):
            ends = slice(last, last + 2)
            found[where] = np.exp(np.interp(level, alpha[where][ends], log_times[ends]))
    return found


def _run(stream: Stream, drawn: Rounds, times: Int[np.ndarray, " time"]) -> dict[str, np.ndarray]:
    """All rounds of one run at once, looked at after each of the times."""
    n_classes, rounds = stream.n_classes, len(drawn.query)
    told = {"n_classes": n_classes, "epsilon": stream.epsilon}
    by_query = _Groups(drawn.query, n_classes)
    pair = _Groups(drawn.query * n_classes + drawn.target, n_classes**2)
    seen = by_query.earlier(np.ones(rounds)).astype(int)
    loss_g = -np.log((pair.earlier(np.ones(rounds)) + 0.5) / (seen + n_classes / 2))
    loss_h = _in_context_loss(stream, drawn)
    first, inputs = _inputs(drawn, n_classes)
    by_input = _Groups(inputs, len(first))
    visits = by_input.earlier(np.ones(rounds)).astype(int)
    alpha = gate(by_input.earlier(loss_h - loss_g), visits, seen, **told)
    loss_f = -np.log(alpha * np.exp(-loss_g) + (1 - alpha) * np.exp(-loss_h))

    kinds = {"n": np.ones(rounds), "g": loss_g, "h": loss_h, "f": loss_f}
    sums = {name: _until(times, inputs, len(first), values) for name, values in kinds.items()}
    query = drawn.query[first]
    seen_until = _until(times, drawn.query, n_classes, np.ones(rounds))[:, query]
    gates = gate(sums["h"] - sums["g"], sums["n"].astype(int), seen_until.astype(int), **told)
    relevant = (drawn.context[first] == query[:, np.newaxis]).any(axis=1)
    rare = query >= stream.n_high
    weight = sums["n"][-1]
    groups = [[(rare == r) & (relevant == c) for c in (True, False)] for r in (False, True)]
    with np.errstate(invalid="ignore"):
        means = [[gates[:, at] @ (weight[at] / weight[at].sum()) for at in row] for row in groups]
    total, best = sums["f"].sum(axis=1), np.minimum(sums["g"], sums["h"]).sum(axis=1)
    floor = np.log(1 / stream.epsilon)
    reach = np.maximum(floor, np.log(2 * seen_until + n_classes))
    paid = np.sqrt(sums["n"] * np.log(2))
    return {
        "alpha": np.moveaxis(np.array(means), -1, 0),
        "loss": total / times,
        "best": best / times,
        "regret": total - best,
        "bound": (paid * reach).sum(axis=1),
        "bound_known": paid.sum(axis=1) * floor / np.sqrt(2),
    }


class _Groups:
    """Rounds sorted by the group they belong to, for sums over earlier rounds of the same group."""

    def __init__(self, group: Int[np.ndarray, " round"], n_groups: int) -> None:
        self.order = np.argsort(_short(group), kind="stable")
        sizes = np.bincount(group, minlength=n_groups)
        self.starts, self.sizes = sizes.cumsum() - sizes, sizes

    def earlier(self, values: Float[np.ndarray, " round"]) -> Float[np.ndarray, " round"]:
        """For each round, the sum over earlier rounds of its group."""
        before = np.concatenate([[0.0], values[self.order].cumsum()])
        found = np.empty(len(values))
        found[self.order] = before[:-1] - np.repeat(before[self.starts], self.sizes)
        return found


def _short(numbers: Int[np.ndarray, " round"]) -> Integer[np.ndarray, " round"]:
    """Integers of 16 bits where they suffice: numpy sorts them by radix, ten times faster."""
    return numbers.astype(np.uint16) if numbers.max() < 2**16 else numbers


def _in_context_loss(stream: Stream, drawn: Rounds) -> Float[np.ndarray, " round"]:
    same = drawn.context == drawn.query[:, np.newaxis]
    weights = np.where(same, np.exp(2 * np.sqrt(stream.b)), 1.0)
    right = np.where(drawn.labels == drawn.target[:, np.newaxis], weights, 0.0)
    said = right.sum(axis=1) / weights.sum(axis=1)
    return -np.log((1 - stream.epsilon * stream.n_classes) * said + stream.epsilon)


def _inputs(drawn: Rounds, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct inputs: query and context, in any order of its items. Labels are not seen."""
    rows = np.concatenate([drawn.query[:, np.newaxis], np.sort(drawn.context, axis=1)], axis=1)
    if n_classes ** rows.shape[1] < 2**62:
        codes = rows @ n_classes ** np.arange(rows.shape[1])
        _, first, inputs = np.unique(_short(codes), return_index=True, return_inverse=True)
    else:
        _, first, inputs = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first, inputs.ravel()


def _until(
    times: Int[np.ndarray, " time"],
    group: Int[np.ndarray, " round"],
    n_groups: int,
    values: Float[np.ndarray, " round"],
) -> Float[np.ndarray, "time group"]:
    """Sum values by group over the rounds until each time."""
    slot = np.repeat(np.arange(len(times)), np.diff(times, prepend=0))
    found = np.bincount(slot * n_groups + group, values, minlength=len(times) * n_groups)
    return found.reshape(len(times), n_groups).cumsum(axis=0)


def _pick(
    p: Float[np.ndarray, " classes"], at: Float[np.ndarray, "*draw"]
) -> Int[np.ndarray, "*draw"]:
    """The class whose stretch of the unit interval holds a point."""
    inner = p.cumsum()[:-1]
    return np.searchsorted(inner, at, side="right")


def _binomial(n: int, k: int, p: Float[np.ndarray, " draw"]) -> Float[np.ndarray, " draw"]:
    return comb(n, k) * p**k * (1 - p) ** (n - k)
