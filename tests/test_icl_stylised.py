"""The stylised model beside the transformer: same inputs, known gates, and a result that draws itself."""

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
    return stylised(sizes=(4, 6), seeds=2, steps=3, n_items=40, device="cpu", progress=False)


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
