"""The tasks: 18 of Hendel et al. (2023), 9 more, and yours.

A built-in task is either generated (`tvlens.tasks.algorithmic`) or one JSON file in
``tvlens/tasks/data``; a new file there is a new task. A file that names a ``reverse`` gives two: a
translation list is stored once and read in both directions, where words that share a translation
are merged (see `Task.inverse`).

References:
    Hendel, Geva, Globerson 2023, "In-Context Learning Creates Task Vectors", arXiv 2310.15916.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tvlens._errors import needs, unknown
from tvlens.tasks.base import Task
from tvlens.tasks.bijections import both_ways, directions
from tvlens.tasks.files import read_task_file

if TYPE_CHECKING:
    import pandas

__all__ = [
    "PAPER_TASKS",
    "Task",
    "as_task",
    "both_ways",
    "directions",
    "list_tasks",
    "load_task",
    "register_task",
    "task_names",
]

PAPER_TASKS: tuple[str, ...] = (
    "next_letter",
    "prev_letter",
    "list_first",
    "list_last",
    "to_upper",
    "to_lower",
    "fr_en",
    "es_en",
    "en_fr",
    "en_es",
    "gerund",
    "past_simple",
    "plural_singular",
    "antonyms",
    "country_capital",
    "person_language",
    "location_continent",
    "location_religion",
)
_BALANCED, _BOTH = "_balanced", "_both"
_DATA = Path(__file__).parent / "data"

_registered: dict[str, Task] = {}


def load_task(name: str) -> Task:
    """Load a task by its name.

    Args:
        name: A name from `task_names`, or one with ``_balanced`` after it: the same task with
            equally many items of each answer, as `Task.balanced` makes it; or with ``_both``: the task
            and its inverse in one, as `both_ways` makes it.

    Returns:
        The task.

    Raises:
        TypeError: The name is no string.
        ValueError: There is no such task; the message offers the nearest names.

    Example:
        >>> load_task("country_capital").answers["France"]
        ('Paris',)
    """
    if not isinstance(name, str):
        raise TypeError(f"load_task takes the name of a task; got {type(name).__name__}.")
    task = _find(name)
    if task is None:
        # These two have few and uneven answers; for them the balanced form is the one to look for.
        choices = (*task_names(), "location_continent_balanced", "location_religion_balanced")
        raise unknown("task", name, choices, hint="A file loads with Task.from_file(path).")
    return task


def as_task(task: Task | str) -> Task:
    """Take a task as it is given, or load it by its name.

    Args:
        task: The task, or its name.

    Returns:
        The task.

    Raises:
        ValueError: There is no such task.
        TypeError: It is neither.

    Example:
        >>> as_task("to_upper").name
        'to_upper'
    """
    needs("task", task, (str, Task), "a Task or the name of one")
    return load_task(task) if isinstance(task, str) else task


def task_names() -> tuple[str, ...]:
    """Name all tasks.

    Returns:
        The 18 of the paper in its order, the other built-in ones, then the registered ones.

    Example:
        >>> task_names()[:2]
        ('next_letter', 'prev_letter')
    """
    return tuple(dict.fromkeys((*PAPER_TASKS, *_built_in(), *_registered)))


def list_tasks(family: str | None = None) -> "pandas.DataFrame":
    """List tasks with their size and how even their answers are.

    Args:
        family: Only this family; default: all.

    Returns:
        One row per task: task, family, size (items), classes (distinct canonical answers), majority
        (the commonest) and majority_share, effective_classes, example, licence.

    Raises:
        ValueError: No task has this family.

    Example:
        >>> list_tasks("translation").task.tolist()
        ['fr_en', 'es_en', 'en_fr', 'en_es', 'it_en', 'en_it']
    """
    import pandas

    tasks = [load_task(name) for name in task_names()]
    if family is not None:
        families = dict.fromkeys(task.family for task in tasks)
        if family not in families:
            raise unknown("task family", family, families)
        tasks = [task for task in tasks if task.family == family]
    return pandas.DataFrame([_row(task) for task in tasks])


def register_task(task: Task, *, replace: bool = False) -> Task:
    """Make a task loadable by its name, for as long as the process lives.

    Args:
        task: The task.
        replace: Whether it may take the place of a task of the same name.

    Returns:
        The task itself.

    Raises:
        TypeError: This is no Task.
        ValueError: The name is taken, and `replace` is False.

    Example:
        >>> task = register_task(Task("opposite", "custom", {"hot": ("cold",), "up": ("down",)}))
        >>> load_task("opposite") is task
        True
    """
    if not isinstance(task, Task):
        raise TypeError(
            f"register_task takes a Task; got {type(task).__name__}. "
            f"Task.from_file(path) makes one."
        )
    if not replace and _taken(task.name):
        raise ValueError(
            f"there is a task {task.name!r} already. Give yours another name, e.g. "
            f"'my_{task.name}', or take its place with replace=True."
        )
    _registered[task.name] = task
    return task


def _find(name: str) -> Task | None:
    task = _registered.get(name) or _built_in().get(name)
    if task is None and name.endswith(_BALANCED):
        base = _find(name.removesuffix(_BALANCED))
        task = base.balanced() if base is not None else None
    elif task is None and name.endswith(_BOTH):
        base = _find(name.removesuffix(_BOTH))
        task = both_ways(base) if base is not None else None
    return task


def _taken(name: str) -> bool:
    if name in _registered or name in _built_in():
        return True
    suffix = next((end for end in (_BALANCED, _BOTH) if name.endswith(end)), None)
    return suffix is not None and _taken(name.removesuffix(suffix))


@lru_cache(maxsize=1)
def _built_in() -> dict[str, Task]:
    from tvlens.tasks.algorithmic import algorithmic_tasks

    tasks = list(algorithmic_tasks())
    for path in sorted(_DATA.glob("*.json")):
        tasks.append(Task.from_file(path))
        reverse = read_task_file(path)[1].get("reverse")
        if reverse:
            tasks.append(tasks[-1].inverse(reverse["name"], description=reverse["description"]))
    named = {task.name: task for task in tasks}
    order = dict.fromkeys((*PAPER_TASKS, *named))
    return {name: named[name] for name in order}


def _row(task: Task) -> dict[str, object]:
    majority, share = task.majority()
    x, y = task.pairs[0]
    return {
        "task": task.name,
        "family": task.family,
        "size": len(task),
        "classes": len(task.class_counts()),
        "majority": majority,
        "majority_share": share,
        "effective_classes": task.effective_classes(),
        "example": f"{x} -> {y}",
        "licence": task.licence,
    }
