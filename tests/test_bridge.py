"""A TransformerBridge in parts and whole: its own numbers, its own hook points, its users' hooks."""

from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.test_model_families import other_families, other_family
from tvlens import load_model
from tvlens.models import UnsupportedModelError
from tvlens.models.bridge.hooks import hook_point
from tvlens.models.bridge.parts import indivisible
from tvlens.models.bridge.run import BridgeRunner
from tvlens.models.runner import Block, Runner, runner
from tvlens.sites import SITES, hook_name, native_names

TOKENS = torch.arange(30) * 7 % 83 + 5
ONES = torch.ones(1, 30, dtype=torch.long)
PARALLEL = ("pythia", "gptj", "phi")


def bridge(name: str, processing: str = "none") -> Any:
    return tiny.model(name, "bridge", processing)


def own_copy(name: str) -> Any:
    """A bridge that a test may change."""
    return load_model(tiny.hf(name), tokenizer=tiny.tokenizer(name), device="cpu", backend="bridge")


@cache
def other(name: str) -> tuple[Any, Any]:
    return other_family(name, "bridge")


@torch.no_grad()
def put_together(runner: Runner, tokens: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """The final residual of one prompt, computed from the parts by the textbook."""
    position = torch.arange(len(tokens))
    runner.prepare(len(tokens) + shift)
    resid = runner.embed(tokens, position + shift)
    behind = position[:, None] - position
    for layer in range(runner.n_layers):
        block = runner.block(layer)
        q, k, v = block.project(resid)
        q, k = block.rotate(q, k, position + shift)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / block.scale
        if block.soft_cap:
            scores = block.soft_cap * torch.tanh(scores / block.soft_cap)
        seen = (behind >= 0) & (behind < (block.window or len(tokens)))
        pattern = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        attn_out = block.attn_out(torch.einsum("hqk,khd->qhd", pattern, v))
        mid = resid if block.parallel else resid + attn_out
        resid = resid + attn_out + block.mlp_out(mid)
    return resid


def check_parts(model: Any, hf: Any) -> None:
    """Whole and in parts, the model gives its own logits, which are Hugging Face's."""
    stepper = runner(model)
    assert isinstance(stepper, BridgeRunner)
    assert stepper.steppable, indivisible(model)
    assert all(isinstance(stepper.block(layer), Block) for layer in range(stepper.n_layers))
    with torch.no_grad():
        own, theirs = model(TOKENS[None])[0], hf(TOKENS[None]).logits[0]
        whole = stepper.whole(TOKENS[None], ONES, [])[0]
    log_probs = own.log_softmax(-1)
    assert (log_probs - theirs.log_softmax(-1)).abs().max() < 1e-4
    for resid in (whole, put_together(stepper, TOKENS)):
        logits = stepper.logits(resid)
        assert (logits - own).abs().max() < 1e-4
        columns = torch.stack([TOKENS, TOKENS.flip(0)], dim=1)
        assert (stepper.logits(resid, columns) - own.gather(1, columns)).abs().max() < 1e-4


@pytest.mark.parametrize("processing", ["none", "fold"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_parts_equal_the_bridges_own_logits(name: str, processing: str) -> None:
    check_parts(bridge(name, processing), tiny.hf(name))


@pytest.mark.parametrize("name", sorted(other_families()))
def test_parts_of_other_families(name: str) -> None:
    hf, model = other(name)
    check_parts(model, hf)


def test_the_control_of_the_parts() -> None:
    # Absolute positions count in GPT-2; rotary ones only by their difference, beyond any table.
    for name, counts in (("gpt2", True), ("llama", False), ("pythia", False)):
        stepper = BridgeRunner(bridge(name))
        shift = 3 if counts else 700
        away = (put_together(stepper, TOKENS, shift) - put_together(stepper, TOKENS)).abs().max()
        assert away > 0.1 if counts else away < 1e-3
    # And a window that is forgotten shows.
    stepper = BridgeRunner(bridge("gemma3"))
    before = put_together(stepper, TOKENS)
    stepper.block(0).window = None
    assert (put_together(stepper, TOKENS) - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_left_padding_changes_nothing(name: str) -> None:
    stepper = BridgeRunner(bridge(name))
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), TOKENS[:24].view(2, 12)], dim=1)
    mask = (torch.arange(19) >= 7).long().expand(2, -1).clone()
    padded[1], mask[1] = torch.cat([TOKENS[5:12], TOKENS[12:24]]), 1
    together = stepper.whole(padded, mask, [])
    for row in range(2):
        alone = padded[row][mask[row].bool()][None]
        resid = stepper.whole(alone, torch.ones_like(alone), [])
        assert (together[row, -alone.shape[1] :] - resid[0]).abs().max() < 1e-4
    # The control: padding that is not masked counts.
    unmasked = stepper.whole(padded, torch.ones_like(mask), [])
    assert (unmasked[0, -1] - together[0, -1]).abs().max() > 1e-2


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 0.05), ("float64", 1e-6)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_other_types(name: str, dtype: str, size: float) -> None:
    model: Any = load_model(
        tiny.hf(name),
        tokenizer=tiny.tokenizer(name),
        device="cpu",
        backend="bridge",
        dtype=dtype,
    )
    stepper = BridgeRunner(model)
    assert stepper.dtype == getattr(torch, dtype)
    whole = stepper.whole(TOKENS[None], ONES, [])[0]
    # Padding neither becomes NaN nor reaches the tokens.
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), TOKENS[None]], dim=1)
    left = stepper.whole(padded, (torch.arange(35) >= 5).long()[None], [])[0, 5:]
    for resid in (left, put_together(stepper, TOKENS)):
        assert (resid - whole).float().norm() <= size * whole.float().norm()


