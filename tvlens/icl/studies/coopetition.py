"""Strategies that compete and help each other: the smallest model in which in-context learning is transient.

Two mechanisms are tensors of rank one, a⊗b⊗c and d⊗b⊗c; they share the factors b and c. The loss is a
product of their two losses, so either will do, plus a cost for having both a and d. The first has the
shorter own factor (20 numbers against 160) and is learnt first; with b and c in place the second comes for
little, and once it stands, the first is only a cost and goes away: it came, and it was transient.

Under gradient descent each factor stays in the plane of where it began and what it should be. Two numbers a
factor are therefore the whole state, and all seeds and settings take a step together.
"""

import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float

from tvlens.icl.presets import at_least, settle, several, within
from tvlens.icl.studies import study
from tvlens.icl.studies._coopetition import Coopetition, dataset
from tvlens.provenance import ATTRIBUTE, collect, encode

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 3, "steps": 16_000, "alphas": (0.1, 0.0), "mu1": (0.1,), "mu2": (0.0,),
              "widths": (160,)},
    "paper": {"seeds": 40, "steps": 16_000, "alphas": (0.1, 0.0, 0.01, 0.03, 0.3), "mu1": (0.1, 0.0, 0.5),
              "mu2": (0.0,), "widths": (160, 20, 40, 80, 320)},
}  # fmt: skip
_SHARED = 20  # numbers in a, in b and in c
_POINTS = 400  # steps that are kept


