"""Cells put side by side: their arrays in one dataset over the sweep's axes.

Cells differ in depth, and may differ in prompts. A variable is as large as the largest of them, matched by
label where its dimension has labels; places that a cell does not have are NaN, or empty where there is text,
never 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr


class Joiner:
    """Collects cells into arrays over the axes of a sweep.

    Args:
        axes: Labels by axis, in order.

    Raises:
        ValueError: In `add`, a cell has a dimension called like an axis, of more than one place.
    """

    def __init__(self, axes: Mapping[str, Sequence[Any]]) -> None:
        self.axes = {axis: list(labels) for axis, labels in axes.items()}
        self.cells: list[tuple[tuple[int, ...], xr.Dataset]] = []

    def add(self, at: tuple[int, ...], cell: xr.Dataset) -> None:
        """Add a cell at its place on the axes, given by index."""
        for axis in self.axes:
            if axis not in cell.variables and axis not in cell.dims:
                continue
            size = cell.sizes.get(axis, 1)
            if size != 1:
                raise ValueError(
                    f"cells have a dimension {axis!r} of {size} places, which is also an axis of the sweep; "
                    "they cannot be joined. Read them one by one."
                )
            cell = cell.squeeze(axis, drop=True) if axis in cell.dims else cell.drop_vars(axis)
        self.cells.append((at, cell))

    def dataset(self) -> xr.Dataset:
        """Put all cells together."""
        labels, sizes = self._dimensions()
        coords: dict[str, Any] = {axis: labelled(labels) for axis, labels in self.axes.items()}
        coords |= {dim: labelled(own) for dim, own in labels.items() if own is not None}
        names = dict.fromkeys(
            str(name) for _, cell in self.cells for name in cell.variables if name not in coords
        )
        variables = {name: self._variable(name, labels, sizes) for name in names}
        known = {str(n) for _, cell in self.cells for n in cell.coords}
        return xr.Dataset(
            {name: v for name, v in variables.items() if name not in known},
            coords | {name: v for name, v in variables.items() if name in known},
        )

    def _dimensions(self) -> tuple[dict[str, list[Any] | None], dict[str, int]]:
        """Labels of each dimension of the cells, all that occur, and its size."""
        labels: dict[str, list[Any] | None] = {}
        sizes: dict[str, int] = {}
        for _, cell in self.cells:
            for dim, size in cell.sizes.items():
                name = str(dim)
                if dim not in cell.coords:
                    if labels.get(name) is not None:
                        raise ValueError(f"dimension {name!r} has labels in some cells only.")
                    labels[name] = None
                    sizes[name] = max(sizes.get(name, 0), size)
                    continue
                own = cell[dim].values.tolist()
                known = labels.setdefault(name, [])
                if known is None:
                    raise ValueError(f"dimension {name!r} has labels in some cells only.")
                if len(set(own)) != len(own):
                    raise ValueError(
                        f"dimension {name!r} has a label twice; cells cannot be matched."
                    )
                if own != known[: len(own)]:
                    there = set(known)
                    known.extend(label for label in own if label not in there)
                sizes[name] = len(known)
        for own in labels.values():
            if own is not None and all(isinstance(label, int | float) for label in own):
                own.sort()
        return labels, sizes

    def _variable(
        self, name: str, labels: Mapping[str, list[Any] | None], sizes: Mapping[str, int]
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """One variable of all cells."""
        have = [(at, cell[name]) for at, cell in self.cells if name in cell.variables]
        dims = tuple(map(str, have[0][1].dims))
        kinds = {one.dtype.kind for _, one in have}
        shape = tuple(len(points) for points in self.axes.values())
        inner = tuple(sizes[dim] for dim in dims)
        index = {dim: {v: i for i, v in enumerate(labels[dim] or ())} for dim in dims}
        full = len(have) == int(np.prod(shape)) and all(one.shape == inner for _, one in have)
        if kinds & set("OUS"):
            out = np.full(shape + inner, "", dtype=object)
        elif full:
            out = np.empty(shape + inner, dtype=np.result_type(*(one.dtype for _, one in have)))
        else:
            wide = np.result_type(*(one.dtype for _, one in have), np.float32)
            out = np.full(shape + inner, np.nan, dtype=wide)
        for at, one in have:
            if set(map(str, one.dims)) != set(dims):
                raise ValueError(
                    f"{name!r} has dimensions {dims} in some cells, {one.dims} in others."
                )
            values = one.transpose(*dims).values
            if values.shape == inner and all(_same(one, dim, labels[dim]) for dim in dims):
                out[at] = values
                continue
            where = [
                range(n)
                if labels[dim] is None
                else [index[dim][v] for v in one[dim].values.tolist()]
                for dim, n in zip(dims, values.shape, strict=True)
            ]
            out[at][np.ix_(*where)] = values
        return (*self.axes, *dims), out


def _same(one: xr.DataArray, dim: str, labels: list[Any] | None) -> bool:
    return labels is None or one[dim].values.tolist() == labels


def labelled(labels: Sequence[Any]) -> np.ndarray:
    """Make labels of one kind an array of it; of several, text."""
    kinds = {type(label) for label in labels}
    numbers = kinds <= {int} or kinds <= {int, float}
    return np.array([label if numbers else str(label) for label in labels])
