"""Reddy's networks: data as described, the forward pass of a plain network, measures in closed form."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import Tensor

from tvlens.icl.studies import _reddy_network, get
from tvlens.icl.studies._reddy import MEASURES, TESTS, Reddy, dataset
from tvlens.icl.studies._reddy_network import Batch, Task, forward, initial, losses, measures
from tvlens.icl.studies.reddy import reddy
from tvlens.plots.icl_reddy import reddy_curves, reddy_settings
from tvlens.results import Result

USED = {"n_labels": 4, "d_item": 5, "p_bursty": 1.0, "n_pairs": 4, "n_max": 6}
MEMBERS = [(8, 2, 0.1, 0.0, 0), (12, 1, 0.0, 1.0, 1)]
SMALL: dict[str, Any] = {
    "steps": 24, "batch": 8, "lr": 0.05,
    "n_classes": (8, 16), "n_labels": 4, "d_item": 5, "n_test": 20, "points": 4,
    "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.draw(MEMBERS, USED)


def content(task: Task, batch: Batch) -> Tensor:
    return batch.tokens[..., 2 * task.n_max + 1 :]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes_of(task: Task, batch: Batch, member: int, means: Tensor) -> Tensor:
    items = content(task, batch)[member, :, ::2]
    return torch.cdist(items, means[member, : MEMBERS[member][0]]).argmin(-1)


def test_sequences(task: Task) -> None:
    batch = task.batch(stream(), 300, p_bursty=1.0)
    assert batch.tokens.shape == (2, 300, 9, 13 + 5)
    for member, (_, copies, *_) in enumerate(MEMBERS):
        classes = classes_of(task, batch, member, task.means)
        assert torch.equal(classes[:, -1] % 4, batch.label[member])
        assert torch.equal(classes[:, :-1] % 4, batch.shown[member])
        named = content(task, batch)[member, :, 1::2]
        assert torch.equal(named, task.labels[member][batch.shown[member]])
        same = (classes[:, :-1] == classes[:, -1:]).sum(1)
        assert (same >= copies).all() and (same % copies == 0).all()
    # Without noise an item is its class mean; with it, its variance stays.
    exact = content(task, batch)[1, :, ::2]
    assert torch.equal(exact, task.means[1][classes_of(task, batch, 1, task.means)])
    noisy = content(task, batch)[0, :, ::2] - task.means[0][classes_of(task, batch, 0, task.means)]
    assert 0 < noisy.abs().max() < 0.5


def test_positions_are_a_shifted_diagonal(task: Task) -> None:
    position = task.batch(stream(), 200, p_bursty=1.0).tokens[..., :13]
    at = position.argmax(-1)
    assert (position.sum(-1) == 1).all() and (at.diff(dim=-1) == 1).all()
    assert set(at[..., 0].unique().tolist()) == {0, 1, 2, 3, 4}


def test_other_sequences(task: Task) -> None:
    absent = task.batch(stream(1), 300, p_bursty=0.0, absent=True)
    moved = task.batch(stream(2), 300, p_bursty=1.0, moved=True)
    for member in range(2):
        classes = classes_of(task, absent, member, task.means)
        assert (classes[:, :-1] != classes[:, -1:]).all()
        classes = classes_of(task, moved, member, task.means)
        assert torch.equal((classes[:, -1] + 1) % 4, moved.label[member])
        assert torch.equal((classes[:, :-1] + 1) % 4, moved.shown[member])
    new = task.batch(stream(3), 300, p_bursty=1.0, new=True)
    items = content(task, new)[1, :, ::2]
    assert (items[:, :, None] == task.new[1]).all(-1).any(-1).all()
    assert not (items[:, :, None] == task.means[1]).all(-1).any()
    half = task.batch(stream(4), 2000, p_bursty=0.5)
    classes = classes_of(task, half, 1, task.means)
    hit = (classes[:, :-1] == classes[:, -1:]).any(1).float().mean()
    weight = 1 / torch.arange(1, 13)
    p = weight / weight.sum()
    # Of iid contexts some hold the target by luck.
    expected = 0.5 + 0.5 * (p * (1 - (1 - p) ** 4)).sum()
    assert abs(hit - expected) < 0.04
    frequent = torch.bincount(classes.flatten(), minlength=12) / classes.numel()
    assert (frequent - p).abs().max() < 0.02


def plain(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One member, every product written out, both layers at all positions."""
    maps = []
    for layer in "12":
        q, k, v = (x @ w[f"{part}{layer}"].T for part in "QKV")
        mask = torch.full((x.shape[1],) * 2, -math.inf).triu(1)
        probabilities = (q @ k.transpose(1, 2) + mask).softmax(-1)
        x = x + probabilities @ v
        maps.append(probabilities)
    x = x[:, -1]
    for layer in "123":
        x = (x @ w[f"W{layer}"].T + w[f"b{layer}"]).relu()
    return x @ w["readout"].T, maps[0], maps[1][:, -1]


