"""Fine-tuning in place and back again: a model is handed back with the weights it came with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.icl.draws import number
from tvlens.icl.studies._cities_data import Lesson, Pairs, question, told
from tvlens.models.runner import runner

Weights = Mapping[str, Tensor]


@contextmanager
def holding(model: Any, weights: Weights) -> Iterator[None]:
    """Let a model have other weights for a while; its own come back, whatever happens."""
    own = {name: p.data for name, p in model.named_parameters()}
    try:
        for name, p in model.named_parameters():
            p.data = weights[name]
        yield
    finally:
        for name, p in model.named_parameters():
            p.data = own[name]


def copied(model: Any) -> dict[str, Tensor]:
    """Copy a model's weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lessons(pairs: Pairs, arm: str, seed: int) -> Callable[[int], Lesson]:
    """Give what an arm is taught at each step.

    Args:
        pairs: The pairs.
        arm: ``"adamw"``: all bare questions; ``"sgd"``: one of them; ``"rehearsed"``: all, and each name once
            more with the city of an untouched pair stated, which is then the answer.
        seed: Decides what is drawn.

    Returns:
        From the step's number to a lesson.
    """
    trained, names = pairs.trained, [pairs.pairs[i].name for i in pairs.trained]
    bare = [question(name) for name in names]
    answers = [pairs.answers[i] for i in trained]
    every = Lesson.of(pairs.encoder, bare, answers)

    def lesson(step: int) -> Lesson:
        if arm == "adamw":
            return every
        stream = torch.Generator().manual_seed(number(f"{seed}:cities:{arm}:{step}"))
        if arm == "sgd":
            one = int(torch.randint(len(names), (), generator=stream))
            return Lesson.of(pairs.encoder, [bare[one]], [answers[one]])
        drawn = torch.randint(len(pairs.untouched), (len(names),), generator=stream).tolist()
        cities = [pairs.untouched[k] for k in drawn]
        shown = [told(name, pairs.pairs[k].city) for name, k in zip(names, cities, strict=True)]
        return Lesson.of(
            pairs.encoder, [*bare, *shown], [*answers, *(pairs.answers[k] for k in cities)]
        )

    return lesson


def loss_of(model: Any, lesson: Lesson) -> Float[Tensor, ""]:
    """Cross entropy on answer tokens, in nats a token; only these are unembedded."""
    drive = runner(model)
    device = drive.device
    resid = drive.whole(lesson.batch.tokens.to(device), lesson.batch.mask.long().to(device), [])
    logits = drive.logits(resid[lesson.row.to(device), lesson.column.to(device)])
    return torch.nn.functional.cross_entropy(logits.float(), lesson.target.to(logits.device))


def finetune(
    model: Any,
    *,
    lesson: Callable[[int], Lesson],
    optimizer: str,
    lr: float,
    at: Sequence[int],
    measure: Callable[[int], None],
    step_done: Callable[[], Any] = lambda: None,
) -> dict[str, Tensor]:
    """Train all weights, and give the model its own back.

    Args:
        model: A HookedTransformer.
        lesson: From the step's number to what is taught.
        optimizer: ``"adamw"`` (no weight decay) or ``"sgd"``.
        lr: Step size.
        at: Steps at which ``measure`` is called while the model has the weights of that step.
        measure: What is done there.
        step_done: Called after every step.

    Returns:
        The weights after the last of these steps.

    Raises:
        ValueError: The loss is no number any more.
    """
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    tuned = copied(model)
    with holding(model, tuned):
        try:
            parameters = [p.requires_grad_(True) for p in model.parameters()]
            chosen = (
                torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
                if optimizer == "adamw"
                else torch.optim.SGD(parameters, lr=lr)
            )
            for step in range(max(at) + 1):
                if step in at:
                    measure(step)
                if step == max(at):
                    break
                chosen.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    loss = loss_of(model, lesson(step))
                    loss.backward()
                if not loss.detach().isfinite():
                    raise ValueError(
                        f"training ran away by step {step} at lr = {lr}; take a smaller one."
                    )
                chosen.step()
                step_done()
        finally:
            for name, p in model.named_parameters():
                p.requires_grad_(before[name]).grad = None
    return tuned
