"""What the engine refuses: what was asked, what arrived, and what there is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cases import make_batch, model_of, random_edit
from tvlens.engine import Edit, LastLogits, Read, Request, TokenLogits, run


def editing(*edits: Edit) -> Request:
    return Request(make_batch([7, 5]), (edits,), readout=LastLogits())


def reading(*reads: Read) -> Request:
    return Request(make_batch([7, 5]), reads=reads)


def vector(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


# The tiny Llama has 4 layers, d_model 64, 4 heads of 16, 2 of them for keys and values.
REQUESTS: dict[str, tuple[Callable[[], Request], str]] = {
    "no cells": (
        lambda: Request(make_batch([7]), ()),
        r"at least one cell; \(\(\),\) is the clean",
    ),
    "layer of a read": (
        lambda: reading(Read("resid_post", (0, 9))),
        r"layer 9 asked for, but this model has 4 layers: 0 to 3 \(or -4 to -1, from the end\)",
    ),
    "layer of an edit": (
        lambda: editing(Edit("resid_post", 4, vector(2, 64))),
        "layer 4 asked for, but this model has 4 layers",
    ),
    "layer from the end": (
        lambda: reading(Read("resid_post", (-1,))),
        "layers of edits and reads count from 0; -1 arrived",
    ),
    "no layers": (lambda: reading(Read("z", ())), "a read of 'z' needs at least one layer"),
    "prompts of an edit": (
        lambda: editing(Edit("resid_post", 0, vector(7, 64))),
        "an edit needs values for 1 or 2 prompts; 7 arrived",
    ),
    "shape of an edit": (
        lambda: editing(Edit("resid_post", 0, vector(1, 5))),
        r"'resid_post' needs values of shape \(64,\) for each prompt; \(5,\) arrived. Was the vec",
    ),
    "shape of all heads": (
        lambda: editing(Edit("z", 0, vector(1, 16))),
        r"'z' needs values of shape \(4, 16\) for each prompt; \(16,\) arrived",
    ),
    "shape of key heads": (
        lambda: editing(Edit("k", 0, vector(1, 4, 16))),
        r"'k' needs values of shape \(2, 16\) for each prompt; \(4, 16\) arrived",
    ),
    "shape of one head": (
        lambda: editing(Edit("z", 0, vector(1, 4, 16), head=1)),
        r"'z' needs values of shape \(16,\) for each prompt; \(4, 16\) arrived",
    ),
    "head": (
        lambda: editing(Edit("k", 0, vector(1, 16), head=2)),
        "head 2 asked for, but 'k' has 2 heads in this model: 0 to 1",
    ),
    "negative head": (
        lambda: editing(Edit("z", 0, vector(1, 16), head=-1)),
        "head -1 asked for, but 'z' has 4 heads in this model: 0 to 3",
    ),
    "where": (
        lambda: editing(Edit("z", 0, vector(1, 4, 16), where=torch.ones(3, dtype=torch.bool))),
        r"where needs one truth value for each of 2 prompts; shape \(3,\) arrived",
    ),
    "positions": (
        lambda: editing(Edit("resid_post", 0, vector(1, 5, 64), None)),
        "every position needs values for 1 or 7 positions, after those for prompts; 5 arrived",
    ),
    "no positions": (
        lambda: editing(Edit("resid_post", 0, vector(1, 0, 64), None)),
        "every position needs values for 1 or 7 positions, after those for prompts; 0 arrived",
    ),
    "no axis of positions": (
        lambda: editing(Edit("resid_post", 0, vector(2), None)),
        "every position needs values for 1 or 7 positions, after those for prompts; none arrived",
    ),
    "keys": (
        lambda: editing(Edit("pattern", 0, vector(1, 4, 6))),
        "'pattern' needs a weight for each of 7 keys; 6 arrived",
    ),
    "no keys": (
        lambda: editing(Edit("pattern", 0, vector(2))),
        "'pattern' needs a weight for each of 7 keys; none arrived",
    ),
    "heads of a pattern": (
        lambda: editing(Edit("pattern", 0, vector(1, 2, 7))),
        r"'pattern' needs values of shape \(4,\) for each prompt; \(2,\) arrived",
    ),
    "position of an edit": (
        lambda: editing(Edit("resid_post", 0, vector(1, 64), 5)),
        "position 5 asked for, but the shortest prompt has 5 tokens: -5 to 4",
    ),
    "position of a read": (
        lambda: reading(Read("resid_post", (0,), -6)),
        "position -6 asked for, but the shortest prompt has 5 tokens: -5 to 4",
    ),
    "columns": (
        lambda: Request(
            make_batch([7, 5]), readout=TokenLogits(torch.zeros(3, 2, dtype=torch.long))
        ),
        "a readout of some tokens needs them for 2 prompts; they arrived for 3",
    ),
}


@pytest.mark.parametrize("plan", ["auto", "plain"])
@pytest.mark.parametrize("what", REQUESTS)
def test_requests_that_the_model_or_the_prompts_do_not_allow(what: str, plan: str) -> None:
    make, message = REQUESTS[what]
    request = make()
    with pytest.raises(ValueError, match=message):
        run(model_of("llama"), [request], plan=plan)


def test_positions_count_where_an_edit_takes_place() -> None:
    """Position 6 is in one of the two prompts, and only that one is edited."""
    model, batch = model_of("llama"), make_batch([7, 5])
    there = Edit("resid_post", 0, torch.ones(1, 64), 6, where=torch.tensor([True, False]))
    (output,) = run(model, [Request(batch, ((), (there,)), readout=LastLogits())])
    changed = (output.values["logits"][1] - output.values["logits"][0]).abs().amax(dim=-1) > 1e-3
    assert changed.tolist() == [True, False]


def test_requests_of_a_run() -> None:
    model, batch = model_of("llama"), make_batch([7, 5])
    with pytest.raises(ValueError, match="requests of equally many prompts; 2, 1 arrived"):
        run(model, [Request(batch), Request(batch.rows(slice(0, 1)))])
    with pytest.raises(ValueError, match="requests of equally many prompts; no request arrived"):
        run(model, [])
    with pytest.raises(ValueError, match="unknown plan 'sufix'. Nearest: suffix"):
        run(model, [Request(batch)], plan="sufix")


def test_edits_and_reads_that_no_model_allows() -> None:
    with pytest.raises(ValueError, match="unknown site 'resid_pots'. Nearest: resid_post"):
        Read("resid_pots", (0,))
    with pytest.raises(ValueError, match="unknown site 'patern'. Nearest: pattern"):
        Edit("patern", 0, vector(1, 64))
    with pytest.raises(ValueError, match="unknown mode 'swap'"):
        Edit("resid_post", 0, vector(1, 64), mode="swap")
    with pytest.raises(ValueError, match="resid_post has no heads; these .*: z, q, k, v, pattern"):
        Edit("resid_post", 0, vector(1, 64), head=0)


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: reading(Read("resid_mid", (0,))),
        lambda m: editing(random_edit(m, "resid_mid", 1, 2)),
    ],
    ids=["read", "edit"],
)
def test_sites_that_parallel_blocks_do_not_have(ask: Callable[[Any], Request]) -> None:
    model = model_of("pythia")
    with pytest.raises(ValueError, match="no site 'resid_mid'; it has resid_pre, resid_post, att"):
        run(model, [ask(model)])


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="HookedTransformer or TransformerBridge .* Linear arrived"):
        run(torch.nn.Linear(2, 2), [Request(make_batch([3]))])


@pytest.mark.parametrize("plan", ["suffix", "growing"])
def test_memory_that_holds_not_one_prompt(plan: str) -> None:
    model = model_of("llama")
    request = Request(make_batch([7, 5]), readout=LastLogits())
    with pytest.raises(
        ValueError, match=r"memory=1 asked for, but one prompt .* \d+ bytes"
    ) as told:
        run(model, [request], plan=plan, memory=1)
    needed = int(str(told.value).split(" needs ")[1].split()[0])
    alone = Request(request.batch.rows(slice(0, 1)), readout=LastLogits())
    assert run(model, [alone], plan=plan, memory=needed)[0].plan.chunks == 1
    with pytest.raises(ValueError, match="one prompt in one cell needs"):
        run(model, [alone], plan=plan, memory=needed - 1)
