"""A sweep's folder read: what is there, and what its cells found."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tvlens import provenance
from tvlens._errors import unknown
from tvlens.results import Result, as_result
from tvlens.sweeps._arrays import from_bytes
from tvlens.sweeps._folder import Folder
from tvlens.sweeps._grid import keys_of
from tvlens.sweeps._join import Joiner, labelled
from tvlens.sweeps._result import DONE, FAILED, MISSING, Sweep, spread


@dataclass(frozen=True)
class View:
    """One plan of a folder.

    Attributes:
        folder: The folder.
        name: The plan's name.
        plan: What it says.
    """

    folder: Folder
    name: str
    plan: Mapping[str, Any]

    @classmethod
    def of(cls, out: str | Path | Folder, plan: str | None = None) -> "View":
        """Open a folder.

        Raises:
            ValueError: There is no sweep in it, or there are several and none is named.
        """
        folder = Folder.at(out)
        plans = folder.plans()
        if not plans:
            raise ValueError(
                f"there is no sweep in {folder}: tvlens.sweep(..., out=...) makes one."
            )
        if plan is None and len(plans) > 1:
            said = "; ".join(f"{name}: {describe(one)}" for name, one in plans.items())
            raise ValueError(
                f"{folder} holds {len(plans)} sweeps; name one by plan=. They are: {said}."
            )
        name = next(iter(plans)) if plan is None else plan
        if name not in plans:
            raise unknown("plan", name, plans)
        return cls(folder, name, plans[name])

    @property
    def labels(self) -> dict[str, list[Any]]:
        """Labels by axis."""
        return {axis: [label for label, _ in points] for axis, points in self.plan["axes"].items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of labels of each axis."""
        return tuple(len(labels) for labels in self.labels.values())

    def places(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Each cell's place on the axes, and its key."""
        return zip(itertools.product(*map(range, self.shape)), keys_of(self.plan), strict=True)

    def states(self) -> np.ndarray:
        """Whether each cell is done, failed or missing."""
        finished, failed = self.folder.finished(), self.folder.failed()
        states = [
            DONE if key in finished else FAILED if key in failed else MISSING
            for _, key in self.places()
        ]
        return np.array(states, dtype=object).reshape(self.shape)

    def table(self) -> Sweep:
        """Read every cell's few numbers."""
        states, dims = self.states(), tuple(self.labels)
        numbers: dict[str, dict[tuple[int, ...], Any]] = {}
        seconds = np.full(self.shape, np.nan)
        errors, keys = (np.full(self.shape, "", dtype=object) for _ in range(2))
        for at, key in self.places():
            keys[at] = key
            if states[at] == FAILED:
                states[at], errors[at] = self._failed(key)
            if states[at] != DONE:
                continue
            record = self.folder.record(key)
            seconds[at] = record["seconds"]
            for name, value in record["numbers"].items():
                numbers.setdefault(name, {})[at] = value
        found = {name: (dims, _column(values, self.shape)) for name, values in numbers.items()}
        own = {"state": states, "seconds": seconds, "error": errors, "key": keys}
        found = {f"cell_{n}" if n in (*own, *dims) else n: v for n, v in found.items()}
        coords = {axis: labelled(labels) for axis, labels in self.labels.items()}
        data = xr.Dataset({name: (dims, values) for name, values in own.items()} | found, coords)
        settings = {k: v for k, v in self.plan.items() if k not in ("schema", "versions", "axes")}
        note = provenance.collect(kind=Sweep.kind, plan=self.name, **settings)
        return Sweep(data.assign_attrs({provenance.ATTRIBUTE: provenance.encode(note)}))

    def _failed(self, key: str) -> tuple[str, str]:
        """State and error of a cell that had failed: it may have succeeded, or be tried again, since then."""
        try:
            return FAILED, self.folder.failure(key)["error"]
        except FileNotFoundError:
            return (DONE if self.folder.has(key) else MISSING), ""

    def arrays(self, variables: Sequence[str]) -> xr.Dataset:
        """Read the named variables of every cell, or all of them."""
        finished, joiner, seen = self.folder.finished(), Joiner(self.labels), set()
        for at, key in self.places():
            if key not in finished:
                continue
            record = self.folder.record(key)
            if "file" in record:
                cell = from_bytes(self.folder.content(record), variables or None)
            else:
                numbers = {n: number(v) for n, v in record["numbers"].items()}
                cell = xr.Dataset(
                    {n: v for n, v in numbers.items() if not variables or n in variables}
                )
            seen |= set(map(str, cell.variables))
            joiner.add(at, cell)
        for name in variables:
            if name not in seen:
                raise unknown("variable", name, self.variables())
        return joiner.dataset()

    def variables(self) -> list[str]:
        """Names of the variables that the first finished cell has."""
        cell = next(self.results(), None)
        data = cell.data if isinstance(cell, Result) else cell
        return [] if data is None else list(map(str, data.variables))

    def results(self) -> Iterator[Any]:
        """Every finished cell as what its function returned, in the order of the axes."""
        finished = self.folder.finished()
        return (self.result(key) for _, key in self.places() if key in finished)

    def result(self, key: str) -> Any:
        """One cell as what its function returned: a result, a dataset, or numbers by name."""
        record = self.folder.record(key)
        if "file" not in record:
            return {name: number(value) for name, value in record["numbers"].items()}
        data = from_bytes(self.folder.content(record))
        return as_result(data) if record.get("result") else data


def describe(plan: Mapping[str, Any]) -> str:
    """Say what a plan is of, in a few words."""
    sizes = {axis: len(points) for axis, points in plan["axes"].items()}
    return f"{plan['experiment']}, {spread(sizes)}"


def number(value: Any) -> Any:
    """Read a number of a record back: JSON has no word for infinity and none for NaN."""
    if value is None:
        return float("nan")
    return float(value["inf"]) * float("inf") if isinstance(value, dict) else value


def _column(values: Mapping[tuple[int, ...], Any], shape: tuple[int, ...]) -> np.ndarray:
    """One number of every cell: NaN where a cell has none; text if any is."""
    read = {at: number(value) for at, value in values.items()}
    if any(isinstance(value, str) for value in read.values()):
        texts = np.full(shape, "", dtype=object)
        for at, value in read.items():
            texts[at] = value if isinstance(value, str) else "" if value != value else str(value)
        return texts
    every = len(read) == math.prod(shape)
    whole = every and all(isinstance(value, int) for value in read.values())
    column = np.zeros(shape, np.int64) if whole else np.full(shape, np.nan)
    for at, value in read.items():
        column[at] = value
    return column


def status(out: str | Path) -> pd.DataFrame:
    """Say how far the sweeps of a folder are.

    Args:
        out: The folder, or its URL.

    Returns:
        One row for each plan: plan, experiment, grid, cells, done, failed, missing.

    Raises:
        ValueError: There is no sweep in it.

    Example:
        >>> status("grid")  # doctest: +SKIP
    """
    folder = Folder.at(out)
    rows = []
    for name, plan in folder.plans().items():
        states = View(folder, name, plan).states()
        counts = {state: int((states == state).sum()) for state in (DONE, FAILED, MISSING)}
        grid = describe(plan).partition(", ")[2]
        rows.append(
            {"plan": name, "experiment": plan["experiment"], "grid": grid, "cells": states.size}
            | counts
        )
    if not rows:
        raise ValueError(f"there is no sweep in {folder}: tvlens.sweep(..., out=...) makes one.")
    return pd.DataFrame(rows)


def collect(out: str | Path, *, plan: str | None = None) -> Sweep:
    """Read what a sweep found so far, while it runs or after; nothing is computed.

    Args:
        out: The folder, or its URL.
        plan: Which sweep, where the folder holds several; see `status`.

    Returns:
        One row a cell.

    Raises:
        ValueError: There is no sweep, there are several and none is named, or a file is damaged.

    Example:
        >>> collect("grid").counts()  # doctest: +SKIP
    """
    return View.of(out, plan).table()


def join(out: str | Path, *variables: str, plan: str | None = None) -> xr.Dataset:
    """Join the arrays of all finished cells into one dataset over the axes of the sweep.

    Args:
        out: The folder, or its URL.
        *variables: Which variables of the cells; all if none is named.
        plan: Which sweep, where the folder holds several; see `status`.

    Returns:
        Each variable with the axes before its own dimensions. Layers that a model lacks, and cells that are
        not done, are NaN, or empty where there is text.

    Raises:
        ValueError: No cell has such a variable, cells cannot be matched, or a file is damaged.

    Example:
        >>> join("grid", "hypothesis").mean("seed")  # doctest: +SKIP
    """
    return View.of(out, plan).arrays(variables)


def cells(out: str | Path, *, plan: str | None = None) -> Iterator[Any]:
    """Read the finished cells one by one, as what their function returned.

    Args:
        out: The folder, or its URL.
        plan: Which sweep, where the folder holds several; see `status`.

    Yields:
        Results that plot themselves, datasets, or numbers by name, in the order of the axes.

    Raises:
        ValueError: There is no such sweep, or a file is damaged.

    Example:
        >>> tv.report(list(tv.sweeps.cells("grid")), "grid.html")  # doctest: +SKIP
    """
    return View.of(out, plan).results()