# --- sites: one name map, two spellings -----------------------------------------------------------


def keep(seen: dict[str, torch.Tensor], key: str, x: torch.Tensor, hook: object) -> None:
    seen[key] = x.clone()


def absent(site: str, name: str) -> bool:
    return site == "resid_mid" and name in PARALLEL


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", (*tiny.ARCHITECTURES, *sorted(other_families())))
def test_both_spellings_name_the_same_hook_point(name: str, site: str) -> None:
    model = bridge(name) if name in tiny.ARCHITECTURES else other(name)[1]
    stepper = BridgeRunner(model)
    for layer in range(stepper.n_layers):
        legacy = hook_point(model, hook_name(site, layer))
        if absent(site, name):
            assert legacy is None and not stepper.has(site, layer)
            continue
        found = [hook_point(model, spelling) for spelling in native_names(site, layer)]
        assert legacy is not None, "TransformerLens no longer has the legacy name: see sites.py"
        assert any(point is not None for point in found), "nor the native one: see sites.py"
        assert stepper.has(site, layer)
        assert hook_point(model, stepper.hook_name(site, layer)) is legacy
        if name in tiny.ARCHITECTURES:
            assert stepper.hook_name(site, layer) in native_names(site, layer)
        assert model.hook_dict[hook_name(site, layer)] is legacy


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_both_spellings_see_the_same_activation(name: str) -> None:
    model = bridge(name)
    stepper = BridgeRunner(model)
    sites = [site for site in SITES if not absent(site, name)]
    tokens = TOKENS[None]
    _, cache = model.run_with_cache(tokens)
    for site in sites:
        seen: dict[str, torch.Tensor] = {}
        names = {hook_name(site, 1), stepper.hook_name(site, 1)}
        stepper.whole(tokens, ONES, [(name, partial(keep, seen, name)) for name in names])
        shape = stepper.site_shape(site)
        wanted = (1, *shape, 30, 30) if site == "pattern" else (1, 30, *shape)
        for spelling, value in seen.items():
            assert value.shape == wanted, spelling
            assert (value - cache[spelling]).abs().max() < 1e-5
        first, *others = seen.values()
        assert len(seen) == len(names)
        assert all(torch.equal(first, value) for value in others)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_names_survive_the_removal_of_the_aliases(name: str) -> None:
    model = own_copy(name)
    for block in model.blocks:
        for module in (block, block.attn, block.mlp):
            for alias in set(type(module).hook_aliases) | set(module.hook_aliases):
                module.__dict__.pop(alias, None)
    assert hook_point(model, hook_name("resid_post", 0)) is None
    stepper = BridgeRunner(model)
    for site in SITES:
        assert stepper.has(site, 2) != absent(site, name)
        if not absent(site, name):
            assert stepper.hook_name(site, 2) == BridgeRunner(bridge(name)).hook_name(site, 2)


