"""Score answers by their first token, prompt by prompt, as Hendel et al. do.

A prediction is right when it is the first token of an accepted answer. Outcomes are kept for every prompt,
so that intervals and paired tests need no second run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, FirstToken, Request, run
from tvlens.intervals import wilson
from tvlens.prompts import Prompts, check_prompts
from tvlens.sites import check_layer
from tvlens.vectors import TaskVector, check_vector

VIEWS = ("regular", "zero_shot")


@dataclass(frozen=True, eq=False)
class Scores:
    """Outcome of every prompt.

    Attributes:
        correct: Whether the prediction is the first token of an accepted answer.
        predicted: The predicted token's id.
        text: The predicted token as text.
        queries: The query of each prompt.
        log_prob: Its log probability, in nats.
        answer_log_prob: Log probability of the likeliest accepted first token, in nats.
    """

    correct: Bool[Tensor, " prompt"]
    predicted: Int[Tensor, " prompt"]
    log_prob: Float[Tensor, " prompt"]
    answer_log_prob: Float[Tensor, " prompt"]
    text: tuple[str, ...]
    queries: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of prompts answered right."""
        return self.correct.float().mean().item()

    def interval(self, *, level: float = 0.95) -> tuple[float, float]:
        """Wilson interval of the accuracy; prompts that ask the same query count as one."""
        return of_queries(self.accuracy, self.queries, level=level)


def score(
    model: Any,
    prompts: Prompts,
    *,
    view: str = "regular",
    vector: TaskVector | None = None,
    layer: int | None = None,
    mode: str = "replace",
    scale: float = 1.0,
    position: int = -1,
    plan: str = "auto",
    memory: int | None = None,
) -> Scores:
    """Run prompts, with a task vector injected if one is given, and mark the answers.

    Args:
        model: A TransformerLens model.
        prompts: The prompts.
        view: ``"regular"`` for [S, x], ``"zero_shot"`` for [x].
        vector: Injected if given: one set of demonstrations for all prompts, or one for each. None is
            the run without one, whatever layer is named.
        layer: Where to inject; needed with a vector. Negative counts from the last layer.
        mode: ``"replace"`` or ``"add"``.
        scale: Factor on the vector.
        position: Token position that is edited.
        plan: How the engine runs the prompts, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        Outcomes of all prompts.

    Raises:
        ValueError: An unknown view or mode, a vector without a layer or of another model, or a layer
            outside the model.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> prompts = tv.build_prompts(tv.load_task("to_upper"), model, n=8)
        >>> 0 <= tv.score(model, prompts, view="zero_shot").accuracy <= 1
        True
    """
    batch = view_of(prompts, view)
    cell = injection(model, vector, layer, mode=mode, scale=scale, position=position)
    readout = FirstToken(prompts.answer_ids)
    request = Request(batch, cells=(cell,), readout=readout)
    (output,) = run(model, [request], plan=plan, memory=memory)
    values = {name: tensor[0].cpu() for name, tensor in output.values.items()}
    text = tuple(model.tokenizer.decode([i]) for i in values["predicted"].tolist())
    return Scores(**values, text=text, queries=prompts.queries)


def view_of(prompts: Prompts, view: str) -> TokenBatch:
    """Give the view of prompts by its name."""
    check_prompts(prompts)
    if view not in VIEWS:
        raise unknown("view", view, VIEWS)
    return prompts.regular if view == "regular" else prompts.zero_shot


def injection(
    model: Any,
    vector: TaskVector | None,
    layer: int | None,
    *,
    mode: str = "replace",
    scale: float = 1.0,
    position: int = -1,
) -> tuple[Edit, ...]:
    """Give what the engine is told to inject a vector; nothing without one. Arguments as in `score`."""
    if vector is None:
        return ()
    if layer is None:
        raise ValueError("a vector needs a layer to go into: score(..., vector=v, layer=14).")
    check_vector(vector, model)
    layer = check_layer(layer, model.cfg.n_layers)
    return (Edit(vector.site, layer, vector.at(layer), position=position, mode=mode, scale=scale),)


def correct_cells(
    model: Any, prompts: Prompts, batch: TokenBatch, cells: Sequence[Sequence[Edit]]
) -> Bool[np.ndarray, "cell prompt"]:
    """Whether the first predicted token is right, in every way of running a view of some prompts.

    Args:
        model: A TransformerLens model.
        prompts: Whose answers count.
        batch: The view of them that is run.
        cells: Ways of running it.

    Returns:
        Outcomes by cell and prompt.
    """
    readout = FirstToken(prompts.answer_ids)
    ways = tuple(tuple(cell) for cell in cells)
    (output,) = run(model, [Request(batch, cells=ways, readout=readout)])
    return output.values["correct"].cpu().numpy()


def of_queries(
    accuracy: float, queries: Sequence[str], *, level: float = 0.95
) -> tuple[float, float]:
    """Give the Wilson interval of an accuracy; prompts that ask the same query count as one."""
    independent = len(set(queries))
    return wilson(accuracy * independent, independent, level=level)
