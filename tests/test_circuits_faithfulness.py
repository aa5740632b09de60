"""Circuits: what is cut is cut, and nothing else; what is chosen hangs together."""

import inspect
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tvlens as tv
from tests import tiny
from tests.test_circuits_edges import ASKED, GRID, scored, split
from tests.test_patching import pair
from tvlens.circuits.faithfulness import faithfulness
from tvlens.circuits.graph import Graph
from tvlens.circuits.results import Circuit, EdgeScores, Faithfulness
from tvlens.circuits.search import circuit, live
from tvlens.provenance import encode

KIND = tiny.KINDS[0]


def of_edges(scores: EdgeScores, chosen: np.ndarray) -> Circuit:
    """A circuit of these edges."""
    marked = scores.data.assign(score=(("sender", "receiver"), np.where(chosen, 1.0, 0.0)))
    return circuit(EdgeScores(marked), n_edges=int(chosen.sum()), method="top")


@cache
def some(name: str, share: float = 0.5) -> np.ndarray:
    graph = scored(name, KIND).graph
    return graph.edges & (np.random.default_rng(0).random(graph.edges.shape) < share)


@pytest.mark.parametrize("nodes", ["head", "layer"])
@pytest.mark.parametrize("name, kind", GRID)
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(
    name: str, kind: str, nodes: str
) -> None:
    scores = scored(name, kind, nodes)
    circuits = [circuit(scores, n_edges=n) for n in (0, scores.graph.n_edges)]
    found = faithfulness(tiny.model(name, kind), circuits, *pair(), **ASKED).data
    clean, corrupted = found["clean"], found["corrupted"]
    assert np.abs(clean - corrupted).min() > 0.05
    for variable, none, whole in (("value", corrupted, clean), ("without", clean, corrupted)):
        np.testing.assert_allclose(found[variable][0], none, atol=1e-4)
        np.testing.assert_allclose(found[variable][1], whole, atol=1e-4)


def theirs(model: Any, clean: Tensor, corrupted: Tensor, whole: np.ndarray) -> Tensor:
    """Logits with edges cut, by TransformerLens' own hooks on the clean prompts: take away what is cut."""
    cut, graph_layers = torch.from_numpy(~whole).float(), model.cfg.n_layers
    with torch.no_grad():
        _, cache = model.run_with_cache(corrupted)
    before = [cache["resid_pre", 0][:, :, None]]
    for layer in range(graph_layers):
        before += [cache["result", layer], cache["mlp_out", layer][:, :, None]]
    said = torch.cat(before, dim=2)
    now = said.clone()
    n_heads, readers = model.cfg.n_heads, 0

    def write(value: Tensor, hook: Any, at: slice) -> None:
        now[:, :, at] = value if value.ndim == 4 else value[:, :, None]

    def read(value: Tensor, hook: Any, heard: int, at: slice) -> Tensor:
        lost = torch.einsum("bpsd,sr->bprd", (now - said)[:, :, :heard], cut[:heard, at])
        return value - (lost if value.ndim == 4 else lost[:, :, 0])

    hooks: list[Any] = [("blocks.0.hook_resid_pre", partial(write, at=slice(0, 1)))]
    for layer in range(graph_layers):
        heard, block = 1 + layer * (n_heads + 1), f"blocks.{layer}."
        heads = slice(heard, heard + n_heads)
        for site in "qkv":
            width = n_heads if site == "q" else (model.cfg.n_key_value_heads or n_heads)
            at = slice(readers, readers + width)
            hooks.append((f"{block}hook_{site}_input", partial(read, heard=heard, at=at)))
            readers += width
        hooks.append((f"{block}attn.hook_result", partial(write, at=heads)))
        seen = heard if model.cfg.parallel_attn_mlp else heard + n_heads
        at = slice(readers, readers + 1)
        hooks.append((f"{block}hook_mlp_in", partial(read, heard=seen, at=at)))
        readers += 1
        mlp = slice(heads.stop, heads.stop + 1)
        hooks.append((f"{block}hook_mlp_out", partial(write, at=mlp)))
    at = slice(readers, readers + 1)
    final = f"blocks.{graph_layers - 1}.hook_resid_post"
    hooks.append((final, partial(read, heard=said.shape[2], at=at)))
    with torch.no_grad():
        return model.run_with_hooks(clean, fwd_hooks=hooks)[:, -1]


