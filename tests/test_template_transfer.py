"""Theta between templates: the layer sweep on the diagonal, plain hooks off it, no-ops, and controls."""

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tests.test_choices import hooked
from tvlens.encoding import Encoder
from tvlens.experiments import template_transfer as module
from tvlens.experiments._dev import same_queries
from tvlens.experiments._template_transfer import TemplateTransfer
from tvlens.experiments.template_transfer import template_transfer
from tvlens.tasks import Task

SETTINGS = {"shots": 3, "n_dev": 8, "n_test": 10, "answers": "any", "seed": 3, "progress": False}
TEMPLATES = ("example", "{x}={y}\n", "qa")


@cache
def halves() -> tuple[Task, ...]:
    """Tasks that accept every other word for each query, so that a random model is right half of the time."""
    encoder, rng = Encoder.of(tiny.model("llama")), random.Random(0)
    words = dict.fromkeys(encoder.tokenizer.decode([i]).strip() for i in range(370))
    words = [w for w in words if w and len(encoder.continuation("example:x->", w)) == 1]
    queries = [f"{a}{b}" for a in "pqrstuvw" for b in "xyz"]
    return tuple(
        Task(
            f"t{i}",
            "f",
            {x: tuple(rng.sample(words, len(words) // 2)) for x in queries},
            spaced=False,
        )
        for i in range(2)
    )


@pytest.fixture(scope="module")
def found() -> TemplateTransfer:
    return template_transfer(tiny.model("llama"), halves(), templates=TEMPLATES, **SETTINGS)


def test_the_first_diagonal_cell_is_the_layer_sweep(found: TemplateTransfer) -> None:
    for task in halves():
        sweep = tv.layer_sweep(tiny.model("llama"), task, **SETTINGS).data
        parts = {s: sweep.isel(prompt=sweep["split"].values == s) for s in ("dev", "test")}
        one = found.data.sel(task=task.name, made="example", used="example")
        by_layer = parts["dev"]["hypothesis"].mean("prompt")
        assert np.allclose(one["dev"], by_layer)
        layer = int(one["best_layer"])
        assert layer == int(by_layer.idxmax("layer"))
        test = parts["test"]
        assert np.array_equal(one["hypothesis"], test["hypothesis"].sel(layer=layer))
        for name in ("baseline", "regular"):
            assert np.array_equal(one[name], test[name])
    assert 0 < float(found.data["hypothesis"].mean()) < 1


def test_off_the_diagonal_equals_plain_hooks(found: TemplateTransfer) -> None:
    hf, model, task = tiny.hf("llama"), tiny.model("llama"), halves()[0]
    one = found.data.sel(task=task.name)
    how = {"shots": 3, "n_dummy": 2, "seed": 3, "split": "test"}
    first = tv.build_prompts(task, model, n=10, answers="any", **how)
    made = {"example": first}
    for name in TEMPLATES[1:]:
        made[name] = same_queries(task, model, first.queries, template=name, **how)
    seen: list[bool] = []
    for source, target in (("example", "qa"), ("example", "{x}={y}\n"), ("{x}={y}\n", "example")):
        layer = int(one["best_layer"].sel(made=source, used=target))
        bare, right = made[target].zero_shot, []
        for i in range(10):
            dummies = [(d.tokens[i], d.mask[i]) for d in made[source].dummies]
            states = [hooked(hf, ids[real])[1]["resid_post", layer][-1] for ids, real in dummies]
            theta = torch.stack(states).mean(0)

            def write(hidden: Any, theta: Any = theta) -> None:
                hidden[-1] = theta

            ids = bare.tokens[i][bare.mask[i]]
            logits, _ = hooked(hf, ids, {("resid_post", layer): write})
            right.append(int(logits.argmax()) in made[target].answer_ids[i])
        both = np.array(made[source].queries) == np.array(made[target].queries)
        both &= np.array(first.queries) == np.array(made[target].queries)
        seen += np.array(right)[both].tolist()
        ours = one["hypothesis"].sel(made=source, used=target)
        assert np.array_equal(ours, np.where(both, right, np.nan), equal_nan=True)
    assert 0 < sum(seen) < len(seen)


def test_own_states_in_their_own_place_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(*args: Any, **how: Any) -> Any:
        made = tv.build_prompts(*args, **how)
        return replace(made, dummies=(made.regular,), zero_shot=made.regular)

    monkeypatch.setattr(module, "build_prompts", same)
    settings = SETTINGS | {"n_test": 24}
    one = template_transfer(tiny.model("llama"), halves()[:1], templates=["example"], **settings)
    data = one.data.isel(task=0, made=0, used=0)
    assert np.array_equal(data["hypothesis"], data["regular"])
    assert not np.array_equal(data["control"], data["regular"])
    assert "in others" not in one.finding()
    # There is no other template: none, which a JSON file can say and NaN cannot.
    assert one.summary()["other"] is None
    json.dumps(one.summary(), allow_nan=False)


def test_what_a_template_cannot_judge_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that one template judges by nothing but white space counts nowhere beside it."""
    task = halves()[0]
    lost = set(list(task.inputs)[::3])
    usable = module.same_queries

    def fewer(task: Task, model: Any, queries: Any, *, template: Any, **how: Any) -> Any:
        if getattr(template, "demo", template) == "{x}={y}\n":
            queries = [
                x if x not in lost else next(y for y in task.inputs if y not in lost)
                for x in queries
            ]
        return usable(task, model, queries, template=template, **how)

    monkeypatch.setattr(module, "same_queries", fewer)
    templates = ["example", "{x}={y}\n", "{x}:{y}\n"]
    result = template_transfer(tiny.model("llama"), [task], templates=templates, **SETTINGS)
    one = result.data.isel(task=0)
    gone = np.isin(one["query"].values.astype(str), list(lost))
    assert 0 < gone.sum() < len(gone)
    for name in ("hypothesis", "control"):
        nan = one[name].isnull()
        assert np.array_equal(nan.sel(made="example", used="{x}={y}\n"), gone)
        assert np.array_equal(nan.sel(made="{x}={y}\n", used="{x}:{y}\n"), gone)
        assert not nan.sel(made="example", used="{x}:{y}\n").any()
    assert np.array_equal(np.isnan(one["regular"].sel(used="{x}={y}\n")), gone)
    counted = one["hypothesis"].sel(made="{x}:{y}\n", used="{x}={y}\n").values[~gone]
    means = result.means().sel(made="{x}:{y}\n", used="{x}={y}\n")
    assert float(means["hypothesis"]) == pytest.approx(counted.mean())
    assert float(means["hypothesis_low"]) <= counted.mean() <= float(means["hypothesis_high"])


def test_every_pair_and_task_has_a_control_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []

    def asked(model: Any, prompts: Any, cells: Any) -> Any:
        if cells[0][0] == ():
            for some in cells:
                thetas, controls = some[1:3], some[3:]
                for (theta,), (control,) in zip(thetas, controls, strict=True):
                    assert torch.allclose(theta.given.norm(dim=-1), control.given.norm(dim=-1))
                    drawn.append(control.given / control.given.norm(dim=-1, keepdim=True))
        return bare(model, prompts, cells)

    bare = module._bare
    monkeypatch.setattr(module, "_bare", asked)
    template_transfer(tiny.model("llama"), halves(), templates=["example", "qa"], **SETTINGS)
    directions = torch.cat(drawn)
    assert len(directions) == 2 * 2 * 2 * 10
    alike = directions @ directions.T - torch.eye(len(directions))
    assert alike.abs().max() < 0.75


def test_bad_input() -> None:
    model, task = tiny.model("llama"), halves()[0]
    with pytest.raises(ValueError, match="template 'arow'.*arrow"):
        template_transfer(model, [task], templates=["arow"], **SETTINGS)
    with pytest.raises(ValueError, match="more than once: 'qa'"):
        template_transfer(model, [task], templates=["qa", "qa"], **SETTINGS)
    with pytest.raises(ValueError, match=r"'example' and 'example:\{x\}->.*' are the same one"):
        template_transfer(model, [task], templates=["example", "example:{x}->{y}\n"], **SETTINGS)
    with pytest.raises(ValueError, match="n_dummy >= 1; 0 arrived"):
        template_transfer(model, [task], n_dummy=0, **SETTINGS)
    with pytest.raises(ValueError, match="as a list"):
        template_transfer(model, [task], templates="qa", **SETTINGS)
    made = tv.build_prompts(task, model, n=2, seed=0, answers="any")
    other = replace(made, queries=tuple(reversed(made.queries)))
    with pytest.raises(ValueError, match="'a' and 'b' can judge no query in common"):
        module._judged({"a": made, "b": other})


def test_files_tables_and_figure(found: TemplateTransfer, tmp_path: Path) -> None:
    loaded = tv.load(found.save(tmp_path / "transfer.nc"))
    assert isinstance(loaded, TemplateTransfer) and loaded.finding() == found.finding()
    assert all(frame.index.name for frame in loaded.tables().values())
    table = loaded.by_template()
    matrix = loaded.matrix().to_numpy()
    assert np.allclose(table["own"], np.diag(matrix))
    away = matrix - np.diag(np.diag(matrix))
    assert np.allclose(table["used"], away.sum(axis=0) / 2)
    assert np.allclose(table["made"], away.sum(axis=1) / 2)
    figure: Any = loaded.plot()
    (heat,) = figure.data
    assert np.allclose(heat.z[:3], matrix) and np.isnan(heat.z[3]).all()
    assert np.allclose(heat.z[4], table["regular"]) and np.allclose(heat.z[6], table["baseline"])
    assert "{x}={y}↵" in str(figure.layout.xaxis.ticktext)


@pytest.mark.slow
def test_smollm2_cannot_read_a_query_that_stands_first(smollm2: Any) -> None:
    """No theta helps a bare query at position 0; a line break before it is enough, with the same theta."""
    templates = ["example", "arrow", "\n{x}→{y}\n"]
    found = template_transfer(
        smollm2, ["to_upper"], templates=templates, n_dev=10, n_test=13, progress=False
    )
    matrix: Any = found.matrix()
    assert matrix["arrow"].max() <= 0.2 and matrix["\n{x}→{y}\n"].min() >= 0.5
    assert found.by_template()["regular"].to_numpy().min() >= 0.8
    assert float(found.means()["control"].max()) <= 0.2