def test_forward_is_the_plain_network(task: Task) -> None:
    batch = task.batch(stream(), 30, p_bursty=1.0)
    w = initial(MEMBERS, task.d_input, 4)
    found = forward(w, batch.tokens)
    total = losses(w, batch)
    for member in range(2):
        one = {name: value[member] for name, value in w.items()}
        for ours, theirs in zip(found, plain(one, batch.tokens[member]), strict=True):
            torch.testing.assert_close(ours[member], theirs, atol=2e-5, rtol=1e-4)
        loss = torch.nn.functional.cross_entropy(
            plain(one, batch.tokens[member])[0], batch.label[member]
        )
        torch.testing.assert_close(total[member], loss)


def test_measures_of_uniform_attention(task: Task) -> None:
    tests = task.tests(400, 0)
    w = initial(MEMBERS, task.d_input, 4)
    w |= {name: torch.zeros_like(w[name]) for name in ("Q1", "Q2")}
    found = dict(
        zip(
            ("t", "n", "m", "w", "previous", "right", "same", "lead", "loss"),
            measures(w, tests).T,
            strict=True,
        )
    )
    torch.testing.assert_close(
        found["previous"], torch.full((2,), (1 / 2 + 1 / 4 + 1 / 6 + 1 / 8) / 4)
    )
    batch = tests["new_classes"]
    right = (batch.shown == batch.label[..., None]).float().sum(-1).mean(1) / 9
    torch.testing.assert_close(found["right"], right)
    assert found["same"].abs().max() < 0.12  # 0 but for contexts of one label only
    torch.testing.assert_close(found["loss"], losses(w, tests["train"]))


def progress(
    monkeypatch: pytest.MonkeyPatch, batch: Batch, logits: Tensor, first: Tensor, second: Tensor
) -> dict[str, Tensor]:
    """The measures of a network that says and attends as told."""
    monkeypatch.setattr(_reddy_network, "forward", lambda w, tokens: (logits, first, second))
    return dict(zip(MEASURES[:4], _reddy_network._progress({}, batch), strict=True))


