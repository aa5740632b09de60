"""What a sweep found so far: one row a cell, over the axes of the grid."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from tvlens import provenance
from tvlens._files import replacing
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

DONE, FAILED, MISSING = "done", "failed", "missing"
_OWN = ("state", "seconds", "key")


class Sweep(Result):
    """Cells of a sweep by model, task and seed, with the numbers of each that a table has room for."""

    kind: ClassVar[str] = "sweep"
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    method: ClassVar[str] = (
        "Every combination of the axes is computed by one call of the experiment, in a worker that holds the "
        "model, and is known by the hash of all that decides its numbers. Cells that failed or are missing "
        "have no numbers; they are not counted as 0."
    )

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes."""
        return tuple(map(str, self.data["state"].dims))

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the numbers that every cell may have."""
        names = [str(n) for n, v in self.data.data_vars.items() if v.dtype.kind in "biuf"]
        return tuple(name for name in names if name not in _OWN)

    @property
    def title(self) -> str:
        """The experiment and the grid."""
        sizes = {axis: int(self.data.sizes[axis]) for axis in self.axes}
        return f"Sweep of {self.provenance['experiment']}: {spread(sizes)}"

    def counts(self) -> dict[str, int]:
        """Number of cells that are done, failed and missing."""
        states = self.data["state"].values
        return {state: int((states == state).sum()) for state in (DONE, FAILED, MISSING)}

    def finding(self) -> str:
        """How far the sweep is, and the range of its main value."""
        counts, name = self.counts(), self.main
        said = f"{counts[DONE]} of {self.data['state'].size} cells are done"
        said += "".join(f", {n} {state}" for state, n in counts.items() if state != DONE and n)
        if name is None or not counts[DONE]:
            return f"{said}."
        found = self.data[name].values.astype(float)
        found = found[np.isfinite(found)]
        if not found.size:
            return f"{said}."
        low, mean, high = found.min(), found.mean(), found.max()
        return f"{said}; {name} is {mean:.3g} on average, from {low:.3g} to {high:.3g}."

    @property
    def main(self) -> str | None:
        """The value that is drawn if none is named."""
        preferred = [name for name in ("hypothesis", "accuracy") if name in self.values]
        return next(iter([*preferred, *self.values]), None)

    def to_dataframe(self, *variables: str) -> pd.DataFrame:
        """Give one row a cell, in the order of the axes."""
        frame = super().to_dataframe(*variables)
        columns = [*self.axes, *(name for name in frame.columns if name not in self.axes)]
        return frame.reindex(columns=columns)

    def summary(self) -> dict[str, Any]:
        """How many cells are done, failed and missing, and the hours they took."""
        hours = float(np.nansum(self.data["seconds"].values)) / 3600
        return {**super().summary(), **self.counts(), "hours": round(hours, 4)}

    def tables(self) -> dict[str, pd.DataFrame]:
        """The main value by task and model, averaged over everything else; failures, where there are any."""
        name, found = self.main, {}
        if name is not None:
            kept = [axis for axis in ("task", "tasks", "model") if axis in self.axes]
            rest = [axis for axis in self.axes if axis not in kept]
            mean = self.data[name].astype(float).mean(rest)
            wide = mean.transpose("model", ...).T if len(kept) == 2 else mean
            frame = wide.to_pandas() if wide.ndim else pd.Series({"all": float(wide)})
            frame = frame.to_frame(name) if isinstance(frame, pd.Series) else frame
            found[f"Mean {name}"] = frame.rename_axis(columns=None).reset_index()
        failed = self.failures()
        if len(failed):
            found["Failed cells"] = failed
        return found

    def failures(self) -> pd.DataFrame:
        """Cells that failed, with the error of each."""
        frame = self.to_dataframe("state", "error")
        failed: Any = frame[frame["state"] == FAILED]
        return failed.drop(columns="state").reset_index(drop=True)

    def to_parquet(self, path: str | Path) -> Path:
        """Write one row a cell as parquet, with its provenance in the file's metadata.

        Args:
            path: A file name that ends in ``.parquet``; an existing file is replaced.

        Returns:
            The path.

        Raises:
            ValueError: The path ends otherwise.
            FileNotFoundError: Its folder does not exist.
        """
        return write_parquet(self.to_dataframe(), path, self.data.attrs[provenance.ATTRIBUTE])

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw one value by task and model, averaged over seeds; see `tvlens.plots.grid`."""
        from tvlens import plots

        return plots.grid(self.data, **{"value": self.main, **channels})


def spread(sizes: Mapping[str, int]) -> str:
    """Write how large a grid is: ``2 models x 18 tasks x 3 seeds``."""
    named = {axis if n == 1 else f"{axis.removesuffix('s')}s": n for axis, n in sizes.items()}
    named = {
        "group of tasks" if name == "tasks" and n == 1 else name: n for name, n in named.items()
    }
    return " x ".join(f"{n} {name}" for name, n in named.items())


def write_parquet(frame: pd.DataFrame, path: str | Path, note: str) -> Path:
    """Write a table as parquet, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if path.suffix != ".parquet":
        raise ValueError(f"a table is saved as .parquet, got {path.name!r}")
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata(
        {**(table.schema.metadata or {}), b"tvlens": note.encode()}
    )
    with replacing(path) as part:
        pq.write_table(table, part)
    return path
