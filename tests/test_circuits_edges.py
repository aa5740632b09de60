"""Edge scores: they sum to what nodes are worth, and equal TransformerLens' own split inputs edge by edge."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tests.test_patching import pair
from tvlens.circuits.edges import edge_scores
from tvlens.circuits.graph import Graph, graph_of, head_writes
from tvlens.circuits.pose import _bytes
from tvlens.circuits.results import EdgeScores
from tvlens.engine.backward import backward
from tvlens.models.runner import runner
from tvlens.patching.pairs import as_batch

ASKED: dict[str, Any] = {"answers": [7, 11], "wrong": [13, 5]}


@cache
def scored(name: str, kind: str, nodes: str = "head") -> EdgeScores:
    return edge_scores(tiny.model(name, kind), *pair(), nodes=nodes, **ASKED)


def difference(model: Any) -> Any:
    def metric(resid: Tensor, rows: slice) -> Tensor:
        tokens = torch.tensor([ASKED["answers"], ASKED["wrong"]]).T[rows]
        logits = runner(model).logits(resid, tokens)
        return logits[:, 0] - logits[:, 1]

    return metric


def test_the_graph() -> None:
    graph = Graph(n_layers=2, n_heads=4, n_kv_heads=2, parallel=False)
    names = [node.name for node in graph.receivers]
    assert names[:9] == [
        "h0.0.q", "h0.1.q", "h0.2.q", "h0.3.q", "kv0.0.k", "kv0.1.k", "kv0.0.v", "kv0.1.v", "mlp0",
    ]  # fmt: skip
    assert names[-1] == "logits" and graph.edges[:, -1].all()
    # The first layer's attention hears the embedding alone; its MLP hears the heads as well.
    assert graph.edges[:, :8].sum(axis=0).tolist() == [1] * 8 and graph.edges[:, 8].sum() == 5
    parallel = Graph(n_layers=2, n_heads=4, n_kv_heads=4, parallel=True)
    assert parallel.receivers[4].name == "h0.0.k"
    assert parallel.edges[:, parallel.rows(0, "mlp")].sum() == 1
    # A key-value head speaks through all heads of its group.
    speaks = {names[i]: [graph.senders[s].name for s in graph.speaks(i)] for i in range(len(names))}
    assert speaks["kv1.1.v"] == ["h1.2", "h1.3"] and speaks["h1.2.q"] == ["h1.2"]
    assert speaks["mlp1"] == ["mlp1"] and speaks["logits"] == []


@pytest.mark.parametrize("name, kind", GRID)
def test_heads_write_what_attention_adds(name: str, kind: str) -> None:
    drive = runner(tiny.model(name, kind))
    z = torch.randn(5, *drive.site_shape("z"), generator=torch.Generator().manual_seed(0))
    parts = head_writes(drive.block(1), z)
    torch.testing.assert_close(parts.sum(0), drive.block(1).attn_out(z), atol=1e-4, rtol=1e-4)
    if name != "gemma3":
        # Without a norm behind it, a head says the same whatever the others say.
        alone = z.clone()
        alone[:, [0, 1, 3]] = 0
        torch.testing.assert_close(head_writes(drive.block(1), alone)[2], parts[2])


@pytest.mark.parametrize("name, kind", GRID)
def test_edges_of_a_sender_sum_to_its_own_score(name: str, kind: str) -> None:
    model, (clean, corrupted) = tiny.model(name, kind), pair()
    scores = scored(name, kind)
    found = scores.data["score_by_prompt"].sum("receiver")
    sites = ("resid_pre", "z", "attn_out", "mlp_out")
    places = [(site, layer) for site in sites for layer in range(4)]
    here, there = (
        backward(model, as_batch(model, ids), difference(model), places=places)
        for ids in (clean, corrupted)
    )

    def node(place: tuple[str, int], *dims: int) -> np.ndarray:
        change = here.activations[place] - there.activations[place]
        return (change * here.gradients[place]).sum(dims).numpy()

    expected = {"embed": node(("resid_pre", 0), 1, 2)}
    for layer in range(4):
        expected[f"mlp{layer}"] = node(("mlp_out", layer), 1, 2)
        by_head = node(("z", layer), 1, 3)
        if name != "gemma3":
            expected |= {f"h{layer}.{head}": by_head[:, head] for head in range(4)}
        heads = found.sel(sender=[f"h{layer}.{head}" for head in range(4)])
        np.testing.assert_allclose(heads.sum("sender"), node(("attn_out", layer), 1, 2), atol=1e-4)
    for sender, worth in expected.items():
        np.testing.assert_allclose(found.sel(sender=sender), worth, atol=1e-4)
    assert np.abs(found).max() > 0.1
    np.testing.assert_allclose(scores.sent(), found.mean("prompt"), atol=1e-5)


@pytest.mark.parametrize("name, kind", GRID)
def test_the_coarse_graph_has_the_sums_of_the_fine_one(name: str, kind: str) -> None:
    fine, coarse = scored(name, kind).score, scored(name, kind, "layer").score
    for layer in range(4):
        heads = fine.sel(sender=[f"h{layer}.{head}" for head in range(4)]).sum(
            "sender", skipna=False
        )
        for other in range(4):
            reads = fine["receiver_layer"].values == other
            reads &= np.isin(fine["receiver_kind"].values, ["q", "k", "v"])
            np.testing.assert_allclose(
                coarse.sel(sender=f"attn{layer}", receiver=f"attn{other}"),
                heads.isel(receiver=reads).sum(skipna=False),
                atol=1e-4,
            )
        np.testing.assert_allclose(
            coarse.sel(sender="mlp0", receiver="logits"),
            fine.sel(sender="mlp0", receiver="logits"),
            atol=1e-5,
        )


def split(name: str) -> Any:
    """A model whose heads TransformerLens lets read and write one by one."""
    model = tv.load_model(
        tiny.hf(name), tokenizer=tiny.tokenizer(name), device="cpu", backend="hooked"
    )
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    return model


def theirs(model: Any, clean: Tensor, corrupted: Tensor, graph: Graph) -> Tensor:
    """Edge scores from TransformerLens' own hooks, with every head's input a copy of its own."""

    def said(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
        out = [cache["resid_pre", 0][:, :, None]]
        for layer in range(model.cfg.n_layers):
            out += [cache["result", layer], cache["mlp_out", layer][:, :, None]]
        return torch.cat(out, dim=2)

    kept: dict[str, Tensor] = {}
    inputs = [f"hook_{site}_input" for site in "qkv"] + ["hook_mlp_in"]
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    names = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in inputs]

    def keep(gradient: Tensor, hook: Any) -> None:
        kept[hook.name] = gradient.detach().clone()

    with model.hooks(bwd_hooks=[(name, keep) for name in (*names, last)]):
        logits = model(clean)[:, -1]
        rows = torch.arange(len(clean))
        right, wrong = (logits[rows, torch.tensor(ASKED[key])] for key in ("answers", "wrong"))
        (right - wrong).sum().backward()
    model.zero_grad()
    gradients = []
    for name in (*names, last):
        gradient = kept[name]
        gradients.append(gradient if gradient.ndim == 4 else gradient[:, :, None])
    by_receiver = torch.cat(gradients, dim=2)
    return torch.einsum("bpsd,bprd->srb", said(clean) - said(corrupted), by_receiver)


@tiny.needs_hooked
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "pythia"])
def test_edges_equal_transformer_lens_split_inputs(name: str) -> None:
    clean, corrupted = pair()
    graph = graph_of(tiny.model(name))
    expected = theirs(split(name), clean, corrupted, graph).numpy()
    found = scored(name, "hooked").data["score_by_prompt"].values
    np.testing.assert_allclose(found[graph.edges], expected[graph.edges], atol=1e-4)
    assert np.isnan(found[~graph.edges]).all()


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.slow
def test_integrated_gradients_are_complete(kind: str) -> None:
    model, (clean, corrupted) = tiny.model("gpt2", kind), pair()

    def gap(**options: Any) -> float:
        scores = edge_scores(model, clean, corrupted, **options, **ASKED).data
        worth = scores["score_by_prompt"].sel(sender="embed").sum("receiver")
        whole = scores["clean"] - scores["corrupted"]
        return float(np.abs(worth - whole).max() / np.abs(whole).max())

    assert gap(method="eap-ig", steps=12) < 0.01
    assert gap() > 0.1


def test_prompts_in_chunks_and_of_several_lengths() -> None:
    model = tiny.model("llama")
    clean, corrupted = ["a b c->", "one two", "x y z w"], ["a b d->", "one ten", "x y q w"]
    asked: dict[str, Any] = {"answers": ["A", "B", "C"], "wrong": ["x", "y", "z"]}
    whole = edge_scores(model, clean, corrupted, **asked).data["score_by_prompt"]
    longest = int(as_batch(model, clean).lengths.max())
    one = _bytes(runner(model), graph_of(model), longest)
    parts = edge_scores(model, clean, corrupted, memory=one, **asked)
    np.testing.assert_allclose(parts.data["score_by_prompt"], whole, atol=1e-5)
    for i in range(3):
        mine = {key: value[i] for key, value in asked.items()}
        alone = edge_scores(model, clean[i], corrupted[i], **mine)
        np.testing.assert_allclose(alone.score, whole.isel(prompt=i), atol=1e-5)


@pytest.mark.parametrize("nodes", ["head", "layer"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_equal_prompts_have_edges_worth_nothing(name: str, nodes: str) -> None:
    model, (clean, corrupted) = tiny.model(name), pair()
    half = torch.stack([clean[0], corrupted[1]])
    longest = _bytes(runner(model), graph_of(model), clean.shape[1])
    # One prompt at a time, of which the first differs nowhere.
    found = edge_scores(model, clean, half, nodes=nodes, memory=longest, **ASKED)
    scores = found.data["score_by_prompt"].values[found.graph.edges]
    assert (scores[:, 0] == 0).all()
    np.testing.assert_allclose(
        scores[:, 1],
        scored(name, tiny.KINDS[0], nodes).data["score_by_prompt"].values[found.graph.edges][:, 1],
        atol=1e-4,
    )
    assert edge_scores(model, clean, clean, nodes=nodes, **ASKED).sent().max() == 0


def test_there_are_no_more_edges_at_the_top_than_in_the_graph() -> None:
    scores = scored("llama", tiny.KINDS[0])
    everything = scores.top(10_000)
    assert len(everything) == scores.graph.n_edges == 343
    assert everything["score"].notna().all()
    with pytest.raises(ValueError, match="n must be at least 1; -1 arrived"):
        scores.top(-1)


def test_a_graph_too_large_says_how_large_and_what_is_smaller() -> None:
    model = tiny.model("gpt2")
    message = r"21 senders, 53 receivers and 479 edges; for one prompt of 7 tokens it holds .* MB"
    with pytest.raises(ValueError, match=message) as caught:
        edge_scores(model, *pair(), memory=150_000, **ASKED)
    assert "nodes='layer' (45 edges) holds" in str(caught.value)
    assert edge_scores(model, *pair(), memory=150_000, nodes="layer", **ASKED).graph.n_edges == 45
    with pytest.raises(ValueError, match="Or give memory="):
        edge_scores(model, *pair(), memory=100_000, nodes="layer", **ASKED)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "eap_ig"}, "Nearest: eap-ig"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"nodes": "heads"}, "Nearest: head"),
        ({"metric": "rank", "wrong": None}, "has no gradient"),
        ({"metric": "kl", "answers": None, "wrong": None}, "method='eap-ig'"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edge_scores(tiny.model("gpt2"), *pair(), **ASKED | options)


@tiny.needs_hooked
def test_refuses_hooks_and_models_that_have_no_parts() -> None:
    from tests.test_attribution_patching import linear_model

    model = linear_model()
    with pytest.raises(ValueError, match="cannot run its blocks in parts"):
        edge_scores(model, *pair(), **ASKED)
    other = tv.load_model(tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), device="cpu")
    mine = other.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: None)])
    with mine, pytest.raises(ValueError, match="take them off"):
        edge_scores(other, *pair(), **ASKED)


def test_scores_are_saved_read_and_told(tmp_path: Any) -> None:
    scores = scored("llama", tiny.KINDS[0])
    again = EdgeScores.load(scores.save(tmp_path / "edges.nc"))
    assert again.graph == scores.graph and again.finding() == scores.finding()
    best = scores.top(3)
    assert best["score"].abs().is_monotonic_decreasing
    assert f"{best['sender'][0]} → {best['receiver'][0]}" in scores.finding()
    assert (
        float(scores.score.sel(sender=best["sender"][0], receiver=best["receiver"][0]))
        == (best["score"][0])
    )
    assert np.nanmax(np.abs(scores.score)) == abs(best["score"][0])
    assert "syed2023attribution" in scores.cite() and scores.summary()["n_edges"] == 343
    assert scores.plot(n_edges=20).layout.title.text


def test_the_finding_is_an_estimate_of_a_stated_gap() -> None:
    scores = scored("llama", tiny.KINDS[0])
    clean, corrupted = (float(scores.data[run].mean()) for run in ("clean", "corrupted"))
    said = scores.finding()
    assert said.startswith("By gradient, the strongest edge") and "is worth about" in said
    assert f"of the {clean - corrupted:.2f} by which the logit difference changes" in said
    assert f"corrupted run ({corrupted:.2f}) to the clean one ({clean:.2f})" in said


def test_equal_prompts_have_no_strongest_edge() -> None:
    clean, _ = pair()
    scores = edge_scores(tiny.model("llama"), clean, clean, **ASKED)
    assert scores.finding().startswith(
        "No edge has a score: nothing that reaches the logit difference"
    )
    assert "strongest" not in scores.finding()


def test_a_metric_that_jumps_is_refused_first() -> None:
    with pytest.raises(ValueError, match="'accuracy' has no gradient: it jumps"):
        edge_scores(tiny.model("llama"), *pair(), **ASKED, metric="accuracy")
