"""The state of a training, in memory and as one safetensors file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvlens._errors import whole
from tvlens._tensors import read_header, read_tensors, write_tensors

_WHAT = "state of a training"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class State:
    """Weights, what the optimiser remembers, what was measured so far, and the losses since then."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    measured: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    losses: Tensor | None = None
    count: int = 0

    def remember(self, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
        """Take the optimiser's moments over, by reference."""
        for name in names:
            known = optimizer.state[self.weights[name]]
            self.moments |= {f"{part}:{name}": known[part] for part in _MOMENTS}

    def restore(
        self, optimizer: torch.optim.Optimizer, names: list[str], *, in_place: bool = False
    ) -> None:
        """Give the optimiser its moments back; with ``in_place`` into the tensors a graph has recorded."""
        for name in names:
            known = optimizer.state[self.weights[name]]
            for part in _MOMENTS:
                value = self.moments.get(f"{part}:{name}")
                if in_place:
                    known[part].copy_(value) if value is not None else known[part].zero_()
                elif value is not None:
                    known[part] = value.clone()


def save_state(path: str | Path, state: State, mark: dict[str, Any]) -> None:
    """Write a state, whole or not at all."""
    parts = {
        "weights": state.weights,
        "moments": state.moments,
        "measured": {str(step): found for step, found in state.measured.items()},
        **{f"kept {step}": weights for step, weights in state.kept.items()},
        "losses": {} if state.losses is None else {"sum": state.losses},
    }
    flat = {
        f"{part}/{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    note = {"mark": mark, "step": state.step, "seconds": state.seconds, "count": state.count}
    write_tensors(path, flat, note)


def load_state(path: str | Path, mark: dict[str, Any], device: torch.device) -> State:
    """Read a state back.

    Raises:
        ValueError: The file is none of ours, damaged, or of another training; the message says what differs.
    """
    note, _ = read_header(path, what=_WHAT)
    if not isinstance(note.get("mark"), dict):
        raise ValueError(f"{path} was not written by a training of tvlens.")
    mark = json.loads(json.dumps(mark))
    other = [name for name in mark if note["mark"].get(name) != mark[name]]
    if other:
        name = other[0]
        raise ValueError(
            f"{path} holds another training: {', '.join(other)} differ; its {name} is "
            f"{note['mark'].get(name)!r}, asked for is {mark[name]!r}. Remove it, or name another."
        )
    flat = read_tensors(path, note, what=_WHAT)
    try:
        return _state(note, flat, device)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by a training of tvlens ({error!r}).") from error


def _state(note: dict[str, Any], flat: dict[str, Tensor], device: torch.device) -> State:
    step, count = whole("step", note["step"]), whole("count", note.get("count", 0))
    state = State({}, step=step, seconds=float(note["seconds"]), count=count)
    for key, tensor in flat.items():
        part, name = key.split("/", 1)
        if part == "weights":
            state.weights[name] = tensor.to(device)
        elif part == "moments":
            state.moments[name] = (
                tensor if name.startswith("step:") and device.type == "cpu" else tensor.to(device)
            )
        elif part == "losses":
            state.losses = tensor.to(device)
        elif part == "measured":
            state.measured[int(name)] = tensor
        else:
            state.kept.setdefault(int(part.removeprefix("kept ")), {})[name] = tensor
    return state
