"""How far did a run move? One number for each prompt, from the logits at its last position.

A metric decides what patching can see. The logit difference between the right and a wrong answer is linear
in the residual stream, moves where both answers are unlikely, and needs two columns of the unembedding, not
all: it is the default. Probability shows only what is already probable; rank and accuracy jump; KL asks
whether the whole prediction is the same and needs no answer at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.engine.readout import Readout

Ids = tuple[tuple[int, ...], ...]
VALUE = "metric"
"""The name under which readouts give a metric's values."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What the prompts are measured against.

    Attributes:
        n_prompts: How many prompts there are.
        answers: For each prompt, the token ids that are right.
        wrong: For each prompt, the token ids that are wrong.
        reference: Logits of the run that the others are compared with.
    """

    n_prompts: int
    answers: Ids | None = None
    wrong: Ids | None = None
    reference: Float[Tensor, "prompt d_vocab"] | None = None


@runtime_checkable
class Metric(Protocol):
    """What turns logits into one number for each prompt."""

    @property
    def name(self) -> str:
        """The name in tables and figures."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Which targets it needs: ``"answers"``, ``"wrong"``, ``"reference"``."""
        ...

    def readout(self, targets: Targets) -> Readout:
        """Give the readout that the engine calls."""
        ...


@dataclass(frozen=True)
class LogitDifference:
    """Logit of the answer less that of the wrong answer; of several, their mean."""

    name: str = "logit_difference"
    needs: tuple[str, ...] = ("answers", "wrong")

    def readout(self, targets: Targets) -> Readout:
        """Unembed these few tokens only."""
        pairs = list(zip(targets.answers or (), targets.wrong or (), strict=True))
        width = max(len(right) + len(wrong) for right, wrong in pairs)
        columns = torch.zeros(len(pairs), width, dtype=torch.long)
        weights = torch.zeros(len(pairs), width)
        for row, (right, wrong) in enumerate(pairs):
            n = len(right) + len(wrong)
            columns[row, :n] = torch.tensor([*right, *wrong])
            weights[row, : len(right)] = 1 / len(right)
            weights[row, len(right) : n] = -1 / len(wrong)
        return _Weighted(columns, weights)


@dataclass(frozen=True)
class LogProbability:
    """Log probability of the answer in nats; of several, that any of them is said."""

    name: str = "log_probability"
    needs: tuple[str, ...] = ("answers",)

    def readout(self, targets: Targets) -> Readout:
        """Sum over the answers."""
        return _Whole(_log_probability, (_padded(targets.answers),))


@dataclass(frozen=True)
class Probability:
    """Probability of the answer; of several, their sum."""

    name: str = "probability"
    needs: tuple[str, ...] = ("answers",)

    def readout(self, targets: Targets) -> Readout:
        """Sum over the answers."""
        return _Whole(
            lambda logits, answers: _log_probability(logits, answers).exp(),
            (_padded(targets.answers),),
        )


@dataclass(frozen=True)
class Rank:
    """Rank of the answer among all tokens, 1 for the likeliest; of several, the best."""

    name: str = "rank"
    needs: tuple[str, ...] = ("answers",)

    def readout(self, targets: Targets) -> Readout:
        """Count the tokens that are likelier."""
        return _Whole(_rank, (_padded(targets.answers),))


@dataclass(frozen=True)
class Accuracy:
    """1 where the likeliest token is an answer, else 0."""

    name: str = "accuracy"
    needs: tuple[str, ...] = ("answers",)

    def readout(self, targets: Targets) -> Readout:
        """Compare the likeliest token."""
        return _Whole(_accuracy, (_padded(targets.answers),))


@dataclass(frozen=True)
class KL:
    """Kullback-Leibler divergence from the clean run's prediction to this one, in nats."""

    name: str = "kl"
    needs: tuple[str, ...] = ("reference",)

    def readout(self, targets: Targets) -> Readout:
        """Compare whole distributions."""
        if targets.reference is None:
            raise ValueError("kl needs the logits of a reference run.")
        return _Whole(_kl, (targets.reference.float().log_softmax(dim=-1),))


_CALLED = "It is called with logits (row d_vocab) and the prompt of each row."


