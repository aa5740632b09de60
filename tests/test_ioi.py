"""Contrasts: indirect objects, the page on new circuits, and whether a model does such a task."""

import importlib.util
import itertools
import re
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tvlens import sites
from tvlens.circuits import Behaviour, Contrast, behaviour, ioi_prompts
from tvlens.circuits.ioi import NAMES, ORDERS, TEMPLATES, single_tokens
from tvlens.engine import Edit, LastLogits, Read, Request, layout, packed, run
from tvlens.models.runner import Block, runner
from tvlens.patching.pairs import as_batch
from tvlens.testing import tiny_model

PAGES = Path(__file__).parent.parent / "docs" / "howto"
LETTERS = "ABCDEFGH"


def code(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def words(text: str) -> list[str]:
    return text.replace(",", " ").replace(".", " ").split()


# Data


@pytest.mark.parametrize("corrupted", ["swap", "abc"])
def test_the_answer_is_the_name_said_once(corrupted: str) -> None:
    pairs = ioi_prompts(tiny_model(), n=40, corrupted=corrupted, names=LETTERS)
    assert len(pairs) == 40
    for i in range(40):
        clean, other = words(pairs.clean[i]), words(pairs.corrupted[i])
        io, subject = pairs.labels["io"][i], pairs.labels["subject"][i]
        assert (pairs.answers[i].strip(), pairs.wrong[i].strip()) == (io, subject)
        # A is an article at the start of no sentence here, so every capital letter alone is a name.
        said = [word for word in clean if word in LETTERS]
        assert said.count(io) == 1 and said.count(subject) == 2 and len(said) == 3
        assert (said[0] == io) == (pairs.labels["order"][i] == "ABBA")
        changed = [word for word in other if word in LETTERS]
        if corrupted == "swap":
            assert changed == [*said[:2], io]
        else:
            assert len({*changed, *said}) == 5
        rest = [[w for w in text if w not in LETTERS] for text in (clean, other)]
        assert rest[0] == rest[1]
    assert len(set(pairs.clean)) > 30 and len(set(pairs.labels["template"])) == len(TEMPLATES)
    assert pairs.labels["order"].count("ABBA") == 20


def test_pairs_have_equal_lengths_and_answers_of_one_token() -> None:
    model = tiny_model()
    pairs = ioi_prompts(model, n=8, names=LETTERS)
    tokenizer = model.tokenizer
    for clean, other, answer in zip(pairs.clean, pairs.corrupted, pairs.answers, strict=True):
        ids, changed = (tokenizer(text)["input_ids"] for text in (clean, other))
        assert len(ids) == len(changed) and sum(np.array(ids) != np.array(changed)) == 1
        whole = tokenizer(clean + answer)["input_ids"]
        assert whole[: len(ids)] == ids and len(whole) == len(ids) + 1


def test_the_same_seed_gives_the_same_pairs() -> None:
    first, again, other = (ioi_prompts(tiny_model(), names=LETTERS, seed=s) for s in (1, 1, 2))
    assert first == again and first != other
    settled = ioi_prompts(tiny_model(), n=6, names=LETTERS, template=2, order="BABA")
    assert set(settled.labels["template"]) == {2} and set(settled.labels["order"]) == {"BABA"}
    assert all(text.startswith("After") for text in settled.clean)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_single_tokens_are_single(name: str) -> None:
    tokenizer = tiny.tokenizer(name)
    # Words of the tokenizers' own training text, and names that were not in it.
    asked = ["capital", "Europe", "Michelle", "Elizabeth"]
    found = single_tokens(tiny.model(name, tiny.KINDS[0]), [*asked, "capital"])
    before = tokenizer("They saw", add_special_tokens=False)["input_ids"]
    for word in asked:
        whole = tokenizer(f"They saw {word}", add_special_tokens=False)["input_ids"]
        assert (word in found) == (len(whole) == len(before) + 1), word
    assert found.count("capital") <= 1 and "Elizabeth" not in found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corrupted": "acb"}, "unknown corruption 'acb'. Nearest: abc"),
        ({"order": "ABAB"}, "unknown order 'ABAB'. Nearest"),
        ({"template": 6}, "template 6 asked for; there are 6: 0 to 5"),
        ({"n": 0}, "at least 1; 0 arrived"),
        ({"names": ["Mary", "John", "A"]}, "2 names .* 1 of 3 are, under this tokenizer: A. Give"),
        ({"names": "ABCD", "corrupted": "abc"}, "5 names .* 4 of 4 are"),
    ],
)
def test_what_cannot_be_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ioi_prompts(tiny_model(), **settings)
    assert len(set(NAMES)) == len(NAMES) and set(ORDERS) == {"ABBA", "BABA"}


