"""The call that runs a grid: what is missing is computed, and what was found so far is given back."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvlens._errors import unknown
from tvlens.executors import Lost, Serial, resolve
from tvlens.sweeps import _identity
from tvlens.sweeps._calls import Call
from tvlens.sweeps._folder import Folder
from tvlens.sweeps._grid import Cell, Grid
from tvlens.sweeps._read import View, describe
from tvlens.sweeps._result import Sweep
from tvlens.sweeps._work import Outcome, Work, release

ON_ERROR = ("record", "raise")
_AXES = ("model", "task", "tasks", "seed")


def sweep(
    experiment: str | Callable[..., Any],
    *,
    tasks: Any = None,
    models: Any = None,
    seeds: int | Sequence[int] = 0,
    out: str | Path,
    over: Mapping[str, Any] | None = None,
    executor: Any = None,
    threads: int = 1,
    on_error: str = "record",
    retry: bool = False,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Sweep:
    """Run an experiment for every model, task and seed, and keep each cell as soon as it is finished.

    A rerun computes only what is missing, whichever executor ran before, and however it ended. Cells of one
    model come together, so each worker loads a model once. With the same number of threads the numbers
    are equal to the bit on machines of one type, in every executor.

    Args:
        experiment: The name of an experiment or study (`tvlens.experiments.names`), or a function that takes
            any of ``model``, ``task``, ``seed`` by these names, and returns a `Result`, an `xarray.Dataset`,
            a number, or numbers by name.
        tasks: Tasks, names, or task files. For an experiment that takes several tasks at once, one list of
            them, or several lists, or lists by name; by default its own.
        models: Names or paths that `tvlens.load_model` knows, functions that load a model (such as
            ``functools.partial(load_model, "gpt2", dtype="bfloat16")``), or models in hand; one, several, or
            by the names they shall have.
        seeds: One, or several.
        out: The folder for cells, failures and plans, or a URL that fsspec knows (``s3://...``). All workers
            must reach it.
        over: More axes: values by the name of a setting, such as ``{"shots": [1, 2, 5]}``.
        executor: Where cells are computed: None for this process, a number of processes, a
            `tvlens.executors.Ray` or `Slurm`, or a `concurrent.futures.Executor`.
        threads: Threads that torch uses for a cell. Last bits depend on it, so it is part of a cell's
            identity.
        on_error: ``"record"`` keeps the traceback of a cell that fails and goes on; ``"raise"`` stops there.
        retry: Whether cells that failed before are tried again.
        resume: Whether to refuse to begin: the folder has to hold this very sweep already.
        progress: Whether to show a progress bar with the time left.
        **settings: Settings of the experiment, the same for all cells.

    Returns:
        One row a cell, with its state and its numbers. `tvlens.sweeps.join` gives the arrays.

    Raises:
        ValueError: An unknown experiment, task, model or setting, a point given twice, an empty axis, or
            ``resume=True`` where there is no such sweep.
        TypeError: A setting that cannot be written down, or a model in hand for another process.
        RuntimeError: A cell failed and ``on_error="raise"``.

    Example:
        >>> import tempfile
        >>> from tvlens.testing import tiny_model
        >>> found = sweep(
        ...     "layer_sweep", tasks=["to_upper", "to_lower"], models={"tiny": tiny_model}, seeds=[0, 1],
        ...     out=tempfile.mkdtemp(), n_dev=4, n_test=6, progress=False,
        ... )
        >>> found.counts(), found.data["hypothesis"].dims
        ({'done': 4, 'failed': 0, 'missing': 0}, ('model', 'task', 'seed'))
    """
    if on_error not in ON_ERROR:
        raise unknown("on_error", on_error, ON_ERROR)
    if threads < 1:
        raise ValueError(f"threads={threads} asked for; a cell needs at least 1.")
    where = resolve(executor)
    call, folder = Call.of(experiment), Folder.at(out)
    grid = Grid.of(
        call, tasks=tasks, models=models, seeds=seeds, over=over or {}, settings=settings,
        threads=threads,
    )  # fmt: skip
    plan = grid.plan()
    name = _identity.digest(plan)[:12]
    if resume:
        _is_there(folder, name, plan)
    folder.save_plan(name, plan)
    work = Work(call, folder, threads, _identity.versions())
    missing = _missing(grid, folder, retry=retry)
    try:
        # Closed, an executor ends what it has begun: also where a cell's failure ends the sweep.
        with contextlib.closing(_settled(where.run(work, missing), work)) as outcomes:
            for cell, outcome in _watched(outcomes, missing, grid, progress=progress):
                if outcome.error and on_error == "raise":
                    trace = folder.failure(cell.key)["traceback"]
                    raise RuntimeError(f"the cell of {cell.said} failed: {outcome.error}\n{trace}")
    finally:
        if isinstance(where, Serial):
            release()
    return View(folder, name, plan).table()


def _is_there(folder: Folder, name: str, plan: Mapping[str, Any]) -> None:
    """Refuse to begin a sweep where one was to be resumed, and say what is other than in the latest there."""
    plans = folder.plans()
    if name in plans:
        return
    if not plans:
        raise ValueError(
            f"resume=True, but there is no sweep in {folder}: leave it out to begin one."
        )
    *_, latest = plans.values()
    raise ValueError(
        f"resume=True, but the sweep in {folder} ({describe(latest)}) is another: "
        f"{'; '.join(_differences(latest, plan))}. Leave resume out to run both side by side."
    )


def _differences(there: Any, asked: Any, name: str = "") -> list[str]:
    """Where two plans differ, in words."""
    if there == asked:
        return []
    if isinstance(there, Mapping) and isinstance(asked, Mapping):
        return [
            said
            for key in dict.fromkeys((*there, *asked))
            for said in _differences(there.get(key), asked.get(key), str(key))
        ]
    if name in _AXES or (isinstance(there, list) and isinstance(asked, list)):
        there, asked = (
            [p[0] if isinstance(p, list) else p for p in x or ()] for x in (there, asked)
        )
        if there == asked:
            return [f"{name} of the same names, but other content"]
    return [f"{name} {there!r}, asked for is {asked!r}"]


def _missing(grid: Grid, folder: Folder, *, retry: bool) -> list[Cell]:
    """Cells that are to be computed."""
    there = folder.finished() | (set() if retry else folder.failed())
    return [cell for cell in grid.cells() if cell.key not in there]


def _settled(outcomes: Iterator[Any], work: Work) -> Generator[Outcome, None, None]:
    """Write down the cells whose worker died, which could not do so itself."""
    try:
        for outcome in outcomes:
            if isinstance(outcome, Lost):
                yield from work.lost(outcome.items, outcome.reason)
            else:
                yield outcome
    finally:
        if hasattr(outcomes, "close"):
            outcomes.close()  # pyright: ignore[reportAttributeAccessIssue]


def _watched(
    outcomes: Iterator[Outcome], cells: Sequence[Cell], grid: Grid, *, progress: bool
) -> Iterator[tuple[Cell, Outcome]]:
    """Give each cell with what became of it, and show how far the sweep is."""
    from tqdm.auto import tqdm

    by_key, failed, total = {cell.key: cell for cell in cells}, 0, math.prod(grid.shape)
    done = total - len(cells)
    with tqdm(total=total, initial=done, desc=grid.call.name, disable=not progress) as bar:
        for outcome in outcomes:
            cell = by_key[outcome.key]
            failed += bool(outcome.error)
            bar.set_postfix_str(cell.said + (f"; {failed} failed" if failed else ""))
            bar.update()
            yield cell, outcome
