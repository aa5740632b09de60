import re
import subprocess
import sys

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from tests.fake_results import STRANGE, FakeSweep, sweep_data
from tvlens import plots
from tvlens.intervals import wilson
from tvlens.plots import theme
from tvlens.plots._axes import color_bar, powers, steps_on_log
from tvlens.plots._labels import rows


def traces(figure, name):
    return [trace for trace in figure.data if trace.name and trace.name.startswith(name)]


def texts(figure):
    return str(figure.to_dict())


@pytest.fixture(scope="module")
def data():
    return sweep_data()


@pytest.mark.slow
def test_plots_import_no_torch():
    code = "import sys, tvlens.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_template_is_never_the_default():
    assert pio.templates.default != "tvlens"
    assert go.Figure().layout.template.layout.font.family != theme.FONT


def test_the_three_accuracies_differ_in_greyscale():
    def light(color):
        return (
            sum(w * int(color[i : i + 2], 16) for w, i in ((0.21, 1), (0.72, 3), (0.07, 5))) / 255
        )

    regular, hypothesis, baseline = (
        light(theme.ROLES[name].color) for name in ("regular", "hypothesis", "baseline")
    )
    assert regular + 0.15 < hypothesis and hypothesis + 0.15 < baseline
    assert len({role.dash + role.symbol for role in theme.ROLES.values()}) == len(theme.ROLES)


# --- labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("\n", "↵"),
        ("\t\r", "⇥␍"),
        ("\xa0", "⍽"),
        ("\x01\x1b\0", "␁␛␀"),
        ("", "∅"),
        ("\u200b", "\\u200b"),
        ("\u202e", "\\u202e"),
        ("\ud800", "\\ud800"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("$x$", "&#36;x&#36;"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("é", "é"),
    ],
)
def test_token_labels(token, shown):
    assert plots.token_label(token) == shown


def test_long_tokens_are_cut_before_they_are_escaped():
    assert plots.token_label("<" * 9, limit=4) == "&lt;&lt;&lt;…"
    assert plots.token_label("four", limit=4) == "four"


def test_titles_wrap_and_make_room():
    short = theme.titled(theme.figure(height=400), "Short")
    long = theme.titled(theme.figure(height=400), "word " * 40, subtitle="<small>")
    assert long.layout.title.text.count("<br>") == 3
    assert long.layout.height - short.layout.height == long.layout.margin.t - short.layout.margin.t
    assert "&lt;small&gt;" in long.layout.title.text
    assert long.layout.meta["subtitle"] == "<small>"


def parts_of(title):
    """What is set large, and what small."""
    text = theme.titled(theme.figure(), title).layout.title.text
    large, small = [], []
    for line in text.split("<br>"):
        (large if line.startswith("<b>") else small).append(re.sub("<.*?>", "", line))
    return " ".join(large), " ".join(small)


def test_long_titles_go_on_in_small_letters():
    first, second = "word " * 30 + "end;", "the rest (a; b) goes on."
    assert parts_of(f"{first} {second}") == (first, second)
    # Brackets hold no end of a clause, and what fits is not cut.
    one = "word " * 20 + "(in; brackets. too) " + "word " * 20
    assert parts_of(one) == (one.strip(), "")
    assert parts_of("One. Two; three.") == ("One. Two; three.", "")
    endless = "a; " + "word " * 400
    large, small = parts_of(endless)
    assert large == "a;" and small.endswith("…") and len(small) < 330
    assert theme.titled(theme.figure(), endless).layout.meta["title"] == endless


def test_names_keep_off_each_other():
    x, y = [0.0, 0.1, 0.2, 0.15, 5.0], [1.0, 1.0, 1.0, 0.5, 1.0]
    found = rows(x, y, [1.0] * 5, tall=0.1)
    assert found == [0, 1, 2, 0, 0]
    # One that is higher by a row already is in nobody's way.
    assert rows([0.0, 0.1], [1.0, 1.1], [1.0, 1.0], tall=0.1) == [0, 0]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (1, 5e6, ["1", "10", "100", "1,000", "10,000", "10<sup>5</sup>", "10<sup>6</sup>"]),
        (0.002, 0.5, ["0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]),
        (1e-8, 1e-6, ["10<sup>−8</sup>", "10<sup>−7</sup>", "10<sup>−6</sup>"]),
        (33, 44, ["33", "44"]),
        (7, 7, ["7"]),
    ],
)
def test_powers_are_the_ticks_of_logarithmic_axes(low, high, shown):
    axis = powers(low, high)
    assert axis["ticktext"] == shown
    assert all(0.99 * low <= tick <= 1.01 * high for tick in axis["tickvals"])
    assert len(powers(1, 1e12, most=4)["tickvals"]) <= 4


