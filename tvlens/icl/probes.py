"""What is asked of a model: relevant contexts or not, common, rare or novel classes, true or moved labels.

With true labels (the in-base distribution, IBD) a model may copy from its context or recall. With labels
moved within their group (out of base, OOBD) the two disagree: on a relevant context, an error near 0 means
in-context learning and one near 1 in-weight learning. Novel classes can be answered from the context alone,
and show whether copying is a habit that needs no memory of the class.

References:
    Chan et al. 2025, arXiv:2410.23042, section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.icl.data import GROUPS, Data, Items
from tvlens.icl.transformer import said_of

MEASURES = ("error", "loss", "alpha", "copying")


@dataclass(frozen=True)
class Probe:
    """One question put to a model, many times.

    Args:
        relevant: Whether the query's class is in the context.
        group: Queries of ``"high"`` (common), ``"low"`` (rare), or ``"novel"`` classes.
        flipped: Whether labels are moved on by one within their group.

    Raises:
        ValueError: There is no such group, or novel classes are flipped: they have no label to move from.

    Example:
        >>> Probe(True, "low", flipped=True).name
        'relevant low flipped'
    """

    relevant: bool
    group: str
    flipped: bool = False

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise unknown("group of classes", self.group, GROUPS)
        if self.flipped and self.group == "novel":
            raise ValueError("novel classes have no label of their own that could be moved.")

    @property
    def name(self) -> str:
        """The words for it, e.g. ``"irrelevant high base"``."""
        labels = "flipped" if self.flipped else "base"
        return f"{'relevant' if self.relevant else 'irrelevant'} {self.group} {labels}"

    @classmethod
    def of(cls, name: str) -> "Probe":
        """Find the probe of a name.

        Args:
            name: As `name` gives it.

        Returns:
            The probe.

        Raises:
            ValueError: There is none.
        """
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
        return PROBES[name]


_ALL = [
    Probe(relevant, group, flipped)
    for group in GROUPS
    for flipped in (False, True)
    for relevant in (True, False)
    if not (flipped and group == "novel")
]
PROBES = {probe.name: probe for probe in _ALL}
"""All probes by name."""


def measure(
    model: Any, w: dict[str, Tensor], data: Data, probes: Sequence[Probe], *, n_items: int = 1000
) -> Float[Tensor, "measure probe member"]:
    """Ask every member of an ensemble, on sequences that no training saw.

    Args:
        model: The architecture, which gives ``log_probs``.
        w: The members' weights.
        data: Their data.
        probes: What is asked.
        n_items: Sequences for each probe.

    Returns:
        In the order of `MEASURES`: the share of wrong answers; the cross entropy in nats; alpha, the share of
        p(own label) in p(own label) + p(context's label), NaN unless the context is relevant and its labels
        flipped; and copying, by how much the labels in the context have higher log-probability than the
        others, NaN where there are none.

    Raises:
        ValueError: Labels cannot be moved in a group of one class.
    """
    single = {"high": data.n_high, "low": data.n_low}
    for probe in probes:
        if probe.flipped and single[probe.group] < 2:
            raise ValueError(
                f"{probe.name!r} moves labels within {probe.group} classes: at least 2 are needed, "
                f"there is {single[probe.group]}."
            )
    step = max(1, min(n_items, 2**18 // (len(data.settings) * data.length)))
    with torch.no_grad():
        found = []
        for probe in probes:
            parts = []
            for start in range(0, n_items, step):
                index = torch.arange(start, min(start + step, n_items), device=data.device)
                index = repeat(index, "item -> member item", member=len(data.settings))
                items = data.items(
                    f"test {probe.name}", index, relevant=probe.relevant, group=probe.group,
                    flipped=probe.flipped,
                )  # fmt: skip
                conflict = probe.flipped and probe.relevant
                parts.append(outcomes(model.log_probs(w, items), items, conflict=conflict))
            found.append(reduce(torch.cat(parts, dim=-1), "measure m i -> measure m", "mean"))
    if not found:
        return torch.empty(len(MEASURES), 0, len(data.settings), device=data.device)
    return rearrange(found, "probe measure m -> measure probe m")


def outcomes(
    log_probs: Float[Tensor, "member item label"], items: Items, *, conflict: bool
) -> Float[Tensor, "measure member item"]:
    """Give what is measured, sequence by sequence.

    Args:
        log_probs: What the members say, in nats.
        items: The sequences.
        conflict: Whether own and right label differ, so that alpha means something; NaN where not.

    Returns:
        In the order of `MEASURES`, as `measure` says.
    """
    right = said_of(log_probs, items.target)
    own = said_of(log_probs, items.own)
    error = (log_probs.argmax(dim=-1) != items.target).float()
    alpha = (own - right).sigmoid() if conflict else torch.full_like(own, torch.nan)
    shown = torch.zeros_like(log_probs).scatter(2, items.labels, 1.0)
    inside = (log_probs * shown).sum(-1) / shown.sum(-1)
    outside = (log_probs * (1 - shown)).sum(-1) / (1 - shown).sum(-1)
    return torch.stack([error, -right, alpha, inside - outside])
