"""Figures of attribution show what the data says, sum by sum and token by token."""

from typing import Any

import numpy as np
import pytest
from plotly.colors import sample_colorscale

import tvlens as tv
from tests import tiny
from tvlens.attribution import attribute, attribute_gradients, writers
from tvlens.plots import attribution as figures
from tvlens.plots.palette import DIVERGING, PAPER

PROMPTS = ["example:cat->CAT <dog->", "one two $three$"]


@pytest.fixture(scope="module")
def result() -> Any:
    return attribute(
        tiny.model("gpt2"), PROMPTS, answers=[17, 30], wrong=[18, 31], by=("head", "position")
    )


def test_the_waterfall_ends_at_the_total(result: Any) -> None:
    figure = result.plot("waterfall")
    bars = [trace for trace in figure.data if trace.type == "bar"]
    adds, takes, total = bars
    assert all(y >= 0 for y in adds.y) and all(y < 0 for y in takes.y)
    steps = dict(zip([*adds.x, *takes.x], [*adds.y, *takes.y], strict=True))
    base = dict(zip([*adds.x, *takes.x], [*adds.base, *takes.base], strict=True))
    shares = result.parts(heads=False).mean("prompt").values
    np.testing.assert_allclose([steps[i] for i in range(len(shares))], shares, atol=1e-6)
    # Each step begins where the last one ended, and the last one, the residual, ends at the total.
    ends = [base[i] + steps[i] for i in range(len(steps))]
    np.testing.assert_allclose([base[i + 1] for i in range(len(steps) - 1)], ends[:-1], atol=1e-6)
    assert ends[-1] == pytest.approx(total.y[0], abs=1e-6)
    assert total.y[0] == pytest.approx(float(result.data["total"].mean()))
    assert steps[len(shares)] == pytest.approx(float(result.data["residual"].mean()))
    # In greyscale the two ways are told apart by filling.
    assert takes.marker.color == PAPER and adds.marker.color != PAPER
    assert figure.layout.xaxis.ticktext[-2:] == ("residual", "<b>total</b>")
    hover = dict(zip([*adds.x, *takes.x], [*adds.customdata, *takes.customdata], strict=True))
    assert "<b>embedding</b>" in hover[0] and "sum so far" in hover[0]
    assert "mean of 2 prompts" in figure.layout.title.text


def test_maps_have_heads_or_tokens_on_their_axes(result: Any) -> None:
    model = tiny.model("gpt2")
    heads = attribute(model, PROMPTS, answers=[17, 30], by="head")
    figure = heads.plot()
    (cells,) = figure.data
    np.testing.assert_allclose(cells.z, heads.data["attention"].mean("prompt"), atol=1e-6)
    assert figure.layout.xaxis.title.text == "head"
    assert figure.layout.coloraxis.cmin < 0 < figure.layout.coloraxis.cmax
    assert set(result.figures()) == {"map", "waterfall", "tokens"}
    assert len(result.plot("map").data) == 4  # a step of the slider for each head


def test_tokens_are_coloured_by_their_values(result: Any) -> None:
    figure = result.plot("tokens")
    first, second, scale = figure.data
    assert first.visible and not second.visible and scale.marker.coloraxis == "coloraxis"
    values = result.data["attention"].sum(["layer", "head"]).isel(prompt=0).values
    words = result.data["prompt_token"].values[0]
    n = int((words != "").sum())
    half = figure.layout.coloraxis.cmax
    assert list(first.marker.color) == sample_colorscale(DIVERGING, 0.5 + values[:n] / (2 * half))
    assert len(first.text) == n and any("&lt;" in text for text in first.text)
    dollars = result.plot("tokens", prompt=1).data
    assert dollars[1].visible and not any("$" in text for text in dollars[1].text)
    # Boxes of a row stand side by side.
    ends = np.array(first.base) + np.array(first.x)
    same = np.array(first.y)[1:] == np.array(first.y)[:-1]
    assert (ends[:-1] <= np.array(first.base)[1:])[same].all()
    assert len(set(result.plot("tokens", width=12).data[0].y)) > len(set(first.y))
    low = values[:n] < -0.2 * np.nanmax(np.abs(result.drawn("tokens")["value"]))
    assert [text.startswith("−") for text in first.text] == low.tolist()
    with pytest.raises(ValueError, match="prompt 5 asked for"):
        result.plot("tokens", prompt=5)


def test_gradients_have_a_figure_for_each_kind() -> None:
    model = tiny.model("llama")
    kinds = {by: attribute_gradients(model, PROMPTS, by=by) for by in ("token", "layer", "head")}
    assert kinds["token"].plot().data[0].type == "bar"
    layer = kinds["layer"].plot().data[0]
    np.testing.assert_allclose(
        layer.z, kinds["layer"].data["attribution"].mean("prompt").values, atol=1e-5
    )
    heads = kinds["head"].plot()
    assert heads.layout.xaxis.title.text == "head" and len(heads.data) == 1


def test_origins_of_theta() -> None:
    model = tiny.model("llama")
    prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=2, n=3)
    found = writers(model, prompts, layer=2)
    assert found.drawings == ("map", "waterfall", "origins")
    figure = found.plot("origins")
    expected = found.data["attention"].sum(["layer", "head"]).mean("prompt").transpose("role", ...)
    np.testing.assert_allclose(figure.data[0].z, expected, atol=1e-5)
    assert figure.data[0].x == ("demonstration 1", "demonstration 2", "query")
    assert len(found.figures()) == 3
    with pytest.raises(ValueError, match="no demonstrations"):
        figures.origins(found.drawn("map"))
    with pytest.raises(ValueError, match="no parts"):
        figures.waterfall(found.drawn("map"))
    with pytest.raises(ValueError, match="no values by token"):
        figures.token_highlights(found.drawn("map"))
