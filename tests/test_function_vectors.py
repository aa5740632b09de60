"""Function vectors on tiny models: the same as every step done by hand, and controls that fail."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tests.test_layer_sweep import easy_task
from tvlens.experiments.function_vectors import function_vectors
from tvlens.function_vectors import (
    FunctionVectors,
    HeadEffects,
    estimated_effects,
    function_vector,
    head_effects,
    head_outputs,
    head_parts,
    indirect_effects,
    universal_heads,
)
from tvlens.function_vectors.vectors import random_heads
from tvlens.prompts import Prompts, build_prompts, usable_items
from tvlens.tasks import Task

ASKED: dict[str, Any] = {"shots": 3, "n": 5, "n_dummy": 0, "answers": "any", "seed": 2}
SMALL: dict[str, Any] = {
    "shots": 3, "n_means": 6, "n_trials": 5, "n_dev": 6, "n_test": 8, "n_random": 3, "n_heads": 3,
    "answers": "any", "seed": 5, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Task:
    return easy_task()


@pytest.fixture(scope="module")
def found(task: Task) -> FunctionVectors:
    return function_vectors(tiny.model("llama"), task, **SMALL)


def hf_block(model: Any, name: str, layer: int) -> Any:
    """The Hugging Face module whose input is all heads' outputs."""
    if name == "gpt2":
        return model.transformer.h[layer].attn.c_proj
    if name == "pythia":
        return model.gpt_neox.layers[layer].attention.dense
    return model.model.layers[layer].self_attn.o_proj


def rows_of(prompts: Prompts) -> list[torch.Tensor]:
    """Every prompt alone, without padding."""
    batch = prompts.regular
    return [tokens[mask][None] for tokens, mask in zip(batch.tokens, batch.mask, strict=True)]


# Prompts with shuffled labels


def test_shuffled_labels_change_outputs_and_nothing_else(task: Task) -> None:
    model = tiny.model("llama")
    made: dict[str, Any] = {"shots": 6, "n": 8, "n_dummy": 1, "seed": 4}
    own, moved = (
        build_prompts("to_upper", model, labels=name, **made) for name in ("own", "shuffled")
    )
    assert own.queries == moved.queries and own.zero_shot.text == moved.zero_shot.text
    assert own.facts["right_labels"] == 1.0 and moved.facts["right_labels"] == 0.0
    for before, after in zip(own.text, moved.text, strict=True):
        pairs = [[line.split("->") for line in t.splitlines()[:-1]] for t in (before, after)]
        assert [x for x, _ in pairs[0]] == [x for x, _ in pairs[1]]
        assert sorted(y for _, y in pairs[0]) == sorted(y for _, y in pairs[1])
        assert all(y.strip().lower() != x.split(":")[1].strip() for x, y in pairs[1])
        assert before.splitlines()[-1] == after.splitlines()[-1]
    again = build_prompts("to_upper", model, labels="shuffled", **made)
    assert again.text == moved.text


def test_as_few_labels_as_possible_stay_right() -> None:
    model = tiny.model("llama")
    names = [f"{a}{b}" for a in "abcd" for b in "efgh"]
    most = Task(
        "most", "f", {x: ("no",) if i % 4 else ("yes",) for i, x in enumerate(names)}, spaced=False
    )
    made = build_prompts(most, model, shots=8, n=12, n_dummy=0, labels="shuffled", answers="any")
    right = 0
    for text in made.text:
        pairs = [line.removeprefix("example:").split("->") for line in text.splitlines()[:-1]]
        own = [most.answers[x][0] for x, _ in pairs]
        least = max(2 * max(own.count("no"), own.count("yes")) - len(own), 0)
        assert sum(most.answers[x][0] == y for x, y in pairs) == least
        right += least
    assert made.facts["right_labels"] == pytest.approx(right / (8 * 12))
    one = Task("one", "f", dict.fromkeys(names, ("yes",)), spaced=False)
    assert build_prompts(one, model, shots=4, n=4, labels="shuffled").facts["right_labels"] == 1.0


