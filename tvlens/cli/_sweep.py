"""``tvlens sweep NAME`` and ``tvlens status DIR``: any experiment over a grid, kept cell by cell."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tvlens._terminal import show, show_tables
from tvlens.cli._shared import AsJson, Tasks, experiment_of, plain, setting, tasks_of, write


def sweep(
    name: Annotated[
        str, typer.Argument(help="An experiment or study, or a .py file that has an experiment.")
    ],
    out: Annotated[str, typer.Option(help="Folder of the sweep, or a URL (s3://...).")],
    models: Annotated[
        str, typer.Option(help="Names, folders, .gguf files or hub ids; smollm2-135m if none.")
    ] = "",
    tasks: Tasks = "",
    seeds: Annotated[str, typer.Option(help="Seeds with commas, or a range: 0-9.")] = "0",
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of all cells, name=value; as often as there are such."
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(help="One more axis, name=[value,value]; as often as there are such."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes; this one alone by default. On Ray: workers; on Slurm: at once."
        ),
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Workers on a Ray cluster instead.")] = False,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each worker on Ray.")] = 0,
    slurm: Annotated[int | None, typer.Option(min=1, help="So many Slurm jobs instead.")] = None,
    slurm_set: Annotated[
        list[str] | None,
        typer.Option(help="A parameter of the jobs, e.g. slurm_partition=gpu, gpus_per_node=1."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each cell.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only go on with a sweep that is there; else an error.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option(help="Try failed cells again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run an experiment for every model, task and seed; what is finished is not run again."""
    from tvlens.sweeps import sweep as run_sweep

    console = Console(stderr=True, quiet=as_json)
    name = experiment_of(name)
    settings = dict(map(setting, more or ()))
    found = run_sweep(
        name,
        tasks=tasks_of(tasks) if tasks else _default(name, "task", "all"),
        models=_names(models) if models else _default(name, "model", ["smollm2-135m"]),
        seeds=_seeds(seeds),
        out=out,
        over=dict(map(setting, over or ())),
        executor=_executor(
            out, workers=workers, ray=ray, gpus=gpus, slurm=slurm, slurm_set=slurm_set
        ),
        threads=threads,
        resume=resume,
        retry=retry_failed,
        progress=not as_json,
        **settings,
    )
    if "://" not in out:
        folder = Path(out)
        found.save(folder / "sweep.nc")
        found.to_parquet(folder / "cells.parquet")
        report = write([found], folder, title=found.title)
        console.print(f"Wrote [bold]{escape(str(report))}[/bold] and cells.parquet beside it.")
    if as_json:
        typer.echo(json.dumps({"sweep": name, **plain([found.summary()])[0]}, allow_nan=False))
    else:
        show_tables([found])
    if found.counts()["failed"]:
        console.print(
            "Cells failed: their tracebacks are in the folder under failed/; --retry-failed tries them again."
        )
        raise typer.Exit(1)


def _default(name: str, parameter: str, value: Any) -> Any:
    """What stands for models or tasks that were not given, if the function needs them."""
    from tvlens.sweeps import Call

    call = Call.of(name)
    needs = [call.parameters.get(p) for p in (parameter, f"{parameter}s")]
    if not any(p is not None and p.default is p.empty for p in needs):
        return None
    return tasks_of(value) if parameter == "task" else value


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> list[int]:
    """Read ``0,3,5`` or ``0-9``."""
    found: list[int] = []
    for part in _names(text):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise ValueError(
                f"--seeds takes whole numbers with commas, or a range such as 0-9; {text!r} arrived."
            )
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    return found


def _executor(
    out: str, *, workers: int | None, ray: bool, gpus: float, slurm: int | None,
    slurm_set: list[str] | None,
) -> Any:  # fmt: skip
    """Turn options into an executor."""
    from tvlens import executors

    if ray and slurm:
        raise ValueError("--ray and --slurm are two places to run; choose one.")
    if not ray and gpus:
        raise ValueError("--gpus is for workers on Ray: add --ray, or --slurm-set gpus_per_node=1.")
    if not slurm and slurm_set:
        raise ValueError("--slurm-set is for Slurm jobs: add --slurm N.")
    if ray:
        return executors.Ray(workers, gpus=gpus)
    if slurm:
        if "://" in out:
            raise ValueError("--slurm keeps the jobs' logs in the sweep's folder; --out is a URL.")
        return executors.Slurm(
            slurm,
            Path(out) / "jobs",
            at_once=workers,
            parameters=dict(map(setting, slurm_set or ())),
        )
    return workers


def status(
    out: Annotated[str, typer.Argument(help="Folder of a sweep, or its URL.")],
    as_json: AsJson = False,
) -> None:
    """Say how far the sweeps of a folder are."""
    from tvlens import sweeps

    columns = ("plan", "experiment", "grid", "cells", "done", "failed", "missing")
    show(sweeps.status(out), columns, as_json=as_json)
