"""Classification tasks with few labels, made of the words of tvlens' own tasks.

The authors' data sets have two to six labels, and an even distribution over labels means something there.
Most tasks of tvlens are mappings with as many answers as items, so three are made here that ask what a word
is: country or city, one of four kinds, one of four languages. Words that belong to two groups are left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from tvlens._errors import unknown
from tvlens.experiments._dev import resolved
from tvlens.tasks import Task, load_task, task_names

_EACH = 100  # words of a group


def _inputs(name: str) -> list[str]:
    return list(load_task(name).inputs)


def _outputs(name: str) -> list[str]:
    return [y for _, y in load_task(name).pairs]


def _places() -> dict[str, list[str]]:
    return {"country": _inputs("country_capital"), "city": _outputs("country_capital")}


def _kinds() -> dict[str, list[str]]:
    return _places() | {"person": _inputs("person_language"), "verb": _inputs("gerund")}


def _languages() -> dict[str, list[str]]:
    lists = {"English": "en_fr", "French": "fr_en", "Spanish": "es_en", "Italian": "it_en"}
    return {language: _inputs(name) for language, name in lists.items()}


OWN: dict[str, Callable[[], dict[str, list[str]]]] = {
    "word_place": _places,
    "word_kind": _kinds,
    "word_language": _languages,
}
"""Names of these tasks, and their words by label."""


def category_task(name: str) -> Task:
    """Make one of these tasks.

    Args:
        name: ``"word_place"`` (2 labels), ``"word_kind"`` (4) or ``"word_language"`` (4).

    Returns:
        The task: word -> label.

    Raises:
        ValueError: There is no such task.

    Example:
        >>> category_task("word_place").answers["France"]
        ('country',)
    """
    if name not in OWN:
        raise unknown("task", name, OWN)
    groups = {label: words[:_EACH] for label, words in OWN[name]().items()}
    counts = Counter(word for words in groups.values() for word in dict.fromkeys(words))
    # Singapore is a country and a city: no label would be right.
    answers = {x: (label,) for label, words in groups.items() for x in words if counts[x] == 1}
    return Task(
        name,
        "category",
        answers,
        description=f"Says of a word which it is: {', '.join(groups)}.",
        source="The words of tvlens' own tasks.",
        licence="MIT (tvlens)",
    )


def classified(tasks: Sequence[Task | str]) -> dict[str, Task]:
    """Load tasks, these among them, by their names.

    Args:
        tasks: Tasks or names.

    Returns:
        The tasks by name, in the order given.

    Raises:
        ValueError: An unknown task, the same one twice, or none.

    Example:
        >>> list(classified(["word_kind", "location_continent"]))
        ['word_kind', 'location_continent']
    """
    if isinstance(tasks, str | Task):
        return classified([tasks])
    return resolved([_loaded(task) if isinstance(task, str) else task for task in tasks])


def _loaded(name: str) -> Task:
    if name in OWN:
        return category_task(name)
    try:
        return load_task(name)
    except ValueError:
        raise unknown("task", name, [*task_names(), *OWN]) from None
