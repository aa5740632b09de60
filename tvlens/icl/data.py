"""Sequences of labelled inputs that can be answered from the context, from the weights, or both.

A sequence shows L pairs (input, label) and asks for the label of a query. Inputs are prototypes of classes
plus noise; few classes are common (C_H), others rare (C_L). In a *relevant* sequence the query's class is in
the context, so that its label can be copied; in an irrelevant one only the weights know it. A dataset holds N
sequences that are drawn once and then met again and again: N, not the number of steps, decides how often a
class was seen.

References:
    Chan et al. 2025, arXiv:2410.23042, section 4.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown, whole
from tvlens.icl._checks import check_others
from tvlens.icl.draws import generator, keys, normals, number, uniforms
from tvlens.models._places import resolve_device

GROUPS = ("high", "low", "novel")
_TRAIN, _ORDER = number("train"), number("order")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one model is trained on.

    Args:
        n_high: Common classes, C_H.
        n_low: Rare classes, C_L.
        p_high: Share of draws that go to common classes.
        p_relevant: Share of sequences whose context holds the query's class.
        noise: Standard deviation of the noise in each coordinate; its norm is about noise * sqrt(d_model).
        label_noise: Share of training labels, of context and query, that are moved on to the next class.
        length: Pairs in the context, L.
        n_relevant: How many of them are of the query's class in a relevant sequence; at least one where None.
        n_sequences: Sequences in the dataset, N; None draws new ones for ever.
        forced: Whether the first sequences ask for every class once, as the authors' data do.
        d_model: Width of an input.
        seed: Decides prototypes, sequences, their order, and the model's first weights.

    Raises:
        ValueError: The numbers contradict each other.

    Example:
        >>> Setting(n_sequences=256, noise=0.2).n_classes
        10
    """

    n_high: int = 5
    n_low: int = 5
    p_high: float = 0.9
    p_relevant: float = 0.9
    noise: float = 0.2
    label_noise: float = 0.0
    length: int = 1
    n_relevant: int | None = None
    n_sequences: int | None = None
    forced: bool = True
    d_model: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"n_high": 1, "n_low": 1, "length": 1, "d_model": 1, "seed": 0}
        for name, lowest in least.items():
            if whole(name, getattr(self, name)) < lowest:
                raise ValueError(
                    f"{name} must be at least {lowest}; {getattr(self, name)} arrived."
                )
        for name in ("p_high", "p_relevant", "label_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} lies between 0 and 1; {getattr(self, name)} arrived.")
        if not self.noise >= 0:
            raise ValueError(f"noise must not be negative; {self.noise} arrived.")
        asked = self.n_relevant
        if asked is not None and not 1 <= whole("n_relevant", asked) <= self.length:
            raise ValueError(
                f"a context of length {self.length} holds 1 to {self.length} relevant pairs; "
                f"n_relevant = {asked} arrived."
            )
        n = self.n_sequences
        if n is not None and whole("n_sequences", n) < (self.n_classes if self.forced else 1):
            raise ValueError(
                f"n_sequences = {n} cannot ask for each of {self.n_classes} classes once: "
                f"at least {self.n_classes}, or forced=False."
            )
        check_others(self, class_weights(self).max().item())

    @property
    def n_classes(self) -> int:
        """Common and rare classes together."""
        return self.n_high + self.n_low

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What members of one ensemble must share: both class counts, length, width."""
        return self.n_high, self.n_low, self.length, self.d_model

    def to_dict(self) -> dict[str, Any]:
        """Give the fields, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Items:
    """Sequences for every member of an ensemble.

    Args:
        inputs: The context's inputs and, last, the query.
        labels: The context's labels.
        target: The label that counts as right.
        own: The label of the query's class in training.
    """

    inputs: Float[Tensor, "member item slot d_model"]
    labels: Int[Tensor, "member item length"]
    target: Int[Tensor, "member item"]
    own: Int[Tensor, "member item"]

    def __repr__(self) -> str:
        members, items, length = self.labels.shape
        return f"Items({members} members, {items} sequences each, length {length})"


