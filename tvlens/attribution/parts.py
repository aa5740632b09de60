"""The residual stream as a sum of what was written into it, and each part's share along a direction.

After layer l the stream is the embedding plus what attention and MLP of every layer up to l have added. What
attention adds is a sum over heads, and what a head adds is a sum over the tokens that it looks at. Along one
direction each of them is a number, and the numbers add up to that of the stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.attribution.linear import pull, transpose
from tvlens.encoding import TokenBatch
from tvlens.engine import Read, Request, run
from tvlens.models.runner import Runner
from tvlens.patching.sweep import parts

BY = ("layer", "head", "position")
Named = dict[str, tuple[tuple[str, ...], Tensor]]
"""By name, dimensions and values."""


@dataclass(frozen=True)
class Split:
    """How far the parts are taken apart.

    Attributes:
        heads: Whether attention is split into heads.
        origins: Whether attention is split by the tokens that it looks at.
    """

    heads: bool = False
    origins: bool = False

    @classmethod
    def of(cls, by: str | Sequence[str]) -> "Split":
        """Read ``by`` as users write it."""
        names = [by] if isinstance(by, str) else list(by)
        for name in names:
            if name not in BY:
                raise unknown("by", name, BY)
        return cls("head" in names, "position" in names)

    @property
    def dims(self) -> tuple[str, ...]:
        """Dimensions of what attention adds, besides the prompt."""
        return ("layer", *(["head"] * self.heads), *(["position"] * self.origins))


@dataclass(frozen=True, eq=False)
class Stream:
    """What was written into the residual stream at one position of some prompts.

    Attributes:
        rows: Which prompts.
        batch: These prompts.
        position: The position, from each prompt's first token.
        sites: Activations by site: prompt, layer, and so on.
    """

    rows: slice
    batch: TokenBatch
    position: Int[Tensor, " prompt"]
    sites: dict[str, Tensor]

    @property
    def final(self) -> Float[Tensor, "prompt d_model"]:
        """The sum: the residual stream after the last layer that was read."""
        return self.sites["resid_post"][:, 0]


def streams(
    model: Any,
    drive: Runner,
    batch: TokenBatch,
    split: Split,
    *,
    position: int,
    n_layers: int,
    **limits: Any,
) -> Iterator[Stream]:
    """Run prompts and keep what the parts are computed from, as many prompts at once as fit.

    Args:
        model: The model.
        drive: Its runner.
        batch: The prompts.
        split: How far the parts are taken apart.
        position: The position that is looked at, negative from each prompt's end.
        n_layers: How many layers, from the first.
        **limits: The engine's ``plan`` and ``memory``.

    Yields:
        Activations of some of the prompts.

    Raises:
        ValueError: Heads are asked for of a model that cannot be taken apart.
    """
    if (split.heads or split.origins) and not drive.steppable:
        raise ValueError(
            "attention of this model cannot be split into heads and positions: there is something in its "
            "blocks that tvlens does not know. Use by='layer'."
        )
    layers = tuple(range(n_layers))
    reads = [
        Read("resid_pre", (0,), position),
        Read("attn_out", layers, position),
        Read("mlp_out", layers, position),
        Read("resid_post", layers[-1:], position),
    ]
    if split.heads or split.origins:
        reads.append(Read("z", layers, position))
    if split.origins:
        reads += [Read("pattern", layers, position), Read("v", layers, None)]
    wide = ("v",) if split.origins else ("resid_post",)
    for rows in parts(drive, batch, wide, n_layers):
        some = batch.rows(rows)
        (output,) = run(model, [Request(some, reads=tuple(reads))], **limits)
        found = {r.site: a[0] for r, a in zip(reads, output.activations, strict=True)}
        at = some.lengths + position if position < 0 else torch.full_like(some.lengths, position)
        yield Stream(rows, some, at, found)


@torch.no_grad()
def contributions(
    drive: Runner,
    stream: Stream,
    direction: Float[Tensor, "prompt d_model"],
    split: Split,
    *,
    membership: Float[Tensor, "prompt key origin"] | None = None,
) -> Named:
    """Give every part's share along a direction of the residual stream.

    Args:
        drive: The model.
        stream: What was written.
        direction: One direction for each prompt.
        split: How far the parts are taken apart.
        membership: What counts as one origin, in place of each token by itself.

    Returns:
        ``embedding``, ``positional_embedding``, ``attention``, ``attention_bias`` and ``mlp``, by prompt.
    """
    sites, towards = stream.sites, direction.double()
    along = {
        name: einsum(
            sites[name].double(), towards, "prompt layer d_model, prompt d_model -> layer prompt"
        )
        for name in ("resid_pre", "attn_out", "mlp_out")
    }
    placed = torch.arange(len(stream.position))
    ids = stream.batch.tokens[placed, stream.position - stream.batch.lengths]
    places = drive.embed_position(ids.to(drive.device), stream.position.to(drive.device))
    positional = (places.to(towards) * towards).sum(dim=-1)
    found: Named = {
        "embedding": (("prompt",), along["resid_pre"][0] - positional),
        "positional_embedding": (("prompt",), positional),
        "mlp": (("layer", "prompt"), along["mlp_out"]),
    }
    if not (split.heads or split.origins):
        return found | {
            "attention": (("layer", "prompt"), along["attn_out"]),
            "attention_bias": (("layer", "prompt"), torch.zeros_like(along["attn_out"])),
        }
    each = [
        _attention(drive, stream, towards, layer, split, membership)
        for layer in range(sites["z"].shape[1])
    ]
    attention, bias = (torch.stack(values) for values in zip(*each, strict=True))
    dims = (*split.dims, "prompt")
    return found | {"attention": (dims, attention), "attention_bias": (("layer", "prompt"), bias)}


def _attention(
    drive: Runner,
    stream: Stream,
    towards: Tensor,
    layer: int,
    split: Split,
    membership: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One layer's attention, by head or origin or both, and what its biases add."""
    block, z = drive.block(layer), stream.sites["z"][:, layer]
    z, towards = z.to(block.device), towards.to(block.device)
    with torch.no_grad():
        out = block.project_out(z)
    before, norm_bias = pull(block.norm_attn_out, out, towards)
    heads, bias = transpose(block.project_out, z, before)
    bias = (bias + norm_bias).to(drive.device)
    if not split.origins:
        return (z.double() * heads).sum(dim=-1).T.to(drive.device), bias
    values = stream.sites["v"][:, layer].to(heads)
    pattern = stream.sites["pattern"][:, layer].to(heads)
    # Several heads read the values of one key-value head.
    grouped = rearrange(heads, "prompt (kv g) d_head -> prompt kv g d_head", kv=values.shape[2])
    said = einsum(values, grouped, "prompt key kv d_head, prompt kv g d_head -> prompt kv g key")
    by_key = pattern * rearrange(said, "prompt kv g key -> prompt (kv g) key")
    if membership is None:
        reach = torch.arange(by_key.shape[-1], device=by_key.device)
        beyond = reach >= stream.batch.lengths.to(reach.device)[:, None]
        by_key = by_key.masked_fill(beyond[:, None], float("nan"))
    else:
        by_key = einsum(
            by_key,
            membership.to(by_key),
            "prompt head key, prompt key origin -> prompt head origin",
        )
    each = rearrange(by_key, "prompt head origin -> head origin prompt")
    return (each if split.heads else each.sum(dim=0)).to(drive.device), bias


def joined(pieces: Sequence[Named]) -> Named:
    """Put prompts of several pieces together; positions that a piece does not have are NaN."""
    whole: Named = {}
    for name, (dims, _) in pieces[0].items():
        values = [piece[name][1] for piece in pieces]
        if "position" in dims:
            axis = dims.index("position")
            width = max(v.shape[axis] for v in values)
            values = [_widened(v, axis, width) for v in values]
        whole[name] = (dims, torch.cat(values, dim=-1))
    return whole


def _widened(values: Tensor, axis: int, width: int) -> Tensor:
    shape = list(values.shape)
    shape[axis] = width - shape[axis]
    return torch.cat([values, values.new_full(shape, float("nan"))], dim=axis)
