"""Where fine-tuning changed a model: values of one model written into the other, and weights put together.

Patching asks which activations carry the change: the two models read the same prompt, and what stands
at one place of one of them is written into the other. Grafting asks which weights made it: a model is
put together of base and fine-tuned parts. The two meet in one point, which is tested: the residual
stream after layer l, at all tokens, written by the fine-tuned model into the base model, is the base
model with the embedding and the layers up to l fine-tuned.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, Read, Request, TokenLogits, run
from tvlens.icl.draws import number
from tvlens.icl.studies._cities_data import GROUP, Pairs, prompts, question, told
from tvlens.icl.studies._cities_scoring import score_candidates
from tvlens.icl.studies._cities_training import Weights, holding
from tvlens.models.runner import runner
from tvlens.templates import Role

DIRECTIONS = ("tuned_into_base", "base_into_tuned")
ROLES = {
    "stated name": Role.DEMO_INPUT,
    "stated city": Role.DEMO_OUTPUT,
    "asked name": Role.QUERY,
    "question": Role.SEPARATOR,
    "last token": Role.LAST,
}
PLACES = ("all tokens", *ROLES, "attention", "MLP")
"""Residual stream at all tokens and by role; what attention and MLP add, at all tokens."""
HOWS = ("up_to", "only", "without")
"""Base with the fine-tuned parts up to this one; with this one alone; fine-tuned with this one of base."""


@dataclass(frozen=True)
class Conflicts:
    """Prompts that state another city than the memorised one, read where the two answers part.

    Attributes:
        batch: The prompts; where both answers begin alike, with what they share behind.
        columns: The next token of the stated city, then that of the memorised one.
        owner: The pair each prompt belongs to.
    """

    batch: TokenBatch
    columns: Int[Tensor, "prompt 2"]
    owner: Int[Tensor, " prompt"]

    @classmethod
    def of(
        cls, pairs: Pairs, rows: Sequence[int], *, n_contexts: int, wording: str = "same"
    ) -> "Conflicts":
        """State the next cities of its group to each name."""
        texts, shared, columns, owner = [], [], [], []
        for i in rows:
            start = pairs.pairs[i].group * GROUP
            for k in range(1, n_contexts + 1):
                other = start + (i - start + k) % GROUP
                texts.append(told(pairs.pairs[i].name, pairs.pairs[other].city, wording))
                one, two = pairs.answers[other], pairs.answers[i]
                n = next(n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
                shared.append(one[:n])
                columns.append((one[n], two[n]))
                owner.append(i)
        batch = prompts(pairs.encoder, texts, shared)
        return cls(batch, torch.tensor(columns), torch.tensor(owner))

    def request(self, cells: tuple[tuple[Edit, ...], ...] = ((),)) -> Request:
        """Ask for the two logits."""
        return Request(self.batch, cells, readout=TokenLogits(self.columns))

    def by_name(self, delta: Float[Tensor, "cell prompt"], n: int) -> Float[Tensor, "cell name"]:
        """Mean over each name's prompts; NaN for names without one."""
        sums = torch.zeros(len(delta), n).index_add_(1, self.owner, delta.float().cpu())
        return sums / torch.bincount(self.owner, minlength=n)


def deltas(model: Any, conflicts: Conflicts, cells: tuple = ((),)) -> Float[Tensor, "cell prompt"]:
    """Log odds of the stated against the memorised city at the token where they part."""
    (output,) = run(model, [conflicts.request(cells)])
    logits = output.values["logits"]
    return logits[..., 0] - logits[..., 1]


def patched(
    model: Any,
    base: Weights,
    tuned: Weights,
    conflicts: Conflicts,
    *,
    layers: Sequence[int],
    tick: Callable[[], Any],
) -> Float[Tensor, "direction place layer prompt"]:
    """Write values of one model into the other, place by place and layer by layer.

    Args:
        model: The model, which holds either weights in turn.
        base: Its own weights.
        tuned: The fine-tuned ones.
        conflicts: The prompts.
        layers: Where to patch.
        tick: Called after each site and direction.

    Returns:
        Log odds of the stated city under each patch.
    """
    masks = {"all tokens": conflicts.batch.mask}
    masks |= {name: conflicts.batch.roles == int(role) for name, role in ROLES.items()}
    sites = {"resid_post": masks, "attn_out": {"attention": masks["all tokens"]}}
    sites["mlp_out"] = {"MLP": masks["all tokens"]}
    found = torch.zeros(len(DIRECTIONS), len(PLACES), len(layers), len(conflicts.batch))
    for d, (giver, taker) in enumerate(((tuned, base), (base, tuned))):
        for site, places in sites.items():
            with holding(model, giver):
                read = Request(conflicts.batch, reads=(Read(site, tuple(layers), None),))
                (values,) = run(model, [read])[0].activations
            cells = tuple(
                _edits(site, layer, values[0, :, k], conflicts.batch, mask)
                for mask in places.values()
                for k, layer in enumerate(layers)
            )
            with holding(model, taker):
                got = deltas(model, conflicts, cells).float().cpu()
            at = [PLACES.index(place) for place in places]
            found[d, at] = got.unflatten(0, (len(at), len(layers)))
            tick()
    return found


