"""The command line: ``tvlens demo``, ``run``, ``compare``, ``sweep``, ``check``, ``icl`` and others.

``run`` is the door to every experiment: an experiment registers itself and is known here from then on.
``compare`` has one of its own, since it takes several seeds and goes on where it was stopped; ``sweep`` runs
any experiment over a grid. Results go to files; what the terminal shows is a summary of them.
"""

import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tvlens.cli import _lists, _run, _sweep
from tvlens.cli._icl import icl

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find, move and explain the vector a language model computes from its context.",
)
for command in (
    _run.demo,
    _run.run,
    _run.compare,
    _sweep.sweep,
    _sweep.status,
    _lists.tasks,
    _lists.models,
    _lists.check,
):
    app.command()(command)
app.add_typer(icl, name="icl")


@app.callback(invoke_without_command=True)
def _start(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        import tvlens

        typer.echo(f"tvlens {tvlens.__version__}")
        raise typer.Exit


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