def test_contrasts_need_equally_many_of_everything() -> None:
    with pytest.raises(ValueError, match="1 clean, 1 corrupted, 2 answers, 1 wrong"):
        Contrast(("a",), ("b",), ("A", "B"), ("C",))
    with pytest.raises(ValueError, match="2 year"):
        Contrast(("a",), ("b",), ("A",), ("C",), labels={"year": (1, 2)})
    with pytest.raises(ValueError, match="at least 1"):
        Contrast((), (), (), ())


# Behaviour


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_behaviour_is_hugging_face_s(name: str, kind: str) -> None:
    model, tokenizer = tiny.model(name, kind), tiny.tokenizer(name)
    # The same words in another order have as many tokens under any tokenizer.
    texts = ("Paris is the capital of", "Rome in Italy is")
    others = ("Paris the is capital of", "Rome is Italy in")
    right, wrong = ((11, 12), 40), (13, (50, 51))
    found = behaviour(model, Contrast(texts, others, right, wrong))
    for side, prompts in (("clean", texts), ("corrupted", others)):
        for i, text in enumerate(prompts):
            tokens = tokenizer(text, return_tensors="pt")["input_ids"]
            bos = tokenizer.bos_token_id
            if tv.facts(model).prepend_bos and bos is not None and int(tokens[0, 0]) != bos:
                tokens = torch.cat([torch.tensor([[bos]]), tokens], dim=1)
            with torch.no_grad():
                logits = tiny.hf(name)(tokens).logits[0, -1]
            good, bad = (torch.atleast_1d(torch.tensor(each[i])) for each in (right, wrong))
            expected = float(logits[good].mean() - logits[bad].mean())
            assert abs(float(found.data["difference"].sel(run=side)[i]) - expected) < 1e-4
            assert bool(found.data["correct"].sel(run=side)[i]) == (int(logits.argmax()) in good)


def test_behaviour_counts_keeps_and_draws(tmp_path: Path) -> None:
    pairs = ioi_prompts(tiny_model(), n=12, names=LETTERS)
    found = behaviour(tiny_model(), pairs)
    clean = found.data["difference"].sel(run="clean")
    means = found.means()
    assert means["preferred"][0] == pytest.approx(float((clean > 0).mean()))
    assert means["difference"][0] == pytest.approx(float(clean.mean()))
    assert means["difference"][1] < means["difference"][0] < means["difference"][2]
    assert list(found.data["io"].values) == list(pairs.labels["io"])
    again = tv.load(found.save(tmp_path / "ioi.nc"))
    assert isinstance(again, Behaviour) and again.finding() == found.finding()
    assert again.title == f"ioi: {tv.facts(tiny_model()).name}"
    assert "wang" in found.cite().lower() and found.summary()["n_prompts"] == 12
    fig = found.plot()
    points = [trace for trace in fig.data if not trace.name.endswith("mean")]
    assert [len(trace.x) for trace in points] == [12, 12]
    assert points[0].customdata[3] == pairs.clean[3]


def test_behaviour_refuses_what_patching_refuses() -> None:
    with pytest.raises(ValueError, match="<- they part"):
        behaviour(tiny_model(), Contrast(("ab",), ("abc",), ("A",), ("B",)))
    with pytest.raises(ValueError, match="both begin with the token"):
        behaviour(tiny_model(), Contrast(("ab",), ("ac",), ("A",), ("A",)))


def test_pairs_go_into_patching() -> None:
    pairs = ioi_prompts(tiny_model(), n=3, names=LETTERS, template=0, order="ABBA")
    found = behaviour(tiny_model(), pairs)
    result = tv.patch(tiny_model(), **pairs, sites="z", by=("layer", "head"))
    for side in ("clean", "corrupted"):
        gap = np.abs(result.data[side] - found.data["difference"].sel(run=side, drop=True))
        assert gap.max() < 1e-5
    # The corrupted prompt of a swap is another pair's clean one: with answers exchanged, signs turn.
    turned = Contrast(pairs.corrupted, pairs.clean, pairs.wrong, pairs.answers)
    assert np.allclose(
        behaviour(tiny_model(), turned).data["difference"].sel(run="clean"),
        -found.data["difference"].sel(run="corrupted"),
        atol=1e-5,
    )


