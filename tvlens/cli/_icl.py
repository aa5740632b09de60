"""``tvlens icl``: the laboratory's studies."""

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tvlens._errors import unknown
from tvlens._terminal import show, show_tables
from tvlens.cli._shared import AsJson, Seed, plain, setting, write

icl = typer.Typer(no_args_is_help=True, help="In context or in weights: the laboratory's studies.")
_OPTIONS = ("preset", "seed", "progress", "device", "out")
"""Parameters of studies that have an option of their own."""


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
    settings: dict[str, Any] = dict(map(setting, more or ()))
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
        report = write([result], out, title=result.title)
        console.print(f"Wrote [bold]{escape(str(report))}[/bold].")
    if as_json:
        document = {"study": name, "preset": preset, **plain([result.summary()])[0]}
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
