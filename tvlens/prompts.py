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

from tvlens._errors import unknown
from tvlens.encoding import Encoder, FirstTokens, TokenBatch, first_tokens, settle
from tvlens.tasks import Task, load_task
from tvlens.templates import DEFAULT_TEMPLATE, Role, Template, get_template

SPLITS = ("dev", "test")
ANSWERS = ("auto", "one_token", "any")


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
        facts: How the prompts were made: task, template, spacing, shots, split, seed, BOS, and how often
            an answer is one token or shares its first token with a different answer.
    """

    regular: TokenBatch
    dummies: tuple[TokenBatch, ...]
    zero_shot: TokenBatch
    queries: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    answer_ids: tuple[tuple[int, ...], ...]
    facts: dict[str, Any]

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
        seed: Decides the split, the queries, the demonstrations and the dummy queries.

    Returns:
        The prompts, all views.

    Raises:
        ValueError: Too few items for the shots, an unknown split, or a prompt longer than the context.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> prompts = tv.build_prompts(tv.load_task("to_upper"), tiny_model(), shots=2, n=4)
        >>> len(prompts.text), len(prompts.dummies)
        (4, 2)

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, section 3.
    """
    task = load_task(task) if isinstance(task, str) else task
    encoder = Encoder.of(model)
    settled = settle(task, get_template(template), encoder)
    whole = first_tokens(task, settled, encoder)
    used = _usable(task, whole, answers)
    firsts = whole if used is task else first_tokens(used, settled, encoder)
    drawn = _draw(used, shots=shots, n=n, n_dummy=n_dummy, split=split, seed=seed, of=len(task))

    def batch(rows: Sequence[tuple[tuple[str, ...], str]]) -> TokenBatch:
        return encoder.batch([_segments(used, settled, demos, x) for demos, x in rows])

    queries = tuple(x for _, x, _ in drawn)
    return Prompts(
        regular=batch([(demos, x) for demos, x, _ in drawn]),
        dummies=tuple(batch([(demos, d[j]) for demos, _, d in drawn]) for j in range(n_dummy)),
        zero_shot=batch([((), x) for _, x, _ in drawn]),
        queries=queries,
        answers=tuple(task.answers[x] for x in queries),
        answer_ids=tuple(firsts.ids[x] for x in queries),
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
            "seed": seed,
            "answers": "one_token" if len(firsts.one_token) == len(used) else "any",
            "n_items": len(used),
            "one_token_share": len(whole.one_token) / len(task),
            "ambiguous_share": firsts.ambiguous_share,
            "ambiguous": firsts.ambiguous,
            "constant": firsts.constant,
        },
    )


def _usable(task: Task, firsts: FirstTokens, answers: str) -> Task:
    """Leave out items that one token cannot judge, as far as is wanted and leaves enough."""
    if answers not in ANSWERS:
        raise unknown("answers", answers, ANSWERS)
    telling = [x for x in task.inputs if x not in firsts.blank]
    single = [x for x in telling if x in firsts.one_token]
    most = len(single) >= 2 / 3 * len(task)
    keep = single if answers == "one_token" or (answers == "auto" and most) else telling
    if len(keep) < 2:
        raise ValueError(
            f"{len(keep)} of the {len(task)} answers of task {task.name!r} are usable as "
            f"answers={answers!r} with this tokenizer. Try answers='any' or another template."
        )
    return (
        task
        if len(keep) == len(task)
        else replace(task, answers={x: task.answers[x] for x in keep})
    )


def _draw(
    task: Task, *, shots: int, n: int, n_dummy: int, split: str, seed: int, of: int
) -> list[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """Draw (demonstrations, query, dummy queries) for each prompt."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if shots < 0 or n < 1 or n_dummy < 0:
        raise ValueError(
            f"shots >= 0, n >= 1 and n_dummy >= 0 are valid; shots={shots}, n={n}, "
            f"n_dummy={n_dummy} arrived."
        )
    needed = shots + 1 + n_dummy
    if len(task) < max(needed, 2):
        raise ValueError(
            f"task {task.name!r} has {len(task)} usable items of {of}, but {shots} shots + 1 query + "
            f"{n_dummy} dummy queries need {max(needed, 2)}. Ask for at most "
            f"{max(len(task) - 1 - n_dummy, 0)} shots."
        )
    items = list(task.inputs)
    random.Random(f"{seed}:{task.name}:split").shuffle(items)
    half = math.ceil(len(items) / 2)
    pool = items[:half] if split == "dev" else items[half:]
    rng = random.Random(f"{seed}:{task.name}:{split}")
    queries: list[str] = []
    while len(queries) < n:
        queries += rng.sample(pool, len(pool))
    drawn = []
    for x in queries[:n]:
        others = [item for item in items if item != x]
        picked = rng.sample(others, shots + n_dummy)
        drawn.append((tuple(picked[:shots]), x, tuple(picked[shots:])))
    return drawn


def _segments(
    task: Task, template: Template, demos: tuple[str, ...], x: str
) -> list[tuple[str, Role]]:
    """Write a whole prompt as pieces of text with their roles."""
    pieces = [
        piece for demo in demos for piece in template.demo_segments(demo, task.answers[demo][0])
    ]
    return [*pieces, *template.query_segments(x)]
