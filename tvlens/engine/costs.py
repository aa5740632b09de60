"""What a model costs on this machine, measured once: seconds and bytes of a block, and whether it adds up.

Before a model is run in parts for the first time, the parts are put together on a few tokens and compared
with the model's own forward: an architecture that needs more than the parts know is found out here, and
runs whole.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tvlens.encoding import TokenBatch
from tvlens.engine.attention import Bucket, attend
from tvlens.engine.layout import lay_out
from tvlens.engine.memory import peak_memory
from tvlens.engine.packed import Pieces, one_block, run_packed
from tvlens.engine.plain import run_plain
from tvlens.engine.request import Read, Request
from tvlens.models.runner import Runner

# Of the residual's norm: rounding stays far below, a missing part far above.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
_FEW = 8  # tokens of the smaller of two sizes that are timed
_MANY = {"cpu": 64, "cuda": 4096}  # of the larger: enough for the work to outweigh the calls
# Operations a second, seconds a call: of an ordinary machine, where plans must not depend on which.
_NOMINAL = {"cpu": (3e10, 3e-4), "cuda": (2e13, 1e-3)}
_reproducible: ContextVar[bool] = ContextVar("reproducible", default=False)


@dataclass(frozen=True)
class Costs:
    """Measured costs of one block of a model.

    Attributes:
        call: Seconds a block takes however few its tokens.
        token: Seconds that one more token takes.
        group: Seconds that a group of rows takes in attention however few its queries.
        pair: Seconds that one more pair of a query and a key takes in attention.
        bytes_fixed: Bytes that a block holds however few its tokens.
        bytes_token: Bytes that one more token of the pass holds.
        bytes_piece: Bytes that one more token of a piece holds while the piece is worked on.
        difference: How far the parts are from the model's own forward, as a share of the residual's norm.
        exact: Whether that is no more than rounding.
    """

    call: float
    token: float
    group: float
    pair: float
    bytes_fixed: int
    bytes_token: int
    bytes_piece: int
    difference: float
    exact: bool


_known: WeakKeyDictionary[Any, dict[tuple[torch.device, torch.dtype], Costs]] = WeakKeyDictionary()


@contextmanager
def reproducible() -> Iterator[None]:
    """Choose plans by nominal times, not by measured ones, so that every process runs the same operations.

    Plans agree up to rounding, and which of them is quickest may be a close call that two processes decide
    differently. Within this context equal requests give equal bits on machines of one type, with the same
    number of threads.

    Yields:
        Nothing.

    Example:
        >>> from tvlens.models.runner import runner
        >>> from tvlens.testing import tiny_model
        >>> with reproducible():
        ...     costs(runner(tiny_model())).call
        0.0003
    """
    token = _reproducible.set(True)
    try:
        yield
    finally:
        _reproducible.reset(token)


def is_reproducible() -> bool:
    """Whether plans are chosen by nominal times now."""
    return _reproducible.get()


def costs(runner: Runner) -> Costs:
    """Give a model's costs; the first call measures them, which takes about twenty runs of a block.

    Args:
        runner: A model that can be run in parts.

    Returns:
        The costs, for where the model is now and the type it has now.
    """
    of_model = _known.setdefault(runner.model, {})
    where = (runner.device, runner.dtype)
    if where not in of_model:
        of_model[where] = _measure(runner)
    return _nominal(runner, of_model[where]) if is_reproducible() else of_model[where]


def _nominal(runner: Runner, measured: Costs) -> Costs:
    """The same costs with times of an ordinary machine; bytes are the same wherever they are counted."""
    rate, call = _NOMINAL.get(runner.device.type, _NOMINAL["cpu"])
    width = int(runner.model.cfg.d_model)
    # Twelve squares of the width are what a block of an ordinary transformer multiplies by.
    return replace(
        measured, call=call, token=24 * width**2 / rate, group=call / 3, pair=12 * width / rate
    )


def _measure(runner: Runner) -> Costs:
    difference = _difference(runner)
    many_tokens = _MANY.get(runner.device.type, 512)
    few = _length(runner, _FEW)
    short, long = (
        _seconds(runner, _block(runner, n // few, Pieces(tokens=n))) for n in (few, many_tokens)
    )
    group, pair = _attention(runner)
    small = _bytes(runner, 1, Pieces())
    bytes_token = max(_bytes(runner, 2, Pieces(tokens=few)) - small, 0) // few
    half = max(few // 2, 1)
    in_halves = _bytes(runner, 1, Pieces(tokens=half))
    bytes_piece = max(small - in_halves, 0) // half
    token = max(long - short, 1e-9) / (many_tokens // few * few - few)
    return Costs(
        call=max(short - few * token, 0.0),
        token=token,
        group=group,
        pair=pair,
        bytes_fixed=max(small - few * (bytes_token + bytes_piece), 0),
        bytes_token=bytes_token,
        bytes_piece=bytes_piece,
        difference=difference,
        exact=difference < _TOLERANCE[runner.dtype],
    )


def _length(runner: Runner, wanted: int) -> int:
    """So many tokens, or as many as the model's context holds."""
    return min(wanted, getattr(runner.model.cfg, "n_ctx", None) or wanted)


