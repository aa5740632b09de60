"""Learn a task vector: let the gradient write what the demonstrations would have.

The model is frozen; one vector at one layer and the last token is all there is to train. It starts at theta,
and each step runs only the last token through the blocks above it (`tvlens.engine.tail.Tail`). Some queries
are held out: the vector that does best on them is kept, so training longer can only waste time.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.engine.request import MODES
from tvlens.engine.tail import Tail
from tvlens.extraction import extract
from tvlens.metrics import VALUE, LogProbability, Targets
from tvlens.prompts import Prompts, check_prompts
from tvlens.vectors import TaskVector

_EVERY = 5  # steps from one look at the held-out queries to the next
_WORSE = 10.0  # nats by which a loss that rises so far above the first has diverged
_BETAS = (0.9, 0.99)


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned task vector, and how it was learned.

    Attributes:
        vector: The vector, at its layer; what was best on the held-out queries.
        losses: Loss of each step's batch, in nats.
        held_out: Loss on the held-out queries, before the first step and then every few steps, in nats.
        steps: The steps after which the held-out queries were looked at.
        stopped: ``"finished"``, ``"no longer better"`` or ``"diverged"``.
        seconds: Time that it took.
    """

    vector: TaskVector
    losses: Float[Tensor, " step"]
    held_out: Float[Tensor, " look"]
    steps: tuple[int, ...]
    stopped: str
    seconds: float

    @property
    def best(self) -> int:
        """How many steps the kept vector has behind it."""
        return self.steps[int(self.held_out.nan_to_num(torch.inf, torch.inf).argmin())]

    @property
    def lowest(self) -> float:
        """The kept vector's loss on the held-out queries, in nats."""
        return float(self.held_out.nan_to_num(torch.inf, torch.inf).min())


