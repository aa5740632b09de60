"""Both plans of the engine against plain Hugging Face forward hooks, and against each other."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tvlens import load_model
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, FirstToken, LastLogits, Read, Request, run
from tvlens.sites import SITES

TOLERANCE = 1e-4
PLANS = ("plain", "growing")


def make_batch(lengths: list[int], *, shared: int = 0, seed: int = 0) -> TokenBatch:
    """Left-padded random prompts; the first `shared` tokens of a row do not depend on `seed`."""
    width = max(lengths)
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        common = torch.Generator().manual_seed(1000 + row)
        own = torch.Generator().manual_seed(7919 * seed + row)
        k = min(shared, length - 1)
        drawn = torch.cat(
            [
                torch.randint(3, 90, (k,), generator=common),
                torch.randint(3, 90, (length - k,), generator=own),
            ]
        )
        tokens[row, width - length :], mask[row, width - length :] = drawn, True
    return TokenBatch(("",) * len(lengths), tokens, mask, mask.long() - 1)


def random_edit(model: object, site: str, layer: int, n: int, **kwargs: object) -> Edit:
    from tvlens.models.runner import runner

    generator = torch.Generator().manual_seed(layer)
    values = torch.randn(n, *runner(model).site_shape(site), generator=generator)
    return Edit(site, layer, values, **kwargs)


def hf_blocks(hf: torch.nn.Module) -> list[torch.nn.Module]:
    for path in ("model.layers", "transformer.h", "gpt_neox.layers"):
        try:
            return list(hf.get_submodule(path))
        except AttributeError:
            continue
    raise LookupError(type(hf))


def hf_run(
    hf: torch.nn.Module, ids: list[int], write: Callable[[int, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One prompt through plain Hugging Face: last logits and the last position after each block."""
    seen: list[torch.Tensor] = []

    def hook(layer: int) -> Callable[..., object]:
        def after(module: object, args: object, out: object) -> object:
            hidden = out[0] if isinstance(out, tuple) else out
            hidden = write(layer, hidden.clone())
            seen.append(hidden[0, -1].clone())
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return after

    handles = [b.register_forward_hook(hook(i)) for i, b in enumerate(hf_blocks(hf))]
    try:
        with torch.no_grad():
            logits = hf(torch.tensor([ids])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_equals_plain_hugging_face_hooks(name: str, plan: str) -> None:
    model, hf = tiny.model(name), tiny.hf(name)
    batch = make_batch([9, 4, 12, 1, 9])
    n_layers = model.cfg.n_layers
    edits = [random_edit(model, "resid_post", layer, len(batch)) for layer in range(n_layers)]
    request = Request(
        batch,
        cells=((), *((edit,) for edit in edits)),
        reads=(Read("resid_post", tuple(range(n_layers))),),
        readout=LastLogits(),
    )
    (output,) = run(model, [request], plan=plan)
    for row in range(len(batch)):
        ids = batch.tokens[row][batch.mask[row]].tolist()
        for cell in range(n_layers + 1):

            def write(layer: int, hidden: torch.Tensor, cell: int = cell, row: int = row):
                if layer == cell - 1:
                    hidden[0, -1] = edits[layer].values[row]
                return hidden

            logits, seen = hf_run(hf, ids, write)
            assert (output.values["logits"][cell, row] - logits).abs().max() < TOLERANCE
            assert (output.activations[0][cell, row] - torch.stack(seen)).abs().max() < TOLERANCE


@pytest.mark.parametrize("position", [-1, -3, 1, 2])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_plans_agree_at_every_site(name: str, position: int) -> None:
    model = tiny.model(name)
    batch = make_batch([5, 9, 7])
    sites = [s for s in SITES if f"blocks.0.{SITES[s].hook.split('.', 2)[2]}" in model.hook_dict]
    assert {"resid_pre", "resid_post", "z", "q", "k", "v"} <= set(sites)
    for site in sites:
        cells = (
            (),
            (random_edit(model, site, 0, 3, position=position),),
            (
                random_edit(model, site, 1, 3, position=position, mode="add", scale=2.0),
                random_edit(model, "resid_post", 0, 1, position=position),
            ),
        )
        reads = (Read(site, (0, 1), position), Read("resid_post", (1,)))
        request = Request(batch, cells=cells, reads=reads, readout=LastLogits())
        (plain,), (growing,) = (run(model, [request], plan=plan) for plan in PLANS)
        assert (plain.values["logits"] - growing.values["logits"]).abs().max() < TOLERANCE
        assert not torch.allclose(plain.values["logits"][0], plain.values["logits"][1])
        for one, other in zip(plain.activations, growing.activations, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_shared_prefixes_change_no_number(name: str) -> None:
    """Sliding windows (Gemma) and learned positions (GPT-2) included: prefixes longer than the window."""
    model = tiny.model(name)
    lengths = [[22, 18, 25], [19, 18, 21], [24, 17, 30]]
    requests = [
        Request(
            make_batch(ls, shared=15, seed=i),
            reads=(Read("resid_post", (0, 1)),),
            readout=LastLogits(),
        )
        for i, ls in enumerate(lengths)
    ]
    together = run(model, requests, plan="growing")
    for request, output in zip(requests, together, strict=True):
        (alone,) = run(model, [request], plan="plain")
        assert (output.values["logits"] - alone.values["logits"]).abs().max() < TOLERANCE
        assert (output.activations[0] - alone.activations[0]).abs().max() < TOLERANCE
    assert "prefix tokens shared" in together[0].plan and "growing: 0 " not in together[0].plan


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    layer=st.integers(0, 1),
    memory=st.sampled_from([1, 100_000, 2**30]),
)
def test_batches_equal_prompts_one_by_one(lengths: list[int], layer: int, memory: int) -> None:
    model = tiny.model("llama")
    batch = make_batch(lengths)
    edit = random_edit(model, "resid_post", layer, len(lengths))
    request = Request(batch, cells=((edit,), ()), readout=LastLogits())
    (whole,) = run(model, [request], plan="growing", memory=memory)
    for row in range(len(lengths)):
        own = Edit(edit.site, edit.layer, edit.values[row : row + 1])
        alone = Request(batch.rows(slice(row, row + 1)), cells=((own,), ()), readout=LastLogits())
        (one,) = run(model, [alone], plan="plain")
        assert (whole.values["logits"][:, row] - one.values["logits"][:, 0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("plan", PLANS)
def test_writing_back_what_is_there_changes_nothing(plan: str) -> None:
    model, batch = tiny.model("gemma3"), make_batch([6, 11])
    sites = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")
    clean, *_ = run(
        model, [Request(batch, reads=tuple(Read(s, (0, 1)) for s in sites), readout=LastLogits())]
    )
    cells = tuple(
        (Edit(site, layer, values[0, :, layer]),)
        for site, values in zip(sites, clean.activations, strict=True)
        for layer in (0, 1)
    )
    (again,) = run(model, [Request(batch, cells=cells, readout=LastLogits())], plan=plan)
    # The hook on q and k sits before the norm of queries and keys, so that they too can be written back.
    assert (again.values["logits"] - clean.values["logits"]).abs().max() < TOLERANCE


def test_scale_and_mode() -> None:
    model, batch = tiny.model("gpt2"), make_batch([6, 6])
    edit = random_edit(model, "resid_post", 0, 2)
    cells = (
        (),
        (Edit(edit.site, 0, edit.values, mode="add", scale=0.0),),
        (Edit(edit.site, 0, 2 * edit.values),),
        (Edit(edit.site, 0, edit.values, scale=2.0),),
    )
    (output,) = run(model, [Request(batch, cells=cells, readout=LastLogits())])
    nothing, zero, doubled, scaled = output.values["logits"]
    assert torch.allclose(nothing, zero, atol=1e-6)
    assert torch.allclose(doubled, scaled, atol=1e-6)
    assert not torch.allclose(nothing, doubled)


def test_own_hooks_keep_firing_and_force_the_plain_plan() -> None:
    model, batch = tiny.model("llama"), make_batch([7, 5])
    request = Request(
        batch, readout=LastLogits(), cells=((), (random_edit(model, "resid_post", 0, 2),))
    )
    (before,) = run(model, [request])
    widths = []

    def ablate(activation: torch.Tensor, hook: object) -> torch.Tensor:
        widths.append(activation.shape[1])
        return torch.zeros_like(activation)

    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", ablate)]):
        (hooked,) = run(model, [request])
        with pytest.raises(AssertionError):
            torch.testing.assert_close(hooked.values["logits"], before.values["logits"])
    (after,) = run(model, [request])
    assert hooked.plan.startswith("plain") and before.plan.startswith("growing")
    assert widths == [7, 7]
    torch.testing.assert_close(after.values["logits"], before.values["logits"])


@pytest.mark.parametrize("place", ["module", "pre", "point"])
def test_plain_torch_hooks_are_noticed_too(place: str) -> None:
    model, batch = tiny.model("llama"), make_batch([7, 5])
    seen: list[int] = []
    block = model.blocks[1]
    handle = {
        "module": lambda: block.mlp.register_forward_hook(lambda m, a, o: seen.append(o.shape[1])),
        "pre": lambda: block.attn.register_forward_pre_hook(lambda m, a: seen.append(0)),
        "point": lambda: block.hook_mlp_out.register_forward_hook(
            lambda m, a, o: seen.append(o.shape[1])
        ),
    }[place]()
    try:
        (output,) = run(model, [Request(batch, readout=LastLogits())], memory=1)
    finally:
        handle.remove()
    assert output.plan.startswith("plain") and len(seen) == 1  # one forward over the whole batch


@pytest.mark.parametrize("plan", PLANS)
def test_chunks_keep_every_prompts_own_readout(plan: str) -> None:
    model = tiny.model("llama")
    batch = make_batch([6, 9, 4, 7])
    logits = run(model, [Request(batch, readout=LastLogits())])[0].values["logits"][0]
    own = tuple((int(i),) for i in logits.argmin(dim=-1))  # a different token for every prompt
    assert len(set(own)) > 1
    calls = []
    handle = model.unembed.register_forward_hook(lambda m, a, o: calls.append(len(o)))
    try:
        small, large = (
            run(model, [Request(batch, readout=FirstToken(own))], plan=plan, memory=memory)[0]
            for memory in (1, 2**30)
        )
    finally:
        handle.remove()
    expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(own))[:, 0]
    for output in (small, large):
        torch.testing.assert_close(output.values["answer_log_prob"][0], expected, atol=1e-4, rtol=0)
    # The hook makes the engine run all prompts at once: count chunks without it.
    widths: list[int] = []
    whole = model.blocks[0].forward

    def counting(*args: object, **kwargs: object) -> object:
        widths.append(len(args[0]))
        return whole(*args, **kwargs)

    model.blocks[0].forward = counting
    try:
        run(model, [Request(batch, readout=FirstToken(own))], plan=plan, memory=1)
    finally:
        del model.blocks[0].forward
    assert widths == [1, 1, 1, 1]


def test_soft_capped_logits_are_read_through_the_cap() -> None:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=640,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        final_logit_softcapping=0.5,
        attn_logit_softcapping=1.0,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.Gemma2ForCausalLM(config).eval()
        hf.lm_head.weight.data *= 30
    model = load_model(hf, tokenizer=tiny.tokenizer("gemma3"), device="cpu")
    batch = make_batch([8, 5])
    for plan in PLANS:
        (output,) = run(model, [Request(batch, readout=LastLogits())], plan=plan)
        for row in range(2):
            logits, _ = hf_run(hf, batch.tokens[row][batch.mask[row]].tolist(), lambda i, h: h)
            assert logits.abs().max() > 0.45  # the cap bites
            assert (output.values["logits"][0, row] - logits).abs().max() < TOLERANCE


def test_keeps_no_gradient_and_only_what_was_asked() -> None:
    model, batch = tiny.model("llama"), make_batch([7, 5])
    reads = (Read("resid_post", (1,)),)
    (output,) = run(model, [Request(batch, reads=reads)])
    assert output.values == {}
    assert output.activations[0].shape == (1, 2, 1, model.cfg.d_model)
    assert not output.activations[0].requires_grad


def test_the_unembedding_runs_only_on_last_positions() -> None:
    model, batch = tiny.model("llama"), make_batch([30, 28])
    rows = []
    handle = model.unembed.register_forward_hook(
        lambda m, args, out: rows.append(out.shape[:-1].numel())
    )
    try:
        run(model, [Request(batch, reads=(Read("resid_post", (0,)),))])
        assert rows == []
        run(model, [Request(batch, readout=LastLogits())])
        assert sum(rows) == 2
    finally:
        handle.remove()


def test_first_token_readout() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    found = FirstToken(((1,), (1, 2)))(logits, torch.tensor([0, 1]))
    assert found["correct"].tolist() == [True, False]
    assert found["predicted"].tolist() == [1, 0]
    expected = torch.log_softmax(logits, dim=-1)
    torch.testing.assert_close(
        found["answer_log_prob"], torch.stack([expected[0, 1], expected[1, 2]])
    )
    torch.testing.assert_close(found["log_prob"], torch.stack([expected[0, 1], expected[1, 0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, b: run(m, [Request(b)], plan="quick"), "unknown plan 'quick'"),
        (
            lambda m, b: run(m, [Request(b), Request(b.rows(slice(0, 1)))]),
            "equally many prompts; 2, 1",
        ),
        (
            lambda m, b: run(m, [Request(b, reads=(Read("resid_post", (9,)),))]),
            "layer 9 asked for, but .* 4 layers",
        ),
        (lambda m, b: Read("resid_pots", (0,)), "unknown site 'resid_pots'. Nearest: resid_post"),
        (
            lambda m, b: Edit("resid_post", 0, torch.zeros(1, 32), mode="swap"),
            "unknown mode 'swap'",
        ),
        (
            lambda m, b: run(m, [Request(b, cells=((Edit("resid_post", 0, torch.zeros(1, 5)),),))]),
            r"values of shape \(\d+,\) for each prompt; \(5,\) arrived",
        ),
        (
            lambda m, b: run(m, [Request(b, cells=((random_edit(m, "resid_post", 0, 7),),))]),
            "values for 1 or 2 prompts; 7 arrived",
        ),
        (
            lambda m, b: run(m, [Request(b, reads=(Read("resid_post", (0,), -6),))]),
            "position -6 asked for, but the shortest prompt has 5 tokens",
        ),
        (lambda m, b: run(m, []), "no request arrived"),
        (lambda m, b: run(m, [Request(b, cells=())]), "at least one cell"),
        (
            lambda m, b: run(m, [Request(b, reads=(Read("resid_post", (-1,)),))]),
            "layers of edits and reads count from 0; -1 arrived",
        ),
        (
            lambda m, b: run(tiny.model("pythia"), [Request(b, reads=(Read("resid_mid", (0,)),))]),
            "this model has no site 'resid_mid'; it has resid_pre, resid_post, attn_out",
        ),
        (
            lambda m, b: run(torch.nn.Linear(2, 2), [Request(b)]),
            "a HookedTransformer is needed; Linear arrived",
        ),
    ],
)
def test_says_what_is_wrong(change: Callable[..., object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        change(tiny.model("llama"), make_batch([7, 5]))
