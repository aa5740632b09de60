"""The stylised model beside the transformer: same inputs, known gates, and a result that draws itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import tvlens as tv
from tvlens.icl import Setting, Transformer
from tvlens.icl.gated import Gated
from tvlens.icl.studies import stylised as module
from tvlens.icl.studies.stylised import PROBES, Stylised, stylised
from tvlens.icl.training import Plan, train


@pytest.fixture(scope="module")
def small() -> Stylised:
    return stylised(
        sizes=(4, 6),
        seeds=2,
        steps=3,
        transformer_steps=3,
        n_items=40,
        device="cpu",
        progress=False,
    )


def test_result(small: Stylised, tmp_path) -> None:
    assert small.data.sizes == {"n_sequences": 2, "seed": 2, "probe": 4}
    assert "alpha-hat" in small.finding()
    assert (
        small.curves().set_index(["probe", "n_sequences"])["authors"]["relevant high", 64] == 0.05
    )
    assert len(small.plot().data) >= 8
    again = tv.load(small.save(tmp_path / "s.nc"))
    assert again.finding() == small.finding()


def test_a_gate_that_is_known() -> None:
    """A gate held open or shut says 1 or 0, and the mixture errs as g or as h does."""
    settings = [Setting(n_sequences=64, seed=s) for s in (0, 1)]
    plan = Plan(steps=1, probes=(), lr=0.0)
    how = {"device": "cpu", "progress": False}
    gated = train(settings, plan, model=Gated(stage="gate"), **how)
    whole = train(settings, plan, model=Transformer(), **how)
    for bias, gate, error in ((50.0, 1.0, None), (-50.0, 0.0, 0.0)):
        gated.weights["gate.2.w"] = torch.zeros_like(gated.weights["gate.2.w"])
        gated.weights["gate.2.b"] = torch.full_like(gated.weights["gate.2.b"], bias)
        found = module._compare(gated, whole, n_items=50)
        assert np.allclose(found["gate"], gate)
        assert np.isnan(found["agreement"]).all()  # a gate that does not vary agrees with nothing
        relevant = found["gated_error"][:, :2]
        if error is not None:  # h copies the only label of a relevant context
            assert np.allclose(relevant, error)
            assert np.allclose(found["gated_error"][:, 2:], 1.0)
        else:  # g knows no moved label
            assert (relevant > 0.5).all()


@pytest.mark.slow
def test_a_sharp_enough_temperature_finds_the_relevant_pair() -> None:
    """A9: at L = 4 the error of h stays below .24, which the authors' doubly exponentiated one has."""
    settings = [Setting(n_sequences=2**12, length=4, seed=seed) for seed in (0, 1)]
    plan = Plan(steps=400, lr=1e-2, probes=())
    done = train(settings, plan, model=Gated(stage="parts"), device="cpu", progress=False)
    index = torch.arange(1000).expand(2, -1)
    for group in ("high", "low"):
        items = done.data.items("h alone", index, relevant=True, group=group)
        wrong = done.model.parts(done.weights, items).h.argmax(-1) != items.target
        assert float(wrong.float().mean()) < 0.24


def test_the_gate_turns_to_the_weights_as_the_authors_does() -> None:
    """A9, on the committed run: 3 seeds, 20,000 steps, g, h and gate learnt together."""
    found = tv.load(Path(__file__).parent / "data" / "icl_stylised.nc")
    assert isinstance(found, Stylised)
    gate = found.curves().set_index(["probe", "n_sequences"])["gate"]
    assert gate["relevant high", 2**8] <= 0.3 and gate["relevant high", 2**12] >= 0.9
    assert all(gate["relevant low", 2**n] <= 0.2 for n in (6, 8, 10, 12, 14))
    assert gate["irrelevant low", 2**12] >= 0.7
    frame = found.curves().dropna(subset="authors")
    gap = (frame["gate"] - frame["authors"]).abs()
    assert len(frame) == 16 and float(gap.mean()) < 0.06
    # On rare classes theirs stays low up to 2^16; elsewhere all agree.
    assert float(gap[frame["n_sequences"] < 2**16].max()) < 0.11


def test_the_order_of_learning_is_asked_for() -> None:
    apart = stylised(
        sizes=4, seeds=1, steps=3, transformer_steps=2, order="apart", n_items=20, device="cpu",
        progress=False,
    )  # fmt: skip
    assert "learnt apart" in apart.title and apart.curves()["authors"].isna().all()
    with pytest.raises(ValueError, match="unknown order 'a part'. Nearest: apart"):
        stylised(order="a part", progress=False)


def test_agreement_is_spearmans() -> None:
    a, b = torch.rand(3, 50), torch.rand(3, 50).round(decimals=1)
    found = module._spearman(a, b)
    assert np.allclose(found, [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


def test_probes_show_the_same_inputs_with_other_labels() -> None:
    data = train([Setting()], Plan(steps=1, probes=()), device="cpu", progress=False).data
    index = torch.arange(20).expand(1, -1)
    true, moved = (
        data.items("stylised relevant low", index, relevant=True, group="low", flipped=f)
        for f in (False, True)
    )
    assert torch.equal(true.inputs, moved.inputs)
    assert torch.equal(true.own, moved.own) and not torch.equal(true.target, moved.target)
    assert PROBES[1] == "relevant low"
