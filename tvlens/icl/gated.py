"""The paper's stylised model: an in-weight predictor g, an in-context predictor h, and a gate between them.

g sees the query alone; h copies labels of the context, weighted by how near their inputs are to the query;
the gate sees all inputs and no label, and says how much of g to take. What a transformer hides in one set of
weights is apart. All three learn together by the mixture's loss; or g and h first, each for itself, and then
the gate alone. It matters: a g that is learnt first knows its dataset by heart, so that the gate has no
reason to look at the context; together, h serves at once, and g learns what h leaves it.

References:
    Chan et al. 2025, arXiv:2410.23042, section 3; their code exponentiates the temperature of h twice, so
    that h cannot become sharp; here it is exp(theta).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.icl.data import Data, Items
from tvlens.icl.draws import generator
from tvlens.icl.transformer import Parameters, dense, lecun_normal, mean_loss

STAGES = ("together", "parts", "gate")
_FLOOR_H, _FLOOR = 1e-7, 1e-8  # least probabilities, as in the authors' code


class Parts(NamedTuple):
    """What the stylised model is made of: g and h, log-probabilities in nats, and the gate's share of g."""

    g: Float[Tensor, "member item label"]
    h: Float[Tensor, "member item label"]
    gate: Float[Tensor, "member item"]


@dataclass(frozen=True, kw_only=True)
class Gated:
    """The stylised architecture.

    Args:
        stage: What learns: ``"together"`` (all, by the mixture's loss), ``"parts"`` (g and h, each by its own
            loss) or ``"gate"`` (the gate alone).
        width: Width of both hidden layers of g and of the gate.

    Raises:
        ValueError: There is no such stage.

    Example:
        >>> from tvlens.icl import Setting
        >>> data = Data([Setting(), Setting(seed=1)])
        >>> Gated().initial(data)["h.theta"].shape
        torch.Size([2])
    """

    stage: str = "together"
    width: int = 64

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise unknown("stage", self.stage, STAGES)

    def trained(self, name: str) -> bool:
        """Whether a parameter learns at this stage."""
        return self.stage == "together" or name.startswith("gate") == (self.stage == "gate")

    def initial(self, data: Data) -> Parameters:
        """Draw first weights for every member; a member's own seed alone decides them.

        Args:
            data: The members' data.

        Returns:
            Parameters by name, each with a leading axis of members.
        """
        sizes = {
            "g": (data.d_model, self.width, self.width, data.n_classes),
            "gate": ((data.length + 1) * data.d_model, self.width, self.width, 1),
        }
        drawn = []
        for setting in data.settings:
            made: Parameters = {"h.theta": torch.zeros(())}
            for part, widths in sizes.items():
                stream = generator(setting.seed, "gated", part)
                for i, (rows, columns) in enumerate(pairwise(widths)):
                    made[f"{part}.{i}.w"] = lecun_normal(rows, columns, stream)
                    made[f"{part}.{i}.b"] = torch.zeros(columns)
            drawn.append(made)
        return {
            name: torch.stack([one[name] for one in drawn]).to(data.device) for name in drawn[0]
        }

    def parts(self, w: Parameters, items: Items) -> Parts:
        """Run g, h and the gate.

        Args:
            w: Parameters.
            items: Sequences.

        Returns:
            What each says.
        """
        query, context = items.inputs[:, :, -1], items.inputs[:, :, :-1]
        g = _mlp(w, "g", query).log_softmax(dim=-1)
        away = reduce(
            (context - rearrange(query, "m i d -> m i 1 d")) ** 2, "m i l d -> m i l", "sum"
        )
        weight = (-away / rearrange(w["h.theta"].exp(), "m -> m 1 1")).softmax(dim=-1)
        h = torch.zeros_like(g).scatter_add(2, items.labels, weight).clamp(min=_FLOOR_H).log()
        gate = _mlp(w, "gate", rearrange(items.inputs, "m i slot d -> m i (slot d)"))
        return Parts(g, h, rearrange(gate, "m i 1 -> m i").sigmoid())

    def log_probs(self, w: Parameters, items: Items) -> Float[Tensor, "member item label"]:
        """Say how likely each label is: gate * g + (1 - gate) * h, in nats."""
        parts = self.parts(w, items)
        gate = rearrange(parts.gate, "m i -> m i 1")
        mixed = gate * parts.g.exp() + (1 - gate) * parts.h.exp()
        return mixed.clamp(min=_FLOOR).log()

    def losses(self, w: Parameters, items: Items) -> Float[Tensor, " member"]:
        """Give each member's loss in nats: of g plus of h where these learn apart, else of the mixture."""
        if self.stage != "parts":
            return mean_loss(self.log_probs(w, items), items.target)
        parts = self.parts(w, items)
        # They share no parameter, so the sum trains each as if it were alone.
        return mean_loss(parts.g, items.target) + mean_loss(parts.h, items.target)


def _mlp(
    w: Parameters, name: str, x: Float[Tensor, "member item width"]
) -> Float[Tensor, "member item out"]:
    hidden = rearrange(x, "m i d -> m i 1 d")
    for i in range(3):
        hidden = dense(w, f"{name}.{i}", hidden)
        hidden = hidden.relu() if i < 2 else hidden
    return rearrange(hidden, "m i 1 d -> m i d")
