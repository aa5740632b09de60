"""The loop that trains many networks at once: it is SGD, and it survives being killed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvlens.icl.neighbours import CHUNK, descend, stops


def problem(seed: int = 0) -> dict[str, Any]:
    """Three members, each a linear regression on data that the stream draws."""
    weights = {"w": torch.arange(6.0).reshape(3, 2), "b": torch.zeros(3, 1)}

    def draw(stream: torch.Generator, n: int) -> list[Tensor]:
        return list(torch.randn(n, 5, 2, generator=stream))

    def losses(w: Any, x: Tensor) -> Tensor:
        return ((x @ w["w"].mT + w["b"].mT - x.sum(1, keepdim=True)) ** 2).mean(0)

    return {
        "weights": weights, "draw": draw, "losses": losses, "measure": lambda w: w["w"].clone(), "lr": 0.05,
        "decay": {"w": 0.01, "b": 0.0}, "mark": {"study": "one", "seed": seed}, "progress": False,
    }  # fmt: skip


def test_it_is_stochastic_gradient_descent() -> None:
    """Each member alone, with torch's SGD; its decay is a share of the weight, ours of a step."""
    at = (0, CHUNK, 3 * CHUNK + 3)
    found = descend(**problem(), at=at)
    assert sorted(found.measured) == list(at) and found.step == at[-1]
    batches: list[Tensor] = []
    descend(
        **problem() | {"losses": lambda w, x: batches.append(x) or problem()["losses"](w, x)}, at=at
    )
    for member in range(3):
        w = {
            k: v[member : member + 1].clone().requires_grad_()
            for k, v in problem()["weights"].items()
        }
        groups = [{"params": [w["w"]], "weight_decay": 0.01 / 0.05}, {"params": [w["b"]]}]
        optimizer = torch.optim.SGD(groups, lr=0.05)
        for x in batches:
            optimizer.zero_grad()
            problem()["losses"](w, x).sum().backward()
            optimizer.step()
        torch.testing.assert_close(found.measured[at[-1]][member], w["w"][0].detach())
    assert torch.equal(problem()["weights"]["w"], found.measured[0])


def test_killed_half_way(tmp_path: Path) -> None:
    at, calls = (0, 8, 24, 40), []
    whole = descend(**problem(), at=at)

    def dying(stream: torch.Generator, n: int) -> list[Tensor]:
        calls.append(n)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return problem()["draw"](stream, n)

    with pytest.raises(KeyboardInterrupt):
        descend(**problem() | {"draw": dying}, at=at, out=tmp_path, save_every=16)
    again = descend(**problem() | {"draw": dying}, at=at, out=tmp_path, save_every=16)
    assert len(calls) == 4 + 3  # from step 16 on
    assert sorted(again.measured) == list(at)
    for step in at:
        assert torch.equal(again.measured[step], whole.measured[step])
    finished = descend(**problem() | {"draw": dying}, at=at, out=tmp_path)
    assert torch.equal(finished.weights["w"], whole.weights["w"])
    with pytest.raises(ValueError, match="another training: seed differ"):
        descend(**problem(1), at=at, out=tmp_path)


def test_seeds_differ_and_running_away_is_an_error() -> None:
    one, two = (descend(**problem(seed), at=(8,)).measured[8] for seed in (0, 1))
    assert not torch.equal(one, two)
    with pytest.raises(ValueError, match=r"training ran away by step 400 at lr = 9.0"):
        descend(**problem() | {"lr": 9.0}, at=(400,))


def test_stops() -> None:
    at = stops(3001, 20)
    assert at[0] == 0 and at[-1] == 3001 and all(step % CHUNK == 0 for step in at[:-1])
    assert len(at) <= 21 and at[2] - at[1] < at[-2] - at[-3]
