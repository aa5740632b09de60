"""Prompts: text, tokens, roles, splits, seeds and first tokens."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import tvlens as tv
from tests import tiny
from tvlens.encoding import Encoder, first_tokens, settle
from tvlens.prompts import build_prompts
from tvlens.tasks import Task
from tvlens.templates import Role, Template, get_template

TOKENIZERS = ("gpt2", "llama", "gemma3")


def toy_task(n: int = 20, *, spaced: bool = False) -> Task:
    return Task(
        name="toy",
        family="custom",
        answers={f"q{chr(97 + i)}": (f"r{chr(97 + i)}",) for i in range(n)},
        spaced=spaced,
    )


def test_the_default_text_is_the_papers() -> None:
    task = Task(
        name="t",
        family="f",
        answers={"a": ("A",), "b": ("B",), "c": ("C",), "d": ("D",)},
        spaced=False,
    )
    prompts = build_prompts(task, tiny.model("gpt2"), shots=1, n=1, n_dummy=1)
    (text,) = prompts.text
    demo, query = text.split("\n")
    x, y = demo.removeprefix("example:").split("->")
    assert y == x.upper()
    assert query == f"example:{prompts.queries[0]}->"
    assert prompts.zero_shot.text == (query,)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_tokens_spell_the_text_and_bos_is_the_models(name: str) -> None:
    model = tiny.model(name)
    prompts = build_prompts(toy_task(), model, shots=3, n=6)
    bos = tv.facts(model).prepend_bos
    assert prompts.facts["bos"] is bos
    for batch in (prompts.regular, prompts.zero_shot, *prompts.dummies):
        for text, tokens, mask, roles in zip(
            batch.text, batch.tokens, batch.mask, batch.roles, strict=True
        ):
            ids = tokens[mask].tolist()
            assert (ids[0] == model.tokenizer.bos_token_id) is bos
            assert (roles[mask][0].item() == Role.BOS) is bos
            assert ids[bos:] == model.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert not mask[: int((~mask).sum())].any()  # pads stand on the left
            assert roles[-1] == Role.LAST


def test_roles_follow_the_text() -> None:
    model = tiny.model("gpt2")
    prompts = build_prompts(toy_task(), model, shots=2, n=3)
    for text, tokens, roles in zip(
        prompts.text, prompts.tokens, prompts.regular.roles, strict=True
    ):
        spoken: dict[Role, str] = {}
        for token, role in zip(tokens.tolist(), roles.tolist(), strict=True):
            if role != Role.PAD:
                spoken[Role(role)] = spoken.get(Role(role), "") + model.tokenizer.decode([token])
        demos = [line.removeprefix("example:").split("->") for line in text.split("\n")[:-1]]
        assert spoken[Role.DEMO_INPUT] == "".join(x for x, _ in demos)
        assert spoken[Role.DEMO_OUTPUT] == "".join(y for _, y in demos)
        assert spoken[Role.SEPARATOR].count("->") >= len(demos)
        assert spoken[Role.QUERY] in text.split("\n")[-1]


@pytest.mark.parametrize("seed", range(4))
def test_queries_dummies_and_demonstrations_never_meet(seed: int) -> None:
    task, model = toy_task(9), tiny.model("gpt2")
    split = {
        s: build_prompts(task, model, shots=5, n=40, split=s, seed=seed) for s in ("dev", "test")
    }
    assert not set(split["dev"].queries) & set(split["test"].queries)
    assert set(split["dev"].queries) | set(split["test"].queries) == set(task.inputs)
    for prompts in split.values():
        counts = [prompts.queries.count(x) for x in set(prompts.queries)]
        assert max(counts) - min(counts) <= 1  # queried evenly
        for row, query in enumerate(prompts.queries):
            *demos, last = prompts.text[row].split("\n")
            shown = {d.removeprefix("example:").split("->")[0] for d in demos}
            dummies = [d.text[row].split("\n")[-1][len("example:") : -2] for d in prompts.dummies]
            assert len(shown) == 5 and last == f"example:{query}->"
            assert query not in shown and query not in dummies
            assert len(set(dummies)) == 2 and not shown & set(dummies)
            assert all(d.text[row].startswith("\n".join(demos)) for d in prompts.dummies)


@pytest.mark.slow
def test_prompts_depend_on_the_seed_alone() -> None:
    code = (
        "import tvlens as tv; from tvlens.testing import tiny_model; "
        "print(tv.build_prompts(tv.load_task('antonyms'), tiny_model(), n=5, seed=3).text)"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**__import__("os").environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    one, other = (build_prompts(toy_task(), tiny.model("gpt2"), n=5, seed=s).text for s in (0, 1))
    assert one != other


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["example", "arrow", "qa"])
@pytest.mark.parametrize("spacing", ["always", "never"])
def test_first_tokens_are_what_the_model_would_have_to_say(
    name: str, template: str, spacing: str
) -> None:
    """Prompt + answer, tokenised as one text, continues the prompt with the accepted token."""
    encoder = Encoder.of(tiny.tokenizer(name))
    task = toy_task(8, spaced=True)
    made = settle(task, replace(get_template(template), spacing=spacing), encoder)
    found = first_tokens(task, made, encoder)
    assert found.blank == ()
    for x, y in task.pairs:
        prompt, lead = made.query(x)
        head, whole = encoder.ids(prompt), encoder.ids(prompt + lead + y)
        assert whole[: len(head)] == head, "these tokenizers split here"
        assert whole[len(head)] == found.ids[x][0]
        assert encoder.tokenizer.decode(whole[len(head) :]).strip() == y
        assert (prompt + lead + y).endswith(made.pieces[1] + y)


def test_a_space_that_is_a_token_of_its_own_stays_in_the_prompt() -> None:
    """Tokenizers that split digits write the space before them apart: it is right for no answer."""
    from tvlens.testing import tiny_tokenizer

    encoder = Encoder.of(tiny_tokenizer())
    task = Task(name="count", family="f", answers={f"x{i}": (str(i),) for i in range(9)})
    made = settle(task, get_template("qa"), encoder)
    assert made.lead == "prompt" and made.query("x1") == ("Q: x1\nA: ", "")
    found = first_tokens(task, made, encoder)
    assert [encoder.tokenizer.decode(list(ids)) for ids in found.ids.values()] == list("012345678")
    prompts = build_prompts(task, tiny_tokenizer(), shots=2, n=4, template="qa")
    assert all(text.endswith("A: ") for text in prompts.text)
    assert settle(task, Template(), encoder).spacing == "never"


def test_ambiguous_first_tokens_are_reported() -> None:
    from tvlens.testing import tiny_tokenizer

    encoder = Encoder.of(tiny_tokenizer())  # one token a character
    places = {"x": ("Asia",), "y": ("Africa",), "z": ("Europe",), "w": ("Asia",)}
    task = Task(name="places", family="f", answers=places, spaced=False)
    found = first_tokens(task, Template(), encoder)
    assert found.ambiguous == {"A": ["Asia", "Africa"]}
    assert found.ambiguous_share == 0.75
    assert encoder.tokenizer.decode([found.constant]) == "A"
    assert found.one_token == ()


def test_spacing_follows_the_task_unless_told() -> None:
    encoder = Encoder.of(tiny.tokenizer("gpt2"))

    def spacing(template: Template, answers: tuple[str, ...], *, spaced: bool = True) -> str:
        items = {f"x{i}": (a,) for i, a in enumerate(answers)}
        task = Task(name="t", family="f", answers=items, spaced=spaced)
        return settle(task, template, encoder).spacing

    words = tuple(w for w in ("is", "the", "capital", "of") if len(encoder.ids(f" {w}")) == 1)
    letters = tuple("abcdefgh")
    assert len(words) >= 3
    assert spacing(Template(), words) == "always"
    assert spacing(Template(), words, spaced=False) == "never"
    assert spacing(Template(spacing="always"), words, spaced=False) == "always"
    assert spacing(Template(spacing="never"), words) == "never"
    # One word in ten has one token with a space, all have one without: 70 % is not reached.
    odd = tuple(c for c in "QXZ#%&@!$=" if len(encoder.ids(f" {c}")) > 1)
    assert len(odd) >= 5 and spacing(Template(), (*odd, letters[0])) == "never"
    assert Template(spacing="always").query("x") == ("example: x->", " ")
    assert Template("Q: {x}\nA: {y}\n").query("x") == ("Q: x\nA:", " ")


def test_bare_tokenizers_decide_on_bos_themselves() -> None:
    for name in TOKENIZERS:
        tokenizer = tiny.tokenizer(name)
        prompts = build_prompts(toy_task(), tokenizer, n=2)
        adds = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id is not None
        assert prompts.facts["bos"] == bool(adds)


def test_rows_drop_needless_padding() -> None:
    batch = build_prompts(toy_task(), tiny.model("gpt2"), n=6).regular
    part = batch.rows(slice(2, 3))
    assert part.mask.all() and len(part) == 1
    assert torch.equal(part.tokens[0], batch.tokens[2][batch.mask[2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"shots": 18},
            "has 20 usable items of 20, but 18 shots .* 2 dummy queries need 21.*at most 17 shots",
        ),
        ({"split": "tset"}, "unknown split 'tset'. Nearest: test"),
        ({"template": "exmple"}, "unknown template 'exmple'. Nearest: example"),
        ({"template": "{x} is"}, "needs one {x} and, after it, one {y}"),
        ({"n": 0}, "n >= 1"),
        (
            {"template": "x" * 2000 + "{x}->{y}\n"},
            "a prompt has \\d+ tokens, but the model's context is",
        ),
    ],
)
def test_says_what_is_wrong(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_prompts(toy_task(), tiny.model("gpt2"), **arguments)


def test_a_model_without_a_tokenizer() -> None:
    class Bare:
        cfg = object()
        tokenizer = None

    with pytest.raises(ValueError, match="no tokenizer"):
        build_prompts(toy_task(), Bare())


def test_templates_written_out() -> None:
    assert get_template("Q: {x}\\nA: {y}\\n").demo == "Q: {x}\nA: {y}\n"
    with pytest.raises(ValueError, match="unknown spacing"):
        Template(spacing="perhaps")


def test_fragments_of_an_answer_do_not_count() -> None:
    """The first piece of another accepted answer, or of the other spacing, is right for anything."""
    encoder = Encoder.of(tiny.tokenizer("gpt2"))
    words = ["running", "walked", "cats", "houses", "happy", "zzyzx", "qqq"]
    answers = {f"x{i}": (w, "zqx") for i, w in enumerate(words)}
    task = Task(name="t", family="f", answers=answers)
    assert len(encoder.ids("zqx")) > 1 and len(encoder.ids(" zqx")) > 1
    for spacing in ("never", "always"):
        found = first_tokens(task, Template(spacing=spacing), encoder)
        for x, y in task.pairs:
            here = encoder.ids(f" {y}" if spacing == "always" else y)
            assert found.ids[x][0] == here[0]
            assert all([i] in (encoder.ids(f" {y}"), encoder.ids(y)) for i in found.ids[x][1:])
            assert (x in found.one_token) == (len(here) == 1)


def test_items_with_one_token_answers_are_kept_where_they_are_most() -> None:
    model = tiny.model("gpt2")
    letters = {f"q{c}": (c,) for c in "abcdefghijklmnop"}  # one token each
    long = {f"r{c}": (f"zx{c}qj",) for c in "abcd"}
    most = Task(name="m", family="f", answers=letters | long, spaced=False)
    few = Task(
        name="f", family="f", answers={**dict(list(letters.items())[:3]), **long}, spaced=False
    )
    kept = build_prompts(most, model, n=40, shots=2)
    assert (kept.facts["answers"], kept.facts["n_items"]) == ("one_token", 16)
    assert set(kept.queries) <= set(letters) and kept.facts["one_token_share"] == 0.8
    assert not any("zx" in text for text in kept.text)
    every = build_prompts(most, model, n=40, shots=2, answers="any").facts
    assert (every["answers"], every["n_items"]) == ("any", 20)
    assert build_prompts(few, model, n=4, shots=2).facts["answers"] == "any"
    assert (
        build_prompts(few, model, n=2, shots=0, n_dummy=1, answers="one_token").facts["n_items"]
        == 3
    )
    with pytest.raises(ValueError, match="unknown answers 'all'"):
        build_prompts(most, model, answers="all")
    with pytest.raises(
        ValueError, match="0 of the 4 answers of task 'l' are usable as answers='one_token'"
    ):
        build_prompts(Task(name="l", family="f", answers=long), model, answers="one_token")


def test_what_is_no_model_and_no_tokenizer_is_refused() -> None:
    with pytest.raises(
        TypeError, match="a TransformerLens model or a tokenizer is needed; str arrived"
    ):
        build_prompts("to_upper", "gpt2")
    assert build_prompts("to_upper", tiny.model("gpt2"), n=2).facts["task"] == "to_upper"