# Pages


@pytest.fixture
def greater() -> ModuleType:
    spec = importlib.util.spec_from_file_location("greater_than", PAGES / "greater_than.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_circuit_of_the_how_to_works(greater: ModuleType) -> None:
    model = tiny_model()
    pairs = greater.greater_than(model, n=8)
    for clean, other, right, wrong, year in zip(
        pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong, pairs.labels["year"], strict=True
    ):
        assert str(year) in clean and other == clean.replace(f"{year} to", "01 to")
        # This tokenizer writes digits one by one: the first one decides, unless it is the same.
        spoken = [sorted(model.tokenizer.decode([i]) for i in ids) for ids in (right, wrong)]
        tens = year // 10
        expected = [[str(d) for d in range(tens + 1, 10)], [str(d) for d in range(tens)]]
        assert spoken == expected
    assert "greater_than" in behaviour(model, pairs).title
    assert tv.patch(model, **pairs, layers=1).data.sizes["prompt"] == 8


def test_two_digits_in_one_token(greater: ModuleType) -> None:
    """A tokenizer that has 00 to 99: every later year is right, every earlier one wrong."""

    class Pairs:
        bos_token_id = None

        def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, list[Any]]:
            if isinstance(text, list):
                return {"input_ids": [self(one)["input_ids"] for one in text]}
            head, tail = text[:-2], text[-2:]
            ids = [
                1000 + ord(c) for c in (head if tail.isdigit() and head[-2:].isdigit() else text)
            ]
            return {"input_ids": [*ids, int(tail)] if len(ids) < len(text) else ids}

    pairs = greater.greater_than(Pairs(), n=5)
    for right, wrong, year in zip(pairs.answers, pairs.wrong, pairs.labels["year"], strict=True):
        assert right == tuple(range(year + 1, 100)) and wrong == tuple(range(year))


def test_site_of_the_how_to_is_hugging_face_s(monkeypatch: pytest.MonkeyPatch) -> None:
    name, shape, arrival, use, _ = code(PAGES / "new_site.md")
    site = eval(name.strip().rstrip(","), {"_site": sites._site})
    monkeypatch.setitem(sites.SITES, site.name, site)
    monkeypatch.setitem(layout.ARRIVAL, *next(iter(eval("{" + arrival + "}").items())))
    for kind in tiny.KINDS:
        of = type(runner(tiny.model("gpt2", kind)))
        scope: dict[str, Any] = {"old": of.site_shape}
        source = f"def site_shape(self, site):\n    cfg = self.cfg\n{indent(shape, '    ')}"
        exec(f"{source}    return old(self, site)", scope)
        monkeypatch.setattr(of, "site_shape", scope["site_shape"])
    for architecture, kind in itertools.product(tiny.ARCHITECTURES, tiny.KINDS):
        check_site(architecture, tiny.model(architecture, kind), use)


def check_site(architecture: str, model: Any, use: str) -> None:
    batch = as_batch(model, ["a->b", "a->b c"])
    scope = {"model": model, "batch": batch, "run": run, "Request": Request, "Read": Read}
    exec(use, scope)
    (length, longer), (read,) = batch.lengths.tolist(), scope["output"].activations
    neuron = read[0, 1, 1, -1].clone()
    edit = Edit("mlp_hidden", 2, -neuron[None], -1)
    asked = Request(batch.rows(slice(1, 2)), cells=((), (edit,)), readout=LastLogits())
    (output,) = run(model, [asked], plan="plain")
    for row, n in enumerate((length, longer)):
        tokens = batch.tokens[row, -n:][None]
        seen, clean = neurons(architecture, tokens, None)
        assert (seen - read[0, row, 1, :n]).abs().max() < 1e-4
    _, turned = neurons(architecture, tokens, -neuron)
    for cell, expected in enumerate((clean, turned)):
        assert (output.values["logits"][cell, 0] - expected).abs().max() < 1e-4
    assert (clean - turned).abs().max() > 1e-2


