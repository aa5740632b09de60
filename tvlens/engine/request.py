"""What can be asked of the engine: which prompts, which edits, what to read.

A *cell* is one way of running the prompts: a tuple of edits, empty for the clean run. A sweep is many
cells over the same prompts. The request says nothing about how it is run; that is the plan's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import TokenBatch
from tvlens.sites import SITES

MODES = ("replace", "add")


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of an activation.

    Attributes:
        site: Name of the site, see `tvlens.sites.SITES`.
        layer: Layer, from 0.
        values: What is written, for every prompt (or one row for all of them).
        position: Token position; negative counts from the end of each prompt.
        mode: ``"replace"`` writes ``scale * values``; ``"add"`` adds it to what is there.
        scale: Factor on the values.
    """

    site: str
    layer: int
    values: Float[Tensor, " prompt *site"]
    position: int = -1
    mode: str = "replace"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise unknown("site", self.site, SITES)
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)

    def apply(self, old: Float[Tensor, " prompt *site"]) -> Float[Tensor, " prompt *site"]:
        """Give the activation's new value for every prompt, in the old one's type and place."""
        new = (self.scale * self.values).to(old)
        return (new if self.mode == "replace" else old + new).expand_as(old)


@dataclass(frozen=True)
class Read:
    """Activations to keep: one position of one site, in some layers.

    Attributes:
        site: Name of the site, see `tvlens.sites.SITES`.
        layers: Layers, from 0.
        position: Token position; negative counts from the end of each prompt.
    """

    site: str
    layers: tuple[int, ...]
    position: int = -1

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise unknown("site", self.site, SITES)


@runtime_checkable
class Readout(Protocol):
    """Turns last-position logits into the few numbers that are kept; whole logits seldom are."""

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        """Reduce the logits of some rows; ``prompt`` says which prompt each row runs."""
        ...


@dataclass(frozen=True, eq=False)
class Request:
    """One batch of prompts, in how many ways to run it, and what to keep.

    Attributes:
        batch: The prompts.
        cells: Ways of running them; ``((),)`` is the clean run alone.
        reads: Activations to keep, in every cell.
        readout: What to compute from the logits at each prompt's last position; None runs no unembedding.
    """

    batch: TokenBatch
    cells: tuple[tuple[Edit, ...], ...] = ((),)
    reads: tuple[Read, ...] = ()
    readout: Readout | None = None

    def positions(self) -> set[int]:
        """All positions that are edited or read, as they were given."""
        edited = {edit.position for cell in self.cells for edit in cell}
        return edited | {read.position for read in self.reads} | {-1}


@dataclass(frozen=True, eq=False)
class Output:
    """What came back.

    Attributes:
        activations: One tensor for each `Read`: cell, prompt, layer, then the site's own axes.
        values: What the readout computed, by its names, with cell and prompt in front.
        plan: How it was run, in words.
    """

    # Layers and axes differ from read to read, so they have no common name.
    activations: tuple[Float[Tensor, "cell prompt _ ..."], ...]
    values: dict[str, Tensor]
    plan: str


@dataclass(frozen=True)
class LastLogits:
    """Readout that keeps the whole logits: `d_vocab` numbers for each prompt and cell."""

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        """Keep everything."""
        return {"logits": logits}


@dataclass(frozen=True)
class FirstToken:
    """Readout for first-token scoring: the predicted token, and how likely the right ones were.

    Attributes:
        answer_ids: For each prompt, the token ids that count as right.
    """

    answer_ids: tuple[tuple[int, ...], ...]

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        """Give, for each row, the prediction, whether it is right, and log probabilities (nats)."""
        width = max(map(len, self.answer_ids))
        padded = torch.tensor([[*ids, *[ids[0]] * (width - len(ids))] for ids in self.answer_ids])
        accepted = padded.to(logits.device)[prompt]
        # In pieces that stay in a CPU's cache: one piece of all rows takes twice as long.
        total = torch.cat([rows.float().logsumexp(dim=-1) for rows in logits.split(16)])
        best, predicted = logits.max(dim=-1)
        answers = logits.gather(1, accepted).float().amax(dim=-1)
        return {
            "predicted": predicted,
            "correct": (predicted[:, None] == accepted).any(dim=-1),
            "log_prob": best.float() - total,
            "answer_log_prob": answers - total,
        }
