"""Tasks that go both ways: the tasks themselves, theta by plain Hugging Face hooks, and controls."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tvlens import tasks
from tvlens.experiments import bijection as module
from tvlens.experiments._bijection import RUNS, Bijection
from tvlens.experiments.bijection import bijection
from tvlens.plots.bijection import bijection_bars
from tvlens.tasks import Task

SETTINGS: dict[str, Any] = {"shots": 3, "n": 8, "n_dev": 6, "progress": False}


@pytest.fixture(scope="module")
def found() -> Bijection:
    return bijection(tiny.model("llama"), ["to_upper", "antonyms"], n_dummy=4, **SETTINGS)


def test_a_task_is_joined_with_its_inverse() -> None:
    swap = tasks.both_ways(tv.load_task("to_upper"), tv.load_task("to_lower"), name="swap_case")
    assert (swap.name, swap.family, len(swap), swap.spaced) == ("swap_case", "bijection", 52, False)
    assert all(ys == (x.swapcase(),) for x, ys in swap.answers.items())
    assert tv.load_task("to_upper_both").answers == swap.answers
    joined = tv.load_task("plural_singular_both")
    assert joined.answers["mice"] == ("mouse",) and "mice" in joined.answers["mouse"]
    with pytest.raises(ValueError, match="unknown task 'to_uper_both'"):
        tv.load_task("to_uper_both")
    with pytest.raises(ValueError, match="there is a task 'to_upper_both' already"):
        tasks.register_task(Task("to_upper_both", "f", {"a": ("b",), "c": ("d",)}))


def test_inputs_that_could_be_meant_either_way_are_left_out() -> None:
    french = Task("fr", "f", {"chat": ("cat",), "eau": ("water",), "on": ("one",), "or": ("gold",)})
    english = {"cat": ("chat",), "or": ("ou",), "on": ("sur",), "water": ("eau",)}
    there, back = tasks.directions(french, Task("en", "f", english))
    assert there.inputs == ("chat", "eau") and back.inputs == ("cat", "water")
    antonyms = tv.load_task("antonyms")
    with pytest.raises(ValueError, match="leave 0 and 0 inputs"):
        tasks.directions(antonyms, antonyms)


def test_outcomes_are_complete_and_queries_go_both_ways(found: Bijection) -> None:
    data = found.data
    assert data["run"].values.tolist() == list(RUNS)
    for one in data["direction"].values:
        assert one.tolist() == ["forward", "backward"] * 4
    upper = data.sel(task="to_upper_both")
    for x, y, way in zip(
        *(upper[name].values for name in ("query", "answer", "direction")), strict=True
    ):
        assert y == x.swapcase() and x.islower() == (way == "forward")
    rates = found.accuracies().set_index(["task", "run", "direction"])["accuracy"]
    both, forward, backward = (
        rates.xs(way, level="direction") for way in ("both", "forward", "backward")
    )
    complete = both.drop(["same_way", "other_way"], level="run")
    np.testing.assert_allclose(complete, ((forward + backward) / 2).loc[complete.index])


@pytest.mark.slow
def test_with_one_dummy_query_theta_is_theta_of_its_direction() -> None:
    data = bijection(tiny.model("gpt2"), ["gerund"], n_dummy=1, **SETTINGS | {"n": 16}).data
    of = data.isel(task=0).sel
    same = ~np.isnan(of(run="same_way")["correct"].values)
    assert 0 < same.sum() < len(same)
    for name, there in (("same_way", same), ("other_way", ~same)):
        tokens, theta = (of(run=run)["token"].values[there] for run in (name, "theta"))
        assert tokens.tolist() == theta.tolist()
        assert np.isnan(of(run=name)["correct"].values[~there]).all()


def test_every_run_equals_plain_hugging_face_hooks(found: Bijection) -> None:
    model, hf = tiny.model("llama"), tiny.hf("llama")
    data = found.data.sel(task="to_upper_both")
    upper, lower = tasks.directions(tv.load_task("to_upper"))
    how = {
        "shots": 3,
        "n_dummy": 4,
        "answers": "any",
        "split": "test",
        "template": found_template(),
    }

    def logits(ids: torch.Tensor, layer: int = 0, value: torch.Tensor | None = None) -> Any:
        seen = []

        def hook(module: Any, args: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            seen.append(hidden[0, -1].clone())
            if value is not None:
                hidden[0, -1] = value
            return out

        handle = hf.model.layers[layer].register_forward_hook(hook)
        with torch.no_grad():
            last = hf(ids[None]).logits[0, -1]
        handle.remove()
        return last, seen[0]

    def own(batch: Any, i: int) -> torch.Tensor:
        return batch.tokens[i][batch.mask[i]]

    queries = data["query"].values.tolist()
    mixed = tv.build_prompts(tv.load_task("to_upper_both"), model, queries=queries, **how)
    layers = [int(data[name]) for name in ("layer", "layer_forward", "layer_backward")]
    way = [x.islower() for x in queries]
    for i in range(len(queries)):
        states = [logits(own(dummy, i), layers[0])[1] for dummy in mixed.dummies]
        ways = [dummy.text[i].removesuffix("->")[-1].islower() for dummy in mixed.dummies]
        same = [s for s, w in zip(states, ways, strict=True) if w == way[i]]
        bare = own(mixed.zero_shot, i)
        side, layer = (upper, layers[1]) if way[i] else (lower, layers[2])
        mine = [x for x in queries if x in side.answers]
        alone = tv.build_prompts(side, model, queries=mine, **how)
        at = mine.index(queries[i])
        one = torch.stack([logits(own(dummy, at), layer)[1] for dummy in alone.dummies]).mean(0)
        expected = {
            "regular": logits(own(mixed.regular, i))[0],
            "baseline": logits(bare)[0],
            "theta": logits(bare, layers[0], torch.stack(states).mean(0))[0],
            "one_way": logits(bare, layer, one)[0],
            "regular_one_way": logits(own(alone.regular, at))[0],
        }
        if same:
            expected["same_way"] = logits(bare, layers[0], torch.stack(same).mean(0))[0]
        for name, values in expected.items():
            word = model.tokenizer.decode([int(values.argmax())])
            assert word == str(data.sel(run=name)["token"].values[i]), (name, i)


def found_template() -> Any:
    from tvlens.encoding import Encoder, settle
    from tvlens.templates import get_template

    encoder = Encoder.of(tiny.model("llama"))
    return settle(tv.load_task("to_upper_both"), get_template("example"), encoder)


@pytest.mark.slow
def test_it_is_saved_drawn_and_said(found: Bijection, tmp_path: Path) -> None:
    again = tv.load(found.save(tmp_path / "b.nc"))
    assert isinstance(again, Bijection) and again.finding() == found.finding()
    summary = found.summary()
    assert summary["gap"] == pytest.approx(summary["regular"] - summary["theta"])
    assert summary["gap_low"] <= summary["gap"] <= summary["gap_high"]
    fig = found.plot(runs=("theta", "regular"))
    assert [trace.name for trace in fig.data if trace.type == "bar"] == [
        "one theta of both ways",
        "demonstrations of both ways",
    ]
    assert set(found.tables()) == {"Accuracy by task and run", "By the query's direction"}
    with pytest.raises(ValueError, match="unknown run 'thet'. Nearest: theta"):
        bijection_bars(found.drawn(), runs=("thet",))
    with pytest.raises(ValueError, match="more than once"):
        bijection(tiny.model("llama"), ["gerund", "gerund"], **SETTINGS)


@pytest.mark.slow
def test_tasks_have_controls_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def watched(model: Any, requests: Any) -> Any:
        cells = [cell for request in requests for cell in request.cells if cell]
        if len(cells) > 4:
            edits = [cell[0] for cell in cells]
            lengths = [edit.given.float().norm(dim=-1).cpu() for edit in edits]
            theta = next(i for i, cell in enumerate(cells) if len(cell) == 1)
            # The control is the only other cell in which every vector is as long as theta.
            (control,) = (
                i
                for i, length in enumerate(lengths)
                if i != theta and torch.allclose(length, lengths[theta], rtol=1e-4)
            )
            drawn.append(edits[control].given / lengths[control][:, None])
        return run(model, requests)

    run = module.run
    monkeypatch.setattr(module, "run", watched)
    bijection(tiny.model("llama"), ["to_upper", "antonyms"], n_dummy=2, **SETTINGS)
    directions = torch.cat(drawn)
    assert len(directions) == 2 * 8
    alike = directions @ directions.T - torch.eye(16)
    assert alike.abs().max() < 0.7


def test_bad_input() -> None:
    model = tiny.model("llama")
    for arguments, message in (
        ({"n": 1}, "n >= 2 is needed, one for each direction; 1 arrived"),
        ({"n_dev": 1}, "n_dev >= 2 is needed, one for each direction; 1 arrived"),
        ({"n_dummy": 0}, "n_dummy >= 1 is needed, theta is read on them; 0 arrived"),
    ):
        with pytest.raises(ValueError, match=message):
            bijection(model, ["to_upper"], **(SETTINGS | arguments))
    small = Task("small", "f", {"a": ("A",), "b": ("B",)}, spaced=False)
    refused = []
    for seed in range(12):
        how = {**SETTINGS, "shots": 1, "n_dummy": 1, "seed": seed}
        try:
            bijection(model, [small], **how)
        except ValueError as error:
            refused.append(str(error))
    assert any(
        "'small_both' has 0 usable" in text or "and 0 of the other" in text for text in refused
    )


@pytest.mark.slow
def test_smollm2_follows_the_direction_of_theta_and_no_other(smollm2: Any) -> None:
    how: dict[str, Any] = {"shots": 5, "n": 16, "n_dev": 12, "n_dummy": 4, "progress": False}
    summary = bijection(smollm2, ["to_upper"], **how).summary()
    assert summary["one_way"] > 0.6 > 0.2 > summary["wrong_way"]
    assert summary["random"] <= 0.1 and summary["theta"] < summary["one_way"] - 0.2
