"""The vector store: what is saved is there, from however many processes, and nothing foreign is compared."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tvlens as tv
from tests import tiny
from tvlens.store import COLUMNS, VectorStore
from tvlens.vectors import TaskVector


def make(seed: int = 0, *, width: int = 8, site: str = "resid_post", **made: object) -> TaskVector:
    values = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(seed))
    origin = {"model": "m", "processing": "none", "task": "up", "shots": 5, "seed": seed}
    return TaskVector(values, (0, 1, 2, 5), site, {**origin, **made})


def test_what_is_saved_is_there(tmp_path: Path) -> None:
    store = VectorStore(tmp_path / "new" / "store")
    assert len(store) == 0 and store.list().empty and tuple(store.list().columns) == COLUMNS
    vector = make(0)
    assert store.save(vector, "first") == "first"
    again = store.load("first")
    assert torch.equal(again.values, vector.values)
    assert (again.layers, again.site, again.made) == (vector.layers, vector.site, vector.made)
    assert [p.name for p in store.path.iterdir()] == ["first.safetensors"]
    # Any single file is good without the store, and a file put there by hand is in it.
    assert torch.equal(tv.load(store.path / "first.safetensors").values, vector.values)
    make(1).save(store.path / "by_hand.safetensors")
    assert store.names() == ("by_hand", "first") == tuple(store) and "by_hand" in store
    store.remove("first")
    assert "first" not in store and "1 vectors" in repr(store)


def test_the_default_name_tells_contents_apart(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    name = store.save(make(0, model="Eleuther AI/pythia 70m", task="a + b"))
    assert name.startswith("a-b-pythia-70m-")
    assert store.save(make(0, model="Eleuther AI/pythia 70m", task="a + b")) == name
    assert len(store) == 1
    changed = make(0, model="Eleuther AI/pythia 70m", task="a + b", shots=6)
    assert store.save(changed) != name and len(store) == 2
    half = TaskVector(make(0).values.bfloat16(), (0, 1, 2, 5))
    assert store.load(store.save(half)).values.dtype == torch.bfloat16


def test_list_and_find(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    store.save(make(0), "a")
    store.save(make(1, task="down", shots=None), "b")
    store.save(TaskVector(make(2).values[:, :1], (7,), "mlp_out"), "c")
    table = store.list().set_index("name")
    assert table.loc["a", ["task", "model", "shots", "seed", "d_model", "sets"]].tolist() == [
        "up", "m", 5, 0, 8, 3,
    ]  # fmt: skip
    assert table.loc["c", "layers"] == (7,) and table.loc["c", "site"] == "mlp_out"
    assert store.find(task="up")["name"].tolist() == ["a"]
    assert store.find(shots=5)["name"].tolist() == ["a"]  # and not the two that do not say
    assert store.find(model="m", seed=1)["name"].tolist() == ["b"]
    assert store.find(layer=5)["name"].tolist() == ["a", "b"]
    assert store.find(layers=(7,))["name"].tolist() == ["c"]
    assert store.find(task="none").empty
    with pytest.raises(ValueError, match="unknown column 'tasks'. Nearest: task"):
        store.find(tasks="up")


def test_nearest_is_the_cosine_of_the_means(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    vectors = {f"v{i}": make(i) for i in range(6)}
    for name, vector in vectors.items():
        store.save(vector, name)
    query = 0.5 * vectors["v3"] + 0.1 * vectors["v1"]
    found = store.nearest(query, layer=5, k=6)
    by_hand = {
        name: float(
            torch.cosine_similarity(v.values[:, 3].mean(0), query.values[:, 3].mean(0), dim=0)
        )
        for name, v in vectors.items()
    }
    assert found["name"].tolist() == sorted(by_hand, key=lambda n: -by_hand[n])
    for name, cosine in zip(found["name"], found["cosine"], strict=True):
        assert cosine == pytest.approx(by_hand[name], abs=1e-5)
    # Norm plays no part, sets are averaged, and layers are counted from the end of the query's.
    again = store.nearest(7.0 * query.mean(), layer=-1, k=2)
    assert again["name"].tolist() == found["name"].tolist()[:2] and again["name"][0] == "v3"
    assert store.nearest(vectors["v2"], layer=0, k=1)["cosine"][0] == pytest.approx(1, abs=1e-5)
    # Another layer has another order.
    other = store.nearest(query, layer=0, k=6)["cosine"].tolist()
    assert other != pytest.approx(found["cosine"].tolist(), abs=1e-3)


@pytest.mark.parametrize(
    "foreign",
    [
        {"model": "other"},
        {"processing": "fold"},
        {"width": 16},
        {"site": "mlp_out"},
        {"weights_sha256": "b" * 64},
    ],
)
def test_nearest_refuses_what_cannot_be_compared(
    tmp_path: Path, foreign: dict[str, object]
) -> None:
    store = VectorStore(tmp_path)
    store.save(make(0, weights_sha256="a" * 64), "mine")
    query = make(0, **{"weights_sha256": "a" * 64, **foreign})
    if "model" in foreign:  # the same weights under another name are the same model
        assert store.nearest(query, layer=0)["cosine"][0] == pytest.approx(1, abs=1e-5)
        query = make(0, **foreign)
    with pytest.raises(ValueError, match="nothing in the store .* can be compared"):
        store.nearest(query, layer=0)
    # Next to one of its own it is found, and the foreign one still is not.
    store.save(query, "theirs")
    assert store.nearest(query, layer=0)["name"].tolist() == ["theirs"]


def test_a_store_of_one_model_refuses_others(tmp_path: Path) -> None:
    llama, gemma = tiny.model("llama"), tiny.model("gemma3")
    theta, other, folded = (
        tv.extract(model, tv.build_prompts("to_upper", model, shots=2, n=3))
        for model in (llama, gemma, tiny.model("llama", processing="fold"))
    )
    store = VectorStore(tmp_path, model=llama)
    assert torch.equal(store.load(store.save(theta)).values, theta.values)
    thin = TaskVector(theta.values[..., :8], theta.layers, theta.site, theta.made)
    deep = TaskVector(theta.values, (0, 1, 2, 9), theta.site, theta.made)
    for vector, why in ((folded, "processing 'fold' against 'none'"), (thin, "width 8 against 64"),
                        (other, "model '.*' against '.*'"), (deep, "has 4 layers")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            store.save(vector, "refused")
        with pytest.raises(ValueError, match=why):
            store.nearest(vector, layer=0)
    assert len(store) == 1
    VectorStore(tmp_path).save(other, "guest")  # a store of no one model takes all
    with pytest.raises(ValueError, match=r"vector 'guest' is not of this store's model"):
        store.load("guest")
    assert len(store.nearest(theta, layer=-1)) == 1


WRITER = """
import sys, torch
from tvlens.store import VectorStore
from tvlens.vectors import TaskVector
store, who = VectorStore(sys.argv[1]), int(sys.argv[2])
sys.stdin.readline()
taken = 0
for i in range(40):
    values = torch.full((2, 3, 16), float(100 * who + i + 1))
    store.save(TaskVector(values, (0, 1, 2), made={"task": f"w{who}", "seed": i}), f"w{who}_{i}")
    store.list()
    try:
        store.save(TaskVector(values, (0, 1, 2), made={"task": f"w{who}"}), f"shared_{i}")
        taken += 1
    except ValueError:
        pass
