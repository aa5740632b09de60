"""A model spread over two GPUs computes what it computes on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tvlens as tv
from tests import tiny
from tvlens.models.runner import runner

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PLANS = ("suffix", "growing", "plain")


def spread(kind: str, folder: Path) -> Any:
    """The tiny Llama, its blocks on two devices."""
    tiny.hf("llama").save_pretrained(folder)
    tiny.tokenizer("llama").save_pretrained(folder)
    model = tv.load_model(folder, backend=kind, n_devices=2, dtype="float32", processing="none")
    drive = runner(model)
    assert len({drive.block(layer).device for layer in range(drive.n_layers)}) == 2
    return model


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_theta_and_injection(kind: str, tmp_path: Path) -> None:
    model, single = spread(kind, tmp_path), tiny.model("llama")
    prompts = tv.build_prompts(tv.load_task("to_upper"), single, shots=3, n=6, seed=0)
    theta, expected = tv.extract(model, prompts), tv.extract(single, prompts)
    assert (theta.values.cpu() - expected.values.cpu()).abs().max() < 1e-4
    tokens = prompts.zero_shot.tokens[:1]
    for layer in (0, 3):
        with torch.no_grad(), tv.inject(model, theta.mean(), layer=layer):
            found = model(tokens.to(runner(model).device))
        with torch.no_grad(), tv.inject(single, expected.mean(), layer=layer):
            asked = single(tokens)
        assert (found.cpu() - asked).abs().max() < 1e-3
        scores = [tv.score(m, prompts, vector=expected, layer=layer) for m in (model, single)]
        assert scores[0].accuracy == scores[1].accuracy


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_patching(kind: str, plan: str, tmp_path: Path) -> None:
    model, single = spread(kind, tmp_path), tiny.model("llama")
    asked: dict[str, Any] = {"answers": "B", "wrong": "b", "sites": ["resid_pre", "z", "pattern"]}
    found, expected = (
        tv.patch(m, ["a->A b->", "c->C b->"], ["a->a b->", "c->c b->"], plan=plan, **asked)
        for m in (model, single)
    )
    gap = abs(found.data["value"] - expected.data["value"]).max()
    assert float(gap) < 1e-4
