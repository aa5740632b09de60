"""Train many small models in one loop, measure them as they learn, and lose nothing when a run is killed.

All members of an ensemble take their steps together, each on its own data and with its own weights. A
sequence is a function of (seed, split, index), and a batch of (seed, step), so a run's whole state is its
weights, its optimiser's, and a number: it goes on where it stopped, and ends with the same numbers. On a GPU
one step, data and optimiser included, is compiled and recorded once as a CUDA graph, then replayed.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import whole
from tvlens.icl._state import State, load_state, save_state
from tvlens.icl.data import Data, Setting, class_weights
from tvlens.icl.probes import MEASURES, PROBES, Probe, measure
from tvlens.icl.transformer import Parameters, Transformer
from tvlens.models._places import resolve_device

SAVE_EVERY = 20.0  # seconds, at measuring points and every so many steps
_CHUNK = 200  # steps between two looks at the clock


@dataclass(frozen=True, eq=False, repr=False)
class Training:
    """What a training leaves.

    Args:
        measures: By member, step and probe: `tvlens.icl.probes.MEASURES`, and ``train_loss``, the mean over
            the steps since the last measuring point; ``seen`` says how often a class of each group was asked
            for, on average.
        weights: The last weights of all members.
        kept: Weights of the steps that were to be kept, by step.
        data: The members' data.
        model: The architecture.
        seconds: What the training took, over all pieces.
    """

    measures: xr.Dataset
    weights: Parameters
    kept: dict[int, Parameters]
    data: Data
    model: Any
    seconds: float

    def __repr__(self) -> str:
        steps = self.measures["step"].values
        return f"Training({len(self.data.settings)} members, {steps[-1]} steps, {self.model})"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and in what way to train.

    Args:
        steps: Optimiser steps.
        at: Steps after which members are measured; the last one is always among them.
        keep: Steps whose weights are kept.
        probes: What is asked of members.
        n_items: Sequences for each probe.
        batch: Sequences in a step.
        lr: Learning rate of Adam, constant.
        weight_decay: Decoupled weight decay.
        compiled: On a GPU, whether a step is compiled before it is recorded: it takes a minute at first.

    Raises:
        ValueError: A number is too small, or a step lies beyond the end.
    """

    steps: int
    at: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    probes: tuple[Probe, ...] = tuple(PROBES.values())
    n_items: int = 1000
    batch: int = 32
    lr: float = 3e-4
    weight_decay: float = 0.0
    compiled: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "n_items", "batch"):
            if whole(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1; {getattr(self, name)} arrived.")
        for name in ("lr", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; {getattr(self, name)} arrived.")
        for name in ("at", "keep"):
            beyond = [
                step for step in getattr(self, name) if not 0 <= whole(name, step) <= self.steps
            ]
            if beyond:
                raise ValueError(f"{name} holds steps 0 to {self.steps}; {beyond[0]} arrived.")

    @property
    def stops(self) -> tuple[int, ...]:
        """The measuring points, in order."""
        return tuple(sorted({*self.at, self.steps}))


def train(
    settings: Sequence[Setting],
    plan: Plan,
    *,
    model: Any = None,
    start: Parameters | None = None,
    data: Data | None = None,
    device: str | torch.device | None = None,
    out: Path | None = None,
    progress: bool = True,
    label: str = "training",
) -> Training:
    """Train one model for each setting, all in one loop.

    Args:
        settings: What each member is trained on; all of one shape.
        plan: How long, and what is measured when.
        model: The architecture, a `Transformer` where None.
        start: Weights to start from, instead of the architecture's own first ones.
        data: Data to use instead of those that the settings describe, images say.
        device: Where to train; where None, the first GPU if there is one, else the CPU. Given ``data``
            decide by themselves.
        out: File that keeps the state; a training that was stopped goes on from it.
        progress: Whether to show a progress bar.
        label: What the bar is called.

    Returns:
        Measures and weights.

    Raises:
        ValueError: No settings, or of several shapes, or a file of another training.

    Example:
        >>> plan = Plan(steps=2, n_items=10, probes=(Probe(True, "low"),))
        >>> done = train([Setting(n_sequences=64)], plan, device="cpu", progress=False)
        >>> done.measures["error"].sizes
        Frozen({'member': 1, 'step': 1, 'probe': 1})
    """
    from tqdm.auto import tqdm

    model = Transformer() if model is None else model
    data = Data(settings, device=resolve_device(device)) if data is None else data
    device = data.device
    mark = fingerprint(data, plan, model) | {"start": _digest(start)}
    state = load_state(out, mark, device) if out is not None and Path(out).exists() else None
    if state is None:
        first = model.initial(data) if start is None else start
        state = State({k: v.detach().clone().to(device) for k, v in first.items()})
    loop = Stepper(model, data, plan, state)
    began, saved = time.perf_counter() - state.seconds, time.perf_counter()
    with tqdm(total=plan.steps, initial=state.step, disable=not progress, leave=False) as bar:
        bar.set_description(label)
        for stop in _stops(plan, state.step):
            bar.update(stop - state.step)
            loop.advance(stop - state.step)
            if stop in plan.stops:
                found = measure(model, state.weights, data, plan.probes, n_items=plan.n_items)
                state.measured[stop] = torch.cat(
                    [loop.mean_loss()[None], found.flatten(0, 1)]
                ).cpu()
            if stop in plan.keep:
                state.kept[stop] = {k: v.detach().cpu().clone() for k, v in state.weights.items()}
            state.seconds = time.perf_counter() - began
            last = stop == plan.steps
            if out is not None and (last or time.perf_counter() - saved > SAVE_EVERY):
                save_state(out, state, mark)
                saved = time.perf_counter()
    final = {k: v.detach() for k, v in state.weights.items()}
    measures = _dataset(data, plan, state.measured)
    return Training(measures, final, dict(state.kept), data, model, state.seconds)


def fingerprint(data: Data, plan: Plan, model: Any) -> dict[str, Any]:
    """Give what two trainings must share for one to go on from the other's file."""
    settings = json.dumps([s.to_dict() for s in data.settings], sort_keys=True)
    return {
        "settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "members": len(data.settings),
        "data": f"{type(data).__name__} {getattr(data, 'digest', '')}".strip(),
        "model": repr(model),
        **{k: v for k, v in asdict(plan).items() if k not in ("probes", "compiled")},
        "probes": [probe.name for probe in plan.probes],
    }


def _digest(weights: Parameters | None) -> str | None:
    """A mark of weights to start from, None where there are none."""
    if weights is None:
        return None
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def on_grid(measures: xr.Dataset, labels: Mapping[str, Sequence[Any]]) -> xr.Dataset:
    """Give measures the axes of a grid in place of the axis of members.

    Args:
        measures: Measures whose members follow one another as the grid's cells do, the last axis fastest.
        labels: Names and labels of the grid's axes.

    Returns:
        The same by these axes, and by step and probe.

    Example:
        >>> flat = xr.Dataset({"error": ("member", [1, 2, 3, 4])})
        >>> int(on_grid(flat, {"size": [64, 256], "seed": [0, 1]})["error"].sel(size=256, seed=0))
        3
    """
    kept = measures.drop_vars([name for name in measures.coords if name not in ("step", "probe")])
    index = pd.MultiIndex.from_product([*labels.values()], names=[*labels])
    coords = xr.Coordinates.from_pandas_multiindex(index, "member")
    # A tuple would be read as (dimensions, data).
    axes = {name: list(values) for name, values in labels.items()}
    return kept.assign_coords(coords).unstack("member").reindex(axes)


class Stepper:
    """Steps of an ensemble, one after another; `train` measures and saves between them."""

    def __init__(self, model: Any, data: Data, plan: Plan, state: State) -> None:
        self.model, self.data, self.plan, self.state = model, data, plan, state
        trained = getattr(model, "trained", lambda name: True)
        self.names = [name for name in state.weights if trained(name)]
        for name in self.names:
            state.weights[name].requires_grad_()
        cuda = data.device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            [state.weights[name] for name in self.names], lr=plan.lr, capturable=cuda, fused=True,
            weight_decay=plan.weight_decay, decoupled_weight_decay=True,
        )  # fmt: skip
        state.restore(self.optimizer, self.names)
        self.at = torch.tensor(state.step, device=data.device)
        if state.losses is None:
            state.losses = torch.zeros(len(data.settings), device=data.device)
        self.sum = state.losses
        self.step = self._recorded() if cuda else self._step

    @classmethod
    def fresh(cls, model: Any, data: Data, plan: Plan) -> "Stepper":
        """Start at step 0 from the architecture's first weights."""
        return cls(model, data, plan, State(model.initial(data)))

    def advance(self, n: int) -> "Stepper":
        """Take so many steps."""
        if not n:
            return self
        for _ in range(n):
            self.step()
        self.state.step += n
        self.state.count += n
        self.state.remember(self.optimizer, self.names)
        return self

    def mean_loss(self) -> Float[Tensor, " member"]:
        """Mean training loss since the last call, NaN if no step was taken."""
        count = self.state.count
        mean = self.sum / count if count else torch.full_like(self.sum, torch.nan)
        self.sum.zero_()
        self.state.count = 0
        return mean

    def _losses(self, at: Tensor) -> Float[Tensor, " member"]:
        batch = self.data.batch(at, self.plan.batch)
        return self.model.losses(self.state.weights, batch)

    def _step(self, losses: Callable[..., Tensor] | None = None) -> None:
        loss = (losses or self._losses)(self.at)
        self.optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        self.optimizer.step()
        self.sum += loss.detach()
        self.at += 1

    def _recorded(self) -> Callable[[], None]:
        """Compile a step and record it as a CUDA graph; what the warm-up changed is put back."""
        held = [*self.state.weights.values(), self.at, self.sum]
        kept = [tensor.detach().clone() for tensor in held]
        compiled = self._losses
        if self.plan.compiled:
            compiled = torch.compile(self._losses, fullgraph=True, dynamic=False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with _deterministic():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._step(compiled)
            torch.cuda.current_stream().wait_stream(stream)
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(compiled)
        with torch.no_grad():
            for tensor, value in zip(held, kept, strict=True):
                tensor.copy_(value)
        self.state.restore(self.optimizer, self.names, in_place=True)
        return graph.replay


@contextmanager
def _deterministic() -> Iterator[None]:
    """Have sums taken in a fixed order: compiled kernels add gradients of a table in any order otherwise."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # cuBLAS may differ between streams; a training uses one.
            warnings.filterwarnings("ignore", message=".*CUBLAS_WORKSPACE_CONFIG")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _stops(plan: Plan, done: int) -> Iterable[int]:
    """Where to halt: to measure, to keep weights, and now and then to save."""
    halts = {*plan.stops, *plan.keep, *range(_CHUNK, plan.steps, _CHUNK)}
    return sorted(stop for stop in halts if stop > done or (stop == done == 0))


def _dataset(data: Data, plan: Plan, measured: dict[int, Tensor]) -> xr.Dataset:
    steps = np.array(sorted(measured))
    every = np.stack([measured[int(step)].numpy() for step in steps])
    shape = (len(steps), len(MEASURES), len(plan.probes), len(data.settings))
    found = every[:, 1:].reshape(shape)
    weights = torch.stack([class_weights(s) for s in data.settings]).numpy()
    shares = np.stack([weights[:, 0], weights[:, -1]], axis=-1)
    seen = shares[:, None] * steps[None, :, None] * plan.batch
    variables: dict[str, Any] = {
        name: (("member", "step", "probe"), np.moveaxis(found[:, i], -1, 0))
        for i, name in enumerate(MEASURES)
    }
    variables["train_loss"] = (("member", "step"), every[:, 0].T)
    coords = {
        "step": steps,
        "probe": [probe.name for probe in plan.probes],
        "group": ["high", "low"],
        "seen": (("member", "step", "group"), seen),
    }
    for name in Setting.__dataclass_fields__:
        values = [getattr(s, name) for s in data.settings]
        coords[name] = ("member", [float("inf" if v is None else v) for v in values])
    return xr.Dataset(variables, coords)
