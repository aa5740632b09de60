"""Which plan is taken and why: forced plans, hooks, models that cannot be run in parts, chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import tiny
from tests.cases import (
    KIND,
    PLANS,
    Values,
    assert_same,
    ids_of,
    make_batch,
    model_of,
    random_edit,
)
from tvlens import load_model
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, FirstToken, LastLogits, Read, Request, costs, run
from tvlens.engine.costs import Costs
from tvlens.models.runner import runner

COSTS = Costs(
    call=1e-3,
    token=1e-5,
    group=1e-4,
    pair=1e-8,
    bytes_fixed=0,
    bytes_token=2000,
    bytes_piece=1000,
    difference=0.0,
    exact=True,
)


def sweep(model: Any, length: int = 40, n: int = 3) -> Request:
    """A vector written at the last position, layer by layer."""
    edits = [(random_edit(model, "resid_post", layer, n),) for layer in range(4)]
    return Request(make_batch([length] * n), ((), *edits), readout=LastLogits())


@contextmanager
def known_costs(model: Any, **changes: float) -> Iterator[None]:
    """Let a model cost what we say, whatever else this machine is doing."""
    of_model = costs._known.setdefault(model, {})
    where = (runner(model).device, runner(model).dtype)
    before = of_model.get(where)
    of_model[where] = replace(COSTS, **changes)
    try:
        yield
    finally:
        of_model.pop(where)
        if before is not None:
            of_model[where] = before


def fresh(name: str = "llama") -> Any:
    """A model of its own, whose costs nobody has measured."""
    return load_model(
        tiny.hf(name), tokenizer=tiny.tokenizer(name), device="cpu", backend=KIND, processing="none"
    )


def hooked(**settings: Any) -> Any:
    """A small HookedTransformer of unusual settings."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    usual = {"d_model": 32, "n_layers": 4, "n_heads": 2, "d_head": 16, "n_ctx": 64, "d_vocab": 100}
    usual |= {"act_fn": "relu", "device": "cpu", "seed": 0}
    return HookedTransformer(HookedTransformerConfig(**(usual | settings)))


def test_the_automatic_plan_and_its_reason() -> None:
    model = model_of("llama")
    (measured,) = run(model, [sweep(model)])
    assert measured.plan.name in ("suffix", "growing")
    with known_costs(model):
        (output,) = run(model, [sweep(model)])
    plan = output.plan
    assert plan.name == "suffix" and set(plan.seconds) == {"suffix", "growing", "plain"}
    assert plan.seconds["suffix"] == min(plan.seconds.values()) > 0
    # 120 clean tokens, and a last token for every cell that has begun: 120, 123, 126, 129.
    assert plan.tokens == pytest.approx((120 + 123 + 126 + 129 + 3) / 4, abs=1.5)
    assert str(plan).startswith("suffix: expected to be fastest; expected: suffix ")
    for part in (f"{plan.tokens} tokens a block", "1 chunks", " MB", "growing", "plain"):
        assert part in str(plan)
    assert 0 < plan.bytes < 2**30 and plan.chunks == 1


@pytest.mark.parametrize(
    ("best", "changes", "position", "lengths"),
    [
        ("suffix", {}, -1, [40] * 3),
        ("suffix", {"token": 1e-3}, -20, [40, 30, 20]),
        # Whole prompts have no more tokens than these suffixes: either will do, and the first is taken.
        ("suffix", {}, 0, [40, 30, 20]),
    ],
)
def test_the_cheapest_plan_is_taken(
    best: str, changes: dict[str, float], position: int, lengths: list[int]
) -> None:
    model = model_of("llama")
    cells = tuple((random_edit(model, "resid_post", i, 3, position=position),) for i in range(4))
    request = Request(make_batch(lengths), cells, readout=LastLogits())
    with known_costs(model, **changes):
        (output,) = run(model, [request])
    assert output.plan.name == best
    assert output.plan.seconds[best] == min(output.plan.seconds.values())


def test_a_clean_run_alone_is_not_worth_a_forward_with_hooks() -> None:
    model = model_of("llama")
    with known_costs(model):
        (output,) = run(model, [Request(make_batch([40, 30]), readout=LastLogits())])
    assert output.plan.name in ("suffix", "growing")


@pytest.mark.parametrize("plan", PLANS)
def test_forced_plans_run(plan: str) -> None:
    model = model_of("llama")
    (output,) = run(model, [sweep(model)], plan=plan)
    assert output.plan.name == plan and output.plan.reason == "asked for"
    assert str(output.plan).startswith(f"{plan}: asked for")
    tokens = {"plain": 5 * 120, "suffix": 130, "growing": 5 * 120}[plan]
    assert 0 < output.plan.tokens <= tokens
    assert plan != "plain" or output.plan.tokens == tokens


