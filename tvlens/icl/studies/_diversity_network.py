"""Data and network of the study of diversity: one layer of attention and an MLP, many members at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens.icl.draws import generator, number

_N_LABELS = 2


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of all members.

    Args:
        tokens: Normalised tokens: context pairs, the query last, whose label is left out.
        label: The right label of the query.
    """

    tokens: Float[Tensor, "member item token d_input"]
    label: Int[Tensor, "member item"]


@dataclass(frozen=True, eq=False)
class Task:
    """Classes of every seed; a member with K classes uses the first K of its seed's.

    Args:
        known: Normalised tokens of the classes, by seed, beside a label or none.
        new: The same for classes that are never trained on.
        n_classes: Classes of each member.
        row: Which seed each member has.
        length: Tokens in a sequence, the query being one.
    """

    known: Float[Tensor, "seed label two d_input"]
    new: Float[Tensor, "seed label two d_input"]
    n_classes: Int[Tensor, " member"]
    row: Int[Tensor, " member"]
    length: int

    @classmethod
    def draw(
        cls,
        n_classes: Sequence[int],
        seeds: Sequence[int],
        *,
        d_item: int,
        length: int,
        device: str = "cpu",
    ) -> "Task":
        """Draw the classes of each seed; members are numbers of classes by seeds."""
        most, tables = max(n_classes), {}
        for name in ("known", "new"):
            # Numpy draws row by row: fewer classes are the first of more.
            streams = [np.random.default_rng(number(f"{seed}:diversity:{name}")) for seed in seeds]
            each = np.stack([x.standard_normal((most, d_item), dtype=np.float32) for x in streams])
            tables[name] = normalised(torch.from_numpy(each) / d_item**0.5).to(device)
        sizes = torch.tensor(n_classes).repeat_interleave(len(seeds)).to(device)
        row = torch.arange(len(seeds), device=device).repeat(len(n_classes))
        return cls(tables["known"], tables["new"], sizes, row, length)

    def chunk(self, stream: torch.Generator, n: int, size: int) -> list[Batch]:
        """Draw several batches of training sequences."""
        return [self.batch(stream, size) for _ in range(n)]

    def tests(self, size: int, seed: int) -> dict[str, Batch]:
        """Draw sequences as in training, of new classes, and without the query's class in the context."""
        found = {}
        for name, how in {
            "train": {},
            "new_classes": {"new": True},
            "in_weights": {"absent": True},
        }.items():
            stream = torch.Generator(self.known.device).manual_seed(number(f"{seed}:test:{name}"))
            found[name] = self.batch(stream, size, **how)
        return found

    def batch(
        self, stream: torch.Generator, size: int, *, new: bool = False, absent: bool = False
    ) -> Batch:
        """Draw sequences; the query's class is in the context, or it is not in it.

        Args:
            stream: Where randomness comes from.
            size: How many for each member.
            new: Classes are new ones.
            absent: The query's class is not in the context.

        Returns:
            The sequences.
        """
        device, members, n = self.known.device, len(self.row), self.length
        classes = rearrange(self.n_classes, "m -> m 1 1")
        u = torch.rand(members, size, n + 1, generator=stream, device=device)
        # Rounding may reach 1 times the number of classes.
        drawn = torch.minimum((u[..., :n] * classes).long(), classes - 1)
        context, query = drawn[..., :-1], drawn[..., -1:]
        hit = context == query
        if absent:
            context = torch.where(hit, (context + 1) % classes, context)
        else:
            place = (u[..., n:] * (n - 1)).long().clamp_max(n - 2)
            query = torch.where(hit.any(dim=-1, keepdim=True), query, context.gather(2, place))
        table = self.new if new else self.known
        # One index into the flat table costs half of two into the full one.
        base = rearrange(self.row * (2 * table.shape[1]), "m -> m 1 1")
        at = torch.cat([base + 2 * context, base + 2 * query + 1], dim=2)
        flat = rearrange(table, "s k two d -> (s k two) d")
        return Batch(flat[at], query[..., 0] % _N_LABELS)