def learn(
    model: Any,
    prompts: Prompts,
    *,
    layer: int,
    start: TaskVector | None = None,
    mode: str = "replace",
    steps: int = 150,
    rate: float = 0.03,
    batch_size: int = 32,
    holdout: float = 0.2,
    patience: int = 50,
    seed: int = 0,
    memory: int | None = None,
) -> Learned:
    """Learn one vector that makes the model answer queries without demonstrations.

    Args:
        model: A TransformerLens model; it is not changed.
        prompts: Whose zero-shot view is trained on; other prompts should judge the vector.
        layer: The vector is written after this layer, at the last token; negative from the end.
        start: Where to begin; by default theta of the prompts' own demonstrations, averaged, or for
            ``mode="add"`` zero.
        mode: ``"replace"`` or ``"add"``, as the vector is meant to be injected.
        steps: At most how many steps of Adam; the rate falls to zero over them.
        rate: Step size, as a share of the usual size of the residual stream's entries there.
        batch_size: Prompts a step.
        holdout: Share of the queries that choose which step's vector is kept.
        patience: After how many steps without a better one to stop.
        seed: Decides which queries are held out, and the batches.
        memory: Bytes that the engine's activations may take.

    Returns:
        The vector with its losses. One that diverges is stopped, and the best one so far is kept.

    Raises:
        ValueError: Fewer than two queries, an unknown mode, a start of another place or width, or settings
            out of range.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> prompts = tv.build_prompts("to_upper", model, n=8)
        >>> found = learn(model, prompts, layer=0, steps=20)
        >>> bool(found.held_out.min() <= found.held_out[0])
        True

    References:
        Yang et al. 2025, arXiv:2509.24169.
    """
    started = time.perf_counter()
    check_prompts(prompts)
    _check(mode, steps, rate, batch_size, holdout, patience)
    tail = Tail(model, prompts.zero_shot, layer=layer, memory=memory)
    first = _first(model, prompts, tail, start, mode)
    fit, held = split_by_query(prompts.queries, holdout, seed=seed)
    training = _Training(tail, prompts, mode == "add", first, rate, steps)
    losses, looks, at, stopped = _train(training, fit, held, batch_size, patience, seed)
    made = {**_origin(model, prompts), "method": "learned", "mode": mode, "rate": rate}
    made |= {"learn_seed": seed, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    vector = TaskVector(training.best.detach().cpu().float()[None, None], (tail.layer,), made=made)
    return Learned(
        vector, torch.tensor(losses), torch.tensor(looks), tuple(at), stopped,
        round(time.perf_counter() - started, 3),
    )  # fmt: skip


def _check(
    mode: str, steps: int, rate: float, batch_size: int, holdout: float, patience: int
) -> None:
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    for name, value in (("steps", steps), ("batch_size", batch_size), ("patience", patience)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; {value} arrived.")
    if not rate > 0:
        raise ValueError(f"rate must be above 0; {rate} arrived.")
    if not 0 < holdout < 1:
        raise ValueError(f"holdout is a share between 0 and 1; {holdout} arrived.")


def _first(
    model: Any, prompts: Prompts, tail: Tail, start: TaskVector | None, mode: str
) -> Float[Tensor, " d_model"]:
    """Where to begin."""
    if start is not None:
        start.check(model)
        if start.site != "resid_post":
            raise ValueError(f"a start stands at resid_post; one at {start.site} arrived.")
        return start.at(tail.layer).mean(dim=0).to(tail.clean)
    if mode == "add":
        return torch.zeros_like(tail.clean[0])
    return extract(model, prompts, layers=[tail.layer]).mean().values[0, 0].to(tail.clean)


def _origin(model: Any, prompts: Prompts) -> dict[str, Any]:
    from tvlens.models import facts

    about = {k: v for k, v in prompts.facts.items() if k != "ambiguous"}
    return {**facts(model).origin, "position": -1, **about, "n_prompts": len(prompts)}


def split_by_query(
    queries: Sequence[str], holdout: float, *, seed: int
) -> tuple[Int[Tensor, " fit"], Int[Tensor, " held"]]:
    """Split prompts into those to fit to and those to choose by; no query is in both.

    Args:
        queries: The query of each prompt.
        holdout: Share of the distinct queries to choose by.
        seed: Decides which.

    Returns:
        Numbers of the prompts to fit to, and of the others.

    Raises:
        ValueError: Fewer than two distinct queries.

    Example:
        >>> [len(rows) for rows in split_by_query(["a", "b", "a", "c"], 0.3, seed=1)]
        [3, 1]
    """
    distinct = sorted(set(queries))
    if len(distinct) < 2:
        raise ValueError(
            f"a vector is learned on some queries and chosen on others: at least 2 are needed; "
            f"{len(distinct)} arrived."
        )
    random.Random(seed).shuffle(distinct)
    n = min(max(round(holdout * len(distinct)), 1), len(distinct) - 1)
    held = set(distinct[:n])
    chosen = torch.tensor([query in held for query in queries])
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


class _Training:
    """One vector, its loss, and Adam."""

    def __init__(
        self,
        tail: Tail,
        prompts: Prompts,
        add: bool,
        first: Tensor,
        rate: float,
        steps: int,
    ) -> None:
        self.tail, self.add = tail, add
        # Steps are as large as entries there are, whatever the model's scale.
        self.size = rate * tail.clean.double().square().mean().sqrt().item()
        self.vector = first.detach().float().clone().requires_grad_()
        self.best, self.steps = self.vector.detach().clone(), steps
        self.adam = torch.optim.Adam([self.vector], lr=self.size, betas=_BETAS)
        self.said = LogProbability().readout(Targets(len(prompts), answers=prompts.answer_ids))

    def loss(self, prompt: Int[Tensor, " row"]) -> Float[Tensor, ""]:
        """Mean of minus the log probability of the accepted first tokens."""
        drive, clean = self.tail.drive, self.tail.clean
        resid = self.vector.to(clean).expand(len(prompt), -1)
        resid = resid + clean[prompt.to(clean.device)] if self.add else resid
        logits = drive.logits(self.tail(resid, prompt))
        return -self.said(logits, prompt.to(logits.device))[VALUE].mean()

    def step(self, number: int, prompt: Int[Tensor, " row"]) -> float:
        """One step of Adam."""
        with torch.enable_grad():
            loss = self.loss(prompt)
            (slope,) = torch.autograd.grad(loss, self.vector)
        value = loss.item()
        if math.isfinite(value) and bool(slope.isfinite().all()):
            self.vector.grad = slope
            for group in self.adam.param_groups:
                group["lr"] = self.size * (1 - number / self.steps)
            self.adam.step()
        return value


def _lower(one: float, other: float) -> bool:
    """Whether a loss is better than another one; what is no number is worst."""
    return one < other or (math.isnan(other) and not math.isnan(one))


def _train(
    training: _Training,
    fit: Int[Tensor, " fit"],
    held: Int[Tensor, " held"],
    batch_size: int,
    patience: int,
    seed: int,
) -> tuple[list[float], list[float], list[int], str]:
    """Go down; keep what is best on the held-out queries, and stop when nothing gets better."""
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    with torch.no_grad():
        looks, at, best = [float(training.loss(held))], [0], 0
    for number in range(training.steps):
        drawn = torch.randperm(len(fit), generator=generator)[:batch_size]
        losses.append(training.step(number, fit[drawn]))
        if not losses[-1] <= losses[0] + _WORSE:
            return losses, looks, at, "diverged"
        if (number + 1) % _EVERY and number + 1 < training.steps:
            continue
        with torch.no_grad():
            looks.append(float(training.loss(held)))
        at.append(number + 1)
        if _lower(looks[-1], looks[best]):
            best, training.best = len(looks) - 1, training.vector.detach().clone()
        elif at[-1] - at[best] >= patience:
            return losses, looks, at, "no longer better"
    return losses, looks, at, "finished"