def test_demonstrations_of_the_split_and_queries_by_name(task: Task) -> None:
    model = tiny.model("llama")
    made: dict[str, Any] = {"shots": 3, "n": 12, "n_dummy": 1, "answers": "any"}
    dev, test = (
        build_prompts(task, model, split=split, demonstrations="split", **made)
        for split in ("dev", "test")
    )
    shown = [
        {
            line.removeprefix("example:").split("->")[0]
            for text in made.text
            for line in text.splitlines()
        }
        for made in (dev, test)
    ]
    assert not shown[0] & shown[1] and set(test.queries) <= shown[1]
    usable = usable_items(task, model, template="qa", answers="any")
    asked: dict[str, Any] = {"template": "qa", "shots": 0, "n_dummy": 0, "answers": "any"}
    same = build_prompts(task, model, queries=usable[:3] * 2, **asked)
    assert same.queries == usable[:3] * 2 and same.text[0].startswith("Q: ")
    blank = next(x for x in task.inputs if x not in usable)
    with pytest.raises(ValueError, match=f"unknown query '{blank}'"):
        build_prompts(task, model, queries=[blank], **asked)
    with pytest.raises(ValueError, match="unknown query 'zz'"):
        build_prompts(task, model, queries=["zz"], answers="any")
    with pytest.raises(ValueError, match="none arrived"):
        build_prompts(task, model, queries=[], answers="any")
    with pytest.raises(ValueError, match="12 of them in this split.*at most 11 shots"):
        build_prompts(task, model, shots=12, n_dummy=0, demonstrations="split", answers="any")
    with pytest.raises(ValueError, match="at least 2 shots"):
        build_prompts(task, model, shots=1, labels="shuffled", answers="any")
    for name in ("labels", "demonstrations"):
        with pytest.raises(ValueError, match="nonsense"):
            build_prompts(task, model, answers="any", **{name: "nonsense"})


