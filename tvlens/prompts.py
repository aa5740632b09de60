"""Few-shot prompts: text, tokens, and what every token is for.

A prompt is the demonstrations S followed by a query x. The task vector theta(S) is read while the model
looks at another, dummy query x', so that theta cannot contain x. One `Prompts` holds all the views an
experiment needs, row by row over the same S: the regular prompt [S, x], the dummy prompts [S, x'], and the
zero-shot prompt [x]. Everything follows from an explicit seed; no order ever comes from a set.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tvlens._errors import needs, unknown, whole
from tvlens.encoding import Encoder, FirstTokens, TokenBatch, first_tokens, settle
from tvlens.tasks import Task, as_task
from tvlens.templates import DEFAULT_TEMPLATE, Role, Template, get_template

SPLITS = ("dev", "test")
ANSWERS = ("auto", "one_token", "any")
LABELS = ("own", "shuffled")
DEMONSTRATIONS = ("all", "split")
_SHUFFLES = 20  # orders that are tried where answers of one input are answers of another, too

Demonstrations = tuple[tuple[str, str], ...]
"""Inputs with the outputs they are shown with."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """One batch of few-shot prompts in every view that a task-vector experiment needs.

    Row i of every view belongs to the same demonstrations S and the same query x.

    Attributes:
        regular: [S, x], the ordinary in-context prompt.
        dummies: [S, x'] for each dummy query x'.
        zero_shot: [x], with no demonstrations.
        queries: x.
        answers: The accepted answers of each x; the first is canonical.
        answer_ids: Token ids that count as right for each x: the first tokens of its accepted answers.
        facts: How the prompts were made: task, template, spacing, shots, split, seed, BOS, how many items
            the tokenizer has no tokens for, which are left out, and how often an answer is one token or
            shares its first token with a different answer, or stands with an input that it belongs to.
    """

    regular: TokenBatch
    dummies: tuple[TokenBatch, ...]
    zero_shot: TokenBatch
    queries: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    answer_ids: tuple[tuple[int, ...], ...]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        views = (self.regular, *self.dummies, self.zero_shot, self.answers, self.answer_ids)
        if any(len(each) != len(self.queries) for each in views):
            sizes = ", ".join(str(len(each)) for each in views)
            raise ValueError(
                "every view of prompts has one row for each query, and so have the answers; "
                f"{len(self.queries)} queries and {sizes} rows arrived. tv.build_prompts makes them alike."
            )

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def text(self) -> tuple[str, ...]:
        """The regular prompts, [S, x], as text without BOS."""
        return self.regular.text

    @property
    def tokens(self) -> Int[Tensor, "prompt position"]:
        """The regular prompts, [S, x], as left-padded token ids."""
        return self.regular.tokens


def build_prompts(
    task: Task | str,
    model: Any,
    *,
    shots: int = 5,
    n: int = 50,
    n_dummy: int = 2,
    template: str | Template = DEFAULT_TEMPLATE,
    answers: str = "auto",
    split: str = "dev",
    labels: str = "own",
    demonstrations: str = "all",
    queries: Sequence[str] | None = None,
    seed: int = 0,
) -> Prompts:
    """Make few-shot prompts of a task.

    Half of the task's items can be queried in the dev split and the other half in the test split, so the
    two never share a query. Demonstrations come from all items but the query; dummy queries are neither
    the query nor among the demonstrations.

    Args:
        task: The task, or its name.
        model: A model (its tokenizer, BOS rule and context length are used) or a bare tokenizer.
        shots: Demonstrations a prompt.
        n: Number of prompts. Where a split has fewer items they are queried again, evenly, with other
            demonstrations.
        n_dummy: Dummy queries a prompt.
        template: A Template, a built-in name, or a text with ``{x}`` and ``{y}``.
        answers: Which items are used. ``"one_token"``: those whose answer is a single token, as
            Hendel et al. do for words; ``"any"``: all, judged by the answer's first token, which may also
            be the query's; ``"auto"``: one_token where that leaves two thirds of the items, else any.
        split: ``"dev"`` or ``"test"``.
        labels: ``"shuffled"`` gives each demonstration the output of another one, and where possible none
            that is right for its own input; everything else is as with ``"own"``.
        demonstrations: ``"split"`` takes them, and dummy queries, from the split's own items alone, so that
            what is made of dev prompts has seen nothing of the test queries; ``"all"`` from all items.
        queries: What is queried, instead of ``n`` items of the split: any of `usable_items`. The same
            queries can so be asked in several templates.
        seed: Decides the split, the queries, the demonstrations and the dummy queries.

    Returns:
        The prompts, all views.

    Raises:
        ValueError: Too few items for the shots, an unknown split or query, a single output to shuffle, or
            a prompt longer than the context.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> prompts = tv.build_prompts(tv.load_task("to_upper"), tiny_model(), shots=2, n=4)
        >>> len(prompts.text), len(prompts.dummies)
        (4, 2)

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, section 3.
    """
    task = as_task(task)
    encoder, seed = Encoder.of(model), whole("seed", seed)
    settled = settle(task, get_template(template), encoder)
    every = first_tokens(task, settled, encoder)
    used = _usable(task, every, answers)
    firsts = every if used is task else first_tokens(used, settled, encoder)
    pools = _Pools.of(used, split=split, seed=seed, demonstrations=demonstrations)
    drawn = _draw(used, pools, shots=shots, n=n, n_dummy=n_dummy, queries=queries, of=len(task))
    shown = [
        _outputs(used, demos, labels, f"{pools.stream}:{i}")
        for i, (demos, _, _) in enumerate(drawn)
    ]
    rows = [tuple(zip(d, ys, strict=True)) for (d, _, _), ys in zip(drawn, shown, strict=True)]
    right = [y in used.answers[x] for row in rows for x, y in row]

    def batch(asked: Sequence[str], shown: Sequence[Demonstrations] = rows) -> TokenBatch:
        return encoder.batch(
            [_segments(settled, demos, x) for demos, x in zip(shown, asked, strict=True)]
        )

    asked = tuple(x for _, x, _ in drawn)
    return Prompts(
        regular=batch(asked),
        dummies=tuple(batch([d[j] for _, _, d in drawn]) for j in range(n_dummy)),
        zero_shot=batch(asked, [()] * len(drawn)),
        queries=asked,
        answers=tuple(task.answers[x] for x in asked),
        answer_ids=tuple(firsts.ids[x] for x in asked),
        facts={
            "task": task.name,
            "family": task.family,
            "task_fingerprint": task.fingerprint,
            "template": settled.demo,
            "spacing": settled.spacing,
            "lead": settled.lead,
            "bos": encoder.bos is not None,
            "shots": shots,
            "n_dummy": n_dummy,
            "split": split,
            "labels": labels,
            "right_labels": sum(right) / len(right) if right else 1.0,
            "demonstrations": demonstrations,
            "seed": seed,
            "answers": "one_token" if len(firsts.one_token) == len(used) else "any",
            "n_items": len(used),
            "n_unknown": len(every.unknown),
            "one_token_share": len(every.one_token) / len(task),
            "ambiguous_share": firsts.ambiguous_share,
            "ambiguous": {said: list(those) for said, those in firsts.ambiguous.items()},
            "constant": firsts.constant,
        },
    )


def check_prompts(prompts: Any) -> None:
    """Refuse what is no `Prompts`, a text say."""
    needs("prompts", prompts, Prompts, "Prompts, as tv.build_prompts(task, model) makes them")


def usable_items(
    task: Task | str,
    model: Any,
    *,
    template: str | Template = DEFAULT_TEMPLATE,
    answers: str = "auto",
) -> tuple[str, ...]:
    """Give the items that `build_prompts` can query in a template, with a model's tokenizer.

    Args:
        task: The task, or its name.
        model: As in `build_prompts`.
        template: As in `build_prompts`.
        answers: As in `build_prompts`.

    Returns:
        The items' inputs, in the task's order.

    Raises:
        ValueError: There are fewer than two.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> len(usable_items("to_upper", tiny_model(), template="qa"))
        26
    """
    task = as_task(task)
    encoder = Encoder.of(model)
    firsts = first_tokens(task, settle(task, get_template(template), encoder), encoder)
    return tuple(_usable(task, firsts, answers).inputs)


def _usable(task: Task, firsts: FirstTokens, answers: str) -> Task:
    """Leave out items that the tokenizer does not know, and those that one token cannot judge, as wanted."""
    if answers not in ANSWERS:
        raise unknown("answers", answers, ANSWERS)
    mute = {*firsts.blank, *firsts.unknown}
    telling = [x for x in task.inputs if x not in mute]
    single = [x for x in telling if x in firsts.one_token]
    most = len(single) >= 2 / 3 * len(task)
    keep = single if answers == "one_token" or (answers == "auto" and most) else telling
    if len(keep) < 2:
        lost = (
            f"It has no tokens for {len(firsts.unknown)} of the items, e.g. {firsts.unknown[0]!r}."
            if firsts.unknown
            else ""
        )
        offer = lost or "Try answers='any' or another template."
        raise ValueError(
            f"{len(keep)} of the {len(task)} answers of task {task.name!r} are usable as "
            f"answers={answers!r} with this tokenizer. {offer}"
        )
    return (
        task
        if len(keep) == len(task)
        else replace(task, answers={x: task.answers[x] for x in keep})
    )


@dataclass(frozen=True)
class _Pools:
    """What may be queried, what may be shown, and the name of the random numbers."""

    queried: list[str]
    shown: list[str]
    stream: str

    @classmethod
    def of(cls, task: Task, *, split: str, seed: int, demonstrations: str) -> "_Pools":
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if demonstrations not in DEMONSTRATIONS:
            raise unknown("choice of demonstrations", demonstrations, DEMONSTRATIONS)
        items = list(task.inputs)
        random.Random(f"{seed}:{task.name}:split").shuffle(items)
        half = math.ceil(len(items) / 2)
        own = items[:half] if split == "dev" else items[half:]
        shown = own if demonstrations == "split" else items
        return cls(own, shown, f"{seed}:{task.name}:{split}")


def _draw(
    task: Task,
    pools: _Pools,
    *,
    shots: int,
    n: int,
    n_dummy: int,
    queries: Sequence[str] | None,
    of: int,
) -> list[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """Draw (demonstrations, query, dummy queries) for each prompt."""
    for name, number in (("shots", shots), ("n", n), ("n_dummy", n_dummy)):
        whole(name, number)
    if shots < 0 or n < 1 or n_dummy < 0:
        raise ValueError(
            f"shots >= 0, n >= 1 and n_dummy >= 0 are valid; shots={shots}, n={n}, "
            f"n_dummy={n_dummy} arrived."
        )
    needed, there = shots + 1 + n_dummy, len(pools.shown)
    if there < max(needed, 2):
        part = "" if there == len(task) else f", {there} of them in this split"
        raise ValueError(
            f"task {task.name!r} has {len(task)} usable items of {of}{part}, but {shots} shots + 1 query "
            f"+ {n_dummy} dummy queries need {max(needed, 2)}. Ask for at most "
            f"{max(there - 1 - n_dummy, 0)} shots."
        )
    rng = random.Random(pools.stream)
    if isinstance(queries, str):
        raise TypeError(
            f"queries must be a list of items; the text {queries!r} arrived. Write [{queries!r}]."
        )
    asked = list(queries or ())
    if queries is not None and not asked:
        raise ValueError("queries needs at least one item; none arrived.")
    for x in asked:
        if x not in task.answers:
            raise unknown("query", x, task.answers)
    while queries is None and len(asked) < n:
        asked += rng.sample(pools.queried, len(pools.queried))
    drawn = []
    for x in asked if queries is not None else asked[:n]:
        others = [item for item in pools.shown if item != x]
        picked = rng.sample(others, shots + n_dummy)
        drawn.append((tuple(picked[:shots]), x, tuple(picked[shots:])))
    return drawn


def _outputs(task: Task, demos: tuple[str, ...], labels: str, stream: str) -> list[str]:
    """The output that each demonstration is shown with."""
    if labels not in LABELS:
        raise unknown("choice of labels", labels, LABELS)
    own = [task.answers[x][0] for x in demos]
    if labels == "own" or not demos:
        return own
    if len(demos) < 2:
        raise ValueError("shuffled labels need at least 2 shots; 1 has no other output to show.")
    rng = random.Random(f"{stream}:labels")
    tried = []
    for _ in range(_SHUFFLES):
        moved = deranged(own, rng)
        wrong = sum(y not in task.answers[x] for x, y in zip(demos, moved, strict=True))
        if wrong == len(demos):
            return moved
        tried.append((wrong, moved))
    return max(tried, key=lambda pair: pair[0])[1]


def deranged(outputs: Sequence[Any], rng: random.Random) -> list[Any]:
    """Permute outputs so that as few as possible stay the same.

    Args:
        outputs: What is permuted; equal ones count as the same.
        rng: Where random numbers come from.

    Returns:
        The outputs in another order.

    Example:
        >>> deranged(["a", "a", "b", "c"], random.Random(0))[:2] != ["a", "a"]
        True
    """
    # In a circle with equal outputs side by side, a step as long as the largest group leaves it.
    groups: dict[Any, list[int]] = {}
    for i in rng.sample(range(len(outputs)), len(outputs)):
        groups.setdefault(outputs[i], []).append(i)
    order = [i for group in sorted(groups.values(), key=len, reverse=True) for i in group]
    step = max(map(len, groups.values()))
    moved = list(outputs)
    for k, i in enumerate(order):
        moved[i] = outputs[order[(k + step) % len(order)]]
    return moved


def _segments(template: Template, demos: Demonstrations, x: str) -> list[tuple[str, Role]]:
    """Write a whole prompt as pieces of text with their roles."""
    pieces = [piece for given, y in demos for piece in template.demo_segments(given, y)]
    return [*pieces, *template.query_segments(x)]
