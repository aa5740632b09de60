"""Theta through a map and for another task: identity, plain Hugging Face hooks, controls that fail."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tvlens.experiments._transfer import Transfer
from tvlens.experiments.transfer import transfer
from tvlens.linear_maps import fit_map
from tvlens.plots.transfer import cross_matrix, transfer_bars
from tvlens.testing import tiny_model

TASKS = ["to_upper", "to_lower", "next_letter"]
HOW: dict[str, Any] = {"n": 6, "n_dev": 4, "n_fit": 6, "shots": 2, "progress": False}


@pytest.fixture(scope="module")
def found() -> Transfer:
    """From another architecture, of the same width, with another tokenizer."""
    model, source = tiny.model("llama"), tiny.model("gpt2")
    return transfer(model, TASKS, source=source, layer=2, source_layer=1, **HOW)


@pytest.mark.parametrize("strength", [1e-6, 100.0])
def test_from_a_layer_to_itself_theta_comes_back(strength: float) -> None:
    model = tiny.model("qwen2")
    data = transfer(model, TASKS, layer=1, strength=strength, **HOW).data
    of = data["token"].sel
    assert of(run="mapped").values.tolist() == of(run="own").values.tolist()
    np.testing.assert_allclose(data["cosine_mapped"], 1, atol=1e-5)
    # Pulled hard to doing nothing, even a map of broken pairs does nothing; else the pairs were all it knew.
    if strength < 1:
        assert float(data["cosine_shuffled"].max()) < 0.9
        assert of(run="shuffled").values.tolist() != of(run="own").values.tolist()
    else:
        assert float(data["cosine_shuffled"].min()) > 0.99
    for i, task in enumerate(TASKS):
        one = data.sel(task=task)
        own = one["cross"].sel(vector=task).values
        assert own.tolist() == one["correct"].sel(run="own").values.tolist(), i
    assert "unmapped" not in data["run"].values


def state(name: str, ids: torch.Tensor, layer: int, value: torch.Tensor | None = None) -> Any:
    """The last state after a block, and the logits, by a plain hook."""
    hf, seen = tiny.hf(name), []
    path = {"gpt2": "transformer.h"}.get(name, "model.layers")

    def hook(module: Any, args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        seen.append(hidden[0, -1].clone())
        if value is not None:
            hidden[0, -1] = value
        return out

    handle = hf.get_submodule(path)[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = hf(ids[None]).logits[0, -1]
    handle.remove()
    return seen[0], logits


def test_the_map_and_every_run_equal_plain_hugging_face_hooks(found: Transfer) -> None:
    model, hf_tokenizer = tiny.model("llama"), tiny.tokenizer("gpt2")
    how = {"shots": 2, "n_dummy": 2}

    def pairs(prompts: tv.Prompts) -> tuple[torch.Tensor, torch.Tensor]:
        ends: list[list[torch.Tensor]] = [[], []]
        for dummy in prompts.dummies:
            for i in range(len(dummy)):
                ids = torch.tensor(hf_tokenizer(dummy.text[i])["input_ids"])
                bos = [hf_tokenizer.bos_token_id] if facts.prepend_bos else []
                ends[0].append(state("gpt2", torch.tensor([*bos, *ids.tolist()]), 1)[0])
                ends[1].append(state("llama", dummy.tokens[i][dummy.mask[i]], 2)[0])
        return torch.stack(ends[0]), torch.stack(ends[1])

    facts = tv.models.facts(tiny.model("gpt2"))
    fitting = [
        pairs(tv.build_prompts(task, model, n=6, **how)) for task in TASKS if task != "to_lower"
    ]
    x, y = (torch.cat([pair[end] for pair in fitting]) for end in (0, 1))
    fitted = fit_map(x, y, strength=0.01, towards="mean")
    test = tv.build_prompts("to_lower", model, n=6, split="test", **how)
    theirs, own = (v.unflatten(0, (2, 6)).mean(dim=0) for v in pairs(test))
    data = found.data.sel(task="to_lower")
    vectors = {"own": own, "mapped": fitted(theirs).float(), "unmapped": theirs}
    vectors["mean"] = y.mean(dim=0).expand_as(own)
    for run, values in vectors.items():
        for i in range(6):
            bare = test.zero_shot.tokens[i][test.zero_shot.mask[i]]
            word = model.tokenizer.decode([int(state("llama", bare, 2, values[i])[1].argmax())])
            assert word == str(data["token"].sel(run=run).values[i]), (run, i)
    alike = torch.cosine_similarity(fitted(theirs).float() - y.mean(0), own - y.mean(0), dim=-1)
    np.testing.assert_allclose(data["cosine_mapped"], alike, atol=1e-3)


def test_models_of_two_widths_need_no_common_tokenizer() -> None:
    result = transfer(tiny.model("gemma3"), TASKS, source=tiny_model(), **HOW)
    assert "unmapped" not in result.data["run"].values
    made = result.provenance
    assert made["towards"] == "mean" and not made["same_model"]
    assert "layer" in result.title and made["source"] != made["model"]
    assert 0 <= made["source_layer"] < 2 and 0 <= made["layer"] < 4


@pytest.mark.slow
def test_it_is_saved_drawn_and_said(found: Transfer, tmp_path: Path) -> None:
    again = tv.load(found.save(tmp_path / "t.nc"))
    assert isinstance(again, Transfer) and again.finding() == found.finding()
    summary = found.summary()
    assert summary["gain"] == pytest.approx(summary["mapped"] - summary["mean"])
    figures = found.figures()
    assert [trace.name for trace in transfer_bars(found.drawn(), runs=("own", "mean")).data] == [
        "own theta",
        "mean of other tasks",
    ]
    heat = figures["cross"].data[0].z
    rates = found.data["cross"].mean("prompt").sel(vector="to_lower", task="next_letter")
    assert heat[1][2] == pytest.approx(float(rates)) and len(heat) == 5
    assert len(cross_matrix(found.drawn(), title="x").data) == 1
    assert list(found.tables()) and all(len(t) for t in found.tables().values())
    with pytest.raises(ValueError, match="unknown run 'maped'. Nearest: mapped"):
        transfer_bars(found.drawn(), runs=("maped",))


def test_what_it_refuses() -> None:
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="at least 2 tasks beside each; 2 arrived"):
        transfer(model, TASKS[:2], **HOW)
    with pytest.raises(ValueError, match="layer"):
        transfer(model, TASKS, layer=9, **HOW)
    with pytest.raises(ValueError, match="strength"):
        transfer(model, TASKS, layer=1, strength=0.0, **HOW)


@pytest.mark.slow
def test_in_smollm2_theta_of_a_task_is_for_that_task(smollm2: Any) -> None:
    how: dict[str, Any] = HOW | {"n": 13, "shots": 5, "n_fit": 8}
    tasks = ["to_upper", "gerund", "plural_singular"]
    result = transfer(smollm2, tasks, layer=20, **how)
    summary = result.summary()
    assert summary["own"] > 0.4 > summary["cross_other"] + 0.2
    assert summary["mapped"] == summary["own"] and summary["random"] <= 0.1