def normalised(
    means: Float[Tensor, "seed label d_item"],
) -> Float[Tensor, "seed label two d_input"]:
    """Write classes as tokens, with their label and without one, and normalise them as a LayerNorm does.

    Args:
        means: Class means.

    Returns:
        Tokens: the mean beside a one-hot label (the parity of the class), or beside zeros.
    """
    name = torch.nn.functional.one_hot(torch.arange(means.shape[1]) % _N_LABELS, _N_LABELS)
    name = name.to(means.dtype).expand(len(means), -1, -1)
    both = torch.stack(
        [torch.cat([means, name], dim=-1), torch.cat([means, torch.zeros_like(name)], dim=-1)],
        dim=2,
    )
    return torch.nn.functional.layer_norm(both, both.shape[-1:])


def initial(
    seeds: Sequence[int], *, d_item: int, d_mlp: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Draw first weights of each member from its seed, as torch's linear layers do.

    Args:
        seeds: Seed of every member.
        d_item: Numbers in an item.
        d_mlp: Width of the MLP.
        device: Where they go.

    Returns:
        Weights by name, with a leading axis ``member``.
    """
    d = d_item + _N_LABELS
    shapes = {
        **{part: (d, d) for part in "QKV"},
        "W1": (d_mlp, d),
        "W2": (d_mlp, d_mlp),
        "W3": (1, d_mlp),
    }
    found: dict[str, list[Tensor]] = {}
    for seed in seeds:
        stream = generator(seed, "diversity weights")
        for name, (rows, columns) in shapes.items():
            value = 2 * torch.rand(rows, columns, generator=stream) - 1
            found.setdefault(name, []).append(value / columns**0.5)
            if name.startswith("W"):
                bias = 2 * torch.rand(1, rows, generator=stream) - 1
                found.setdefault(f"b{name[1]}", []).append(bias / columns**0.5)
    weights = {name: torch.stack(some) for name, some in found.items()}
    weights |= {"gain": torch.ones(len(seeds), 1, d), "shift": torch.zeros(len(seeds), 1, d)}
    return {name: value.to(device) for name, value in weights.items()}


def forward(
    w: Mapping[str, Tensor],
    tokens: Float[Tensor, "member item token d_input"],
    attends: Bool[Tensor, " member"],
) -> tuple[Float[Tensor, "member item"], Float[Tensor, "member item token"]]:
    """Give the logit of label 1, and the query's attention.

    Args:
        w: Weights.
        tokens: Normalised tokens, the query last.
        attends: Members without attention see the query alone.

    Returns:
        Logits, and attention probabilities.
    """
    query = tokens[:, :, -1] * w["gain"] + w["shift"]
    # What the shift adds to every score is the same, and a softmax does not see it.
    asks = (query @ (w["Q"].mT @ w["K"])) * w["gain"]
    attention = torch.einsum("m i d, m i t d -> m i t", asks, tokens).softmax(dim=-1)
    read = torch.einsum("m i t, m i t d -> m i d", attention, tokens) * w["gain"] + w["shift"]
    x = query + (read @ w["V"].mT) * rearrange(attends, "m -> m 1 1")
    for layer in (1, 2):
        x = torch.relu(x @ w[f"W{layer}"].mT + w[f"b{layer}"])
    return (x @ w["W3"].mT + w["b3"])[..., 0], attention


def margins(
    w: Mapping[str, Tensor], batch: Batch, attends: Bool[Tensor, " member"]
) -> Float[Tensor, "member item"]:
    """Give the logit of the right label less that of the wrong one.

    Args:
        w: Weights.
        batch: Sequences.
        attends: Which members have attention.

    Returns:
        Positive where the answer is right.
    """
    return forward(w, batch.tokens, attends)[0] * (2 * batch.label - 1)


def measures(
    w: Mapping[str, Tensor], tests: Mapping[str, Batch], attends: Bool[Tensor, " member"]
) -> Float[Tensor, "member measure"]:
    """Give accuracy on new classes and in weights, the loss, and what is unexplained of the training data.

    Args:
        w: Weights.
        tests: Sequences by test.
        attends: Which members have attention.

    Returns:
        Values in the order of `tvlens.icl.studies._diversity.MEASURES`.
    """
    each: dict[str, Any] = {name: margins(w, batch, attends) for name, batch in tests.items()}
    right = [(each[name] > 0).float().mean(dim=1) for name in ("new_classes", "in_weights")]
    loss = torch.nn.functional.softplus(-each["train"]).mean(dim=1)
    return torch.stack([*right, loss, torch.sigmoid(-each["train"]).mean(dim=1)], dim=1)
