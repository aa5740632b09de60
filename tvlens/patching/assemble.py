"""From arrays to a labelled result: what patching, ablation, tracing and path patching have in common."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine.readout import Readout
from tvlens.metrics import Ids, Metric, Targets, measure, metric_of
from tvlens.patching.grid import Grid
from tvlens.patching.pairs import Answers, answer_ids, distinct, real_tokens, spelled, token_labels
from tvlens.patching.results import Patching
from tvlens.patching.sweep import Swept

BEFORE = 5  # likeliest tokens that are kept of untouched runs


@dataclass(frozen=True)
class Task:
    """What is measured: the metric and what it measures against.

    Attributes:
        metric: The metric.
        targets: Answers and reference.
        logits: By name of the run, its logits at each prompt's last position.
    """

    metric: Metric
    targets: Targets
    logits: dict[str, Float[Tensor, "prompt d_vocab"]]

    def untouched(self, run: str) -> Float[np.ndarray, " prompt"]:
        """The metric of an untouched run."""
        logits = self.logits[run]
        return measure(self.metric.readout(self.targets), logits).float().cpu().numpy()

    def readout(self, rows: slice) -> Readout:
        """What turns logits of a range of prompts into the metric."""
        return self.metric.readout(self.targets).rows(rows)

    def also(self, run: str, logits: Float[Tensor, "prompt d_vocab"] | None) -> "Task":
        """The same with the logits of one more run, if there are any."""
        return self if logits is None else replace(self, logits={**self.logits, run: logits})


def needed_first(
    metric: str | Metric | Callable[..., Any], answers: Answers | None, wrong: Answers | None
) -> set[str]:
    """Say which untouched runs must be known before anything can be measured.

    Args:
        metric: A metric.
        answers: Right answers, if given.
        wrong: Wrong answers, if given.

    Returns:
        Names of runs.
    """
    needs = metric_of(metric).needs
    runs = set()
    if "reference" in needs or ("answers" in needs and answers is None):
        runs.add("clean")
    if "wrong" in needs and wrong is None:
        runs.add("corrupted")
    return runs


def make_task(
    model: Any,
    batch: TokenBatch,
    metric: str | Metric | Callable[..., Any],
    logits: dict[str, Tensor],
    *,
    answers: Answers | None,
    wrong: Answers | None,
) -> Task:
    """Settle what is measured, with what the model itself says where nothing was given.

    Args:
        model: The model.
        batch: Clean prompts.
        metric: A metric.
        logits: Logits of those runs that must be known, see `needed_first`; others may be missing.
        answers: Right answers; by default what the clean run predicts.
        wrong: Wrong answers; by default what the corrupted run predicts, or the clean run's second choice.

    Returns:
        The task.

    Raises:
        ValueError: Answers are missing, are no tokens, or cannot be told apart.
    """
    metric = metric_of(metric)
    for name, given in (("answers", answers), ("wrong", wrong)):
        if (
            given is not None
            and name not in metric.needs
            and not callable(getattr(metric, "function", None))
        ):
            takes = ", ".join(metric.needs) or "neither answers nor wrong"
            raise ValueError(f"metric {metric.name!r} takes no {name}; it takes {takes}.")
    right: Ids | None = None
    other: Ids | None = None
    if "answers" in metric.needs:
        right = _given_or(model, batch, answers, "answers", lambda: logits["clean"].argmax(dim=-1))
    if "wrong" in metric.needs:
        other = _given_or(model, batch, wrong, "wrong", lambda: _wrong(logits))
        distinct(model, right or (), other)
    targets = Targets(len(batch), right, other, logits.get("clean"))
    return Task(metric, targets, logits)


def _given_or(
    model: Any,
    batch: TokenBatch,
    given: Answers | None,
    name: str,
    said: Callable[[], Tensor],
) -> Ids:
    if given is None:
        return tuple((i,) for i in said().tolist())
    return answer_ids(model, batch, given, name=name)


def _wrong(logits: dict[str, Tensor]) -> Tensor:
    """What the corrupted run says, or else the clean run's second choice."""
    if "corrupted" in logits:
        return logits["corrupted"].argmax(dim=-1)
    return logits["clean"].topk(2, dim=-1).indices[:, 1]


