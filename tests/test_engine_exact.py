"""Every plan of the engine gives the numbers of hooks written by hand, at every site of every model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from tests import tiny
from tests.cases import (
    GRID,
    GRID_SITES,
    KIND,
    PLANS,
    TOLERANCE,
    Values,
    assert_same,
    by_hand,
    every_edit,
    ids_of,
    make_batch,
    model_of,
    random_edit,
    sites_of,
    tensors,
)
from tvlens import load_model
from tvlens.engine import Edit, LastLogits, Read, Request, Taken, run
from tvlens.models.runner import runner
from tvlens.sites import SITES


@pytest.mark.parametrize(("name", "kind", "site"), GRID_SITES)
def test_every_edit_equals_hooks_by_hand(name: str, kind: str, site: str) -> None:
    """All ways to edit and read a site; Gemma's window of 8 is shorter than the longest prompt."""
    model, batch = tiny.model(name, kind), make_batch([5, 3, 12])
    reads = (
        Read(site, (0, 1, 3), -2),
        Read(site, (3, 0), None),  # in the order asked for
        Read(site, (2,), 1),
        Read("resid_post", (3, 2)),
    )
    request = Request(batch, every_edit(model, site, batch), reads, LastLogits())
    outputs = {plan: run(model, [request], plan=plan)[0] for plan in PLANS}
    logits, kept = by_hand(model, request)
    changed = (logits - logits[0]).abs().amax(dim=(1, 2)) > 1e-3
    assert not changed[[0, 12]].any()  # no edit, and none that is active
    assert changed[[1, 5, 6, 9, 10]].all() and changed[13:].all()
    for plan, output in outputs.items():
        expected = (*kept, logits)
        for i, (mine, theirs) in enumerate(zip(tensors(output), expected, strict=True)):
            assert mine.shape == theirs.shape
            assert (mine - theirs).abs().max() <= TOLERANCE, f"{plan}, tensor {i}"
    for plan in ("growing", "suffix"):
        assert outputs[plan].plan.name == plan
        assert_same(outputs[plan], outputs["plain"])


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_every_site_equals_plain_hugging_face_hooks(name: str, kind: str) -> None:
    """The same edits by forward hooks on Hugging Face's own modules."""
    model, hf, batch = tiny.model(name, kind), tiny.hf(name), make_batch([9, 4, 12])
    sites = [site for site in SITES if site in _HF_SITES]
    assert len(sites) == 8
    make = Values(model, n=3, width=12)
    places = [(site, layer, at) for site in sites for layer, at in ((0, -1), (1, 2), (3, -2))]
    cells = [Edit(site, layer, make(site), at) for site, layer, at in places]
    reads = tuple(Read(site, (0, 1, 2, 3)) for site in sites)
    request = Request(batch, ((), *((edit,) for edit in cells)), reads, LastLogits())
    outputs = [run(model, [request], plan=plan)[0] for plan in ("suffix", "plain")]
    for row in range(3):
        logits, seen = _hf_run(hf, name, ids_of(batch, row), cells, row)
        for output in outputs:
            assert (output.values["logits"][:, row] - logits).abs().max() <= TOLERANCE
            for site, mine in zip(sites, output.activations, strict=True):
                assert (mine[:, row].flatten(2) - seen[site]).abs().max() <= TOLERANCE, site


_HF_SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")


