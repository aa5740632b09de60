"""The toy's architecture, a Llama in plain torch: its weights carry Hugging Face's names.

Rotary positions, so that a vector read after many demonstrations fits into a prompt without any; no
biases, so that attribution has no constant parts; one matrix embeds and unembeds.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The size of the model."""

    d_vocab: int
    d_model: int = 96
    n_layers: int = 6
    n_heads: int = 4
    d_mlp: int = 256
    n_ctx: int = 256
    rope: float = 10000.0
    eps: float = 1e-5

    def huggingface(self) -> dict[str, Any]:
        """Give the configuration as ``config.json`` has it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.d_vocab,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_mlp,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_heads,
            "head_dim": self.d_model // self.n_heads,
            "max_position_embeddings": self.n_ctx,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope},
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_heads = shape.n_heads
        self.q_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.k_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.v_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.o_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (sequence, position, d_model) to the same."""
        size, length, _ = x.shape
        q, k, v = (
            project(x).view(size, length, self.n_heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = ((part * cos + _half_turned(part) * sin).to(v.dtype) for part in (q, k))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(z.transpose(1, 2).reshape(size, length, -1))


class MLP(nn.Module):
    """A gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_mlp, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_mlp, bias=False)
        self.down_proj = nn.Linear(shape.d_mlp, shape.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.d_model, eps=shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.d_model, eps=shape.eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Add attention and MLP to the residual stream."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.d_vocab, shape.d_model)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.d_model, eps=shape.eps)


class Toy(nn.Module):
    """The model."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        d_head = shape.d_model // shape.n_heads
        speed = shape.rope ** -(torch.arange(0, d_head, 2).double() / d_head)
        angle = torch.outer(torch.arange(shape.n_ctx).double(), speed).repeat(1, 2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def start(self, generator: torch.Generator) -> None:
        """Draw the first weights."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                spread = 0.02 if "embed" in name else weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    spread /= (2 * self.shape.n_layers) ** 0.5
                drawn = torch.randn(weight.shape, generator=generator) * spread
                weight.data.copy_(drawn)

    def forward(
        self,
        tokens: Tensor,
        *,
        layer: int = -1,
        place: Tensor | None = None,
        theta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the blocks, and read a residual on the way or replace it.

        Args:
            tokens: (sequence, position).
            layer: The block after which a residual is read; below 0 none is.
            place: (sequence,) its position.
            theta: (sequence, d_model), put there instead.

        Returns:
            The final normed residuals (sequence, position, d_model), and what was read.
        """
        x, length = self.model.embed_tokens(tokens), tokens.shape[1]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        read = None
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin)
            if i == layer and place is not None:
                read = x[torch.arange(len(x), device=x.device), place]
                if theta is not None:
                    here = torch.arange(length, device=x.device) == place[:, None]
                    x = torch.where(here[..., None], theta[:, None].to(x.dtype), x)
        return self.model.norm(x), read

    def logits(self, tokens: Tensor) -> Tensor:
        """Give the logits (sequence, position, d_vocab)."""
        return self(tokens)[0] @ self.model.embed_tokens.weight.T


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
