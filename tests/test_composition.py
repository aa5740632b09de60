"""Composed vectors: exact where a rule does nothing, and each corner's prompts are its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import tvlens as tv
from tests import tiny
from tvlens.encoding import Encoder, first_tokens
from tvlens.experiments._composition import PLACES, RUNS, Composition, list_tasks
from tvlens.experiments.composition import _Composer, _judged, _Settings, composition
from tvlens.function_vectors.effects import head_outputs
from tvlens.plots.composition import composition_bars, composition_layers
from tvlens.tasks import Task

SETTINGS: dict[str, Any] = {
    "shots": 2, "n_vectors": 4, "n_heads": 3, "n_trials": 3, "n_dev": 4, "n_test": 6, "n_lists": 40,
    "progress": False,
}  # fmt: skip
COPY = Task("copy", "f", {x: (x,) for x in "abcdefghijklm"}, spaced=False)


@pytest.fixture(scope="module")
def found() -> Composition:
    return composition(tiny.model("llama"), [COPY, "to_upper"], **SETTINGS)


def test_lists_and_their_tasks() -> None:
    tasks = list_tasks(tv.load_task("to_upper"), n_lists=50, seed=3)
    assert list(tasks) == ["first", "last", "first_rule", "last_rule"]
    assert (
        len({task.inputs for task in tasks.values()}) == len({t.name for t in tasks.values()}) == 1
    )
    assert len(tasks["first"]) == 50
    for x in tasks["first"].inputs:
        items = x.split(",")
        assert len(set(items)) == len(items) and 2 <= len(items) <= 4
        said = [tasks[name].answers[x] for name in tasks]
        assert said == [(items[0],), (items[-1],), (items[0].upper(),), (items[-1].upper(),)]
    assert list_tasks(tv.load_task("to_upper"), seed=4)["last"].inputs != tasks["last"].inputs
    with pytest.raises(ValueError, match="'list_first' has 0 without a comma"):
        list_tasks(tv.load_task("list_first"))


def test_no_list_has_an_answer_that_is_right_at_two_corners() -> None:
    tasks = list_tasks(tv.load_task("next_letter"), n_lists=400, lengths=3)
    for x in tasks["first"].inputs:
        assert len({task.answers[x][0] for task in tasks.values()}) == 4, x
    assert len(tasks["first"]) == 400
    half = Task("half", "f", {x: (x if x in "abc" else x.upper(),) for x in "abcdefg"})
    assert not {*"abc"} & {y for x in list_tasks(half)["first"].inputs for y in x.split(",")}
    swap = Task("swap", "f", {"a": ("b",), "b": ("a",)})
    with pytest.raises(ValueError, match="no list of items of task 'swap' keeps the answers"):
        list_tasks(swap, lengths=2)


def test_first_tokens_are_right_at_one_corner() -> None:
    """Two whole words may begin alike; what counts is the token that judges."""
    words = {"cat": "cats", "dog": "dogs", "hot": "cold", "big": "small", "happy": "sad"}
    rule = Task("rule", "f", {x: (y,) for x, y in words.items()}, spaced=False)
    tasks, settled = _judged(tiny.model("llama"), list_tasks(rule, n_lists=60), "example")
    encoder = Encoder.of(tiny.model("llama"))
    ids = [first_tokens(task, settled, encoder).ids for task in tasks.values()]
    assert len(tasks["last"]) > 1
    for x in tasks["last"].inputs:
        every = [i for some in ids for i in some[x]]
        assert len(every) == len(set(every)), x


def test_a_rule_that_does_nothing_leaves_the_direct_vector(found: Composition) -> None:
    one = found.data.sel(target=["last copy", "first copy"])
    for name in ("says", "dev", "layer_chosen", "norm", "token"):
        pairs = [one[name].sel(run=run).values.tolist() for run in ("composed", "direct", "bc")]
        assert pairs[0] == pairs[1] == pairs[2], name
    assert found.gap("last copy", "theta") == (0, 0, 0)
    upper = found.data.sel(target="last to_upper")
    assert (
        upper["norm"].sel(run="composed").values.tolist()
        != upper["norm"].sel(run="direct").values.tolist()
    )


def test_vectors_by_hand() -> None:
    model = tiny.model("llama")
    made = list_tasks(tv.load_task("to_upper"), n_lists=40)
    tasks, settled = _judged(model, made, "example")
    settings = _Settings(2, 4, 3, 3, 4, 6, 2, 0)
    composer = _Composer(model, tasks, settled, settings, ("theta", "function_vector"))
    how: dict[str, Any] = {
        "shots": 2, "n": 4, "split": "dev", "demonstrations": "split", "answers": "any", "template": settled,
    }  # fmt: skip
    prompts = {name: tv.build_prompts(task, model, **how) for name, task in tasks.items()}
    theta = {name: tv.extract(model, p).values.mean(dim=0) for name, p in prompts.items()}
    ours = composer.vectors("theta", "last")
    expected = theta["first_rule"] + theta["last"] - theta["first"]
    torch.testing.assert_close(ours["composed"].values[0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours["direct"].values[0], theta["last_rule"], atol=1e-5, rtol=1e-4)
    other = composer.vectors("theta", "first")["composed"].values[0]
    expected = theta["last_rule"] + theta["first"] - theta["last"]
    torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-4)
    outputs = {name: head_outputs(model, p) for name, p in prompts.items()}
    mine = composer.vectors("function_vector", "last")
    heads = composer.heads["last"]
    parts = [tv.head_effects(
        model, tasks[PLACES["last"][c]], shots=2, n_means=4, n_trials=3, methods=["effect"], template=settled,
        answers="any",
    ).data["effect"].mean("trial").values for c in ("ac", "bc", "ad")]  # fmt: skip
    best = np.argsort(-np.mean(parts, axis=0).ravel(), kind="stable")[:3]
    assert sorted(map(tuple, heads)) == sorted(divmod(int(i), 4) for i in best)
    summed = {
        n: sum(outputs[n][layer, head] @ model.W_O[layer, head] for layer, head in heads)
        for n in outputs
    }
    expected = summed["first_rule"] + summed["last"] - summed["first"]
    torch.testing.assert_close(
        mine["composed"].values[0, 0], expected.detach(), atol=1e-4, rtol=1e-3
    )
    drawn = ours["random"].values
    norms = ours["composed"].values.norm(dim=-1)
    torch.testing.assert_close(
        drawn.norm(dim=-1), norms.expand_as(drawn[..., 0]), atol=1e-3, rtol=1e-4
    )
    # Nothing that was shown, asked or read for vectors is a test query.
    shown = {x for p in prompts.values() for x in p.queries}
    asked = {x for p in composer.asked.values() for x in p.queries}
    assert not shown & asked and len({p.queries for p in composer.asked.values()}) == 1
    for text in (t for p in prompts.values() for t in p.text):
        assert not any(f":{x}->" in text for x in asked)


def test_outcomes_are_those_of_score(found: Composition) -> None:
    model = tiny.model("llama")
    tasks, settled = _judged(model, list_tasks(tv.load_task("to_upper"), n_lists=40), "example")
    composer = _Composer(model, tasks, settled, _Settings(2, 4, 3, 3, 4, 6, 2, 0), ("theta",))
    one = found.data.sel(target="last to_upper", vector="theta")
    assert one["query"].values.tolist() == [*composer.asked["last_rule"].queries]
    vectors = composer.vectors("theta", "last")
    for run in RUNS[:-1]:
        at = int(one["layer_chosen"].sel(run=run))
        assert at == int(one["dev"].sel(run=run).argmax("layer"))
        for corner, name in PLACES["last"].items():
            scores = tv.score(
                model, composer.asked[name], view="zero_shot", vector=vectors[run], layer=at
            )
            says = one["says"].sel(run=run, corner=corner).values
            assert says.tolist() == scores.correct.tolist()
            assert one["token"].sel(run=run).values.tolist() == [*scores.text]
        assert float(one["norm"].sel(run=run)) == pytest.approx(
            float(vectors[run].at(at).norm()), rel=1e-4
        )
    for run, view in (("regular", "regular"), ("baseline", "zero_shot")):
        scores = tv.score(model, composer.asked["last_rule"], view=view)
        assert one[f"says_{run}"].sel(corner="bd").values.tolist() == scores.correct.tolist()


def told(found: Composition) -> Composition:
    """The same result with outcomes that are known."""
    said = np.zeros(found.data["says"].shape, dtype=bool)
    for r, share in enumerate((5, 4, 2, 1, 0, 0)):
        said[:, :, r, :share, 3] = True
    said[:, :, 3, 3:, 1] = True
    return Composition(found.data.assign(says=(found.data["says"].dims, said)))


def test_rates_gaps_and_finding(found: Composition) -> None:
    result = told(found)
    table = result.rates()
    assert len(table) == 4 * (2 * 6 + 2)
    one = table[(table["target"] == "last to_upper") & (table["vector"] == "theta")].set_index(
        "run"
    )
    assert one["accuracy"].tolist() == pytest.approx([5 / 6, 4 / 6, 2 / 6, 1 / 6, 0, 0])
    assert one.loc["bc", "says_bc"] == 0.5 and (one["low"] <= one["accuracy"]).all()
    gap = result.gap("last to_upper", "theta", other="ad")
    assert gap[0] == pytest.approx(0.5) and gap[1] <= 0.5 <= gap[2]
    assert "theta composed 0.83, direct 0.67, best part 0.33 (AD;" in result.finding()
    assert result.summary()["last to_upper theta composed"] == pytest.approx(5 / 6)
    assert set(result.tables()) == {
        f"{place} {rule} of a list" for place in ("Last", "First") for rule in ("copy", "to_upper")
    }


def test_copies_of_a_query_make_no_gap_surer(found: Composition) -> None:
    """Three distinct queries are three, however often each is asked."""
    few, n = told(found), 300
    queries = np.array([["a,b", "c,d", "e,f"] * (n // 3)] * few.data.sizes["target"], object)
    data = few.data.isel(prompt=np.zeros(n, int))
    said = np.zeros(data["says"].shape, dtype=bool)
    said[:, :, 0, ::3, 3] = True
    data = data.assign(says=(data["says"].dims, said))
    data = data.assign_coords(query=(("target", "prompt"), queries))
    gap, low, high = Composition(data).gap("last to_upper", "theta")
    assert gap == pytest.approx(1 / 3)
    assert low == pytest.approx(0) and high >= 2 / 3
    assert "draw them again" in Composition.method


def test_random_vectors_differ_by_rule_place_and_kind() -> None:
    drawn = []
    for rule in ("to_upper", "next_letter"):
        made = list_tasks(tv.load_task(rule), n_lists=40)
        tasks, settled = _judged(tiny.model("llama"), made, "example")
        composer = _Composer(
            tiny.model("llama"), tasks, settled, _Settings(2, 4, 3, 3, 4, 6, 2, 0),
            ("theta", "function_vector"),
        )  # fmt: skip
        for place in PLACES:
            for kind in composer.kinds:
                values = composer.vectors(kind, place)["random"].values[0, 0]
                drawn.append(values / values.norm())
    alike = torch.stack(drawn) @ torch.stack(drawn).T - torch.eye(8)
    assert alike.abs().max() < 0.6


@pytest.mark.slow
def test_file_round_trip_and_figures(found: Composition, tmp_path: Path) -> None:
    again = tv.load(found.save(tmp_path / "c.nc"))
    assert isinstance(again, Composition) and again.finding() == found.finding()
    xr.testing.assert_identical(again.data, found.data)
    assert set(found.figures()) == {"Composed and direct vectors", "By layer"}
    assert "todd2024" in found.cite()
    table = told(found).rates()
    figure = composition_bars(table, title="mine")
    bars = [t for t in figure.data if t.type == "bar"]
    assert len(bars) == 8 and "mine" in figure.layout.title.text
    assert list(bars[0].y) == pytest.approx([5 / 6, 4 / 6, 2 / 6, 1 / 6, 0, 0])
    by_layer = composition_layers(found.data)
    assert len(by_layer.data) == 6 * 8
    with pytest.raises(ValueError, match="the table lacks run"):
        composition_bars(pd.DataFrame(table.drop(columns="run")))
    with pytest.raises(ValueError, match="no shares by layer"):
        composition_layers(found.data.drop_vars("dev"))


def test_same_seed_same_numbers(found: Composition) -> None:
    again = composition(tiny.model("llama"), [COPY, "to_upper"], **SETTINGS)
    xr.testing.assert_identical(again.data.drop_attrs(), found.data.drop_attrs())


def test_bad_input() -> None:
    model = tiny.model("llama")
    for arguments, message in (
        ({"vectors": ["thete"]}, "unknown kind of vector 'thete'. Nearest: theta"),
        ({"places": ["lst"]}, "unknown place 'lst'. Nearest: last"),
        ({"places": []}, "at least one rule, one place"),
        ({"n_heads": 99}, "n_heads = 99 asked for; this model has 1 to 16"),
        ({"lengths": (1, 2)}, "at least 2 items"),
        ({"lengths": 1}, "at least 2 items.*; 1 arrived"),
        ({"lengths": []}, "at least 2 items.*; none arrived"),
        ({"n_dummy": 0}, "n_dummy >= 1; 0 arrived"),
        ({"n_lists": 8}, "Ask for at most"),
    ):
        with pytest.raises(ValueError, match=message):
            composition(model, ["to_upper"], **(SETTINGS | {"shots": 4} | arguments))


def test_one_length_place_and_kind_need_no_list() -> None:
    one = {"lengths": 3, "places": "last", "vectors": "theta"}
    found = composition(tiny.model("llama"), ["to_upper"], **(SETTINGS | one))
    assert found.data["target"].values.tolist() == ["last to_upper"]
    assert found.provenance["lengths"] == [3]
    assert all(len(x.split(",")) == 3 for x in found.data["query"].values.ravel())


@pytest.mark.slow
def test_smollm2_composes_theta(smollm2: Any) -> None:
    small = {"n_vectors": 8, "n_dev": 12, "n_test": 20, "progress": False}
    result = composition(smollm2, ["to_upper"], places=["last"], vectors=["theta"], **small)
    rates = result.rates().set_index("run")["accuracy"]
    assert rates["composed"] > 0.5 and rates["random"] < 0.1 and rates["bc"] < 0.2
    assert rates["composed"] > rates["direct"] - 0.25
