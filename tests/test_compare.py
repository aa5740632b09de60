"""The comparison: what each method writes is what it says, and its tables are those of its outcomes."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tvlens.experiments._comparison import Comparison
from tvlens.experiments.compare import compare
from tvlens.linear_maps import fit_map
from tvlens.methods import METHODS, Work, fit
from tvlens.methods.maps import _along_principal
from tvlens.patching.pairs import as_batch
from tvlens.templates import Role

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "shots": 2,
    "n_dev": 8,
    "n_test": 6,
    "progress": False,
    "elsewhere": ["qa"],
}
HOW: dict[str, Any] = {
    "shots": 2, "n": 8, "n_dummy": 2, "template": "example", "answers": "auto", "split": "dev",
    "demonstrations": "split", "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(tiny.model("llama"), ["to_upper", "next_letter"], seeds=(0, 1), **SMALL)


def test_tables_are_those_of_the_outcomes(found: Comparison) -> None:
    assert found.methods == tuple(METHODS)
    correct = found.data["correct"].astype(float)
    table, tasks = found.means(), found.by_task()
    assert table.index.tolist() == ["baseline", "regular", *METHODS]
    for name in table.index:
        own = correct.sel(run=name)
        assert table.loc[name, "accuracy"] == pytest.approx(float(own.mean()))
        assert tasks.loc["to_upper", name] == pytest.approx(float(own.sel(task="to_upper").mean()))
        each = own.mean(["task", "prompt"]).values
        assert table.loc[name, "lowest"] == pytest.approx(each.min())
    floors = found.floors()
    for name in table.index:
        as_good = (tasks[name] >= tasks["regular"]) & (tasks[name] > floors.max(axis=1))
        assert table.loc[name, "wins"] == as_good.sum()
    assert table.loc["regular", ["gain", "gain_low", "gain_high"]].tolist() == [0, 0, 0]
    for name in METHODS:
        control = found.data["control"].sel(way=name)
        assert table.loc[name, "control"] == pytest.approx(float(control.mean()))
    # The prediction with demonstrations is what the others are compared with.
    assert float(found.data["kl"].sel(run="regular").max()) == pytest.approx(0, abs=1e-5)
    assert float(found.data["kl"].sel(run="baseline").min()) > 0
    assert (found.data["forwards"] > 0).all() and (found.data["seconds"] > 0).all()
    away = found.elsewhere()
    assert away.index.tolist() == ["none", "regular", *METHODS]
    assert (away.loc[list(METHODS), "unrelated_kl"] > 0).all()
    assert away.columns.tolist() == ["few_shot", "qa", "unrelated_kl"]
    assert away.loc["regular", "few_shot"] == pytest.approx(table.loc["regular", "accuracy"])


def test_baseline_and_regular_are_those_of_score(found: Comparison) -> None:
    model = tiny.model("llama")
    test = tv.build_prompts("to_upper", model, shots=2, n=6, split="test", seed=1)
    at = found.data.sel(task="to_upper", seed=1)
    assert at["query"].values.tolist() == list(test.queries)
    for run_name, view in (("baseline", "zero_shot"), ("regular", "regular")):
        scores = tv.score(model, test, view=view)
        np.testing.assert_array_equal(at["correct"].sel(run=run_name), scores.correct.numpy())
        np.testing.assert_allclose(
            at["answer_log_prob"].sel(run=run_name), scores.answer_log_prob.numpy(), atol=1e-4
        )


@pytest.mark.parametrize(
    "kind",
    [tiny.KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in tiny.KINDS[1:])],
)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_see_no_test_query(name: str, kind: str) -> None:
    model = tiny.model("gemma3", kind)
    task = tv.load_task("to_upper")
    dev = tv.build_prompts(task, model, **HOW)
    test = tv.build_prompts(task, model, shots=2, n=13, split="test", seed=0)
    shown = " ".join(text for view in (dev.regular, *dev.dummies) for text in view.text)
    assert not any(f"example:{query}-" in shown for query in test.queries)
    fitted = fit(name, Work(model, task, dev, HOW))
    edits = fitted.write(test, test.zero_shot)
    assert edits and max(edit.layer for edit in edits) == fitted.layer
    assert all(len(edit.given) in (1, 13) for edit in edits)
    assert fitted.forwards > 0 and fitted.seconds > 0
    again = fit(name, Work(model, task, dev, HOW)).write(test, test.zero_shot)
    for one, other in zip(edits, again, strict=True):
        torch.testing.assert_close(one.given, other.given)


def test_the_layer_is_the_best_on_dev() -> None:
    model = tiny.model("qwen2")
    task = tv.load_task("to_lower")
    dev = tv.build_prompts(task, model, **HOW)
    work = Work(model, task, dev, HOW)
    fitted = fit("mean", work)
    theta = tv.extract(model, dev).mean()
    accuracies = [
        tv.score(model, dev, view="zero_shot", vector=theta, layer=i).accuracy
        for i in range(work.n_layers)
    ]
    assert fitted.layer == int(np.argmax(accuracies))
    (edit,) = fitted.write(dev, dev.zero_shot)
    torch.testing.assert_close(edit.given, theta.at(fitted.layer))


def test_a_ridge_map_is_least_squares_where_there_are_rows_enough() -> None:
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(60, 4)), rng.normal(size=(4, 4))
    y = x @ true + rng.normal(size=4) + 0.01 * rng.normal(size=(60, 4))
    found = fit_map(torch.tensor(x), torch.tensor(y), strength=1e-10)
    design = np.c_[x, np.ones(60)]
    expected = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    np.testing.assert_allclose(found(torch.tensor(x)).numpy(), expected, atol=1e-6)
    # Pulled hard, all that is left is the mean difference.
    shifted = fit_map(torch.tensor(x), torch.tensor(y), strength=1e12)
    np.testing.assert_allclose(
        shifted(torch.tensor(x)).numpy(), x + (y - x).mean(axis=0), atol=1e-6
    )
    for arguments, message in (((x[:1], y[:1], 1.0), "at least 2"), ((x, y, 0.0), "above 0")):
        a, b, strength = arguments
        with pytest.raises(ValueError, match=message):
            fit_map(torch.tensor(a), torch.tensor(b), strength=strength)


def test_it_is_saved_drawn_and_said(found: Comparison, tmp_path: Any) -> None:
    # Names of several lengths survive files that are read, joined and written again.
    alone = [
        compare(tiny.model("llama"), [task], methods=["mean"], **SMALL).save(
            tmp_path / f"{task}.nc"
        )
        for task in ("antonyms", "next_letter")
    ]
    joined = Comparison.join([tv.load(path) for path in alone])  # pyright: ignore
    kept: Any = tv.load(joined.save(tmp_path / "joined.nc"))
    assert kept.by_task().index.tolist() == ["antonyms", "next_letter"]
    again = tv.load(found.save(tmp_path / "found.nc"))
    assert again.finding() == found.finding() and "without demonstrations" in found.finding()
    figure = found.plot()
    (cells,) = figure.data
    assert cells.z.shape == (3, 2 + len(METHODS))
    np.testing.assert_allclose(cells.z[-1], found.means()["accuracy"])
    assert "seed 1" in cells.customdata[0][0]
    assert found.summary()["learned"] == pytest.approx(found.means().loc["learned", "accuracy"])


def test_parts_are_joined_or_refused(found: Comparison) -> None:
    with pytest.raises(ValueError, match="nothing to join"):
        Comparison.join([])
    other = compare(tiny.model("gpt2"), ["to_upper"], methods=["mean"], **SMALL)
    with pytest.raises(ValueError, match="comparisons of different model"):
        Comparison.join([found, other])


def test_a_folder_keeps_what_is_done(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = tiny.model("llama"), {**SMALL, "methods": ["mean"], "out": tmp_path}
    first = compare(model, ["to_upper"], seeds=(0, 1), **settings)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"comparison-to_upper-0.nc", "comparison-to_upper-1.nc"}

    def never(*arguments: object) -> None:
        raise AssertionError("what is in the folder was run again")

    monkeypatch.setattr("tvlens.experiments.compare.fit", never)
    again = compare(model, ["to_upper"], seeds=(0, 1), **settings)
    assert again.means().equals(first.means())
    with pytest.raises(ValueError, match="n_test 6, asked for 5. Choose another folder"):
        compare(model, ["to_upper"], **{**settings, "n_test": 5})
    changed = replace(tv.load_task("to_upper"), answers={c: (c * 2,) for c in "abcdefghijklmnop"})
    with pytest.raises(ValueError, match="fingerprints"):
        compare(model, [changed], **settings)


def test_floors_are_those_of_the_layer_sweep(found: Comparison) -> None:
    model = tiny.model("llama")
    at = found.data.sel(task="next_letter", seed=0)
    how = {**HOW, "n": 6, "split": "test", "demonstrations": "all"}
    test = tv.build_prompts("next_letter", model, **how)
    constant = tv.build_prompts("next_letter", model, **HOW).facts["constant"]
    expected = [constant in ids for ids in test.answer_ids]
    assert at["floor"].sel(floor_kind="majority").values.tolist() == expected
    # After the last layer nothing of the query is left: one prediction for all.
    dev = tv.build_prompts("next_letter", model, **HOW)
    theta = tv.extract(model, dev).mean()
    blind = tv.score(model, test, view="zero_shot", vector=theta, layer=-1)
    assert len(set(blind.predicted.tolist())) == 1
    np.testing.assert_array_equal(at["floor"].sel(floor_kind="query_blind"), blind.correct.numpy())
    shares = [
        np.mean([token in ids for ids in test.answer_ids])
        for ids in test.answer_ids
        for token in ids
    ]
    assert float(at["constant"]) == pytest.approx(max(shares))


def test_what_has_read_no_query_wins_nothing(found: Comparison) -> None:
    data = found.data.copy(deep=True)
    data["correct"] = data["correct"] & False
    data["correct"].loc[{"run": "mean", "prompt": 0}] = True
    data["constant"] = data["constant"] * 0 + 1 / data.sizes["prompt"]
    data["floor"] = data["floor"] & False
    assert Comparison(data).means().loc["mean", "wins"] == 0
    data["correct"].loc[{"run": "mean", "prompt": 1}] = True
    assert Comparison(data).means().loc["mean", "wins"] == 2


def test_gains_are_paired(found: Comparison) -> None:
    gains, tasks = found.gains(), found.by_task()
    for name in METHODS:
        np.testing.assert_allclose(gains[name], tasks[name] - tasks["regular"], atol=1e-12)
        assert (gains[f"{name}_low"] <= gains[name]).all()


def test_a_folder_of_another_model_of_the_same_name_is_refused(tmp_path: Any) -> None:
    settings = {**SMALL, "methods": ["mean"], "out": tmp_path}
    one, other = (
        tv.load_model(tiny.hf("gpt2", seed), tokenizer=tiny.tokenizer("gpt2"), device="cpu")
        for seed in (0, 1)
    )
    compare(one, ["to_upper"], **settings)
    with pytest.raises(ValueError, match="made with other weights than 'gpt2' has"):
        compare(other, ["to_upper"], **settings)


def test_a_small_task_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tv.load_task("to_upper")
    few = replace(task, name="few", answers={c: task.answers[c] for c in "abcd"})
    monkeypatch.setattr("tvlens.experiments.compare.fit", lambda *arguments: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="task 'few' has 4 usable items"):
        compare(tiny.model("llama"), ["to_upper", few], **SMALL)


def test_one_prompt_has_no_interval_and_still_a_summary() -> None:
    found = compare(tiny.model("llama"), ["to_upper"], methods=["mean"], **{**SMALL, "n_test": 1})
    json.dumps(found.summary(), allow_nan=False)


def test_vectors_at_several_tokens_follow_the_template() -> None:
    model, task = tiny.model("llama"), tv.load_task("to_upper")
    how = {**HOW, "template": "qa"}
    dev = tv.build_prompts(task, model, **how)
    work = Work(model, task, dev, how)
    fitted = fit("multi_position", work)
    places = [edit.position for edit in fitted.write(dev, dev.zero_shot)]
    # "Q: x\nA:" ends in tokens after the query; the query's own last token is the farthest.
    roles = dev.zero_shot.roles[0].tolist()
    farthest = max(i for i, role in enumerate(roles) if role == int(Role.QUERY)) - len(roles)
    assert places[0] == -1 and all(farthest <= place < -1 for place in places[1:] if place)
    other = tv.build_prompts(task, model, **{**how, "template": "{x}>{y}\n"})
    assert all(edit.position in (-1, -2) for edit in fitted.write(other, other.zero_shot))
    # Each token was kept because it does not do harm on dev.
    cells = [fitted.write(dev, dev.zero_shot)[:n] for n in range(1, len(places) + 1)]
    shares = work.right(cells).float().mean(dim=1).tolist()
    assert shares == sorted(shares)


def test_all_principal_directions_are_the_whole_of_theta() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 12, 5, generator=rng)[:2].double()
    whole = _along_principal(x, y, 5)(x)
    torch.testing.assert_close(whole, y.mean(dim=0).expand(12, 5))
    one = _along_principal(x, y, 1)(x) - x
    assert int(torch.linalg.matrix_rank(one)) == 1


def test_shuffled_answers_are_those_of_other_queries() -> None:
    model, task = tiny.model("llama"), tv.load_task("to_upper")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tvlens.methods.trained._learned",
            lambda work, dev: seen.append(dev) or METHODS["mean"](work),
        )
        work = Work(model, task, tv.build_prompts(task, model, **HOW), HOW)
        METHODS["learned_shuffled"](work)
    (moved,) = seen
    assert sorted(moved.answer_ids) == sorted(work.dev.answer_ids)
    assert all(a != b for a, b in zip(moved.answer_ids, work.dev.answer_ids, strict=True))


def test_vectors_for_each_prompt_are_averaged_in_text_that_asks_nothing() -> None:
    model, task = tiny.model("llama"), tv.load_task("to_upper")
    dev = tv.build_prompts(task, model, **HOW)
    fitted = fit("hendel", Work(model, task, dev, HOW))
    (own,) = fitted.write(dev, dev.zero_shot)
    (mean,) = fitted.write(dev, as_batch(model, ["no question at all"] * len(dev)))
    assert len(own.given) == len(dev) and len(mean.given) == 1
    torch.testing.assert_close(mean.given[0], own.given.mean(dim=0))


def test_errors() -> None:
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="Nearest: 'mean'|mean"):
        compare(model, ["to_upper"], methods=["meen"], **SMALL)
    with pytest.raises(ValueError, match="at least one seed"):
        compare(model, ["to_upper"], seeds=(), **SMALL)
    with pytest.raises(ValueError, match="each once"):
        compare(model, ["to_upper"], seeds=(0, 0), **SMALL)
    with pytest.raises(ValueError, match="unknown template 'quiz'"):
        compare(model, ["to_upper"], **{**SMALL, "elsewhere": ["quiz"]})
    with pytest.raises(ValueError, match="at least one task"):
        compare(model, [], **SMALL)


@pytest.mark.slow
def test_random_directions_do_not_do_the_task(smollm2: Any) -> None:
    settings = {"methods": ["mean"], "n_dev": 26, "n_test": 26, "progress": False, "elsewhere": []}
    table = compare(smollm2, ["to_upper"], **settings).means()
    assert table.loc["mean", "accuracy"] > 0.8 > 0.2 > table.loc["mean", "control"]
