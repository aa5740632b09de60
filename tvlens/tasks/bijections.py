"""Tasks that go both ways: a mapping and its inverse in one prompt.

``a -> A`` and ``B -> b`` beside each other make one task, "swap the case", which is easily learned from
demonstrations. What has to be done depends on the query, so that a single vector, which knows nothing of the
query, has to hold both directions at once; rules that only move the query in one direction cannot.

References:
    Dong et al. 2026, arXiv 2506.09048.
"""

from dataclasses import replace

from tvlens._errors import needs
from tvlens.tasks.base import Task


def directions(task: Task, inverse: Task | None = None) -> tuple[Task, Task]:
    """Take a task and its inverse, without the inputs that could be meant either way.

    Args:
        task: The task.
        inverse: Its inverse; by default `Task.inverse`.

    Returns:
        The task one way and the other; no input is in both.

    Raises:
        ValueError: Fewer than two items are left in one direction.

    Example:
        >>> from tvlens import load_task
        >>> there, back = directions(load_task("to_upper"))
        >>> there.pairs[0], back.pairs[0]
        (('a', 'A'), ('A', 'a'))
    """
    for name, given in (("task", task), ("inverse", inverse or task)):
        needs(name, given, Task, "a Task, as tv.load_task(name) gives")
    inverse = inverse or task.inverse(f"{task.name}_inverse")
    there = {x: ys for x, ys in task.answers.items() if x not in inverse.answers}
    back = {x: ys for x, ys in inverse.answers.items() if x not in task.answers}
    if min(len(there), len(back)) < 2:
        raise ValueError(
            f"tasks {task.name!r} and {inverse.name!r} leave {len(there)} and {len(back)} inputs that "
            "belong to one direction only; each needs 2."
        )
    return replace(task, answers=there), replace(inverse, answers=back)


def both_ways(
    task: Task, inverse: Task | None = None, *, name: str | None = None, description: str = ""
) -> Task:
    """Join a task and its inverse into one task, of family ``"bijection"``.

    Args:
        task: The task.
        inverse: Its inverse, see `directions`.
        name: Name of the joined task; ``<task>_both`` if not given, under which `tvlens.load_task` knows it.
        description: One sentence.

    Returns:
        The joined task: all items of one direction, then those of the other.

    Raises:
        ValueError: As `directions`.

    Example:
        >>> from tvlens import load_task
        >>> swap_case = both_ways(load_task("to_upper"), name="swap_case")
        >>> swap_case.answers["q"], swap_case.answers["Q"]
        (('Q',), ('q',))

    References:
        Dong et al. 2026, arXiv 2506.09048.
    """
    there, back = directions(task, inverse)
    return Task(
        name or f"{task.name}_both",
        "bijection",
        {**there.answers, **back.answers},
        description=description or f"Both ways: {task.description}".strip(),
        source=task.source,
        licence=task.licence,
        spaced=task.spaced,
    )