def assemble(
    model: Any,
    grid: Grid,
    swept: Swept,
    task: Task,
    batches: dict[str, TokenBatch],
    *,
    started: float,
    coords: dict[str, Any] | None = None,
    **note: Any,
) -> Patching:
    """Label the values of a sweep.

    Args:
        model: The model.
        grid: The cells.
        swept: Their values.
        task: What was measured.
        batches: By name of the run, its prompts; the clean ones first.
        started: When the work began, by `time.perf_counter`.
        coords: More coordinates.
        **note: More for the provenance: method, direction, verb, heading, and settings.

    Returns:
        The result.
    """
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    n = len(batches["clean"])
    runs = {run: task.untouched(run) for run in task.logits}
    # The untouched run of the sweep itself, so that what changes nothing changes exactly nothing.
    runs["corrupted" if note["direction"] == "denoise" else "clean"] = swept.base
    words = {run: [spelled(model, ids) for ids in real_tokens(b)] for run, b in batches.items()}
    table: dict[str, Any] = {run: ("prompt", values) for run, values in runs.items()}
    table["value"] = ((*grid.dims, "prompt"), swept.values.reshape(*grid.shape, n))
    for run, logits in task.logits.items():
        table |= _likeliest(model, run, logits)
    if swept.top is not None:
        tokens, shares = (each.reshape(*grid.shape, n, -1) for each in swept.top)
        dims = (*grid.dims, "prompt", "rank_after")
        table["top_token"] = (dims, _written(model, tokens))
        table["top_probability"] = (dims, shares.astype("float32"))
    data = xr.Dataset(table, coords=_coords(model, grid, task, batches, words) | (coords or {}))
    known = facts(model)
    data.attrs[ATTRIBUTE] = encode(
        collect(
            kind=Patching.kind,
            metric=task.metric.name,
            sites=list(grid.sites),
            by=list(grid.by),
            positions=list(grid.together) if grid.together is not None else None,
            heads=list(grid.heads_together) if grid.heads_together is not None else None,
            n_prompts=n,
            model=known.name,
            n_layers=known.n_layers,
            model_facts=known.to_dict(),
            plan=swept.plan.name,
            plan_reason=str(swept.plan),
            cells=int(np.prod(grid.shape)),
            cells_run=swept.n_run,
            **note,
            seconds=round(time.perf_counter() - started, 3),
        )
    )
    return Patching(data)


def _coords(
    model: Any,
    grid: Grid,
    task: Task,
    batches: dict[str, TokenBatch],
    words: dict[str, list[list[str]]],
) -> dict[str, Any]:
    found: dict[str, Any] = {"site": list(grid.sites), "layer": list(grid.layers)}
    for run, batch in batches.items():
        found[f"{run}_text"] = ("prompt", np.array(batch.text, dtype=object))
    for name, ids in (("answer", task.targets.answers), ("wrong", task.targets.wrong)):
        if ids is not None:
            spoken = [" | ".join(spelled(model, row)) for row in ids]
            found[name] = ("prompt", np.array(spoken, dtype=object))
    if grid.heads is not None:
        found["head"] = list(grid.heads)
    if grid.positions is not None:
        found["position"] = list(grid.positions)
        first = next(iter(words.values()))
        found["token"] = ("position", np.array(token_labels(first, grid.positions), dtype=object))
        for run, spoken in words.items():
            at = [[_at(row, p) for p in grid.positions] for row in spoken]
            found[f"{run}_token"] = (("prompt", "position"), np.array(at, dtype=object))
    return found


def _at(row: Sequence[str], position: int) -> str:
    return row[position] if -len(row) <= position < len(row) else ""


def _likeliest(model: Any, run: str, logits: Tensor) -> dict[str, Any]:
    """The likeliest tokens of an untouched run."""
    best = logits.float().softmax(dim=-1).topk(min(BEFORE, logits.shape[-1]), dim=-1)
    return {
        f"{run}_top_token": (("prompt", "rank"), _written(model, best.indices.cpu().numpy())),
        f"{run}_top_probability": (("prompt", "rank"), best.values.float().cpu().numpy()),
    }


def _written(model: Any, ids: np.ndarray) -> np.ndarray:
    """Write token ids, each distinct one once."""
    distinct_ids, back = np.unique(ids, return_inverse=True)
    words = np.array([*spelled(model, distinct_ids.tolist()), ""], dtype=object)[:-1]
    return words[back.reshape(ids.shape)]