@tiny.needs_hooked
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "pythia"])
def test_cut_edges_equal_transformer_lens_split_inputs(name: str) -> None:
    clean, corrupted = pair()
    scores, chosen = scored(name, "hooked"), some(name)
    found = faithfulness(
        tiny.model(name, "hooked"), of_edges(scores, chosen), clean, corrupted, **ASKED
    ).data
    rows = torch.arange(len(clean))
    for variable, whole in (("value", chosen), ("without", scores.graph.edges & ~chosen)):
        logits = theirs(split(name), clean, corrupted, whole)
        right, wrong = (logits[rows, torch.tensor(ASKED[key])] for key in ("answers", "wrong"))
        np.testing.assert_allclose(found[variable][0], right - wrong, atol=2e-4)
        assert np.abs(found[variable][0] - found["clean"]).max() > 1e-3
        assert np.abs(found[variable][0] - found["corrupted"]).max() > 1e-3


class Gemma:
    """Hugging Face's Gemma 3 with edges that can be cut: norms stand before and after its heads."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.hf = graph, tiny.hf("gemma3")
        self.width = self.hf.config.head_dim

    def __call__(
        self, tokens: Tensor, known: list[Tensor] | None = None, whole: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The metric, and what everyone says; ``known`` is what they say in the corrupted run."""
        self.said: list[Tensor] = []
        self.known, self.whole = known, whole
        handles = [
            handle for layer, block in enumerate(self.hf.model.layers)
            for handle in self.hooks(layer, block)
        ]  # fmt: skip
        norm = self.hf.model.norm
        handles.append(norm.register_forward_pre_hook(self.heard(self.graph.n_layers, "logits")))
        try:
            logits = self.hf(tokens).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()
        rows = torch.arange(len(tokens))
        right, wrong = (logits[rows, torch.tensor(ASKED[key])] for key in ("answers", "wrong"))
        return right - wrong, self.said

    def lost(self, layer: int, kind: str) -> list[Tensor]:
        """What each receiver of a kind misses of this run."""
        nodes = self.graph.receivers
        at = [i for i, node in enumerate(nodes) if (node.layer, node.kind) == (layer, kind)]
        n = self.graph.heard(nodes[at[0]])
        if self.known is None or self.whole is None:
            return [torch.zeros(1)] * len(at)
        moved = torch.stack(self.said[:n]) - torch.stack(self.known[:n])
        # Edge scores hold messages as they are: the slope is only by the share that arrives.
        moved = moved.detach() if self.whole.requires_grad else moved
        return list(torch.einsum("sbpd,sr->rbpd", moved, 1 - self.whole[:n, at]))

    def heard(self, layer: int, kind: str) -> Any:
        return lambda module, args: (args[0] - self.lost(layer, kind)[0],)

    def hooks(self, layer: int, block: Any) -> list[Any]:
        inside: dict[str, Tensor] = {}
        attn, after = block.self_attn, block.post_attention_layernorm

        def read(module: Any, args: Any) -> None:
            inside["resid"] = args[0]
            if layer == 0:
                self.said.append(args[0])

        def project(module: Any, args: Any, out: Tensor, *, kind: str) -> Tensor:
            # Every head's own input, normed by itself.
            inputs = [
                block.input_layernorm(inside["resid"] - one) for one in self.lost(layer, kind)
            ]
            weights = module.weight.split(self.width)
            return torch.cat([x @ w.T for x, w in zip(inputs, weights, strict=True)], dim=-1)

        def heads(module: Any, args: Any, out: Tensor) -> None:
            scale = torch.rsqrt(args[0].square().mean(-1, keepdim=True) + module.eps)
            each = zip(inside["z"].split(self.width, -1), attn.o_proj.weight.split(self.width, 1),
                       strict=True)  # fmt: skip
            self.said += [z @ w.T * scale * (1 + module.weight) for z, w in each]

        projections = [(attn.q_proj, "q"), (attn.k_proj, "k"), (attn.v_proj, "v")]
        return [
            block.register_forward_pre_hook(read),
            *(m.register_forward_hook(partial(project, kind=kind)) for m, kind in projections),
            attn.o_proj.register_forward_pre_hook(lambda m, args: inside.update(z=args[0])),
            after.register_forward_hook(heads),
            block.pre_feedforward_layernorm.register_forward_pre_hook(self.heard(layer, "mlp")),
            block.post_feedforward_layernorm.register_forward_hook(
                lambda m, args, out: self.said.append(out)
            ),
        ]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_norms_behind_heads_are_as_in_hugging_faces_gemma(kind: str) -> None:
    (clean, corrupted), scores, chosen = pair(), scored("gemma3", kind), some("gemma3")
    graph = scores.graph
    gemma = Gemma(graph)
    with torch.no_grad():
        base, known = gemma(corrupted)
        alone, _ = gemma(clean, known, torch.from_numpy(chosen).float())
        without, _ = gemma(clean, known, torch.from_numpy(graph.edges & ~chosen).float())
    circuits = of_edges(scores, chosen)
    found = faithfulness(tiny.model("gemma3", kind), circuits, clean, corrupted, **ASKED).data
    np.testing.assert_allclose(found["corrupted"], base, atol=2e-4)
    np.testing.assert_allclose(found["value"][0], alone, atol=2e-4)
    np.testing.assert_allclose(found["without"][0], without, atol=2e-4)
    assert np.abs(found["value"][0] - found["corrupted"]).max() > 1e-2
    whole = torch.ones(graph.edges.shape, requires_grad=True)
    (slopes,) = torch.autograd.grad(gemma(clean, known, whole)[0].sum(), whole)
    np.testing.assert_allclose(
        scores.score.values[graph.edges], slopes.numpy()[graph.edges] / 2, atol=1e-4
    )


