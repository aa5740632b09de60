"""The tasks of the packaged toy, and which of their items and which whole tasks it was never shown few-shot.

The toy is a Llama of six layers that stands in for a language model in tests, examples and class:
``load_model("toy")``. ``recipes/toy`` trained it on 71 small tasks, and says how. Two things were
held out of every *few-shot* prompt of its training: a fifth of each mapping's items, together with
all 600 lists of tvlens' list tasks; and five whole tasks. It is not true that the toy never met
them: pairs of mappings, held-out ones and those of held-out tasks too, stood in prompts that *name*
the task ("cat plural->cats"), as a language model knows facts from text. So the answer to a held-out
query is known, and that it is asked for has to be inferred. The held-out lists it never met at all.

That one vector carries these tasks is *trained for*: the training also asks that theta of one
prompt, after block 2, makes another lone query be answered (arXiv:2501.09240). Theta that emerges
over the checkpoints emerges because of that loss.
"""

import json
from functools import lru_cache
from string import ascii_lowercase
from typing import Any

from tvlens._errors import unknown
from tvlens.models._packaged import TOY
from tvlens.tasks import Task


def toy_revisions() -> tuple[str, ...]:
    """Name the checkpoints of the toy's training, first to last.

    Returns:
        Revisions that `tvlens.load_model` takes for ``"toy"``; the last is the model itself. Theta
        emerges over them because the training asked for it.

    Example:
        >>> toy_revisions()[0]
        'step_0'

    References:
        Yang, Lin, Lee, Papailiopoulos, Nowak 2025, arXiv:2501.09240 (the loss on theta).
    """
    return TOY.revisions


def toy_tasks(held_out: bool | None = None) -> dict[str, Task]:
    """Give the tasks that the toy was trained on, and the ones of their families that it was not.

    Args:
        held_out: False for the 71 tasks that few-shot prompts of the training had, True for the five
            that none had (prompts that name their task had these as well), None for both.

    Returns:
        Name -> task, of family ``"mapping"`` or ``"list"``, items in a fixed order. Of those that
        tvlens has by the same name the items are the same, too, but for ``"gerund"``, which has other
        verbs here. The toy knows no words beyond the ones of these tasks.

    Example:
        >>> toy_tasks()["to_upper"].answers["a"]
        ('A',)
        >>> "shift_4" in toy_tasks(held_out=True)
        True
    """
    out = _tables()["held_out_instances"]
    return {
        name: task
        for name, task in _tasks().items()
        if held_out is None or held_out == (name in out)
    }


def toy_held_out(task: str) -> tuple[str, ...]:
    """Name the items of one task that no few-shot prompt of the training showed or queried.

    Held-out pairs of mappings did occur in prompts that name the task, and, with theta of such a prompt,
    as queries that stand alone; held-out lists occurred nowhere.

    Args:
        task: A name from `toy_tasks`.

    Returns:
        The items: a fifth of those of a mapping, all lists of a list task, and everything of a
        held-out task. ``build_prompts(..., queries=)`` takes them.

    Raises:
        ValueError: The toy has no such task.

    Example:
        >>> len(toy_held_out("list_first"))
        600
    """
    tasks, tables = _tasks(), _tables()
    if task not in tasks:
        raise unknown("task of the toy", task, tasks)
    if task in tables["held_out_instances"]:
        return tasks[task].inputs
    return tuple(tables["held_out_items"].get(task, tables["held_out_lists"]))


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    return json.loads((TOY.folder / "tasks.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _tasks() -> dict[str, Task]:
    tables = _tables()
    answers = {
        name: {x: (y,) for x, y in pairs.items()} for name, pairs in tables["mappings"].items()
    }
    for name, (rule, to) in tables["lists"].items():
        answers[name] = {
            text: (_list_answer(text.split(","), rule, to),) for text in tables["held_out_lists"]
        }
    return {
        name: Task(
            name,
            "list" if name in tables["lists"] else "mapping",
            pairs,
            description=f"What the toy calls {' '.join(tables['names'][name])!r}.",
            source="Written for tvlens.",
            licence=TOY.licence,
            spaced=False,
        )
        for name, pairs in answers.items()
    }


def _list_answer(letters: list[str], rule: str, to: str) -> str:
    if rule == "length":
        return str(len(letters))
    place = {"first": 0, "second": 1, "last": -1}
    letter = letters[place[rule]] if rule in place else (min if rule == "min" else max)(letters)
    after = ascii_lowercase[1:] + ascii_lowercase[0]
    changed = {"same": letter, "upper": letter.upper(), "next": after[ord(letter) - ord("a")]}
    return changed[to]
