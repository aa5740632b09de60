"""Sweeps: what identifies a cell, what is computed again, what is joined, and what survives."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import tvlens as tv
from tests import sweep_cells as cells
from tvlens import sweeps
from tvlens.sweeps._arrays import from_bytes, to_bytes
from tvlens.sweeps._folder import Folder, _json
from tvlens.sweeps._grid import Grid, keys_of
from tvlens.sweeps._identity import plain
from tvlens.testing import tiny_model

SMALL = {"n_dev": 4, "n_test": 6}
run = partial(tv.sweep, progress=False)


def keys(experiment: Any, **asked: Any) -> list[str]:
    given = {"tasks": None, "models": None, "seeds": 0, "over": {}, "settings": {}, "threads": 1}
    return list(keys_of(Grid.of(sweeps.Call.of(experiment), **{**given, **asked}).plan()))


def test_a_layer_sweep_over_a_grid_is_the_layer_sweeps_themselves(tmp_path: Path) -> None:
    model = tiny_model()
    found = run(
        "layer_sweep",
        tasks=["to_upper", "to_lower"],
        models={"tiny": model},
        seeds=[0, 3],
        out=tmp_path,
        **SMALL,
    )
    assert found.counts() == {"done": 4, "failed": 0, "missing": 0}
    joined = sweeps.join(tmp_path)
    for task in ("to_upper", "to_lower"):
        for seed in (0, 3):
            one = tv.layer_sweep(model, task, seed=seed, progress=False, **SMALL)
            at = {"model": "tiny", "task": task, "seed": seed}
            assert float(found.data["regular"].sel(at)) == one.summary()["regular"]
            for name in ("hypothesis", "theta", "query", "top_token"):
                mine = joined[name].sel(at).values
                if mine.dtype.kind == "f":  # the plan may be another, which rounds otherwise
                    assert np.allclose(mine, one.data[name].values, atol=1e-5)
                else:
                    assert (mine == one.data[name].values).all()
    results = list(sweeps.cells(tmp_path))
    assert [r.provenance["seed"] for r in results] == [0, 3, 0, 3]
    assert "answers" in results[0].finding()


calls: list[tuple[str, int]] = []


def count(task: Any, *, seed: int) -> float:
    calls.append((task.name, seed))
    return float(seed)


def test_a_rerun_computes_only_what_is_missing(tmp_path: Path) -> None:
    calls.clear()
    run(count, tasks=["to_upper"], seeds=[0, 1], out=tmp_path)
    assert calls == [("to_upper", 0), ("to_upper", 1)]
    found = run(count, tasks=["to_upper", "gerund"], seeds=[0, 1, 2], out=tmp_path)
    assert sorted(calls[2:]) == [("gerund", 0), ("gerund", 1), ("gerund", 2), ("to_upper", 2)]
    assert found.data["value"].sel(task="gerund").values.tolist() == [0, 1, 2]
    run(count, tasks=["to_upper", "gerund"], seeds=[0, 1, 2], out=tmp_path)
    assert len(calls) == 6
    assert sweeps.status(tmp_path)["done"].tolist() == [2, 6]
    with pytest.raises(ValueError, match="holds 2 sweeps; name one by plan="):
        sweeps.collect(tmp_path)
    latest = sweeps.status(tmp_path)["plan"].iloc[-1]
    assert sweeps.collect(tmp_path, plan=latest).data.identical(
        found.data.assign_attrs(sweeps.collect(tmp_path, plan=latest).data.attrs)
    )


ONE = {"tasks": ["to_upper"], "models": ["toy"]}


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"tasks": ["to_lower"]}, True),
        ({"tasks": [tv.load_task("to_upper")]}, False),
        ({"tasks": [tv.Task("to_upper", "algorithmic", {"a": ("A",), "b": ("B",)})]}, True),
        ({"models": {"another name": "toy"}}, False),
        ({"models": ["smollm2-135m"]}, True),
        ({"models": {"toy": partial(tv.load_model, "toy")}}, True),
        ({"seeds": 1}, True),
        ({"settings": {"shots": 5}}, False),  # the default is a setting, too
        ({"settings": {"shots": 4}}, True),
        ({"settings": {"template": "qa"}}, True),
        ({"settings": {"template": tv.Template("example:{x}->{y}\\n", spacing="never")}}, True),
        ({"threads": 2}, True),
        ({"over": {"shots": [5]}}, True),
    ],
)
def test_a_key_says_all_that_decides_the_numbers(other: dict[str, Any], differs: bool) -> None:
    assert (keys("layer_sweep", **{**ONE, **other}) != keys("layer_sweep", **ONE)) == differs


def _scaled(by: float) -> Callable[..., float]:
    def value(*, seed: int) -> float:
        return by * seed

    return value


class _Loader:
    def __init__(self, name: str) -> None:
        self.name = name

    def load(self) -> Any:
        return tv.load_model(self.name)

    def __call__(self) -> Any:
        return self.load()


def test_keys_know_what_a_function_does_and_holds() -> None:
    scope: dict[str, Any] = {"__name__": "prompt"}
    made = []
    for body in ("seed", "seed + 1", "seed"):
        exec(f"def value(*, seed): return {body}", scope)
        made.append(keys(scope["value"]))
    assert made[0] != made[1] and made[0] == made[2]
    assert keys(_scaled(1.0)) != keys(_scaled(2.0)) and keys(_scaled(1.0)) == keys(_scaled(1.0))
    asked = {"tasks": ["gerund"]}
    for loader, message in (
        (_Loader("toy").load, "the object of a method must be something that can be written"),
        (_Loader("toy"), "a callable object must be something that can be written down"),
    ):
        with pytest.raises(TypeError, match=message):
            keys(cells.layers, models=loader, **asked)
    cached = functools.cache(_scaled(3.0))
    assert keys(cached) == keys(_scaled(3.0))
    loads = [lambda: tv.load_model("toy"), lambda: tv.load_model("smollm2-135m")]
    one, other = (keys(cells.layers, models=load, **asked) for load in loads)
    assert one != other


def test_keys_know_numbers_to_the_last_bit() -> None:
    import torch

    pairs = [
        (np.array([1.0, 1 + 1e-12]), np.array([1.0, 1.0])),
        (torch.tensor([2**24 + 1, 0]), torch.tensor([2**24, 0])),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float16)),
        (np.array(["a"] * 2000, object), np.array(["a"] * 1000 + ["b"] + ["a"] * 999, object)),
        (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    ]
    for one, other in pairs:
        assert plain(one, what="x") != plain(other, what="x")
        assert plain(one, what="x") == plain(one, what="x")


def test_keys_know_source_weights_and_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert keys(cells.scalar) != keys(cells.dies)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    before = keys(cells.layers, tasks=["gerund"], models=[folder])
    (folder / "model.safetensors").write_bytes(b"another")
    after = keys(cells.layers, tasks=["gerund"], models=[folder])
    assert after != before
    (folder / "trainer_state.json").write_text("{}")
    assert keys(cells.layers, tasks=["gerund"], models=[folder]) == after
    asked = {"tasks": ["gerund"], "models": partial(tv.load_model, str(folder))}
    loaded = keys(cells.layers, **asked)
    (folder / "model.safetensors").write_bytes(b"a third one")
    assert keys(cells.layers, **asked) != loaded
    partials = [
        partial(cells.deep),
        partial(cells.shallow),
        partial(tv.load_model, "toy", dtype="bfloat16"),
    ]
    found = [keys(cells.layers, tasks=["gerund"], models=one)[0] for one in partials]
    assert len(set(found)) == 3
    from tvlens.sweeps import _identity

    here = keys(cells.scalar)
    monkeypatch.setattr(_identity.provenance, "versions", lambda: {"torch": "99"})
    assert keys(cells.scalar) != here


def test_weights_in_hand_are_part_of_the_key() -> None:
    model = cells.deep()
    before = keys(cells.layers, tasks=["gerund"], models=model)
    assert keys(cells.layers, tasks=["gerund"], models=cells.deep()) == before
    next(iter(model.parameters())).data[0, 0] += 1e-6
    assert keys(cells.layers, tasks=["gerund"], models=model) != before


def test_a_model_in_hand_is_more_than_its_weights() -> None:
    model = cells.deep()
    before = keys(cells.layers, tasks=["gerund"], models=model)
    model.train()
    assert keys(cells.layers, tasks=["gerund"], models=model) != before
    model.eval()
    model.cfg.eps *= 10
    assert keys(cells.layers, tasks=["gerund"], models=model) != before
    model.add_hook("blocks.0.hook_resid_post", lambda value, hook: 2 * value)
    with pytest.raises(ValueError, match="has hooks, and a sweep cannot know what they do"):
        keys(cells.layers, tasks=["gerund"], models=model)


def test_a_folder_called_like_a_model_is_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys("layer_sweep", **ONE)
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert keys("layer_sweep", **ONE) == before


def test_weights_that_change_under_a_sweep_are_noticed(tmp_path: Path) -> None:
    from tvlens.sweeps._grid import Source

    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    grid = Grid.of(
        sweeps.Call.of(cells.layers), tasks=["gerund"], models=[file], seeds=0, over={}, settings={},
        threads=1,
    )  # fmt: skip
    source = grid.axes["model"][0].value
    assert isinstance(source, Source)
    file.write_bytes(b"another")
    with pytest.raises(RuntimeError, match="are others than when the sweep was planned"):
        source.load()


def test_the_commit_of_the_key_is_the_one_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens import models
    from tvlens.sweeps import _identity

    monkeypatch.setattr(_identity, "commit", lambda name, revision=None: "c0ffee")
    asked = {}
    monkeypatch.setattr(models, "load_model", lambda name, **given: asked.update(given))
    grid = Grid.of(
        sweeps.Call.of(cells.layers), tasks=["gerund"], models="owner/name", seeds=0, over={}, settings={},
        threads=1,
    )  # fmt: skip
    grid.axes["model"][0].value.load()
    assert asked == {"revision": "c0ffee"}


def test_tasks_by_name_are_the_tasks_themselves(tmp_path: Path) -> None:
    mine = tv.Task("to_upper", "custom", {"a": ("A",), "b": ("B",)})
    found = run(cells.named, tasks={"mine": mine, "gerund": "gerund"}, out=tmp_path)
    assert found.data["task"].values.tolist() == ["mine", "gerund"]
    assert found.data["word"].values.ravel().tolist() == ["to", "ge"]


def _optional(model: Any = None, task: Any = None, *, seed: int) -> int:
    return seed + (model is not None) + (task is not None)


def test_what_is_optional_may_be_left_out(tmp_path: Path) -> None:
    found = run(_optional, seeds=[0, 2], out=tmp_path)
    assert found.axes == ("seed",) and found.data["value"].values.tolist() == [0, 2]
    assert found.data["value"].dtype == np.int64


def test_names_of_columns_are_kept_apart(tmp_path: Path) -> None:
    def mine(*, seed: int) -> dict[str, Any]:
        return {"seconds": 3.0, "title": "t", "seed": 9}

    found = run(mine, seeds=[4], out=tmp_path)
    assert found.data["cell_seconds"].item() == 3 and found.data["cell_seed"].item() == 9
    assert found.data["title"].item() == "t"


def test_labels_that_are_no_plain_numbers(tmp_path: Path) -> None:
    def shown(*, seed: int, t: float) -> float:
        return 0.0

    found = run(shown, over={"t": [np.int64(1), math.inf]}, out=tmp_path)
    assert found.data["t"].values.tolist() == ["1", "inf"]
    with pytest.raises(ValueError, match="each t once; given more than once: 1"):
        run(shown, over={"t": [1, "1"]}, out=tmp_path)


def test_attributes_come_back(tmp_path: Path) -> None:
    def measured(*, seed: int) -> xr.Dataset:
        one = xr.Dataset({"x": ("row", [1.0], {"units": "nats"})}, attrs={"n": np.int64(3)})
        return one.assign_attrs(tvlens="not a result's")

    run(measured, out=tmp_path)
    (cell,) = sweeps.cells(tmp_path)
    assert cell.attrs["n"] == 3 and cell["x"].attrs == {"units": "nats"}


def test_what_cannot_be_written_down_is_refused() -> None:
    with pytest.raises(
        TypeError, match="lens must be something that can be written down.*a object arrived"
    ):
        plain(object(), what="lens")
    same = plain({"a": np.float32(0.5), "b": {3, 1}, "c": np.arange(3)}, what="x")
    assert same["a"] == 0.5 and same["b"] == [1, 3] and same["c"]["array"] == ["int64", 3]
    assert plain(float("inf"), what="x") == "inf"


def test_failures_are_recorded_and_retried_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"tasks": ["to_upper"], "seeds": range(4), "out": tmp_path}
    found = run(cells.fails_on_odd, **asked)
    assert found.counts() == {"done": 2, "failed": 2, "missing": 0}
    failed = found.failures()
    assert failed["seed"].tolist() == [1, 3]
    assert failed["error"][0] == "ValueError: to_upper has no seed 1"
    values = found.data["value"].values.ravel()
    assert values[[0, 2]].tolist() == [0, 2] and np.isnan(values[[1, 3]]).all()
    folder = Folder(tmp_path)
    (key, *_) = sorted(folder.failed())
    record = folder.failure(key)
    assert "in fails_on_odd" in record["traceback"] and record["attempts"] == 1
    run(cells.fails_on_odd, **asked)
    assert folder.failure(key)["attempts"] == 1
    run(cells.fails_on_odd, retry=True, **asked)
    assert folder.failure(key)["attempts"] == 2
    assert "failed" in found.finding() and "Failed cells" in found.tables()
    with pytest.raises(RuntimeError, match="the cell of task to_upper, seed 1 failed: ValueError"):
        run(cells.fails_on_odd, retry=True, on_error="raise", **asked)


def test_a_model_that_cannot_be_loaded_fails_its_cells_only(tmp_path: Path) -> None:
    loads = []

    def broken() -> Any:
        loads.append(1)
        raise OSError("no such weights")

    found = run(
        cells.layers, tasks=["to_upper", "gerund"], models={"broken": broken, "tiny": cells.shallow},
        seeds=[0, 1], out=tmp_path,
    )  # fmt: skip
    assert found.counts() == {"done": 4, "failed": 4, "missing": 0}
    assert len(loads) == 1
    assert set(found.failures()["error"]) == {"OSError: no such weights"}


def test_depths_that_differ_stay_nan(tmp_path: Path) -> None:
    models = {"shallow": cells.shallow, "deep": cells.deep}
    run(cells.layers, tasks=["gerund"], models=models, seeds=[0, 1], out=tmp_path)
    joined = sweeps.join(tmp_path)
    assert joined["by_layer"].dims == ("model", "task", "seed", "layer", "prompt")
    assert joined["layer"].values.tolist() == [0, 1, 2, 3]
    one = joined["by_layer"].sel(task="gerund")
    assert np.isnan(one.sel(model="shallow", layer=[2, 3]).values).all()
    assert (one.sel(model="shallow", layer=[0, 1], seed=1).values == 1).all()
    assert np.isnan(one.sel(model="deep", seed=0).values[:, 2]).all()
    assert joined["query"].sel(model="deep", task="gerund", seed=0).values.tolist() == [
        "gerund 0",
        "gerund 1",
        "",
    ]
    depth = joined["depth"].sel(model="shallow", task="gerund", seed=0).values
    assert depth[:2].tolist() == [0, 1] and np.isnan(depth[2:]).all()
    only = sweeps.join(tmp_path, "depth")
    assert set(only.variables) == {"model", "task", "seed", "layer", "depth"}
    with pytest.raises(ValueError, match="unknown variable 'dept'. Nearest: depth"):
        sweeps.join(tmp_path, "dept")


def test_a_missing_cell_is_nan_and_not_nothing(tmp_path: Path) -> None:
    run(cells.numbers, tasks=["gerund"], seeds=[0, 1], out=tmp_path, size=4)
    folder = Folder(tmp_path)
    gone = sorted(folder.finished())[0]
    (tmp_path / "cells" / gone[:2] / f"{gone}.json").unlink()
    found, joined = sweeps.collect(tmp_path), sweeps.join(tmp_path, "x")
    assert found.counts()["missing"] == 1
    assert int(np.isnan(joined["x"].values).all(axis=(-1, -2)).sum()) == 1


def test_numbers_by_name_and_single_numbers(tmp_path: Path) -> None:
    found = run(
        cells.named,
        tasks=["gerund"],
        seeds=[0, 1],
        over={"scale": [1.0, 2.0]},
        out=tmp_path / "named",
    )
    assert found.axes == ("task", "seed", "scale")
    assert found.data["score"].sel(task="gerund", seed=1).values.tolist() == [7, 14]
    assert found.data["word"].values.ravel().tolist() == ["ge"] * 4
    assert np.isnan(found.data["none"].values).all()
    joined = sweeps.join(tmp_path / "named", "score")
    assert joined["score"].sel(scale=2.0, seed=0).item() == 12
    one = run(cells.scalar, seeds=range(3), out=tmp_path / "one")
    assert one.data["value"].values.tolist() == [0.1 * seed for seed in range(3)]


def test_infinite_numbers_come_back(tmp_path: Path) -> None:
    def ends(*, seed: int) -> dict[str, float]:
        return {"up": math.inf, "down": -math.inf, "not": math.nan}

    found = run(ends, out=tmp_path)
    assert found.data["up"].item() == math.inf and found.data["down"].item() == -math.inf
    assert math.isnan(found.data["not"].item())


def test_what_a_cell_cannot_return(tmp_path: Path) -> None:
    def listed(*, seed: int) -> Any:
        return {"scores": [1, 2]}

    found = run(listed, out=tmp_path)
    assert "'scores' is a list. For arrays return an xarray.Dataset" in found.failures()["error"][0]


def test_experiments_over_several_tasks_and_studies(tmp_path: Path) -> None:
    groups = {"case": ["to_upper", "to_lower"], "letters": ["to_upper", "next_letter"]}
    found = run(
        "geometry",
        tasks=groups,
        models={"tiny": tiny_model()},
        out=tmp_path / "g",
        n=6,
        n_dev=4,
        layer=1,
    )
    assert found.counts()["done"] == 2, found.failures()["error"].tolist()
    assert found.data["tasks"].values.tolist() == ["case", "letters"]
    one = run(
        "geometry", tasks=["to_upper", "to_lower"], models={"tiny": tiny_model()}, out=tmp_path / "g",
        n=6, n_dev=4, layer=1,
    )  # fmt: skip
    assert one.data["tasks"].values.tolist() == ["to_upper+to_lower"]
    assert one.data["key"].values.ravel()[0] in found.data["key"].values
    study = run("theory", seeds=[0, 1], out=tmp_path / "s", rounds=64)
    assert study.counts()["done"] == 2, study.failures()["error"].tolist()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"experiment": "layer_swep"}, "unknown experiment 'layer_swep'. Nearest: layer_sweep"),
        ({"tasks": ["to_uper"]}, "unknown task 'to_uper'. Nearest: to_upper"),
        ({"tasks": None}, "layer_sweep needs tasks=, at least one"),
        ({"models": None}, "layer_sweep needs models=, at least one"),
        ({"tasks": []}, "needs at least one task"),
        ({"models": []}, "needs at least one model"),
        ({"tasks": ["gerund", "gerund"]}, "each task once; given more than once: gerund"),
        ({"seeds": [1, 1]}, "each seed once; given more than once: 1"),
        ({"shot": 3}, "unknown setting of layer_sweep 'shot'. Nearest: shots"),
        ({"over": {"shots": 3}}, "takes a list of values; got 3"),
        ({"over": {"shots": [3]}, "shots": 4}, "shots is given twice"),
        ({"over": {"shot": [3]}}, "unknown setting of layer_sweep 'shot'"),
        ({"threads": 0}, "threads=0 asked for"),
        ({"on_error": "ignore"}, "unknown on_error 'ignore'"),
        ({"executor": 0}, "executor=0 processes asked for"),
        ({"resume": True}, "there is no sweep in"),
        ({"experiment": "theory"}, "theory takes no model"),
        ({"experiment": cells.scalar, "tasks": None}, "scalar takes no model"),
        ({"over": {"key": [1]}}, "over= takes settings, and 'key' is none"),
        ({"seeds": 2**70}, "a seed must lie between"),
        ({"models": "owner/no-such"}, "the commit of 'owner/no-such' cannot be known here"),
        ({"models": ""}, "unknown model ''"),
    ],
)
def test_mistakes_are_said_before_anything_runs(
    asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {
        "experiment": "layer_sweep",
        "tasks": ["gerund"],
        "models": [tiny_model()],
        "out": tmp_path / "out",
    }
    with pytest.raises(ValueError, match=message):
        run(**{**given, **asked})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"models": [3]}, "a int arrived"),
        ({"executor": "ray"}, "tvlens.executors.Ray"),
        ({"tasks": [3]}, "its name or its file; a int arrived"),
    ],
)
def test_wrong_types_are_said(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {
        "experiment": "layer_sweep",
        "tasks": ["gerund"],
        "models": [tiny_model()],
        "out": tmp_path,
    }
    with pytest.raises(TypeError, match=message):
        run(**{**given, **asked})


def test_resume_says_what_differs(tmp_path: Path) -> None:
    asked = {"tasks": ["gerund"], "seeds": [0], "out": tmp_path}
    run(cells.named, scale=2.0, **asked)
    run(cells.named, scale=2.0, resume=True, **asked)
    with pytest.raises(ValueError, match=r"scale 2.0, asked for is 3.0. Leave resume out"):
        run(cells.named, scale=3.0, resume=True, **asked)
    with pytest.raises(ValueError, match=r"seed \[0\], asked for is \[0, 1\]"):
        run(cells.named, scale=2.0, resume=True, **{**asked, "seeds": [0, 1]})


def _record(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("cells/*/*.json"))))


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return damage


def _forge(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change a document and give it the hash that belongs to the change."""

    def damage(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_bytes(_json(document))

    return damage


def _arrays(path: Path) -> Path:
    return path.with_name(json.loads(path.read_text())["file"]["name"])


DAMAGES = {
    "number": (_edit(lambda d: d.update(seconds=9.0)), "is not what a sweep wrote there"),
    "no number": (_forge(lambda d: d.pop("numbers")), "it has no 'numbers'"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:20]), "holds no JSON, it may be cut off"),
    "empty": (lambda p: p.write_bytes(b""), "holds no JSON"),
    "deep": (lambda p: p.write_text("[" * 100000), "holds no JSON"),
    "list": (lambda p: p.write_text("[1]"), "has no schema"),
    "newer": (_edit(lambda d: d.update(schema=9)), "newer tvlens: schema 9"),
    "kind": (_forge(lambda d: d.update(kind="else")), "is no sweep cell, but 'else'"),
    "other": (_forge(lambda d: d.update(key="ab")), "holds another cell"),
    "outside": (_forge(lambda d: d["file"].update(name="../../secret")), "is not its own"),
    "absolute": (_forge(lambda d: d["file"].update(name="/etc/passwd")), "is not its own"),
    "hash": (_forge(lambda d: d["file"].update(sha256="0" * 64)), "is not its own"),
    "gone": (lambda p: _arrays(p).unlink(), "is missing"),
    "bit": (
        lambda p: _arrays(p).write_bytes(_arrays(p).read_bytes()[:-1] + b"\x00"),
        "is not what was written there",
    ),
    "swapped": (lambda p: _arrays(p).write_bytes(b"#!/bin/sh"), "is not what was written there"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_and_never_a_number(damage: str, tmp_path: Path) -> None:
    run(cells.numbers, tasks=["gerund"], seeds=[0], out=tmp_path, size=4)
    change, message = DAMAGES[damage]
    change(_record(tmp_path))
    with pytest.raises(ValueError, match=message):
        sweeps.collect(tmp_path)
        sweeps.join(tmp_path)
    for again in ("cells", "failed"):
        shutil.rmtree(tmp_path / again, ignore_errors=True)
    assert (
        run(cells.numbers, tasks=["gerund"], seeds=[0], out=tmp_path, size=4).counts()["done"] == 1
    )


def test_a_plan_that_was_changed_is_refused(tmp_path: Path) -> None:
    run(cells.scalar, seeds=[0, 1], out=tmp_path)
    (path,) = tmp_path.glob("plans/*.json")
    path.write_text(path.read_text().replace("[1, 1]", "[7, 1]"))
    with pytest.raises(ValueError, match="is not what a sweep wrote there"):
        sweeps.collect(tmp_path)


def test_files_by_url_are_files(tmp_path: Path) -> None:
    run(cells.scalar, seeds=[0, 1], out=f"file://{tmp_path}/g")
    assert sweeps.collect(tmp_path / "g").counts()["done"] == 2


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no sweep in"):
        sweeps.status(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="kept in a folder"):
        sweeps.collect(tmp_path / "file")
    with pytest.raises(ValueError, match="nosuch"):
        sweeps.collect("nosuch://bucket/x")


def test_an_object_store_holds_the_same(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    asked = {"tasks": ["to_upper", "gerund"], "seeds": [0, 1], "size": 6}
    there, here = run(cells.numbers, out=url, **asked), run(cells.numbers, out=tmp_path, **asked)
    assert there.data["key"].identical(here.data["key"])
    assert sweeps.join(url).identical(sweeps.join(tmp_path))
    assert run(cells.numbers, out=url, resume=True, **asked).counts()["done"] == 4
    failed = run(cells.fails_on_odd, tasks=["gerund"], seeds=[1], out=f"{url}-failed")
    assert failed.counts()["failed"] == 1
    retried = run(cells.fails_on_odd, tasks=["gerund"], seeds=[1], out=f"{url}-failed", retry=True)
    assert retried.counts()["failed"] == 1


def test_arrays_come_back_as_they_were() -> None:
    data = xr.Dataset(
        {
            "number": ("row", np.array([1.5, np.nan])),
            "small": ("row", np.array([1, 2], dtype="float16")),
            "truth": ("row", np.array([True, False])),
            "text": ("row", np.array(["a\0", " ünï👩‍👧"], dtype=object)),
            "scalar": 3,
            "empty": (("row", "none"), np.zeros((2, 0))),
        },
        {"row": ["x", "y"], "note": ("row", [1, 2])},
        {"tvlens": "{}"},
    )
    back = from_bytes(to_bytes(data))
    assert back.identical(data)
    assert [back[n].dtype for n in ("number", "small", "truth")] == ["float64", "float16", "bool"]
    assert set(from_bytes(to_bytes(data), ["number", "nothing"]).variables) == {"number", "row"}
    with pytest.raises(TypeError, match="'when' holds datetime64"):
        to_bytes(xr.Dataset({"when": ("row", np.array(["2020"], dtype="datetime64[ns]"))}))
    for content in (b"", b"\xff" * 40, b"#!/bin/sh\nrm -rf /"):
        with pytest.raises(ValueError, match="no arrays of a sweep"):
            from_bytes(content)


def test_cells_that_do_not_fit_together(tmp_path: Path) -> None:
    def seeds_inside(*, seed: int) -> xr.Dataset:
        return xr.Dataset({"x": ("seed", [1.0, 2.0])}, {"seed": [7, 8]})

    def other_dims(*, seed: int) -> xr.Dataset:
        return xr.Dataset({"x": ("row" if seed else "column", [1.0])})

    def twice(*, seed: int) -> xr.Dataset:
        return xr.Dataset({"x": ("row", [1.0, 2.0])}, {"row": [0, 0]})

    for i, (function, message) in enumerate(
        (
            (seeds_inside, "which is also an axis"),
            (other_dims, "has dimensions"),
            (twice, "a label twice"),
        )
    ):
        run(function, seeds=[0, 1], out=tmp_path / str(i))
        with pytest.raises(ValueError, match=message):
            sweeps.join(tmp_path / str(i))


def test_a_sweep_is_saved_drawn_and_tabled(tmp_path: Path) -> None:
    found = run(
        cells.named,
        tasks=["gerund", "to_upper"],
        seeds=[0, 1],
        over={"scale": [0.01, 0.02]},
        out=tmp_path,
    )
    assert "8 of 8 cells are done; score is" in found.finding()
    assert found.title == "Sweep of named: 2 tasks x 2 seeds x 2 scales"
    back = tv.load(found.save(tmp_path / "sweep.nc"))
    assert isinstance(back, sweeps.Sweep) and back.data["score"].identical(found.data["score"])
    frame = pd.read_parquet(found.to_parquet(tmp_path / "cells.parquet"))
    assert frame.columns[:4].tolist() == ["task", "seed", "scale", "state"] and len(frame) == 8
    assert frame["score"].tolist() == found.data["score"].values.ravel().tolist()
    import pyarrow.parquet as pq

    note = json.loads(pq.read_schema(tmp_path / "cells.parquet").metadata[b"tvlens"])
    assert note["schema"] == 1 and note["experiment"] == "named"
    with pytest.raises(ValueError, match="saved as .parquet"):
        found.to_parquet(tmp_path / "cells.csv")
    drawn = found.plot(value="score", x="scale").data[0].z
    assert np.allclose(drawn, found.data["score"].mean("seed").values)
    title = found.plot().layout.meta["title"]
    mean = found.data["score"].mean("scale")
    assert title.startswith(
        f"Score is {float(mean.mean()):.2f} on average, from {float(mean.min()):.2f} ("
    )
    assert f" to {float(mean.max()):.2f} (" in title
    for channels, message in (
        ({"value": "scor"}, "Nearest: score"),
        ({"x": "sed"}, "Nearest: seed"),
    ):
        with pytest.raises(ValueError, match=message):
            found.plot(**channels)
    assert list(found.tables()["Mean score"].columns) == ["task", "score"]


def test_an_empty_sweep_still_says_something(tmp_path: Path) -> None:
    found = run(cells.fails_on_odd, tasks=["gerund"], seeds=[1], out=tmp_path)
    assert found.finding() == "0 of 1 cells are done, 1 failed."
    assert np.allclose(found.plot().data[0].z, 0)
    assert sweeps.join(tmp_path).sizes == {"task": 1, "seed": 1}