@pytest.mark.parametrize("name", ["gemma3", "llama"])
@tiny.needs_hooked
def test_both_kinds_of_model_agree(name: str) -> None:
    chosen = some(name)
    values = [
        faithfulness(
            tiny.model(name, kind), of_edges(scored(name, kind), chosen), *pair(), **ASKED
        ).data["value"]
        for kind in ("hooked", "bridge")
    ]
    np.testing.assert_allclose(*values, atol=2e-4)


def test_prompts_in_chunks_and_of_several_lengths() -> None:
    model, cut = tiny.model("gemma3", KIND), of_edges(scored("gemma3", KIND), some("gemma3"))
    clean, corrupted = ["a b c->", "one two", "x y z w"], ["a b d->", "one ten", "x y q w"]
    asked: dict[str, Any] = {"answers": ["A", "B", "C"], "wrong": ["x", "y", "z"]}
    together = faithfulness(model, cut, clean, corrupted, **asked).data
    parts = faithfulness(model, cut, clean, corrupted, memory=2**20, **asked).data
    for i in range(3):
        mine = {key: value[i] for key, value in asked.items()}
        alone = faithfulness(model, cut, clean[i], corrupted[i], **mine).data
        for variable in ("value", "without"):
            np.testing.assert_allclose(alone[variable][0, 0], together[variable][0, i], atol=1e-4)
            np.testing.assert_allclose(parts[variable], together[variable], atol=1e-4)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_dead_edges_change_nothing(name: str) -> None:
    scores, chosen = scored(name, KIND), some(name, 0.2)
    alive = live(scores.graph, chosen)
    assert 0 < alive.sum() < chosen.sum() and not (alive & ~chosen).any()
    # One live edge less is another circuit.
    less = alive.copy()
    less[tuple(np.argwhere(alive & (np.arange(len(alive)) > 0)[:, None])[-1])] = False
    circuits = [of_edges(scores, edges) for edges in (chosen, alive, less)]
    found = faithfulness(tiny.model(name, KIND), circuits, *pair(), **ASKED).data["value"]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert np.abs(found[2] - found[1]).max() > 1e-3