def test_own_hooks_keep_firing_and_force_the_plain_plan() -> None:
    model = fresh()
    request = sweep(model, length=7, n=2)
    (before,) = run(model, [request])
    widths: list[tuple[int, ...]] = []

    def ablate(activation: torch.Tensor, hook: object) -> torch.Tensor:
        widths.append(tuple(activation.shape[:2]))
        return torch.zeros_like(activation)

    with model.hooks(fwd_hooks=[(runner(model).hook_name("mlp_out", 1), ablate)]):
        (output,) = run(model, [request], memory=1)
        for plan in ("suffix", "growing"):
            message = f"plan '{plan}' asked for, but there are hooks on the model.*only 'plain'"
            with pytest.raises(ValueError, match=message):
                run(model, [request], plan=plan)
        (forced,) = run(model, [request], plan="plain")
    assert output.plan.name == "plain" and "hooks on the model" in str(output.plan)
    assert output.plan.seconds == {} and forced.plan.reason == "asked for"
    # One forward for each cell over both prompts, whole, twice.
    assert widths == [(2, 7)] * 5 * 2
    assert (output.values["logits"] - before.values["logits"]).abs().max() > 1e-2
    (after,) = run(model, [request])
    assert after.plan.reason == "expected to be fastest"
    assert_same(after, before)


@pytest.mark.parametrize("place", ["module", "pre", "point"])
def test_plain_torch_hooks_are_noticed_too(place: str) -> None:
    model = fresh()
    seen: list[int] = []
    block = model.blocks[1]
    point = model.hook_dict[runner(model).hook_name("mlp_out", 1)]
    handle = {
        "module": lambda: block.mlp.register_forward_hook(lambda m, a, o: seen.append(len(o))),
        "pre": lambda: block.attn.register_forward_pre_hook(lambda m, a: seen.append(2)),
        "point": lambda: point.register_forward_hook(lambda m, a, o: seen.append(len(o))),
    }[place]()
    try:
        (output,) = run(model, [Request(make_batch([7, 5]), readout=LastLogits())], memory=1)
    finally:
        handle.remove()
    assert output.plan.name == "plain" and "hooks" in output.plan.reason
    assert seen == [2]  # one forward over the whole batch


@tiny.needs_hooked
@pytest.mark.parametrize(
    "settings",
    [{"positional_embedding_type": "shortformer"}, {"attn_only": True}],
    ids=["shortformer", "attn_only"],
)
def test_models_that_cannot_be_run_in_parts(settings: dict[str, Any]) -> None:
    model = hooked(**settings)
    request = sweep(model, length=9, n=2)
    (output,) = run(model, [request])
    assert output.plan.name == "plain"
    assert "attention or positions that cannot be run in parts" in str(output.plan)
    for plan in ("suffix", "growing"):
        with pytest.raises(ValueError, match="cannot be run in parts: only 'plain' can run this"):
            run(model, [request], plan=plan)
    with torch.no_grad():
        logits = model(request.batch.tokens)[:, -1]
    assert (output.values["logits"][0] - logits).abs().max() <= 1e-4


def test_parts_that_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    block = type(runner(model).block(0))
    whole = block.attn_out
    monkeypatch.setattr(block, "attn_out", lambda self, z: 1.05 * whole(self, z))
    request = sweep(model, length=9, n=2)
    (output,) = run(model, [request])
    assert output.plan.name == "plain"
    assert "parts do not add up to its own forward (they are " in output.plan.reason
    for plan in ("suffix", "growing"):
        with pytest.raises(ValueError, match="do not add up .*: only 'plain' can run this"):
            run(model, [request], plan=plan)
    monkeypatch.undo()
    (right,) = run(fresh(), [request], plan="suffix")
    assert_same(right, output)  # the fallback gave the right numbers


def test_costs_are_measured_once_for_a_model_its_place_and_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[torch.dtype] = []
    measure = costs._measure

    def counting(runner: Any) -> Costs:
        measured.append(runner.dtype)
        return measure(runner)

    monkeypatch.setattr(costs, "_measure", counting)
    model, other = fresh(), fresh("pythia")
    for _ in range(2):
        run(model, [sweep(model)])
        run(model, [Request(make_batch([5]), readout=LastLogits())], plan="growing")
    assert measured == [torch.float32]
    run(other, [sweep(other)])
    assert measured == [torch.float32] * 2
    from copy import deepcopy

    doubled = load_model(
        deepcopy(tiny.hf("llama")).double(),
        tokenizer=tiny.tokenizer("llama"),
        device="cpu",
        backend=KIND,
        dtype=torch.float64,
    )
    run(doubled, [Request(make_batch([5]), readout=LastLogits())])
    assert measured == [torch.float32, torch.float32, torch.float64]
    found = costs.costs(runner(model))
    assert found.exact and found.difference < 1e-4 and measured[3:] == []
    assert min(found.call, found.bytes_fixed) >= 0
    assert min(found.token, found.group, found.pair, found.bytes_token, found.bytes_piece) > 0