def test_step_0_stands_at_the_left_end_of_a_logarithmic_axis():
    at, axis = steps_on_log([0, 4, 400])
    assert at.tolist() == [2, 4, 400]
    assert axis["ticktext"] == ["0", "5", "10", "20", "50", "100", "200"]
    assert axis["tickvals"][0] == 2 and axis["range"][0] < np.log10(2)
    at, axis = steps_on_log([10, 1000])
    assert at.tolist() == [10, 1000] and axis["ticktext"] == ["10", "100", "1,000"]
    at, axis = steps_on_log([0])
    assert at.tolist() == [1] and axis["ticktext"] == ["0"]


def test_titles_of_colour_bars_are_as_long_as_the_plot():
    said = "share of logit difference: 0 corrupted, 1 clean"
    assert color_bar(said, height=400)["title"]["text"] == said
    low = color_bar(said, height=120)
    assert max(map(len, low["title"]["text"].split("<br>"))) * 6 < 120
    assert low["nticks"] < color_bar(said, height=400)["nticks"]
    assert color_bar("<b>", height=100, thickness=3)["title"]["text"] == "&lt;b&gt;"


# --- accuracy by layer ----------------------------------------------------------------------


def test_curves_are_the_accuracies_of_the_split(data):
    test = data.isel(prompt=data["split"].values == "test")
    figure = plots.accuracy_by_layer(data)
    (curve,) = traces(figure, "hypothesis")
    np.testing.assert_allclose(curve.y, test["hypothesis"].mean("prompt"))
    (control,) = traces(figure, "control")
    np.testing.assert_allclose(control.y, test["control"].mean("prompt"))
    for name in ("regular", "baseline", "majority"):
        marker = [trace for trace in traces(figure, name) if trace.error_y.array is not None]
        assert marker[0].y[0] == pytest.approx(float(test[name].mean()))
        low, high = wilson(int(test[name].sum()), 50)
        assert marker[0].y[0] + marker[0].error_y.array[0] == pytest.approx(high)
        assert marker[0].y[0] - marker[0].error_y.arrayminus[0] == pytest.approx(low)
    dev = plots.accuracy_by_layer(data, split="dev")
    assert not np.array_equal(traces(dev, "hypothesis")[0].y, curve.y)


def test_the_band_is_wilsons(data):
    figure = plots.accuracy_by_layer(data, level=0.9)
    (band,) = [trace for trace in figure.data if trace.fill == "toself"]
    right = data["hypothesis"].values[data["split"].values == "test"].sum(0)
    low, high = wilson(right, np.full(30, 50), level=0.9)
    np.testing.assert_allclose(band.y, np.concatenate([high, low[::-1]]))


def test_best_layer_and_query_blind_floor_are_marked(data):
    best = FakeSweep(data).provenance["best_layer"]
    figure = plots.accuracy_by_layer(data)
    (star,), (blind,) = traces(figure, "layer chosen"), traces(figure, "query-blind")
    (curve,) = traces(figure, "hypothesis")
    assert (star.x[0], star.y[0]) == (best, curve.y[best])
    assert (blind.x[0], blind.y[0]) == (29, curve.y[-1])
    assert f"layer {best}" in [note.text for note in figure.layout.annotations]
    assert f"layer {best} scores {curve.y[best]:.2f}" in figure.layout.meta["title"]


def test_without_provenance_dev_chooses_the_layer(data):
    dev = data["hypothesis"].values[data["split"].values == "dev"].mean(0)
    (star,) = traces(plots.accuracy_by_layer(data.drop_attrs()), "layer chosen")
    assert star.x[0] == dev.argmax()


def test_without_dev_prompts_no_layer_is_marked(data):
    test = data.isel(prompt=data["split"].values == "test").drop_attrs()
    figure = plots.accuracy_by_layer(test)
    assert not traces(figure, "layer chosen")
    assert "at its best layer" in figure.layout.meta["title"]


@pytest.mark.parametrize("layers", [2, 3])
def test_small_models_are_drawn(layers):
    figure = plots.accuracy_by_layer(sweep_data(layers=layers, n=4))
    assert list(figure.layout.xaxis.tickvals) == list(range(layers))
    low, high = figure.layout.xaxis.range
    assert low < 0 and high > layers - 1