@tiny.needs_hooked
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_sites_hold_what_a_hooked_transformer_has_there(name: str, site: str) -> None:
    if absent(site, name):
        pytest.skip("parallel attention has no resid_mid")
    tokens, clean, edited = TOKENS[None], {}, {}
    seen: dict[str, torch.Tensor] = {}
    for kind in tiny.KINDS:
        stepper = runner(tiny.model(name, kind))
        spelling = stepper.hook_name(site, 1)
        clean[kind] = stepper.whole(tokens, ONES, [(spelling, partial(keep, seen, kind))])
        noise = torch.rand(seen[kind].shape, generator=torch.Generator().manual_seed(0))
        edited[kind] = stepper.whole(tokens, ONES, [(spelling, partial(add_noise, noise))])
    hooked, bridge = tiny.KINDS
    assert seen[hooked].shape == seen[bridge].shape
    assert (seen[hooked] - seen[bridge]).abs().max() < 1e-4
    assert (edited[hooked] - edited[bridge]).abs().max() < 1e-4
    assert (edited[hooked] - clean[hooked]).abs().max() > 1e-3


def add_noise(noise: torch.Tensor, x: torch.Tensor, hook: object) -> torch.Tensor:
    return x + noise


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_an_edit_of_resid_mid_reaches_the_stream(name: str) -> None:
    # A bridge's own hook point there changes only what the MLP reads.
    stepper = BridgeRunner(bridge(name))
    mid, out = stepper.hook_name("resid_mid", 1), stepper.hook_name("mlp_out", 1)
    noise = torch.rand(1, 30, 64, generator=torch.Generator().manual_seed(0))
    nothing_added = partial(torch.mul, 0)
    seen: dict[str, torch.Tensor] = {}
    hooks: list[tuple[str, Any]] = [
        (mid, partial(add_noise, noise)),
        (mid, partial(keep, seen, "mid")),
        (out, lambda x, hook: nothing_added(x)),
        (stepper.hook_name("resid_post", 1), partial(keep, seen, "post")),
    ]
    stepper.whole(TOKENS[None], ONES, hooks)
    assert (seen["mid"] - seen["post"]).abs().max() < 1e-5
    # In place works as well, and the next run is clean.
    by_hand = dict(seen)
    hooks[0] = (mid, lambda x, hook: x.add_(noise))
    stepper.whole(TOKENS[None], ONES, hooks)
    assert (seen["post"] - by_hand["post"]).abs().max() < 1e-5
    stepper.whole(TOKENS[None], ONES, hooks[1:])
    assert (seen["mid"] - seen["post"]).abs().max() < 1e-5
    assert (seen["post"] - by_hand["post"]).abs().max() > 0.1


def test_heads_are_apart_even_where_the_bridge_keeps_them_together() -> None:
    model = own_copy("llama")
    stepper = BridgeRunner(model)
    tokens, name = TOKENS[None], stepper.hook_name("k", 1)
    mask = torch.ones_like(tokens)

    def double(x: torch.Tensor, hook: object) -> torch.Tensor:
        assert x.shape == (1, 30, 2, 16)
        return torch.cat([x[:, :, :1] * 2, x[:, :, 1:]], dim=2)

    wanted = stepper.whole(tokens, mask, [(name, double)])
    hook_point(model, name).hook_conversion = None
    assert torch.equal(stepper.whole(tokens, mask, [(name, double)]), wanted)
    assert not torch.equal(stepper.whole(tokens, mask, []), wanted)


def test_a_hook_point_that_is_not_there() -> None:
    stepper = BridgeRunner(bridge("pythia"))
    with pytest.raises(ValueError, match="no hook point 'blocks.0.hook_resid_mid'"):
        stepper.whole(TOKENS[None], ONES, [(stepper.hook_name("resid_mid", 0), print)])


# --- whose hooks ----------------------------------------------------------------------------------


def nothing(*args: object, **kwargs: object) -> None: ...


def test_only_users_hooks_are_the_users() -> None:
    for model in (own_copy("llama"), own_copy("gemma3"), other("opt")[1]):
        stepper = BridgeRunner(model)
        assert not stepper.has_user_hooks()
        model(TOKENS[None])
        model.run_with_cache(TOKENS[None])
        stepper.whole(TOKENS[None], ONES, [(stepper.hook_name("z", 0), nothing)])
        # By now the bridge has put hooks of its own on its modules, and so has Hugging Face.
        assert any(m._forward_pre_hooks for m in model.modules())
        assert not stepper.has_user_hooks()


