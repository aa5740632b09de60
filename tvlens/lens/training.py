"""Training a tuned lens: one pass of the model over some text, then the translators without the model.

The vocabulary is what costs. The divergence is therefore taken over the tokens that the model says most
often, all of them, and a fresh sample of the others that stands for the rest; what it is near is computed
once, over the whole vocabulary. What is reported is measured over the whole vocabulary, too.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.encoding import Encoder, TokenBatch
from tvlens.lens.measures import log_probabilities, pieces
from tvlens.lens.reading import STREAM, chosen_positions, read_parts
from tvlens.lens.tuned import TunedLens
from tvlens.models.runner import Runner, runner
from tvlens.patching.pairs import as_batch, lengths_of

# Tokens of the vocabulary that a step sees: the commonest ones, and a sample of the others.
_COMMON, _SAMPLED = 2048, 1024
_SHORTEST = 8  # tokens of a piece of text
_RESIDUALS = 2**30  # bytes that residuals may take, where nothing else is said
_BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Settings:
    """How a lens is trained; see `TunedLens.train`."""

    steps: int
    lr: float
    seed: int
    batch: int
    context: int
    ridge: float | None
    heldout: float
    n_heldout: int
    plan: str
    memory: int | None

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("context", _SHORTEST), ("n_heldout", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; {getattr(self, name)} arrived.")
        if not 0 < self.heldout < 1:
            raise ValueError(f"heldout is a share between 0 and 1; {self.heldout} arrived.")
        if not self.lr > 0 or (self.ridge is not None and not self.ridge > 0):
            raise ValueError(f"lr and ridge must be positive; {self.lr} and {self.ridge} arrived.")


@dataclass(frozen=True, eq=False)
class _Text:
    """What the model made of the text: residuals by layer, and final ones."""

    resid: Float[Tensor, "layer row d_model"]
    last: Float[Tensor, "row d_model"]


@cache
def corpus() -> str:
    """Give the passages that come with tvlens: English prose of 1776 to 1892, in the public domain.

    Returns:
        The text.

    Example:
        >>> corpus()[:5]
        'Alice'
    """
    return resources.files("tvlens.lens").joinpath("corpus.txt").read_text(encoding="utf-8")


def train(model: Any, texts: Any, start: TunedLens, settings: Settings) -> TunedLens:
    """Train translators; see `TunedLens.train`.

    Args:
        model: The model.
        texts: The text; None for `corpus`.
        start: Which layers and site, and translators that change nothing.
        settings: How.

    Returns:
        The trained lens, with its gain on held-out text.

    Raises:
        ValueError: There is too little text.
    """
    started, drive = time.perf_counter(), runner(model)
    windows = _windows(model, corpus() if texts is None else texts, settings.context)
    windows = windows.rows(slice(0, _most(drive, start, windows, settings)))
    n = len(windows)
    n_out = max(1, round(settings.heldout * n))
    if n - n_out < 1:
        raise ValueError(f"training needs at least two pieces of text; {n} arrived. Give more.")
    # Spread over the text, so that every part of it is in both.
    out = np.zeros(n, dtype=bool)
    out[((np.arange(n_out) + 0.5) * n / n_out).astype(int)] = True
    kept, held = _read(model, windows, start, out, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    weight, bias = _regress(start, kept, drive.n_layers, settings.ridge)
    if settings.steps:
        _descend(drive, start, kept, weight, bias, settings, generator)
    lens = replace(start, weight=weight, bias=bias)
    chosen = torch.randperm(len(held.last), generator=generator)[: settings.n_heldout]
    part = _Text(held.resid[:, chosen], held.last[chosen])
    measured = {
        "logit": _divergence(drive, start, part),
        "tuned": _divergence(drive, lens, part),
        "positions": len(chosen),
    }
    note = {k: v for k, v in asdict(settings).items() if k not in ("plan", "memory")}
    note |= {"text": "tvlens" if texts is None else "given", "positions": len(kept.last)}
    made = {
        "trained": note,
        "heldout": measured,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return replace(lens, made={**start.made, **made})


def _windows(model: Any, texts: Any, context: int) -> TokenBatch:
    """Cut text into pieces of equally many tokens; the rest at the end is left out."""
    if isinstance(texts, Tensor | TokenBatch):
        return as_batch(model, texts, name="texts")
    several = [texts] if isinstance(texts, str) else texts
    if isinstance(several, dict) or not all(isinstance(text, str) for text in several):
        raise TypeError(f"texts must be a text or a list of texts; {type(texts).__name__} arrived.")
    encoder = Encoder.of(model)
    ids = encoder.ids("\n\n".join(several))
    begin = [] if encoder.bos is None else [encoder.bos]
    most = encoder.n_ctx or context
    # Little text makes shorter pieces, so that there is something to hold out.
    size = min(context, most, len(ids) // 4 + len(begin)) - len(begin)
    if size < _SHORTEST:
        raise ValueError(
            f"the text has {len(ids)} tokens; training a lens needs at least {4 * _SHORTEST}, and some "
            "thousand to be worth it."
        )
    n = len(ids) // size
    rows = [begin + ids[i * size : (i + 1) * size] for i in range(n)]
    return TokenBatch.of_ids(torch.tensor(rows))


def _most(drive: Runner, start: TunedLens, windows: TokenBatch, settings: Settings) -> int:
    """How many pieces of text memory holds the residuals of; at least two."""
    each = (len(start.layers) + 1) * windows.tokens.shape[1] * start.d_model * 4
    return max(2, (settings.memory or _RESIDUALS) // each)


def _read(
    model: Any, windows: TokenBatch, start: TunedLens, out: Any, settings: Settings
) -> tuple[_Text, _Text]:
    """Run the model over the text; what is trained on, and what is held out."""
    _, at = chosen_positions(None, lengths_of(windows))
    reads = [(start.site, start.layers), (STREAM, (runner(model).n_layers - 1,))]
    kept: list[list[Tensor]] = [[], []]
    ends: list[list[Tensor]] = [[], []]
    for rows, (resid, last), _ in read_parts(
        model, windows, at, reads, plan=settings.plan, memory=settings.memory
    ):
        for side, chosen in enumerate((~out[rows[:, 0]], out[rows[:, 0]])):
            here = torch.from_numpy(np.flatnonzero(chosen)).to(resid.device)
            kept[side].append(resid[:, here].float())
            ends[side].append(last[0, here].float())
    one, other = (
        _Text(torch.cat(resid, dim=1), torch.cat(last))
        for resid, last in zip(kept, ends, strict=True)
    )
    return one, other


def _free(start: TunedLens, n_layers: int) -> Iterator[tuple[int, int]]:
    """Slices and layers that are trained: of the last layer nothing can be nearer than itself."""
    for at, layer in enumerate(start.layers):
        if (start.site, layer) != (STREAM, n_layers - 1):
            yield at, layer


def _regress(
    start: TunedLens, text: _Text, n_layers: int, ridge: float | None
) -> tuple[Float[Tensor, "layer d_in d_model"], Float[Tensor, "layer d_model"]]:
    """Regress final residuals onto each layer's, each row weighted by how small it is.

    The read-out norms what it gets, so the final residuals' own length is no matter; and a first token a
    thousand times as long as all others must not decide alone.
    """
    weight, bias = start.weight.clone(), start.bias.clone()
    if ridge is None:
        return weight, bias
    length = text.last.pow(2).mean(dim=-1, keepdim=True).sqrt()
    wanted = (text.last / length.clamp(min=1e-12) * length.median()).double()
    for at, _ in _free(start, n_layers):
        x = text.resid[at].double()
        share = 1 / x.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
        rows = torch.cat([x, torch.ones_like(share)], dim=1) * share
        pull = torch.full((rows.shape[1],), ridge * len(rows), dtype=x.dtype, device=x.device)
        pull[-1] = 1e-6 * float((share**2).sum())  # the bias is free
        found = torch.linalg.solve(rows.T @ rows + pull.diag(), rows.T @ ((wanted - x) * share))
        weight[at], bias[at] = found[:-1].to(weight), found[-1].to(bias)
    return weight, bias


class _Columns:
    """The read-out of a few tokens for many rows, with gradients: final norm, unembedding, soft cap."""

    def __init__(self, drive: Runner, rows: Float[Tensor, "row d_model"]) -> None:
        model, self.drive = drive.model, drive
        self.weights = model.W_U.detach().float().T
        self.bias = model.b_U.detach().float().to(self.weights.device)
        # Some models scale their logits in other ways: then what they say is computed whole.
        ids = torch.arange(
            0, len(self.weights), max(1, len(self.weights) // 64), device=rows.device
        )
        with torch.no_grad():
            mine, own = (
                self.few(rows[:4], ids),
                drive.logits(rows[:4].to(drive.dtype))[:, ids].float(),
            )
            self.whole = not bool((mine - own).norm() <= 0.02 * (own - own.mean()).norm())

    def few(
        self, resid: Float[Tensor, "row d_model"], ids: Int[Tensor, " column"]
    ) -> Float[Tensor, "row column"]:
        normed = self.drive.last_norm(resid.to(self.drive.dtype)).to(self.weights)
        ids, cap = ids.to(self.weights.device), self.drive.soft_cap
        logits = normed @ self.weights[ids].T + self.bias[ids]
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def __call__(
        self, resid: Float[Tensor, "row d_model"], ids: Int[Tensor, " column"]
    ) -> Float[Tensor, "row column"]:
        if not self.whole:
            return self.few(resid, ids)
        logits = self.drive.logits(resid.to(self.drive.dtype)).float()
        return logits[:, ids.to(logits.device)]


def _descend(
    drive: Runner,
    start: TunedLens,
    text: _Text,
    weight: Float[Tensor, "layer d_in d_model"],
    bias: Float[Tensor, "layer d_model"],
    settings: Settings,
    generator: torch.Generator,
) -> None:
    """Train translators on the divergence, in place."""
    columns = _Columns(drive, text.last)
    total, order = _final(drive, text.last)
    common, rare = order[:_COMMON], order[_COMMON:]
    optimizer = torch.optim.Adam([weight, bias], lr=settings.lr, betas=_BETAS)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(settings.steps):
        rows = torch.randint(len(text.last), (settings.batch,), generator=generator)
        drawn = torch.randint(max(len(rare), 1), (min(_SAMPLED, len(rare)),), generator=generator)
        ids = torch.cat([common, rare[drawn]])
        # Each drawn token stands for several.
        stands = torch.zeros(len(ids), device=drive.device)
        stands[len(common) :] = math.log(max(len(rare), 1) / max(len(drawn), 1))
        with torch.no_grad():
            final = columns(text.last[rows], ids)
            stands = stands.to(final)
            share = (final - total[rows].to(final) + stands).exp()
        for at, _ in _free(start, drive.n_layers):
            there = text.resid[at, rows]
            with torch.enable_grad():
                own = [each[at].detach().requires_grad_() for each in (weight, bias)]
                logits = columns(there + there @ own[0] + own[1], ids)
                away = (logits + stands).logsumexp(dim=-1) - (share * logits).sum(dim=-1)
                slopes = torch.autograd.grad(away.mean(), own)
            weight.grad[at], bias.grad[at] = slopes
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        optimizer.step()
    weight.grad = bias.grad = None


@torch.no_grad()
def _final(
    drive: Runner, last: Float[Tensor, "row d_model"]
) -> tuple[Float[Tensor, "row 1"], Int[Tensor, " token"]]:
    """Each row's normaliser over the whole vocabulary, and all tokens, the commonest first."""
    d_vocab = int(drive.model.cfg.d_vocab)
    totals, share = [], torch.zeros(d_vocab)
    for rows in pieces(drive, len(last), d_vocab):
        logits = drive.logits(last[rows].to(drive.dtype)).float()
        totals.append(logits.logsumexp(dim=-1, keepdim=True))
        share += (logits - totals[-1]).exp().sum(dim=0).cpu()
    return torch.cat(totals), share.argsort(descending=True)


@torch.no_grad()
def _divergence(drive: Runner, lens: TunedLens, text: _Text) -> list[float]:
    """KL(final || lens) of each layer over the whole vocabulary, in nats."""
    found = torch.zeros(len(lens.layers), dtype=torch.float64)
    for rows in pieces(drive, len(text.last), int(drive.model.cfg.d_vocab)):
        final = log_probabilities(drive, text.last[rows])
        for at, layer in enumerate(lens.layers):
            logp = log_probabilities(drive, lens.translate(text.resid[at, rows], layer))
            found[at] += (final.exp() * (final - logp)).sum().cpu()
    return (found / len(text.last)).clamp(min=0).tolist()