def test_depth_replaces_layer(data):
    (curve,) = traces(plots.accuracy_by_layer(data, x="depth"), "hypothesis")
    np.testing.assert_allclose(curve.x, data["depth"])
    assert curve.customdata[15][0].startswith("layer 15, depth 0.5")


def test_layers_that_do_not_exist_leave_a_gap(data):
    ragged = data.copy()
    ragged["hypothesis"] = ragged["hypothesis"].astype(float).where(ragged["layer"] != 3)
    figure = plots.accuracy_by_layer(ragged)
    (curve,) = traces(figure, "hypothesis")
    assert np.isnan(curve.y[3]) and np.isfinite(curve.y[4])
    (band,) = [trace for trace in figure.data if trace.fill == "toself"]
    assert 3 not in band.x and np.isfinite(np.asarray(band.y, float)).all()


def test_optional_runs_may_be_absent(data):
    figure = plots.accuracy_by_layer(data.drop_vars(["baseline", "control", "majority"]))
    assert traces(figure, "hypothesis") and not traces(figure, "control")


@pytest.mark.parametrize("count", [2, 5, 18])
@pytest.mark.slow
def test_several_tasks_share_one_legend(count):
    many = [sweep_data(f"task_{i}", seed=i, layers=8, n=6) for i in range(count)]
    figure = plots.accuracy_by_layer(many)
    assert len(traces(figure, "hypothesis")) == count
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert len(shown) == len(set(shown)) == 7
    headings = " ".join(note.text for note in figure.layout.annotations)
    assert all(f"<b>task_{i}</b>" in headings for i in range(count))
    assert f"Mean of {count} tasks" in figure.layout.meta["title"]


def test_names_may_repeat_or_be_given():
    pair = [sweep_data(layers=8, n=6), sweep_data(layers=8, n=6, seed=1)]
    headings = [n.text for n in plots.accuracy_by_layer(pair).layout.annotations]
    assert any("<b>to_upper (2)</b>" in text for text in headings)
    named = plots.accuracy_by_layer({"<i>": pair[0], "b": pair[1]})
    assert any("<b>&lt;i&gt;</b>" in note.text for note in named.layout.annotations)


def test_names_are_escaped_everywhere():
    figure = plots.accuracy_by_layer(sweep_data("<script>%{x}$a$", layers=8, n=6))
    assert "<script>" not in figure.layout.title.text
    assert all("%{x}" not in (trace.hovertemplate or "") for trace in figure.data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tests"}, "unknown split 'tests'. Nearest: test"),
        ({"x": "dept"}, "unknown x axis 'dept'. Nearest: depth"),
        ({"level": 95.0}, "between 0 and 1"),
    ],
)
def test_accuracy_by_layer_refuses(data, options, message):
    with pytest.raises(ValueError, match=message):
        plots.accuracy_by_layer(data, **options)


def test_accuracy_by_layer_needs_data(data):
    with pytest.raises(ValueError, match="no data to draw"):
        plots.accuracy_by_layer([])
    with pytest.raises(ValueError, match="has no variable 'hypothesis'"):
        plots.accuracy_by_layer(data.drop_vars("hypothesis"))


# --- bars -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    names = [("a", "x"), ("b", "y"), ("<b>", "x")]
    sweeps = [sweep_data(n, family=f, seed=i, layers=8, n=6) for i, (n, f) in enumerate(names)]
    return pd.DataFrame([FakeSweep(sweep).summary() for sweep in sweeps])


def test_bars_show_the_table(table):
    figure = plots.accuracy_bars(table)
    ordered = table.iloc[[0, 2, 1]]  # families stay together
    assert list(figure.layout.yaxis.ticktext) == ["a", "&lt;b&gt;", "b"]
    for name in ("regular", "hypothesis", "baseline"):
        (bar,) = [trace for trace in traces(figure, name) if trace.type == "bar"]
        np.testing.assert_allclose(bar.x, ordered[name])
        np.testing.assert_allclose(bar.x + bar.error_x.array, ordered[f"{name}_high"])
        np.testing.assert_allclose(bar.x - bar.error_x.arrayminus, ordered[f"{name}_low"])
    for name in ("majority", "query_blind", "control"):
        (marks,) = traces(figure, f"floor: {theme.ROLES[name].name}")
        np.testing.assert_allclose(marks.x, ordered[name])
    assert [note.text for note in figure.layout.annotations] == ["<b>x</b>", "<b>y</b>"]
    assert f"layer {ordered['layer'].iloc[0]}" in traces(figure, "hypothesis")[0].customdata[0]


