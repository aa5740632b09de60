"""First token against whole answer: by hand, with known outcomes, and a control that gets nothing right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvlens as tv
from tests import tiny
from tests.test_answers import LAYER, prompts
from tvlens.answers import score_answers
from tvlens.experiments import get
from tvlens.experiments._answers import RUNS, WholeAnswers
from tvlens.experiments.answers import _one, whole_answers
from tvlens.intervals import wilson
from tvlens.plots.answers import answer_bars

pytestmark = pytest.mark.slow

HOW: dict[str, Any] = {"n_test": 6, "shots": 2, "seed": 2, "progress": False}


@pytest.fixture(scope="module")
def found() -> WholeAnswers:
    return whole_answers(tiny.model("llama"), ["country_capital", "en_fr"], layer=-3, **HOW)


@pytest.fixture
def rigged(found: WholeAnswers) -> WholeAnswers:
    """Outcomes that are known: two queries asked thrice each, those of one have several tokens."""
    data = found.data.copy(deep=True)
    right = {
        "regular": ([1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]),
        "theta": ([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]),
        "random": ([0] * 6, [0] * 6),
        "baseline": ([0, 1, 0, 0, 0, 0], [0] * 6),
    }
    for run, (first, exact) in right.items():
        data["first"].loc[{"run": run}] = np.array(first, bool)
        data["exact"].loc[{"run": run}] = np.array(exact, bool)
        data["begins"].loc[{"run": run}] = np.array([*exact[:4], 1, 1], bool)
    data["n_tokens"].loc[{"task": "en_fr"}] = np.array([1, 1, 1, 2, 2, 2])
    data["n_tokens"].loc[{"task": "country_capital"}] = 1
    data["query"] = (("task", "prompt"), np.array([["a"] * 3 + ["b"] * 3] * 2, object))
    return WholeAnswers(data)


def test_rates_are_those_of_score_answers(found: WholeAnswers) -> None:
    model = tiny.model("llama")
    table = found.rates().set_index(["task", "run"])
    for task in ("country_capital", "en_fr"):
        made = prompts(model, task, split="test", seed=2)
        theta = tv.extract(model, made, layers=[1])
        bare: dict[str, Any] = {"view": "zero_shot", "layer": 1}
        by_hand = {
            "regular": score_answers(model, made),
            "theta": score_answers(model, made, vector=theta, **bare),
            "random": score_answers(model, made, vector=theta.random_like(seed=2), **bare),
            "baseline": score_answers(model, made, view="zero_shot"),
        }
        assert len({one.text for one in by_hand.values()}) == 4
        for run, scores in by_hand.items():
            own, row = found.data.sel(task=task, run=run), table.loc[(task, run)]
            for name in ("text", "likeliest"):
                assert tuple(own[name].values) == getattr(scores, name)
            for name in ("first", "begins", "exact", "stopped", "n_tokens", "log_prob"):
                np.testing.assert_allclose(own[name].values, getattr(scores, name), atol=1e-4)
            assert row["layer"] == 1 and row["n_queries"] == len(set(made.queries))
            assert (
                row["exact"] == scores.accuracy and row["stopped"] == scores.stopped.float().mean()
            )
            assert (row["exact_low"], row["exact_high"]) == pytest.approx(scores.interval())
            assert row["several"] == pytest.approx(float((scores.n_tokens > 1).float().mean()))
            assert row["log_prob"] == pytest.approx(float(scores.log_prob.mean()), abs=1e-4)
            token = float(scores.mean_log_prob.mean())
            assert row["log_prob_token"] == pytest.approx(token, abs=1e-4)


def test_what_theta_begins_with_is_right_for_theta_and_for_no_other_run() -> None:
    model = tiny.model("gpt2")
    made = prompts(model, "en_fr", n=12)
    theta = tv.extract(model, made, layers=[LAYER])
    told = tv.score(model, made, view="zero_shot", vector=theta, layer=LAYER).predicted
    made = replace(made, answer_ids=tuple((token,) for token in told.tolist()))
    first = _one(model, made, LAYER, 0)["first"].isel(task=0).mean("prompt")
    assert float(first.sel(run="theta")) == 1
    assert float(first.sel(run=["random", "baseline", "regular"]).max()) < 0.5


def test_rates_and_means_of_known_outcomes(rigged: WholeAnswers) -> None:
    table = rigged.rates().set_index(["task", "run"])
    one, other = table.loc[("en_fr", "theta")], table.loc[("country_capital", "theta")]
    assert one["n_queries"] == 2 and one["first"] == pytest.approx(4 / 6)
    low, high = wilson(2 * 4 / 6, 2)
    assert (one["first_low"], one["first_high"]) == pytest.approx((low, high))
    assert one["several"] == 0.5 and one["exact_several"] == 0
    assert one["first_several"] == pytest.approx(1 / 3)
    # All of these ask one query, which counts once.
    assert (one["exact_several_low"], one["exact_several_high"]) == pytest.approx(wilson(0, 1))
    assert other["several"] == 0 and np.isnan(other["exact_several"])
    means = rigged.means().set_index("run")
    assert means.loc["theta", ["first", "exact", "lost"]].tolist() == pytest.approx(
        [4 / 6, 0.5, 1 / 6]
    )
    gap = means.loc["regular - theta"]
    assert gap[["first", "exact", "lost"]].tolist() == pytest.approx([1 / 6, 1 / 6, 0], abs=1e-12)
    # Queries are drawn again: two of a, two of b, or one of each.
    assert (gap["first_low"], gap["first_high"]) == pytest.approx((0, 1 / 3))
    assert (means.loc["random", ["first", "first_low", "first_high"]] == 0).all()


def test_it_is_saved_said_and_drawn(
    rigged: WholeAnswers, found: WholeAnswers, tmp_path: Path
) -> None:
    assert get("whole_answers") is whole_answers
    again = tv.load(found.save(tmp_path / "w.nc"))
    assert isinstance(again, WholeAnswers) and again.data.identical(found.data)
    for result in (found, rigged):
        summary = json.loads(json.dumps(result.summary(), allow_nan=False))
        assert summary["theta_lost"] == pytest.approx(
            summary["theta_first"] - summary["theta_exact"]
        )
        assert summary["gap_exact"] == pytest.approx(
            summary["regular_exact"] - summary["theta_exact"]
        )
    assert "theta 0.50 (0.67), a random vector 0.00 (0.00)" in rigged.finding()
    assert "begins with the whole answer in 0.83;" in rigged.finding()
    assert all(table.index.name and len(table) for table in rigged.tables().values())
    several = rigged.tables()["Answers of several tokens"]
    assert len(several) == 4 and not several.isna().any(axis=None)
    bars = [trace for trace in rigged.plot().data if trace.type == "bar"]
    assert [trace.legendgroup for trace in bars] == [run for run in RUNS for _ in (0, 1)]
    traces = answer_bars(rigged.drawn(), runs=("theta",)).data[:3]
    drawn = dict(zip(("first", "exact", "begins"), traces, strict=True))
    assert drawn["begins"].y.tolist() == pytest.approx([5 / 6] * 2)
    assert drawn["first"].y.tolist() == pytest.approx([4 / 6] * 2)
    assert drawn["exact"].y.tolist() == [0.5, 0.5]
    assert "no answers of several tokens" in drawn["exact"].customdata[0]
    assert "(0.50 of prompts):<br>  first token 0.33" in drawn["exact"].customdata[1]
    with pytest.raises(ValueError, match="unknown run 'thet'. Nearest: theta"):
        rigged.plot(runs=("thet",))


def test_layers_are_chosen_for_each_task_and_checked() -> None:
    model = tiny.model("llama")
    chosen = whole_answers(model, ["en_fr"], n_dev=4, **HOW)
    assert chosen.provenance["n_dev"] == 4 and 0 <= int(chosen.data["layer"][0]) < 4
    for tasks, layer, message in (
        (["en_fr"], 9, "layer"),
        ([], 1, "at least one task"),
        (["en_fr", "en_fr"], 1, "more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            whole_answers(model, tasks, layer=layer, **HOW)


@pytest.mark.slow
def test_in_smollm2_theta_begins_answers_that_it_does_not_end(smollm2: Any) -> None:
    how = HOW | {"n_test": 24, "shots": 5, "seed": 0}
    summary = whole_answers(smollm2, ["gerund", "to_upper"], layer=20, **how).summary()
    assert summary["regular_exact"] > 0.7 and summary["theta_first"] > 0.6
    assert summary["theta_lost_low"] > 0.2 > summary["regular_lost_high"]
    assert summary["theta_begins"] > summary["theta_exact"] + 0.2
    assert summary["random_first"] <= 0.1 and summary["random_begins"] <= 0.1
