"""TaskVector: arithmetic, files, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tvlens as tv
from tests import tiny
from tvlens.vectors import TaskVector


def make(
    seed: int = 0, *, prompts: int = 3, layers: int = 4, width: int = 8, **made: object
) -> TaskVector:
    values = torch.randn(prompts, layers, width, generator=torch.Generator().manual_seed(seed))
    return TaskVector(
        values, tuple(range(layers)), made={"model": "m", "processing": "none", **made}
    )


def test_arithmetic() -> None:
    a, b = make(0, task="a"), make(1, task="b")
    torch.testing.assert_close((a + b).values, a.values + b.values)
    torch.testing.assert_close((a - b).values, a.values - b.values)
    torch.testing.assert_close((0.5 * a).values, (a * 0.5).values)
    torch.testing.assert_close((2 * a).values, (a + a).values)
    torch.testing.assert_close((-a).values, -a.values)
    torch.testing.assert_close(
        (a - a.mean()).values.mean(dim=0), torch.zeros(4, 8), atol=1e-6, rtol=0
    )
    assert (a + b).made["task"] == "a + b"
    assert torch.equal(a.at(2), a.values[:, 2]) and torch.equal(a.at(-1), a.values[:, 3])


def test_random_control_keeps_every_norm_and_no_direction() -> None:
    vector = make(width=256)
    control = vector.random_like(seed=11)
    torch.testing.assert_close(control.values.norm(dim=-1), vector.values.norm(dim=-1))
    cosine = torch.cosine_similarity(control.values, vector.values, dim=-1)
    assert cosine.abs().max() < 0.3
    assert torch.equal(control.values, vector.random_like(seed=11).values)
    assert not torch.equal(control.values, vector.random_like(seed=1).values)


def test_file_round_trip(tmp_path: Path) -> None:
    vector = make(task="antonyms", seed_=3)
    again = tv.load(vector.save(tmp_path / "deep" / "v.safetensors"))
    assert isinstance(again, TaskVector)
    assert torch.equal(again.values, vector.values)
    assert (again.layers, again.site, dict(again.made)) == (
        vector.layers,
        vector.site,
        dict(vector.made),
    )
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["v.safetensors"]  # no leftovers


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(0).save(tmp_path / "v.safetensors")
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        make(1).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


def _write(path: Path, values: torch.Tensor, **meta: object) -> Path:
    made = {"schema": 1, "site": "resid_post", "layers": [0], **meta}
    save_file({"values": values}, path, metadata={"tvlens": json.dumps(made)})
    return path


def test_refuses_damaged_and_foreign_files(tmp_path: Path) -> None:
    whole = make().save(tmp_path / "v.safetensors").read_bytes()
    for cut in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "half.safetensors"
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="no readable safetensors file.*cut short"):
            TaskVector.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        TaskVector.load(tmp_path / "absent.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="no task vector saved by tvlens"):
        TaskVector.load(foreign)
    with pytest.raises(ValueError, match="schema 99; this tvlens reads up to 2"):
        TaskVector.load(_write(tmp_path / "new.safetensors", torch.zeros(1, 1, 2), schema=99))
    with pytest.raises(ValueError, match=r"shape \(prompt, layer, d_model\); \(2,\) arrived"):
        TaskVector.load(_write(tmp_path / "flat.safetensors", torch.zeros(2)))
    with pytest.raises(
        ValueError, match="NaN or infinity arrived in 1 of 1 vectors, at layers \\[0\\]"
    ):
        TaskVector.load(_write(tmp_path / "nan.safetensors", torch.full((1, 1, 2), torch.nan)))
    with pytest.raises(ValueError, match="saved as .safetensors; 'v.pt' was asked for"):
        make().save(tmp_path / "v.pt")


def test_refuses_what_does_not_match() -> None:
    a = make()
    for other, message in (
        (make(model="other"), "different model"),
        (make(processing="fold"), "different processing do not add: 'none' and 'fold'"),
        (make(width=9), "different places"),
        (make(prompts=2), "3 and 2 sets of demonstrations do not match"),
    ):
        with pytest.raises(ValueError, match=message):
            a + other
    with pytest.raises(ValueError, match="layer 9 asked for; this vector has layers 0 to 3"):
        a.at(9)
    with pytest.raises(ValueError, match="values of shape .prompt, layer, d_model."):
        TaskVector(torch.zeros(0, 1, 8), (0,))
    with pytest.raises(ValueError, match="layers has 2 numbers for 4 layers"):
        TaskVector(a.values, (0, 1))


def test_refuses_a_model_it_was_not_made_for() -> None:
    model = tiny.model("llama")
    width = model.cfg.d_model
    name = tv.facts(model).name
    TaskVector(torch.zeros(1, 1, width), (0,), made={"processing": "none"}).check(model)
    for vector, message in (
        (
            make(width=width + 1),
            f"width {width + 1} \\(from 'm'\\), but '{name}' has d_model = {width}",
        ),
        (make(width=width, layers=7), "layers 0 to 6 .* has 4 layers"),
        (
            make(width=width, processing="fold"),
            "processing 'fold', but .* 'none'.*processing='fold'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tv.score(
                model,
                tv.build_prompts(tv.load_task("to_upper"), model, n=3),
                vector=vector,
                layer=0,
            )


def test_its_repr_is_one_line_and_shows_no_numbers() -> None:
    vector = TaskVector(
        torch.full((3, 4, 8), 0.125),
        (2, 3, 4, 5),
        "resid_pre",
        {"task": "to_upper", "model": "tiny"},
    )
    assert repr(vector) == (
        "TaskVector(task='to_upper', model='tiny', site='resid_pre', layers 2 to 5, 3 sets of "
        "demonstrations, width 8)"
    )
    assert "layers 2 to 5, 1 set of demonstrations" in repr(vector.mean())
    assert repr(TaskVector(torch.ones(1, 1, 2), (0,))).startswith(
        "TaskVector(task=None, model=None"
    )