def test_bars_of_one_family_do_not_overlap(table):
    figure = plots.accuracy_bars(table)
    heights = np.sort(
        np.concatenate([np.asarray(t.y, float) for t in figure.data if t.type == "bar"])
    )
    assert np.diff(heights).min() >= figure.data[0].width


def test_bars_without_family_intervals_and_floors():
    rows = [{"task": "a", "baseline": 0.1, "hypothesis": 0.4, "regular": 0.5}]
    figure = plots.accuracy_bars(pd.DataFrame(rows))
    assert len(figure.data) == 3 and not figure.layout.annotations
    assert (
        figure.layout.meta["title"]
        == "a: baseline 0.10, hypothesis 0.40 (80% of regular), regular 0.50"
    )


def test_bars_can_be_sorted(table):
    figure = plots.accuracy_bars(table.drop(columns="family"), sort="regular")
    (bar,) = [trace for trace in traces(figure, "regular") if trace.type == "bar"]
    assert list(bar.x) == sorted(bar.x, reverse=True)


def test_the_mean_names_no_ratio_of_nothing():
    rows = [{"task": t, "baseline": 0.0, "hypothesis": 0.0, "regular": 0.0} for t in "ab"]
    title = plots.accuracy_bars(pd.DataFrame(rows)).layout.meta["title"]
    assert title == "Mean of 2 tasks: baseline 0.00, hypothesis 0.00, regular 0.00"


def test_bars_refuse(table):
    with pytest.raises(ValueError, match=r"lacks regular; it has: .*hypothesis"):
        plots.accuracy_bars(table.drop(columns="regular"))
    with pytest.raises(ValueError, match="no rows"):
        plots.accuracy_bars(table.iloc[:0])
    with pytest.raises(ValueError, match=r"cannot sort by 'acc'; the columns are: .*regular"):
        plots.accuracy_bars(table, sort="acc")


# --- vocabulary -----------------------------------------------------------------------------


def test_every_cell_keeps_its_token_and_probability(data):
    figure = plots.vocabulary(data, ranks=10)
    (cells,) = figure.data
    assert np.shape(cells.text) == (30, 10)
    expected = [[plots.token_label(t, limit=11) for t in row] for row in data["top_token"].values]
    assert [list(row) for row in cells.text] == expected
    np.testing.assert_allclose(cells.z, data["top_probability"])
    # The same token in many cells: positions are numbers, never the tokens themselves.
    assert len({t for row in expected for t in row}) < 30
    assert list(cells.x) == list(range(1, 11)) and list(cells.y) == list(range(30))


def test_hover_shows_the_whole_token(data):
    odd = data.copy()
    odd["top_token"] = (("layer", "rank"), np.resize(np.array(STRANGE, object), (30, 10)))
    figure = plots.vocabulary(odd)
    assert figure.data[0].customdata[0][0] == "'␣&lt;script&gt;alert(1)&lt;/script&gt;'"
    assert "<script>" not in texts(go.Figure(figure.data)) and "</td>" not in texts(figure)


def test_the_best_layer_is_framed_and_named(data):
    best = FakeSweep(data).provenance["best_layer"]
    figure = plots.vocabulary(data)
    (frame,) = figure.layout.shapes
    assert (frame.y0, frame.y1) == (best - 0.5, best + 0.5)
    assert figure.layout.yaxis.ticktext[best] == f"<b>► {best}</b>"
    assert f"layer {best} the vector promotes" in figure.layout.meta["title"]
    by_hand = data[["top_token", "top_probability"]].drop_attrs()
    assert not plots.vocabulary(by_hand).layout.shapes
    assert "by layer" in plots.vocabulary(by_hand).layout.meta["title"]


def test_faint_probabilities_look_faint(data):
    faint = data.assign(top_probability=data["top_probability"] * 0 + 0.01)
    assert plots.vocabulary(faint).data[0].zmax == 0.1


def test_vocabulary_refuses(data):
    with pytest.raises(ValueError, match="no 'top_probability'"):
        plots.vocabulary(data.drop_vars("top_probability"))
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        plots.vocabulary(data, ranks=0)