@study("coopetition")
def coopetition(
    *,
    preset: str = "quick",
    seed: int = 0,
    progress: bool = True,
    seeds: int | None = None,
    steps: int | None = None,
    alphas: float | Sequence[float] | None = None,
    mu1: float | Sequence[float] | None = None,
    mu2: float | Sequence[float] | None = None,
    widths: int | Sequence[int] | None = None,
    lr: float = 1.0,
) -> Coopetition:
    """Train two mechanisms that share factors, and watch the first come and go.

    Args:
        preset: ``"quick"``: three seeds of the paper's setting and of the control without a cost.
            ``"paper"``: 40 seeds of the paper's setting and of dials around it.
        seed: The first seed; the others follow.
        progress: Whether to show a progress bar.
        seeds: How many draws of targets and beginnings; None, here and below, for what the preset says.
        steps: Steps of gradient descent.
        alphas: Costs of having both a and d; 0 is the control. All combinations of dials are run.
        mu1: What mechanism 2 is still worth where mechanism 1 is perfect.
        mu2: The same the other way round.
        widths: Numbers in d; a, b and c have 20.
        lr: Step size.

    Returns:
        Both losses and the cost by setting, seed and step, as a result that draws itself.

    Raises:
        ValueError: A preset that does not exist, a negative number, or none.
        TypeError: A number that is none.

    Example:
        >>> coopetition(steps=200, progress=False).data["setting"].size
        2

    References:
        Singh et al. 2025, Strategy Coopetition, arXiv 2503.05631.
    """
    started = time.perf_counter()
    used = settle(
        PRESETS, preset, seeds=seeds, steps=steps, alphas=alphas, mu1=mu1, mu2=mu2, widths=widths
    )
    dials = {name: several(name, used[name]) for name in ("alphas", "mu1", "mu2", "widths")}
    at_least(1, seeds=used["seeds"], steps=used["steps"])
    at_least(0, seed=seed)
    within(0, float("inf"), lr=lr)
    for name, values in dials.items():
        for value in values:
            if name == "widths":
                at_least(1, widths=value)
            else:
                within(0, float("inf"), **{name: value})
    settings = np.array(list(product(*dials.values())), dtype=float)
    found = _descend(settings, range(seed, seed + used["seeds"]), used["steps"], lr, progress)
    data = dataset(found, settings=settings, seeds=range(seed, seed + used["seeds"]))
    note = collect(
        kind=Coopetition.kind, preset=preset, seed=seed, steps=used["steps"], lr=lr, shared=_SHARED,
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Coopetition(data.assign_attrs({ATTRIBUTE: encode(note)}))


def drawn(
    seed: int, width: int
) -> tuple[list[Float[np.ndarray, " number"]], list[Float[np.ndarray, " number"]]]:
    """Draw what the factors a, b, c, d should be, and where they begin.

    Args:
        seed: The seed.
        width: Numbers in d.

    Returns:
        Four targets and four beginnings, all standard normal. The same seed draws the same a, b and c for
        every width.

    Example:
        >>> [len(x) for x in drawn(0, 160)[0]]
        [20, 20, 20, 160]
    """
    sizes = (_SHARED, _SHARED, _SHARED, width)
    rngs = [np.random.default_rng([seed, i]) for i in range(4)]
    pairs = [rng.standard_normal((n, 2)) for rng, n in zip(rngs, sizes, strict=True)]
    return [pair[:, 0] for pair in pairs], [pair[:, 1] for pair in pairs]


def _plane(
    settings: Float[np.ndarray, "setting dial"], seeds: Sequence[int]
) -> tuple[
    Float[np.ndarray, "factor coordinate setting seed"], Float[np.ndarray, "factor setting seed"]
]:
    """Give each factor's coordinates along and across its target, and how long the target is."""
    state = np.empty((4, 2, len(settings), len(seeds)))
    length = np.empty((4, len(settings), len(seeds)))
    for s, setting in enumerate(settings):
        for m, seed in enumerate(seeds):
            for i, (true, begin) in enumerate(zip(*drawn(seed, int(setting[3])), strict=True)):
                length[i, s, m] = np.linalg.norm(true)
                along = true @ begin / length[i, s, m]
                state[i, :, s, m] = along, np.linalg.norm(begin - along * true / length[i, s, m])
    return state, length


def losses(
    state: Float[np.ndarray, "factor coordinate ..."],
    length: Float[np.ndarray, "factor ..."],
    width: Float[np.ndarray, "..."],
) -> tuple[
    Float[np.ndarray, "mechanism ..."],
    Float[np.ndarray, "..."],
    Float[np.ndarray, "factor coordinate ..."],
    Float[np.ndarray, "factor coordinate ..."],
]:
    """Give both mechanisms' losses, the cost, and the gradients of the losses, in closed form.

    Half the mean squared error of a rank-one tensor needs only the lengths of the factors and their inner
    products with the targets, since those of outer products multiply.

    Args:
        state: Coordinates of a, b, c, d along and across their targets.
        length: Lengths of the targets.
        width: Numbers in d.

    Returns:
        The losses of mechanisms 1 and 2; the cost; the gradient of loss 1; that of loss 2.

    Example:
        >>> state, length = np.zeros((4, 2)), np.ones(4)
        >>> losses(state, length, np.array(160.0))[0] * 2 * 20**3
        array([1.   , 0.125])

    References:
        Singh et al. 2025, Strategy Coopetition, arXiv 2503.05631.
    """
    inner, square = state[:, 0] * length, (state**2).sum(axis=1)
    full = length**2
    found, gradients = [], []
    for own, size in ((0, _SHARED), (3, width)):
        n = size * float(_SHARED**2)
        cross = [inner[i] * inner[j] for i, j in ((1, 2), (own, 2), (own, 1))]
        norms = [square[i] * square[j] for i, j in ((1, 2), (own, 2), (own, 1))]
        error = full[own] * full[1] * full[2] - 2 * cross[0] * inner[own] + norms[0] * square[own]
        gradient = np.zeros_like(state)
        for factor, of_inner, of_square in zip((own, 1, 2), cross, norms, strict=True):
            gradient[factor] = of_square * state[factor]
            gradient[factor, 0] -= of_inner * length[factor]
        # A difference of large numbers may end below zero by rounding.
        found.append(np.maximum(error, 0) / (2 * n))
        gradients.append(gradient / n)
    cost = np.asarray(square[0] * square[3] / (2 * _SHARED * width))
    return np.stack(found), cost, gradients[0], gradients[1]


def _descend(
    settings: Float[np.ndarray, "setting dial"],
    seeds: Sequence[int],
    steps: int,
    lr: float,
    progress: bool,
) -> dict[str, Any]:
    """Train all members at once; keep some steps, and every step's least loss of mechanism 1."""
    from tqdm.auto import tqdm

    alpha, mu1, mu2, width = (settings[:, i, None] for i in range(4))
    state, length = _plane(settings, seeds)
    kept = np.unique(np.round(np.geomspace(1, steps + 1, min(_POINTS, steps + 1))).astype(int) - 1)
    kept = np.union1d(kept, [0, steps])
    shape = (*state.shape[2:], len(kept))
    curves = {name: np.empty(shape) for name in ("loss_1", "loss_2", "cost")}
    cosine = np.empty((4, *shape))
    least, when = np.full(shape[:2], np.inf), np.zeros(shape[:2], dtype=int)
    at = 0
    for step in tqdm(range(steps + 1), disable=not progress, leave=False):
        if not np.abs(state).max() < 1e6:
            raise ValueError(
                f"gradient descent ran away at lr = {lr}; the paper takes 1. Nearest: 1."
            )
        (one, two), cost, of_one, of_two = losses(state, length, width)
        lower = one < least
        least, when = np.where(lower, one, least), np.where(lower, step, when)
        if step == kept[at]:
            for name, value in zip(curves, (one, two, cost), strict=True):
                curves[name][..., at] = value
            cosine[..., at] = state[:, 0] / np.sqrt((state**2).sum(axis=1))
            at += 1
        gradient = (two + mu2) * of_one + (one + mu1) * of_two
        gradient[0] += alpha * (state[3] ** 2).sum(axis=0) / (_SHARED * width) * state[0]
        gradient[3] += alpha * (state[0] ** 2).sum(axis=0) / (_SHARED * width) * state[3]
        state = state - lr * gradient
    return curves | {"cosine": cosine, "least_1": least, "step_of_least_1": when, "step": kept}