def neurons(name: str, tokens: torch.Tensor, last: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain Hugging Face: the neurons of layer 2, and the logits, with those of the last token written."""
    model, seen = tiny.hf(name), []
    places = {"gpt2": "transformer.h.2.mlp.c_proj", "pythia": "gpt_neox.layers.2.mlp.dense_4h_to_h"}

    def hook(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        seen.append(args[0][0].clone())
        if last is not None:
            args[0][0, -1] = last
        return args

    place = model.get_submodule(places.get(name, "model.layers.2.mlp.down_proj"))
    handle = place.register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = model(tokens).logits[0, -1]
    handle.remove()
    return seen[0], logits


def test_pages_name_what_there_is() -> None:
    named = [
        path
        for page in ("new_site.md", "new_circuit.md")
        for path in re.findall(
            r"`((?:tvlens|tests)/[\w/]+\.py)`", (PAGES / page).read_text("utf-8")
        )
    ]
    assert len(named) > 8 and all((PAGES.parents[1] / path).is_file() for path in named), named
    assert "resid_mid" in layout.ARRIVAL and set(layout.ARRIVAL) == set(sites.SITES)
    assert set(layout._EARLY) <= set(sites.SITES) and Block.mlp_out and packed._Pass.block


@pytest.mark.slow
def test_code_of_the_page_on_circuits_runs(greater: ModuleType) -> None:
    scope: dict[str, Any] = {"model": tiny_model(), "greater_than": greater.greater_than}
    blocks = code(PAGES / "new_circuit.md")
    assert len(blocks) == 3
    for block in blocks:
        exec(block.replace("400", "40"), scope)  # this model has 82 edges
    assert "preferred" in scope["found"].finding()
    assert scope["alone"].data["chosen_by"].values.tolist() == ["eap-ig, greedy", "random"]


# A real model


@pytest.mark.slow
def test_indirect_objects_in_a_real_model(smollm2: Any, greater: ModuleType) -> None:
    assert single_tokens(smollm2, NAMES) == NAMES
    found = behaviour(smollm2, ioi_prompts(smollm2, n=24))
    means = found.means()
    assert means["difference"][1] > 2 and means["preferred"][1] > 0.7
    assert means["corrupted"][2] < -2  # with the other name said again, the answer turns
    neither = behaviour(smollm2, ioi_prompts(smollm2, n=24, corrupted="abc")).means()
    assert abs(neither["corrupted"][0]) < 1.5
    later = behaviour(smollm2, greater.greater_than(smollm2, n=16)).means()
    assert later["preferred"][1] > 0.7 and later["difference"][1] > 1 > later["corrupted"][2]


@pytest.mark.slow
def test_the_circuit_of_the_page_in_a_real_model(smollm2: Any, greater: ModuleType) -> None:
    pairs, held_out = (greater.greater_than(smollm2, n=8, seed=seed) for seed in (0, 1))
    scores = tv.edge_scores(smollm2, **pairs, method="eap-ig")
    found = [tv.circuit(scores, n_edges=400, method=method) for method in ("greedy", "random")]
    kept = tv.faithfulness(smollm2, found, **held_out).mean()["faithfulness"]
    assert 0.5 < float(kept["mean"][0]) < 0.7 and abs(float(kept["mean"][1])) < 0.05


@pytest.mark.slow
def test_the_map_of_indirect_objects_in_a_real_model(smollm2: Any) -> None:
    pairs = ioi_prompts(smollm2, n=4, template=0, order="ABBA")
    result = tv.patch(smollm2, **pairs, layers=[0, 10, 27])
    share = result.mean("normalized", n_resamples=10)["mean"].sel(site="resid_pre")
    ids = smollm2.tokenizer(list(pairs.clean))["input_ids"]
    other = smollm2.tokenizer(list(pairs.corrupted))["input_ids"]
    (at,) = np.flatnonzero((np.array(ids) != np.array(other)).any(axis=0))
    last = len(ids[0]) - 1
    # The repeated name tells the answer below, the last token above; and nothing before it does.
    assert float(share.sel(layer=0, position=at)) > 0.99
    assert float(share.sel(layer=10, position=last)) < 0.1
    assert float(share.sel(layer=27, position=last)) > 0.8
    assert float(share.sel(layer=27, position=at)) < 0.2
    assert float(np.abs(share.sel(position=slice(0, at - 1))).max()) < 1e-4
