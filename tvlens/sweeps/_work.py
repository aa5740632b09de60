"""One cell computed: the model that this worker holds, the call, and the record.

A worker is whatever calls `Work` with cells: this process, one of a pool, a Ray actor, a Slurm job. It keeps
the model of its last cell, so cells that come model by model load each model once.
"""

import contextlib
import gc
import math
import platform
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr

from tvlens import provenance
from tvlens.results import Result
from tvlens.sweeps import _identity
from tvlens.sweeps._arrays import to_bytes
from tvlens.sweeps._calls import Call
from tvlens.sweeps._folder import Folder
from tvlens.sweeps._grid import Cell, Source

VALUE = "value"
"""What the number of a function that returns a single one is called."""
_RESTATED = ("kind", "title", "finding", "model", "task", "seed", "seconds")
"""What a result's summary says of itself, and the table of cells by its axes."""
_here = threading.local()
_one_at_a_time = threading.RLock()  # a model in hand is shared by all threads, and its hooks are


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: little enough to be sent around.

    Attributes:
        key: The cell's key.
        seconds: How long it took.
        error: Why it failed, in a line; empty where it did not.
    """

    key: str
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Work:
    """Computes cells and writes them into the sweep's folder; can be sent to other processes.

    Attributes:
        call: The function.
        folder: The sweep's folder, or its URL.
        threads: Threads that torch uses for a cell.
        versions: The versions that the sweep was planned with.
    """

    call: Call
    folder: Folder
    threads: int
    versions: Mapping[str, str]

    def __call__(self, cell: Cell) -> Outcome:
        """Compute a cell, unless it is finished by now."""
        if self.folder.has(cell.key):
            return Outcome(cell.key, 0.0)
        started = time.perf_counter()
        try:
            value = self._value(cell)
            numbers, data = _found(value)
            arrays = None if data is None else to_bytes(data)
            seconds = round(time.perf_counter() - started, 4)
            made = {"device": _device(cell), "versions": provenance.versions(), "numbers": numbers}
            made["result"] = isinstance(value, Result)
            self.folder.keep(cell.key, {**_about(cell, seconds), **made}, arrays)
        except Exception as error:
            seconds = round(time.perf_counter() - started, 4)
            said = f"{type(error).__name__}: {error}"
            self.folder.fail(
                cell.key,
                {**_about(cell, seconds), "error": said, "traceback": traceback.format_exc()},
            )
            return Outcome(cell.key, seconds, said)
        return Outcome(cell.key, seconds)

    def lost(self, cells: Sequence[Cell], reason: str) -> Iterator[Outcome]:
        """Write down that a worker died over cells, which it took in this order.

        The first that is not finished is what it was computing; those after it were not begun, and stay
        missing.
        """
        for cell in cells:
            if not self.folder.has(cell.key):
                record = {**_about(cell, 0.0), "error": reason, "traceback": reason}
                self.folder.fail(cell.key, record)
                yield Outcome(cell.key, 0.0, reason)
                return
            yield Outcome(cell.key, 0.0)

    def _value(self, cell: Cell) -> Any:
        from tvlens.engine import reproducible

        here = _identity.versions()
        other = [name for name in self.versions if here.get(name) != self.versions[name]]
        if other:
            raise RuntimeError(
                f"this worker has {other[0]} {here.get(other[0])}, the sweep was planned with "
                f"{self.versions[other[0]]}: its numbers would not belong to it."
            )
        in_hand = cell.source is not None and cell.source.in_hand
        lock = _one_at_a_time if in_hand else contextlib.nullcontext()
        with lock, _threads(self.threads), reproducible():
            model = None if cell.source is None else _model(cell.source)
            return self.call(model=model, task=cell.task, seed=cell.seed, settings=cell.settings)


def release() -> None:
    """Let go of the model that this thread holds."""
    _here.__dict__.clear()


def _model(source: Source) -> Any:
    """Give the model that is held, or load another in its place; one that could not be loaded stays so."""
    if source.in_hand:
        return source.what
    if getattr(_here, "mark", None) != source.mark:
        release()
        gc.collect()  # two large models may not fit side by side
        try:
            _here.model, _here.error = source.load(), None
        except Exception as error:
            _here.model, _here.error = None, error
        _here.mark = source.mark
    if _here.error is not None:
        raise _here.error
    return _here.model


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """Let torch use so many threads, on which the last bits of its sums depend."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(cell: Cell) -> str:
    import torch

    source = cell.source
    model: Any = None if source is None else source.what if source.in_hand else _here.model
    weight = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    on_gpu = weight is not None and weight.device.type == "cuda"
    return torch.cuda.get_device_name() if on_gpu else platform.machine()


def _about(cell: Cell, seconds: float) -> dict[str, Any]:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    where = {"host": platform.node(), "created": created}
    return {"cell": dict(cell.labels), "seconds": seconds, **where}


def _found(value: Any) -> tuple[dict[str, Any], xr.Dataset | None]:
    """Split what a cell found into what stands in a table of cells, and the rest."""
    if isinstance(value, Result):
        own = {k: v for k, v in value.summary().items() if k not in _RESTATED}
        return _few(own), value.data
    if isinstance(value, xr.Dataset):
        return _few({str(k): v.item() for k, v in value.data_vars.items() if not v.ndim}), value
    named = value if isinstance(value, Mapping) else {VALUE: value}
    return _few({str(name): _scalar(name, one) for name, one in named.items()}), None


def _scalar(name: Any, value: Any) -> Any:
    """One number or text; of more, nobody knows the dimensions."""
    if hasattr(value, "item") and np.ndim(value) == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"a cell returns a Result, an xarray.Dataset, a number, or a mapping from names to numbers and "
        f"texts; {name!r} is a {type(value).__name__}. For arrays return an xarray.Dataset."
    )


def _few(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in a table with one row a cell; JSON has no word for infinity, so it is one in quotes."""
    kinds = bool | int | float | str | None
    kept = {k: v for k, v in numbers.items() if isinstance(v, kinds)}
    large = [k for k, v in kept.items() if isinstance(v, int) and abs(v) >= 2**63]
    if large:
        raise TypeError(
            f"{large[0]!r} is a whole number of more than 64 bits, which no table holds."
        )
    return {k: _strict(v) for k, v in kept.items()}


def _strict(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else {"inf": int(math.copysign(1, value))}
