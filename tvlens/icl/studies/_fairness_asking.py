"""Ask a model about one task: how fair prompts are, and how well they and their thetas answer.

All is asked through the engine: row i of every request begins with the demonstrations of prompt i, so that
content-free inputs, dummy queries and queries share them, and a prompt of four demonstrations that is asked
seventeen things is read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import Encoder, TokenBatch, first_tokens
from tvlens.engine import Edit, Output, Read, Request, run
from tvlens.icl.studies._fairness_search import Shown
from tvlens.prompts import Prompts, build_prompts, usable_items
from tvlens.tasks import Task
from tvlens.templates import Template

CONTENT_FREE = ("N/A", "", "[MASK]")
"""The authors' inputs without content."""


@dataclass(frozen=True, eq=False)
class LabelReadout:
    """Readout that keeps the predicted token and the log probabilities of a task's labels.

    Attributes:
        labels: The labels' token ids.
    """

    labels: Int[Tensor, " label"]
    columns: None = None

    def rows(self, prompts: slice) -> "LabelReadout":
        """The same for a range of the prompts."""
        return self

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> dict[str, Tensor]:
        """Give, for each row, the prediction and the labels' log probabilities over the vocabulary (nats)."""
        total = logits.float().logsumexp(dim=-1, keepdim=True)
        of_labels = logits[:, self.labels.to(logits.device)].float()
        return {"predicted": logits.argmax(dim=-1), "log_prob": of_labels - total}


def label_entropy(
    log_prob: Float[np.ndarray, "content prompt label"],
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
    """Give the entropy over labels that prompts give to content-free inputs: their fairness.

    As in the authors' code, probabilities are averaged over the inputs first and normalised over the labels
    after, so that an input on which the labels get more probability counts for more.

    Args:
        log_prob: Log probabilities of the labels among all tokens, in nats.

    Returns:
        Entropies in nats, from 0 to log(labels); and the probability that all labels have together.

    Example:
        >>> entropy, mass = label_entropy(np.log([[[0.1, 0.1]], [[0.3, 0.3]]]))
        >>> bool(np.isclose(entropy[0], np.log(2))), bool(np.isclose(mass[0], 0.4))
        (True, True)

    References:
        Ma et al. 2023, Fairness-guided Few-shot Prompting, arXiv 2303.13217, equation 4.
    """
    mean = np.exp(log_prob.astype(float)).mean(axis=0)
    mass = mean.sum(axis=-1)
    share = mean / mass[:, None]
    # A label whose probability is zero adds nothing.
    terms = np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0)
    return -terms.sum(axis=-1), mass


@dataclass(frozen=True)
class Marks:
    """Outcomes of several prompts of one task.

    Attributes:
        regular: Whether [S, x] is answered right, among all tokens.
        regular_labels: The same among the labels alone, as the authors mark.
        theta: Whether [x] with theta(S) is answered right, among all tokens.
        theta_labels: The same among the labels alone.
        baseline: Whether [x] alone is answered right, among all tokens.
    """

    regular: Bool[np.ndarray, "prompt query"]
    regular_labels: Bool[np.ndarray, "prompt query"]
    theta: Bool[np.ndarray, "prompt query"]
    theta_labels: Bool[np.ndarray, "prompt query"]
    baseline: Bool[np.ndarray, " query"]

    def and_of(self, other: "Marks") -> "Marks":
        """These outcomes and those of more prompts of the same task."""
        return Marks(
            regular=np.concatenate([self.regular, other.regular]),
            regular_labels=np.concatenate([self.regular_labels, other.regular_labels]),
            theta=np.concatenate([self.theta, other.theta]),
            theta_labels=np.concatenate([self.theta_labels, other.theta_labels]),
            baseline=self.baseline,
        )