print(taken)
"""


@pytest.mark.slow
def test_two_processes_write_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "store")]
    pipe = subprocess.PIPE
    writers = [
        subprocess.Popen([*command, str(who)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for who in (1, 2)
    ]
    ends = [writer.communicate("go\n", timeout=120) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], ends
    store = VectorStore(tmp_path / "store")
    table = store.list()
    assert (table["problem"] == "").all() and len(table) == 120
    for who in (1, 2):
        assert len(store.find(task=f"w{who}", seed=7)) == 1
        for i in range(40):
            assert store.load(f"w{who}_{i}").values[0, 0, 0] == 100 * who + i + 1
    # Of each shared name exactly one writer has it; the other was told.
    assert sum(int(out) for out, _ in ends) == 40
    assert not [p for p in store.path.iterdir() if p.name.startswith(".")]


KILLED = """
import sys, torch
from tvlens.store import VectorStore
from tvlens.vectors import TaskVector
store, i = VectorStore(sys.argv[1]), 0
while True:
    i += 1
    values = torch.full((2, 3, 4096), float(i))
    name = store.save(TaskVector(values, (0, 1, 2), made={"task": "up"}), f"v{sys.argv[2]}_{i}")
    print(i, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_no_half_vector(tmp_path: Path) -> None:
    store, rng = VectorStore(tmp_path), random.Random(0)
    pipe, saved = subprocess.PIPE, {}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(who)], stdout=pipe, text=True) for who in range(3)]
    for who, writer in enumerate(writers):
        writer.stdout.readline()  # the first is saved; what follows is cut off anywhere
        time.sleep(0.05 * rng.random())
        writer.kill()
        told, _ = writer.communicate()
        saved[who] = max([1, *map(int, told.split())])
    assert (store.list()["problem"] == "").all()
    for who, last in saved.items():
        mine = [name for name in store.names() if name.startswith(f"v{who}_")]
        # What was said to be saved is there, and at most one more.
        assert last <= len(mine) <= last + 1
        for name in mine:
            values = store.load(name).values
            assert values.shape == (2, 3, 4096) and (values == float(name.split("_")[1])).all()


