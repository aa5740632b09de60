"""TransformerLens 4 has some of the same quantities; where it does, they are equal."""

from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tvlens.circuits import edge_scores
from tvlens.patching import attribution_patch

pytestmark = pytest.mark.skipif(
    tiny.HAS_HOOKED, reason="TransformerLens 3.9 has no attribution tools"
)
N, RIGHT, WRONG = 9, 33, 51


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    clean = torch.randint(5, 300, (2, N), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, 2] = clean[:, 2] + 7
    return clean, corrupted


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, RIGHT] - logits[0, -1, WRONG]


@pytest.mark.parametrize("name", ["gpt2", "llama", "pythia"])
def test_direct_attribution(name: str) -> None:
    from transformer_lens.tools.analysis import direct_logit_attribution

    # Theirs wants the last norm's weights folded into the unembedding; ours takes any.
    model: Any = tiny.model(name, "bridge", "fold")
    prompts, _ = tokens()
    ours = tv.attribute(model, prompts, answers=RIGHT, wrong=WRONG).parts()
    theirs = direct_logit_attribution(
        model, prompts, torch.tensor([RIGHT, RIGHT]), torch.tensor([WRONG, WRONG])
    )
    found = dict(
        zip(theirs.labels, theirs.attribution.detach().reshape(len(theirs.labels), -1), strict=True)
    )
    checked = 0
    for part in ours["part"].values:
        kind, _, layer = str(part).partition(" ")
        label = {"attention": f"{layer}_attn_out", "MLP": f"{layer}_mlp_out", "embedding": "embed"}
        if kind in label and label[kind] in found:
            np.testing.assert_allclose(
                ours.sel(part=part).values, found[label[kind]], atol=2e-5, rtol=1e-3
            )
            checked += 1
    assert checked == 9


@pytest.mark.parametrize("name", ["gpt2", "llama", "pythia"])
def test_attribution_patching_of_heads(name: str) -> None:
    from transformer_lens.tools.analysis import EdgeAttributionConfig
    from transformer_lens.tools.analysis import attribution_patch as theirs

    model: Any = tiny.model(name, "bridge")
    clean, corrupted = tokens()
    ours = attribution_patch(
        model,
        clean,
        corrupted,
        answers=RIGHT,
        wrong=WRONG,
        sites="z",
        by=("layer", "position", "head"),
    )
    effect = ours.effect.mean("prompt").isel(site=0)
    config = EdgeAttributionConfig(granularity="node")
    found = theirs(model, clean, corrupted, difference, config).node_scores
    heads = {node: score for node, score in found.items() if node.kind == "attn_head_out"}
    assert len(heads) == effect.size
    for node, score in heads.items():
        mine = effect.sel(layer=node.layer, position=node.position, head=node.head)
        assert float(mine) == pytest.approx(float(score), abs=2e-5, rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "pythia"])
def test_edges(name: str) -> None:
    from transformer_lens.tools.analysis import EdgeAttributionConfig
    from transformer_lens.tools.analysis import attribution_patch as theirs

    model: Any = tiny.model(name, "bridge")
    clean, corrupted = tokens()
    ours = edge_scores(model, clean, corrupted, answers=RIGHT, wrong=WRONG)
    # Theirs takes the gradient in the corrupted run, towards the clean one: exchanged, it is minus ours.
    config = EdgeAttributionConfig(granularity="edge")
    found = theirs(model, corrupted, clean, difference, config).edge_scores
    summed: dict[tuple[str, str], float] = {}
    for (sender, receiver), score in found.items():
        names = tuple(_name(node, model.cfg.n_layers) for node in (sender, receiver))
        summed[names] = summed.get(names, 0.0) - float(score)
    score = ours.data["score"]
    senders, receivers = ([str(n) for n in score[dim].values] for dim in ("sender", "receiver"))
    checked = 0
    for i, sender in enumerate(senders):
        for j, receiver in enumerate(receivers):
            value = float(score[i, j])
            if not np.isnan(value):
                assert value == pytest.approx(summed[sender, receiver], abs=2e-5, rel=1e-3)
                checked += 1
    assert checked == ours.graph.n_edges == len(summed)


def _name(node: Any, n_layers: int) -> str:
    """What tvlens calls a node; positions are summed."""
    match node.kind:
        case "embed" | "logits":
            return str(node.kind)
        case "attn_head_out":
            return f"h{node.layer}.{node.head}"
        case "mlp_out" | "mlp_in":
            return f"mlp{node.layer}"
        case kind:
            return f"h{node.layer}.{node.head}.{kind[0]}"
