"""The model under examination, and the few things that several checks ask of it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.checking.table import NotApplicable
from tvlens.encoding import Encoder, TokenBatch
from tvlens.models._verify import _TOLERANCE, _difference
from tvlens.models.runner import Runner, runner
from tvlens.templates import Role

# Of several lengths, so that two of them are padded.
TEXTS = ("a->A b->B c->", "cat->cats dog->dogs horse->horses house->", "d->D e->")
_LENGTHS = (5, 11, 3)


class Subject:
    """A model, its runner, its tokenizer, and prompts of mixed length.

    Args:
        model: A TransformerLens model.
        memory: Bytes that the engine's activations may take, or None.
    """

    def __init__(self, model: Any, memory: int | None = None) -> None:
        self.model, self.memory = model, memory

    @cached_property
    def drive(self) -> Runner:
        """The runner of the model."""
        return runner(self.model)

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer with its BOS rule."""
        if getattr(self.model, "tokenizer", None) is None:
            raise NotApplicable("the model has no tokenizer")
        return Encoder.of(self.model)

    @cached_property
    def spoken(self) -> bool:
        """Whether the prompts are texts: there is a tokenizer, and it knows their letters and words."""
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return False
        return all(tokenizer.unk_token_id not in self.encoder.ids(text) for text in TEXTS)

    @cached_property
    def ids(self) -> tuple[list[int], ...]:
        """Tokens of some prompts, each by itself, with BOS where the model has one."""
        if not self.spoken:
            d_vocab = int(self.model.cfg.d_vocab)
            return tuple([(i * 7 + n) % d_vocab for i in range(n)] for n in _LENGTHS)
        bos = [] if self.encoder.bos is None else [self.encoder.bos]
        return tuple([*bos, *self.encoder.ids(text)] for text in TEXTS)

    @cached_property
    def batch(self) -> TokenBatch:
        """The same prompts as tvlens builds them: one batch, padded on the left."""
        if self.spoken:
            return self.encoder.batch([[(text, Role.OTHER)] for text in TEXTS])
        width = max(map(len, self.ids))
        padded = [[0] * (width - len(row)) + row for row in self.ids]
        mask = torch.tensor([[i >= width - len(row) for i in range(width)] for row in self.ids])
        roles = torch.where(mask, int(Role.OTHER), int(Role.PAD))
        return TokenBatch(TEXTS, torch.tensor(padded), mask, roles)

    @cached_property
    def longest(self) -> int:
        """The row of the longest prompt, which has no padding."""
        return max(range(len(self.ids)), key=lambda row: len(self.ids[row]))

    @cached_property
    def alone(self) -> TokenBatch:
        """The longest prompt as a batch of one."""
        return self.batch.rows(slice(self.longest, self.longest + 1))

    def own(
        self, row: int, hooks: Sequence[tuple[str, Any]] = ()
    ) -> Float[Tensor, "position d_vocab"]:
        """Run one prompt, by itself and without padding, through TransformerLens' own forward.

        Args:
            row: Which prompt.
            hooks: Names of hook points and functions, as ``run_with_hooks`` takes them.

        Returns:
            Its logits at every position.
        """
        tokens = torch.tensor([self.ids[row]], device=next(iter(self.model.parameters())).device)
        mask = {"attention_mask": torch.ones_like(tokens)}
        if hooks:
            return self.model.run_with_hooks(tokens, fwd_hooks=list(hooks), **mask)[0]
        return self.model(tokens, **mask)[0]

    @property
    def tolerance(self) -> float:
        """How far two ways to the same log-probabilities may be apart, in this model's type."""
        return _TOLERANCE.get(self.drive.dtype, 0.1)

    def apart(
        self, found: Float[Tensor, "row d_vocab"], wanted: Float[Tensor, "row d_vocab"]
    ) -> float:
        """How far logits are from what they should be, by the measure that models are loaded with.

        Args:
            found: Logits.
            wanted: What they should be.

        Returns:
            The largest difference of log-probabilities as a share of their spread; in half precision, where
            single tokens may be far off, the root of the mean square.
        """
        ours, theirs = (x.float().cpu().log_softmax(-1)[None] for x in (found, wanted))
        return _difference(ours, theirs, mean=self.drive.dtype.itemsize < 4)
