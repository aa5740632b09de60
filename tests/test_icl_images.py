"""Pictures: read or drawn, made into vectors, and never shown in training where they are held out."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tvlens.icl import Data, Plan, Probe, Setting, Transformer, train
from tvlens.icl import features as features_module
from tvlens.icl.features import Features, features
from tvlens.icl.image_data import ImageData
from tvlens.icl.images import Images, omniglot
from tvlens.icl.probes import PROBES, measure
from tvlens.icl.studies import get
from tvlens.icl.studies import images as study_module
from tvlens.icl.studies._images import AUTHORS, ImageSweep
from tvlens.icl.studies.images import images
from tvlens.plots.icl_images import image_errors, image_steps, picture_sheet
from tvlens.results import Result, load


def blobs(n: int = 90, exemplars: int = 6, seed: int = 0) -> Images:
    """Classes of smooth random pictures, exemplars with noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 200, (n, 1, 7, 7)).repeat(2, axis=2).repeat(2, axis=3)
    pixels = (coarse + rng.uniform(0, 50, (n, exemplars, 14, 14))).astype(np.uint8)
    return Images(pixels, tuple(f"blob {i}" for i in range(n)), "blobs")


def rows(x: torch.Tensor) -> set[bytes]:
    """Vectors, by value."""
    return {row.numpy().tobytes() for row in x.reshape(-1, x.shape[-1])}


@pytest.fixture(scope="module")
def table() -> Features:
    return features(blobs(), n_seen=80, n_train=4, d_model=16)


def settings(**changed: Any) -> list[Setting]:
    base: dict[str, Any] = {
        "n_high": 5,
        "n_low": 75,
        "d_model": 16,
        "length": 2,
        "noise": 0.0,
        "n_sequences": 500,
    }
    return [Setting(**(base | {"seed": seed} | changed)) for seed in (0, 1)]


# Omniglot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two alphabets of two characters by four drawers; the place of a black square tells which."""
    image = pytest.importorskip("PIL.Image")
    for i, (part, alphabet) in enumerate((("background", "Greek"), ("evaluation", "Tengwar"))):
        for character in (1, 2):
            home = tmp_path / f"images_{part}" / alphabet / f"character{character:02}"
            home.mkdir(parents=True)
            for drawer in range(1, 5):
                paper = np.ones((105, 105), dtype=bool)
                paper[
                    (i * 2 + character) * 15 : (i * 2 + character + 1) * 15,
                    drawer * 15 : (drawer + 1) * 15,
                ] = False
                image.fromarray(paper).save(home / f"0{i}{character}_{drawer:02}.png")
    return tmp_path


def test_omniglot_reads_every_picture_into_its_place(folder: Path) -> None:
    found = omniglot(folder, size=21, exemplars=4)
    assert found.pixels.shape == (4, 4, 21, 21)
    wanted = {
        "Greek/character01": 1,
        "Greek/character02": 2,
        "Tengwar/character01": 3,
        "Tengwar/character02": 4,
    }
    assert set(found.names) == set(wanted)
    for name, pictures in zip(found.names, found.pixels, strict=True):
        for drawer, picture in enumerate(pictures, 1):
            expected = np.zeros((21, 21), dtype=np.uint8)
            expected[wanted[name] * 3 : wanted[name] * 3 + 3, drawer * 3 : drawer * 3 + 3] = 255
            np.testing.assert_array_equal(picture, expected)
    again, other = (
        omniglot(folder, size=21, exemplars=4),
        omniglot(folder, size=21, exemplars=3, parts="evaluation"),
    )
    assert again.names == found.names and again.digest == found.digest != other.digest
    assert {name.split("/")[0] for name in other.names} == {"Tengwar"}
    assert (
        omniglot(folder, exemplars=2, seed=3).names != omniglot(folder, exemplars=2, seed=0).names
    )


def test_omniglot_takes_torchvisions_root(folder: Path) -> None:
    inner = folder / "omniglot-py"
    inner.mkdir()
    for part in ("images_background", "images_evaluation"):
        (folder / part).rename(inner / part)
    assert len(omniglot(folder, exemplars=4).names) == 4
    assert len(omniglot(inner, exemplars=4).names) == 4


