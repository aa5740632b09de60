"""The tail of a run is the run: same numbers, and the same gradients as through the whole model."""

import pytest
import torch

from tests import tiny
from tvlens.engine import Edit, Read, Request, run
from tvlens.engine.backward import backward
from tvlens.engine.tail import Tail
from tvlens.models.runner import runner
from tvlens.patching.pairs import as_batch

TEXTS = ["example:cat->", "one two three four->", "x"]
EVERY = [(name, kind) for name in tiny.ARCHITECTURES for kind in tiny.KINDS]


@pytest.mark.parametrize(("name", "kind"), EVERY)
@pytest.mark.parametrize("layer", [0, -1])
def test_the_tail_is_the_run(name: str, kind: str, layer: int) -> None:
    model = tiny.model(name, kind)
    batch, last = as_batch(model, TEXTS), runner(model).n_layers - 1
    tail = Tail(model, batch, layer=layer)
    written = torch.randn(tail.clean.shape, generator=torch.Generator().manual_seed(0))
    cells = ((), (Edit("resid_post", tail.layer, written),))
    request = Request(batch, cells=cells, reads=(Read("resid_post", (last,)),))
    (output,) = run(model, [request], plan="plain")
    for cell, resid in enumerate((tail.clean, written)):
        with torch.no_grad():
            found = tail(resid)
        torch.testing.assert_close(found, output.activations[0][cell, :, 0], atol=1e-4, rtol=1e-4)
    # Rows in any order, several of one prompt.
    prompt = torch.tensor([2, 0, 0])
    with torch.no_grad():
        several = tail(written[prompt], prompt)
    torch.testing.assert_close(several, output.activations[0][1, prompt, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_its_gradient_is_that_of_the_whole_model(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    batch, drive = as_batch(model, TEXTS), runner(model)

    def read(resid: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        return drive.logits(resid).log_softmax(dim=-1)[:, 5]

    tail = Tail(model, batch, layer=0)
    resid = tail.clean.clone().requires_grad_()
    (slope,) = torch.autograd.grad(read(tail(resid)).sum(), resid)
    whole = backward(model, batch, read, places=[("resid_post", 0)]).gradients["resid_post", 0]
    expected = whole[torch.arange(len(TEXTS)), batch.lengths - 1]
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(slope, expected, atol=1e-5, rtol=1e-3)


def test_a_hooked_model_is_refused() -> None:
    model = tiny.model("llama")
    model.add_hook("blocks.0.hook_resid_post", lambda activation, hook: activation * 2)
    try:
        with pytest.raises(ValueError, match="hooks sit on it"):
            Tail(model, as_batch(model, TEXTS), layer=0)
    finally:
        model.reset_hooks()
