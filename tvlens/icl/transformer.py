"""The paper's transformer, for many models at once.

Two pre-LN blocks of one head read x1, y1, ..., xL, yL, x; an input and its label share a position, inputs
enter as they are, and the label is read at the query. Weights carry a leading axis of members, so that
hundreds of models take a step in the matrix products of one.

References:
    Chan et al. 2025, arXiv:2410.23042, section 4.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.icl.data import Data, Items
from tvlens.icl.draws import generator

Parameters = dict[str, Tensor]
EPS = 1e-5
_PERIOD = 30.0


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """The architecture; the defaults are the paper's.

    Args:
        n_layers: Blocks.
        n_heads: Heads of each; they share the model's width.
        widening: Width of an MLP, as a multiple of the model's.
        label_scale: Factor on the first label embeddings; larger ones make copying easier to find, so that
            what takes the paper's 100,000 steps is seen after 1,000.

    Example:
        >>> from tvlens.icl import Setting
        >>> data = Data([Setting()])
        >>> sum(p.numel() for p in Transformer().initial(data).values())
        101450
    """

    n_layers: int = 2
    n_heads: int = 1
    widening: int = 4
    label_scale: float = 1.0

    def initial(self, data: Data) -> Parameters:
        """Draw first weights for every member; a member's own seed alone decides them.

        Args:
            data: The members' data.

        Returns:
            Parameters by name, each with a leading axis of members.

        Raises:
            ValueError: The heads do not divide the width.
        """
        if data.d_model % self.n_heads:
            raise ValueError(f"{self.n_heads} heads do not divide d_model = {data.d_model}.")
        seeds = [setting.seed for setting in data.settings]
        drawn = {seed: self._draw(data, seed) for seed in dict.fromkeys(seeds)}
        names = drawn[seeds[0]]
        return {
            name: torch.stack([drawn[seed][name] for seed in seeds]).to(data.device)
            for name in names
        }

    def _draw(self, data: Data, seed: int) -> Parameters:
        d, wide, stream = data.d_model, self.widening * data.d_model, generator(seed, "transformer")
        made: Parameters = {}

        def layer_of(name: str, rows: int, columns: int) -> None:
            made[f"{name}.w"] = lecun_normal(rows, columns, stream)
            made[f"{name}.b"] = torch.zeros(columns)

        def norm(name: str) -> None:
            made[f"{name}.w"], made[f"{name}.b"] = torch.ones(d), torch.zeros(d)

        layer_of("label", data.n_classes, d)
        made["label.w"] *= self.label_scale
        for layer in range(self.n_layers):
            norm(f"{layer}.ln1")
            for part in "qkvo":
                layer_of(f"{layer}.{part}", d, d)
            norm(f"{layer}.ln2")
            layer_of(f"{layer}.in", d, wide)
            layer_of(f"{layer}.out", wide, d)
        norm("ln_final")
        layer_of("unembed", d, data.n_classes)
        return made

    def log_probs(self, w: Parameters, items: Items) -> Float[Tensor, "member item label"]:
        """Say how likely each label is.

        Args:
            w: Parameters.
            items: Sequences.

        Returns:
            Log-probabilities in nats, at the query.
        """
        return self.logits(w, items.inputs, items.labels).log_softmax(dim=-1)

    def losses(self, w: Parameters, items: Items) -> Float[Tensor, " member"]:
        """Give each member's mean cross entropy on the query's label, in nats."""
        return mean_loss(self.log_probs(w, items), items.target)

    def logits(
        self,
        w: Parameters,
        inputs: Float[Tensor, "member item slot d_model"],
        labels: Int[Tensor, "member item length"],
    ) -> Float[Tensor, "member item label"]:
        """Run the model; the last block runs at the query alone, where the label is read.

        Args:
            w: Parameters.
            inputs: The context's inputs and, last, the query.
            labels: The context's labels.

        Returns:
            Logits at the query.
        """
        x = self._tokens(w, inputs, labels)
        n = x.shape[2]
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        for layer in range(self.n_layers):
            last = layer == self.n_layers - 1
            asked = slice(n - 1, n) if last else slice(0, n)
            x = self._block(w, f"{layer}", x, asked, None if last else causal)
        return dense(w, "unembed", _norm(w, "ln_final", x))[:, :, 0]

    def _tokens(self, w: Parameters, inputs: Tensor, labels: Tensor) -> Tensor:
        place = positions(inputs.shape[2], inputs.shape[3], device=inputs.device)
        member = rearrange(torch.arange(len(inputs), device=inputs.device), "m -> m 1 1")
        shown = w["label.w"][member, labels] + rearrange(w["label.b"], "m d -> m 1 1 d")
        x = inputs + place
        pairs = torch.stack([x[:, :, :-1], shown + place[:-1]], dim=3)
        pairs = rearrange(pairs, "m i length two d -> m i (length two) d")
        return torch.cat([pairs, x[:, :, -1:]], dim=2)

    def _block(
        self, w: Parameters, name: str, x: Tensor, asked: slice, causal: Tensor | None
    ) -> Tensor:
        normed = _norm(w, f"{name}.ln1", x)
        q = dense(w, f"{name}.q", normed[:, :, asked])
        k, v = (dense(w, f"{name}.{part}", normed) for part in "kv")
        q, k, v = (rearrange(t, "m i p (h d) -> m i h p d", h=self.n_heads) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if causal is not None:
            scores = scores.masked_fill(~causal, -torch.inf)
        mixed = rearrange(scores.softmax(dim=-1) @ v, "m i h p d -> m i p (h d)")
        x = x[:, :, asked] + dense(w, f"{name}.o", mixed)
        wide = F.gelu(dense(w, f"{name}.in", _norm(w, f"{name}.ln2", x)), approximate="tanh")
        return x + dense(w, f"{name}.out", wide)


def lecun_normal(rows: int, columns: int, stream: torch.Generator) -> Float[Tensor, "row column"]:
    """Draw a weight matrix as Flax does: a normal cut at two deviations, of variance 1 / rows.

    Args:
        rows: Inputs of the layer.
        columns: Its outputs.
        stream: Random numbers.

    Returns:
        The weights.

    Example:
        >>> bool(lecun_normal(400, 400, torch.Generator()).std().mul(20).sub(1).abs() < 0.02)
        True
    """
    # The deviation of a standard normal that is cut at two deviations.
    std = 1 / math.sqrt(rows) / 0.87962566103423978
    drawn = torch.empty(rows, columns)
    return torch.nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=stream)


def positions(
    length: int, d_model: int, *, device: str | torch.device = "cpu"
) -> Float[Tensor, "slot d_model"]:
    """Give fixed positional vectors: sines in the first half of the width, cosines in the second.

    Args:
        length: How many places.
        d_model: Width.
        device: Where they are needed.

    Returns:
        One row for each place; an input and its label share one.

    Example:
        >>> positions(3, 4)[0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    half = torch.arange((d_model + 1) // 2, device=device)
    angle = torch.outer(torch.arange(length, device=device), _PERIOD ** (-2 * half / d_model))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :d_model]


def mean_loss(
    log_probs: Float[Tensor, "member item label"], target: Int[Tensor, "member item"]
) -> Float[Tensor, " member"]:
    """Give the mean cross entropy of each member, in nats.

    Args:
        log_probs: Log-probabilities of labels.
        target: Right labels.

    Returns:
        One loss for each member.
    """
    return -said_of(log_probs, target).mean(dim=1)


def said_of(
    log_probs: Float[Tensor, "member item label"], label: Int[Tensor, "member item"]
) -> Float[Tensor, "member item"]:
    """Pick the log-probability of one label of every item.

    Args:
        log_probs: Log-probabilities of labels.
        label: Which.

    Returns:
        One for each item, in nats.
    """
    return rearrange(log_probs.gather(2, rearrange(label, "m i -> m i 1")), "m i 1 -> m i")


def dense(
    w: Parameters, name: str, x: Float[Tensor, "member item position row"]
) -> Float[Tensor, "member item position column"]:
    """Apply a layer ``name.w``, ``name.b`` of every member."""
    flat = rearrange(x, "m i p d -> m (i p) d")
    out = torch.baddbmm(rearrange(w[f"{name}.b"], "m d -> m 1 d"), flat, w[f"{name}.w"])
    return rearrange(out, "m (i p) d -> m i p d", p=x.shape[2])


def _norm(w: Parameters, name: str, x: Tensor) -> Tensor:
    scale, shift = (rearrange(w[f"{name}.{part}"], "m d -> m 1 1 d") for part in "wb")
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * scale + shift
