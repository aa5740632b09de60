"""The command line: ``tvlens demo``, ``run NAME``, ``compare``, ``icl run NAME``, ``tasks``, ``models``.

``run`` is the door to every experiment: an experiment registers itself and is known here from then on.
``compare`` has one of its own, since it takes several seeds and goes on where it was stopped.
Results go to files; what the terminal shows is a summary of them.
"""

import inspect
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tvlens._errors import unknown
from tvlens._terminal import show, show_tables, summary_table

if TYPE_CHECKING:
    from tvlens.results import Result
    from tvlens.tasks import Task

DEMO_TASKS = ("to_upper", "fr_en", "gerund", "person_language")
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find, move and explain the vector a language model computes from its context.",
)

icl = typer.Typer(no_args_is_help=True, help="In context or in weights: the laboratory's studies.")
app.add_typer(icl, name="icl")
_OPTIONS = ("preset", "seed", "progress", "device", "out")
"""Parameters of studies that have an option of their own."""

Model = Annotated[
    str, typer.Option(help="A name from `tvlens models`, a folder, a .gguf file or a hub id.")
]
Tasks = Annotated[
    str, typer.Option(help="all (the paper's 18), or names and JSON or CSV files, with commas.")
]
Shots = Annotated[int | None, typer.Option(min=0, help="Demonstrations a prompt.")]
NDev = Annotated[int | None, typer.Option(min=1, help="Prompts on which the layer is chosen.")]
NTest = Annotated[int | None, typer.Option(min=1, help="Prompts on which accuracies are reported.")]
Seed = Annotated[int, typer.Option(help="Decides prompts, splits and random vectors.")]
Answers = Annotated[str | None, typer.Option(help="auto, one_token or any: which items are used.")]
Style = Annotated[str | None, typer.Option(help="example, arrow, qa, or a text with {x} and {y}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.callback(invoke_without_command=True)
def _start(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        import tvlens

        typer.echo(f"tvlens {tvlens.__version__}")
        raise typer.Exit


@app.command()
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
    results = _run_all("layer_sweep", model, _tasks(",".join(DEMO_TASKS)), settings, console, out)
    report = _write(results, out, title=f"Task vectors in {model}")
    Console().print(summary_table([result.summary() for result in results]))
    console.print(
        f"\n[bold]hypothesis[/bold] is theta alone, at the layer chosen on dev queries, without any "
        f"demonstration.\nOpen [bold]{escape(str(report))}[/bold] in a browser; numbers are in "
        f"{escape(str(out / 'summary.json'))}."
    )


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="An experiment, e.g. layer_sweep.")],
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
    given = {
        "shots": shots,
        "n_dev": n_dev,
        "n_test": n_test,
        "template": template,
        "answers": answers,
    }
    settings = {k: v for k, v in given.items() if v is not None} | {"seed": seed}
    settings |= dict(map(_setting, more or ()))
    results = _run_all(name, model, _tasks(tasks) if tasks else None, settings, console, out)
    summaries = _plain([result.summary() for result in results])
    if out is not None:
        report = _write(results, out, title=f"{name} on {model}")
        console.print(f"Wrote [bold]{escape(str(report))}[/bold].")
    if as_json:
        document = {"experiment": name, "model": model, **settings, "results": summaries}
        typer.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    elif "hypothesis" in summaries[0]:
        Console().print(summary_table(summaries))
    else:
        show_tables(results)


@app.command()
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
        model, _tasks(tasks), methods=chosen, seeds=[int(seed) for seed in seeds.split(",")], out=out,
        progress=not console.quiet, **settings,
    )  # fmt: skip
    if out is not None:
        result.save(out / f"{result.kind}.nc")
        report = _write([result], out, title=f"Ways to make a task vector in {model}")
        console.print(f"Wrote [bold]{escape(str(report))}[/bold].")
    if as_json:
        document = {"experiment": "compare", **_plain([result.summary()])[0]}
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        show_tables([result])


