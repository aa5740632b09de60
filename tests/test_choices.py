"""Variants of paper A's procedure: the same logits as plain Hugging Face hooks, no-ops, and controls."""

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
from tvlens.encoding import Encoder
from tvlens.engine import LastLogits, Request, run
from tvlens.experiments import choices as module
from tvlens.experiments._choices import DEFAULT, FACTORS, VARIANTS, Choices, Variant
from tvlens.experiments._dev import accuracy_by_layer, random_cell
from tvlens.experiments.choices import choices
from tvlens.tasks import Task
from tvlens.templates import Role

SETTINGS = {"shots": 3, "n_dev": 8, "n_test": 10, "answers": "any", "seed": 3, "progress": False}
HOW = {"shots": 3, "n_dummy": 2, "answers": "any", "seed": 3, "template": "example"}


@cache
def pair() -> list[Task]:
    """Two tasks with enough queries for ten shots from half of them; a random model is right at times."""
    encoder, rng = Encoder.of(tiny.model("llama")), random.Random(0)
    words = dict.fromkeys(encoder.tokenizer.decode([i]).strip() for i in range(370))
    words = [w for w in words if w and len(encoder.continuation("example:x->", w)) == 1]
    queries = [f"{a}{b}" for a in "pqrstuvw" for b in "wxyz"]
    return [
        Task(f"t{i}", "f", {x: tuple(rng.sample(words, len(words) // 2)) for x in queries}, spaced=False)
        for i in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Choices:
    return choices(tiny.model("llama"), pair(), **SETTINGS)


def test_default_is_the_layer_sweep() -> None:
    """On test queries; the layer comes from dev prompts that show nothing of these."""
    model = tiny.model("llama")
    found = choices(model, pair(), factors=["source", "site"], **SETTINGS)
    for task in pair():
        sweep = tv.layer_sweep(model, task, **SETTINGS).data
        test = sweep.isel(prompt=sweep["split"].values == "test")
        one = found.data.sel(task=task.name)
        layer = int(one["layer"].sel(variant=DEFAULT.name))
        dev = tv.build_prompts(task, model, n=8, split="dev", demonstrations="split", **HOW)
        curve = accuracy_by_layer(model, dev)
        assert layer == int(curve.argmax())
        assert float(one["dev_accuracy"].sel(variant=DEFAULT.name)) == pytest.approx(curve.max())
        ours = one["hypothesis"].sel(variant=DEFAULT.name).values
        assert ours.tolist() == test["hypothesis"].sel(layer=layer).values.tolist()
        for run_name in ("baseline", "regular"):
            assert one[run_name].values.tolist() == test[run_name].values.tolist()
        assert one["query"].values.tolist() == test["query"].values.tolist()
    assert 0 < float(found.data["hypothesis"].mean()) < 1


def test_numbers_of_dummy_queries_share_their_demonstrations(found: Choices) -> None:
    """With the most dummy queries it is the layer sweep with as many; the others see the same prompts."""
    for task in pair():
        sweep = tv.layer_sweep(tiny.model("llama"), task, **SETTINGS, n_dummy=4).data
        test = sweep.isel(prompt=sweep["split"].values == "test")
        one = found.data.sel(task=task.name)
        most = one.sel(variant="4 dummy queries")
        expected = test["hypothesis"].sel(layer=int(most["layer"]))
        assert most["hypothesis"].values.tolist() == expected.values.tolist()
        assert one["regular"].values.tolist() == test["regular"].values.tolist()
    prompts = tv.build_prompts(
        pair()[0], tiny.model("llama"), n=10, split="test", **HOW | {"n_dummy": 4}
    )
    layer = int(found.data.sel(task="t0", variant="1 dummy query")["layer"])
    theta = tv.extract(tiny.model("llama"), replace(prompts, dummies=prompts.dummies[:1]))
    scores = tv.score(tiny.model("llama"), prompts, view="zero_shot", vector=theta, layer=layer)
    ours = found.data.sel(task="t0", variant="1 dummy query")["hypothesis"].values
    assert ours.tolist() == scores.correct.tolist()


def test_dev_prompts_show_no_test_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over S writes what they show: a test query among it, with its answer, would be told."""
    made: dict[str, list[Any]] = {"dev": [], "test": []}

    def watched(*args: Any, split: str, **how: Any) -> Any:
        made[split].append(tv.build_prompts(*args, split=split, **how))
        return made[split][-1]

    monkeypatch.setattr(module, "build_prompts", watched)
    choices(tiny.model("llama"), pair()[:1], factors=["source", "shots"], **SETTINGS)
    asked = {x for prompts in made["test"] for x in prompts.queries}
    assert len(asked) == 10 and len(made["dev"]) == 5
    for prompts in made["dev"]:
        for batch in (prompts.regular, *prompts.dummies):
            for text in batch.text:
                assert not any(f"example:{x}->" in text for x in asked), text


def hooked(
    hf: Any, ids: Any, writes: dict[tuple[str, int], Any] | None = None
) -> tuple[Any, dict[Any, Any]]:
    """Logits after the last token of one prompt, and every site's states; a write changes them in place."""
    kept, handles = {}, []
    for layer, block in enumerate(hf.model.layers):
        places = {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}
        for site, part in places.items():

            def hook(part: Any, inputs: Any, output: Any, key: Any = (site, layer)) -> None:
                states = output[0] if isinstance(output, tuple) else output
                if writes and key in writes:
                    writes[key](states[0] if states.ndim == 3 else states)
                kept[key] = (states[0] if states.ndim == 3 else states).clone()

            handles.append(part.register_forward_hook(hook))
    with torch.no_grad():
        logits = hf(ids[None]).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits, kept


def asked_at(roles: list[int], at: str, n_prefix: int) -> list[int]:
    """Places of the tokens that are meant, from the end, by the template alone."""
    first = roles.index(int(Role.QUERY))
    last = max(i for i, role in enumerate(roles) if role == Role.QUERY)
    after = list(range(last + 1, len(roles)))
    before = list(range(first - n_prefix, first))
    chosen = {"last": after[-1:], "query": [last], "separators": after, "template": before + after}
    return [i - len(roles) for i in chosen[at]]


@pytest.mark.parametrize("variant", [DEFAULT, *VARIANTS], ids=lambda variant: variant.name)
def test_cells_equal_plain_hooks(variant: Variant) -> None:
    hf, model, task, layer = tiny.hf("llama"), tiny.model("llama"), pair()[0], 2
    sides = {}
    for split in ("dev", "test"):
        sides[split] = module._side(model, task, [variant], {**HOW, "n": 3, "split": split})
    values = module._values(variant, sides["test"], sides["dev"])
    cell = module._cell(variant, values, sides["test"].places[variant.at], layer)
    zero_shot = sides["test"].prompts.zero_shot
    (output,) = run(model, [Request(zero_shot, cells=(cell,), readout=LastLogits())])

    shots, n_dummy = variant.shots or 3, variant.n_dummy or 2
    n_prefix = int((zero_shot.roles[0] == int(Role.OTHER)).sum())

    def thetas(split: str, spot: int) -> torch.Tensor:
        """Theta of each prompt, by layer."""
        queries = sides[split].prompts.queries
        given = {"queries": queries} if shots != 3 else {}
        # The first of as many dummy queries as any variant has.
        how = {**HOW, "shots": shots, "n_dummy": max(2, n_dummy), "n": 3, "split": split, **given}
        batches = tv.build_prompts(task, model, **how).dummies[:n_dummy]
        every = []
        for batch in batches:
            rows = []
            for ids, real, roles in zip(batch.tokens, batch.mask, batch.roles, strict=True):
                kept = hooked(hf, ids[real])[1]
                place = asked_at(roles[real].tolist(), variant.at, n_prefix)[spot]
                rows.append(torch.stack([kept[variant.site, at][place] for at in range(4)]))
            every.append(torch.stack(rows))
        return torch.stack(every).mean(0)

    dev = sides["dev"].prompts.zero_shot
    bare = torch.stack(
        [
            torch.stack([hooked(hf, ids[real])[1]["resid_post", at][-1] for at in range(4)])
            for ids, real in zip(dev.tokens, dev.mask, strict=True)
        ]
    ).mean(0)
    span = {"one": [layer], "upto": [0, 1, 2], "around": [1, 2, 3]}[variant.span]
    scale = variant.scale / (3 if variant.span == "around" else 1)
    n_places = len(asked_at(zero_shot.roles[0][zero_shot.mask[0]].tolist(), variant.at, n_prefix))
    each = [thetas("dev" if variant.mean else "test", spot) for spot in range(n_places)]
    for i, (ids, real, roles) in enumerate(
        zip(zero_shot.tokens, zero_shot.mask, zero_shot.roles, strict=True)
    ):
        places = asked_at(roles[real].tolist(), variant.at, n_prefix)
        vectors = []
        for theta in each:
            theta = theta.mean(0) if variant.mean else theta[i]
            vectors.append(scale * (theta - bare if variant.difference else theta))

        def write(states: Any, at: int, places: Any = places, vectors: Any = vectors) -> None:
            for place, vector in zip(places, vectors, strict=True):
                states[place] = vector[at] + (states[place] if variant.mode == "add" else 0)

        writes = {(variant.site, at): lambda states, at=at: write(states, at) for at in span}
        logits, _ = hooked(hf, ids[real], writes)
        assert torch.allclose(output.values["logits"][0, i], logits, atol=2e-4)


def test_own_states_in_their_own_place_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prompt itself as its dummy query and as bare query, replacing writes what is there."""

    def same(*args: Any, **how: Any) -> Any:
        made = tv.build_prompts(*args, **how)
        return replace(made, dummies=(made.regular,), zero_shot=made.regular)

    monkeypatch.setattr(module, "build_prompts", same)
    found = choices(
        tiny.model("llama"), pair()[:1], factors=["site", "position", "mode"], **SETTINGS
    )
    one = found.data.isel(task=0)
    own = [
        "attention output",
        "attention output, layers 0 to L",
        "MLP output",
        "query's last token",
    ]
    own += ["paper A", "all separator tokens", "all template tokens"]
    for name in own:
        assert one["hypothesis"].sel(variant=name).values.tolist() == one["regular"].values.tolist()
    assert (one["hypothesis"] != one["regular"]).any()  # the other variants do something
    assert (one["control"] != one["regular"]).any()


def test_control_is_as_long_and_elsewhere() -> None:
    model, task = tiny.model("llama"), pair()[0]
    side = module._side(model, task, VARIANTS, {**HOW, "n": 3, "split": "dev"})
    for variant in VARIANTS:
        cell = module._cell(
            variant, module._values(variant, side, side), side.places[variant.at], 2
        )
        control = random_cell(cell, seed="0", n=3)
        assert len(control) == len(cell) > 0
        for ours, drawn in zip(cell, control, strict=True):
            same = ("site", "layer", "position", "mode", "scale", "where")
            assert all(getattr(ours, name) is getattr(drawn, name) for name in same)
            length = ours.given.norm(dim=-1).expand(3)
            assert torch.allclose(length, drawn.given.norm(dim=-1), rtol=1e-4)
            cosine = torch.cosine_similarity(ours.given, drawn.given, dim=-1)
            assert cosine.abs().max() < 0.6


def test_every_prompt_variant_and_task_has_a_control_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One direction for all may be a lucky one; so may the same one for every task."""
    drawn: list[torch.Tensor] = []

    def watched(model: Any, side: Any, cells: Any) -> Any:
        if len(side.prompts) == 10:  # test queries: variants, then their controls
            for (edit,) in cells[len(cells) // 2 :]:
                drawn.append(edit.given / edit.given.norm(dim=-1, keepdim=True))
        return ask(model, side, cells)

    ask = module._ask
    monkeypatch.setattr(module, "_ask", watched)
    choices(tiny.model("llama"), pair(), factors=["source", "dummies"], **SETTINGS)
    directions = torch.cat(drawn)
    assert (
        len(directions) == 2 * 4 * 10
    )  # tasks, variants (2 dummy queries are the default), prompts
    alike = directions @ directions.T - torch.eye(len(directions))
    assert alike.abs().max() < 0.75


def test_intervals_and_differences(found: Choices) -> None:
    table = found.means()
    assert table.index[-2:].tolist() == ["baseline", "regular"]
    assert table.loc[DEFAULT.name, ["difference", "difference_low", "difference_high"]].eq(0).all()
    right = found.data["hypothesis"].astype(float)
    expected = (right - right.sel(variant=DEFAULT.name)).mean(["task", "prompt"])
    assert np.allclose(table["difference"].iloc[:-2], expected)
    assert (table["difference_low"].iloc[:-2] <= expected.values + 1e-12).all()


def test_an_accuracy_of_zero_or_one_is_not_sure(found: Choices) -> None:
    """In one task or several, Wilson's interval; a difference of nothing to itself is nothing."""
    for some in (found.data, found.data.isel(task=[0])):
        data = some.copy(deep=True)
        data["hypothesis"][:] = False
        table = Choices(data).means()
        assert (table["low"].iloc[:-2] == 0).all() and (table["high"].iloc[:-2] > 0.1).all()
        assert table["difference_high"].iloc[:-2].eq(0).all()
        assert table["difference_low"].iloc[:-2].eq(0).all()


def test_a_clear_difference_is_found(found: Choices) -> None:
    data = found.data.copy(deep=True)
    data["hypothesis"][:] = False
    data["hypothesis"].loc[{"variant": "mean over S"}] = True
    planted = Choices(data)
    assert planted.factors().index[0] == "source"
    assert planted.means().loc["mean over S", "difference_low"] == 1
    assert "1 variant is clearly better, most mean over S (+1.00" in planted.finding()
    data["hypothesis"][:] = False
    assert Choices(data).finding().endswith("no choice changes that.")


def test_variants_equal_to_the_default_are_left_out() -> None:
    settings = {**SETTINGS, "shots": 2, "n_dummy": 1, "layers": [0, -1]}
    found = choices(tiny.model("llama"), pair()[:1], factors=["dummies", "shots"], **settings)
    names = found.data["variant"].values.tolist()
    assert names == [
        "paper A",
        "2 dummy queries",
        "4 dummy queries",
        "1 shot",
        "5 shots",
        "10 shots",
    ]
    assert set(found.data["layer"].values.ravel().tolist()) <= {0, 3}
    assert set(FACTORS) == {"mode", "source", "site", "position", "dummies", "shots"}


def test_a_separator_of_one_token_is_the_last_token(found: Choices) -> None:
    """Writing at all separator tokens is then no variant, but the default again."""
    model, position = tiny.model("llama"), ["paper A", "query's last token"]
    settings = {**SETTINGS, "factors": ["position"], "n_test": 4, "n_dev": 4}
    one = choices(model, pair()[:1], template="{x}={y}\n", **settings)
    assert one.data["variant"].values.tolist() == position
    named = choices(model, pair()[:1], template="is {x}={y}\n", **settings)
    assert named.data["variant"].values.tolist() == [*position, "all template tokens"]
    two = choices(model, pair()[:1], template="{x} is={y}\n", **settings)
    assert two.data["variant"].values.tolist() == [*position, "all separator tokens"]
    assert found.data.sizes["variant"] == len(
        VARIANTS
    )  # all and the default, without 2 dummy queries


def test_layers_are_tried_from_the_lowest() -> None:
    """Of layers that do equally well the lowest is chosen, in whatever order they are named."""
    settings = {**SETTINGS, "factors": ["source"], "n_test": 4}
    one = choices(tiny.model("llama"), pair()[:1], layers=[-1, 0, 3], **settings)
    assert one.provenance["layers"] == [0, 3]
    single = choices(tiny.model("llama"), pair()[:1], layers=1, **settings)
    assert single.data["layer"].values.ravel().tolist() == [1, 1]


def test_bad_input() -> None:
    model, task = tiny.model("llama"), pair()[0]
    for arguments, message in (
        ({"factors": []}, r"at least one of mode, .*; \[\] arrived"),
        ({"factors": "mode"}, "as a list.*; 'mode' arrived"),
        ({"n_dummy": 0}, "n_dummy >= 1; 0 arrived"),
        ({"layers": []}, "layers is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            choices(model, [task], **(SETTINGS | arguments))
    with pytest.raises(ValueError, match="factor 'sites'.*site"):
        choices(model, [task], factors=["sites"], **SETTINGS)
    with pytest.raises(ValueError, match="several tasks"):
        choices(model, "to_upper", **SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 9"):
        choices(model, [task], layers=[9], **SETTINGS)
    batch = tv.build_prompts(task, model, **HOW, n=2).zero_shot
    joined = replace(batch, roles=batch.roles.masked_fill(batch.roles == int(Role.QUERY), 0))
    with pytest.raises(ValueError, match="no token of its own"):
        module._places(joined, "query")


def test_files_tables_and_figure(found: Choices, tmp_path: Path) -> None:
    loaded = tv.load(found.save(tmp_path / "choices.nc"))
    assert isinstance(loaded, Choices) and loaded.finding() == found.finding()
    assert all(frame.index.name for frame in loaded.tables().values())
    figure: Any = loaded.plot()
    ticks = figure.layout.yaxis.ticktext
    assert all(variant.name in ticks for variant in (DEFAULT, VARIANTS[0]))
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    drawn = sorted(x for trace in dots[:2] for x in trace.x)
    assert np.allclose(drawn, sorted(found.means()["accuracy"].iloc[:-2]))
    assert np.allclose(dots[2].x, found.means()["control"].iloc[:-2])


@pytest.mark.slow
def test_smollm2_needs_the_last_token(smollm2: Any) -> None:
    found = choices(
        smollm2, ["gerund"], factors=["source", "position"], n_dev=10, n_test=16, layers=[18, 20, 22],
        progress=False,
    )  # fmt: skip
    table = found.means()
    assert table.loc["paper A", "accuracy"] >= 0.5 and table.loc["mean over S", "accuracy"] >= 0.5
    assert table.loc["query's last token", "accuracy"] <= 0.1
    assert table["control"].iloc[:-2].max() <= 0.15
