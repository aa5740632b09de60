"""What a run gives back: readouts of the right logits, in the model's type, and no more than was asked."""

from typing import Any

import pytest
import torch

from tests import tiny
from tests.cases import (
    GRID,
    KIND,
    PLANS,
    TOLERANCE,
    Values,
    assert_same,
    by_hand,
    make_batch,
    model_of,
    random_edit,
    tensors,
)
from tvlens import load_model
from tvlens.engine import Edit, FirstToken, LastLogits, Read, Request, TokenLogits, run
from tvlens.models.runner import runner


def test_the_pass_ends_where_nothing_more_is_asked_for() -> None:
    model, batch = model_of("llama"), make_batch([6, 9])
    ran: list[int] = []
    whole = type(runner(model)).block

    def block(self: Any, layer: int) -> Any:
        ran.append(layer)
        return whole(self, layer)

    run(model, [Request(batch)], plan="suffix")  # measures the model's costs, once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(runner(model)), "block", block)
        run(model, [Request(batch, reads=(Read("resid_post", (0, 1)),))], plan="suffix")
        assert ran == [0, 1]
        ran.clear()
        run(model, [Request(batch, readout=LastLogits())], plan="suffix")
        assert ran == [0, 1, 2, 3]


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_readouts(name: str, kind: str) -> None:
    """Whole logits, a few tokens' logits, first-token scores, and none: of the same run."""
    model, batch = tiny.model(name, kind), make_batch([6, 9, 4, 7])
    cells = ((), (random_edit(model, "resid_post", 1, 4),))
    columns = torch.tensor([[3, 5, 3], [600, 0, 1], [9, 9, 9], [4, 639, 2]])
    logits, _ = by_hand(model, Request(batch, cells))
    log_probs = logits.log_softmax(-1)
    answers = tuple((int(i), 7) for i in logits[0].argmin(dim=-1))  # another one for each prompt
    assert len(set(answers)) > 1
    expected = torch.stack(
        [log_probs[:, i, list(ids)].amax(-1) for i, ids in enumerate(answers)], 1
    )
    for plan in PLANS:
        few, score, none = (
            run(model, [Request(batch, cells, readout=readout)], plan=plan)[0]
            for readout in (TokenLogits(columns), FirstToken(answers), None)
        )
        picked = logits.gather(2, columns.expand(2, 4, 3))
        assert (few.values["logits"] - picked).abs().max() <= TOLERANCE
        assert torch.equal(score.values["predicted"], logits.argmax(-1))
        assert (score.values["answer_log_prob"] - expected).abs().max() <= TOLERANCE
        assert (score.values["log_prob"] - log_probs.amax(-1)).abs().max() <= TOLERANCE
        assert none.values == {} and none.activations == ()


def test_first_token_scores_of_logits() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [3.0, 0.0, 1.0]])
    found = FirstToken(((1,), (1, 2)))(logits, torch.tensor([0, 1, 0]))
    assert found["correct"].tolist() == [True, False, False]
    assert found["predicted"].tolist() == [1, 0, 0]
    expected = torch.log_softmax(logits, dim=-1)
    wanted = torch.stack([expected[0, 1], expected[1, 2], expected[2, 1]])
    torch.testing.assert_close(found["answer_log_prob"], wanted)
    torch.testing.assert_close(found["log_prob"], expected.amax(dim=-1))


@pytest.mark.parametrize("plan", PLANS)
def test_only_last_positions_are_unembedded(plan: str) -> None:
    model, batch = model_of("llama"), make_batch([30, 28])
    cells = ((), (random_edit(model, "resid_post", 0, 2),))
    rows: list[int] = []
    read_out = type(runner(model)).logits

    def logits(self: Any, resid: torch.Tensor, columns: Any = None) -> torch.Tensor:
        rows.append(len(resid))
        return read_out(self, resid, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(runner(model)), "logits", logits)
        run(model, [Request(batch, cells, reads=(Read("resid_post", (0,)),))], plan=plan)
        assert rows == []
        run(model, [Request(batch, cells, readout=LastLogits())], plan=plan)
    assert sum(rows) == 4


@pytest.mark.parametrize("plan", PLANS)
def test_keeps_no_gradient_and_changes_no_argument(plan: str) -> None:
    model, batch = model_of("gpt2"), make_batch([7, 5])
    values = Values(model, n=2, width=7)("resid_post")
    before, tokens, mask = values.clone(), batch.tokens.clone(), batch.mask.clone()
    weights = {name: p._version for name, p in model.named_parameters()}
    edit = Edit("resid_post", 1, values, mode="add", scale=3.0)
    request = Request(batch, ((edit,),), (Read("resid_post", (1,)),), LastLogits())
    one, two = (run(model, [request], plan=plan)[0] for _ in range(2))
    assert_same(one, two, 1e-6)
    assert one.activations[0].shape == (1, 2, 1, model.cfg.d_model)
    assert not any(tensor.requires_grad for tensor in tensors(one))
    assert torch.equal(values, before)
    assert torch.equal(batch.tokens, tokens) and torch.equal(batch.mask, mask)
    assert weights == {name: p._version for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_other_types(name: str, dtype: torch.dtype) -> None:
    from copy import deepcopy

    hf = deepcopy(tiny.hf(name)).to(dtype)
    model = load_model(
        hf,
        tokenizer=tiny.tokenizer(name),
        device="cpu",
        backend=KIND,
        processing="none",
        dtype=dtype,
    )
    batch = make_batch([10, 5])
    cells = ((), (random_edit(model, "resid_pre", 1, 2, position=1),))
    reads = (Read("resid_post", (3,), None),)
    request = Request(batch, cells, reads, LastLogits())
    plain, suffix = (run(model, [request], plan=plan)[0] for plan in ("plain", "suffix"))
    assert suffix.activations[0].dtype == dtype
    for mine, theirs in zip(tensors(suffix), tensors(plain), strict=True):
        # A Bridge's own attention takes its softmax in float32, whatever the type.
        exact = 1e-8 if KIND == "hooked" else 1e-6
        size = exact if dtype == torch.float64 else 0.05
        assert (mine - theirs).double().norm() <= size * theirs.double().norm()