def test_measures_of_attention_by_hand(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = task.batch(stream(5), 300, p_bursty=1.0, new=True)
    same = (batch.shown == batch.label[..., None]).float()
    count, none = same.sum(-1), torch.zeros(2, 300, 9)
    every, one_label = count >= 1, count == 4
    assert every.all() and 0 < one_label.float().mean() < 1
    # Layer 1: every label token looks at the item before it. Layer 2: the target looks at the right labels.
    back = torch.zeros(2, 300, 9, 9)
    back[..., range(1, 9, 2), range(0, 8, 2)] = 1
    right = none.clone()
    right[..., 1::2] = same / count[..., None]
    says = torch.zeros(2, 300, 4).scatter(-1, batch.shown, 1.0)
    found = progress(monkeypatch, batch, says, back, right)
    torch.testing.assert_close(found["previous_token"], torch.ones(2))
    torch.testing.assert_close(found["target_label"], torch.ones(2))
    torch.testing.assert_close(found["same_label"], (1 / count).mean(1))
    torch.testing.assert_close(found["context_label"], (~says.all(-1)).float().mean(1))
    assert (found["same_label"] > 0).all() and (found["context_label"] > 0).all()

    uniform = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    found = progress(
        monkeypatch, batch, 0 * says, uniform.expand(2, 300, 9, 9), torch.full_like(none, 1 / 9)
    )
    torch.testing.assert_close(
        found["previous_token"], torch.full((2,), (1 / 2 + 1 / 4 + 1 / 6 + 1 / 8) / 4)
    )
    torch.testing.assert_close(found["target_label"], count.mean(1) / 9)
    # Nothing is preferred, but where there are no other labels to compare with.
    torch.testing.assert_close(found["same_label"], one_label.float().mean(1) / 9)
    assert (found["context_label"] == 0).all()

    # The control: items in place of labels, the next token in place of the one before, other labels named.
    found = progress(monkeypatch, batch, -says, back.mT, right.roll(-1, dims=-1))
    assert all(
        (found[name] == 0).all() for name in ("previous_token", "target_label", "same_label")
    )
    assert (found["context_label"] < 0).all()


@pytest.fixture(scope="module")
def found() -> Reddy:
    return reddy(**SMALL)


def test_killed_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, chunk = [], Task.chunk

    def dying(self: Task, stream: torch.Generator, n: int, size: int) -> Any:
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return chunk(self, stream, n, size)

    monkeypatch.setattr(Task, "chunk", dying)
    with pytest.raises(KeyboardInterrupt):
        reddy(**SMALL, out=tmp_path)
    again = reddy(**SMALL, out=tmp_path)
    monkeypatch.setattr(Task, "chunk", chunk)
    xr.testing.assert_equal(again.data, reddy(**SMALL).data)
    with pytest.raises(ValueError, match="another training: batch differ"):
        reddy(**SMALL | {"batch": 9}, out=tmp_path)


def test_emergence_and_finding() -> None:
    """Made-up curves: accuracy jumps from step 20 to 30, attention at 10; the other network never learns."""
    steps = [0, 10, 20, 30, 40]
    values = torch.zeros(2, 9, 5)
    values[0, 1] = torch.tensor([0.1, 0.2, 0.25, 0.97, 1.0])
    values[0, 5] = torch.tensor([0.1, 0.6, 0.9, 0.9, 0.9])
    values[1, 1] = 0.3
    data = dataset(values, settings=[(8, 1, 0.1, 0.0), (4, 1, 0.1, 0.0)], seeds=[0], steps=steps)
    note = reddy(**SMALL | {"steps": 1, "seeds": 1, "n_classes": 4}).data.attrs
    made = Reddy(data.assign_attrs(note))
    table = made.emergence()
    assert table["learnt"].tolist() == [True, False]
    assert table["from_step"][0] == 30 and table["half_accuracy"][0] == 30
    assert table["half_target_label"][0] == 10 and math.isnan(table["half_accuracy"][1])
    assert "1 of 2 networks learnt in context within 40 steps" in made.finding()
    assert made.finding().endswith("attention to the right label led in 1.")
    assert made._shown() == 0


def test_result(found: Reddy, tmp_path: Path) -> None:
    assert found.data.sizes == {"setting": 2, "seed": 2, "test": 4, "measure": 5, "step": 3}
    assert found.data["n_classes"].values.tolist() == [8, 16]
    assert found.finding().startswith("None of 4 networks learnt in context within 24 steps")
    again = Result.load(found.save(tmp_path / "r.nc"))
    assert isinstance(again, Reddy)
    xr.testing.assert_equal(again.data, found.data)
    assert found.summary()["networks"] == 4 and "2312.03002" in found.cite()
    assert get("reddy") is reddy and list(found.figures()) == ["Tests and measures", "Settings"]


def test_figures(found: Reddy) -> None:
    one = found.data.isel(setting=1)
    curve = next(t for t in reddy_curves(one).data if t.name and t.name.startswith("new classes"))
    np.testing.assert_allclose(curve.y, one["accuracy"].sel(test="new_classes").mean("seed"))
    with pytest.raises(ValueError, match="has several settings: choose one"):
        reddy_curves(found.data)
    points = reddy_settings(found.emergence()).data[0]
    np.testing.assert_allclose(
        points.y, found.data["accuracy"].sel(test=TESTS[1])[..., -1].values.ravel()
    )
    with pytest.raises(ValueError, match="the table lacks"):
        reddy_settings(pd.DataFrame({"seed": [1]}))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="10 classes are no multiple of 4 labels. Nearest: 8"):
        reddy(**SMALL | {"n_classes": 10})
    with pytest.raises(
        ValueError, match="copies = 3 does not divide a context of 4 pairs. Nearest: 2"
    ):
        reddy(**SMALL, copies=3)
    with pytest.raises(
        ValueError, match="positions for n_max = 3 pairs, but n_pairs = 4. Nearest: 4"
    ):
        reddy(**SMALL, n_max=3)
    with pytest.raises(ValueError, match=r"p_bursty must lie in 0 to 1; 1.5 arrived. Nearest: 1"):
        reddy(**SMALL, p_bursty=1.5)
    with pytest.raises(ValueError, match="unknown preset 'papre'. Nearest: paper"):
        reddy(preset="papre")


@pytest.mark.slow
def test_many_classes_are_looked_up_and_few_are_known_by_heart() -> None:
    """Acceptance criterion A12, in small."""
    found = reddy(progress=False)
    table = found.emergence().groupby("n_classes").mean()
    assert found.data["accuracy"].sel(test="new_classes", step=0).max() < 0.2
    assert table.loc[512, "learnt"] == 1 and table.loc[64, "learnt"] == 0
    assert table.loc[512, "new_classes"] > 0.9 and table.loc[64, "in_weights"] > 0.9
    assert table.loc[512, "half_target_label"] <= table.loc[512, "half_accuracy"]
