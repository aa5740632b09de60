"""Cities by heart: scores against brute force, weights that come back, patches that are grafts."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from tests import tiny
from tvlens.encoding import Encoder
from tvlens.icl.studies import get
from tvlens.icl.studies._cities import Cities
from tvlens.icl.studies._cities_data import (
    GROUP,
    WORDINGS,
    Lesson,
    Pairs,
    packaged,
    prompts,
    question,
    told,
)
from tvlens.icl.studies._cities_scoring import corpus_loss, score_candidates
from tvlens.icl.studies._cities_training import copied, finetune, holding, lessons, loss_of
from tvlens.icl.studies._cities_where import (
    HOWS,
    PLACES,
    ROLES,
    Conflicts,
    deltas,
    grafted,
    parts,
    patched,
)
from tvlens.icl.studies.cities import PRESETS, cities
from tvlens.plots.icl_cities import cities_curves, cities_grafts, cities_matrix, cities_patches
from tvlens.results import Result, load

pytestmark = tiny.needs_hooked
SMALL: dict[str, Any] = {
    "n_groups": 0,
    "n_controls": 0,
    "steps": 12,
    "checkpoints": (0, 12),
    "lr": 3e-3,
    "layers": (0, 3),
    "width": 2,
    "n_windows": 1,
    "progress": False,
}


def ignored(step: int) -> None:
    """Measure nothing."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama", "hooked")


@pytest.fixture(scope="module")
def pairs(model: Any) -> Pairs:
    return Pairs.load(Encoder.of(model), n_groups=0, n_controls=1)


@pytest.fixture(scope="module")
def tuned(model: Any, pairs: Pairs) -> dict[str, torch.Tensor]:
    return finetune(
        model,
        lesson=lessons(pairs, "adamw", 0),
        optimizer="adamw",
        lr=3e-3,
        at=(4,),
        measure=ignored,
    )


@pytest.fixture(scope="module")
def found(model: Any) -> Cities:
    return cities(model=model, **SMALL)


