"""Gradients are what a small edit does, at every site, on every architecture and both model kinds."""

from typing import Any

import pytest
import torch

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tvlens.engine import Edit, Request, TokenLogits, run
from tvlens.engine.backward import backward
from tvlens.models.runner import runner
from tvlens.patching.pairs import as_batch
from tvlens.sites import SITES

PROMPTS = ["a->A b->", "one two three"]
TOKENS = torch.tensor([[5], [9]])


def logit_of(model: Any) -> Any:
    """The logit of each prompt's token."""
    return lambda resid, rows: runner(model).logits(resid, TOKENS[rows])[:, 0]


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_gradients_are_slopes(name: str, kind: str) -> None:
    model = tv.load_model(
        tiny.hf(name), tokenizer=tiny.tokenizer(name), device="cpu", backend=kind, dtype="float64"
    )
    drive, batch = runner(model), as_batch(model, PROMPTS)
    places = [(site, layer) for site in SITES for layer in (0, 2) if drive.has(site, layer)]
    found = backward(model, batch, logit_of(model), places=places)
    generator = torch.Generator().manual_seed(0)
    # Hugging Face takes its softmax in single precision: the step is not too small for that.
    step, readout = 3e-3, TokenLogits(TOKENS)
    for site, layer in places:
        kept = found.activations[site, layer]
        towards = torch.randn(kept.shape, generator=generator, dtype=kept.dtype)
        if site == "pattern":
            # Beyond the diagonal no edit is allowed to say anything.
            towards = towards * (kept > 0)
        towards = towards / towards.norm()
        cells = tuple((Edit(site, layer, kept + s * towards, None),) for s in (step, -step))
        (output,) = run(model, [Request(batch, cells, (), readout)], plan="plain")
        up, down = output.values["logits"][..., 0]
        expected = (found.gradients[site, layer] * towards).flatten(1).sum(dim=1)
        exact = {"rtol": 1e-3, "atol": 1e-5} if kind == "hooked" else {"rtol": 1e-2, "atol": 3e-4}
        torch.testing.assert_close((up - down) / (2 * step), expected, **exact)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_prompts_in_chunks_have_the_same_gradients(kind: str) -> None:
    model = tiny.model("llama", kind)
    batch = as_batch(model, ["a->A b->", "one", "a b c d e f g", "x y"])
    places = [("resid_pre", 0), ("z", 3), ("pattern", 1)]

    def scalar(resid: torch.Tensor, rows: slice) -> torch.Tensor:
        return runner(model).logits(resid)[:, 7]

    whole = backward(model, batch, scalar, places=places, memory=2**30)
    parts = backward(model, batch, scalar, places=places, memory=1)
    torch.testing.assert_close(parts.values, whole.values)
    for place in places:
        torch.testing.assert_close(
            parts.gradients[place], whole.gradients[place], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(parts.activations[place], whole.activations[place])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_edit_comes_before_the_gradient(kind: str) -> None:
    model = tiny.model("gpt2", kind)
    batch = as_batch(model, "a->A b->")
    zero = Edit("resid_post", 1, torch.zeros(1, model.cfg.d_model), -1)
    found = backward(
        model, batch, lambda resid, rows: resid.square().sum(-1), places=[("resid_post", 1)],
        edits=(zero,),
    )  # fmt: skip
    assert found.activations["resid_post", 1][0, -1].abs().max() == 0
    assert found.gradients["resid_post", 1][0, -1].abs().max() > 0


def test_weights_are_as_they_were() -> None:
    model = tiny.model("llama")
    before = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(ValueError, match=r"one number for each of 1 prompts; shape \(1, 64\)"):
        backward(model, as_batch(model, "a"), lambda resid, rows: resid, places=[("z", 0)])
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert all(weight.grad is None for weight in model.parameters())


def test_places_may_be_asked_for_in_any_order() -> None:
    model = tiny.model("llama")
    batch = as_batch(model, "a->A b->")
    places = [("resid_mid", 3), ("v", 0), ("pattern", 2)]
    found = backward(model, batch, lambda resid, rows: resid.square().sum(-1), places=places)
    assert list(found.gradients) == list(found.activations) == places
