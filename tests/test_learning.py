"""A learned vector does what its losses say, is chosen on other queries, and survives a wild step size."""

import math
import random

import pytest
import torch

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tvlens import learning
from tvlens.learning import learn


def prompts_of(model: object, n: int = 12) -> tv.Prompts:
    return tv.build_prompts("to_upper", model, shots=2, n=n, split="dev")


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize(("name", "kind"), GRID)
def test_the_loss_is_that_of_the_injected_vector(name: str, kind: str, mode: str) -> None:
    model = tiny.model(name, kind)
    prompts = prompts_of(model)
    found = learn(model, prompts, layer=0, mode=mode, steps=20, rate=0.1, seed=3)
    assert found.stopped == "finished" and found.steps[-1] == 20
    assert found.losses[-5:].mean() < found.losses[:5].mean()
    # Through hooks on the model, not through the tail; on the queries that were held out.
    logits = []
    with torch.no_grad(), tv.inject(model, found.vector, layer=0, mode=mode):
        for text in prompts.zero_shot.text:
            logits.append(model(model.to_tokens(text))[0, -1])
    scores = torch.stack(logits).log_softmax(dim=-1)
    each = torch.tensor(
        [-scores[i, list(ids)].logsumexp(0) for i, ids in enumerate(prompts.answer_ids)]
    )
    held = sorted(set(prompts.queries))
    random.Random(3).shuffle(held)
    chosen = set(held[: max(round(0.2 * len(held)), 1)])
    rows = torch.tensor([query in chosen for query in prompts.queries])
    assert 0 < rows.sum() < len(rows)
    assert each[rows].mean().item() == pytest.approx(found.held_out.min().item(), abs=2e-4)


def test_at_the_last_layer_no_vector_tells_queries_apart() -> None:
    model = tiny.model("llama")
    prompts = prompts_of(model)
    found = learn(model, prompts, layer=-1, steps=150, rate=0.3, patience=150)
    assert found.vector.layers == (model.cfg.n_layers - 1,)
    # One distribution for all queries: as good as its answers are uneven, and no better.
    first = torch.tensor([ids[0] for ids in prompts.answer_ids])
    _, counts = first.unique(return_counts=True)
    shares = counts / counts.sum()
    floor = -(shares * shares.log()).sum().item()
    assert found.losses[-5:].mean().item() > 0.5 * floor
    scores = tv.score(model, prompts, view="zero_shot", vector=found.vector, layer=-1)
    assert len(set(scores.predicted.tolist())) == 1


def test_a_wild_step_is_stopped_and_the_best_is_kept() -> None:
    model = tiny.model("gpt2")
    prompts = prompts_of(model)
    theta = tv.extract(model, prompts, layers=[0])
    wild = learn(model, prompts, layer=0, steps=40, rate=1e30, start=theta)
    assert wild.stopped == "diverged" and len(wild.losses) < 40
    torch.testing.assert_close(wild.vector.at(0), theta.mean().at(0))
    assert wild.best == 0 and math.isfinite(wild.held_out.min())


def test_patience_ends_what_gets_no_better() -> None:
    model = tiny.model("gpt2")
    found = learn(model, prompts_of(model), layer=0, steps=150, rate=1e-9, patience=5, mode="add")
    assert found.stopped in ("no longer better", "finished")
    again = learn(model, prompts_of(model), layer=0, steps=150, rate=1e-9, patience=5, mode="add")
    assert torch.equal(found.vector.values, again.vector.values)


def test_errors() -> None:
    model = tiny.model("gpt2")
    prompts = prompts_of(model)
    with pytest.raises(ValueError, match="replace"):
        learn(model, prompts, layer=0, mode="replce")
    with pytest.raises(ValueError, match="between 0 and 1; 1.5 arrived"):
        learn(model, prompts, layer=0, holdout=1.5)
    with pytest.raises(ValueError, match="steps must be at least 1; 0"):
        learn(model, prompts, layer=0, steps=0)
    with pytest.raises(ValueError, match="rate must be above 0"):
        learn(model, prompts, layer=0, rate=-1.0)
    with pytest.raises(ValueError, match="layer"):
        learn(model, prompts, layer=99)
    with pytest.raises(ValueError, match="at least 2 are needed; 1 arrived"):
        learn(model, tv.build_prompts("to_upper", model, shots=2, n=1), layer=0)
    wide = tv.TaskVector(torch.ones(1, 1, 7), (0,))
    with pytest.raises(ValueError, match="width 7"):
        learn(model, prompts, layer=0, start=wide)


def test_a_loss_that_is_no_number_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    looked = iter([2.0, 1.0, math.nan, 3.0, math.nan])
    real = learning._Training.loss

    def loss(self: learning._Training, prompt: torch.Tensor) -> torch.Tensor:
        found = real(self, prompt)
        return found if torch.is_grad_enabled() else found * 0 + next(looked)

    kept = {}
    step = learning._Training.step

    def noted(self: learning._Training, number: int, prompt: torch.Tensor) -> float:
        kept[number] = self.vector.detach().clone()
        return step(self, number, prompt)

    monkeypatch.setattr(learning._Training, "loss", loss)
    monkeypatch.setattr(learning._Training, "step", noted)
    found = learn(model, prompts_of(model), layer=0, steps=20, rate=0.1, seed=3)
    assert found.best == 5 and found.lowest == 1.0
    torch.testing.assert_close(found.vector.values[0, 0], kept[5])
