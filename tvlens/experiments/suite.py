"""Paper A's whole experiment in one call: every task on every model, by layer, with its floors.

Each model is loaded, sees all tasks and seeds, and is dropped before the next one is loaded. What is run for
one task is `layer_sweep`, and nothing else; the suite only puts the sweeps side by side. Models of different
depth meet on normalised depth, from 0 at the first layer to 1 at the last.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tvlens._errors import each_once
from tvlens.experiments import experiment
from tvlens.experiments._dev import resolved
from tvlens.experiments._suite import Suite
from tvlens.experiments.layer_sweep import LayerSweep, layer_sweep
from tvlens.models import facts, load_model
from tvlens.tasks import PAPER_TASKS, Task
from tvlens.templates import Template


@experiment("suite")
def suite(
    models: Any,
    tasks: Sequence[Task | str] = PAPER_TASKS,
    *,
    shots: int = 5,
    n_dev: int = 50,
    n_test: int = 50,
    n_dummy: int = 2,
    template: str | Template = "example",
    answers: str = "auto",
    seeds: int | Sequence[int] = (0,),
    keep: Callable[[LayerSweep], None] | None = None,
    progress: bool = True,
) -> Suite:
    """Run the layer sweep for every model, task and seed, as Hendel et al. do for seven models and 18 tasks.

    Args:
        models: TransformerLens models, or names that `tvlens.load_model` knows, in a list, or by the names
            they shall have; or one of them. A model that is given by name is loaded when its turn comes and
            dropped before the next.
        tasks: Tasks, or their names; the paper's 18 by default.
        shots: Demonstrations a prompt.
        n_dev: Prompts on which the layer is chosen, for each task and seed.
        n_test: Prompts on which accuracies are reported; their queries are not among the dev queries.
        n_dummy: Dummy queries over which theta is averaged.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items are used, see `tvlens.build_prompts`.
        seeds: Each decides the split, all prompts, and the random vectors; one, or several, each once.
        keep: Called with each layer sweep as it comes, for example to save it; `Suite.of` puts them together.
        progress: Whether to show a progress bar.

    Returns:
        Outcomes of every model, task, seed and prompt, as a result that draws itself.

    Raises:
        ValueError: No models or seeds, a seed twice, unknown names, or a task too small for the shots.
        TypeError: A seed is no whole number.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> found = suite({"tiny": tiny_model()}, ["to_upper"], n_dev=4, n_test=6, progress=False)
        >>> found.tasks("tiny").index.tolist()
        ['to_upper']

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, section 3 and table 2.
    """
    from tqdm.auto import tqdm

    named, listed = resolved(tasks), _listed(models)
    seeds = each_once(seeds)
    if not seeds or not listed:
        raise ValueError(
            f"at least one model and one seed are needed; {len(listed)} and {len(seeds)} arrived."
        )
    settings: dict[str, Any] = {
        "shots": shots, "n_dev": n_dev, "n_test": n_test, "n_dummy": n_dummy, "template": template,
        "answers": answers,
    }  # fmt: skip
    sweeps: dict[str, list[LayerSweep]] = {}
    total = len(listed) * len(named) * len(seeds)
    with tqdm(total=total, disable=not progress, leave=False) as bar:
        for name, model in _loaded(listed):
            own = sweeps.setdefault(name or _free(facts(model).name, sweeps), [])
            for task in named.values():
                for seed in seeds:
                    bar.set_postfix_str(f"{facts(model).name}: {task.name}, seed {seed}")
                    own.append(layer_sweep(model, task, seed=seed, **settings, progress=False))
                    if keep is not None:
                        keep(own[-1])
                    bar.update()
            del model
    return Suite.of(sweeps)


def _listed(models: Any) -> list[tuple[str | None, Any]]:
    """Models with the names they were given."""
    if isinstance(models, Mapping):
        return [(str(name), model) for name, model in models.items()]
    if not isinstance(models, list | tuple):
        models = [models]
    return [(None, model) for model in models]


def _loaded(listed: list[tuple[str | None, Any]]) -> Iterator[tuple[str | None, Any]]:
    """Load models one at a time; none is held here while the next is loaded."""
    for name, model in listed:
        yield name, load_model(model) if isinstance(model, str) else model


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A name that no other model has."""
    number = 1
    while (name if number == 1 else f"{name} ({number})") in taken:
        number += 1
    return name if number == 1 else f"{name} ({number})"
