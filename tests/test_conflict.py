"""Tasks in conflict: the same outcomes as plain Hugging Face hooks, and controls that do nothing."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import tvlens as tv
from tests import tiny
from tvlens import plots
from tvlens.encoding import Encoder
from tvlens.experiments.conflict import Conflict, conflict
from tvlens.intervals import wilson
from tvlens.plots.conflict import conflict_controls, conflict_matrix
from tvlens.tasks import Task

SETTINGS = {"shots": 2, "n": 8, "n_dev": 6, "seed": 3, "answers": "any", "progress": False}


def rivals(n: int = 3) -> list[Task]:
    """Tasks over the same queries; each word is right for one of them, so that a random model obeys some."""
    encoder = Encoder.of(tiny.model("llama"))
    words = dict.fromkeys(encoder.tokenizer.decode([i]).strip() for i in range(370))
    words = [w for w in words if w and len(encoder.continuation("example:x->", w)) == 1]
    words = words[:48]
    rng = random.Random(0)
    answers: list[dict[str, tuple[str, ...]]] = [{} for _ in range(n)]
    for x in (f"{a}{b}" for a in "pqrstuvw" for b in "xyz"):
        rng.shuffle(words)
        for i in range(n):
            answers[i][x] = tuple(words[i::n])
    return [Task(f"t{i}", "f", answers[i], spaced=False) for i in range(n)]


@pytest.fixture(scope="module")
def found() -> Conflict:
    result = conflict(tiny.model("llama"), rivals(), layer=1, **SETTINGS)
    # Each word is first token of an answer of at most one task of a pair; a random model says all kinds.
    for name in ("obeys_vector", "obeys_demonstrations"):
        assert 0 < float(result.data[name].mean()) < 1
    return result


def by_hand(hf: Any, tokens: torch.Tensor, mask: torch.Tensor, theta: Any, layer: int) -> Any:
    """The model's next token and hidden state, one prompt at a time, with plain hooks."""
    said, states = [], []
    for row, real in enumerate(mask):
        kept = []

        def hook(module: Any, inputs: Any, output: Any, row: int = row, kept: list = kept) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            kept.append(hidden[0, -1].clone())
            if theta is not None:
                hidden[0, -1] = theta[row]

        handle = hf.model.layers[layer].register_forward_hook(hook)
        with torch.no_grad():
            logits = hf(tokens[row][real][None]).logits
        handle.remove()
        said.append(int(logits[0, -1].argmax()))
        states.append(kept[0])
    return said, torch.stack(states)


def test_equals_plain_hooks(found: Conflict) -> None:
    hf, model = tiny.hf("llama"), tiny.model("llama")
    tasks = {task.name: task for task in rivals()}
    for i in (0, 3):
        one = found.data.isel(pair=i)
        a, b = (tasks[str(one[side].values)] for side in ("demonstrations", "vector"))
        queries = one["query"].values.tolist()
        made = [
            tv.build_prompts(
                t, model, shots=2, n_dummy=2, queries=queries, split="test", answers="any", seed=3
            )
            for t in (a, b)
        ]
        own, other = (
            torch.stack([by_hand(hf, d.tokens, d.mask, None, 1)[1] for d in p.dummies]).mean(0)
            for p in made
        )
        regular = made[0].regular
        for injection, theta in (("none", None), ("other", other), ("own", own)):
            said, _ = by_hand(hf, regular.tokens, regular.mask, theta, 1)
            here = one.sel(injection=injection)
            assert here["token"].values.tolist() == [model.tokenizer.decode([s]) for s in said]
            for side, p in zip(("demonstrations", "vector"), made, strict=True):
                right = [s in ids for s, ids in zip(said, p.answer_ids, strict=True)]
                assert here[f"obeys_{side}"].values.tolist() == right
        # The control does something else than theta.
        assert (one["token"].sel(injection="random") != one["token"].sel(injection="other")).any()


def test_nothing_injected_is_score(found: Conflict) -> None:
    model = tiny.model("llama")
    tasks = {task.name: task for task in rivals()}
    for i in range(found.data.sizes["pair"]):
        one = found.data.isel(pair=i).sel(injection="none")
        made = tv.build_prompts(
            tasks[str(one["demonstrations"].values)], model, shots=2, n_dummy=2, split="test",
            queries=one["query"].values.tolist(), answers="any", seed=3,
        )  # fmt: skip
        assert one["obeys_demonstrations"].values.tolist() == tv.score(model, made).correct.tolist()


def test_at_the_last_layer_theta_alone_speaks() -> None:
    """After the last block nothing reads the prompt any more: who speaks is theta through the unembedding."""
    model, (a, b, _) = tiny.model("llama"), rivals()
    result = conflict(model, [a, b], pairs=[("t0", "t1")], layer=-1, **SETTINGS)
    one = result.data.isel(pair=0).sel(injection="other")
    made = tv.build_prompts(
        b,
        model,
        shots=2,
        n_dummy=2,
        split="test",
        queries=one["query"].values.tolist(),
        answers="any",
        seed=3,
    )
    theta = tv.extract(model, made).at(-1)
    with torch.no_grad():
        said = model.unembed(model.ln_final(theta[:, None]))[:, 0].argmax(-1)
    assert one["token"].values.tolist() == [model.tokenizer.decode([s]) for s in said.tolist()]
    assert int(result.data["layer"][0]) == 3