@icl.command("run")
def run_study(
    name: Annotated[str, typer.Argument(help="A study, e.g. noise; see `tvlens icl list`.")],
    preset: Annotated[str, typer.Option(help="quick (two CPU cores) or paper (a GPU).")] = "quick",
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the first GPU if any.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, name=value; lists as [1,2]."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for result, report, page; a run that was stopped goes on."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a study of in-context and in-weight learning."""
    from tvlens.icl import studies

    console = Console(stderr=True, quiet=as_json)
    function = studies.get(name)
    known = inspect.signature(function).parameters
    settings: dict[str, Any] = dict(map(_setting, more or ()))
    for key in settings:
        if key in _OPTIONS:
            raise ValueError(f"{key} is no setting for --set; use --{key}.")
        if key not in known:
            raise unknown(f"setting of {name}", key, set(known) - set(_OPTIONS))
    for key, value in {"device": device, "out": _folder_of_study(out, name)}.items():
        if value is not None and key in known:
            settings[key] = value
        elif key == "device" and value is not None:
            raise ValueError(f"{name} does not train, and takes no --device.")
    try:
        result = function(preset=preset, seed=seed, progress=not console.quiet, **settings)
    except KeyboardInterrupt:
        again = (
            "the same command goes on from what was saved"
            if out
            else "nothing was saved without --out"
        )
        console.print(f"Stopped; {again}.")
        raise typer.Exit(130) from None
    console.print(f"[dim]{escape(result.title)}:[/dim] {escape(result.finding())}")
    if out is not None:
        result.save(out / f"{name}.nc")
        report = _write([result], out, title=result.title)
        console.print(f"Wrote [bold]{escape(str(report))}[/bold].")
    if as_json:
        document = {"study": name, "preset": preset, **_plain([result.summary()])[0]}
        typer.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        show_tables([result])


@icl.command("show")
def show_study(
    name: Annotated[str, typer.Argument(help="A study, e.g. noise; see `tvlens icl list`.")],
    as_json: AsJson = False,
) -> None:
    """Show a study's settings: what they mean, and what the presets say."""
    import pandas as pd

    from tvlens.icl import studies

    function = studies.get(name)
    presets, words = studies.presets(function), studies.words(function)
    rows = []
    for key, one in inspect.signature(function).parameters.items():
        if key not in _OPTIONS:
            said = {name: str(values.get(key, one.default)) for name, values in presets.items()}
            rows.append({"setting": key, **said, "what": words[key]})
    show(pd.DataFrame(rows), ("setting", *presets, "what"), as_json=as_json)


@icl.command("list")
def list_studies(as_json: AsJson = False) -> None:
    """List the studies, each with its first sentence."""
    import pandas as pd

    from tvlens.icl import studies

    rows = [
        {"study": name, "what": (inspect.getdoc(studies.get(name)) or "").partition("\n")[0]}
        for name in studies.names()
    ]
    show(pd.DataFrame(rows), ("study", "what"), as_json=as_json)


@app.command("tasks")
def list_tasks_command(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: AsJson = False,
) -> None:
    """List all tasks with family, size, class balance and an example."""
    from tvlens.tasks import list_tasks

    columns = ("task", "family", "size", "classes", "majority_share", "example")
    show(list_tasks(family), columns, as_json=as_json)


@app.command("models")
def list_models_command(as_json: AsJson = False) -> None:
    """List the models that load by name without a model hub."""
    from tvlens.models import list_models

    columns = ("name", "parameters", "licence", "download_mb", "cached", "needs")
    show(list_models().reset_index(), columns, as_json=as_json)


def main() -> None:
    """Run the command line; what the user can mend is said in one line, without a traceback."""
    # Threads that wait by spinning are many times slower where other processes share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("transformers", "transformer_lens", "httpx", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("tvlens").setLevel(logging.INFO)
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("TVLENS_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(str(error))}")
        sys.exit(1)


def _plain(summaries: "Sequence[dict[str, Any]]") -> list[dict[str, Any]]:
    """JSON has no word for NaN and infinity."""
    return [
        {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in summary.items()}
        for summary in summaries
    ]


def _folder_of_study(out: Path | None, name: str) -> Path | None:
    """Make a study's folder, unless it holds another study's report, which would be overwritten."""
    if out is None:
        return None
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out takes a folder; {out} is a file.")
    others = [path.stem for path in sorted(out.glob("*.nc")) if path.stem != name]
    if others:
        raise ValueError(
            f"{out} holds the report of {others[0]}, which that of {name} would replace. Nearest: --out "
            f"{out / name}."
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def _setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``; a value that is no JSON is text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--set takes name=value, e.g. --set n_dummy=4; {text!r} arrived.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _tasks(asked: str) -> "list[Task]":
    """Resolve ``all``, and names and files with commas between them."""
    from tvlens.tasks import PAPER_TASKS, Task, load_task

    if asked == "all":
        asked = ",".join(PAPER_TASKS)
    # A file's own name may hold a comma.
    names = [asked] if Path(asked).is_file() else [part.strip() for part in asked.split(",")]
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"--tasks takes all, names with commas, or files; {asked!r} arrived.")
    return [
        Task.from_file(name) if Path(name).suffix or Path(name).is_file() else load_task(name)
        for name in names
    ]


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
        runs: list[tuple[Any, ...]] = [() if own else (list(tasks or _tasks("all")),)]
    else:
        runs = [(task,) for task in tasks or _tasks("all")]
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


def _write(results: "Sequence[Result]", out: Path, *, title: str) -> Path:
    """Write summary, page and report of saved results."""
    from tvlens.pages import page
    from tvlens.reports import report

    summaries = _plain([result.summary() for result in results])
    summary = json.dumps(summaries, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "summary.json").write_text(summary + "\n", encoding="utf-8")
    command = shlex.join(["tvlens", *sys.argv[1:]])
    (out / "page.md").write_text(
        page(results, title=title if len(results) > 1 else None, command=command), encoding="utf-8"
    )
    return report(results, out / "report.html", title=title)


if __name__ == "__main__":
    main()
