"""The suite is layer sweeps side by side: the same numbers, and nothing where a model has no such layer."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import tvlens as tv
from tests import tiny
from tests.test_layer_sweep import easy_task
from tvlens._errors import each_once
from tvlens.experiments import suite as module
from tvlens.experiments._suite import ALL, PAPER_MEANS, RUNS, Suite
from tvlens.experiments.layer_sweep import LayerSweep, layer_sweep
from tvlens.experiments.suite import suite
from tvlens.intervals import wilson
from tvlens.plots.suite import accuracy_by_depth, model_bars
from tvlens.provenance import ATTRIBUTE, encode
from tvlens.tasks import PAPER_TASKS
from tvlens.testing import tiny_model

SETTINGS: dict[str, Any] = {"shots": 3, "n_dev": 6, "n_test": 8, "answers": "any"}
TASKS = [easy_task(), "to_upper"]


@pytest.fixture(scope="module")
def kept() -> list[LayerSweep]:
    return []


@pytest.fixture(scope="module")
def found(kept: list[LayerSweep]) -> Suite:
    """Four layers, two layers, two tasks, two seeds."""
    models = {"deep": tiny.model("llama"), "flat": tiny_model()}
    result = suite(models, TASKS, seeds=(0, 1), keep=kept.append, progress=False, **SETTINGS)
    shares = [
        float(result.data[name].sel(task="easy").mean()) for name in ("hypothesis", "regular")
    ]
    assert all(0 < share < 1 for share in shares), shares
    return result


def test_one_model_and_task_equals_the_layer_sweep() -> None:
    model, task = tiny.model("llama"), easy_task()
    one = suite(model, [task], seeds=[5], progress=False, **SETTINGS)
    sweep = layer_sweep(model, task, seed=5, progress=False, **SETTINGS)
    there = one.data.isel(model=0, task=0, seed=0)
    for name in (
        "baseline",
        "regular",
        "majority",
        "hypothesis",
        "control",
        "query",
        "split",
        "depth",
    ):
        expected = sweep.data[name].values
        assert there[name].values.astype(expected.dtype).tolist() == expected.tolist(), name
    rates, row = sweep.rates(), one.tasks().loc["easy"]
    for run in RUNS:
        given = rates.loc[run]
        assert row[[run, f"{run}_low", f"{run}_high"]].tolist() == pytest.approx(given.tolist())
    assert row["layer_low"] == row["layer_high"] == sweep.best_layer
    assert one.models == (sweep.provenance["model"],)
    means = one.means().loc[ALL]
    assert [means[run] for run in RUNS] == pytest.approx([row[run] for run in RUNS])


def test_every_sweep_is_in_its_place(found: Suite, kept: list[LayerSweep]) -> None:
    assert len(kept) == 8
    names = [name for name in found.models for _ in range(4)]
    for name, sweep in zip(names, kept, strict=True):
        made, n = sweep.provenance, sweep.data.sizes["layer"]
        here = found.data.sel(model=name, task=made["task"], seed=made["seed"])
        own = here["hypothesis"].transpose("prompt", "layer").values
        assert own[:, :n].tolist() == sweep.data["hypothesis"].values.tolist()
        assert np.isnan(own[:, n:]).all() and own[:, n:].shape[1] == 4 - n
        assert here["query"].values.tolist() == sweep.data["query"].values.tolist()
        assert int(found.best_layers().sel(model=name, task=made["task"], seed=made["seed"])) == (
            sweep.best_layer
        )
        rates = sweep.rates()["accuracy"]
        outcomes = found.outcomes().sel(model=name, task=made["task"], seed=made["seed"])
        for run in RUNS:
            assert float(outcomes[run].mean()) == pytest.approx(rates[run]), run


def test_depth_is_normalised_and_never_zero_where_there_is_no_layer(found: Suite) -> None:
    depth = found.data["depth"]
    np.testing.assert_allclose(depth.sel(model="deep"), [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(depth.sel(model="flat"), [0, 1, np.nan, np.nan])
    curves = found.curves()
    for name in ("hypothesis", "hypothesis_low", "control", "control_high"):
        assert np.isnan(curves[name].sel(model="flat").values[2:]).all()
        assert np.isfinite(curves[name].sel(model="deep").values).all()


def test_curves_and_means_by_hand(found: Suite, kept: list[LayerSweep]) -> None:
    curves = found.curves()
    for i, name in enumerate(found.models):
        own = [one.data for one in kept[4 * i : 4 * i + 4]]
        test = [one.isel(prompt=np.flatnonzero(one["split"] == "test")) for one in own]
        dev = [one.isel(prompt=np.flatnonzero(one["split"] == "dev")) for one in own]
        n = own[0].sizes["layer"]
        by_layer = np.mean([one["hypothesis"].values.mean(axis=0) for one in test], axis=0)
        np.testing.assert_allclose(curves["hypothesis"].sel(model=name)[:n], by_layer)
        chosen = np.mean([one["hypothesis"].values.mean(axis=0) for one in dev], axis=0).argmax()
        assert int(curves["peak"].sel(model=name)) == chosen
        for level in ("regular", "baseline"):
            mean = np.mean([one[level].values.mean() for one in test])
            assert float(curves[level].sel(model=name)) == pytest.approx(mean)
            ends = [float(curves[f"{level}_{end}"].sel(model=name)) for end in ("low", "high")]
            assert ends[0] <= mean <= ends[1]
        table = found.means(name)
        assert table.index.tolist() == [ALL, "f", "algorithmic"] and table["tasks"].tolist() == [
            2,
            1,
            1,
        ]
        rows = [found.tasks(name).loc[task] for task in ("easy", "to_upper")]
        for run in RUNS:
            assert table.loc[ALL, run] == pytest.approx(np.mean([row[run] for row in rows]))
            assert table.loc["f", run] == pytest.approx(rows[0][run])
        seeds = found.outcomes()["hypothesis"].sel(model=name).mean(["task", "prompt"]).values
        assert table.loc[ALL, "lowest"] == seeds.min() and table.loc[ALL, "highest"] == seeds.max()


def test_intervals_of_tasks_count_distinct_queries(found: Suite) -> None:
    row = found.tasks("deep").loc["to_upper"]
    asked = found.outcomes().sel(model="deep", task="to_upper")["query"].values
    n = len(set(asked.ravel().tolist()))
    assert n < asked.size  # letters are asked by both seeds
    assert (row["regular_low"], row["regular_high"]) == wilson(row["regular"] * n, n)


@pytest.mark.slow
def test_a_model_is_gone_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []

    def load(name: str) -> Any:
        gc.collect()
        assert [one for one in alive if one() is not None] == [], (
            f"a model is held when {name} is loaded"
        )
        hf = copy.deepcopy(tiny.hf("llama"))
        model = tv.load_model(hf, tokenizer=tiny.tokenizer("llama"), device="cpu")
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(module, "load_model", load)
    result = suite(["one", "two"], ["to_upper"], progress=False, **SETTINGS)
    assert len(alive) == 2
    # Both say the same of themselves, and are told apart all the same.
    assert result.models[1] == f"{result.models[0]} (2)"


@pytest.mark.slow
def test_file_round_trip_tables_and_figures(found: Suite, tmp_path: Path) -> None:
    again = tv.load(found.save(tmp_path / "s.nc"))
    assert isinstance(again, Suite) and again.finding() == found.finding()
    xr.testing.assert_identical(again.data, found.data)
    assert list(found.tables()) == [
        f"{name}: {what}" for name in ("deep", "flat") for what in ("accuracy by task", "means")
    ]
    names = {"Accuracy by depth", "Means by model", "Tasks: deep", "Tasks: flat"}
    assert set(found.figures()) == names
    summary = found.summary()
    assert summary["deep: mean_regular"] == pytest.approx(found.means("deep").loc[ALL, "regular"])
    assert "wilson1927" in found.cite() and found.finding()[:12] in found._repr_html_()
    assert {"query", "layer", "depth", "hypothesis"} <= set(found.to_dataframe().columns)


def test_the_figure_has_a_line_a_star_and_levels_for_each_model(found: Suite) -> None:
    figure, curves = found.plot(), found.curves()
    for i, name in enumerate(found.models):
        own = [trace for trace in figure.data if trace.legendgroup == name]
        n = int(curves["n_layers"][i])
        line = next(trace for trace in own if trace.mode == "lines+markers")
        np.testing.assert_allclose(line.x, curves["depth"].values[i, :n])
        np.testing.assert_allclose(line.y, curves["hypothesis"].values[i, :n])
        star = next(trace for trace in own if trace.mode == "markers+text")
        peak = int(curves["peak"][i])
        assert star.x[0] == line.x[peak] and star.y[0] == line.y[peak] and f"{peak}" in star.text
        flat = [trace for trace in own if trace.mode == "lines" and trace.line.dash]
        assert len(flat) == 3 and all(len(set(trace.y)) == 1 for trace in flat)
        band = next(trace for trace in own if trace.fill == "toself")
        assert not np.isnan(np.array(band.y, float)).any()
    assert found.plot(x="layer").layout.xaxis.title.text == "layer"
    alone = accuracy_by_depth(curves.isel(model=[0]), title="mine")
    assert "mine" in alone.layout.title.text and sum(bool(t.showlegend) for t in alone.data) == 3
    with pytest.raises(ValueError, match="the data lacks peak"):
        accuracy_by_depth(curves.drop_vars("peak"))
    with pytest.raises(ValueError, match="'depht' arrived"):
        accuracy_by_depth(curves, x="depht")


def test_reported_means_are_drawn_apart_and_only_beside_all_the_papers_tasks(found: Suite) -> None:
    assert not found.provenance["paper"]
    table = pd.DataFrame([{"model": "m", "baseline": 0.1, "hypothesis": 0.5, "regular": 0.6}])
    figure = model_bars(table, n_tasks=18, reported=PAPER_MEANS)
    assert any("reported by Hendel" in str(note.text) for note in figure.layout.annotations)
    assert len(figure.data[0].x) == 8 and len(model_bars(table, n_tasks=18).data[0].x) == 1
    assert all(base < hypothesis < regular for base, hypothesis, regular in PAPER_MEANS.values())
    with pytest.raises(ValueError, match="needs a column 'model'"):
        model_bars(table.drop(columns="model"), n_tasks=18)


def test_bad_input(found: Suite, kept: list[LayerSweep]) -> None:
    model = tiny.model("llama")
    for models, tasks, seeds, message in (
        ([], ["to_upper"], (0,), "at least one model"),
        (model, [], (0,), "at least one task"),
        (model, ["to_upper"], (1, 0, 1), "each seed once; given more than once: 1"),
        (model, ["to_upper"], (), "one seed"),
        (model, "to_upper", (0,), "several tasks are needed, as a list"),
        (model, ["to_uper"], (0,), "Nearest: to_upper"),
    ):
        with pytest.raises(ValueError, match=message):
            suite(models, tasks, seeds=seeds, progress=False, **SETTINGS)
    for seeds in ("0", [0.5], True):
        with pytest.raises(TypeError, match="a seed must be a whole number"):
            each_once(seeds)
    with pytest.raises(ValueError, match="Nearest: flat"):
        found.tasks("fla")
    with pytest.raises(ValueError, match="unknown model"):
        found.means()
    first = kept[:4]
    other = layer_sweep(model, "to_lower", progress=False, **(SETTINGS | {"shots": 2}))
    for sweeps, message in (
        ([], "at least one layer sweep"),
        ({"m": [*first, first[0]]}, "'easy' with seed 0 is there twice for 'm'"),
        ({"m": first[:3]}, "1 of 4 sweeps are missing.*not 'to_upper' with seed 1 of 'm'"),
        ({"m": [first[0], other]}, "sweeps of different shots"),
    ):
        with pytest.raises(ValueError, match=message):
            Suite.of(sweeps)
    again = Suite.of(first)
    assert again.data["hypothesis"].shape == (1, 2, 2, 14, 4)


def changed(sweep: LayerSweep, model: dict[str, Any] | None = None, **facts: Any) -> LayerSweep:
    made = sweep.provenance
    made = made | facts | {"model_facts": made["model_facts"] | (model or {})}
    return LayerSweep(sweep.data.assign_attrs({ATTRIBUTE: encode(made)}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights_sha256", "0" * 64),
        ("processing", "fold"),
        ("dtype", "bfloat16"),
        ("name", "another"),
    ],
)
def test_two_models_of_one_name_do_not_make_a_suite(
    kept: list[LayerSweep], found: Suite, key: str, value: str
) -> None:
    sweeps = kept[:4]
    assert sweeps[0].provenance["model_facts"][key] != value
    mixed = [*sweeps[:3], changed(sweeps[3], {key: value})]
    with pytest.raises(ValueError, match=f"go by 'm', but are of different {key}.*{value}"):
        Suite.of({"m": mixed})


def test_two_tasks_of_one_name_do_not_make_a_suite(kept: list[LayerSweep], found: Suite) -> None:
    sweeps = kept[:4]
    other = changed(sweeps[1], task_fingerprint="another")
    with pytest.raises(ValueError, match="called 'easy', but are of different task_fingerprint"):
        Suite.of({"m": [sweeps[0], other, *sweeps[2:]]})
    # Nor do they where the second model has the other task.
    own = [changed(one, task_fingerprint="another") for one in sweeps]
    with pytest.raises(ValueError, match="called 'easy'"):
        Suite.of({"m": sweeps, "n": own})


def test_seeds_use_the_same_items(kept: list[LayerSweep], found: Suite) -> None:
    sweeps = kept[:4]
    now = sweeps[1].provenance["answers"]
    other = changed(sweeps[1], answers="one_token" if now == "any" else "any", n_items=7)
    with pytest.raises(ValueError, match="seeds of 'easy' on 'm' of different answers, n_items"):
        Suite.of({"m": [sweeps[0], other, *sweeps[2:]]})


def test_one_seed_needs_no_list() -> None:
    one = suite(tiny_model(), ["to_upper"], seeds=3, progress=False, **SETTINGS)
    assert one.data["seed"].values.tolist() == [3]


def test_intervals_of_means_have_width_where_all_or_none_is_right(found: Suite) -> None:
    data = found.data.copy(deep=True)
    data["regular"][:], data["hypothesis"][:], data["control"][:] = True, 1.0, 0.0
    result = Suite(data)
    right = result.outcomes().sel(model="deep")
    n = sum(len(set(one.ravel().tolist())) for one in right["query"].transpose("task", ...).values)
    row = result.means("deep").loc[ALL]
    assert (row["regular_low"], row["regular_high"]) == wilson(n, n)
    assert (row["control_low"], row["control_high"]) == wilson(0, n)
    curves = result.curves().sel(model="deep")
    assert np.allclose(curves["hypothesis_low"], wilson(n, n)[0])
    assert np.allclose(curves["control_high"], wilson(0, n)[1])


def test_all_of_the_paper_is_the_default() -> None:
    import inspect

    assert inspect.signature(suite).parameters["tasks"].default == PAPER_TASKS
    assert tv.experiments.get("suite") is suite


@pytest.mark.slow
def test_smollm2_peaks_in_the_middle(smollm2: Any) -> None:
    result = suite(
        {"smollm2": smollm2}, ["to_upper", "gerund"], n_dev=16, n_test=16, progress=False
    )
    row = result.means().loc[ALL]
    assert row["hypothesis"] > 0.4 and row["control"] < 0.1 and row["query_blind"] < 0.2
    assert row["hypothesis_low"] > row["baseline"] and row["regular"] > 0.5
    assert 0.5 < int(result.curves()["peak"][0]) / 29 < 0.9