def test_omniglot_says_what_it_expected_and_what_is_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"images_background/ALPHABET/characterNN.*no folder.*Nearest: "
    ):
        omniglot(tmp_path / "omniglott")
    with pytest.raises(FileNotFoundError, match=r"holds Greek\. Nearest: .*\."):
        omniglot(folder / "images_background")
    (folder / "images_evaluation").rename(folder / "eval")
    with pytest.raises(
        FileNotFoundError, match=r"lacks images_evaluation and holds eval.*parts=\('background',\)"
    ):
        omniglot(folder)
    (folder / "images_evaluation.zip").touch()
    with pytest.raises(FileNotFoundError, match=r"Unpack images_evaluation\.zip"):
        omniglot(folder)
    with pytest.raises(ValueError, match="needs 20 pictures.*holds 4. Nearest: exemplars=4"):
        omniglot(folder, parts="background")
    with pytest.raises(
        ValueError, match="unknown part of Omniglot 'backgroud'. Nearest: background"
    ):
        omniglot(folder, parts="backgroud")
    broken = next((folder / "images_background").rglob("*.png"))
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=rf"{broken.name} is no picture"):
        omniglot(folder, parts="background", exemplars=4)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        omniglot(empty)


def test_packages_that_are_missing_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tvlens.icl import glyphs as glyphs_module

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    glyphs_module._distinct.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "tvlens\[images\]"'):
        glyphs_module.glyphs(3)
    for part in ("images_background", "images_evaluation"):
        (tmp_path / part).mkdir()
    with pytest.raises(ImportError, match=r'pip install "tvlens\[images\]"'):
        omniglot(tmp_path)


# Glyphs


@pytest.fixture(scope="module")
def drawn() -> Images:
    if not all(map(importlib.util.find_spec, ("PIL", "matplotlib"))):
        pytest.skip("needs Pillow and matplotlib")
    from tvlens.icl.glyphs import glyphs

    return glyphs(300, exemplars=6)


def test_glyphs_are_a_function_of_seed_class_and_exemplar(drawn: Images) -> None:
    from tvlens.icl.glyphs import glyphs

    fewer = glyphs(40, exemplars=3)
    np.testing.assert_array_equal(fewer.pixels, drawn.pixels[:40, :3])
    assert fewer.names == drawn.names[:40]
    other = glyphs(300, exemplars=1, seed=1)
    assert other.names != drawn.names
    shared = sorted(set(other.names) & set(drawn.names))
    assert shared
    for name in shared[:5]:
        ours, theirs = (
            drawn.pixels[drawn.names.index(name), 0],
            other.pixels[other.names.index(name), 0],
        )
        assert (ours != theirs).any(), name
    flat = drawn.pixels.reshape(300 * 6, -1)
    assert len(np.unique(flat, axis=0)) == len(flat)
    still = glyphs(5, exemplars=3, strength=0.0)
    assert (still.pixels == still.pixels[:, :1]).all()
    assert glyphs(2, exemplars=1, size=105).pixels.shape == (2, 1, 105, 105)


@pytest.mark.slow
def test_glyphs_are_distinct_and_never_the_box_for_what_is_missing(drawn: Images) -> None:
    from tvlens.icl.glyphs import _draw, _font, characters, glyphs

    known = characters()
    assert len(known) >= 1623 and len(set(known)) == len(known)
    # One drawing, three alphabets.
    for alike in ("AΑА", "BΒВ", "HΗН", "oоο", "pрρ", "∑Σ"):
        assert sum(c in known for c in alike) <= 1, alike
    assert "漢" not in known and "\ue000" not in known
    font = _font(64)
    pictures = np.stack([_draw(font, c) for c in known])
    assert len(np.unique(pictures.round(2).reshape(len(known), -1), axis=0)) == len(known)
    box = _draw(font, "\uffff")
    cosine = (
        (pictures * box).sum((1, 2)) / np.linalg.norm(box) / np.linalg.norm(pictures, axis=(1, 2))
    )
    assert cosine.max() < 0.95
    # What counts in the end: a held-out exemplar is told from 299 other classes.
    assert features(drawn, n_train=4).accuracy() > 0.97
    with pytest.raises(ValueError, match=rf"n_classes = 9999 arrived. Nearest: {len(known)}"):
        glyphs(9999)
    with pytest.raises(ValueError, match="strength must lie in 0 to 2"):
        glyphs(3, strength=3.0)
    with pytest.raises(ValueError, match="exemplars must be at least 1; 0"):
        glyphs(3, exemplars=0)