def test_shared_queries_have_answers_that_differ() -> None:
    model, (a, b, _) = tiny.model("llama"), rivals()
    items = list(a.inputs)
    # In b: the first half answers like a, five more are not there at all.
    some = {x: (a.answers[x] if i < 12 else b.answers[x]) for i, x in enumerate(items) if i < 19}
    result = conflict(model, [a, replace(b, answers=some)], layer=0, **(SETTINGS | {"n": 30}))
    assert set(result.data["query"].values.ravel()) == set(items[12:19])
    table = result.rates()
    assert set(table["n"]) == {30} and set(table["n_queries"]) == {7}
    row = table[(table["demonstrations"] == "t0") & (table["injection"] == "none")].iloc[0]
    low, high = wilson(row["demonstrations_rate"] * 7, 7)
    assert (row["demonstrations_rate_low"], row["demonstrations_rate_high"]) == (low, high)


@pytest.mark.slow
def test_layer_is_chosen_on_dev_queries_that_are_not_asked() -> None:
    model, tasks = tiny.model("llama"), rivals(2)
    result = conflict(model, tasks, **SETTINGS)
    for i, name in enumerate(result.data["vector"].values.tolist()):
        task = next(t for t in tasks if t.name == name)
        made = tv.build_prompts(
            task, model, shots=2, n=6, n_dummy=2, answers="any", split="dev", seed=3
        )
        theta = tv.extract(model, made)
        curve = [
            tv.score(model, made, view="zero_shot", vector=theta, layer=layer).accuracy
            for layer in theta.layers
        ]
        assert int(result.data["layer"][i]) == int(np.argmax(curve))
        assert float(result.data["dev_accuracy"][i]) == pytest.approx(max(curve))
        assert not {*made.queries} & {*result.data["query"].values[i].tolist()}


def test_summary_means_and_finding(found: Conflict) -> None:
    s, data = found.summary(), found.data
    other = data.sel(injection="other")
    assert s["vector"] == pytest.approx(float(other["obeys_vector"].mean()))
    assert s["demonstrations_random"] == pytest.approx(
        float(data["obeys_demonstrations"].sel(injection="random").mean())
    )
    assert s["vector"] + s["demonstrations"] + s["neither"] == pytest.approx(1)
    assert s["vector_low"] <= s["vector"] <= s["vector_high"] and s["n_pairs"] == 6
    assert f"in {s['n_won']} of 6 pairs" in found.finding()
    table = found.rates()
    for side in ("vector", "demonstrations", "neither"):
        assert (table[f"{side}_rate_low"] <= table[f"{side}_rate"]).all()
        assert (table[f"{side}_rate"] <= table[f"{side}_rate_high"]).all()


def test_same_seed_same_numbers(found: Conflict) -> None:
    again = conflict(tiny.model("llama"), rivals(), layer=1, **SETTINGS)
    xr.testing.assert_identical(again.data.drop_attrs(), found.data.drop_attrs())
    other = conflict(tiny.model("llama"), rivals(), layer=1, **(SETTINGS | {"seed": 4}))
    assert other.data["query"].values.tolist() != found.data["query"].values.tolist()


def test_pairs_without_common_queries() -> None:
    model, (a, b, _) = tiny.model("llama"), rivals()
    far = Task("far", "f", {f"{x}0": ("a",) for x in a.inputs}, spaced=False)
    near = replace(
        b, name="near", answers={x: b.answers[x] for x in a.inputs[:3]} | dict(far.answers)
    )
    result = conflict(model, [a, b, far, near], layer=0, **SETTINGS)
    assert result.data["pair"].values.tolist() == ["t1 in t0", "t0 in t1"]
    skipped = {(one, other): n for one, other, n in result.provenance["skipped"]}
    assert skipped["t0", "far"] == skipped["far", "t0"] == 0 and skipped["t0", "near"] == 3
    assert len(skipped) == 10 and result.summary()["n_skipped"] == 10
    with pytest.raises(ValueError, match="'t0' and theta of 'far' have no queries in common"):
        conflict(model, [a, far], pairs=[("t0", "far")], layer=0, **SETTINGS)
    with pytest.raises(ValueError, match="'t0' and theta of 'near' have only 3 queries in common"):
        conflict(model, [a, near], pairs=[("t0", "near")], layer=0, **SETTINGS)
    few = conflict(model, [a, near], pairs=[("t0", "near")], layer=0, min_queries=3, **SETTINGS)
    assert set(few.data["query"].values.ravel()) == set(a.inputs[:3])
    with pytest.raises(ValueError, match="no two of the tasks t0, far have 5 queries in common"):
        conflict(model, [a, far], layer=0, **SETTINGS)
    # All but a few of the common queries are dev queries of theta's task.
    with pytest.raises(ValueError, match="that did not choose the layer; 20 are needed"):
        conflict(model, [a, b], pairs=[("t0", "t1")], min_queries=20, **SETTINGS)


