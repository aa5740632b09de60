"""``tvlens demo``, ``run NAME`` and ``compare``: experiments on one model."""

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tvlens._errors import unknown
from tvlens._terminal import show_tables, summary_table
from tvlens.cli._shared import (
    Answers,
    AsJson,
    Model,
    NDev,
    NTest,
    Seed,
    Shots,
    Style,
    Tasks,
    experiment_of,
    plain,
    setting,
    tasks_of,
    write,
)

if TYPE_CHECKING:
    from tvlens.results import Result
    from tvlens.tasks import Task

DEMO_TASKS = ("to_upper", "fr_en", "gerund", "person_language")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("tvlens-demo"),
    model: Model = "smollm2-135m",
    n_dev: NDev = 50,
    n_test: NTest = 50,
    seed: Seed = 0,
) -> None:
    """Find the task vectors of one task of each family in a real model, and write a report."""
    console = Console(stderr=True)
    console.print(
        "[bold]tvlens demo[/bold]: can one vector stand in for five demonstrations? "
        f"{len(DEMO_TASKS)} tasks on [bold]{escape(model)}[/bold]."
    )
    settings = {"n_dev": n_dev, "n_test": n_test, "seed": seed}
    results = _run_all("layer_sweep", model, tasks_of(",".join(DEMO_TASKS)), settings, console, out)
    report = write(results, out, title=f"Task vectors in {model}")
    Console().print(summary_table([result.summary() for result in results]))
    console.print(
        f"\n[bold]hypothesis[/bold] is theta alone, at the layer chosen on dev queries, without any "
        f"demonstration.\nOpen [bold]{escape(str(report))}[/bold] in a browser; numbers are in "
        f"{escape(str(out / 'summary.json'))}."
    )


def run(
    name: Annotated[
        str, typer.Argument(help="An experiment, e.g. layer_sweep, or a .py file that has one.")
    ],
    model: Model = "smollm2-135m",
    tasks: Tasks = "",
    shots: Shots = None,
    n_dev: NDev = None,
    n_test: NTest = None,
    seed: Seed = 0,
    template: Style = None,
    answers: Answers = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, name=value; as often as there are such."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results, report and page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment: on all tasks together if it takes several, else on one after another.

    Without --tasks it runs on those that are its own default, or else on all.
    """
    console = Console(stderr=True, quiet=as_json)
    name = experiment_of(name)
    given = {
        "shots": shots,
        "n_dev": n_dev,
        "n_test": n_test,
        "template": template,
        "answers": answers,
    }
    settings = {k: v for k, v in given.items() if v is not None} | {"seed": seed}
    settings |= dict(map(setting, more or ()))
    results = _run_all(name, model, tasks_of(tasks) if tasks else None, settings, console, out)
    summaries = plain([result.summary() for result in results])
    if out is not None:
        report = write(results, out, title=f"{name} on {model}")
        console.print(f"Wrote [bold]{escape(str(report))}[/bold].")
    if as_json:
        document = {"experiment": name, "model": model, **settings, "results": summaries}
        typer.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    elif "hypothesis" in summaries[0]:
        Console().print(summary_table(summaries))
    else:
        show_tables(results)


def compare(
    model: Model = "smollm2-135m",
    tasks: Tasks = "all",
    methods: Annotated[str, typer.Option(help="all, or names with commas.")] = "all",
    shots: Shots = 5,
    n_dev: NDev = 100,
    n_test: NTest = 100,
    seeds: Annotated[str, typer.Option(help="Seeds with commas.")] = "0",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results, report and page; what is there is not run again."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare ways to make a task vector: methods against tasks, with what they cost."""
    from tvlens.experiments.compare import compare as run_comparison
    from tvlens.methods import METHODS

    console = Console(stderr=True, quiet=as_json)
    chosen = tuple(METHODS) if methods == "all" else tuple(m.strip() for m in methods.split(","))
    if not all(part.strip().isdecimal() for part in seeds.split(",")):
        raise ValueError(
            f"--seeds takes whole numbers with commas between them; {seeds!r} arrived."
        )
    settings: dict[str, Any] = {"shots": shots, "n_dev": n_dev, "n_test": n_test}
    result = run_comparison(
        model, tasks_of(tasks), methods=chosen, seeds=[int(seed) for seed in seeds.split(",")], out=out,
        progress=not console.quiet, **settings,
    )  # fmt: skip
    if out is not None:
        result.save(out / f"{result.kind}.nc")
        report = write([result], out, title=f"Ways to make a task vector in {model}")
        console.print(f"Wrote [bold]{escape(str(report))}[/bold].")
    if as_json:
        document = {"experiment": "compare", **plain([result.summary()])[0]}
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        show_tables([result])


def _run_all(
    name: str,
    model_name: str,
    tasks: "Sequence[Task] | None",
    settings: dict[str, Any],
    console: Console,
    out: Path | None = None,
) -> "list[Result]":
    """Load the model once and run an experiment task by task; each result is saved as it comes."""
    from tvlens import experiments
    from tvlens.models import facts, load_model

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is better known now
    function = experiments.get(name)
    settings = _accepted(function, settings, name)
    with console.status(
        f"Loading {escape(model_name)} (the first time, its weights are fetched) ..."
    ):
        model = load_model(model_name)
    known = facts(model)
    console.print(
        f"{escape(known.name)}: {known.n_layers} layers, width {known.d_model}, {known.dtype} on "
        f"{known.device}, weight processing {known.processing}, BOS {known.prepend_bos}."
    )
    results = []
    several = inspect.signature(function).parameters.get("tasks")
    if several is not None:
        own = tasks is None and several.default is not several.empty
        runs: list[tuple[Any, ...]] = [() if own else (list(tasks or tasks_of("all")),)]
    else:
        runs = [(task,) for task in tasks or tasks_of("all")]
    for given in runs:
        result = function(model, *given, progress=not console.quiet, **settings)
        console.print(f"[dim]{escape(result.title)}:[/dim] {escape(result.finding())}")
        results.append(result)
        if out is not None:
            _save(result, out, together=several is not None)
    return results


_NO_SETTINGS = ("progress", "keep", "lens")  # what no text can give
_COMMON = ("shots", "n_dev", "n_test", "seed", "template", "answers")


def _accepted(function: Callable[..., Any], settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Keep those of the common settings that an experiment knows; the rest do not concern it."""
    known = inspect.signature(function).parameters
    if "progress" not in known:
        raise TypeError(f"experiment {name!r} takes no 'progress'; add it to its signature.")
    own = [
        p.name for p in known.values() if p.kind is p.KEYWORD_ONLY and p.name not in _NO_SETTINGS
    ]
    for key in settings:
        if key not in own and key not in _COMMON:
            raise unknown(f"setting of {name}", key, own)
    if "seeds" in known:
        settings = {"seeds": [settings["seed"]], **settings}
    return {key: value for key, value in settings.items() if key in known}


def _save(result: "Result", out: Path, *, together: bool) -> None:
    """Write a result, and its task vector if it has one."""
    stem = result.kind if together else f"{result.kind}-{result.provenance['task']}"
    result.save(out / f"{stem}.nc")
    vector = getattr(result, "vector", None)
    if vector is not None:
        vector.save(out / f"{stem}.safetensors")
