"""How much memory a piece of work holds at once: measured, not guessed.

CUDA's allocator keeps count. On a CPU nobody does, so every tensor that an operation makes is watched
until it is gone.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Peak:
    """The most bytes of new tensors that were alive at once.

    Attributes:
        bytes: The peak, once the context is left (on a CPU, at any time).
    """

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch the memory that new tensors take.

    Args:
        device: Where the work runs.

    Yields:
        The peak, which is complete when the context is left.

    Example:
        >>> with peak_memory(torch.device("cpu")) as peak:
        ...     total = (torch.ones(1000) + 1).sum()
        >>> peak.bytes
        8000
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    else:
        with _Watch(peak):
            yield peak


class _Watch(TorchDispatchMode):
    """Counts the storages that operations make, and uncounts them when they are freed."""

    def __init__(self, peak: Peak) -> None:
        super().__init__()
        self.peak, self.alive = peak, 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {
            tensor.untyped_storage().data_ptr() for tensor in _tensors((*args, *kwargs.values()))
        }
        out = func(*args, **kwargs)
        for tensor in _tensors((out,)):
            self.watch(tensor.untyped_storage(), given)
        return out

    def watch(self, storage: Any, given: set[int]) -> None:
        """Count a storage, if it is new."""
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in given or pointer in self.known or not size:
            return
        self.known[pointer] = size
        self.alive += size
        self.peak.bytes = max(self.peak.bytes, self.alive)
        weakref.finalize(storage, self.forget, pointer)

    def forget(self, pointer: int) -> None:
        """Uncount a storage that was freed."""
        self.alive -= self.known.pop(pointer)


def _tensors(values: Any) -> Iterator[Tensor]:
    """What an operation takes or gives: tensors, lists of them, and other things."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
