"""What a method is given, and what it gives back."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, Read, Request, run
from tvlens.function_vectors import HeadEffects, head_effects
from tvlens.models.runner import runner
from tvlens.prompts import Prompts
from tvlens.scoring import correct_cells
from tvlens.tasks import Task
from tvlens.templates import Role

Write = Callable[[Prompts, TokenBatch], tuple[Edit, ...]]
"""What is written into a batch: into a view of these prompts, or into other text."""
Cells = Sequence[tuple[Edit, ...]]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method that has seen a task.

    Attributes:
        write: What is written into a prompt.
        layer: Where; the highest layer if there are several.
        forwards: How often a prompt went through the model.
        seconds: How long that took; 0 is for `tvlens.methods.fit` to measure.
        note: What else was chosen.
    """

    write: Write
    layer: int
    forwards: int
    seconds: float = 0.0
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Work:
    """What a method is given.

    Attributes:
        model: The model.
        task: The task.
        dev: Dev prompts; neither their queries nor their demonstrations are test queries.
        how: How they were made, as arguments of `build_prompts`.
        seed: Seed of the method's own choices.
        kept: What several methods need, made once.
    """

    model: Any
    task: Task
    dev: Prompts
    how: dict[str, Any]
    seed: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return runner(self.model).n_layers

    @property
    def n_items(self) -> int:
        """How many items the dev split has."""
        return -(-int(self.dev.facts["n_items"]) // 2)

    def right(self, cells: Cells) -> Bool[Tensor, "cell prompt"]:
        """Which dev prompts each way of writing answers without demonstrations."""
        return torch.from_numpy(correct_cells(self.model, self.dev, self.dev.zero_shot, cells))

    def best(self, cells: Cells) -> int:
        """The first of the ways that answer most dev prompts."""
        return int(self.right(cells).float().mean(dim=1).argmax())

    def fitted(self, method: "Callable[[Work], Fitted]") -> Fitted:
        """What a method makes of this work; made once, with the time that it took."""
        if method not in self.kept:
            started = time.perf_counter()
            found = method(self)
            took = found.seconds or time.perf_counter() - started
            self.kept[method] = replace(found, seconds=took)
        return self.kept[method]

    def effects(self) -> HeadEffects:
        """What every head does for the task, by patching and by gradient; computed once."""
        if "effects" not in self.kept:
            self.kept["effects"] = head_effects(
                self.model, self.task, shots=min(10, self.n_items - 1), seed=self.seed,
                demonstrations="split", template=self.how["template"], answers=self.how["answers"],
            )  # fmt: skip
        return self.kept["effects"]


def always(*edits: Edit) -> Write:
    """Write the same into everything."""
    return lambda prompts, view: edits


def rows_for(
    view: TokenBatch, values: Float[Tensor, "row d_model"]
) -> Float[Tensor, "kept d_model"]:
    """Take the mean of values that are one a prompt where the view is text that asks nothing."""
    asks = bool((view.roles == int(Role.QUERY)).any())
    return values if asks else values.mean(dim=0, keepdim=True)


def states(
    work: Work, *, position: int = -1
) -> tuple[Float[Tensor, "prompt layer d_model"], Float[Tensor, "prompt layer d_model"]]:
    """Residual streams at one token of each dev query, without and with demonstrations."""
    reads = (Read("resid_post", tuple(range(work.n_layers)), position),)
    views = [Request(view, reads=reads) for view in (work.dev.zero_shot, work.dev.regular)]
    bare, shown = (output.activations[0][0].double().cpu() for output in run(work.model, views))
    return bare, shown