# Features


def test_features_fit_what_training_shows_alone() -> None:
    some = blobs()
    ours = features(some, n_seen=80, n_train=4, d_model=16)
    changed = some.pixels.copy()
    changed[:, 4:] = 255 - changed[:, 4:]
    changed[80:] = 7
    theirs = features(Images(changed, some.names, "changed"), n_seen=80, n_train=4, d_model=16)
    torch.testing.assert_close(ours.trained, theirs.trained, rtol=0, atol=0)
    assert not torch.equal(ours.held_out, theirs.held_out)
    assert ours.digest != theirs.digest
    torch.testing.assert_close(ours.table.norm(dim=-1), torch.ones(90, 6))


def test_discriminant_is_the_generalised_eigenproblem() -> None:
    """Against scipy's solution for both scatter matrices; random classes are the control."""
    linalg = pytest.importorskip("scipy.linalg")
    x = torch.randn(40, 5, 12, generator=torch.Generator().manual_seed(0))
    x = x * torch.linspace(0.2, 3, 12) + torch.randn(
        40, 1, 12, generator=torch.Generator().manual_seed(1)
    )
    x = x - x.mean((0, 1))
    means = x.mean(1, keepdim=True)
    within = ((x - means).reshape(-1, 12).T @ (x - means).reshape(-1, 12) / 200).double().numpy()
    within += 0.01 * np.diag(within).mean() * np.eye(12)
    between = (means[:, 0].T @ means[:, 0] / 40).double().numpy()
    _, vectors = linalg.eigh(between, within)
    found, wanted = features_module._discriminant(x, 3).double().numpy(), vectors[:, -3:]
    angles = linalg.subspace_angles(found, wanted)
    assert angles.max() < 1e-3
    assert (
        linalg.subspace_angles(features_module._principal(x, 3).double().numpy(), wanted).max()
        > 0.1
    )


def test_discriminant_tells_classes_better_than_variance(drawn: Images) -> None:
    by_class, by_variance = (
        features(drawn, n_train=4, kind=kind).accuracy() for kind in ("discriminant", "pca")
    )
    assert by_class > by_variance + 0.02
    mixed = drawn.pixels.reshape(1800, 28, 28)[np.random.default_rng(0).permutation(1800)]
    chance = features(
        Images(mixed.reshape(drawn.pixels.shape), drawn.names, "mixed"), n_train=4
    ).accuracy()
    assert chance < 0.05