def test_pairs_are_half_invented_and_never_twice() -> None:
    listed = packaged()
    assert Counter(listed["groups"]) == {"authors": 1, "own": 6, "control": 2}
    per_group = Counter((group, kind) for *_, kind, group in listed["pairs"])
    assert set(per_group.values()) == {GROUP // 2} and len(per_group) == 2 * len(listed["groups"])
    words = [word for name, city, *_ in listed["pairs"] for word in (name, city)]
    assert len(set(words)) == len(words) == 2 * GROUP * len(listed["groups"])


@pytest.mark.parametrize("wording", WORDINGS)
def test_roles_say_what_tokens_are_for(model: Any, wording: str) -> None:
    batch = Encoder.of(model).batch([told("Liz", "Warsaw", wording)])
    assert batch.text[0].endswith("Where does Liz live? In the city of")
    for place, word in (("stated name", "Liz"), ("stated city", "Warsaw"), ("asked name", "Liz")):
        ids = batch.tokens[batch.roles == int(ROLES[place])]
        assert model.tokenizer.decode(ids).strip() == word, place


def test_whole_answers_are_scored_as_by_plain_forwards(model: Any, pairs: Pairs) -> None:
    rows = [0, 4, 9]
    texts = [
        told(pairs.pairs[i].name, "Oslo", "other") if i else question(pairs.pairs[i].name)
        for i in rows
    ]
    batch, hf = pairs.encoder.batch(texts), tiny.hf("llama")
    likely, greedy = score_candidates(model, batch, pairs.answer_sets(rows))
    for row, i in enumerate(rows):
        prompt = batch.tokens[row][batch.mask[row]].tolist()
        for k, ids in enumerate(pairs.answer_sets([i])[0]):
            with torch.no_grad():
                logits = hf(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            each = logits.log_softmax(-1)[range(len(ids)), ids]
            assert likely[row, k].item() == pytest.approx(each.sum().item(), abs=2e-4)
            assert greedy[row, k] == (logits.argmax(-1) == torch.tensor(ids)).all()
    with pytest.raises(ValueError, match=r"equally many candidates; \[1, 2\] arrived"):
        score_candidates(model, batch.rows(slice(0, 2)), [[(5,)], [(5,), (6,)]])


def test_loss_is_on_answer_tokens_alone(model: Any, pairs: Pairs) -> None:
    lesson = lessons(pairs, "adamw", 0)(0)
    losses = []
    for i in pairs.trained:
        prompt = pairs.encoder.batch([question(pairs.pairs[i].name)]).tokens[0].tolist()
        ids = pairs.answers[i]
        with torch.no_grad():
            logits = tiny.hf("llama")(torch.tensor([[*prompt, *ids]])).logits[
                0, len(prompt) - 1 : -1
            ]
        losses += (-logits.log_softmax(-1)[range(len(ids)), ids]).tolist()
    assert len(losses) == len(lesson.target)
    assert loss_of(model, lesson).item() == pytest.approx(np.mean(losses), abs=1e-4)


def test_lessons_of_arms(pairs: Pairs) -> None:
    assert all(len(lessons(pairs, "sgd", 0)(step).batch) == 1 for step in range(3))
    rehearsed = lessons(pairs, "rehearsed", 0)
    one, again, next_one = rehearsed(3), rehearsed(3), rehearsed(4)
    assert torch.equal(one.batch.tokens, again.batch.tokens)
    assert one.batch.text[GROUP:] != next_one.batch.text[GROUP:]
    # What is stated in rehearsal is a city that no conflict prompt states to these names.
    tested = {pairs.pairs[i].city for i in pairs.trained}
    assert not any(city in text for text in one.batch.text[GROUP:] for city in tested)


def test_one_step_of_sgd_is_the_gradient(model: Any, pairs: Pairs) -> None:
    lesson, before = lessons(pairs, "sgd", 0), copied(model)
    after = finetune(model, lesson=lesson, optimizer="sgd", lr=0.1, at=(1,), measure=ignored)
    with torch.enable_grad():
        weight = model.blocks[2].mlp.W_in
        asked = weight.requires_grad
        (gradient,) = torch.autograd.grad(loss_of(model, lesson(0)), weight.requires_grad_(True))
        weight.requires_grad_(asked)
    name = "blocks.2.mlp.W_in"
    torch.testing.assert_close(after[name], before[name] - 0.1 * gradient)


def test_weights_come_back(model: Any, pairs: Pairs) -> None:
    before = copied(model)
    flags = [p.requires_grad for p in model.parameters()]

    def fails(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(
            model,
            lesson=lessons(pairs, "adamw", 0),
            optimizer="adamw",
            lr=1.0,
            at=(1,),
            measure=fails,
        )
    with pytest.raises(
        ValueError, match=r"ran away by step \d+ at lr = 1e\+30; take a smaller one"
    ):
        finetune(
            model,
            lesson=lessons(pairs, "sgd", 0),
            optimizer="sgd",
            lr=1e30,
            at=(9,),
            measure=ignored,
        )
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_patching_all_tokens_is_grafting_up_to_that_layer(
    model: Any, pairs: Pairs, tuned: dict[str, torch.Tensor]
) -> None:
    """Two ways to the same model; and the way back: base below, fine-tuned above."""
    base, conflicts = copied(model), Conflicts.of(pairs, [0, 5, 9], n_contexts=2, wording="other")
    effects = patched(model, base, tuned, conflicts, layers=(0, 1, 3), tick=lambda: None)
    for k, layer in enumerate((0, 1, 3)):
        heads = ("embed.", *(f"blocks.{i}." for i in range(layer + 1)))
        lower = [name for name in base if name.startswith(heads)]
        for d, (low, high) in enumerate(((tuned, base), (base, tuned))):
            with holding(model, {**high, **{name: low[name] for name in lower}}):
                expected = deltas(model, conflicts)[0]
            torch.testing.assert_close(effects[d, 0, k], expected, atol=2e-3, rtol=1e-3)
    start = deltas(model, conflicts)[0]
    assert (effects[0, 0] - start).abs().max() > 0.1
    # The last token's stream after the last layer is all that is read.
    torch.testing.assert_close(
        effects[:, PLACES.index("last token"), -1], effects[:, 0, -1], atol=2e-3, rtol=1e-3
    )
    torch.testing.assert_close(
        effects[0, PLACES.index("stated city"), -1], start, atol=2e-3, rtol=1e-3
    )


def test_patches_of_a_model_with_itself_change_nothing(model: Any, pairs: Pairs) -> None:
    base, conflicts = copied(model), Conflicts.of(pairs, [1, 8], n_contexts=1)
    effects = patched(model, base, base, conflicts, layers=(1,), tick=lambda: None)
    expected = deltas(model, conflicts)[0].expand_as(effects)
    torch.testing.assert_close(effects, expected, atol=2e-3, rtol=1e-3)


def test_grafts_end_where_the_models_are(
    model: Any, pairs: Pairs, tuned: dict[str, torch.Tensor]
) -> None:
    base, conflicts = copied(model), Conflicts.of(pairs, [0, 5], n_contexts=1)
    grafts = grafted(
        model, base, tuned, conflicts, pairs, [0, 5], width=2, seed=0, tick=lambda: None
    )
    named = parts(model, 2)
    assert grafts.parts == (
        "embedding",
        "layers 0-1",
        "layers 2-3",
        "unembedding",
        "all attention",
        "all MLPs",
        "noise",
    )
    whole = [name for part in list(named)[:4] for name in named[part]]
    assert sorted(whole) == sorted(base)
    with holding(model, tuned):
        end = deltas(model, conflicts)[0]
    torch.testing.assert_close(grafts.delta[HOWS.index("up_to"), 3], end)
    assert grafts.delta[:, 6].isnan().any(dim=1).tolist() == [True, False, True]
    assert (grafts.delta[HOWS.index("only"), 6] - deltas(model, conflicts)[0]).abs().max() > 0


def test_answers_that_begin_alike_are_read_where_they_part(model: Any, pairs: Pairs) -> None:
    conflicts = Conflicts.of(pairs, [0, 3, 4], n_contexts=7)
    assert len(conflicts.batch) == 21 and (conflicts.columns[:, 0] != conflicts.columns[:, 1]).all()
    for row, i in enumerate(conflicts.owner.tolist()):
        stated = (row % 7 + 1 + i) % GROUP
        n = len(
            pairs.encoder.batch([told(pairs.pairs[i].name, pairs.pairs[stated].city)]).tokens[0]
        )
        real = conflicts.batch.tokens[row][conflicts.batch.mask[row]].tolist()
        shared = tuple(real[n:])
        for k, answer in enumerate((pairs.answers[stated], pairs.answers[i])):
            assert answer[: len(shared) + 1] == (*shared, int(conflicts.columns[row, k]))


def test_memorising_moves_from_context_to_weights(found: Cities) -> None:
    """What the tiny model shows: everything known by heart, and log odds that fall."""
    known = found.criteria().set_index("wording").loc["other"]
    assert known["bare"] == 1 and known["falls"] and found.memorised_at("adamw") == 12
    assert np.isnan(known["untouched_change"])
    last = found.rates().query("wording == 'same' and names == 'trained' and step == 12").iloc[0]
    assert last["delta_low"] <= last["delta"] <= last["delta_high"] and last["delta"] < 0


def test_diagonal_is_left_out_and_sides_are_right(found: Cities) -> None:
    one, raw = found.conflicts("adamw", "other"), found.data.sel(arm="adamw", wording="other")
    assert one["delta"].isnull().sum("context").values.tolist() == [[1] * GROUP] * 2
    for name, context in ((2, 5), (7, 0)):
        at = {"name": name, "context": context, "step": 1}
        stated, kept = (float(raw[f"log_prob_{x}"].isel(at)) for x in ("stated", "memorised"))
        assert float(one["delta"].isel(at)) == pytest.approx(stated - kept)
        assert bool(one["follows"].isel(at)) == (int(raw["said"].isel(at)) == context)
        assert bool(one["recalls"].isel(at)) == (int(raw["said"].isel(at)) == name)
    # On the diagonal both are the same city.
    own = raw.isel(name=3, context=3)
    np.testing.assert_allclose(own["log_prob_stated"], own["log_prob_memorised"])


def test_effects_run_from_base_to_tuned(found: Cities) -> None:
    effects = found.effects()
    base, tuned = effects["clean"].values
    whole = effects.sel(how="up_to", part="unembedding")
    assert float(whole["grafted"]) == pytest.approx(tuned, abs=1e-3) and whole["recalled"] == 1
    np.testing.assert_allclose(tuned, found.data["clean"].sel(weights="tuned").mean(), rtol=1e-5)
    last = effects["patched"].sel(place="all tokens", layer=3).values
    assert abs(last[0] - tuned) < abs(last[0] - base) and abs(last[1] - base) < abs(last[1] - tuned)
    assert (effects["patched_low"] <= effects["patched"] + 1e-9).all()
    assert effects["grafted"].sel(how="up_to", part="noise").isnull()
    assert effects["untouched_patched"].isnull().all()


def test_difference_of_real_and_invented(found: Cities) -> None:
    said = xr.where(found.data["kind"] == "real", found.data["context"], found.data["position"])
    data = found.data.assign(
        said=said.broadcast_like(found.data["said"]).transpose(*found.data["said"].dims)
    )
    gap, low, high = Cities(data.assign_attrs(found.data.attrs)).difference("adamw")
    assert (gap, low, high) == (1, 1, 1)


@pytest.mark.slow
def test_saved_and_drawn(found: Cities, tmp_path: Path) -> None:
    again = Result.load(found.save(tmp_path / "cities.nc"))
    assert isinstance(again, Cities) and again.finding() == found.finding()
    assert set(again.figures()) == {"Context against memory", "Matrix", "Patches", "Grafts"}
    assert "untouched" not in found.finding() and found.summary()["memorised_at"] == 12
    assert set(found.tables()) >= {"What the experiment is to show"}
    assert get("cities") is cities


@pytest.mark.slow
def test_killed_half_way_ends_with_the_same_numbers(model: Any, tmp_path: Path) -> None:
    few: Any = SMALL | {
        "steps": 2,
        "checkpoints": (0, 2),
        "wordings": "other",
        "arms": ("sgd", "adamw"),
    }
    few |= {"n_where": 1, "layers": 0, "width": 4}
    whole = cities(model=model, out=tmp_path, **few)
    (tmp_path / "adamw.safetensors").unlink()
    resumed = cities(model=model, out=tmp_path, **few)
    for name in Cities.variables:
        if name in whole.data.data_vars:
            np.testing.assert_array_equal(
                whole.data[name].values, resumed.data[name].values, err_msg=name
            )
    with pytest.raises(ValueError, match="another training: lr differ"):
        cities(model=model, out=tmp_path, **(few | {"lr": 1e-5}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preset": "papr"}, "unknown preset 'papr'. Nearest: paper"),
        ({"arms": "adam"}, "unknown arm 'adam'. Nearest: adamw"),
        ({"wordings": "some"}, "unknown wording 'some'. Nearest: same"),
        ({"n_groups": 7}, "7 groups of own pairs were asked for; there are 6"),
        ({"arms": ("rehearsed",), "n_controls": 0}, "rehearsal states cities of untouched pairs"),
        ({"steps": 5, "checkpoints": (9,)}, "a checkpoint at step 9 of 5. Nearest: 5"),
        ({"n_contexts": 8}, "n_contexts must lie in 1 to 7; 8 arrived. Nearest: 7"),
        ({"lr": -1.0}, "lr must be at least 0; -1.0 arrived"),
        ({"layers": 4}, "this model has 4 layers"),
        ({"n_where": 0}, "n_where must be at least 1"),
        ({"n_windows": 1000}, "1000 arrived"),
    ],
)
def test_bad_settings(model: Any, settings: dict[str, Any], said: str) -> None:
    few: Any = SMALL | {"steps": 1, "checkpoints": 0} | settings
    with pytest.raises(ValueError, match=said):
        cities(model=model, **few)


def test_only_hooked_transformers() -> None:
    with pytest.raises(TypeError, match="a HookedTransformer is needed"):
        cities(model=tiny.model("gpt2", "bridge"), progress=False)


def test_figures_refuse_what_they_cannot_draw(found: Cities) -> None:
    with pytest.raises(ValueError, match="the table lacks bare_written"):
        cities_curves(found.rates().drop(columns="bare_written"))
    with pytest.raises(ValueError, match=r"isel\(name=slice\(0, 8\)\)"):
        cities_matrix(found.conflicts("adamw").isel(name=slice(0, 4)))
    for draw in (cities_patches, cities_grafts):
        with pytest.raises(ValueError, match="the data lacks"):
            draw(xr.Dataset())


def test_presets_have_the_same_settings() -> None:
    assert PRESETS["quick"].keys() == PRESETS["paper"].keys()


def test_prose_loss_is_the_models(model: Any) -> None:
    from tvlens.lens.training import corpus

    ids = torch.tensor([Encoder.of(model).ids(corpus())[:128]])
    with torch.no_grad():
        logits = tiny.hf("llama")(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert corpus_loss(model, n_windows=1) == pytest.approx(expected, abs=1e-4)


def test_lesson_of_unequal_answers(model: Any) -> None:
    encoder = Encoder.of(model)
    lesson = Lesson.of(encoder, [question("Liz"), question("Benjamin")], [(7,), (8, 9, 10)])
    tokens = lesson.batch.tokens
    assert tokens[lesson.row, lesson.column + 1].tolist() == [7, 8, 9, 10]
    assert prompts(encoder, [question("Liz")], [()]).mask.all()


@pytest.mark.slow
def test_smollm2_follows_its_context_before_training(smollm2: Any) -> None:
    """Acceptance criterion A11's premise, and what the pairs promise about tokens."""
    pairs = Pairs.load(Encoder.of(smollm2), n_groups=6, n_controls=2)
    for start in range(0, len(pairs), GROUP):
        assert len({ids[0] for ids in pairs.answers[start : start + GROUP]}) == GROUP
        group = range(start, start + GROUP)
        if pairs.origins[pairs.pairs[start].group] == "authors":
            continue
        lengths = {
            kind: sorted(
                (pairs.n_tokens(p.name), pairs.n_tokens(p.city))
                for p in (pairs.pairs[i] for i in group)
                if p.kind == kind
            )
            for kind in ("real", "invented")
        }
        assert lengths["real"] == lengths["invented"]
    few = dict.fromkeys(range(GROUP))
    for wording in WORDINGS:
        texts = [
            told(pairs.pairs[i].name, city, wording) for i in few for city in pairs.candidates(i)
        ]
        rows = [i for i in few for _ in range(GROUP)]
        likely, _ = score_candidates(smollm2, pairs.encoder.batch(texts), pairs.answer_sets(rows))
        follows = likely.argmax(dim=1) == torch.arange(len(rows)) % GROUP
        off = torch.tensor([i != k % GROUP for k, i in enumerate(rows)])
        # Measured: 1.00 where copying is enough, .84 where it is not.
        assert follows[off].float().mean() >= {"same": 0.9, "other": 0.75}[wording]


@pytest.mark.slow
def test_the_committed_run_meets_its_criteria() -> None:
    """A11 on SmolLM2, 56 pairs: what holds, and what does not."""
    found = load(Path(__file__).parent / "data" / "icl_cities.nc")
    assert isinstance(found, Cities)
    table = found.criteria().set_index(["arm", "wording"])
    assert (table["base_follows"] >= 0.9).all()
    plain = table.loc["adamw"]
    assert (
        (plain["bare"] == 1).all() and plain["falls"].all() and (plain["follows_end"] < 0.4).all()
    )
    # Untouched names should keep within .10: they do where contexts are rehearsed, and not without.
    assert (plain["untouched_change"] < -0.1).all()
    rehearsed = table.loc["rehearsed"]
    assert (rehearsed["bare"] == 1).all() and (rehearsed["untouched_change"].abs() <= 0.1).all()
    assert (rehearsed["follows_end"] > 0.85).all()
