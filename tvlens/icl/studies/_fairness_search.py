"""Search for fair prompts: greedily, by the fairness of each demonstration alone, and at random.

Nothing here knows a model: whoever calls says how fair each of several prompts is, all at once, so that one
run of the model can serve many pools.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from numpy import ndarray

Shown = tuple[str, ...]
"""The inputs of a prompt's demonstrations, in order; the last stands before the query."""
Score = Callable[[Sequence[Shown]], Sequence[float] | Float[ndarray, " prompt"]]
"""Says how fair each of several prompts is."""


@dataclass(frozen=True)
class Greedy:
    """What greedy search found in one pool.

    Attributes:
        steps: The prompt after each step; the first has one demonstration.
        fairness: How fair each of these is.
        stop: How many demonstrations the authors' search ends with.
        evaluations: How many prompts were scored until then, the step that made it stop among them.
        spent: How many were scored in all.
        alone: How fair each demonstration of the pool is by itself.
    """

    steps: tuple[Shown, ...]
    fairness: tuple[float, ...]
    stop: int
    evaluations: int
    spent: int
    alone: dict[str, float]

    @property
    def found(self) -> Shown:
        """The prompt that the authors' search ends with."""
        return self.steps[self.stop - 1]


class _Search:
    """The state of greedy search in one pool."""

    def __init__(self, pool: Sequence[str]) -> None:
        self.pool = tuple(pool)
        self.steps: list[Shown] = []
        self.fairness: list[float] = []
        self.spent: list[int] = []
        self.stop: int | None = None
        self.alone: dict[str, float] = {}

    def trials(self, least: int) -> list[Shown]:
        """Prompts to score next: each remaining demonstration put before those that are held."""
        held = self.steps[-1] if self.steps else ()
        if self.stop is not None and len(held) >= least:
            return []
        return [(x, *held) for x in self.pool if x not in held]

    def take(self, tried: Sequence[Shown], values: Sequence[float]) -> None:
        """Hold the fairest; the authors' search stops where that is less fair than before."""
        if not self.steps:
            self.alone = {shown[0]: value for shown, value in zip(tried, values, strict=True)}
        best = max(range(len(tried)), key=values.__getitem__)
        if self.stop is None and self.fairness and values[best] < self.fairness[-1]:
            self.stop = len(self.steps)
        self.steps.append(tried[best])
        self.fairness.append(values[best])
        self.spent.append(len(tried))

    def done(self) -> Greedy:
        stop = self.stop or len(self.steps)
        return Greedy(
            steps=tuple(self.steps),
            fairness=tuple(self.fairness),
            stop=stop,
            evaluations=sum(self.spent[: stop + 1]),
            spent=sum(self.spent),
            alone=self.alone,
        )


def greedy(score: Score, pools: Sequence[Sequence[str]], *, least: int = 1) -> list[Greedy]:
    """Search each pool by G-fair-Prompting, all pools side by side.

    Each step puts before the prompt the demonstration that makes it fairest. As in the authors' code the
    first one is always taken, ties go on, and the search ends where the fairest prompt of a step is less fair
    than that of the step before. There is no bound on the number of demonstrations but the pool.

    Args:
        score: Says how fair prompts are; called once a step, with the trials of all pools.
        pools: Demonstrations to choose from.
        least: Steps that are taken at least, so that the same search also tells what it would have found
            without its stop.

    Returns:
        The search of each pool.

    Raises:
        ValueError: A pool is empty, or smaller than ``least``.

    Example:
        >>> worth = {"a": 1.0, "b": 3.0, "c": -1.0}
        >>> found, = greedy(lambda tried: [sum(map(worth.get, x)) for x in tried], [list("abc")])
        >>> found.found, found.evaluations
        (('a', 'b'), 6)

    References:
        Ma et al. 2023, Fairness-guided Few-shot Prompting, arXiv 2303.13217, Algorithm 2.
    """
    if short := [pool for pool in pools if len(pool) < max(least, 1)]:
        raise ValueError(
            f"every pool needs at least {max(least, 1)} demonstrations; one of {len(short[0])} arrived."
        )
    searches = [_Search(pool) for pool in pools]
    while tried := [(s, trials) for s in searches if (trials := s.trials(least))]:
        values = [float(x) for x in score([shown for _, trials in tried for shown in trials])]
        for search, trials in tried:
            search.take(trials, values[: len(trials)])
            values = values[len(trials) :]
    return [search.done() for search in searches]


def fairest_alone(alone: dict[str, float], shots: int) -> Shown:
    """Take the demonstrations that are fairest by themselves, as T-fair-Prompting.

    Args:
        alone: How fair each demonstration is by itself.
        shots: How many are taken.

    Returns:
        The demonstrations; the fairest stands last, next to the query, since each is put before those that
        were taken before.

    Example:
        >>> fairest_alone({"a": 0.2, "b": 0.9, "c": 0.5}, 2)
        ('c', 'b')

    References:
        Ma et al. 2023, Fairness-guided Few-shot Prompting, arXiv 2303.13217, Algorithm 1.
    """
    ranked = sorted(alone, key=alone.__getitem__, reverse=True)
    return tuple(reversed(ranked[:shots]))


def random_prompts(pool: Sequence[str], shots: int, n: int, rng: random.Random) -> list[Shown]:
    """Draw different prompts from a pool: sets and orders at random.

    Args:
        pool: Demonstrations.
        shots: How many a prompt shows.
        n: Prompts; all there are, where these are fewer.
        rng: Where random numbers come from.

    Returns:
        The prompts.

    Example:
        >>> len(random_prompts(["a", "b", "c"], 2, 100, random.Random(0)))
        6
    """
    drawn: dict[Shown, None] = {}
    while len(drawn) < min(n, math.perm(len(pool), shots)):
        drawn[tuple(rng.sample(list(pool), shots))] = None
    return list(drawn)
