"""What an experiment returns: labelled data that describes, draws, saves and cites itself.

A result holds outcomes, not conclusions: one `xarray.Dataset` with named dimensions, from which
accuracies, figures and tables are derived when asked. A new kind of result is a subclass that names
its variables, says its finding in one sentence, and draws one figure; files, cards, reports and
citations come with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from tvlens import provenance
from tvlens._errors import needs, unknown
from tvlens._files import must_exist, replacing
from tvlens._netcdf import read_netcdf, write_netcdf

if TYPE_CHECKING:
    import torch

# beartype knows no Self inside a class it does not decorate.
Kind = TypeVar("Kind", bound="Result")
_KINDS: dict[str, type["Result"]] = {}


@dataclass(frozen=True, eq=False, repr=False)
class Result(ABC):
    """The result of one experiment; a subclass adds a kind, a finding and a figure, and no fields.

    Subclasses need no decorator. They set ``kind`` (which registers them for `load`), and may set
    ``references``, ``variables``, ``table`` and ``method``.

    Args:
        data: Labelled outcomes; the attribute ``tvlens`` holds the provenance as JSON
            (`tvlens.provenance.collect` and `encode` write it).

    Raises:
        ValueError: A variable is missing or has other dimensions, or the provenance is of another
            kind.

    Example:
        >>> class Coin(Result):
        ...     kind = "coin"
        ...     variables = {"heads": ("prompt",)}
        ...     title = property(lambda self: "A coin")
        ...
        ...     def finding(self):
        ...         return f"Heads in {float(self.data.heads.mean()):.0%} of throws."
        ...
        ...     def plot(self, **channels):
        ...         return go.Figure(go.Bar(y=self.data.heads.values * 1))
        >>> note = provenance.encode(provenance.collect(kind="coin", seed=0))
        >>> Coin(xr.Dataset({"heads": ("prompt", [True, False])}, attrs={"tvlens": note})).finding()
        'Heads in 50% of throws.'
    """

    data: xr.Dataset

    kind: ClassVar[str] = ""
    """The name under which files and the CLI know this result."""
    references: ClassVar[tuple[str, ...]] = ()
    """Keys of ``references.bib``."""
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Variables and coordinates the data must have, with their dimensions."""
    table: ClassVar[tuple[str, ...]] = ()
    """Variables of the default table; all where empty. Leave out what has dimensions of its own."""
    method: ClassVar[str] = ""
    """How the numbers were made, in a few sentences, for the report."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            return
        known = _KINDS.get(cls.kind)
        # A module that is run again (a notebook cell, a reload) may replace its own class.
        if known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"result kind {cls.kind!r} is taken by {known.__qualname__}")
        _KINDS[cls.kind] = cls

    def __post_init__(self) -> None:
        needs(
            type(self).__name__,
            self.data,
            xr.Dataset,
            "made of an xarray.Dataset, as tvlens.load gives",
        )
        found = self.provenance.get("kind")
        if found != self.kind:
            raise ValueError(
                f"{type(self).__name__} holds kind {self.kind!r}, got data of {found!r}; "
                "tvlens.load(path) takes the class that a file's kind names"
            )
        for name, dims in self.variables.items():
            if name not in self.data.variables:
                has = ", ".join(map(str, self.data.variables)) or "nothing"
                raise ValueError(
                    f"{type(self).__name__} needs variable {name!r}; the data has: {has}"
                )
            if set(self.data[name].dims) != set(dims):
                raise ValueError(f"{name!r} needs dimensions {dims}, got {self.data[name].dims}")

    @property
    @abstractmethod
    def title(self) -> str:
        """A short heading, e.g. the task and the model."""

    @abstractmethod
    def finding(self) -> str:
        """Say what came out, in one sentence with its numbers."""

    @abstractmethod
    def plot(self, **channels: Any) -> go.Figure:
        """Draw the main figure; it is returned, never shown."""

    def figures(self) -> dict[str, go.Figure]:
        """Draw every figure of the result, by name; the first is the main one."""
        return {"main": self.plot()}

    def summary(self) -> dict[str, Any]:
        """Give the key numbers, JSON-ready; ``x``, ``x_low``, ``x_high`` make one cell."""
        return {"kind": self.kind, "title": self.title, "finding": self.finding()}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Give the tables that a page of results shows, by caption."""
        return {}

    @classmethod
    def overview_tables(cls, results: "Sequence[Result]") -> dict[str, pd.DataFrame]:
        """Give the tables that a page shows of two or more results of this kind, by caption."""
        rows = [
            {
                k: v
                for k, v in result.summary().items()
                if isinstance(v, str | int | float | type(None))
            }
            for result in results
        ]
        shared = [name for name in rows[0] if all(name in row for row in rows)]
        columns = [name for name in shared if name not in ("kind", "title", "finding", "model")]
        return {"Summary": pd.DataFrame(rows, columns=columns)}

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, settings, seed and time of the run."""
        if provenance.ATTRIBUTE not in self.data.attrs:
            raise ValueError(
                f"the data has no attribute {provenance.ATTRIBUTE!r}: not written by tvlens"
            )
        return provenance.decode(self.data.attrs[provenance.ATTRIBUTE])

    def to_dataframe(self, *variables: str) -> pd.DataFrame:
        """Give a tidy table: one row per combination of labels, one column per variable.

        Args:
            *variables: Which variables; the result's default table if none is named.

        Returns:
            The table; dimensions and coordinates are columns, too.

        Raises:
            ValueError: A variable does not exist.
        """
        names = list(variables or self.table or map(str, self.data.data_vars))
        for name in names:
            if name not in self.data.data_vars:
                raise unknown("variable", name, map(str, self.data.data_vars))
        frame = self.data[names].to_dataframe().reset_index()
        labels = [name for name in frame.columns if name not in names]
        return frame.reindex(columns=labels + names)

    def to_tensor(self, name: str) -> "torch.Tensor":
        """Give one variable as a tensor, in the order of its dimensions.

        Args:
            name: A variable or coordinate that holds numbers or booleans.

        Returns:
            A new tensor on the CPU.

        Raises:
            ValueError: The variable does not exist.
            TypeError: It holds text.
        """
        import torch

        if name not in self.data.variables:
            raise unknown("variable", name, map(str, self.data.variables))
        values = self.data[name].values
        if values.dtype.kind not in "biuf":
            raise TypeError(
                f"{name!r} holds {values.dtype}, no numbers; use .data[{name!r}] instead"
            )
        return torch.tensor(values)

    def save(self, path: str | Path) -> Path:
        """Write the result as netCDF, all or nothing.

        Args:
            path: A file name that ends in ``.nc``; an existing file is replaced.

        Returns:
            The path.

        Raises:
            ValueError: The path ends otherwise.
            FileNotFoundError: Its folder does not exist.
        """
        path = Path(path)
        if path.suffix != ".nc":
            raise ValueError(f"results are saved as .nc, got {path.name!r}")
        with replacing(path) as part:
            write_netcdf(self.data, part)
        return path

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Read a result from netCDF, as the class that its kind names.

        Args:
            path: A file that `save` wrote.

        Returns:
            The result.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is cut off, changed, foreign, newer than this version, or of another kind.
        """
        path = Path(path)
        must_exist(path)
        data = read_netcdf(path)
        try:
            found = _class_of(data)
            if not issubclass(found, cls):
                raise ValueError(f"it holds a {found.__name__}, not a {cls.__name__}")
            return found(data)
        except ValueError as error:
            raise ValueError(f"cannot read {path}: {error}") from error

    def cite(self) -> str:
        """Give BibTeX for the papers behind this result, and for tvlens."""
        from tvlens.citations import cite

        return cite(*self.references, "tvlens")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.data.sizes.items())
        return f"{type(self).__name__}: {self.title}\n  {self.finding()}\n  {sizes}"

    def _repr_html_(self) -> str:
        from tvlens.reports import card

        return card(self)