def test_bad_input() -> None:
    model, tasks = tiny.model("llama"), rivals()
    for arguments, message in (
        ({"tasks": ["to_uper", "next_letter"]}, "unknown task 'to_uper'. Nearest: to_upper"),
        ({"tasks": "to_upper"}, "several tasks are needed"),
        ({"tasks": tasks[:1]}, "needs at least 2 tasks; 1 arrived"),
        ({"tasks": [tasks[0], tasks[0]]}, "each task once; given more than once: t0"),
        ({"tasks": tasks, "pairs": [("t0", "t8")]}, "unknown task in pairs 't8'. Nearest: t"),
        ({"tasks": tasks, "pairs": [("t0", "t0")]}, "no conflict with itself: 't0'"),
        ({"tasks": tasks, "layer": 4}, "layer 4"),
        ({"tasks": tasks, "shots": 40}, "Ask for at most"),
    ):
        with pytest.raises(ValueError, match=message):
            conflict(model, **({**SETTINGS, "layer": 0, **arguments}))


@pytest.mark.slow
def test_file_round_trip_and_figures(found: Conflict, tmp_path: Path) -> None:
    again = tv.load(found.save(tmp_path / "c.nc"))
    assert isinstance(again, Conflict)
    xr.testing.assert_identical(again.data, found.data)
    assert again.finding() == found.finding() and found.finding()[:20] in found._repr_html_()
    assert "hendel" in found.cite().lower()
    assert len(found.to_dataframe()) == 6 * 4 * 8


@pytest.mark.slow
def test_heat_maps_show_rates_intervals_and_controls(found: Conflict) -> None:
    figure, table = found.plot(), found.rates()
    shown = [trace for trace in figure.data if trace.visible]
    assert [trace.name for trace in shown] == [
        "obeys the vector, theta of the other task",
        "obeys the demonstrations, theta of the other task",
    ]
    for trace, side in zip(shown, ("vector", "demonstrations"), strict=True):
        assert np.isnan(np.diag(trace.z)).all()
        for row in table[table["injection"] == "other"].to_dict("records"):
            i, j = int(row["demonstrations"][1]), int(row["vector"][1])
            assert trace.z[i][j] == pytest.approx(row[f"{side}_rate"])
            assert trace.text[i][j] == f"{row[f'{side}_rate']:.2f}"
            for part in ("_low", "_high"):
                assert f"{row[f'{side}_rate{part}']:.2f}" in trace.customdata[i][j]
            assert f"8 prompts, {row['n_queries']} queries" in trace.customdata[i][j]
    # Every button shows the two maps of one injection.
    names = [trace.name for trace in figure.data]
    for button in figure.layout.updatemenus[0].buttons:
        visible = [n for n, on in zip(names, button.args[0]["visible"], strict=True) if on]
        assert len(visible) == 2 and all(button.label in n for n in visible)
    assert f"random vector {found.summary()['vector_random']:.2f}" in figure.layout.title.text
    other = conflict_matrix(found.drawn(), injection="random", title="mine")
    assert "mine" in other.layout.title.text
    with pytest.raises(ValueError, match="unknown injection 'nothing'. Nearest: none"):
        conflict_matrix(found.drawn(), injection="nothing")


@pytest.mark.slow
def test_controls_figure_and_a_single_pair(found: Conflict) -> None:
    figure = conflict_controls(found.drawn())
    totals = np.sum([trace.x for trace in figure.data], axis=0)
    assert totals == pytest.approx([1, 1, 1, 1])
    assert set(found.figures()) == {"Who is obeyed", "Controls"}
    one = conflict(tiny.model("llama"), rivals(2), pairs=[("t0", "t1")], layer=0, **SETTINGS)
    assert one.summary()["n_pairs"] == 1 and "vector_low" not in one.summary()
    assert one.figures() and "of 1 pairs" in one.finding()


def test_plots_escape_and_stack(found: Conflict) -> None:
    drawn = found.drawn()
    wide = xr.concat([drawn] * 4, dim="vector", data_vars="minimal")
    wide = xr.concat([wide] * 4, dim="demonstrations", data_vars="minimal")
    figure = conflict_matrix(wide)
    assert figure.layout.yaxis2.domain[1] < figure.layout.yaxis.domain[0]
    assert plots.ROLES["hypothesis"].color in str(conflict_controls(drawn))


@pytest.mark.slow
def test_smollm2_obeys_a_strong_theta(smollm2: Any) -> None:
    result = conflict(
        smollm2, ["next_letter", "to_upper"], pairs=[("next_letter", "to_upper")], n=12, n_dev=12,
        progress=False,
    )  # fmt: skip
    s = result.summary()
    assert s["vector"] >= 0.8 and s["demonstrations"] <= 0.1
    assert (
        s["vector_none"] <= 0.1 and s["demonstrations_none"] >= 0.5
    )  # without it, the demonstrations
    assert s["demonstrations_own"] >= 0.5 and s["vector_own"] <= 0.1  # the place alone does no harm
    assert s["neither_random"] >= 0.8  # damage alone obeys nobody
