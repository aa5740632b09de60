"""Coopetition: the closed form is the full tensors' loss, and mechanism 1 comes and goes."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from tvlens.icl.presets import at_least, settle, several, within
from tvlens.icl.studies import get
from tvlens.icl.studies._coopetition import Coopetition
from tvlens.icl.studies.coopetition import PRESETS, coopetition, drawn, losses
from tvlens.plots.icl_coopetition import coopetition_curves, coopetition_dials
from tvlens.results import Result


def full(factors: list[torch.Tensor], true: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Both losses and the cost from whole tensors, as the paper writes them."""
    one, two = (
        0.5 * ((torch.einsum("i,j,k->ijk", true[i], *true[1:3])
                - torch.einsum("i,j,k->ijk", factors[i], *factors[1:3])) ** 2).mean()
        for i in (0, 3)
    )  # fmt: skip
    return one, two, 0.5 * (torch.outer(factors[0], factors[3]) ** 2).mean()


@pytest.fixture(scope="module")
def found() -> Coopetition:
    return coopetition(progress=False)


@pytest.mark.parametrize("width", [160, 20])
def test_closed_form_is_autograd_on_whole_tensors(width: int) -> None:
    """Thirty steps of descent on the tensors themselves, losses and cosines at every one."""
    alpha, mu1, mu2, steps = 0.1, 0.1, 0.05, 30
    true, factors = ([torch.tensor(x) for x in some] for some in drawn(3, width))
    ours = coopetition(
        seed=3, seeds=1, steps=steps, alphas=alpha, mu1=mu1, mu2=mu2, widths=width, progress=False
    ).data.isel(setting=0, seed=0)
    for step in range(steps + 1):
        factors = [x.detach().requires_grad_() for x in factors]
        one, two, cost = full(factors, true)
        if step in ours["step"]:
            at = ours.sel(step=step)
            for name, value in (("loss_1", one), ("loss_2", two), ("cost", cost)):
                assert at[name].item() == pytest.approx(value.item(), rel=1e-9), (step, name)
            cosine = [
                torch.cosine_similarity(x.detach(), y, dim=0).item()
                for x, y in zip(factors, true, strict=True)
            ]
            np.testing.assert_allclose(at["cosine"].values, cosine, rtol=1e-9)
        ((one + mu1) * (two + mu2) + alpha * cost).backward()
        factors = [x.detach() - x.grad for x in factors]
    assert ours["step"].values[-1] == steps


def test_gradients_of_the_plane() -> None:
    rng = np.random.default_rng(0)
    state, length = rng.normal(size=(4, 2)), rng.uniform(1, 3, size=4)
    (one, two), _, of_one, of_two = losses(state, length, np.array(160.0))
    for index in np.ndindex(4, 2):
        moved = state.copy()
        moved[index] += 1e-6
        (one_, two_), *_ = losses(moved, length, np.array(160.0))
        assert (one_ - one) / 1e-6 == pytest.approx(of_one[index], abs=1e-5)
        assert (two_ - two) / 1e-6 == pytest.approx(of_two[index], abs=1e-5)


def test_mechanism_1_comes_and_goes(found: Coopetition) -> None:
    """Acceptance criterion A10, and its control."""
    data = found.data.isel(setting=0)
    last = data.isel(step=-1)
    assert data.sizes["seed"] == 3 and float(data["alpha"]) == 0.1
    assert (data["least_1"] <= 0.01).all()
    assert (last["loss_1"] >= 10 * data["least_1"]).all()
    assert (last["loss_2"] < 1e-3).all()
    fates = found.fates()
    assert fates["transient"].isel(setting=0).all() and not fates["transient"].isel(setting=1).any()
    control = found.data.isel(setting=1)
    assert float(control["alpha"]) == 0 and (control["loss_1"].isel(step=-1) <= 0.01).all()
    assert found.provenance["seconds"] <= 20


def test_the_least_loss_counts_every_step(found: Coopetition) -> None:
    kept = found.data["loss_1"].min("step")
    assert (found.data["least_1"] <= kept + 1e-15).all()
    short = coopetition(steps=300, progress=False).data
    assert short["step"].values.tolist()[:2] == [0, 1] and short["step"].values[-1] == 300
    np.testing.assert_allclose(
        short["loss_1"].sel(step=0).values, found.data["loss_1"].sel(step=0).values
    )


def test_members_do_not_know_of_each_other(found: Coopetition) -> None:
    alone = coopetition(seed=2, seeds=1, alphas=0.1, steps=2000, progress=False).data
    with_others = coopetition(seeds=3, steps=2000, alphas=(0.3, 0.1), progress=False).data
    np.testing.assert_array_equal(
        alone["loss_1"].values[0, 0], with_others["loss_1"].isel(setting=1).sel(seed=2).values
    )
    wide, narrow = drawn(5, 160), drawn(5, 20)
    assert all((x == y).all() for x, y in zip(wide[0][:3], narrow[0][:3], strict=True))