def _hf_run(
    hf: Any, name: str, ids: list[int], cells: list[Edit], row: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Last logits of the clean run and of each cell, and the last position at every site and layer."""
    seen: dict[str, list[torch.Tensor]] = {site: [] for site in _HF_SITES}

    def touch(site: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        for cell, edit in enumerate(cells, start=1):
            if (edit.site, edit.layer) == (site, layer):
                x[cell, edit.position] = edit.values[row].flatten()
        seen[site].append(x[:, -1].clone())
        return x

    with _hf_hooks(hf, name, touch), torch.no_grad():
        logits = hf(torch.tensor([ids] * (len(cells) + 1))).logits[:, -1]
    return logits, {site: torch.stack(each, dim=1) for site, each in seen.items()}


@contextmanager
def _hf_hooks(hf: Any, name: str, touch: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Forward hooks at every site of every layer, inputs before a module and outputs after it."""
    path = {"gpt2": "transformer.h", "pythia": "gpt_neox.layers"}.get(name, "model.layers")
    handles = []

    def before(part: Any, site: str, layer: int) -> None:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (touch(site, layer, args[0].clone()), *args[1:]), kwargs
            return args, kwargs | {
                "hidden_states": touch(site, layer, kwargs["hidden_states"].clone())
            }

        handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))

    def after(part: Any, layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def hook(module: Any, args: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (change(out[0].clone()), *out[1:])
            return change(out.clone())

        handles.append(part.register_forward_hook(hook))

    for layer, block in enumerate(hf.get_submodule(path)):
        attn = block.attn if name == "gpt2" else block.attention if name == "pythia" else None
        attn = block.self_attn if attn is None else attn
        before(block, "resid_pre", layer)
        after(block, layer, partial(touch, "resid_post", layer))
        if name == "gemma3":  # norms after the layers
            after(block.post_attention_layernorm, layer, partial(touch, "attn_out", layer))
            after(block.post_feedforward_layernorm, layer, partial(touch, "mlp_out", layer))
        else:
            after(attn, layer, partial(touch, "attn_out", layer))
            after(block.mlp, layer, partial(touch, "mlp_out", layer))
        last = {"gpt2": "c_proj", "pythia": "dense"}.get(name, "o_proj")
        before(getattr(attn, last), "z", layer)
        joint = {"gpt2": "c_attn", "pythia": "query_key_value"}.get(name)
        if joint:
            heads = hf.config.num_attention_heads if name == "pythia" else 1
            after(getattr(attn, joint), layer, partial(_touch_joint, touch, layer, heads))
        else:
            for site in "qkv":
                after(getattr(attn, f"{site}_proj"), layer, partial(touch, site, layer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _touch_joint(
    touch: Callable[..., torch.Tensor], layer: int, heads: int, joint: torch.Tensor
) -> torch.Tensor:
    """Queries, keys and values of one matrix: all heads' together (GPT-2), or head by head (Pythia)."""
    apart = joint.unflatten(-1, (heads, 3, -1))
    for i, site in enumerate("qkv"):
        apart[..., i, :] = touch(site, layer, apart[..., i, :].flatten(-2)).unflatten(
            -1, (heads, -1)
        )
    return apart.flatten(-3)


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_requests_that_share_a_prefix_change_no_number(name: str, kind: str) -> None:
    """Prefixes longer than the window, of mixed lengths, and edits within and after what is shared."""
    model = tiny.model(name, kind)
    requests = []
    for seed, lengths in enumerate([[14, 18, 20], [19, 12, 21], [13, 17, 25]]):
        batch = make_batch(lengths, shared=11, seed=seed)
        make = Values(model, n=3, width=25, seed=seed)
        cells = (
            (),
            (Edit("resid_pre", 1, make("resid_pre"), 4),),
            (Edit("resid_post", 2, make("resid_post"), -1),),
            (Edit("k", 0, make("k"), 10), Edit("z", 3, make("z"), -2)),
        )
        reads = (Read("resid_post", (0, 3), None), Read("pattern", (1,), -1))
        requests.append(Request(batch, cells[: seed + 2], reads, LastLogits()))
    alone = [run(model, [request], plan="plain")[0] for request in requests]
    for plan in ("suffix", "growing"):
        together = run(model, requests, plan=plan)
        for mine, theirs in zip(together, alone, strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_identical_requests_and_prompts_within_prompts(name: str) -> None:
    """A prompt that another request has already, whole, adds no token of its own."""
    model, long = model_of(name), make_batch([9, 12])
    short = type(long)(("",) * 2, long.tokens[:, :9], long.mask[:, :9], long.roles[:, :9])
    edits = (random_edit(model, "mlp_out", 1, 2),)
    request = Request(long, ((), edits), (Read("resid_post", (3,), None),), LastLogits())
    begins = Request(short, ((), edits), (Read("resid_post", (3,), None),), LastLogits())
    assert short.lengths.tolist() == [6, 9]
    alone = {id(r): run(model, [r], plan="plain")[0] for r in (request, begins)}
    one = run(model, [request], plan="suffix")[0]
    for order in ([request, request, begins], [begins, request]):
        together = run(model, order, plan="suffix")
        for r, mine in zip(order, together, strict=True):
            assert_same(mine, alone[id(r)])
    twice = run(model, [request, request], plan="suffix")[0]
    edited = 2 + 2 * 2 + 1  # nothing but the rows of the edit, from the third block on
    assert twice.plan.tokens - one.plan.tokens < edited


@pytest.mark.parametrize(("name", "kind"), GRID)
@pytest.mark.parametrize("lengths", [[1, 1], [1, 10]], ids=str)
def test_prompts_of_one_token(name: str, kind: str, lengths: list[int]) -> None:
    model, batch = tiny.model(name, kind), make_batch(lengths)
    make = Values(model, n=2, width=max(lengths))
    cells = tuple(
        (Edit(site, layer, make(site), at),)
        for site in sites_of(model)
        for layer, at in ((0, -1), (3, 0))
    )
    request = Request(batch, ((), *cells), (Read("resid_post", (0, 3), None),), LastLogits())
    logits, (kept,) = by_hand(model, request)
    for plan in PLANS:
        (output,) = run(model, [request], plan=plan)
        assert (output.values["logits"] - logits).abs().max() <= TOLERANCE
        assert (output.activations[0] - kept).abs().max() <= TOLERANCE


@pytest.mark.parametrize("plan", PLANS)
def test_edits_after_all_that_is_asked_for_change_nothing(plan: str) -> None:
    model, batch = model_of("llama"), make_batch([6, 9])
    late = tuple(
        (random_edit(model, site, layer, 2),)
        for site, layer in (("resid_pre", 2), ("resid_post", 3), ("mlp_out", 1), ("z", 1))
    )
    reads = (Read("attn_out", (0,), None), Read("k", (1, 0)))
    (output,) = run(model, [Request(batch, ((), *late), reads)], plan=plan)
    for kept in output.activations:
        assert (kept - kept[:1]).abs().max() <= 1e-6  # k of layer 1 comes before its mlp_out and z


@pytest.mark.parametrize("plan", PLANS)
def test_cells_without_edits_are_all_the_clean_run(plan: str) -> None:
    model, batch = model_of("gemma3"), make_batch([10, 4])
    nowhere = torch.zeros(2, dtype=torch.bool)
    never = (random_edit(model, "resid_mid", 1, 2, where=nowhere),)
    reads = (Read("resid_post", (3,), None),)
    (several,) = run(model, [Request(batch, ((), (), never), reads, LastLogits())], plan=plan)
    (one,) = run(model, [Request(batch, ((),), reads, LastLogits())], plan=plan)
    for mine, clean in zip(tensors(several), tensors(one), strict=True):
        assert len(mine) == 3 and (mine - clean).abs().max() <= 1e-6


def test_soft_caps_of_scores_and_logits() -> None:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=640,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        final_logit_softcapping=0.5,
        attn_logit_softcapping=1.0,
        sliding_window=4,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = transformers.Gemma2ForCausalLM(config).eval()
        hf.lm_head.weight.data *= 30
        for layer in hf.model.layers:
            layer.self_attn.q_proj.weight.data *= 30
    model = load_model(hf, tokenizer=tiny.tokenizer("gemma3"), device="cpu", backend=KIND)
    batch = make_batch([8, 5])
    edit = random_edit(model, "resid_post", 1, 2)

    def write(module: Any, args: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[1, -1] = edit.values[row]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    outputs = [
        run(model, [Request(batch, ((), (edit,)), readout=LastLogits())], plan=plan)[0]
        for plan in PLANS
    ]
    for row in range(2):
        handle = hf.model.layers[1].register_forward_hook(write)
        try:
            with torch.no_grad():
                logits = hf(torch.tensor([ids_of(batch, row)] * 2)).logits[:, -1]
        finally:
            handle.remove()
        assert logits.abs().max() > 0.45  # the cap bites
        for output in outputs:
            assert (output.values["logits"][:, row] - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_values_taken_from_a_run_beside_are_those_that_were_read_there(
    name: str, kind: str
) -> None:
    """Exchanging activations in one pass equals reading them first and writing them afterwards."""
    model = tiny.model(name, kind)
    one, other = (make_batch([9, 4, 12, 3], seed=seed) for seed in (1, 2))
    drive = runner(model)
    taken, read = [()], [()]
    for site in SITES:
        if site == "pattern" or not drive.has(site, 0):
            continue
        layers = (0, drive.n_layers - 1)
        (clean,) = run(model, [Request(one, reads=(Read(site, layers, None),))])
        for i, layer in enumerate(layers):
            kept = clean.activations[0][0, :, i]
            last = kept[torch.arange(4), one.lengths - 1]
            for position, values in ((None, kept), (0, kept[:, 0]), (-1, last)):
                settings = {"position": position, "mode": "add", "scale": 0.5}
                taken.append((Edit(site, layer, Taken(0), **settings),))
                read.append((Edit(site, layer, values, **settings),))
    found = []
    for cells, plan in ((read, "plain"), (taken, "plain"), (taken, "suffix"), (taken, "growing")):
        requests = [Request(one), Request(other, tuple(cells), readout=LastLogits())]
        found.append(run(model, requests, plan=plan)[1].values["logits"])
    for each in found[1:]:
        assert (each - found[0]).abs().max() < TOLERANCE
    # Nearly all do something; the first position of the last layer cannot.
    effects = (found[0][1:] - found[0][:1]).abs().amax(dim=(1, 2))
    assert (effects > TOLERANCE).float().mean() > 0.8


def test_runs_beside_each_other_are_taken_apart_together() -> None:
    """Chunks of cells take along the run that their values come from."""
    model = model_of("llama")
    one, other = (make_batch([12], seed=seed) for seed in (1, 2))
    cells = tuple(
        (Edit("resid_pre", layer, Taken(0), at),) for layer in range(4) for at in range(12)
    )
    requests = [Request(one), Request(other, cells, readout=LastLogits())]
    whole = run(model, requests)[1]
    parts = run(model, requests, memory=whole.plan.bytes // 3)[1]
    assert whole.plan.chunks == 1 and parts.plan.chunks > 1
    assert (whole.values["logits"] - parts.values["logits"]).abs().max() < TOLERANCE
