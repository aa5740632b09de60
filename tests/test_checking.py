"""`tvlens.check_model`: sound models pass, and one that is broken in one way fails that check alone."""

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tvlens as tv
from tests import tiny
from tvlens.checking import CHECKS, Measured, ModelCheck, NotApplicable, check, check_model
from tvlens.checking import memory as of_memory
from tvlens.checking import subject as of_subject
from tvlens.checking import text as of_text
from tvlens.engine.costs import costs
from tvlens.models import UnsupportedModelError
from tvlens.models.bridge.hooks import hook_point
from tvlens.models.runner import runner
from tvlens.plots.checking import check_dots
from tvlens.testing import tiny_model

Damage = Callable[[Any, pytest.MonkeyPatch], AbstractContextManager[Any] | None]


@cache
def two_layers() -> Any:
    """A Llama as small as can be broken in every way."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def own_copy(kind: str, **settings: Any) -> Any:
    """A model that a test may change."""
    tokenizer = copy.deepcopy(tiny.tokenizer("llama"))
    settings = {"device": "cpu", "backend": kind, **settings}
    return tv.load_model(copy.deepcopy(two_layers()), tokenizer=tokenizer, **settings)


def hooked(model: Any, site: str, layer: int, function: Callable[..., Any]) -> Any:
    drive = runner(model)
    return drive.hooked([(drive.hook_name(site, layer), function)])


def point(model: Any, site: str, layer: int) -> Any:
    return hook_point(model, runner(model).hook_name(site, layer))


def called(point: Any, call: Callable[..., Any]) -> None:
    """Give one hook point another way of being called; ``call`` gets the usual way first."""
    usual = type(point).__call__
    point.__class__ = type(
        "Changed",
        (type(point),),
        {"__call__": lambda self, x: call(lambda y: usual(self, y), self, x)},
    )


def nan_weight(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    next(p for n, p in model.named_parameters() if "mlp" in n and p.ndim > 1).data[0, 0] = torch.nan


def noise(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    return hooked(model, "resid_post", 1, lambda x, hook: x + torch.randn_like(x))


def refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> None:
        raise UnsupportedModelError("no such blocks.")

    monkeypatch.setattr(of_subject, "runner", refuse)


def hook_that_never_fires(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called(point(model, "q", 1), lambda usual, self, x: x)


def hook_on_a_copy(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(usual: Any, self: Any, x: Any) -> Any:
        usual(x.clone())
        return x

    called(point(model, "mlp_out", 1), deaf)


def hook_that_changes_when_looked_at(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = point(model, "q", 1)
    before = len(there._forward_hooks)
    called(
        there,
        lambda usual, self, x: usual(x) * (1.5 if len(self._forward_hooks) > before else 1.0),
    )


def scaled_logits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.unembed.register_forward_hook(lambda module, given, out: 1.1 * out)


def row_by_row(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def add(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x + torch.arange(len(x)).to(x)[:, None, None]

    return hooked(model, "resid_post", 1, add)


def wrong_parts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = runner(model)
    with torch.no_grad():
        # Measured before the parts go wrong, so that the engine takes them for right.
        costs(drive)
    parts = type(drive.block(0))
    usual = parts.mlp_out
    monkeypatch.setattr(parts, "mlp_out", lambda self, resid: 1.01 * usual(self, resid))


def nameless_bias(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    bias = torch.linspace(-1, 1, model.cfg.d_model)
    return hooked(model, "resid_pre", 1, lambda x, hook: x + bias)


def no_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_memory, "free_memory", lambda device: 10)


def tokens_too_many(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.tokenizer.add_tokens([f"extra{i}" for i in range(200)])


def two_bos(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.cfg.tokenizer_prepends_bos = False


def no_bos(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.cfg.default_prepend_bos = False


def bos_of_its_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = type(model.tokenizer)

    class Eager(usual):
        def __call__(self, text: Any, **settings: Any) -> Any:
            return super().__call__(text, **settings | {"add_special_tokens": True})

    model.tokenizer.__class__ = Eager


def lower_case(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import normalizers

    core = model.tokenizer.backend_tokenizer
    before = [] if core.normalizer is None else [core.normalizer]
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])


def no_one_token_answers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_text, "PAPER_TASKS", ("en_es", "location_religion"))


BROKEN: tuple[tuple[str, Damage], ...] = (
    ("finite", nan_weight),
    ("supported", refused),
    ("repeatable", noise),
    ("hook_names", hook_that_never_fires),
    ("hooks_live", hook_on_a_copy),
    ("self_patch", hook_that_changes_when_looked_at),
    ("last_lens", scaled_logits),
    ("padding", row_by_row),
    ("plans", wrong_parts),
    ("attribution", nameless_bias),
    ("memory", no_memory),
    ("vocabulary", tokens_too_many),
    ("bos", two_bos),
    ("bos", no_bos),
    ("bos", bos_of_its_own),
    ("round_trip", lower_case),
    ("one_token", no_one_token_answers),
)
# What a kind of model may get wrong by its own way of hooking; the others need one kind only.
OF_BOTH = ("hooks_live", "self_patch", "last_lens", "attribution")
# What does not run the model; with the others, a check of these would take ten times as long.
OF_TEXT = ("memory", "vocabulary", "bos", "round_trip", "one_token")
CASES = [
    pytest.param(name, damage, kind, id=f"{damage.__name__}-{kind}")
    for i, (name, damage) in enumerate(BROKEN)
    for kind in (tiny.KINDS if name in OF_BOTH else tiny.KINDS[i % len(tiny.KINDS) :][:1])
]


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """All 18 take most of a check's time on a tiny model; the slow test has them."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(of_text, "PAPER_TASKS", ("to_upper", "country_capital"))