def load(path: str | Path) -> Any:
    """Read what tvlens saved: a result (``.nc``) or a task vector (``.safetensors``).

    Args:
        path: The file.

    Returns:
        The `Result` of the right class, or the `TaskVector`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is another one, or the file is damaged or foreign.

    Example:
        >>> load("to_upper.nc").finding()  # doctest: +SKIP
    """
    needs("path", path, (str, PathLike), "the path of a file")
    path = Path(path)
    if path.suffix not in (".nc", ".safetensors"):
        raise unknown("file type", path.suffix or path.name, [".nc", ".safetensors"])
    must_exist(path)
    if path.suffix == ".nc":
        return Result.load(path)
    from tvlens.vectors import TaskVector

    return TaskVector.load(path)


def as_result(data: xr.Dataset) -> Any:
    """Give data the class that the kind in its provenance names.

    Args:
        data: What a result held.

    Returns:
        The `Result`.

    Raises:
        ValueError: It has no provenance, is newer, or of an unknown kind.

    Example:
        >>> as_result(result.data)  # doctest: +SKIP
    """
    return _class_of(data)(data)


def _class_of(data: xr.Dataset) -> type[Result]:
    """Find the class for a dataset's kind, importing the experiments until one claims it."""
    if provenance.ATTRIBUTE not in data.attrs:
        raise ValueError(f"it has no attribute {provenance.ATTRIBUTE!r}: not written by tvlens")
    kind = provenance.decode(data.attrs[provenance.ATTRIBUTE]).get("kind")
    if not isinstance(kind, str):
        raise unknown("result kind", kind, _KINDS)
    if kind not in _KINDS:
        _import_experiments()
    if kind not in _KINDS:
        raise unknown("result kind", kind, _KINDS, hint="Import the module that defines it first.")
    return _KINDS[kind]


def _import_experiments() -> None:
    from tvlens import experiments, sweeps
    from tvlens.icl import studies

    experiments.discover()
    studies.discover()
    _ = sweeps.Sweep
