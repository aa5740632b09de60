"""The state of a training, in memory and as one safetensors file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvlens._files import replacing

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
    from safetensors.torch import save_file

    parts = {
        "weights": state.weights,
        "moments": state.moments,
        "measured": {str(step): found for step, found in state.measured.items()},
        **{f"kept {step}": weights for step, weights in state.kept.items()},
        "losses": {} if state.losses is None else {"sum": state.losses},
    }
    flat = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    note = {"mark": mark, "step": state.step, "seconds": state.seconds, "count": state.count}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        save_file(flat, part, metadata={"tvlens": json.dumps(note)})


def load_state(path: str | Path, mark: dict[str, Any], device: torch.device) -> State:
    """Read a state back.

    Raises:
        ValueError: The file is none of ours, or of another training; the message says what differs.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("tvlens", "null"))
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no state of a training: {error}.") from None
    if not note or "mark" not in note:
        raise ValueError(f"{path} was not written by a training of tvlens.")
    mark = json.loads(json.dumps(mark))
    other = [name for name in mark if note["mark"].get(name) != mark[name]]
    if other:
        name = other[0]
        raise ValueError(
            f"{path} holds another training: {', '.join(other)} differ; its {name} is "
            f"{note['mark'].get(name)!r}, asked for is {mark[name]!r}. Remove it, or name another."
        )
    state = State({}, step=note["step"], seconds=note["seconds"], count=note.get("count", 0))
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