@pytest.mark.parametrize("plan", ["suffix", "growing"])
def test_chunks_by_prompts_then_by_cells(plan: str) -> None:
    """Mixed lengths, with reads as wide as the longest prompt, and each prompt's own readout."""
    model = model_of("llama")
    batch = make_batch([12, 3, 17, 8])
    make = Values(model, n=4, width=17)
    cells = (
        (),
        *((Edit("resid_post", layer, make("resid_post"), -2),) for layer in range(4)),
        (Edit("pattern", 1, make("pattern", positions=17), None),),
        (Edit("z", 2, make("z", n=1, one_head=True), 1, head=1, where=batch.lengths > 5),),
    )
    reads = (Read("resid_post", (0, 3), None), Read("pattern", (2,)), Read("pattern", (1,), None))
    answers = tuple((5 * row + 1,) for row in range(4))
    request = Request(batch, cells, reads, FirstToken(answers))
    (whole,) = run(model, [request], plan=plan)
    alone = [request.part(slice(r, r + 1), slice(None)) for r in range(4)]
    by_prompts = max(run(model, [one], plan=plan)[0].plan.bytes for one in alone)
    (prompts,) = run(model, [request], plan=plan, memory=by_prompts)
    assert 1 < prompts.plan.chunks <= 4 and prompts.plan.bytes <= by_prompts
    assert_same(prompts, whole)
    by_cells = max(
        run(model, [request.part(slice(2, 3), slice(c, c + 1))], plan=plan)[0].plan.bytes
        for c in range(len(cells))
    )
    (both,) = run(model, [request], plan=plan, memory=by_cells)
    assert both.plan.chunks > 4 and both.plan.bytes <= by_cells
    assert_same(both, whole)
    assert whole.plan.chunks == 1 and both.plan.tokens >= whole.plan.tokens


def test_plain_runs_in_chunks_of_prompts() -> None:
    model = model_of("llama")
    batch = make_batch([12, 3, 17, 8])
    reads = (Read("resid_post", (3,), None), Read("pattern", (1,)))
    request = Request(batch, ((), (random_edit(model, "q", 1, 4),)), reads, LastLogits())
    (whole,) = run(model, [request], plan="plain")
    (chunked,) = run(model, [request], plan="plain", memory=1)
    assert (whole.plan.chunks, chunked.plan.chunks) == (1, 4)
    assert_same(chunked, whole)


@pytest.mark.parametrize("plan", ["suffix", "growing"])
def test_requests_of_one_prompt_and_cell_run_one_after_another(plan: str) -> None:
    """What does not fit together may fit alone."""
    model = model_of("llama")
    requests = [Request(make_batch([30], seed=seed), readout=LastLogits()) for seed in range(8)]
    together = run(model, requests, plan=plan)
    alone = [run(model, [request], plan=plan)[0] for request in requests]
    most = max(output.plan.bytes for output in alone)
    for mine, theirs in zip(run(model, requests, plan=plan, memory=most), alone, strict=True):
        assert_same(mine, theirs)
        assert mine.plan.chunks > 1 == together[0].plan.chunks


def test_long_prompts_make_tables_of_positions_grow() -> None:
    """Longer than the rotary tables that were ready: what was shorter is right afterwards, too."""
    model = fresh("pythia")
    batch = make_batch([200, 9])
    request = Request(batch, readout=LastLogits())
    (suffix,) = run(model, [request], plan="suffix")
    with torch.no_grad():
        for row in range(2):
            ids = torch.tensor([ids_of(batch, row)])
            logits = tiny.hf("pythia")(ids).logits[0, -1]
            assert (suffix.values["logits"][0, row] - logits).abs().max() <= 1e-4


def test_an_empty_padding_token_is_never_run() -> None:
    """Padding holds ids that the model does not have: nobody looks at them in the faster plans."""
    model, batch = model_of("gpt2"), make_batch([9, 4])
    tokens = batch.tokens.masked_fill(~batch.mask, 10**6)
    strange = TokenBatch(batch.text, tokens, batch.mask, batch.roles)
    (one,) = run(model, [Request(batch, readout=LastLogits())], plan="suffix")
    (other,) = run(model, [Request(strange, readout=LastLogits())], plan="suffix")
    assert_same(one, other, 1e-6)
