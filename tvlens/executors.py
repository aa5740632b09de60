"""Where work runs: in this process, in a pool of processes, on Ray, or as Slurm jobs.

An executor is given a function and items, and gives back what became of each item, in any order. It knows
nothing of what is computed. A worker takes items in the order given, so whoever orders them by model makes
each worker load each model once.

`Serial` is the default. A whole number stands for so many processes on this machine, and any
`concurrent.futures.Executor` is taken as it is. `Ray` and `Slurm` start workers on other machines; these
need to reach the folder that the work writes into.
"""

import logging
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tvlens._errors import whole

_log = logging.getLogger(__name__)
_POLL, _SOON = 2.0, 0.05  # seconds
_LATE = 30.0  # seconds that a file may take to be seen from another node


@dataclass(frozen=True)
class Lost:
    """Items whose worker died.

    Attributes:
        items: What it had been given, in the order in which it took them. Those at the beginning may be done.
        reason: What is known about the death.
    """

    items: Sequence[Any]
    reason: str


@runtime_checkable
class Executor(Protocol):
    """What runs a function on items."""

    def run(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Give what the function made of each item, as it comes; `Lost` where the worker died."""
        ...


def resolve(executor: Any) -> Executor:
    """Turn what a user says into an executor.

    Args:
        executor: None, a number of processes, one of this module, or a `concurrent.futures.Executor`.

    Returns:
        The executor.

    Raises:
        TypeError: It is none of these.
        ValueError: The number is below 1.

    Example:
        >>> resolve(None)
        Serial()
    """
    if executor is None:
        return Serial()
    if isinstance(executor, type):
        executor = executor()
    if isinstance(executor, Executor):
        return executor
    if callable(getattr(executor, "submit", None)):
        return Futures(executor)
    if isinstance(executor, str) or not hasattr(executor, "__index__"):
        raise TypeError(
            "executor takes None (this process), a number of processes, tvlens.executors.Ray() or Slurm(), "
            f"or a concurrent.futures.Executor; {executor!r} arrived."
        )
    n = whole("executor", executor)
    if n < 1:
        raise ValueError(f"executor={n} processes asked for; at least 1 is needed.")
    return Processes(n)


@dataclass(frozen=True)
class Serial:
    """One item after another, in this process."""

    def run(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Give what the function makes of each item."""
        yield from map(work, items)


@dataclass(frozen=True)
class Futures:
    """Any object with ``submit(function, item)``, whose answers have ``done()`` and ``result()``.

    So have those of `concurrent.futures`, dask's ``Client``, executorlib and others.

    Attributes:
        pool: The object; it stays open.
    """

    pool: Any

    def run(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Submit all items, and give what comes back."""
        pending = [self.pool.submit(work, item) for item in items]
        try:
            for done in _as_done(pending):
                yield done.result()
        except futures.BrokenExecutor as error:
            raise RuntimeError(
                "a process of the pool died, which ends the pool: out of memory? A script that starts "
                "processes needs its calls below if __name__ == '__main__'. What was finished is kept: run "
                "the same call again; tvlens.executors.Ray() replaces workers that die."
            ) from error
        finally:
            for one in pending:
                one.cancel()


def _as_done(pending: Sequence[Any]) -> Iterator[Any]:
    """Give answers as they come; those that are none of Python's own are asked from time to time."""
    if all(isinstance(one, futures.Future) for one in pending):
        yield from futures.as_completed(pending)
        return
    left = list(pending)
    while left:
        asked = [(one.done(), one) for one in left]
        yield from (one for done, one in asked if done)
        left = [one for done, one in asked if not done]
        time.sleep(_SOON if left else 0)


@dataclass(frozen=True)
class Processes:
    """So many new Python processes on this machine; each holds a model of its own.

    Attributes:
        n: How many.
    """

    n: int

    def run(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Give what comes back, and end the processes."""
        _importable((work, list(items[:: max(len(items) // 100, 1)])))
        # A fork of a process whose libraries have threads may hang, so they start anew.
        n = min(self.n, max(len(items), 1))
        pool = futures.ProcessPoolExecutor(n, mp_context=get_context("spawn"))
        try:
            yield from Futures(pool).run(work, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _importable(work: Any) -> None:
    """Refuse what is defined in a notebook: a new process could not find it, and would only die."""
    main = sys.modules["__main__"]
    if not hasattr(main, "__file__") and b"__main__" in bytes(ForkingPickler.dumps(work)):
        raise ValueError(
            "what is defined in a notebook or at a prompt cannot be found by new processes, and such a "
            "function is in this work: put it into a .py file and import it, or use tvlens.executors.Ray()."
        )


@dataclass(frozen=True)
class Ray:
    """Ray actors on one machine or many, each of which holds a model.

    Attributes:
        workers: How many; by default as many as the cluster's CPUs or GPUs have room for.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker; a share of one, such as .25, lets several models share it.
        retries: How often an item is given to a new worker when its worker dies.
        address: The cluster, as `ray.init` takes it; by default the one that this process is in or that
            runs on this machine, else a new one; ``"local"`` is a new one in any case.
        options: More options of the actors, as ``ray.remote`` takes them.
    """

    workers: int | None = None
    cpus: float | int = 1
    gpus: float | int = 0
    retries: int = 3
    address: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Hand items to actors as they become free; Ray restarts dead ones and runs their item again."""
        ray = _imported("ray", "ray")
        own, actors = not ray.is_initialized(), []
        if own:
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        try:
            actors = self._actors(ray, work, len(items))
            yield from _HandedOut(ray, actors, items, self.retries).outcomes()
        finally:
            for actor in actors:
                ray.kill(actor)
            if own:
                ray.shutdown()

    def _actors(self, ray: Any, work: Callable[[Any], Any], n_items: int) -> list[Any]:
        settings = {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "max_restarts": -1,
            **self.options,
        }
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(self._room(node, n_items) for node in nodes)
        n = min(self.workers or room, n_items)
        if room < max(n, 1) and n_items:
            there = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
            raise ValueError(
                f"{self.workers or 'at least 1'} workers of {self.cpus} CPUs and {self.gpus} GPUs asked for; "
                f"this Ray cluster has {there['CPU']:g} CPUs and {there['GPU']:g} GPUs, room for {room}."
            )
        # The function goes over once, not with every item.
        actor = ray.remote(**settings)(_Actor)
        return [actor.remote(work) for _ in range(n)]

    def _room(self, node: Mapping[str, float], n_items: int) -> int:
        """Workers that one node has room for; a worker does not take halves of two GPUs."""
        room = int(node.get("CPU", 0) / self.cpus) if self.cpus else n_items
        if not self.gpus:
            return room
        whole_gpus = int(node.get("GPU", 0))
        on_gpus = whole_gpus * int(1 / self.gpus) if self.gpus < 1 else int(whole_gpus / self.gpus)
        return min(room, on_gpus)


class _Actor:
    """A worker on Ray."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def ready(self) -> None:
        """Answer, once there is a place for this worker."""

    def run(self, item: Any) -> Any:
        return self.work(item)


class _HandedOut:
    """Items on their way: an actor gets one when it has said that it is there, then one after the other.

    Ray starts dead actors anew, wherever there is room. What they were doing goes to whoever is free next.
    """

    def __init__(self, ray: Any, actors: Sequence[Any], items: Sequence[Any], retries: int) -> None:
        self.ray, self.items, self.retries = ray, items, retries
        self.waiting = deque(range(len(items)))
        self.deaths: Counter[int] = Counter()
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Any, int]] = {}
        self.starting = {actor.ready.remote(): actor for actor in actors}

    def outcomes(self) -> Iterator[Any]:
        """Give what becomes of each item."""
        while self.waiting or self.running:
            while self.idle and self.waiting:
                actor, item = self.idle.pop(), self.waiting.popleft()
                self.running[actor.run.remote(self.items[item])] = (actor, item)
            (done,), _ = self.ray.wait([*self.running, *self.starting], num_returns=1)
            if done in self.starting:
                self._began(done)
            else:
                yield from self._ended(done)

    def _began(self, done: Any) -> None:
        actor = self.starting.pop(done)
        try:
            self.ray.get(done)
            self.idle.append(actor)
        except self.ray.exceptions.ActorUnavailableError:
            time.sleep(_SOON)
            self.starting[actor.ready.remote()] = actor

    def _ended(self, done: Any) -> Iterator[Any]:
        actor, item = self.running.pop(done)
        try:
            outcome = self.ray.get(done)
        except self.ray.exceptions.RayTaskError:
            raise  # the function's own error
        except self.ray.exceptions.RayError as error:
            self.starting[actor.ready.remote()] = actor
            self.deaths[item] += 1
            if self.deaths[item] <= self.retries:
                self.waiting.appendleft(item)
            else:
                tried = f"its worker died {self.deaths[item]} times"
                yield Lost((self.items[item],), f"{tried}, at last with {type(error).__name__}")
            return
        self.idle.append(actor)
        yield outcome


@dataclass(frozen=True)
class Slurm:
    """Slurm jobs through submitit; each takes a share of the items and holds one model at a time.

    Attributes:
        jobs: Jobs that the items are divided into; a cluster takes 1,000 in one array unless it says
            otherwise.
        logs: Folder for submitit's own files and the jobs' output; on a file system that all nodes share. Its
            files are pickles, which this process reads back: keep it where nobody else can write.
        at_once: Jobs that may run at the same time; all by default.
        minutes: Time limit of a job. One that is preempted or reaches it goes on as a new job.
        parameters: More of submitit's parameters, e.g. ``{"slurm_partition": "gpu", "gpus_per_node": 1,
            "cpus_per_task": 4, "mem_gb": 32}``.
        cluster: ``"slurm"``, or ``"local"`` for processes of this machine that are treated like jobs.
    """

    jobs: int
    logs: str | Path
    at_once: int | None = None
    minutes: int = 24 * 60
    parameters: dict[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"

    def run(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Submit the jobs, and give what each of them brings back as it ends."""
        n = min(whole("jobs", self.jobs), len(items))
        if not items:
            return
        if n < 1:
            raise ValueError(f"jobs={self.jobs} asked for; at least 1 is needed.")
        size = -(-len(items) // n)
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        left = dict(zip(self._submitted(work, parts), parts, strict=True))
        try:
            while left:
                ended = _ended(list(left), self.cluster)
                for job in ended:
                    yield from _brought(job, left.pop(job))
                if not ended:
                    time.sleep(_POLL)
        finally:
            for job in left:
                job.cancel()

    def _submitted(self, work: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
        """One job for each part, as one array."""
        submitit = _imported("submitit", "slurm")
        executor = submitit.AutoExecutor(folder=str(self.logs), cluster=self.cluster)
        settings = {"timeout_min": self.minutes}
        if self.cluster == "slurm":
            settings |= {"slurm_array_parallelism": self.at_once or len(parts)}
        executor.update_parameters(**{**settings, **self.parameters})
        with executor.batch():
            return [executor.submit(_Share(work), part) for part in parts]


def _ended(jobs: Sequence[Any], cluster: str) -> list[Any]:
    """Jobs that brought something back, or are gone."""
    done = [job for job in jobs if job.paths.result_pickle.is_file()]
    if done:
        return done
    if cluster != "slurm":
        return [job for job in jobs if job.done()]
    # submitit asks sacct, which not every cluster has: without it, it waits for ever for a job that died.
    here = _active()
    return [] if here is None else [job for job in jobs if job.job_id not in here]


def _active() -> set[str] | None:
    """Ids of this user's jobs that wait or run; None where Slurm does not answer."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("squeue does not answer, so jobs that died are not seen: %s", error)
        return None
    return set(said.stdout.split())


def _brought(job: Any, part: Sequence[Any]) -> Iterator[Any]:
    """What a job brought back, or that its items are lost."""
    until = time.monotonic() + _LATE
    while not job.paths.result_pickle.is_file() and time.monotonic() < until:
        time.sleep(_POLL)
    if not job.paths.result_pickle.is_file():
        reason = (
            f"Slurm job {job.job_id} ended without a result (time, memory, or its node); its output: "
            f"{job.paths.stderr}"
        )
    elif (error := job.exception()) is not None:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        reason = f"Slurm job {job.job_id} failed: {last}; its output: {job.paths.stderr}"
    else:
        yield from job.result()
        return
    yield Lost(part, reason)


@dataclass
class _Share:
    """The items of one job; a job that is stopped by Slurm goes on as a new one, over the same items."""

    work: Callable[[Any], Any]

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        return [self.work(item) for item in items]

    def checkpoint(self, items: Sequence[Any]) -> Any:
        return _imported("submitit", "slurm").helpers.DelayedSubmission(self, items)


def _imported(name: str, extra: str) -> Any:
    """Import an optional package, or say how to get it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this executor needs {name}, which is not installed: pip install 'tvlens[{extra}]'"
        ) from error
