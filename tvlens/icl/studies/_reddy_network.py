"""Data and network of Reddy's study: many members at once, each with its own task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens.icl.draws import generator, number

_NEW = 128  # classes of the test with new classes, at least


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of all members, ready to be read.

    Args:
        tokens: Item, label, item, label, ..., target: a one-hot position beside the content.
        shown: Label of each pair.
        label: The right label of the target.
    """

    tokens: Float[Tensor, "member item token d_input"]
    shown: Int[Tensor, "member item pair"]
    label: Int[Tensor, "member item"]


@dataclass(frozen=True, eq=False)
class Task:
    """Classes, labels and how often they come, for all members.

    Args:
        means: Class means; members with fewer classes never use the last.
        labels: Label vectors.
        new: Means of classes that are never trained on.
        cumulated: Cumulated frequency of the classes.
        copies: How often a class is in a bursty context.
        noise: Within-class noise.
        n_classes: How many classes each member has.
        p_bursty: Share of bursty sequences.
        n_pairs: Pairs in a context.
        n_max: Pairs for which there are positions.
    """

    means: Float[Tensor, "member label d_item"]
    labels: Float[Tensor, "member name d_item"]
    new: Float[Tensor, "member novel d_item"]
    cumulated: Float[Tensor, "member label"]
    copies: Int[Tensor, " member"]
    noise: Float[Tensor, " member"]
    n_classes: Int[Tensor, " member"]
    p_bursty: float
    n_pairs: int
    n_max: int

    @classmethod
    def draw(
        cls, members: Sequence[tuple[Any, ...]], used: Mapping[str, Any], *, device: str = "cpu"
    ) -> "Task":
        """Draw the classes of each member from its own seed."""
        d, most = used["d_item"], max(member[0] for member in members)
        n_new = -(-_NEW // used["n_labels"]) * used["n_labels"]
        means, labels, new, cumulated = [], [], [], []
        for k, _, _, exponent, seed in members:
            stream = generator(seed, "reddy task", k)
            sizes = (used["n_labels"], n_new, k)
            some = [torch.randn(size, d, generator=stream) / d**0.5 for size in sizes]
            labels.append(some[0])
            new.append(some[1])
            means.append(torch.cat([some[2], torch.zeros(most - k, d)]))
            weight = torch.arange(1, k + 1, dtype=torch.float64) ** -float(exponent)
            rising = (weight / weight.sum()).cumsum(0).float()
            rising[-1] = 1
            cumulated.append(torch.cat([rising, torch.full((most - k,), 2.0)]))
        sizes, copies, noise = (torch.tensor([member[i] for member in members]) for i in (0, 1, 2))
        return cls(
            torch.stack(means).to(device), torch.stack(labels).to(device), torch.stack(new).to(device),
            torch.stack(cumulated).to(device), copies.to(device), noise.float().to(device), sizes.to(device),
            used["p_bursty"], used["n_pairs"], used["n_max"],
        )  # fmt: skip

    @property
    def d_input(self) -> int:
        """Numbers in a token."""
        return 2 * self.n_max + 1 + self.means.shape[-1]

    def chunk(self, stream: torch.Generator, n: int, size: int) -> list[Batch]:
        """Draw several batches of training sequences at once."""
        many = self.batch(stream, n * size, p_bursty=self.p_bursty)
        parts = [x.split(size, dim=1) for x in (many.tokens, many.shown, many.label)]
        return [Batch(*some) for some in zip(*parts, strict=True)]

    def tests(self, size: int, seed: int) -> dict[str, Batch]:
        """Draw the four tests; see `tvlens.icl.studies._reddy.TESTS`."""
        kinds: dict[str, dict[str, Any]] = {
            "train": {"p_bursty": self.p_bursty}, "new_classes": {"p_bursty": 1.0, "new": True},
            "moved_labels": {"p_bursty": 1.0, "moved": True}, "in_weights": {"p_bursty": 0.0, "absent": True},
        }  # fmt: skip
        found = {}
        for name, how in kinds.items():
            stream = torch.Generator(self.means.device).manual_seed(number(f"{seed}:test:{name}"))
            found[name] = self.batch(stream, size, **how)
        return found

    def batch(
        self, stream: torch.Generator, size: int, *, p_bursty: float, new: bool = False, moved: bool = False,
        absent: bool = False,
    ) -> Batch:  # fmt: skip
        """Draw sequences.

        Args:
            stream: Where randomness comes from.
            size: How many for each member.
            p_bursty: Share of bursty ones.
            new: Classes are new ones.
            moved: All labels are moved on to the next.
            absent: The target's class is not in the context.

        Returns:
            The sequences.
        """
        members, device = len(self.means), self.means.device
        n_labels, pairs = self.labels.shape[1], self.n_pairs

        def uniform(*shape: int) -> Tensor:
            return torch.rand(members, size, *shape, generator=stream, device=device)

        u = uniform(pairs + 1)
        if new:
            drawn = (u * self.new.shape[1]).long()
        else:
            drawn = torch.searchsorted(self.cumulated, rearrange(u, "m i p -> m (i p)"))
            drawn = rearrange(drawn, "m (i p) -> m i p", i=size)
        context, target = drawn[..., :pairs], drawn[..., pairs]
        # Place j of a bursty context holds class j // copies; then places are shuffled.
        group = torch.arange(pairs, device=device) // rearrange(self.copies, "m -> m 1")
        bursty = context.gather(2, repeat(group, "m p -> m i p", i=size))
        bursty = bursty.gather(2, uniform(pairs).argsort(dim=-1))
        is_bursty = uniform(1) < p_bursty
        context = torch.where(is_bursty, bursty, context)
        target = torch.where(is_bursty[..., 0], bursty[..., 0], target)
        # Any place may be the target's; after the shuffle the first is as good, so shuffle once more.
        context = context.gather(2, uniform(pairs).argsort(dim=-1))
        if absent:
            hit = context == rearrange(target, "m i -> m i 1")
            other = (context + 1) % rearrange(self.n_classes, "m -> m 1 1")
            context = torch.where(hit, other, context)
        shown, label = ((x + int(moved)) % n_labels for x in (context, target))
        tokens = self._tokens(context, target, shown, self.new if new else self.means, stream)
        return Batch(tokens, shown, label)

    def _tokens(
        self, context: Tensor, target: Tensor, shown: Tensor, means: Tensor, stream: torch.Generator
    ) -> Float[Tensor, "member item token d_input"]:
        members, size, pairs = context.shape
        device, d = means.device, means.shape[-1]
        every = torch.cat([context, rearrange(target, "m i -> m i 1")], dim=2)
        row = rearrange(torch.arange(members, device=device), "m -> m 1 1")
        noise = torch.randn(members, size, pairs + 1, d, generator=stream, device=device) / d**0.5
        level = rearrange(self.noise, "m -> m 1 1 1")
        items = (means[row, every] + level * noise) / (1 + level**2) ** 0.5
        names = self.labels[row, shown]
        content = rearrange([items[:, :, :pairs], names], "two m i p d -> m i (p two) d")
        content = torch.cat([content, items[:, :, pairs:]], dim=2)
        length, n_positions = 2 * pairs + 1, 2 * self.n_max + 1
        shift = torch.rand(members, size, 1, generator=stream, device=device)
        at = (shift * (n_positions - length + 1)).long() + torch.arange(length, device=device)
        position = torch.nn.functional.one_hot(at, n_positions).to(content.dtype)
        return torch.cat([position, content], dim=-1)


def initial(
    members: Sequence[tuple[Any, ...]], d: int, n_labels: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Draw first weights of each member from its own seed, as the authors do.

    Args:
        members: Settings, the seed last.
        d: Numbers in a token.
        n_labels: Labels.
        device: Where they go.

    Returns:
        Weights by name, with a leading axis ``member``.
    """
    shapes = {f"{part}{layer}": ((d, d), 63**-0.5) for layer in (1, 2) for part in "QKV"}
    for layer in (1, 2, 3):
        shapes |= {f"W{layer}": ((d, d), (2 / d) ** 0.5), f"b{layer}": ((1, 1), d**-0.5)}
    shapes["readout"] = ((n_labels, d), d**-0.5)
    found = {name: [] for name in shapes}
    for *_, seed in members:
        stream = generator(seed, "reddy weights")
        for name, (shape, scale) in shapes.items():
            found[name].append(torch.randn(shape, generator=stream) * scale)
    return {name: torch.stack(some).to(device) for name, some in found.items()}


def forward(
    w: Mapping[str, Tensor], tokens: Float[Tensor, "member item token d_input"]
) -> tuple[
    Float[Tensor, "member item label"],
    Float[Tensor, "member item query key"],
    Float[Tensor, "member item key"],
]:
    """Give logits at the target, the first layer's attention, and the second's from the target.

    Args:
        w: Weights.
        tokens: Sequences.

    Returns:
        Logits (member, item, label); attention of layer 1 (member, item, query, key); of layer 2 (member,
        item, key).
    """
    size, length = tokens.shape[1:3]
    flat = rearrange(tokens, "m i t d -> m (i t) d")
    # (Q x)·(K y) = x·(QᵀK) y: one product with the tokens in place of two.
    asks = rearrange(flat @ (w["Q1"].mT @ w["K1"]), "m (i t) d -> m i t d", i=size)
    hidden = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    first = (asks @ tokens.mT).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    moved = rearrange(first @ tokens, "m i t d -> m (i t) d") @ w["V1"].mT
    x = tokens + rearrange(moved, "m (i t) d -> m i t d", i=size)
    target = x[:, :, -1]
    asks = target @ (w["Q2"].mT @ w["K2"])
    second = torch.einsum("m i d, m i t d -> m i t", asks, x).softmax(dim=-1)
    x = target + torch.einsum("m i t, m i t d -> m i d", second, x) @ w["V2"].mT
    for layer in (1, 2, 3):
        x = torch.relu(x @ w[f"W{layer}"].mT + w[f"b{layer}"])
    return x @ w["readout"].mT, first, second


def losses(w: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, " member"]:
    """Give each member's mean cross-entropy.

    Args:
        w: Weights.
        batch: Sequences.

    Returns:
        The losses.
    """
    logits, _, _ = forward(w, batch.tokens)
    says = logits.log_softmax(dim=-1).gather(-1, rearrange(batch.label, "m i -> m i 1"))
    return -says.mean(dim=(1, 2))


def measures(
    w: Mapping[str, Tensor], tests: Mapping[str, Batch]
) -> Float[Tensor, "member measure"]:
    """Give accuracies on all tests, and the progress measures on that with new classes.

    Args:
        w: Weights.
        tests: Sequences by test.

    Returns:
        Values in the order of `TESTS`, then `MEASURES`.
    """
    found = []
    for batch in tests.values():
        logits, _, _ = forward(w, batch.tokens)
        found.append((logits.argmax(dim=-1) == batch.label).float().mean(dim=1))
    batch = tests["new_classes"]
    return torch.stack([*found, *_progress(w, batch), losses(w, tests["train"])], dim=1)


def _progress(w: Mapping[str, Tensor], batch: Batch) -> list[Float[Tensor, " member"]]:
    logits, first, second = forward(w, batch.tokens)
    previous = first.diagonal(offset=-1, dim1=-2, dim2=-1)[..., ::2].mean(dim=(1, 2))
    on_labels = second[..., 1::2]
    same: Bool[Tensor, "member item pair"] = batch.shown == rearrange(batch.label, "m i -> m i 1")
    right = (on_labels * same).sum(dim=-1)
    other = (on_labels * ~same).sum(dim=-1) / (~same).sum(dim=-1).clamp_min(1)
    preference = right / same.sum(dim=-1).clamp_min(1) - other
    shown = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, batch.shown, True)
    inside, outside = ((logits * x).sum(-1) / x.sum(-1).clamp_min(1) for x in (shown, ~shown))
    # Where the context shows every label, there are no others.
    lead = torch.where(shown.all(-1), 0, inside - outside)
    return [previous, right.mean(dim=1), preference.mean(dim=1), lead.mean(dim=1)]
