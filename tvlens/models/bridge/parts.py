"""A TransformerBridge's block in parts that act on tokens, each for itself.

Every adapter of a bridge gives a block's parts the same names, whatever Hugging Face calls them. Under each
part lies the module that does the work; here these modules are called without the hook points around them. A
block with anything unknown in it is not taken apart, and what the engine computes from the parts is compared
with the model's own forward before it is used.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.models.bridge.rotary import Rotary, rotary_of

Function = Callable[[Tensor], Tensor]

# How each attention class of the bridge computes, and of its generic class which Hugging Face classes do so.
_REBUILT = (
    "PositionEmbeddingsAttentionBridge",
    "JointQKVAttentionBridge",
    "JointQKVPositionEmbeddingsAttentionBridge",
)
_DELEGATED = {"AttentionBridge": ("GPTJAttention", "GPTNeoSelfAttention", "OPTAttention")}
_BLOCKS = ("BlockBridge", "ParallelBlockBridge", "_OptBlockBridge")
_PARTS = {"ln1", "ln1_post", "attn", "ln2", "ln2_post", "mlp"}
_ATTENTION_PARTS = {"q", "k", "v", "o", "qkv", "q_norm", "k_norm"}
# Settings of attention that `BridgeBlock` does not know.
_UNKNOWN = ("gated_q_proj", "qk_norm_after_rope", "rotary_interleaved_cos_sin")
_UNKNOWN_INSIDE = ("sinks", "key_multiplier")


class BridgeBlock:
    """One block of a TransformerBridge; see `tvlens.models.runner.Block`."""

    def __init__(self, model: Any, layer: int, rotary: Rotary | None) -> None:
        block, cfg = model.blocks[layer], model.cfg
        attn = block.attn
        inner = inside(attn)
        self.n_heads: int = cfg.n_heads
        self.n_kv_heads: int = kv_heads(cfg)
        self.d_head: int = d_head(cfg)
        self.device: torch.device = inside(attn.o).weight.device
        self.scale = _scale(attn, cfg, layer)
        self.soft_cap = float(getattr(inner, "attn_logit_softcapping", None) or 0.0)
        self.window: int | None = window(text_config(model), inner, layer)
        self.parallel: bool = type(block).__name__ == "ParallelBlockBridge"
        self._rotary = rotary
        self._q, self._k, self._v = inside(attn.q), inside(attn.k), inside(attn.v)
        self._o = inside(attn.o)
        names = block._modules
        self._ln1 = norm(names["ln1"]) if "ln1" in names else _same
        self._ln1_post = norm(names["ln1_post"]) if "ln1_post" in names else _same
        # Parallel blocks without a norm of the MLP's own share the one of attention.
        own = norm(names["ln2"]) if "ln2" in names else None
        self._ln2 = own or (self._ln1 if self.parallel else _same)
        self._ln2_post = norm(names["ln2_post"]) if "ln2_post" in names else _same
        self._q_norm, self._k_norm = (
            _head_norm(attn, name, heads)
            for name, heads in (("q_norm", self.n_heads), ("k_norm", self.n_kv_heads))
        )
        self._mlp = _mlp(block)

    def project(
        self, resid: Float[Tensor, "token d_model"]
    ) -> tuple[
        Float[Tensor, "token head d_head"],
        Float[Tensor, "token kv_head d_head"],
        Float[Tensor, "token kv_head d_head"],
    ]:
        """Give queries, keys and values as they are at their hook sites."""
        normed, n = self._ln1(resid), len(resid)
        return (
            self._q(normed).view(n, self.n_heads, self.d_head),
            self._k(normed).view(n, self.n_kv_heads, self.d_head),
            self._v(normed).view(n, self.n_kv_heads, self.d_head),
        )

    def rotate(
        self,
        queries: Float[Tensor, "token head d_head"],
        keys: Float[Tensor, "token kv_head d_head"],
        position: Int[Tensor, " token"],
    ) -> tuple[Float[Tensor, "token head d_head"], Float[Tensor, "token kv_head d_head"]]:
        """Norm queries and keys where the model does, and turn them by their positions."""
        queries, keys = self._q_norm(queries), self._k_norm(keys)
        return self._rotary.turn(queries, keys, position) if self._rotary else (queries, keys)

    def attn_out(self, z: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token d_model"]:
        """Turn head outputs into what attention adds to the residual stream."""
        return self._ln1_post(self.project_out(z))

    def project_out(self, z: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token d_model"]:
        """Multiply head outputs by W_O and add its bias; what follows is `norm_attn_out`."""
        return self._o(z.flatten(1))

    def norm_attn_out(self, out: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Do what stands between W_O and the residual stream: a norm in some models, else nothing."""
        return self._ln1_post(out)

    def mlp_out(self, resid: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Give what the MLP, which reads this residual, adds to it; its norms included."""
        return self._ln2_post(self._mlp(self._ln2(resid)))


def inside(component: Any) -> Any:
    """Give the Hugging Face module that a part of the bridge wraps."""
    return component.original_component


def kv_heads(cfg: Any) -> int:
    """Give the number of key-value heads."""
    return getattr(cfg, "n_key_value_heads", None) or cfg.n_heads


def d_head(cfg: Any) -> int:
    """Give the width of a head."""
    return int(getattr(cfg, "d_head", None) or cfg.d_model // cfg.n_heads)


def text_config(model: Any) -> Any:
    """Give the Hugging Face configuration of the language model; of a native bridge, its own."""
    config = getattr(model.original_model, "config", None)
    return model.cfg if config is None else config.get_text_config(decoder=True)


def indivisible(model: Any) -> str:
    """Say why a bridge cannot be run in parts; an empty text if it can.

    Args:
        model: A TransformerBridge.

    Returns:
        The first thing found that `BridgeBlock` does not know.
    """
    cfg, blocks = model.cfg, getattr(model, "blocks", None)
    if blocks is None or len(blocks) != cfg.n_layers:
        return "its blocks are no single stack"
    if getattr(cfg, "attention_dir", "causal") != "causal":
        return "its attention is not causal"
    if any(parameter.is_meta for parameter in model.original_model.parameters()):
        return "some of its weights are not in memory"
    config = text_config(model)
    if unknown := [name for name in _UNKNOWN if getattr(cfg, name, False)]:
        return f"it has {unknown[0]}"
    if getattr(config, "clip_qkv", None) is not None:
        return "it has clip_qkv"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {sorted(kinds)}"
    reasons = (
        _block_unknown(block, cfg) or rotary_of(model, layer)[1]
        for layer, block in enumerate(blocks)
    )
    return next(filter(None, reasons), "")


def _block_unknown(block: Any, cfg: Any) -> str:
    """Say what in a block `BridgeBlock` does not know."""
    if type(block).__name__ not in _BLOCKS:
        return f"it has blocks of type {type(block).__name__}"
    parts = set(_components(block))
    if parts - _PARTS or not {"attn", "mlp"} <= parts:
        return f"its blocks consist of {', '.join(sorted(parts))}"
    if "ln2" in parts and getattr(block, "mlp_reads_resid_directly", False):
        return "its norms come after its layers"
    attn = block.attn
    kind, inner = type(attn).__name__, inside(attn)
    if kind not in _REBUILT and type(inner).__name__ not in _DELEGATED.get(kind, ()):
        return f"it has attention of type {type(inner).__name__}"
    parts = set(_components(attn))
    if parts - _ATTENTION_PARTS or not {"q", "k", "v", "o"} <= parts:
        return f"its attention consists of {', '.join(sorted(parts))}"
    if unknown := [name for name in _UNKNOWN_INSIDE if getattr(inner, name, None) is not None]:
        return f"its attention has {unknown[0]}"
    width = getattr(inside(attn.q), "out_features", cfg.n_heads * d_head(cfg))
    return "" if width == cfg.n_heads * d_head(cfg) else "its queries have another width"


def _scale(attn: Any, cfg: Any, layer: int) -> float:
    """What attention scores are divided by, as the bridge's attention of this type computes it."""
    inner, usual = inside(attn), d_head(cfg) ** 0.5
    if type(attn).__name__.startswith("JointQKV"):
        by_layer = getattr(cfg, "scale_attn_by_inverse_layer_idx", False)
        return usual * (layer + 1) if by_layer else usual
    if type(inner).__name__ == "GPTNeoSelfAttention":
        return 1.0
    return 1 / float(inner.scaling) if getattr(inner, "scaling", None) else usual


def window(config: Any, inner: Any, layer: int) -> int | None:
    """Give how many positions back a query of this layer sees, its own included; None for all.

    Args:
        config: The Hugging Face configuration.
        inner: The Hugging Face attention module.
        layer: The layer.

    Returns:
        The number of positions, or None.
    """
    if type(inner).__name__ == "GPTNeoSelfAttention":
        return config.window_size if inner.attention_type == "local" else None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return config.sliding_window if kinds[layer] == "sliding_attention" else None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def _components(component: Any) -> dict[str, Any]:
    """The parts of a part, without its hook points and the module underneath."""
    names = [name for name in component._modules if not name.startswith(("_", "hook_"))]
    return {name: component._modules[name] for name in names}


def _same(x: Tensor) -> Tensor:
    return x


_FORMULAS: tuple[Callable[[Any, float], Function], ...] = (
    lambda m, eps: lambda x: F.layer_norm(x, x.shape[-1:], m.weight, getattr(m, "bias", None), eps),
    lambda m, eps: lambda x: F.rms_norm(x, x.shape[-1:], m.weight, eps),
    lambda m, eps: lambda x: F.rms_norm(x, x.shape[-1:], 1 + m.weight, eps),
)
_fused: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()


def norm(component: Any) -> Function:
    """Give the function of a norm as one fused call, where one of the usual formulas is its own.

    Args:
        component: A norm of the bridge.

    Returns:
        The function, over the last axis of its argument.
    """
    module = inside(component)
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1 or eps is None or not _fusible(weight):
        return module
    if module not in _fused:
        _fused[module] = _which_formula(module, eps, weight)
    which = _fused[module]
    return module if which is None else _FORMULAS[which](module, eps)


def _fusible(weight: Tensor) -> bool:
    # In other types the module's own changes of type count.
    return weight.dtype == torch.float32 and not weight.is_meta


@torch.no_grad()
def _which_formula(module: Any, eps: float, weight: Tensor) -> int | None:
    """Find the formula by what it gives: Hugging Face has a class for each family's norm."""
    ramp = torch.arange(1, 2 * len(weight) + 1, device=weight.device, dtype=weight.dtype)
    probe = torch.sin(ramp * ramp).view(2, -1) + 0.3
    wanted = module(probe)
    for which, formula in enumerate(_FORMULAS):
        if torch.allclose(formula(module, eps)(probe), wanted, rtol=1e-5, atol=1e-6):
            return which
    return None


def _head_norm(attn: Any, name: str, heads: int) -> Function:
    """Give the norm of queries or keys: of each head, or of all heads side by side."""
    part = attn._modules.get(name)
    if part is None:
        return _same
    function, weight = norm(part), inside(part).weight
    if getattr(attn, "_qk_norm_phase", None) != "pre_reshape":
        return function
    width = weight.shape[-1]
    return lambda x: rearrange(
        function(rearrange(x, "token head d_head -> token (head d_head)")),
        "token (head d_head) -> token head d_head",
        head=heads,
        d_head=width // heads,
    )


def _mlp(block: Any) -> Function:
    """Give the MLP's function: its matrices and activation where it is a usual one, else the module."""
    mlp, kind = block.mlp, type(block.mlp).__name__
    module = inside(mlp)
    layers = {name: inside(part) for name, part in _components(mlp).items()}
    act = next((found for name in _ACTIVATIONS if (found := getattr(module, name, None))), None)
    if kind == "MLPBridge" and act is not None and set(layers) == {"in", "out"}:
        act, into, out = _activation(act), layers["in"], layers["out"]
        return lambda x: out(act(into(x)))
    if kind == "GatedMLPBridge" and act is not None and set(layers) == {"gate", "in", "out"}:
        act, gate, into, out = _activation(act), layers["gate"], layers["in"], layers["out"]
        return lambda x: out(act(gate(x)) * into(x))
    return lambda x: module(x[None])[0]


_ACTIVATIONS = ("act_fn", "act", "activation_fn")


def _activation(module: Any) -> Function:
    # Hugging Face writes this one out in eight passes over memory.
    if type(module).__name__ == "NewGELUActivation":
        return lambda x: F.gelu(x, approximate="tanh")
    return module
