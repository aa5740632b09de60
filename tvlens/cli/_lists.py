"""``tvlens tasks``, ``tvlens models`` and ``tvlens check``: what there is, and whether it works."""

import json
from typing import Annotated

import typer

from tvlens._terminal import show, show_tables
from tvlens.cli._shared import AsJson, plain


def tasks(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: AsJson = False,
) -> None:
    """List all tasks with family, size, class balance and an example."""
    from tvlens.tasks import list_tasks

    columns = ("task", "family", "size", "classes", "majority_share", "example")
    show(list_tasks(family), columns, as_json=as_json)


def models(as_json: AsJson = False) -> None:
    """List the models that load by name without a model hub."""
    from tvlens.models import list_models

    columns = ("name", "parameters", "licence", "download_mb", "cached", "needs")
    show(list_models().reset_index(), columns, as_json=as_json)


def check(
    model: Annotated[
        str, typer.Argument(help="A name from `tvlens models`, a folder, a .gguf file or a hub id.")
    ],
    as_json: AsJson = False,
) -> None:
    """Check that a model does what tvlens takes for granted; exits with 1 if a check failed."""
    from tvlens.checking import check_model

    result = check_model(model)
    if as_json:
        document = plain([result.summary()])[0]
        typer.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    else:
        show_tables([result])
    raise typer.Exit(0 if result.passed else 1)