def test_accuracy_counts_held_out_exemplars() -> None:
    """Two classes, one of whose held-out vectors lies on the other's side."""
    one, two = torch.tensor([1.0, 0]), torch.tensor([0.0, 1])
    made = torch.stack([torch.stack([one, one, two]), torch.stack([two, two, two])])
    assert Features(made, n_seen=2, n_train=1, digest="").accuracy() == 0.75
    assert np.isnan(Features(made, n_seen=2, n_train=1, digest="").accuracy(novel=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_train": 6}, "1 to 5 can be trained on.*n_train = 6 arrived. Nearest: 5"),
        ({"n_seen": 91, "n_train": 4}, "there are 90 classes; n_seen = 91 arrived. Nearest: 90"),
        ({"n_train": 1}, 'Nearest: n_train=2, or kind="pca"'),
        ({"kind": "pac"}, "unknown kind of features 'pac'. Nearest: pca"),
        (
            {"n_seen": 10, "n_train": 4},
            "10 classes give at most 9 directions; d_model = 64 arrived",
        ),
        ({"d_model": 0}, "d_model must be at least 1; 0 arrived"),
    ],
)
def test_features_refuse(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features(blobs(), **given)


# Data


def test_held_out_exemplars_are_never_in_a_training_batch(table: Features) -> None:
    data = ImageData(settings(), table)
    seen, held = rows(table.trained), rows(table.held_out)
    assert not seen & held
    trained = set()
    for step in range(60):
        trained |= rows(data.batch(torch.tensor(step), 64).inputs)
    assert trained <= seen
    assert len(trained & rows(table.trained[data.order[:, :5].reshape(-1)])) > 30
    index = torch.arange(300).expand(2, -1)
    for probe in PROBES.values():
        split = f"test {probe.name}"
        shown = rows(
            data.items(
                split, index, relevant=probe.relevant, group=probe.group, flipped=probe.flipped
            ).inputs
        )
        assert not shown & seen, probe.name
        assert shown <= (rows(table.table[80:, 4:]) if probe.group == "novel" else held), probe.name
    # All exemplars of both kinds are used.
    assert {row for row in rows(table.trained[data.order[0, 0]])} <= trained


def test_a_label_is_one_class_of_pictures_in_training_and_in_probes(table: Features) -> None:
    data, plain = ImageData(settings(), table), Data(settings())
    place = {row.numpy().tobytes(): i for i, own in enumerate(table.table[:80]) for row in own}
    index = torch.arange(400).expand(2, -1)
    assert not torch.equal(data.order[0], data.order[1])
    for split in ("train", "test"):
        items, same = data.items(split, index), plain.items(split, index)
        for name in ("labels", "target", "own"):
            assert torch.equal(getattr(items, name), getattr(same, name))
        labels = torch.cat([items.labels, items.target[..., None]], dim=-1)
        for member in (0, 1):
            found = [place[row.numpy().tobytes()] for row in items.inputs[member].reshape(-1, 16)]
            assert found == data.order[member, labels[member].reshape(-1)].tolist()
    means = torch.nn.functional.normalize(table.trained.mean(1), dim=-1)
    torch.testing.assert_close(data.prototypes, means[data.order])


@pytest.mark.parametrize("n_novel", [2, 3, 10])
def test_novel_classes_are_in_the_context_where_they_should(n_novel: int) -> None:
    some = features(blobs(80 + n_novel), n_seen=80, n_train=4, d_model=16)
    data = ImageData(settings(length=3), some)
    place = {row.numpy().tobytes(): i for i, own in enumerate(some.table) for row in own}
    for relevant in (True, False):
        items = data.items(
            "test", torch.arange(300).expand(2, -1), relevant=relevant, group="novel"
        )
        for inputs, labels, target in zip(
            *(t.flatten(0, 1) for t in (items.inputs, items.labels, items.target)), strict=True
        ):
            *context, query = [place[row.numpy().tobytes()] for row in inputs]
            assert query >= 80
            shared = [c == query for c in context]
            assert shared == (labels == target).tolist()
            assert any(shared) == relevant


def test_noise_is_added_and_a_member_is_the_same_alone(table: Features) -> None:
    noisy = ImageData(settings(noise=0.3), table)
    clean = ImageData(settings(), table)
    step = torch.tensor(3)
    added = noisy.batch(step, 200).inputs - clean.batch(step, 200).inputs
    assert added.std().item() == pytest.approx(0.3, rel=0.05)
    alone = ImageData(settings(noise=0.3)[1:], table)
    torch.testing.assert_close(
        alone.batch(step, 50).inputs[0], noisy.batch(step, 50).inputs[1], rtol=0, atol=0
    )


def test_data_refuse_what_does_not_fit(table: Features) -> None:
    with pytest.raises(
        ValueError, match=r"fitted on 80 classes; a setting with 5 \+ 70 = 75.*Nearest: n_low=75"
    ):
        ImageData(settings(n_low=70), table)
    with pytest.raises(
        ValueError, match="16 wide; a setting with d_model = 64 arrived. Nearest: d_model=16"
    ):
        ImageData(settings(d_model=64), table)
    bare = ImageData(settings(), features(blobs(80), n_train=4, d_model=16))
    with pytest.raises(ValueError, match="beyond the 80 that are trained on; there are 0"):
        measure(Transformer(), Transformer().initial(bare), bare, [Probe(True, "novel")], n_items=4)


@pytest.mark.slow
def test_predictors_learn_from_context_or_from_weights() -> None:
    """On pictures that training never showed; each is the other's control."""
    share = {"in-context": 1.0, "in-weight": 0.0}
    made = [
        settings(p_relevant=p, length=1, n_sequences=5000, d_model=64)[0] for p in share.values()
    ]
    table = features(blobs(80), n_train=4)
    asked = (Probe(True, "high", flipped=True), Probe(False, "high"))
    plan = Plan(steps=150, probes=asked, n_items=300, lr=1e-3)
    done = train(
        made,
        plan,
        model=Transformer(label_scale=5.0),
        data=ImageData(made, table),
        device="cpu",
        progress=False,
    )
    error = done.measures["error"].isel(step=-1).values
    assert error[0, 0] < 0.1 and error[0, 1] > 0.8
    assert error[1, 0] > 0.9 and error[1, 1] < 0.1


# Study


TINY: dict[str, Any] = {"steps": 6, "seeds": 1, "n_high": 5, "n_low": 75, "n_novel": 10, "n_train": 4,
                        "n_items": 20, "sizes": (100, 200), "trained": ("transformer", "in-context"),
                        "device": "cpu", "progress": False}  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "glyphs", lambda n, *, seed: blobs(n, seed=seed))