def told(result: ModelCheck) -> str:
    """Everything that was measured, for the message of a test that fails."""
    return result.data.to_dataframe()[["status", "measured", "tolerance", "note"]].to_string()


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_sound_models_pass(name: str, kind: str) -> None:
    result = check_model(tiny.model(name, kind))
    assert result.passed and not result.of("skipped"), told(result)
    assert result.of("passed") == tuple(CHECKS)
    bounded = result.data["tolerance"].notnull()
    assert bool((result.data["measured"] <= result.data["tolerance"]).where(bounded, True).all())
    # Rounding is far from the bound, so that a bound that is reached says something.
    ratio = (result.data["measured"] / result.data["tolerance"]).where(result.data["tolerance"] < 1)
    assert float(ratio.max()) < 0.2


@pytest.mark.parametrize(("name", "damage", "kind"), CASES)
def test_what_is_broken_is_what_fails(
    name: str, damage: Damage, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own_copy(kind)
    with damage(model, monkeypatch) or nullcontext():
        result = check_model(model, checks=OF_TEXT if name in OF_TEXT else None)
    assert result.of("failed") == (name,), told(result)
    assert not result.passed
    assert f"failed: {name}" in result.finding() and CHECKS[name].means in result.finding()
    # What was skipped rests on what failed, directly or not.
    for skipped in result.of("skipped"):
        assert any(result.data["status"].sel(check=n) != "passed" for n in CHECKS[skipped].needs)


def test_every_check_has_a_model_that_fails_it() -> None:
    assert {name for name, _ in BROKEN} | {"user_hooks"} == set(CHECKS)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_hooks_of_the_user_are_said_and_stay(kind: str) -> None:
    model, seen = own_copy(kind), []
    with hooked(model, "resid_post", 0, lambda x, hook: seen.append(len(x))):
        result = check_model(model)
        assert runner(model).has_user_hooks()
    assert result.passed and seen, told(result)
    assert float(result.data["measured"].sel(check="user_hooks")) == 1
    assert "whole forwards" in str(result.data["note"].sel(check="supported").values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tolerances_follow_the_type_of_the_weights(dtype: str) -> None:
    result = check_model(own_copy(tiny.KINDS[0], dtype=dtype))
    assert result.passed, told(result)
    wanted = {"bfloat16": 0.1, "float16": 0.05}[dtype]
    assert float(result.data["tolerance"].sel(check="plans")) == pytest.approx(wanted)


def test_without_a_tokenizer_the_rest_still_runs() -> None:
    model = own_copy(tiny.KINDS[0])
    model.tokenizer = None
    result = check_model(model)
    assert result.passed, told(result)
    assert result.of("skipped") == ("vocabulary", "bos", "round_trip", "one_token")
    assert "plans" in result.of("passed")


def test_a_tokenizer_of_other_words_leaves_the_forward_pass_to_be_checked() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "here": 1}, unk_token="<unk>"))
    model = own_copy(tiny.KINDS[0])
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<unk>"
    )
    result = check_model(model)
    assert result.of("skipped") == ("bos",) and "plans" in result.of("passed"), told(result)
    assert result.of("failed") == ("one_token",)


def test_an_error_in_a_check_is_a_failure_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvlens.checking.run.CHECKS", table := dict(CHECKS))
    monkeypatch.setattr("tvlens.checking.table.CHECKS", table)

    @check("breaks", what="nothing", means="It broke.")
    def breaks(subject: Any) -> Measured:
        raise KeyError("no <b>such</b> thing\nand a second line")

    @check("rests", what="nothing", means="Never said.", needs=("breaks",))
    def rests(subject: Any) -> Measured:
        return Measured(0.0, 0.0)

    @check("last", what="one", means="Never said.")
    def last(subject: Any) -> Measured:
        return Measured(float("nan"), 1.0)

    @check("not_here", what="one", means="Never said.")
    def not_here(subject: Any) -> Measured:
        raise NotApplicable("not today")

    result = check_model(tiny_model(), checks=["rests", "last", "not_here"])
    assert list(result.data["check"].values) == ["breaks", "rests", "last", "not_here"]
    assert list(result.data["status"].values) == ["failed", "skipped", "failed", "skipped"]
    notes = result.data["note"].values
    assert notes[0].startswith("KeyError") and "second line" not in result.finding()
    assert notes[1] == "needs breaks (failed)" and notes[3] == "not today"
    with pytest.raises(ValueError, match="exists already"):
        check("last", what="", means="")(rests)
    with pytest.raises(ValueError, match="not in the table"):
        check("new", what="", means="", needs=("nothing",))(rests)


