"""What commands share: options, settings and tasks read from text, and the files that a run leaves."""

import json
import shlex
import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tvlens.results import Result
    from tvlens.tasks import Task

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


def plain(summaries: "Sequence[dict[str, Any]]") -> list[dict[str, Any]]:
    """JSON has no word for NaN and infinity."""
    return [
        {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in summary.items()}
        for summary in summaries
    ]


def setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``; a value that is no JSON is text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--set takes name=value, e.g. --set n_dummy=4; {text!r} arrived.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def experiment_of(asked: str) -> str:
    """Give the name of an experiment; a file is imported, and names the one that it registers."""
    from tvlens import experiments

    return experiments.read(asked) if asked.endswith(".py") else asked


def tasks_of(asked: str) -> "list[Task]":
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


def write(results: "Sequence[Result]", out: Path, *, title: str) -> Path:
    """Write summary, page and report of saved results."""
    from tvlens.pages import page
    from tvlens.reports import report

    summaries = plain([result.summary() for result in results])
    summary = json.dumps(summaries, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "summary.json").write_text(summary + "\n", encoding="utf-8")
    command = shlex.join(["tvlens", *sys.argv[1:]])
    (out / "page.md").write_text(
        page(results, title=title if len(results) > 1 else None, command=command), encoding="utf-8"
    )
    return report(results, out / "report.html", title=title)