class Data:
    """The datasets of an ensemble's members, each a pure function of its setting.

    Args:
        settings: One for every member, of one shape.
        device: Where sequences are drawn.

    Raises:
        ValueError: No setting, or settings of several shapes.

    Example:
        >>> data = Data([Setting(n_sequences=64), Setting(n_sequences=64, noise=0.4)])
        >>> data.batch(torch.tensor(0), 8).inputs.shape
        torch.Size([2, 8, 2, 64])
    """

    def __init__(self, settings: Sequence[Setting], *, device: str | torch.device = "cpu") -> None:
        if isinstance(settings, Setting) or not len(settings):
            arrived = "one setting by itself" if isinstance(settings, Setting) else "none"
            raise ValueError(
                f"members are given as a list of settings, one for each model; {arrived} arrived."
            )
        shapes = {setting.shape for setting in settings}
        if len(shapes) != 1:
            raise ValueError(
                "members of one ensemble share n_high, n_low, length and d_model; "
                f"{len(settings)} settings of {len(shapes)} shapes arrived."
            )
        self.settings, self.device = tuple(settings), torch.device(resolve_device(device))
        self.n_high, self.n_low, self.length, self.d_model = shapes.pop()
        self.n_classes = self.n_high + self.n_low
        self.seed = self._each(lambda s: s.seed, dtype=torch.int64)
        self.label_noise, self.noise = self._each("label_noise"), self._each("noise")
        self.p_relevant = self._each("p_relevant")
        # 2^62 stands for a dataset without end.
        self.size = self._each(lambda s: s.n_sequences or 2**62, dtype=torch.int64)
        self.forced = self._each(lambda s: s.n_classes if s.forced else 0, dtype=torch.int64)
        self.weights = torch.stack([class_weights(s) for s in settings]).to(self.device)
        self.counts = torch.stack([_relevant_counts(s) for s in settings]).to(self.device)
        self.prototypes, self.novel = self._prototypes("seen"), self._prototypes("novel")

    def __repr__(self) -> str:
        return f"Data({len(self.settings)} members, {self.n_classes} classes, length {self.length})"

    def _each(self, what: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        read = what if callable(what) else lambda s: getattr(s, what)
        return torch.tensor([read(s) for s in self.settings], dtype=dtype, device=self.device)

    def _prototypes(self, name: str) -> Float[Tensor, "member label d_model"]:
        drawn = [
            torch.randn(
                self.n_classes, self.d_model, generator=generator(s.seed, "prototypes", name)
            )
            for s in self.settings
        ]
        return torch.nn.functional.normalize(torch.stack(drawn), dim=-1).to(self.device)

    def batch(self, step: Int[Tensor, ""], n: int) -> Items:
        """Draw the sequences that a training step sees.

        Args:
            step: Number of the step, from 0.
            n: Sequences in a batch.

        Returns:
            Sequences that were drawn from each member's dataset, with replacement; new ones where it is
            without end.
        """
        place = step * n + torch.arange(n, device=self.device)
        place = repeat(place, "item -> member item", member=len(self.settings))
        drawn = keys(rearrange(self.seed, "member -> member 1"), _ORDER, place)
        size = rearrange(self.size, "member -> member 1")
        return self.items("train", torch.where(size < 2**62, (drawn >> 1).abs() % size, place))

    def items(
        self,
        split: str,
        index: Int[Tensor, "member item"],
        *,
        relevant: bool | None = None,
        group: str | None = None,
        flipped: bool = False,
    ) -> Items:
        """Draw sequences by their number.

        Args:
            split: ``"train"``, or any other name: sequences of two splits have no draw in common.
            index: Numbers of the sequences.
            relevant: Whether the query's class is in the context; as in training where None.
            group: Only queries of ``"high"`` or ``"low"`` classes, or of ``"novel"`` ones that training never
                shows: those bear labels that only the context tells.
            flipped: Whether all labels are moved on by one within their group, so that weights are wrong.

        Returns:
            The sequences.

        Raises:
            ValueError: There is no such group.
        """
        if group is not None and group not in GROUPS:
            raise unknown("group of classes", group, GROUPS)
        key = self._key(split, index)
        query, context = self._classes(key, split, index, relevant, group)
        classes = torch.cat([context, rearrange(query, "m i -> m i 1")], dim=-1)
        inputs = self._inputs(classes, key, split=split, group=group)
        own = classes
        if group == "novel":
            shift = (uniforms(keys(key, 6), 1) * self.n_classes).long()
            classes = own = (classes + shift) % self.n_classes
        if flipped:
            classes = self.flip(classes)
        labels = classes
        if split == "train":
            moved = uniforms(keys(key, 5), self.length + 1) < rearrange(
                self.label_noise, "m -> m 1 1"
            )
            labels = torch.where(moved, (classes + 1) % self.n_classes, classes)
        return Items(inputs, labels[..., :-1], labels[..., -1], own[..., -1])

    def items_of(
        self, split: str, classes: Int[Tensor, "item slot"], labels: Int[Tensor, "item slot"]
    ) -> Items:
        """Show every member classes that are given, under labels that are given.

        Args:
            split: Any name but ``"train"``; it decides how inputs differ from their prototypes.
            classes: The context's classes and, last, the query's.
            labels: What they are called there, the right answer last.

        Returns:
            The sequences.

        Example:
            >>> asked = Data([Setting()]).items_of("mine", torch.tensor([[3, 4]]), torch.tensor([[7, 4]]))
            >>> asked.labels, asked.target, asked.own
            (tensor([[[7]]]), tensor([[4]]), tensor([[4]]))
        """
        index = torch.arange(len(classes), device=self.device)
        key = self._key(split, index)
        classes, labels = (
            repeat(x.to(self.device), "item slot -> m item slot", m=len(self.settings))
            for x in (classes, labels)
        )
        inputs = self._inputs(classes, key, split=split, group=None)
        return Items(inputs, labels[..., :-1], labels[..., -1], classes[..., -1])

    def flip(self, classes: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Move labels on by one, within common and within rare classes."""
        high = (classes + 1) % self.n_high
        low = self.n_high + (classes - self.n_high + 1) % self.n_low
        return torch.where(classes < self.n_high, high, low)

    def _key(self, split: str, index: Int[Tensor, "*member item"]) -> Int[Tensor, "member item"]:
        # A step that is compiled draws from "train", whose number is at hand.
        which = _TRAIN if split == "train" else number(split)
        return keys(rearrange(self.seed, "member -> member 1"), which, index)

    def _noise(
        self, key: Int[Tensor, "member item"], n_slots: int
    ) -> Float[Tensor, "member item slot d_model"]:
        """What is added to the inputs of every slot."""
        drawn = normals(keys(key, 4), n_slots * self.d_model)
        drawn = rearrange(drawn, "m i (slot d) -> m i slot d", d=self.d_model)
        return rearrange(self.noise, "m -> m 1 1 1") * drawn

    def _inputs(
        self,
        classes: Int[Tensor, "member item slot"],
        key: Int[Tensor, "member item"],
        *,
        split: str,
        group: str | None,
    ) -> Float[Tensor, "member item slot d_model"]:
        """Prototypes of the classes, with noise."""
        prototypes = self.novel if group == "novel" else self.prototypes
        member = rearrange(torch.arange(len(prototypes), device=self.device), "m -> m 1 1")
        return prototypes[member, classes] + self._noise(key, classes.shape[-1])

    def _classes(
        self,
        key: Int[Tensor, "member item"],
        split: str,
        index: Int[Tensor, "member item"],
        relevant: bool | None,
        group: str | None,
    ) -> tuple[Int[Tensor, "member item"], Int[Tensor, "member item length"]]:
        """Classes of the query and of the context, in one draw each: nothing is drawn and rejected."""
        weights = self.weights
        if group in ("high", "low"):
            high = torch.arange(self.n_classes, device=self.device) < self.n_high
            weights = (high if group == "high" else ~high).float().expand_as(weights)
        elif group == "novel":
            weights = torch.ones_like(weights)
        query = _pick(weights, uniforms(keys(key, 0), 1))[..., 0]
        if split == "train":
            forced = index < rearrange(self.forced, "m -> m 1")
            query = torch.where(forced, index, query)
        around = torch.ones_like(weights) if group == "novel" else self.weights
        others = _pick_others(around, query, uniforms(keys(key, 1), self.length))
        has = uniforms(keys(key, 2), 2)
        holds = has[..., 0] < rearrange(self.p_relevant, "m -> m 1")
        if relevant is not None:
            holds = torch.full_like(holds, relevant)
        member = rearrange(torch.arange(len(weights), device=self.device), "m -> m 1")
        count = _pick_row(self.counts[member, query], has[..., 1]) * holds
        rank = uniforms(keys(key, 3), self.length).argsort(dim=-1).argsort(dim=-1)
        own = rearrange(query, "m i -> m i 1")
        return query, torch.where(rank < rearrange(count, "m i -> m i 1"), own, others)


def class_weights(setting: Setting) -> Float[Tensor, " label"]:
    """Give the share of draws that go to each class, common ones first.

    Args:
        setting: A setting.

    Returns:
        Shares that sum to 1.

    Example:
        >>> class_weights(Setting())[[0, -1]].tolist()
        [0.18000000715255737, 0.019999999552965164]
    """
    high = torch.full((setting.n_high,), setting.p_high / setting.n_high)
    low = torch.full((setting.n_low,), (1 - setting.p_high) / setting.n_low)
    return torch.cat([high, low])


def _relevant_counts(setting: Setting) -> Float[Tensor, "label count"]:
    """Cumulative chances of 1, 2, ... L pairs of the query's class in a relevant context, by class."""
    wanted = torch.arange(1, setting.length + 1)
    if setting.n_relevant is not None:
        chances = (wanted == setting.n_relevant).float().expand(setting.n_classes, -1)
    else:
        p = rearrange(class_weights(setting).double(), "label -> label 1").clamp(1e-12, 1 - 1e-12)
        some = torch.distributions.Binomial(setting.length, p).log_prob(wanted.double()).exp()
        chances = (some / some.sum(dim=-1, keepdim=True)).float()
    return chances.cumsum(dim=-1)


def _pick(
    weights: Float[Tensor, "member label"], u: Float[Tensor, "member item n"]
) -> Int[Tensor, "member item n"]:
    """Turn uniform numbers into classes."""
    ends = weights.cumsum(dim=-1)
    flat = rearrange(u, "m i n -> m (i n)") * ends[:, -1:]
    found = torch.searchsorted(ends, flat, right=True).clamp(max=ends.shape[-1] - 1)
    return rearrange(found, "m (i n) -> m i n", n=u.shape[-1])


def _pick_others(
    weights: Float[Tensor, "member label"],
    query: Int[Tensor, "member item"],
    u: Float[Tensor, "member item n"],
) -> Int[Tensor, "member item n"]:
    """Turn uniform numbers into classes other than the query's: its stretch of the line is cut out."""
    ends = weights.cumsum(dim=-1)
    own, end = weights.gather(1, query), ends.gather(1, query)
    cut, start = rearrange(own, "m i -> m i 1"), rearrange(end - own, "m i -> m i 1")
    total = rearrange(ends[:, -1], "m -> m 1 1")
    at = u * (total - cut)
    at = torch.where(at >= start, at + cut, at)
    found = torch.searchsorted(ends, rearrange(at, "m i n -> m (i n)"), right=True)
    found = rearrange(found.clamp(max=ends.shape[-1] - 1), "m (i n) -> m i n", n=u.shape[-1])
    # Rounding may leave a number at the edge of the stretch that was cut out.
    same = found == rearrange(query, "m i -> m i 1")
    return torch.where(same, (found + 1) % weights.shape[-1], found)


def _pick_row(
    ends: Float[Tensor, "member item count"], u: Float[Tensor, "member item"]
) -> Int[Tensor, "member item"]:
    """Turn a uniform number into a count from 1."""
    return 1 + (rearrange(u, "m i -> m i 1") >= ends[..., :-1]).sum(dim=-1)