def _prompts(runner: Runner, rows: int, length: int) -> TokenBatch:
    """Prompts of ordinary low token ids."""
    tokens = (torch.arange(rows * length).reshape(rows, length) * 7 + 11) % 89 + 3
    return TokenBatch.of_ids(tokens % runner.model.cfg.d_vocab)


def _difference(runner: Runner) -> float:
    """How far the residual after the last block, put together from parts, is from the model's own."""
    read = Read("resid_post", (runner.n_layers - 1,), None)
    request = Request(_prompts(runner, 2, _length(runner, 9)), reads=(read,))
    layout = lay_out([request], n_layers=runner.n_layers, whole=True)
    ((parts,), _), *_ = run_packed(runner, [request], layout, Pieces())
    ((whole,), _), *_ = run_plain(runner, [request])
    return float((parts.float() - whole.float()).norm() / whole.float().norm())


def _block(runner: Runner, rows: int, pieces: Pieces) -> Callable[[], Any]:
    """One block over prompts of a few tokens."""
    prompts = _prompts(runner, rows, _length(runner, _FEW))
    layout = lay_out([Request(prompts)], n_layers=runner.n_layers, whole=True)
    return one_block(runner, layout, pieces)


def _attention(runner: Runner) -> tuple[float, float]:
    """Seconds of a group of one row, and of one more pair of query and key."""
    device, block = runner.device, runner.block(0)
    n_keys, n_rows = 64, 16 if device.type == "cpu" else 1024
    position = torch.arange(n_keys, device=device)
    # The context may be shorter than that, and the vocabulary smaller.
    tokens, places = position % runner.model.cfg.d_vocab, position % _length(runner, n_keys)
    q, k, v = block.project(runner.embed(tokens, places).to(block.device))

    def work(rows: int) -> Callable[[], Any]:
        keys = position.expand(rows, n_keys).to(block.device)
        bucket = Bucket(keys[:, :_FEW], keys, keys[:, :_FEW])
        return lambda: attend(block, q, k, v, [bucket])

    one, more = (_seconds(runner, work(rows)) for rows in (1, 1 + n_rows))
    return one, max(more - one, 1e-9) / (n_rows * _FEW * n_keys)


def _seconds(runner: Runner, work: Callable[[], Any]) -> float:
    """Median of three runs, after one that warms up."""
    work()
    taken = []
    for _ in range(3):
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        started = time.perf_counter()
        work()
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        taken.append(time.perf_counter() - started)
    return median(taken)


def _bytes(runner: Runner, rows: int, pieces: Pieces) -> int:
    work = _block(runner, rows, pieces)
    with peak_memory(runner.device) as peak:
        work()
    return peak.bytes