def _edits(
    site: str, layer: int, values: Tensor, batch: TokenBatch, mask: Tensor
) -> tuple[Edit, ...]:
    """Write values at all tokens that a mask marks, one edit for each position."""
    # From each prompt's first token on, as the engine counts positions.
    wanted = torch.zeros_like(mask)
    for row, (real, chosen) in enumerate(zip(batch.mask, mask, strict=True)):
        own = chosen[real]
        wanted[row, : len(own)] = own
    return tuple(
        Edit(site, layer, values[:, p], position=p, where=wanted[:, p])
        for p in range(wanted.shape[1])
        if wanted[:, p].any()
    )


def parts(model: Any, width: int) -> dict[str, list[str]]:
    """Name the parts a model can be put together of, each with its weights' names.

    Args:
        model: The model.
        width: Layers in a block.

    Returns:
        Embedding, blocks of layers, unembedding with the last norm; then all attention, and all MLPs.
    """
    names = [name for name, _ in model.named_parameters()]
    n = runner(model).n_layers
    found = {"embedding": [x for x in names if x.startswith(("embed.", "pos_embed."))]}
    for low in range(0, n, width):
        high = min(low + width, n) - 1
        heads = tuple(f"blocks.{layer}." for layer in range(low, high + 1))
        found[f"layers {low}-{high}"] = [x for x in names if x.startswith(heads)]
    known = {x for some in found.values() for x in some}
    found["unembedding"] = [x for x in names if x not in known]
    found["all attention"] = [x for x in names if ".attn." in x or ".ln1" in x]
    found["all MLPs"] = [x for x in names if ".mlp." in x or ".ln2" in x]
    return found


@dataclass(frozen=True)
class Grafts:
    """What models put together of base and fine-tuned weights do.

    Attributes:
        parts: The parts; the last, ``"noise"``, is a random change as large as the fine-tuned one.
        delta: Log odds of the stated city on conflict prompts.
        recalled: Whether the bare question is answered with the memorised city.
    """

    parts: tuple[str, ...]
    delta: Float[Tensor, "how part prompt"]
    recalled: Float[Tensor, "how part row"]


def grafted(
    model: Any,
    base: Weights,
    tuned: Weights,
    conflicts: Conflicts,
    pairs: Pairs,
    rows: Sequence[int],
    *,
    width: int,
    seed: int,
    tick: Callable[[], Any],
) -> Grafts:
    """Put models together and try them.

    Args:
        model: The model, which holds each weights in turn.
        base: Its own weights.
        tuned: The fine-tuned ones.
        conflicts: The prompts that state another city.
        pairs: The pairs.
        rows: Pairs that are asked bare.
        width: Layers in a block.
        seed: Decides the noise.
        tick: Called after each model.

    Returns:
        What each does; NaN where there is no such model.
    """
    named = parts(model, width)
    blocks = [name for name in named if not name.startswith("all ")]
    every = (*named, "noise")
    delta = torch.full((len(HOWS), len(every), len(conflicts.batch)), torch.nan)
    recalled = torch.full((len(HOWS), len(every), len(rows)), torch.nan)
    bare = prompts(pairs.encoder, [question(pairs.pairs[i].name) for i in rows], [()] * len(rows))
    own = torch.tensor([i % GROUP for i in rows])
    for how, part, weights in _models(base, tuned, named, blocks, seed):
        with holding(model, weights):
            at = HOWS.index(how), every.index(part)
            delta[at] = deltas(model, conflicts)[0].float().cpu()
            likely, _ = score_candidates(model, bare, pairs.answer_sets(rows))
            recalled[at] = (likely.argmax(dim=1) == own).float()
        tick()
    return Grafts(every, delta, recalled)


def _models(
    base: Weights, tuned: Weights, named: Mapping[str, list[str]], blocks: Sequence[str], seed: int
) -> Iterator[tuple[str, str, Weights]]:
    lower: dict[str, Tensor] = {}
    for part, names in named.items():
        some = {name: tuned[name] for name in names}
        if part in blocks:
            lower |= some
            yield "up_to", part, {**base, **lower}
        yield "only", part, {**base, **some}
        yield "without", part, {**tuned, **{name: base[name] for name in names}}
    yield "only", "noise", _noisy(base, tuned, seed)


def _noisy(base: Weights, tuned: Weights, seed: int) -> dict[str, Tensor]:
    """Change every weight matrix at random, as much as fine-tuning did."""
    found = {}
    for name, weight in base.items():
        stream = torch.Generator().manual_seed(number(f"{seed}:cities:noise:{name}"))
        noise = torch.randn(weight.shape, generator=stream).to(weight)
        size = (tuned[name] - weight).norm() / noise.norm().clamp_min(1e-9)
        found[name] = weight + size * noise
    return found


def n_ticks(model: Any, width: int) -> int:
    """How often the two together call ``tick``."""
    named = parts(model, width)
    blocks = sum(not name.startswith("all ") for name in named)
    return 3 * len(DIRECTIONS) + blocks + 2 * len(named) + 1