def test_what_is_asked_for_and_what_it_needs() -> None:
    result = check_model(tiny_model(), checks=["attribution", "bos"])
    names = ["finite", "supported", "repeatable", "last_lens", "attribution", "bos"]
    assert list(result.data["check"].values) == names and result.passed
    with pytest.raises(ValueError, match=r"unknown check 'self_path'\. Nearest: self_patch"):
        check_model(tiny_model(), checks=["self_path"])
    with pytest.raises(ValueError, match="checks is empty"):
        check_model(tiny_model(), checks=[])
    with pytest.raises(ValueError, match="nearest|Nearest|There are|smollm2"):
        check_model("smollm-135")
    with pytest.raises(
        TypeError, match="a HookedTransformer, a TransformerBridge or .* int arrived"
    ):
        check_model(3)


def test_the_model_is_left_as_it_was() -> None:
    model = own_copy(tiny.KINDS[0])
    training = model.train().training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    check_model(model)
    assert model.training == training and not runner(model).has_user_hooks()
    assert [p.requires_grad for p in model.parameters()] == wanted
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.fixture(scope="module")
def broken() -> ModelCheck:
    """What is said of a model with noise in it."""
    model = own_copy(tiny.KINDS[0])
    with noise(model, pytest.MonkeyPatch()):
        return check_model(model)


def test_the_result_is_kept_shown_and_told(broken: ModelCheck, tmp_path: Path) -> None:
    result = broken
    again = tv.load(result.save(tmp_path / "check.nc"))
    assert isinstance(again, ModelCheck) and not again.passed
    assert again.finding() == result.finding()
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert summary["failed"] == ["repeatable"] and len(summary["checks"]) == len(CHECKS)
    assert {row["status"] for row in summary["checks"]} == {"passed", "failed", "skipped"}
    tables = result.tables()
    assert list(tables) == ["Checks", "What failed"] and len(tables["Checks"]) == len(CHECKS)
    assert tables["What failed"]["check"].tolist() == ["repeatable"]
    with pytest.raises(ValueError, match="unknown status 'fail'"):
        result.of("fail")


def test_the_figure_has_a_dot_for_each_check_where_its_number_is(broken: ModelCheck) -> None:
    result = broken
    fig = result.plot()
    traces: Any = fig.data
    dots = {trace.name: dict(zip(trace.y, trace.x, strict=True)) for trace in traces}
    names = [str(name) for name in result.data["check"].values]
    for state in ("passed", "failed", "skipped"):
        assert {names[i] for i in dots[state] if i is not None} == set(result.of(state))
    assert dots["failed"][names.index("repeatable")] > 1
    assert max(dots["passed"].values()) <= 1
    layout: Any = fig.layout
    assert layout.meta["title"] == result.finding()
    hostile = result.data.copy()
    hostile["note"] = ("check", ["<script>alert(1)</script> $x$"] * len(names))
    drawn = str(check_dots(hostile).to_json())
    assert "<script>" not in drawn.replace("\\u003c", "<") and "&lt;script&gt;" in drawn
    with pytest.raises(ValueError, match="no checks"):
        check_dots(result.data.isel(check=slice(0)))


def test_the_toy_passes_though_it_knows_few_words() -> None:
    result = check_model(tv.load_model("toy"))
    assert result.passed and not result.of("skipped"), told(result)
    assert "unknown tokens" in str(result.data["note"].sel(check="round_trip").values)


def test_the_page_adds_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    table = dict(CHECKS)
    for place in ("run", "table"):
        monkeypatch.setattr(f"tvlens.checking.{place}.CHECKS", table)
    page = Path(__file__).parent.parent / "docs" / "howto" / "check_a_model.md"
    text = page.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in CHECKS)
    code = text.split("```python\n")[2].split("```")[0]
    exec(compile(code, page.name, "exec"), {"__name__": "page"})
    result = check_model(tiny_model(), checks=["depth"])
    assert result.passed and float(result.data["measured"].sel(check="depth")) == 2


@pytest.mark.slow
def test_the_real_model_passes(smollm2: Any) -> None:
    result = check_model(smollm2)
    assert result.passed and not result.of("skipped"), told(result)