def test_greedy_circuits_hang_together() -> None:
    scores = scored("llama", KIND)
    graph, size = scores.graph, np.abs(np.nan_to_num(scores.score.values))
    before: set[tuple[int, int]] = set()
    for n in range(1, 25):
        chosen = circuit(scores, n_edges=n, method="greedy").chosen
        now = set(map(tuple, np.argwhere(chosen).tolist()))
        assert before <= now and len(now) == n
        # By brute force: the strongest edge that ends in the logits or in someone who is chosen.
        heard = {sender for sender, _ in before}
        ends = [
            r for r in range(len(graph.receivers))
            if r == len(graph.receivers) - 1 or heard & set(graph.speaks(r))
        ]  # fmt: skip
        best = max(
            size[s, r] for r in ends for s in range(len(graph.senders))
            if graph.edges[s, r] and (s, r) not in before
        )  # fmt: skip
        ((sender, receiver),) = now - before
        assert receiver in ends and size[sender, receiver] == best
        before = now


def test_top_circuits_have_the_largest_scores() -> None:
    scores = scored("llama", KIND)
    found = circuit(scores, n_edges=30, method="top")
    assert found.n_edges == 30 and found.chosen.sum() == 30
    assert found.data["sender"].values.tolist() == scores.top(30)["sender"].tolist()
    rest = np.abs(scores.score.values[scores.graph.edges & ~found.chosen])
    assert np.abs(found.data["score"]).min() >= rest.max()


def test_random_circuits_hang_together_and_ask_no_scores() -> None:
    scores = scored("llama", KIND)
    turned = EdgeScores(scores.data.assign(score=-2 * scores.score))
    found = {seed: circuit(scores, n_edges=30, method="random", seed=seed) for seed in (0, 1)}
    assert (found[0].chosen == circuit(turned, n_edges=30, method="random").chosen).all()
    assert (found[0].chosen != found[1].chosen).any() and found[0].chosen_by == "random"
    assert found[1].provenance["seed"] == 1
    for one in found.values():
        assert one.chosen.sum() == 30 and not (one.chosen & ~scores.graph.edges).any()
        # Each ends in the logits, or in someone who is listened to.
        for _, receiver in np.argwhere(one.chosen):
            speaks = list(scores.graph.speaks(int(receiver)))
            assert receiver == len(scores.graph.receivers) - 1 or one.chosen[speaks].any()
    # Over many draws every edge has its turn: none is left out, and none is always there.
    drawn = [circuit(scores, n_edges=40, method="random", seed=seed).chosen for seed in range(200)]
    share = np.mean(drawn, axis=0)[scores.graph.edges]
    assert share.min() > 0 and share.max() < 0.5


def test_circuits_are_saved_read_and_drawn(tmp_path: Any) -> None:
    scores = scored("llama", KIND)
    found = circuit(scores, n_edges=40, method="top")
    again = Circuit.load(found.save(tmp_path / "circuit.nc"))
    assert (again.chosen == found.chosen).all() and again.finding() == found.finding()
    assert again.nodes == found.nodes and "hanna2024faith" not in found.cite()
    figure = found.plot()
    traces = {trace.name: trace for trace in figure.data}
    n_live = int(found.data["live"].sum())
    assert len(traces["edges"].customdata) == n_live < 40
    assert len({trace.name: trace for trace in found.plot(dead=True).data}["edges"].x) == 40
    best = found.data.isel(edge=int(np.flatnonzero(found.data["live"])[0]))
    assert f"{best['sender'].values} → {best['receiver'].values}" in traces["edges"].customdata[0]
    said = dict(zip(traces["nodes"].text, traces["nodes"].customdata, strict=True))
    assert "hears" in said["logits"] and "tells" in said["embed"]
    # Layers go upwards, and an edge never goes down.
    for trace in figure.data:
        if trace.mode == "lines":
            ends = np.array([y for y in trace.y if y is not None]).reshape(-1, 17)
            assert (ends[:, -1] > ends[:, 0]).all()
    empty = circuit(scores, n_edges=0)
    assert Circuit.load(empty.save(tmp_path / "empty.nc")).n_edges == 0
    assert empty.plot().layout.title.text.startswith("<b>0 of 343")