def test_names_taken_wrong_and_unknown(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    store.save(make(0), "upper")
    before = (tmp_path / "upper.safetensors").read_bytes()
    with pytest.raises(ValueError, match="has a vector 'upper' already"):
        store.save(make(1), "upper")
    assert (tmp_path / "upper.safetensors").read_bytes() == before and len(store) == 1
    for name in ("", "a/b", "../up", ".hidden", "up.safetensors", "a b"):
        with pytest.raises(ValueError, match="a vector's name has letters"):
            store.save(make(0), name)
    with pytest.raises(ValueError, match="unknown vector 'uper'. Nearest: upper"):
        store.load("uper")
    with pytest.raises(ValueError, match="unknown vector '../upper'"):
        store.load("../upper")
    with pytest.raises(ValueError, match="unknown vector 'uper'"):
        store.remove("uper")


def test_empty_store_and_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "not_yet"):
        store = VectorStore(path)
        assert store.list().empty and store.find(task="up").empty
        with pytest.raises(ValueError, match="is empty; save"):
            store.load("up")
        with pytest.raises(ValueError, match="is empty; save"):
            store.nearest(make(0), layer=0)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(NotADirectoryError, match="a vector store is a folder"):
        VectorStore(file)


def test_damaged_files_are_named_and_harm_no_other(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    for name in ("good", "short", "void"):
        store.save(make(0), name)
    whole = (tmp_path / "short.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-1])
    (tmp_path / "void.safetensors").write_bytes(b"")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    problems = store.list().set_index("name")["problem"]
    assert problems["good"] == "" and "cut short" in problems["short"]
    assert "cut short" in problems["void"] and "no task vector" in problems["foreign"]
    with pytest.raises(ValueError, match="cut short"):
        store.load("short")
    assert store.find()["name"].tolist() == ["good"]
    assert store.nearest(make(0), layer=0)["name"].tolist() == ["good"]
    store.remove("short")
    assert "short" not in store


def test_changed_numbers_and_changed_origins_are_seen(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    for name in ("good", "number", "origin"):
        store.save(make(0), name)
    path = tmp_path / "number.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    other = tmp_path / "origin.safetensors"
    other.write_bytes(other.read_bytes().replace(b'\\"seed\\": 0', b'\\"seed\\": 1'))
    with pytest.raises(ValueError, match="its numbers are not those that were saved"):
        store.load("number")
    with pytest.raises(ValueError, match="its numbers are not those that were saved"):
        store.nearest(make(0), layer=0)
    # The list reads no numbers, but what it says is what was saved.
    problems = store.list().set_index("name")["problem"]
    assert problems["good"] == "" and "metadata are not those" in problems["origin"]
    assert store.find(seed=1).empty


def test_bad_numbers(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    store.save(make(0), "a")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        store.nearest(make(0), layer=0, k=0)
    with pytest.raises(ValueError, match="layer 3 asked for"):
        store.nearest(make(0), layer=3)
    store.remove("a")
    VectorStore(tmp_path).save(TaskVector(make(0).values[:, :1], (0,), made=make(0).made), "b")
    with pytest.raises(ValueError, match=r"can be compared .*layer 5"):
        store.nearest(make(0), layer=5)


@pytest.mark.skipif(os.name == "nt", reason="a file system without hard links, as on some mounts")
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refused)
    store = VectorStore(tmp_path)
    store.save(make(0), "a")
    with pytest.raises(ValueError, match="already"):
        store.save(make(1), "a")
    assert torch.equal(store.load("a").values, make(0).values)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
