"""The layer sweep on tiny models: the same outcomes as doing every step by hand."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import tvlens as tv
from tests import tiny
from tvlens import experiments
from tvlens.experiments.layer_sweep import LayerSweep, layer_sweep
from tvlens.tasks import Task

SETTINGS = {"shots": 3, "n_dev": 6, "n_test": 8, "seed": 5, "progress": False}


def easy_task() -> Task:
    """A task in which half of all words are right for each query, another half for each.

    A random model gets real tasks wrong throughout, and then every comparison compares zeros.
    """
    tokenizer = tiny.tokenizer("llama")
    decoded = dict.fromkeys(tokenizer.decode([i]).strip() for i in range(len(tokenizer)))
    words = [w for w in decoded if w]
    rng = random.Random(0)
    answers = {
        f"{a}{b}": tuple(rng.sample(words, len(words) // 2)) for a in "pqrstuvw" for b in "xyz"
    }
    return Task(name="easy", family="f", answers=answers, spaced=False)


@pytest.fixture(scope="module")
def task() -> Task:
    return easy_task()


@pytest.fixture(scope="module")
def sweep(task: Task) -> LayerSweep:
    found = layer_sweep(tiny.model("llama"), task, answers="any", **SETTINGS)
    shares = [float(found.data[name].mean()) for name in ("hypothesis", "control", "baseline")]
    assert all(0 < share < 1 for share in shares), shares
    return found


def test_equals_extract_and_score_by_hand(sweep: LayerSweep, task: Task) -> None:
    model = tiny.model("llama")
    thetas = []
    for i, (split, n) in enumerate((("dev", 6), ("test", 8))):
        made = tv.build_prompts(task, model, shots=3, n=n, split=split, seed=5, answers="any")
        here = sweep.data.isel(prompt=np.flatnonzero(sweep.data["split"] == split))
        theta = tv.extract(model, made)
        thetas.append(theta.values)
        control = theta.random_like(seed=2 * 5 + i)
        assert tuple(here["query"].values) == made.queries
        by_hand = {
            "regular": tv.score(model, made),
            "baseline": tv.score(model, made, view="zero_shot"),
        }
        for name, scores in by_hand.items():
            assert here[name].values.tolist() == scores.correct.tolist()
            np.testing.assert_allclose(here[f"{name}_log_prob"], scores.answer_log_prob, atol=1e-4)
        for layer in range(model.cfg.n_layers):
            scores = tv.score(model, made, view="zero_shot", vector=theta, layer=layer)
            found = here.sel(layer=layer)
            assert found["hypothesis"].values.tolist() == scores.correct.tolist()
            np.testing.assert_allclose(
                found["hypothesis_log_prob"], scores.answer_log_prob, atol=1e-4
            )
            scores = tv.score(model, made, view="zero_shot", vector=control, layer=layer)
            assert found["control"].values.tolist() == scores.correct.tolist()
            np.testing.assert_allclose(found["control_log_prob"], scores.answer_log_prob, atol=1e-4)
    mean = torch.cat(thetas).mean(dim=0)
    torch.testing.assert_close(sweep.vector.values[0], mean, atol=1e-5, rtol=1e-4)


def test_vector_and_its_words(sweep: LayerSweep) -> None:
    model = tiny.model("llama")
    vector = sweep.vector
    vector.check(model)
    with torch.no_grad():
        logits = model.unembed(model.ln_final(vector.values))[0]
    for layer in range(4):
        probability, token = logits[layer].softmax(dim=-1).max(dim=-1)
        assert sweep.data["top_token"].values[layer, 0] == model.tokenizer.decode([int(token)])
        assert sweep.data["top_probability"].values[layer, 0] == pytest.approx(
            float(probability), abs=1e-5
        )


def test_summary_floors_and_choice_of_layer(sweep: LayerSweep) -> None:
    data, found = sweep.data, sweep.summary()
    test = data.isel(prompt=np.flatnonzero(data["split"] == "test"))
    dev = data.isel(prompt=np.flatnonzero(data["split"] == "dev"))
    assert found["layer"] == int(dev["hypothesis"].mean("prompt").argmax("layer"))
    assert found["query_blind"] == pytest.approx(float(test["hypothesis"].isel(layer=-1).mean()))
    assert found["regular"] == pytest.approx(float(test["regular"].mean()))
    at_best = test.sel(layer=found["layer"])
    assert found["hypothesis"] == pytest.approx(float(at_best["hypothesis"].mean()))
    assert found["control"] == pytest.approx(float(at_best["control"].mean()))
    for name in ("baseline", "hypothesis", "regular", "control"):
        assert 0 <= found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] <= 1
    assert found["n_test"] == 8
    made = sweep.provenance
    assert (made["shots"], made["seed"], made["model_facts"]["processing"]) == (3, 5, "none")
    assert str(found["layer"]) in sweep.finding()


def test_majority_is_the_best_answer_without_looking() -> None:
    task = Task(
        name="skewed",
        family="f",
        answers={f"{a}{b}": ("no",) if a != "a" else ("yes",) for a in "abcd" for b in "efgh"},
        spaced=False,
    )
    data = layer_sweep(tiny.model("gpt2"), task, shots=2, n_dev=8, n_test=8, progress=False).data
    assert data["majority"].values.tolist() == (data["answer"] == "no").values.tolist()


def test_same_seed_same_numbers_other_seed_other_prompts(sweep: LayerSweep, task: Task) -> None:
    again = layer_sweep(tiny.model("llama"), task, answers="any", **SETTINGS)
    xr.testing.assert_identical(again.data.drop_attrs(), sweep.data.drop_attrs())
    other = layer_sweep(tiny.model("llama"), task, answers="any", **(SETTINGS | {"seed": 6}))
    assert other.data["query"].values.tolist() != sweep.data["query"].values.tolist()


def test_file_round_trip_and_figures(sweep: LayerSweep, tmp_path: Path) -> None:
    again = tv.load(sweep.save(tmp_path / "s.nc"))
    assert isinstance(again, LayerSweep)
    xr.testing.assert_identical(again.data, sweep.data)
    assert set(sweep.figures()) == {"Accuracy by layer", "Vocabulary projection of theta"}
    assert LayerSweep.overview([sweep, again])
    table = sweep.to_dataframe()
    assert len(table) == 14 * 4 and {"query", "layer", "hypothesis", "control"} <= set(
        table.columns
    )
    assert "hendel" in sweep.cite().lower()
    assert sweep.finding()[:20] in sweep._repr_html_()


def test_registry() -> None:
    assert "layer_sweep" in experiments.names()
    assert experiments.get("layer_sweep") is layer_sweep
    with pytest.raises(ValueError, match="unknown experiment 'layersweep'. Nearest: layer_sweep"):
        experiments.get("layersweep")
    with pytest.raises(ValueError, match="experiment 'layer_sweep' exists already"):
        experiments.experiment("layer_sweep")(lambda model, task: None)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown task 'antonym'. Nearest: antonyms"):
        layer_sweep(tiny.model("llama"), "antonym", progress=False)
