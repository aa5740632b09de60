"""What is kept of the logits at a prompt's last position: whole logits seldom are.

A readout is told which prompt each row runs, and may say that it needs only a few tokens' logits; then
only these are computed, which spares the unembedding of a whole vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Readout(Protocol):
    """Turns last-position logits into the few numbers that are kept."""

    @property
    def columns(self) -> Int[Tensor, "prompt column"] | None:
        """For each prompt, the tokens whose logits are needed; None for the whole vocabulary."""
        ...

    def rows(self, prompts: slice) -> "Readout":
        """The same readout for a range of the prompts."""
        ...

    def __call__(
        self, logits: Float[Tensor, "row column"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        """Reduce the logits of some rows; ``prompt`` says which prompt each row runs."""
        ...


@dataclass(frozen=True)
class LastLogits:
    """Readout that keeps the whole logits: `d_vocab` numbers for each prompt and cell."""

    columns: None = None

    def rows(self, prompts: slice) -> "LastLogits":
        """The same for a range of the prompts."""
        return self

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        """Keep everything."""
        return {"logits": logits}


@dataclass(frozen=True, eq=False)
class TokenLogits:
    """Readout that keeps, for each prompt, the logits of a few tokens; only these are computed.

    Attributes:
        columns: For each prompt, the token ids.
    """

    columns: Int[Tensor, "prompt column"]

    def rows(self, prompts: slice) -> "TokenLogits":
        """The same for a range of the prompts."""
        return TokenLogits(self.columns[prompts])

    def __call__(
        self, logits: Float[Tensor, "row column"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        """Keep these logits."""
        return {"logits": logits}


@dataclass(frozen=True)
class FirstToken:
    """Readout for first-token scoring: the predicted token, and how likely the right ones were.

    Attributes:
        answer_ids: For each prompt, the token ids that count as right.
    """

    answer_ids: tuple[tuple[int, ...], ...]
    columns: None = None

    def rows(self, prompts: slice) -> "FirstToken":
        """The same for a range of the prompts."""
        return FirstToken(self.answer_ids[prompts])

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        """Give, for each row, the prediction, whether it is right, and log probabilities (nats)."""
        width = max(map(len, self.answer_ids))
        padded = torch.tensor([[*ids, *[ids[0]] * (width - len(ids))] for ids in self.answer_ids])
        accepted = padded.to(logits.device)[prompt]
        # Pieces that stay in a CPU's cache take half the time of one; a GPU waits for each launch.
        pieces = logits.split(16) if logits.device.type == "cpu" else (logits,)
        total = torch.cat([rows.float().logsumexp(dim=-1) for rows in pieces])
        best, predicted = logits.max(dim=-1)
        answers = logits.gather(1, accepted).float().amax(dim=-1)
        return {
            "predicted": predicted,
            "correct": (predicted[:, None] == accepted).any(dim=-1),
            "log_prob": best.float() - total,
            "answer_log_prob": answers - total,
        }