def test_result(found: Coopetition, tmp_path: Any) -> None:
    assert found.finding().startswith("With a cost of 0.1, mechanism 1 came and went in 3 of 3")
    again = Result.load(found.save(tmp_path / "c.nc"))
    assert isinstance(again, Coopetition)
    xr.testing.assert_equal(again.data, found.data)
    summary = found.summary()
    assert summary["transient"] == 1 and summary["control_transient"] == 0 and summary["n"] == 3
    assert "2503.05631" in found.cite()
    assert get("coopetition") is coopetition
    assert list(found.figures()) == ["Losses over steps"]


def test_figures(found: Coopetition) -> None:
    fig = found.plot()
    drawn_at = [trace for trace in fig.data if trace.name and "mechanism 1" in trace.name]
    np.testing.assert_allclose(drawn_at[0].y, found.data["loss_1"].isel(setting=0).median("seed"))
    dials = coopetition(seeds=2, steps=50, alphas=(0.1, 0.0), widths=(160, 20), progress=False)
    assert list(dials.figures()) == ["Losses over steps", "Dials"]
    grid = coopetition_dials(dials.rates()).data[0]
    assert np.shape(grid.z) == (2, 2) and list(grid.x) == ["0", "0.1"]
    with pytest.raises(ValueError, match="the data lacks alpha"):
        coopetition_curves(found.data.drop_vars("alpha"))
    with pytest.raises(ValueError, match="the table lacks"):
        coopetition_dials(pd.DataFrame({"alpha": [1]}))


def test_every_worth_of_the_other_mechanism_has_its_panel() -> None:
    table = coopetition(
        seeds=1, steps=2, alphas=(0.1, 0.0), mu1=(0.1, 0.5), mu2=(0.0, 0.2), widths=(160, 20), progress=False
    ).rates()  # fmt: skip
    table["transient"] = np.arange(len(table)) / len(table)
    fig = coopetition_dials(table)
    heads = [note.text for note in fig.layout.annotations]
    assert heads == [f"<b>mu1 = {a}, mu2 = {b}</b>" for b in ("0", "0.2") for a in ("0.1", "0.5")]
    shown = np.concatenate([np.ravel(trace.z) for trace in fig.data])
    assert sorted(shown) == sorted(table["transient"])
    panel = table[(table["mu1"] == 0.5) & (table["mu2"] == 0.2)]
    wanted = panel.pivot(index="width", columns="alpha", values="transient")
    np.testing.assert_array_equal(fig.data[-1].z, wanted)
    with pytest.raises(ValueError, match="the table lacks mu2"):
        coopetition_dials(table.drop(columns="mu2"))


def test_curves_say_the_step_that_they_show(found: Coopetition) -> None:
    """Step 0 has no place on a logarithmic axis, so x is one more; what is read is not."""
    thick = [trace for trace in found.plot().data if trace.hovertemplate]
    assert len(thick) == 6
    for trace in thick:
        np.testing.assert_array_equal(trace.customdata, found.data["step"])
        np.testing.assert_array_equal(trace.x, found.data["step"] + 1)
        assert "step %{customdata:,}" in trace.hovertemplate and "%{x}" not in trace.hovertemplate


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="unknown preset 'quik'. Nearest: quick"):
        coopetition(preset="quik")
    with pytest.raises(ValueError, match="seeds must be at least 1; 0 arrived"):
        coopetition(seeds=0)
    with pytest.raises(ValueError, match=r"alphas must be at least 0; -0.1 arrived. Nearest: 0"):
        coopetition(alphas=(0.1, -0.1))
    with pytest.raises(ValueError, match="mu1 needs at least one value"):
        coopetition(mu1=())
    with pytest.raises(ValueError, match="widths must be at least 1; 0 arrived"):
        coopetition(widths=(160, 0))
    with pytest.raises(ValueError, match="gradient descent ran away at lr = 1000"):
        coopetition(steps=50, lr=1000.0, progress=False)
    with pytest.raises(ValueError, match="must lie in 0 to 1; nan arrived.$"):
        within(0, 1, p=float("nan"))
    with pytest.raises(TypeError, match="p must be a number; 'x'"):
        within(0, 1, p="x")
    assert settle(PRESETS, "paper", seeds=1)["seeds"] == 1 and several("x", np.array([1, 1])) == (
        1,
    )
    at_least(0, n=0)