@pytest.mark.usefixtures("fake")
@pytest.mark.slow
def test_study_draws_saves_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get("images") is images
    whole = images(**TINY)
    sizes = {"trained": 2, "n_sequences": 2, "seed": 1, "step": 4, "probe": 10}
    assert dict(whole.data["error"].sizes) == sizes
    assert whole.data["sheet"].shape == (40, 2, 14, 14)
    assert "Rare classes, transformer" in whole.finding() and "100 → 200" in whole.finding()
    assert set(whole.figures()) == {"Error over N", "Over steps", "Pictures"}
    whole.save(tmp_path / "r.nc")
    again = load(tmp_path / "r.nc")
    assert (
        isinstance(again, ImageSweep)
        and isinstance(again, Result)
        and again.finding() == whole.finding()
    )
    # Killed after the first measurement: the second run ends with the same numbers.
    real, calls = measure, []

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("tvlens.icl.training.SAVE_EVERY", 0.0)
    monkeypatch.setattr("tvlens.icl.training.measure", stops)
    with pytest.raises(KeyboardInterrupt):
        images(**TINY, out=tmp_path)
    resumed = images(**TINY, out=tmp_path)
    np.testing.assert_array_equal(resumed.data["error"], whole.data["error"])
    np.testing.assert_array_equal(resumed.data["loss"], whole.data["loss"])
    assert len(calls) == 2 + 3
    other = images(**TINY | {"seed": 5}, out=tmp_path)
    assert not np.array_equal(other.data["loss"], whole.data["loss"])
    assert len(list(tmp_path.glob("images-*.safetensors"))) == 2


@pytest.mark.usefixtures("fake")
def test_study_measures_what_training_by_hand_gives() -> None:
    result = images(**TINY | {"trained": "in-context", "sizes": 200, "seeds": 1})
    one = Setting(n_high=5, n_low=75, p_relevant=1.0, noise=0.05, n_sequences=200)
    data = ImageData([one], features(blobs(90), n_seen=80, n_train=4))
    plan = Plan(steps=6, at=(1, 2, 4), n_items=20, lr=1e-3)
    done = train(
        [one], plan, model=Transformer(label_scale=5.0), data=data, device="cpu", progress=False
    )
    np.testing.assert_allclose(
        result.data["loss"].isel(trained=0, n_sequences=0, seed=0).transpose("step", "probe"),
        done.measures["loss"].isel(member=0).transpose("step", "probe"), rtol=1e-5,
    )  # fmt: skip