@dataclass(frozen=True, eq=False)
class Bench:
    """One task, made ready to be asked: pools to choose from, queries that none of them contains.

    Attributes:
        model: A TransformerLens model.
        task: The task.
        template: How a demonstration is written, white space settled.
        labels: The distinct first tokens of its answers.
        pools: Demonstrations to choose from, all of the dev half of the items.
        dummies: Dummy queries of each pool, of that half, too, and in no pool.
        asked: The queries, of the test half.
        content_free: Inputs without content.
    """

    model: Any
    task: Task
    template: Template
    labels: tuple[int, ...]
    pools: tuple[Shown, ...]
    dummies: tuple[Shown, ...]
    asked: Prompts
    content_free: tuple[str, ...]
    known: dict[Shown, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Any,
        task: Task,
        *,
        pools: int,
        candidates: int,
        queries: int,
        n_dummy: int = 2,
        content_free: Sequence[str] = CONTENT_FREE,
        template: str | Template = "example",
        answers: str = "any",
        seed: int = 0,
    ) -> "Bench":
        """Draw pools, dummy queries and queries of a task; see `fairness` for the arguments."""
        items = usable_items(task, model, template=template, answers=answers)
        needed = pools * (candidates + n_dummy)
        dev = (len(items) + 1) // 2
        test = len(items) - dev
        if needed > dev or queries > test:
            most = max(dev // max(pools, 1) - n_dummy, 0)
            raise ValueError(
                f"task {task.name!r} has {len(items)} usable items: {dev} to show and {test} to ask. {pools} "
                f"pools of {candidates} candidates, each with {n_dummy} dummy queries, need {needed} to "
                f"show; {queries} are asked. Nearest: candidates={min(candidates, most)}, "
                f"queries={min(queries, test)}."
            )
        how: dict[str, Any] = {"shots": 0, "n_dummy": 0, "template": template, "answers": answers,
                               "seed": seed}  # fmt: skip
        asked = build_prompts(task, model, split="test", n=queries, **how)
        drawn = build_prompts(task, model, split="dev", n=max(needed, 1), **how).queries
        made = asked.facts
        settled = Template(made["template"], spacing=made["spacing"], lead=made["lead"])
        return cls(
            model=model,
            task=task,
            template=settled,
            labels=label_tokens(model, task, settled, items),
            pools=tuple(drawn[i * candidates : (i + 1) * candidates] for i in range(pools)),
            dummies=tuple(drawn[pools * candidates + i : needed : pools] for i in range(pools)),
            asked=asked,
            content_free=tuple(content_free),
        )

    def batch(self, prompts: Sequence[Shown], asked: str | Sequence[str]) -> TokenBatch:
        """Write several prompts that all ask the same, or each something of its own."""
        each = [asked] * len(prompts) if isinstance(asked, str) else asked
        rows = [
            [
                *(part for d in shown for part in self.template.demo_segments(d, self.output(d))),
                *self.template.query_segments(x),
            ]
            for shown, x in zip(prompts, each, strict=True)
        ]
        return Encoder.of(self.model).batch(rows)

    def pool_of(self, shown: Shown) -> int:
        """Give the number of the pool from which a prompt was made."""
        return next(i for i, pool in enumerate(self.pools) if shown[0] in pool)

    def check(self, prompts: Sequence[Sequence[str]]) -> None:
        """Refuse demonstrations that are no items of the task."""
        for shown in prompts:
            if isinstance(shown, str):
                raise TypeError(
                    f"a prompt is a tuple of inputs; the text {shown!r} arrived. Write ({shown!r},)."
                )
            for x in shown:
                if x not in self.task.answers:
                    raise unknown(f"input of {self.task.name}", x, self.task.answers)

    def output(self, x: str) -> str:
        """The output that a demonstration is shown with."""
        return self.task.answers[x][0]

    @property
    def readout(self) -> LabelReadout:
        """What is kept of every answer."""
        return LabelReadout(torch.tensor(self.labels))

    def scored(self, prompts: Sequence[Shown]) -> Float[np.ndarray, " prompt"]:
        """Say how fair prompts are, in nats; each prompt is run once, however often it is asked for."""
        new = list(dict.fromkeys(shown for shown in prompts if shown not in self.known))
        if new:
            self._note(new, run(self.model, self._about_nothing(new)))
        return np.array([self.known[shown][0] for shown in prompts])

    def _about_nothing(self, prompts: Sequence[Shown]) -> list[Request]:
        """What is asked to know how fair prompts are."""
        return [Request(self.batch(prompts, x), readout=self.readout) for x in self.content_free]

    def _note(self, prompts: Sequence[Shown], outputs: Sequence[Output]) -> None:
        log_prob = np.stack([out.values["log_prob"][0].cpu().numpy() for out in outputs])
        pairs = zip(*label_entropy(log_prob), strict=True)
        self.known.update(
            (s, (float(h), float(m))) for s, (h, m) in zip(prompts, pairs, strict=True)
        )

    def mass(self, prompts: Sequence[Shown]) -> Float[np.ndarray, " prompt"]:
        """Give the probability that all labels have together after content-free inputs."""
        self.scored(prompts)
        return np.array([self.known[shown][1] for shown in prompts])

    def balance(self, shown: Shown) -> float:
        """Give the entropy, in nats, of the labels that a prompt shows, for which no model is needed."""
        counts = np.unique([self.output(x) for x in shown], return_counts=True)[1]
        share = counts / counts.sum()
        return float(-(share * np.log(share)).sum()) + 0.0  # no minus before a zero

    def mark(self, prompts: Sequence[Shown], layer: int) -> Marks:
        """Ask every query after each prompt, and alone with each prompt's theta; note how fair prompts are.

        Args:
            prompts: Demonstrations, each prompt's of one pool, on whose dummy queries its theta is read.
            layer: Where theta is read and injected.

        Returns:
            The outcomes.
        """
        read = Read("resid_post", (layer,))
        # A late theta knows its dummy queries' answers, too: let these differ from pool to pool.
        dummies = [self.dummies[self.pool_of(shown)] for shown in prompts]
        requests = [
            Request(self.batch(prompts, asked), reads=(read,))
            for asked in zip(*dummies, strict=True)
        ]
        requests += [
            Request(self.batch(prompts, x), readout=self.readout) for x in self.asked.queries
        ]
        if any(shown not in self.known for shown in prompts):
            requests += self._about_nothing(prompts)
        outputs = run(self.model, requests)
        n, asked = len(dummies[0]), len(self.asked)
        if len(outputs) > n + asked:
            self._note(prompts, outputs[n + asked :])
        theta = torch.stack([out.activations[0][0, :, 0] for out in outputs[:n]]).mean(dim=0)
        cells = tuple((Edit("resid_post", layer, row),) for row in theta.split(1))
        alone = Request(self.asked.zero_shot, cells=((), *cells), readout=self.readout)
        (hypothesis,) = run(self.model, [alone])
        after = outputs[n : n + asked]
        shown = {
            k: torch.stack([out.values[k][0] for out in after], dim=1) for k in hypothesis.values
        }
        regular, theirs = self._right(shown), self._right(hypothesis.values)
        return Marks(*regular, theirs[0][1:], theirs[1][1:], theirs[0][0])

    def _right(
        self, values: dict[str, Tensor]
    ) -> tuple[Bool[np.ndarray, "row query"], Bool[np.ndarray, "row query"]]:
        """Whether answers are right, among all tokens and among the labels."""
        predicted = values["predicted"].cpu().numpy()
        best = np.array(self.labels)[values["log_prob"].argmax(dim=-1).cpu().numpy()]
        every = [
            np.stack(
                [np.isin(said[:, q], ids) for q, ids in enumerate(self.asked.answer_ids)], axis=1
            )
            for said in (predicted, best)
        ]
        return every[0], every[1]


def label_tokens(
    model: Any, task: Task, template: Template, items: Sequence[str]
) -> tuple[int, ...]:
    """Give the distinct first tokens of a task's canonical answers.

    Args:
        model: Whose tokenizer counts.
        task: The task.
        template: How a demonstration is written, white space settled.
        items: The items whose answers count.

    Returns:
        Token ids, in the order of the items.

    Raises:
        ValueError: There is only one.
    """
    firsts = first_tokens(task, template, Encoder.of(model)).ids
    labels = tuple(dict.fromkeys(firsts[x][0] for x in items))
    if len(labels) < 2:
        raise ValueError(
            f"fairness is about two labels or more; all answers of task {task.name!r} begin alike. "
            "Nearest: a task whose answers differ in their first token."
        )
    return labels


def check_content_free(model: Any, content_free: Any) -> tuple[str, ...]:
    """Refuse content-free inputs that a tokenizer has no tokens for.

    Args:
        model: Whose tokenizer counts.
        content_free: The inputs.

    Returns:
        The same.

    Raises:
        ValueError: There is none, or one has no tokens.
        TypeError: One is no text.
    """
    given = [content_free] if isinstance(content_free, str) else list(content_free)
    if wrong := [x for x in given if not isinstance(x, str)]:
        raise TypeError(f"content_free must be texts; {wrong[0]!r} arrived.")
    if not given:
        raise ValueError("content_free needs at least one text; none arrived. Nearest: ('',).")
    lost = Encoder.of(model).foreign(given)
    if lost:
        kept = [x for x in given if x not in lost] or [""]
        raise ValueError(
            f"this model's tokenizer has no tokens for {', '.join(map(repr, sorted(lost)))}, which "
            f"content_free asks for. Nearest: content_free={tuple(kept)!r}."
        )
    return tuple(dict.fromkeys(given))