def known(values: list[list[float]], without: list[list[float]]) -> Faithfulness:
    scores = scored("llama", KIND)
    circuits = [circuit(scores, n_edges=n) for n in (5, 50)]
    real = faithfulness(tiny.model("llama", KIND), circuits, *pair(), **ASKED)
    data = real.data.assign(
        value=(("circuit", "prompt"), values),
        without=(("circuit", "prompt"), without),
        clean=("prompt", [3.0, 1.0]),
        corrupted=("prompt", [1.0, -1.0]),
    )
    return Faithfulness(data)


def test_shares_of_known_numbers(tmp_path: Any) -> None:
    found = known([[1.0, 0.0], [2.8, 0.9]], [[3.0, 1.0], [1.0, -1.0]])
    shares = found.mean()
    np.testing.assert_allclose(shares["faithfulness"]["mean"], [0.25, (1.8 + 1.9) / 4])
    np.testing.assert_allclose(shares["completeness"]["mean"], [0.0, 1.0])
    said = found.finding()
    assert said.startswith(
        "5 of 343 edges alone keep 0.25 (0.00 to 0.50) of the logit difference, and 50 "
    )
    assert "50 keep 0.92" in said and "cutting them loses 0.00 and 1.00" in said
    assert found.data["chosen_by"].values.tolist() == ["eap, greedy"] * 2
    assert found.summary()["n_edges"] == 50
    again = Faithfulness.load(found.save(tmp_path / "faithfulness.nc"))
    assert again.finding() == found.finding()
    names = [trace.name for trace in found.plot().data if trace.name]
    assert [name.split(":")[0] for name in names] == ["faithfulness", "completeness"]
    weak = known([[1.0, 0.0], [1.0, -0.5]], [[3.0, 1.0], [1.0, -1.0]])
    assert weak.finding().startswith("5 of 343 edges alone keep 0.25")
    nothing = known([[0.999, -1.001], [2.8, 0.9]], [[3.0, 1.0], [1.0, -1.0]])
    assert "keep 0.00" in nothing.finding() and "-0.00" not in nothing.finding()


def test_circuits_of_one_size_are_told_apart_by_how_they_were_made() -> None:
    scores = scored("llama", KIND)
    circuits = [circuit(scores, n_edges=20, method=way) for way in ("greedy", "top")]
    found = faithfulness(tiny.model("llama", KIND), circuits, *pair(), **ASKED)
    assert found.data["chosen_by"].values.tolist() == ["eap, greedy", "eap, top"]
    assert "(eap, greedy)" in found.finding() and "(eap, top)" in found.finding()
    table = found.mean()["faithfulness"]
    assert table["chosen_by"].values.tolist() == ["eap, greedy", "eap, top"]


def test_no_share_of_no_way(tmp_path: Any) -> None:
    scores, (clean, _) = scored("llama", KIND), pair()
    circuits = [circuit(scores, n_edges=n) for n in (5, 50)]
    found = faithfulness(tiny.model("llama", KIND), circuits, clean, clean, **ASKED)
    shares = found.mean()
    assert all(table["mean"].isnull().all() for table in shares.values())
    assert "in the clean and in the corrupted run" in found.finding()
    assert found.plot().layout.title.text and np.isnan(found.summary()["faithfulness"])


def test_refuses() -> None:
    scores = scored("llama", KIND)
    with pytest.raises(ValueError, match="344 edges asked for, but this graph has 343"):
        circuit(scores, n_edges=344)
    with pytest.raises(ValueError, match="Nearest: greedy"):
        circuit(scores, n_edges=3, method="gredy")
    with pytest.raises(ValueError, match="no circuit arrived"):
        faithfulness(tiny.model("llama", KIND), [], *pair(), **ASKED)
    with pytest.raises(
        ValueError, match="another model, 'llama': 2 key-value heads, this model has 4"
    ):
        faithfulness(tiny.model("gpt2", KIND), circuit(scores, n_edges=3), *pair(), **ASKED)
    mixed = [circuit(scored("llama", KIND, nodes), n_edges=3) for nodes in ("head", "layer")]
    with pytest.raises(ValueError, match="circuit 0 has nodes='head', circuit 1 has nodes='layer'"):
        faithfulness(tiny.model("llama", KIND), mixed, *pair(), **ASKED)
    with pytest.raises(TypeError, match=r"edge scores arrived.*tv.circuit\(scores, n_edges"):
        inspect.unwrap(faithfulness)(tiny.model("llama", KIND), scores, *pair(), **ASKED)
    for wrong in ("3", 3.0, None, True):
        with pytest.raises(TypeError, match="n_edges must be a whole number"):
            inspect.unwrap(circuit)(scores, n_edges=wrong)
    assert inspect.unwrap(circuit)(scores, n_edges=np.int64(3)).n_edges == 3