def test_study_reads_omniglot(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs 20 pictures"):
        images(**TINY, folder=folder)
    with pytest.raises(FileNotFoundError, match="Omniglot is read from"):
        images(**TINY, folder=folder / "none")


@pytest.mark.usefixtures("fake")
def test_study_takes_what_novel_classes_a_folder_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "omniglot", lambda folder, *, seed: blobs(81, seed=seed))
    small = TINY | {"folder": "somewhere", "seeds": 1, "trained": "transformer"}
    found = images(**small | {"n_novel": None})
    assert not any("novel" in probe for probe in found.data["probe"].values)
    with pytest.raises(
        ValueError,
        match="holds 81 classes; 80 common and rare ones and 10 novel ones.*smaller by 9",
    ):
        images(**small)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "papr"}, "unknown preset 'papr'. Nearest: paper"),
        ({"trained": "in-contex"}, "unknown kind of training 'in-contex'. Nearest: in-context"),
        ({"sizes": 50}, "n_sequences = 50 cannot ask for each of 80 classes once"),
        ({"seeds": 0}, "seeds must be at least 1; 0 arrived"),
        ({"steps": 0}, "steps must be at least 1; 0 arrived"),
        ({"p_high": 1.2}, "p_high lies between 0 and 1"),
    ],
)
def test_study_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(**TINY | given)


@pytest.mark.usefixtures("fake")
def test_figures_hold_the_numbers_of_both() -> None:
    result = images(**TINY)
    curves, authors = result.curves(), result.authors()
    fig = image_errors(curves, authors=authors)
    ours = next(t for t in fig.data if t.name == "rare classes" and t.showlegend)
    wanted = list(result.errors().values())
    np.testing.assert_allclose(ours.y, wanted)
    np.testing.assert_allclose(ours.x, 1 + (np.array([100, 200]) - 80) * 0.1 / 75)
    theirs = next(t for t in fig.data if t.name == "the authors: rare classes")
    assert (
        tuple(theirs.y)
        == (0.50, 0.65, 0.98)
        == tuple(AUTHORS["transformer"]["relevant low flipped"].values())
    )
    np.testing.assert_allclose(theirs.x, 1 + (np.array([1e4, 1e5, 1e6]) - 1623) * 0.1 / 1603)
    assert "read off" in fig.layout.meta["subtitle"]
    assert "read off" not in image_errors(curves).layout.meta["subtitle"]
    sheet = picture_sheet(result.data["sheet"])
    z = np.asarray(sheet.data[0].z)
    np.testing.assert_array_equal(z[14:28, 14:28], result.data["sheet"].values[10, 1])
    assert sheet.data[1].customdata[21] == "blob 10<br>held out"
    assert sheet.data[1].x[21] == 21 and sheet.data[1].y[21] == 21
    with pytest.raises(ValueError, match="the curves lack seen"):
        image_errors(curves.drop(columns="seen"))
    with pytest.raises(ValueError, match="unknown measure 'eror'. Nearest: error"):
        image_errors(curves, measure="eror")
    with pytest.raises(ValueError, match="errors need n_sequences, step and probe"):
        image_steps(result.data["error"])
    with pytest.raises(ValueError, match="pictures need class"):
        picture_sheet(result.data["error"])


def test_a_mark_tells_pictures_apart() -> None:
    one = blobs(3)
    changed = one.pixels.copy()
    changed[0, 0, 0, 0] ^= 1
    assert Images(changed, one.names, "x").digest != one.digest == blobs(3).digest
    assert (
        one.digest
        == hashlib.sha256(repr(one.pixels.shape).encode() + one.pixels.tobytes()).hexdigest()[:16]
    )
    with pytest.raises(ValueError, match="3 classes need as many names; 1 arrived"):
        Images(one.pixels, ("a",), "x")
