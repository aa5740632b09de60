"""One loop that trains many small networks at once by plain gradient descent, for studies of other papers.

Every weight has a leading axis ``member``; the loss is the sum over members, so that no member's gradient
knows of another. A chunk of steps draws its data together, from a generator that (seed, chunk) decides: a
run that is killed continues from its file with the numbers it would have had.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.icl._state import State, load_state, save_state
from tvlens.icl.draws import number

CHUNK = 8
"""Steps whose data are drawn together."""


def stops(steps: int, points: int) -> tuple[int, ...]:
    """Choose steps to measure at: 0, the last, and others closer together in the beginning.

    Args:
        steps: Steps of training.
        points: About how many.

    Returns:
        Multiples of `CHUNK`, and the last step.

    Example:
        >>> stops(100, 4)
        (0, 8, 40, 100)
    """
    # Between even in time and even in its logarithm: abrupt learning may come early or late.
    places = np.linspace(0, 1, points)[:-1] ** 2 * steps
    return tuple(sorted({*(CHUNK * (places // CHUNK).astype(int)).tolist(), steps}))


def descend(
    weights: Mapping[str, Float[Tensor, "member ..."]],
    *,
    draw: Callable[[torch.Generator, int], Sequence[Any]],
    losses: Callable[[Mapping[str, Tensor], Any], Float[Tensor, " member"]],
    measure: Callable[[Mapping[str, Tensor]], Float[Tensor, "member measure"]],
    at: Sequence[int],
    lr: float,
    decay: Mapping[str, float],
    mark: Mapping[str, Any],
    out: str | Path | None = None,
    save_every: int = 2000,
    progress: bool = True,
) -> State:
    """Train until the last step that is measured.

    Args:
        weights: First weights; they are not changed.
        draw: From a generator, and how many steps, to one batch a step.
        losses: From weights and a batch to a loss for each member.
        measure: From weights to what is measured.
        at: Steps to measure at, see `stops`.
        lr: Step size.
        decay: Share of each weight that a step takes away, by name.
        mark: What tells this training from others: ``study``, which names the file, ``seed`` and settings.
        out: A folder with what is finished; what is there is continued.
        save_every: Steps between two files.
        progress: Whether to show a progress bar.

    Returns:
        The trained weights, and measures by step.

    Raises:
        ValueError: The folder holds another training, or the loss is no number any more.

    Example:
        >>> found = descend(
        ...     {"w": torch.ones(2, 1)}, draw=lambda stream, n: [0] * n, measure=lambda w: w["w"],
        ...     losses=lambda w, _: (w["w"] ** 2).sum(1), at=(0, 8), lr=0.1, decay={"w": 0.0},
        ...     mark={"study": "one", "seed": 0}, progress=False,
        ... )
        >>> found.measured[8][0].item() < 0.2
        True
    """
    from tqdm.auto import tqdm

    names, device = list(weights), next(iter(weights.values())).device
    path, mark = (Path(out) / f"{mark['study']}.safetensors" if out else None), dict(mark)
    if path and path.exists():
        state = load_state(path, mark, device)
    else:
        state = State({name: value.detach().clone() for name, value in weights.items()})
    wanted, last = set(at), max(at)
    leaves = [state.weights[name].requires_grad_() for name in names]
    keep = [1 - float(decay[name]) for name in names]
    with tqdm(total=last, initial=state.step, disable=not progress, leave=False) as bar:
        while True:
            if state.step in wanted and state.step not in state.measured:
                with torch.no_grad():
                    state.measured[state.step] = measure(state.weights).cpu()
                if not state.measured[state.step].isfinite().all():
                    raise ValueError(
                        f"training ran away by step {state.step} at lr = {lr}; take a smaller one."
                    )
            if path and (state.step % save_every < CHUNK or state.step == last):
                save_state(path, state, mark)
            if state.step >= last:
                return state
            n = min(CHUNK, last - state.step)
            stream = torch.Generator(device).manual_seed(
                number(f"{mark['seed']}:data:{state.step}")
            )
            for batch in draw(stream, n):
                gradients = torch.autograd.grad(losses(state.weights, batch).sum(), leaves)
                with torch.no_grad():
                    for leaf, gradient, kept in zip(leaves, gradients, keep, strict=True):
                        leaf.mul_(kept).sub_(gradient, alpha=lr)
            state.step += n
            bar.update(n)
