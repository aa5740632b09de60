"""What must hold whatever the prompts: batches, padding, order, chunks and pieces change nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.cases import (
    GRID,
    TOLERANCE,
    Values,
    assert_same,
    make_batch,
    model_of,
    sites_of,
    tensors,
)
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, LastLogits, Output, Read, Request, run
from tvlens.engine.layout import lay_out
from tvlens.engine.packed import Pieces, run_packed
from tvlens.models.runner import runner
from tvlens.sites import SITES

names = st.sampled_from(["gpt2", "gemma3"])
plans = st.sampled_from(["suffix", "growing"])
lengths = st.lists(st.integers(1, 14), min_size=1, max_size=5)
few = settings(max_examples=12, deadline=None)


def any_request(data: st.DataObject, n_cells: int = 4) -> tuple[Any, Request]:
    """A model and a request with any edits, over prompts of any lengths."""
    # No composite strategy: the type checks of what is made here draw random numbers of their own.
    draw = data.draw
    model, batch = model_of(draw(names)), make_batch(draw(lengths), seed=draw(st.integers(0, 9)))
    n, width, shortest = len(batch), batch.tokens.shape[1], int(batch.lengths.min())
    make = Values(model, n=n, width=width, seed=draw(st.integers(0, 9)))
    sites = sites_of(model)

    def edit() -> Edit:
        site = draw(st.sampled_from(sites))
        position = draw(st.none() | st.integers(-shortest, shortest - 1))
        one_head = "head" in SITES[site].dims and draw(st.booleans())
        values = make(
            site,
            n=draw(st.sampled_from([1, n])),
            positions=None if position is not None else draw(st.sampled_from([1, width])),
            one_head=one_head,
        )
        return Edit(
            site,
            draw(st.integers(0, 3)),
            values,
            position,
            head=draw(st.integers(0, 1)) if one_head else None,
            mode=draw(st.sampled_from(["replace", "add"])),
            scale=draw(st.sampled_from([1.0, 0.5])),
            where=draw(
                st.none() | st.lists(st.booleans(), min_size=n, max_size=n).map(torch.tensor)
            ),
        )

    cells = tuple(tuple(edit() for _ in range(draw(st.integers(0, 2)))) for _ in range(n_cells))
    reads = (Read("resid_post", (2,), None), Read("z", (1, 3)), Read("pattern", (3,)))
    return model, Request(batch, cells, reads, LastLogits())


def same(one: Output, other: Output, tolerance: float = TOLERANCE) -> None:
    assert_same(one, other, tolerance)


@few
@given(st.data(), plans)
@pytest.mark.slow
def test_any_request_equals_one_forward_per_cell(data: st.DataObject, plan: str) -> None:
    model, request = any_request(data)
    same(run(model, [request], plan=plan)[0], run(model, [request], plan="plain")[0])


@few
@given(st.data(), plans)
def test_a_batch_of_n_is_n_batches_of_one(data: st.DataObject, plan: str) -> None:
    model, request = any_request(data)
    (whole,) = run(model, [request], plan=plan)
    for row in range(len(request.batch)):
        alone = request.part(slice(row, row + 1), slice(None))
        (one,) = run(model, [alone], plan=plan)
        n = int(request.batch.lengths[row])
        logits = one.values["logits"][:, 0]
        assert (whole.values["logits"][:, row] - logits).abs().max() <= TOLERANCE
        every, last = one.activations[0][:, 0], one.activations[1][:, 0]
        assert (whole.activations[0][:, row, :, :n] - every).abs().max() <= TOLERANCE
        assert (whole.activations[0][:, row, :, n:] == 0).all()
        assert (whole.activations[1][:, row] - last).abs().max() <= TOLERANCE


@few
@given(st.data(), st.integers(1, 6), st.sampled_from(["suffix", "growing", "plain"]))
def test_padding_on_the_left_does_not_matter(data: st.DataObject, extra: int, plan: str) -> None:
    model, request = any_request(data)
    batch, pad = request.batch, (extra, 0)
    padded = TokenBatch(
        batch.text,
        torch.nn.functional.pad(batch.tokens, pad, value=5),
        torch.nn.functional.pad(batch.mask, pad, value=False),
        torch.nn.functional.pad(batch.roles, pad, value=-1),
    )
    reads = (Read("resid_post", (0, 3)), Read("q", (2,), 0))
    one, other = (
        run(model, [replace(request, batch=b, reads=reads)], plan=plan)[0] for b in (batch, padded)
    )
    same(one, other)


@few
@given(st.data(), st.randoms(use_true_random=False), plans)
def test_the_order_of_cells_does_not_matter(data: st.DataObject, random: Any, plan: str) -> None:
    model, request = any_request(data)
    order = list(range(len(request.cells)))
    random.shuffle(order)
    (straight,) = run(model, [request], plan=plan)
    (mixed,) = run(
        model, [replace(request, cells=tuple(request.cells[i] for i in order))], plan=plan
    )
    for one, other in zip(tensors(straight), tensors(mixed), strict=True):
        assert (one[order] - other).abs().max() <= TOLERANCE


@few
@given(st.data(), plans, st.integers(1, 6))
@pytest.mark.slow
def test_the_size_of_chunks_does_not_matter(data: st.DataObject, plan: str, parts: int) -> None:
    model, request = any_request(data)
    (whole,) = run(model, [request], plan=plan)
    alone = Request(request.batch.rows(slice(0, 1)), ((),), request.reads, request.readout)
    least = max(
        run(model, [request.part(slice(r, r + 1), slice(c, c + 1))], plan=plan)[0].plan.bytes
        for r in range(len(request.batch))
        for c in range(len(request.cells))
    )
    assert least >= run(model, [alone], plan=plan)[0].plan.bytes > 0
    (chunked,) = run(model, [request], plan=plan, memory=max(least, whole.plan.bytes // parts))
    same(whole, chunked)


@few
@given(
    st.data(),
    plans,
    st.builds(
        Pieces,
        tokens=st.sampled_from([1, 5, 10**6]),
        attention=st.sampled_from([1, 3000, 10**9]),
        overhead=st.sampled_from([0, 3, 10**6]),
        logits=st.sampled_from([1, 3, 10**6]),
    ),
)
def test_the_size_of_pieces_does_not_matter(data: st.DataObject, plan: str, pieces: Pieces) -> None:
    model, request = any_request(data)
    (whole,) = run(model, [request], plan=plan)
    layout = lay_out([request], n_layers=4, whole=plan == "growing")
    with torch.no_grad():
        ((reads, values),) = run_packed(runner(model), [request], layout, pieces)
    same(whole, replace(whole, activations=tuple(reads), values=values))


@few
@given(st.data(), plans)
def test_edits_that_take_place_nowhere_are_the_clean_run(data: st.DataObject, plan: str) -> None:
    model, request = any_request(data)
    nowhere = torch.zeros(len(request.batch), dtype=torch.bool)
    never = tuple(tuple(replace(e, where=nowhere) for e in cell) for cell in request.cells)
    (one,) = run(model, [replace(request, cells=never)], plan=plan)
    (clean,) = run(model, [replace(request, cells=((),))], plan=plan)
    for mine, theirs in zip(tensors(one), tensors(clean), strict=True):
        assert (mine - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_writing_back_what_is_there_changes_nothing(name: str, kind: str) -> None:
    """Every site, at one position, at all of them, and head by head."""
    model, batch = tiny.model(name, kind), make_batch([6, 11, 3])
    sites = sites_of(model)
    reads = [Read(site, (0, 3), at) for site in sites for at in (-2, None)]
    (clean,) = run(model, [Request(batch, reads=tuple(reads), readout=LastLogits())], plan="plain")
    cells = []
    for read, kept in zip(reads, clean.activations, strict=True):
        for i, layer in enumerate(read.layers):
            own = kept[0, :, i]
            cells.append((Edit(read.site, layer, own, read.position),))
            if "head" in SITES[read.site].dims:
                one = own.select(-2, 1)
                cells.append((Edit(read.site, layer, one, read.position, head=1),))
    for plan in ("suffix", "growing"):
        (again,) = run(model, [Request(batch, tuple(cells), readout=LastLogits())], plan=plan)
        assert (again.values["logits"] - clean.values["logits"]).abs().max() <= TOLERANCE
        assert len(again.values["logits"]) >= 2 * 2 * len(sites)


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_another_runs_first_residual_everywhere_is_that_run(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    one, other = make_batch([6, 11, 3]), make_batch([6, 11, 3], seed=5)
    reads = (Read("resid_pre", (0,), None), Read("resid_post", (0, 3), None))
    (wanted,) = run(model, [Request(other, reads=reads, readout=LastLogits())], plan="plain")
    everywhere = Edit("resid_pre", 0, wanted.activations[0][0, :, 0], None)
    one_by_one = tuple(
        Edit("resid_pre", 0, wanted.activations[0][0, :, 0, at], at, where=one.lengths > at)
        for at in range(11)
    )
    request = Request(one, ((), (everywhere,), one_by_one), reads, LastLogits())
    for plan in ("suffix", "growing", "plain"):
        (output,) = run(model, [request], plan=plan)
        for mine, theirs in zip(tensors(output), tensors(wanted), strict=True):
            assert (mine[1:] - theirs).abs().max() <= TOLERANCE
            assert (mine[0] - theirs[0]).abs().max() > 1e-2