def test_users_hooks_are_found_wherever_they_sit() -> None:
    model = own_copy("llama")
    stepper = BridgeRunner(model)
    model.add_hook("blocks.1.hook_resid_pre", nothing)
    assert stepper.has_user_hooks()
    model.reset_hooks()
    assert not stepper.has_user_hooks()
    model.add_perma_hook("blocks.1.attn.hook_z", nothing)
    assert stepper.has_user_hooks()
    model.reset_hooks(including_permanent=True)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_q", nothing)]):
        assert stepper.has_user_hooks()
        # What the engine puts there and takes away leaves the user's in place.
        stepper.whole(TOKENS[None], ONES, [(stepper.hook_name("q", 0), nothing)])
        assert stepper.has_user_hooks()
    assert not stepper.has_user_hooks()
    inner = model.original_model
    for module in (
        model.blocks[1],
        model.blocks[0].mlp.original_component,
        model.blocks[0].attn.q,
        model.blocks[0].attn.q.hook_out,
        inner,
        inner.model,
        model.unembed.original_component,
    ):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(nothing)
            assert stepper.has_user_hooks(), type(module)
            handle.remove()
            assert not stepper.has_user_hooks()


def test_users_hooks_keep_firing_inside_our_runs() -> None:
    model = own_copy("gpt2")
    stepper = BridgeRunner(model)
    tokens, order = TOKENS[None], []
    mask = torch.ones_like(tokens)
    clean = stepper.whole(tokens, mask, [])
    name = hook_name("resid_post", 1)
    with model.hooks(fwd_hooks=[(name, lambda x, hook: order.append("user") or x * 2)]):
        twice = stepper.whole(tokens, mask, [(name, lambda x, hook: order.append("ours"))])
    assert order == ["user", "ours"]
    assert (twice - clean).abs().max() > 1e-2
    assert torch.equal(stepper.whole(tokens, mask, []), clean)


def test_hooks_go_even_after_an_error() -> None:
    model = own_copy("gpt2")
    stepper = BridgeRunner(model)

    def fail(x: torch.Tensor, hook: object) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        stepper.whole(TOKENS[None], ONES, [(stepper.hook_name("z", 1), fail)])
    assert not stepper.has_user_hooks()
    assert model(TOKENS[None]).shape == (1, 30, 640)


# --- what cannot be taken apart -------------------------------------------------------------------


def odd_ones() -> dict[str, tuple[Any, str]]:
    t = transformers
    size = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2}
    llama = {**size, "num_attention_heads": 4, "intermediate_size": 48}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return {
        "dynamic rope": (
            t.LlamaConfig(**llama, max_position_embeddings=64, rope_parameters=rope),
            "positions are of type 'dynamic'",
        ),
        "alibi": (t.BloomConfig(vocab_size=600, hidden_size=32, n_layer=2, n_head=4), "BloomBlock"),
        # TransformerLens 3.9 calls the norm after OLMo 2's MLP ln2.
        "olmo2": (t.Olmo2Config(**llama), "norms come after" if tiny.HAS_HOOKED else ""),
        "granite": (t.GraniteConfig(**llama, logits_scaling=2.0), "ScaledResidualBlock"),
    }


@pytest.mark.parametrize("name", sorted(odd_ones()))
def test_what_cannot_be_taken_apart_still_runs_whole(name: str) -> None:
    config, why = odd_ones()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in hf.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model: Any = load_model(
        hf.eval(), tokenizer=tiny.tokenizer("gpt2"), device="cpu", backend="bridge"
    )
    stepper = BridgeRunner(model)
    assert why in indivisible(model) and stepper.steppable == (not why)
    whole = stepper.whole(TOKENS[None], ONES, [])[0]
    with torch.no_grad():
        wanted = hf(TOKENS[None]).logits[0]
    assert (stepper.logits(whole) - wanted).abs().max() < 1e-4
    if stepper.steppable:
        assert (stepper.logits(put_together(stepper, TOKENS)) - wanted).abs().max() < 1e-4


def test_a_read_out_that_is_not_the_models_own_is_refused() -> None:
    model = own_copy("llama")
    model.cfg.output_logits_soft_cap = 0.5
    from tvlens.models.bridge import run

    run._read_out.discard(model)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM are not its own"):
        runner(model)


def test_a_native_bridge_runs_whole() -> None:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    size = {"d_model": 32, "d_head": 8, "n_layers": 2, "n_ctx": 64, "n_heads": 4, "d_vocab": 100}
    model = TransformerBridge.boot_native(
        TransformerBridgeConfig(**size, act_fn="gelu", architecture="TransformerLensNative")
    ).eval()
    stepper = runner(model)
    assert not stepper.steppable
    resid = stepper.whole(TOKENS[None], ONES, [])
    with torch.no_grad():
        assert (stepper.logits(resid[0]) - model(TOKENS[None])[0]).abs().max() < 1e-4
