"""Variants of paper A's procedure: the same logits as plain Hugging Face hooks, no-ops, and controls."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tests.test_conflict import rivals
from tvlens.engine import LastLogits, Request, run
from tvlens.experiments import choices as module
from tvlens.experiments._choices import DEFAULT, FACTORS, VARIANTS, Choices, Variant
from tvlens.experiments._dev import random_cell
from tvlens.experiments.choices import choices
from tvlens.intervals import accuracy
from tvlens.templates import Role

SETTINGS = {"shots": 3, "n_dev": 8, "n_test": 10, "answers": "any", "seed": 3, "progress": False}
HOW = {"shots": 3, "n_dummy": 2, "answers": "any", "seed": 3, "template": "example"}


@pytest.fixture(scope="module")
def found() -> Choices:
    return choices(tiny.model("llama"), rivals()[:2], **SETTINGS)


def test_default_is_the_layer_sweep(found: Choices) -> None:
    for task in rivals()[:2]:
        sweep = tv.layer_sweep(tiny.model("llama"), task, **SETTINGS).data
        test = sweep.isel(prompt=sweep["split"].values == "test")
        one = found.data.sel(task=task.name)
        layer = int(one["layer"].sel(variant=DEFAULT.name))
        dev = sweep["hypothesis"].isel(prompt=sweep["split"].values == "dev").mean("prompt")
        assert layer == int(dev.idxmax("layer"))
        assert float(one["dev_accuracy"].sel(variant=DEFAULT.name)) == pytest.approx(
            float(dev.max())
        )
        ours = one["hypothesis"].sel(variant=DEFAULT.name).values
        assert ours.tolist() == test["hypothesis"].sel(layer=layer).values.tolist()
        for run_name in ("baseline", "regular"):
            assert one[run_name].values.tolist() == test[run_name].values.tolist()
        assert one["query"].values.tolist() == test["query"].values.tolist()
    assert 0 < float(found.data["hypothesis"].mean()) < 1


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
    hf, model, task, layer = tiny.hf("llama"), tiny.model("llama"), rivals()[0], 2
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
        given = {} if (shots, n_dummy) == (3, 2) else {"queries": queries}
        how = {**HOW, "shots": shots, "n_dummy": n_dummy, "n": 3, "split": split, **given}
        batches = tv.build_prompts(task, model, **how).dummies
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
        tiny.model("llama"), rivals()[:1], factors=["site", "position", "mode"], **SETTINGS
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
    model, task = tiny.model("llama"), rivals()[0]
    side = module._side(model, task, VARIANTS, {**HOW, "n": 3, "split": "dev"})
    for variant in VARIANTS:
        cell = module._cell(
            variant, module._values(variant, side, side), side.places[variant.at], 2
        )
        control = random_cell(cell, seed=0)
        assert len(control) == len(cell) > 0
        for ours, drawn in zip(cell, control, strict=True):
            same = ("site", "layer", "position", "mode", "scale", "where")
            assert all(getattr(ours, name) is getattr(drawn, name) for name in same)
            assert torch.allclose(ours.given.norm(dim=-1), drawn.given.norm(dim=-1), rtol=1e-4)
            cosine = torch.cosine_similarity(ours.given, drawn.given, dim=-1)
            assert cosine.abs().max() < 0.6


def test_intervals_and_differences(found: Choices) -> None:
    table = found.means()
    assert table.index[-2:].tolist() == ["baseline", "regular"]
    assert table.loc[DEFAULT.name, ["difference", "difference_low", "difference_high"]].eq(0).all()
    right = found.data["hypothesis"].astype(float)
    expected = (right - right.sel(variant=DEFAULT.name)).mean(["task", "prompt"])
    assert np.allclose(table["difference"].iloc[:-2], expected)
    assert (table["difference_low"].iloc[:-2] <= expected.values + 1e-12).all()
    # Of one task, Wilson's interval over distinct queries.
    one = Choices(found.data.isel(task=[0]))
    named = one.data.isel(task=0).assign_coords(split=("prompt", ["test"] * 10))
    named = named.set_coords("query").reset_index("variant", drop=True)
    wilson = accuracy(named, "hypothesis")
    for end in ("low", "high"):
        assert np.allclose(one.means()[end].iloc[:-2], wilson[end].values)


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
    found = choices(tiny.model("llama"), rivals()[:1], factors=["dummies", "shots"], **settings)
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


def test_bad_input() -> None:
    model, task = tiny.model("llama"), rivals()[0]
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