# Effects


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_effects_equal_hugging_face_hooks(name: str, kind: str, task: Task) -> None:
    """Means, effects and gradients against plain hooks on Hugging Face's model, prompt by prompt."""
    model, plain = tiny.model(name, kind), tiny.hf(name)
    proper = build_prompts(task, model, **ASKED)
    shuffled = build_prompts(task, model, labels="shuffled", **ASKED)
    outputs = head_outputs(model, proper)
    n_layers, n_heads, width = outputs.shape

    def run(ids: torch.Tensor, answers: tuple[int, ...], change: Any = None, at: int = 0) -> Any:
        seen = []

        def hook(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            z = args[0].clone()
            if change is not None:
                change(z[0, -1].view(n_heads, width))
            seen.append(z.detach())
            return (z,)

        handle = hf_block(plain, name, at).register_forward_pre_hook(hook)
        logits = plain(ids).logits[0, -1]
        handle.remove()
        return logits.softmax(dim=-1)[list(set(answers))].sum(), seen[0][0, -1].view(n_heads, width)

    with torch.no_grad():
        for layer in range(n_layers):
            each = [run(ids, (0,), at=layer)[1] for ids in rows_of(proper)]
            torch.testing.assert_close(
                outputs[layer], torch.stack(each).mean(0), atol=1e-4, rtol=1e-4
            )
    effect, estimate = indirect_effects(model, shuffled, outputs), None
    estimate = estimated_effects(model, shuffled, outputs)
    rng = random.Random(0)
    for _ in range(6):
        layer, head, i = rng.randrange(n_layers), rng.randrange(n_heads), rng.randrange(5)
        ids, answers = rows_of(shuffled)[i], shuffled.answer_ids[i]

        def write(z: torch.Tensor, head: int = head, layer: int = layer) -> None:
            z[head] = outputs[layer, head]

        with torch.no_grad():
            base, own = run(ids, answers, at=layer)
            patched, _ = run(ids, answers, write, at=layer)
        assert float(effect.shuffled[i]) == pytest.approx(float(base), abs=1e-5)
        assert float(effect.effect[layer, head, i]) == pytest.approx(
            float(patched - base), abs=1e-5
        )
        moved = torch.zeros(n_heads, width, requires_grad=True)

        def push(z: torch.Tensor, moved: torch.Tensor = moved) -> None:
            z += moved

        run(ids, answers, push, at=layer)[0].backward()
        expected = (moved.grad[head] * (outputs[layer, head] - own[head])).sum()
        assert float(estimate[layer, head, i]) == pytest.approx(float(expected), abs=1e-5)
    plain.zero_grad()
    assert float(effect.effect.abs().max()) > 1e-3


def test_a_head_that_already_says_its_mean_has_no_effect(task: Task) -> None:
    model = tiny.model("llama")
    one = build_prompts(task, model, **(ASKED | {"n": 1, "labels": "shuffled"}))
    outputs = head_outputs(model, one)
    assert float(indirect_effects(model, one, outputs).effect.abs().max()) < 1e-6
    assert float(estimated_effects(model, one, outputs).abs().max()) < 1e-6
    other = outputs + 1.0
    assert float(indirect_effects(model, one, other).effect.abs().max()) > 1e-3


def test_memory_and_plans_change_nothing(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("qwen2")
    proper = build_prompts(task, model, **ASKED)
    shuffled = build_prompts(task, model, labels="shuffled", **ASKED)
    outputs = head_outputs(model, proper)
    whole, estimate = (
        indirect_effects(model, shuffled, outputs),
        estimated_effects(model, shuffled, outputs),
    )
    for plan in ("suffix", "growing", "plain"):
        other = indirect_effects(model, shuffled, outputs, plan=plan)
        assert other.plan.name == plan
        torch.testing.assert_close(other.effect, whole.effect, atol=1e-5, rtol=1e-4)
    from tvlens.patching import sweep

    monkeypatch.setattr(sweep, "_KEPT", 1)
    torch.testing.assert_close(
        estimated_effects(model, shuffled, outputs), estimate, atol=1e-6, rtol=1e-4
    )
    with pytest.raises(ValueError, match=r"head outputs of shape \(4, 4, 16\)"):
        indirect_effects(model, shuffled, outputs[:2])


def test_results_choose_compare_and_come_back(task: Task, tmp_path: Path) -> None:
    model = tiny.model("llama")
    asked: dict[str, Any] = {"shots": 3, "n_means": 5, "n_trials": 6, "answers": "any"}
    effects = head_effects(model, task, **asked)
    means = effects.data["effect"].mean("trial").values
    best = np.unravel_index(means.argmax(), means.shape)
    assert effects.heads(1) == [tuple(map(int, best))]
    top = effects.top(16)
    assert top["mean"].is_monotonic_decreasing and (top["low"] <= top["high"]).all()
    assert effects.shared(16) == 16
    agreed = effects.agreement().correlation()
    flat = [effects.data[name].mean("trial").values.ravel() for name in ("estimate", "effect")]
    assert agreed["pearson"] == pytest.approx(np.corrcoef(*flat)[0, 1], abs=1e-6)
    assert set(effects.figures()) == {
        "Average indirect effect of every head",
        "Gradient against patching",
    }
    back = tv.load(effects.save(tmp_path / "effects.nc"))
    assert isinstance(back, HeadEffects) and back.finding() == effects.finding()
    torch.testing.assert_close(back.outputs, effects.outputs)
    alone = head_effects(model, task, methods=["estimate"], **asked)
    assert alone.methods == ("estimate",) and "By gradient" in alone.finding()
    np.testing.assert_allclose(alone.data["estimate"], effects.data["estimate"], atol=1e-6)
    with pytest.raises(ValueError, match="not by 'effect'"):
        alone.agreement()
    for bad, match in (
        ({"methods": []}, "at least one"),
        ({"methods": ["effects"]}, "Nearest: effect"),
    ):
        with pytest.raises(ValueError, match=match):
            head_effects(model, task, **bad)
    with pytest.raises(ValueError, match="1 to 16"):
        effects.top(17)
    with pytest.raises(ValueError, match="Nearest: effect"):
        effects.mean("efect")


def test_universal_heads_are_those_of_the_mean_over_tasks(task: Task) -> None:
    model = tiny.model("llama")
    asked: dict[str, Any] = {"shots": 3, "n_means": 4, "n_trials": 4, "answers": "any"}
    each = [head_effects(model, name, **asked) for name in (task, "to_upper", "to_lower")]
    both = np.mean([e.data["effect"].mean("trial").values for e in each], axis=0)
    ranked = universal_heads(each, n=5)
    assert ranked["mean"].tolist() == pytest.approx(sorted(both.ravel(), reverse=True)[:5])
    assert both[ranked["layer"][0], ranked["head"][0]] == both.max()
    own = [set(e.heads(5)) for e in each]
    first = (int(ranked["layer"][0]), int(ranked["head"][0]))
    assert ranked["n_tasks"][0] == sum(first in heads for heads in own)
    assert ((ranked["low"] <= ranked["mean"]) & (ranked["mean"] <= ranked["high"])).all()
    assert universal_heads(each[:1], n=2)["low"].isna().all()
    with pytest.raises(ValueError, match="none arrived"):
        universal_heads([])
    with pytest.raises(ValueError, match="within one model"):
        universal_heads([each[0], head_effects(tiny.model("gpt2"), task, **asked)])


# The vector


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_all_heads_of_a_layer_sum_to_what_attention_writes(
    name: str, kind: str, task: Task
) -> None:
    """One prompt's own outputs through W_O (and Gemma's norm) are its attn_out less the bias."""
    model = tiny.model(name, kind)
    one = build_prompts(task, model, **(ASKED | {"n": 1}))
    from tvlens.engine import Read, Request, run

    outputs = head_outputs(model, one)
    (read,) = run(model, [Request(one.regular, reads=(Read("attn_out", (0, 1, 2, 3)),))])
    for layer in range(4):
        vector = function_vector(
            model, outputs, [(layer, head) for head in range(outputs.shape[1])]
        )
        expected = read.activations[0][0, 0, layer]
        module = hf_block(tiny.hf(name), name, layer)
        if module.bias is not None:
            expected = expected - module.bias.detach()
        torch.testing.assert_close(vector.at(layer)[0], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vector.at(0), vector.at(3))
    assert ("normed" in vector.made) == (name == "gemma3")


@tiny.needs_hooked
def test_parts_are_outputs_through_w_o() -> None:
    for name in ("gpt2", "llama", "qwen2", "pythia"):
        model = tiny.model(name, "hooked")
        shape = (4, model.cfg.n_heads, model.cfg.d_head)
        outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = torch.einsum("hd,hdm->hm", outputs[2], model.W_O[2])
        torch.testing.assert_close(head_parts(model, outputs, 2), expected, atol=1e-4, rtol=1e-4)


def test_vectors_add_subtract_and_go_into_a_run(task: Task, tmp_path: Path) -> None:
    model = tiny.model("llama")
    prompts = build_prompts(task, model, **ASKED)
    outputs = head_outputs(model, prompts)
    names = {"AD": [(1, 0), (2, 1)], "BC": [(2, 1), (3, 3)], "AC": [(1, 0), (3, 3)], "BD": [(2, 1)]}
    made = {
        name: function_vector(model, outputs, heads, made={"task": name})
        for name, heads in names.items()
    }
    # Composition: (A and D) with (B and C), less (A and C), leaves B and D.
    composed = made["AD"] + made["BC"] - made["AC"]
    torch.testing.assert_close(composed.values, 2 * made["BD"].values, atol=1e-5, rtol=1e-4)
    assert composed.made["task"] == "AD + BC - AC"
    vector = made["AD"]
    back = tv.load(vector.save(tmp_path / "v.safetensors"))
    assert back.made["heads"] == [[1, 0], [2, 1]] and torch.equal(back.values, vector.values)
    scored = tv.score(model, prompts, view="zero_shot", vector=vector, layer=2, mode="add")
    ids, mask = prompts.zero_shot.tokens, prompts.zero_shot.mask.long()
    with torch.no_grad(), tv.inject(model, vector, layer=2, mode="add"):
        logits = model(ids, attention_mask=mask)[:, -1]
    assert logits.argmax(dim=-1).tolist() == scored.predicted.tolist()
    plain = tv.score(model, prompts, view="zero_shot")
    nothing = tv.score(model, prompts, view="zero_shot", vector=0.0 * vector, layer=2, mode="add")
    torch.testing.assert_close(nothing.log_prob, plain.log_prob)
    assert not torch.allclose(scored.log_prob, plain.log_prob)


@pytest.mark.parametrize(
    ("heads", "match"),
    [
        ([], "at least one head"),
        ([(4, 0)], "layers 0 to 3"),
        ([(0, 4)], "heads 0 to 3"),
        ([(0, -1)], "heads 0 to 3"),
        ([(1, 1), (1, 1)], "named twice"),
    ],
)
def test_heads_that_make_no_vector(heads: list[tuple[int, int]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        function_vector(tiny.model("llama"), torch.zeros(4, 4, 16), heads)
    with pytest.raises(ValueError, match=r"\(4, 4, 16\)"):
        function_vector(tiny.model("llama"), torch.zeros(3, 4, 16), [(0, 0)])


def test_random_heads_are_others() -> None:
    chosen = [(0, 1), (2, 3)]
    draws = random_heads(chosen, (4, 4), n_draws=6, seed=0)
    assert all(len(set(draw)) == 2 and not set(draw) & set(chosen) for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 1
    assert draws == random_heads(chosen, (4, 4), n_draws=6, seed=0)
    with pytest.raises(ValueError, match="only 1 others; take at most 2"):
        random_heads([(0, i) for i in range(3)], (1, 4), n_draws=1, seed=0)


# The experiment


@pytest.mark.slow
def test_experiment_equals_its_steps_by_hand(found: FunctionVectors, task: Task) -> None:
    model, seed = tiny.model("llama"), SMALL["seed"]
    how: dict[str, Any] = {"answers": "any", "seed": seed, "n_dummy": 0, "shots": 3}
    effects = head_effects(model, task, n_means=6, n_trials=5, shots=3, answers="any", seed=seed)
    assert found.heads == effects.heads(3)
    vector = function_vector(model, effects.outputs, effects.heads(3))
    torch.testing.assert_close(found.function_vector.values, vector.values, atol=1e-5, rtol=1e-4)
    assert found.function_vector.made["heads"] == [list(head) for head in found.heads]
    dev = build_prompts(task, model, n=6, **how)
    test = build_prompts(task, model, n=8, split="test", **how)
    at = [
        tv.score(model, dev, view="zero_shot", vector=vector, layer=i, mode="add") for i in range(4)
    ]
    layer = int(np.argmax([scores.accuracy for scores in at]))
    assert found.best_layer == layer
    here = found.data.isel(prompt=found.data["split"].values == "test")
    shuffled = build_prompts(task, model, n=8, split="test", labels="shuffled", **how)
    others, asked = {}, {"answers": "any", "shots": 0}
    for name in ("qa", "arrow"):
        usable = usable_items(task, model, template=name, answers="any")
        queries = [x for x in test.queries if x in usable]
        others[name] = build_prompts(task, model, template=name, queries=queries, **asked)
    assert len(others["qa"]) < len(others["arrow"]) == len(test)
    add: dict[str, Any] = {"vector": vector, "layer": layer, "mode": "add"}
    for view, prompts in ({"zero_shot": test, "shuffled": shuffled} | others).items():
        which = "regular" if view == "shuffled" else "zero_shot"
        one = here.sel(view=view, prompt=[x in prompts.queries for x in test.queries])
        assert (
            one["without"].values.tolist() == tv.score(model, prompts, view=which).correct.tolist()
        )
        with_it = tv.score(model, prompts, view=which, **add).correct.tolist()
        assert one["vector"].values.tolist() == with_it
        for i, draw in enumerate(random_heads(found.heads, (4, 4), n_draws=3, seed=seed)):
            control = function_vector(model, effects.outputs, draw)
            there = int(here["random_heads_layer"][i])
            scored = tv.score(model, prompts, view=which, vector=control, layer=there, mode="add")
            assert one["random_heads"].values[i].tolist() == scored.correct.tolist()
    assert int(here["vector"].sel(view="qa").count()) == len(others["qa"])
    assert here["regular"].values.tolist() == tv.score(model, test).correct.tolist()
    assert set(here["query"].values) == set(test.queries)
    assert not set(here["query"].values) & set(dev.queries)


@pytest.mark.slow
def test_experiment_says_and_draws_what_came_out(found: FunctionVectors, tmp_path: Path) -> None:
    summary, rates = found.summary(), found.rates()
    assert len(rates) == 1 + 4 * 4 and (rates["low"] <= rates["high"]).all()
    test = found.data.isel(prompt=found.data["split"].values == "test")
    assert summary["vector"] == pytest.approx(float(test["vector"].sel(view="zero_shot").mean()))
    drawn = test["random_heads"].sel(view="shuffled").mean("prompt")
    assert summary["shuffled_random_heads"] == pytest.approx(float(drawn.mean()))
    assert summary["shuffled_random_heads_best"] == pytest.approx(float(drawn.max()))
    assert f"layer {summary['layer']} of 4" in found.finding() and "3 heads" in found.finding()
    assert list(found.figures())[:2] == [
        "With and without the function vector",
        "Accuracy by layer",
    ]
    names = {trace.name for trace in found.plot().data}
    assert {"with function vector", "without", "as many random heads"} <= names
    back = tv.load(found.save(tmp_path / "fv.nc"))
    assert isinstance(back, FunctionVectors) and back.finding() == found.finding()
    assert back.effects.heads(3) == found.heads and back.summary() == summary
    assert "Todd" in found.cite()


def test_experiment_takes_heads_and_gradients(task: Task) -> None:
    model = tiny.model("gpt2")
    small = SMALL | {"n_random": 1, "n_dev": 3, "n_test": 3}
    given = function_vectors(model, task, heads=[(2, 1), (0, 3)], templates=[], **small)
    assert given.heads == [(2, 1), (0, 3)]
    assert given.data["view"].values.tolist() == ["zero_shot", "shuffled"]
    by = function_vectors(model, task, by="estimate", templates=[], **small)
    assert by.heads == by.effects.heads(3, by="estimate")


@pytest.mark.slow
def test_smollm2_has_heads_that_carry_the_gerund(smollm2: Any) -> None:
    """Ten of 270 heads, found on dev, answer bare test queries; as many random heads answer none."""
    found = function_vectors(
        smollm2, "gerund", n_means=16, n_trials=8, n_dev=12, n_test=16, n_random=2, templates=[],
        progress=False,
    )  # fmt: skip
    summary = found.summary()
    assert (20, 5) in found.heads
    assert summary["vector"] >= 0.4 and summary["without"] <= 0.1
    assert summary["random_heads_best"] <= 0.15 and summary["random_vector_best"] <= 0.15
    assert summary["shuffled_vector"] > summary["shuffled_without"]
    assert found.effects.agreement().correlation(n_resamples=2)["spearman"] > 0.9
