"""What theta says and does: ranks and AUC against their definitions, on answers it cannot have seen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import tvlens as tv
from tests import tiny
from tvlens.engine import run
from tvlens.experiments import decodability as module
from tvlens.experiments._decodability import Decodability
from tvlens.experiments._readout import _areas, advantages
from tvlens.experiments._unseen import HALVES, Settings
from tvlens.experiments.decodability import decodability
from tvlens.lens.tuned import TunedLens
from tvlens.plots.decodability import decode_by_layer, steer_and_decode, word_table
from tvlens.tasks import Task

TASKS = ["to_upper", "char_to_int", "next_letter"]
SETTINGS: dict[str, Any] = {"shots": 2, "n_vectors": 3, "n_dev": 5, "n_test": 6, "progress": False}
HOW = Settings(2, 3, 5, 6, 2, "example", "auto", 0)


@pytest.fixture(scope="module")
def found() -> Decodability:
    return decodability(tiny.model("llama"), TASKS, n_random=4, **SETTINGS)


def test_auc_is_the_chance_of_ranking_higher() -> None:
    rng = np.random.default_rng(0)
    rank = np.stack([rng.permutation(50) for _ in range(3)])
    rank[0, :5] = 7  # ties
    positive = rng.random(50) < 0.3
    negative = ~positive & (rng.random(50) < 0.8)
    ours = advantages(rank, positive, negative)
    for layer in range(3):
        pairs = [
            1.0 if p < n else 0.5 if p == n else 0.0
            for p in rank[layer, positive]
            for n in rank[layer, negative]
        ]
        assert ours[:, layer].mean() == pytest.approx(np.mean(pairs))
    assert advantages(np.arange(50)[None], np.arange(50) < 9, np.arange(50) >= 9).min() == 1
    assert np.isnan(advantages(rank, positive, np.zeros(50, bool))).all()


def test_nothing_asked_for_was_shown(found: Decodability) -> None:
    model = tiny.model("llama")
    for i, name in enumerate(TASKS):
        halves = HOW.halves(model, tv.load_task(name))
        assert len(halves) == HALVES
        for h, half in enumerate(halves):
            shown = {int(t) for b in half.shown.dummies for t in b.tokens[b.mask].unique()}
            first = {part: {ids[0] for ids in p.answer_ids} for part, p in half.asked.items()}
            queries = [q for p in half.asked.values() for q in p.queries]
            assert len(set(queries)) == len(queries)
            # The prompts' own answers share no first token with what is asked.
            own = {ids[0] for ids in half.shown.answer_ids}
            assert not own & (first["dev"] | first["test"])
            at = found.data.isel(task=i, half=h)
            decode = model.tokenizer.decode
            for p, part in enumerate(("dev", "test")):
                asked = at["asked"].isel(part=p).values
                tokens = set(found.data["token"].values[asked].tolist())
                assert tokens == {decode([t]) for t in first[part]}
            hidden = set(found.data["token"].values[at["shown"].values].tolist())
            assert hidden <= {decode([t]) for t in shown}


def test_ranks_are_those_of_the_model_itself(found: Decodability) -> None:
    model = tiny.model("llama")
    theta = tv.extract(model, HOW.halves(model, tv.load_task("to_upper"))[1].shown).mean()
    with torch.no_grad():
        logits = model.unembed(model.ln_final(theta.values))[0]
    ids = {model.tokenizer.decode([i]): i for i in reversed(range(logits.shape[-1]))}
    one = found.data.isel(task=0, half=1)
    for j, token in enumerate(found.data["token"].values.tolist()):
        same = [i for i in range(len(model.tokenizer)) if model.tokenizer.decode([i]) == token]
        above = [(logits > logits[:, [i]]).sum(dim=-1).tolist() for i in same]
        assert one["rank"].values[:, j].tolist() in above, (token, ids[token])


def test_auc_of_every_theta_by_hand(found: Decodability) -> None:
    data = found.data
    for i in range(3):
        for j in range(3):
            rows = []
            for h in range(HALVES):
                free = ~data["shown"].values[i, h]
                positive = data["asked"].values[j, h, 1] & free
                negative = ~data["member"].values[j] & free
                if i != j:  # that theta says its own task proves nothing about another
                    negative &= ~data["member"].values[i]
                rank = data["rank"].values[i, h]
                rows += [
                    np.mean([rank[:, p] < rank[:, n] for n in np.flatnonzero(negative)], axis=0)
                    for p in np.flatnonzero(positive)
                ]
            ours = data["auc"].isel(task=i, other=j).sel(part="test").values
            np.testing.assert_allclose(ours, np.mean(rows, axis=0))
    for name in TASKS:
        own = data["auc"].sel(task=name, other=name, part="test").values
        np.testing.assert_allclose(found.each(name).mean(axis=0), own)


def test_what_theta_says_of_its_own_task_does_not_count_against_another() -> None:
    member = np.repeat(np.eye(3, dtype=bool), 4, axis=1)
    asked = np.broadcast_to(member[:, None, None], (3, HALVES, 2, 12))
    words = {"member": member, "asked": asked, "shown": np.zeros((3, HALVES, 12), dtype=bool)}
    # Each theta has its own answers on top, and says nothing of all others.
    rank = np.broadcast_to((~member).astype(int)[:, None, None], (3, HALVES, 1, 12))
    area = _areas(rank, words)
    for part in range(2):
        assert area[:, :, 0, part].tolist() == (0.5 + 0.5 * np.eye(3)).tolist()


@pytest.mark.slow
def test_two_tasks_have_no_third_one_to_judge_against(tmp_path: Path) -> None:
    found = decodability(tiny.model("llama"), TASKS[:2], n_random=2, **SETTINGS)
    assert found.rates()["auc_other"].isna().all() and "no third task" in found.finding()
    assert "nan" not in found.finding() and found.summary()["auc_other"] is None
    assert tv.load(found.save(tmp_path / "two.nc")).summary() == found.summary()
    assert len(found.figures()) == 3
    data = found.data.copy(deep=True)
    data["rank"].values[:] = np.where(data["member"].values[:, None, None], 0, 9)
    data["auc"].values[[0, 1], [0, 1]], data["auc_random"].values[:] = 1.0, 0.5
    assert Decodability(data).rates()["decodable"].all()


def test_no_accepted_token_is_in_both_halves() -> None:
    letters = [chr(65 + i) for i in range(24)]
    # The second of three accepts the first one's answer, the third of them both.
    answers = {y.lower() * 2: (y, *letters[i - i % 3 : i]) for i, y in enumerate(letters)}
    model, task = tiny.model("llama"), Task("triples", "f", answers, spaced=False)
    for seed in range(5):
        halves = Settings(2, 3, 20, 20, 2, "example", "any", seed).halves(model, task)
        sides = [
            {t for asked in half.asked.values() for ids in asked.answer_ids for t in ids}
            for half in halves
        ]
        assert len(sides[0]) > 5 < len(sides[1]) and not sides[0] & sides[1]
        assert sum(len(asked) for half in halves for asked in half.asked.values()) == 24
        for half, side in zip(halves, sides, strict=True):
            assert not {t for ids in half.shown.answer_ids for t in ids} & side


def test_random_vectors_are_others_for_each_task_and_query(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []

    def record(model: Any, asked: Any) -> Any:
        requests.extend(asked)
        return run(model, asked)

    monkeypatch.setattr(module, "run", record)
    decodability(tiny.model("llama"), TASKS[:2], n_random=1, **SETTINGS)
    drawn = []
    assert len(requests) == 8
    for request in requests:
        n_layers, n = len(request.cells) // 2, len(request.batch.tokens)
        ours, controls = request.cells[1 : 1 + n_layers], request.cells[1 + n_layers :]
        for (own,), (control,) in zip(ours, controls, strict=True):
            values = control.given
            assert len(own.given) == 1 and len(values) == n and control.layer == own.layer
            length = own.given.norm(dim=-1).expand(n)
            torch.testing.assert_close(values.norm(dim=-1), length, rtol=1e-4, atol=1e-5)
            drawn.append(values / values.norm(dim=-1, keepdim=True))
    every = torch.cat(drawn)
    cosine = every @ every.T - torch.eye(len(every))
    assert cosine.abs().max() < 0.8


@pytest.mark.slow
def test_deeds_are_those_of_score() -> None:
    words = [
        w
        for w in dict.fromkeys(tiny.tokenizer("llama").decode([i]).strip() for i in range(370))
        if w
    ]
    rng = np.random.default_rng(0)

    def easy(name: str) -> Task:
        # Half of all words are right: a random model is right now and then. Two groups share none.
        answers = {
            f"{a}{b}": tuple(
                dict.fromkeys(words[i] for i in (k, *rng.permutation(len(words))) if i % 2 == k % 2)
            )
            for k, (a, b) in enumerate((a, b) for a in "pqrstu" for b in "xyzw")
        }
        return Task(name, "f", answers, spaced=False)

    model, tasks = tiny.model("llama"), [easy("one"), easy("two")]
    settings = SETTINGS | {"answers": "any", "n_random": 2}
    result = decodability(model, tasks, **settings)
    how = Settings(2, 3, 5, 6, 2, "example", "any", 0)
    seen = 0
    for task in tasks:
        one = result.data.sel(task=task.name)
        at = 0
        for half in how.halves(model, task):
            theta = tv.extract(model, half.shown).mean()
            for part, n in (("dev", 5), ("test", 6)):
                asked = half.asked[part]
                for layer in range(model.cfg.n_layers):
                    scores = tv.score(model, asked, view="zero_shot", vector=theta, layer=layer)
                    ours = one["steer"].sel(layer=layer).values[at : at + len(asked)]
                    assert ours.tolist() == scores.correct.tolist()
                bare = tv.score(model, asked, view="zero_shot").correct.tolist()
                assert one["bare"].values[at : at + len(asked)].tolist() == bare
                assert one["query"].values[at : at + len(asked)].tolist() == [*asked.queries]
                assert np.isnan(one["bare"].values[at + len(asked) : at + n]).all()
                at += n
        seen += float(one["steer"].mean())
        rate = result.rates().loc[task.name]
        best = int(result.steer_layers().sel(task=task.name))
        test = one.isel(prompt=np.flatnonzero(one["split"] == "test"))
        assert rate["steer"] == pytest.approx(float(test["steer"].sel(layer=best).mean()))
    assert 0 < seen < 2


@pytest.mark.slow
def test_a_vector_that_holds_the_answers_is_decodable_and_shuffled_labels_are_not() -> None:
    """Replace ranks by those of a theta that says its task: only then does the verdict change."""
    rng = np.random.default_rng(1)
    made = decodability(tiny.model("llama"), TASKS, n_random=20, **SETTINGS)
    data = made.data.copy(deep=True)
    verdict = made.rates()
    assert not verdict["decodable"].any() and not verdict["steerable"].any()
    assert abs(made.summary()["auc_random"] - 0.5) < 0.15
    told = data["auc"].values.copy()
    for i in range(3):
        for h in range(HALVES):
            noise = rng.random(data["rank"].shape[2:])
            data["rank"].values[i, h] = (noise - data["member"].values[i]).argsort(-1).argsort(-1)
        told[i, i] = 1.0
    result = Decodability(data.assign(auc=(data["auc"].dims, told)))
    table = result.rates()
    assert (table["auc_low"] == 1).all() and table["decodable"].all()
    shuffled = told[[1, 2, 0]]
    other = Decodability(data.assign(auc=(data["auc"].dims, shuffled)))
    assert other.summary()["auc"] < 0.75


def test_the_share_of_top_tokens_counts_answers_and_words() -> None:
    model = tiny.model("llama")
    theta = [tv.extract(model, h.shown).mean() for h in HOW.halves(model, tv.load_task("to_upper"))]
    small = SETTINGS | {"n_random": 2, "k": 15}
    result = decodability(model, TASKS[:2], words={"to_upper": ["Europe"]}, **small)
    belong = HOW.words(model, tv.load_task("to_upper"), ["Europe"])
    assert {model.tokenizer.decode([i]).strip().lower() for i in belong.labels} <= {"europe"}
    shares = []
    for half, vector in zip(HOW.halves(model, tv.load_task("to_upper")), theta, strict=True):
        seen = {int(t) for b in half.shown.dummies for t in b.tokens[b.mask].unique()}
        with torch.no_grad():
            logits = model.unembed(model.ln_final(vector.values))[0]
        rows = [
            [i for i in row.argsort(descending=True).tolist() if i not in seen][:15]
            for row in logits
        ]
        shares.append([np.mean([i in belong.answers | belong.labels for i in row]) for row in rows])
    ours = result.data["share"].sel(task="to_upper", other="to_upper").values
    np.testing.assert_allclose(ours, np.mean(shares, axis=0), atol=1e-6)
    assert result.provenance["words"]["to_upper"] == ["Europe"]


def test_the_papers_table_keeps_plain_words_once(found: Decodability) -> None:
    tokens = np.array(["foo", " Foo", "b4r", "Bar", "->", " bar", "baz"], dtype=object)
    n = found.data.sizes["place"]
    row = np.concatenate([tokens, np.full(n - len(tokens), "?", dtype=object)])
    wide = np.broadcast_to(row, found.data["top_token"].shape)
    result = Decodability(found.data.assign(top_token=(found.data["top_token"].dims, wide)))
    assert set(result.words()["words"]) == {"foo, Bar, baz"}
    assert result.words(n=1)["words"].iloc[0] == "foo"
    assert (result.words()["layer"] == np.minimum(result.rates()["steer_layer"] + 2, 3)).all()


@pytest.mark.slow
def test_a_tuned_lens_reads_instead(found: Decodability) -> None:
    model = tiny.model("llama")
    same = decodability(model, TASKS, n_random=4, lens=TunedLens.identity(model), **SETTINGS)
    assert same.data["rank"].values.tolist() == found.data["rank"].values.tolist()
    lens = TunedLens(
        torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)),
        torch.zeros(4, 64),
        (0, 1, 2, 3),
    )
    other = decodability(model, TASKS, n_random=4, lens=lens, **SETTINGS)
    assert (other.data["rank"].values != found.data["rank"].values).mean() > 0.5
    assert other.lens == "tuned" and found.lens == "logit" and "tuned lens" in other.finding()
    assert other.data["steer"].equals(found.data["steer"])


def test_same_seed_same_numbers(found: Decodability) -> None:
    again = decodability(tiny.model("llama"), TASKS, n_random=4, **SETTINGS)
    xr.testing.assert_identical(again.data.drop_attrs(), found.data.drop_attrs())
    other = decodability(tiny.model("llama"), TASKS, n_random=4, seed=1, **SETTINGS)
    assert other.data["query"].values.tolist() != found.data["query"].values.tolist()


@pytest.mark.slow
def test_file_round_trip_and_figures(found: Decodability, tmp_path: Path) -> None:
    again = tv.load(found.save(tmp_path / "d.nc"))
    assert isinstance(again, Decodability) and again.finding() == found.finding()
    xr.testing.assert_identical(again.data, found.data)
    assert list(found.figures()) == ["Steerable and decodable", "By layer", "What theta says"]
    assert "2604.02608" in found.cite() and list(found.tables())[1] == "What theta says"
    table = (
        found.rates()
        .reset_index()
        .assign(steerable=[True, True, False], decodable=[True, False, True])
    )
    figure = steer_and_decode(table)
    points = {t.name: t for t in figure.data}
    (lost,) = points["steerable, not decodable"].customdata
    assert lost.startswith("<b>char_to_int</b>")
    # Every point has its name beside it, in its colour.
    named = {
        note.text: note for note in figure.layout.annotations if not note.text.startswith("<i>")
    }
    assert set(named) == set(table["task"])
    for name, row in table.set_index("task").iterrows():
        assert (named[name].x, named[name].y) == (row["auc"], row["steer"])
    assert named["char_to_int"].font.color == points["steerable, not decodable"].marker.color
    assert points["decodable, not steerable"].x[0] == table["auc"].iloc[2]
    assert list(points["other tasks' thetas (mean)"].x) == table["auc_other"].tolist()
    assert "reading" in steer_and_decode(table, x="auc_best").layout.xaxis.title.text
    curves = found.curves()
    panel = decode_by_layer(curves.isel(task=[0]))
    drawn = next(t for t in panel.data if t.name == "decodable (AUC)")
    own = found.data["auc"].sel(task="to_upper", other="to_upper", part="test")
    np.testing.assert_allclose(drawn.y, own)
    for call, message in (
        (lambda: steer_and_decode(table, x="acu"), "unknown x axis 'acu'"),
        (lambda: steer_and_decode(table.drop(columns="steer")), "the table lacks steer"),
        (lambda: decode_by_layer(curves.drop_vars("auc")), "the data lacks auc"),
        (lambda: word_table(table), "the table lacks layer, words"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_input() -> None:
    model = tiny.model("llama")
    two = Task(
        "two",
        "f",
        {f"{a}{b}": ("yes" if a == "a" else "no",) for a in "ab" for b in "cd"},
        spaced=False,
    )
    for arguments, message in (
        ({"tasks": ["to_upper"]}, "at least 2 tasks are needed; 1 arrived"),
        ({"tasks": [two, "to_upper"]}, "2 usable items in the smaller half"),
        ({"k": 0}, "k = 0 top tokens"),
        ({"n_random": 0}, "n_random must be at least 1, got 0"),
        ({"n_vectors": 0}, "n_vectors must be at least 1, got 0"),
        ({"n_dev": 0}, "n_dev must be at least 1, got 0"),
        ({"n_test": -1}, "n_test must be at least 1, got -1"),
        ({"n_dummy": 0}, "n_dummy must be at least 1, got 0"),
        ({"words": {"to_uper": ["big"]}}, "unknown task with words 'to_uper'. Nearest: to_upper"),
        ({"words": {"to_upper": []}}, "at least one word names task 'to_upper'"),
        ({"tasks": ["to_upper", "to_uper"]}, "Nearest: to_upper"),
    ):
        with pytest.raises(ValueError, match=message):
            decodability(model, **({"tasks": TASKS, **SETTINGS} | arguments))
    with pytest.raises(TypeError, match="a list of texts.*'big' arrived for 'to_upper'"):
        decodability(model, TASKS, words={"to_upper": "big"}, **SETTINGS)


@pytest.mark.slow
def test_smollm2_is_steered_by_what_cannot_be_read(smollm2: Any) -> None:
    names = ["to_upper", "gerund", "plural_singular"]
    result = decodability(smollm2, names, n_vectors=5, n_dev=8, n_test=10, progress=False)
    table = result.rates()
    assert table["steerable"].all() and table["steer_random"].max() < 0.1
    # Words of the task come up only layers after the one that steers: the intervals do not meet.
    later = table.loc[["gerund", "plural_singular"]]
    assert not later["decodable"].any() and (later["decode_layer"] > later["steer_layer"]).all()
    assert (later["auc_best_low"] > later["auc_high"]).all()
    assert table.loc[["to_upper", "gerund"], "decodable_best"].all()