def relabelled(found: Circuit, **facts: Any) -> Circuit:
    """The same circuit of a model of which other things are known."""
    made = found.provenance
    note = made | {
        "model": facts.get("name", made["model"]),
        "model_facts": made["model_facts"] | facts,
    }
    return Circuit(found.data.assign_attrs(tvlens=encode(note)))


def test_refuses_circuits_of_other_models_of_the_same_shape(monkeypatch: Any) -> None:
    model = tiny.model("llama", KIND)
    mine = circuit(scored("llama", KIND), n_edges=3)
    foreign = circuit(scored("qwen2", KIND), n_edges=3)
    assert foreign.graph == mine.graph
    with pytest.raises(ValueError, match="another model, 'qwen2': this one is 'llama'"):
        faithfulness(model, [mine, foreign], *pair(), **ASKED)
    with pytest.raises(ValueError, match="d_vocab 641, here 640"):
        faithfulness(model, relabelled(mine, d_vocab=641), *pair(), **ASKED)
    # Where the weights are known, they decide, and not the name.
    known = replace(tv.facts(model), weights_sha256="a" * 64)
    monkeypatch.setattr("tvlens.models.facts", lambda model: known)
    renamed = relabelled(mine, name="other", weights_sha256="a" * 64)
    assert faithfulness(model, renamed, *pair(), **ASKED).data["n_edges"] == 3
    with pytest.raises(ValueError, match="SHA-256 bbbbbbbbbbbb…, here aaaaaaaaaaaa…"):
        faithfulness(model, relabelled(mine, weights_sha256="b" * 64), *pair(), **ASKED)
    # Unknown on one side: the name has to do. A circuit of an older file has no more than that.
    assert faithfulness(model, mine, *pair(), **ASKED).data["n_edges"] == 3
    made = {k: v for k, v in mine.provenance.items() if k != "model_facts"}
    old = Circuit(mine.data.assign_attrs(tvlens=encode(made)))
    assert faithfulness(model, old, *pair(), **ASKED).data["n_edges"] == 3


def test_a_foreign_file_is_refused(tmp_path: Any) -> None:
    found = circuit(scored("llama", KIND), n_edges=5)
    path = found.save(tmp_path / "circuit.nc")
    with pytest.raises(ValueError, match="a Circuit, not a Faithfulness"):
        Faithfulness.load(path)
    note = encode(found.provenance | {"kind": "other"})
    with pytest.raises(ValueError, match="'circuit'"):
        Circuit(found.data.assign_attrs(tvlens=note))


@pytest.mark.slow
def test_a_real_circuit_is_small_and_faithful(smollm2: Any) -> None:
    from tvlens.circuits.edges import edge_scores

    names = [("Mary", "John"), ("Tom", "Anna"), ("Paul", "Lisa"), ("Jack", "Emma")]
    clean = [f"When {a} and {b} went to the park, {b} gave a book to" for a, b in names]
    corrupted = [f"When {a} and {b} went to the park, {a} gave a book to" for a, b in names]
    asked = {"answers": [a for a, _ in names], "wrong": [b for _, b in names]}
    scores = edge_scores(smollm2, clean, corrupted, **asked)
    n = scores.graph.n_edges
    circuits = [circuit(scores, n_edges=k) for k in (100, n // 20)]
    found = faithfulness(smollm2, circuits, clean, corrupted, **asked).mean(n_resamples=1)
    kept = found["faithfulness"]["mean"].values
    assert kept[1] > 0.7 and kept[1] > kept[0]
    random = of_edges(scores, scores.graph.edges & (np.random.default_rng(0).random(
        scores.graph.edges.shape) < 0.05))  # fmt: skip
    control = faithfulness(smollm2, random, clean, corrupted, **asked).mean(n_resamples=1)
    assert float(control["faithfulness"]["mean"][0]) < 0.3