@dataclass(frozen=True)
class Custom:
    """A metric of the user's own.

    Attributes:
        function: From logits ``row d_vocab`` and the prompt that each row runs, to one number a row.
        name: The name in tables and figures.
        needs: Nothing: the function knows its prompts.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name: str = "metric"
    needs: tuple[str, ...] = ()

    def readout(self, targets: Targets) -> Readout:
        """Call the function."""
        return _Whole(self._checked, (torch.arange(targets.n_prompts),))

    def _checked(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        try:
            values = self.function(logits, prompt)
        except (TypeError, IndexError) as error:
            raise type(error)(f"metric {self.name!r} failed: {error}. {_CALLED}") from error
        if not isinstance(values, Tensor) or values.shape != prompt.shape:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"metric {self.name!r} must give one number for each of {len(prompt)} rows, as a "
                f"tensor of shape ({len(prompt)},); {shape} arrived. {_CALLED}"
            )
        return values.float()


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (LogitDifference(), LogProbability(), Probability(), Rank(), KL(), Accuracy())
}


def metric_of(metric: Any) -> Metric:
    """Find a metric by its name, or make one of a function.

    Args:
        metric: A name from `METRICS`, a metric, or a function of logits ``row d_vocab`` and prompt numbers
            ``row`` that gives one number a row.

    Returns:
        The metric.

    Raises:
        ValueError: There is none of that name.
        TypeError: It is neither a name nor a metric nor a function.

    Example:
        >>> metric_of("kl").needs
        ('reference',)
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        return METRICS[metric]
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        function: Any = metric
        return Custom(function, name=getattr(metric, "__name__", "metric").strip("<>"))
    raise TypeError(
        f"a metric is a name ({', '.join(METRICS)}) or a function of logits and prompts; "
        f"{type(metric).__name__} arrived."
    )


def measure(readout: Readout, logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, " prompt"]:
    """Apply a metric's readout to whole logits that are there already.

    Args:
        readout: What `Metric.readout` gave.
        logits: Logits at each prompt's last position.

    Returns:
        One number for each prompt.

    Example:
        >>> readout = LogitDifference().readout(Targets(1, answers=((0,),), wrong=((1,),)))
        >>> measure(readout, torch.tensor([[3.0, 1.0, 2.0]])).item()
        2.0
    """
    prompt = torch.arange(len(logits), device=logits.device)
    return readout(_of(readout, logits, prompt), prompt)[VALUE]


@dataclass(frozen=True, eq=False)
class WithTop:
    """A readout that also keeps the likeliest tokens, for which it needs whole logits.

    Attributes:
        inner: The metric's readout.
        top: How many tokens.
    """

    inner: Readout
    top: int
    columns: None = None

    def rows(self, prompts: slice) -> "WithTop":
        """The same for a range of the prompts."""
        return WithTop(self.inner.rows(prompts), self.top)

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        """Give the metric, and the likeliest tokens with their probabilities."""
        best = logits.float().softmax(dim=-1).topk(self.top, dim=-1)
        found = {"top": best.indices, "top_probability": best.values}
        return {**self.inner(_of(self.inner, logits, prompt), prompt), **found}


def _of(readout: Readout, logits: Tensor, prompt: Tensor) -> Tensor:
    """The columns that a readout wants, out of whole logits."""
    columns = readout.columns
    return logits if columns is None else logits.gather(1, columns.to(logits.device)[prompt])


@dataclass(frozen=True, eq=False)
class _Weighted:
    """A weighted sum of a few logits."""

    columns: Int[Tensor, "prompt column"]
    weights: Float[Tensor, "prompt column"]

    def rows(self, prompts: slice) -> "_Weighted":
        return _Weighted(self.columns[prompts], self.weights[prompts])

    def __call__(
        self, logits: Float[Tensor, "row column"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        weights = self.weights.to(logits.device)[prompt]
        return {VALUE: (logits.float() * weights).sum(dim=-1)}


@dataclass(frozen=True, eq=False)
class _Whole:
    """A function of whole logits and of something that is known of each prompt."""

    function: Callable[..., Tensor]
    known: tuple[Tensor, ...]
    columns: None = None

    def rows(self, prompts: slice) -> "_Whole":
        return _Whole(self.function, tuple(known[prompts] for known in self.known))

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        # Pieces that stay in a CPU's cache take half the time of one; a GPU waits for each launch.
        size = 16 if logits.device.type == "cpu" else 1024
        known = [each.to(logits.device)[prompt].split(size) for each in self.known]
        pieces = zip(logits.split(size), *known, strict=True)
        return {VALUE: torch.cat([self.function(rows.float(), *each) for rows, *each in pieces])}


def _padded(ids: Sequence[Sequence[int]] | None) -> Int[Tensor, "prompt answer"]:
    """Token ids as a table; -1 where a prompt has fewer."""
    if not ids:
        raise ValueError("this metric needs answers.")
    width = max(map(len, ids))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids])


def _answers(logits: Tensor, answers: Tensor) -> Tensor:
    return logits.gather(1, answers.clamp(min=0)).masked_fill(answers < 0, float("-inf"))


def _log_probability(logits: Tensor, answers: Tensor) -> Tensor:
    return _answers(logits, answers).logsumexp(dim=-1) - logits.logsumexp(dim=-1)


def _rank(logits: Tensor, answers: Tensor) -> Tensor:
    best = _answers(logits, answers).amax(dim=-1, keepdim=True)
    return 1.0 + (logits > best).sum(dim=-1)


def _accuracy(logits: Tensor, answers: Tensor) -> Tensor:
    return (logits.argmax(dim=-1, keepdim=True) == answers).any(dim=-1).float()


def _kl(logits: Tensor, reference: Tensor) -> Tensor:
    return (reference.exp() * (reference - logits.log_softmax(dim=-1))).sum(dim=-1)
