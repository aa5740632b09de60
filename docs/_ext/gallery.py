"""The gallery: figures drawn while the site is built, from results that were saved before.

An entry of the gallery is a fence that names a figure function and holds the lines that lead to it::

    ```{drawn} lens_heatmap
    :data: lens

    model = tv.load_model("smollm2-135m")
    result = tv.logit_lens(model, "The capital of France is")

    result.plot()
    ```

What stands after the last empty line draws. What stands before makes ``gallery/data/lens.nc``: it may
take minutes, so ``gallery/make.py`` runs it, and the file is committed. Further entries may draw the
same file and then hold only lines that draw. Without ``:data:`` all lines are run by the build.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import plotly.graph_objects as go
from docutils import nodes
from docutils.parsers.rst import directives
from mdit_py_plugins.anchors.index import slugify
from sphinx.util.docutils import SphinxDirective

import tvlens as tv
from tvlens import plots, reports

PAGES = Path(__file__).parent.parent / "gallery"
DATA = PAGES / "data"
_ENTRY = re.compile(r"^```\{drawn\} (\S+)\n(?::data: (\w+)\n)?\s*(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Entry:
    """One figure of the gallery: the function that draws it, its data, and the lines that lead to it."""

    function: str
    data: str | None
    code: str

    @property
    def paragraphs(self) -> tuple[str, str]:
        """The lines that make the data, and those that draw it."""
        if self.data is None:
            return "", self.code
        making, _, drawing = self.code.rstrip().rpartition("\n\n")
        return making, drawing

    @property
    def path(self) -> Path:
        """Where the data is kept."""
        return DATA / f"{self.data}.nc"

    @property
    def result(self) -> Any:
        """The data, as the build reads it; None where there is no file."""
        return self.data and _load(self.path, self.path.stat().st_mtime_ns)

    def draw(self) -> go.Figure:
        """Draw the figure, with the function that the entry names.

        Raises:
            ValueError: The last line is no figure, or it comes from another function.
        """
        scope: dict[str, Any] = {"tv": tv, "result": self.result}
        *lines, last = ast.parse(self.paragraphs[1]).body
        if not isinstance(last, ast.Expr):
            raise ValueError(f"the last line is no figure: {ast.unparse(last)}")
        with _noted() as drawn:
            exec(compile(ast.Module(lines, []), self.function, "exec"), scope)
            figure = eval(compile(ast.Expression(last.value), self.function, "eval"), scope)
        by = [name for name, each in drawn if each is figure]
        if by != [self.function]:
            raise ValueError(
                f"the last line is a figure of {', '.join(by) or 'no figure function'}"
            )
        return figure


@functools.cache
def _load(path: Path, _changed: int) -> tv.Result:
    """Load a result once for all entries, and let it draw its figures and say its finding once."""
    result = tv.load(path)
    for name in ("figures", "finding"):
        object.__setattr__(result, name, functools.cache(getattr(result, name)))
    return result


_drawn: list[tuple[str, go.Figure]] = []


@contextlib.contextmanager
def _noted() -> Iterator[list[tuple[str, go.Figure]]]:
    """Note which figure function gives which figure."""

    def noting(name: str, function: Callable[..., go.Figure]) -> Callable[..., go.Figure]:
        @functools.wraps(function)
        def draw(*args: Any, **kwargs: Any) -> go.Figure:
            _drawn.append((name, function(*args, **kwargs)))
            return _drawn[-1][1]

        return draw

    with contextlib.ExitStack() as stack:
        for name, function in figure_functions().items():
            short = name.rpartition(".")[2]
            for place in {sys.modules[function.__module__], plots}:
                if getattr(place, short, None) is function:
                    patch = mock.patch.object(place, short, noting(name, function))
                    stack.enter_context(patch)
        yield _drawn


@functools.cache
def figure_functions() -> dict[str, Callable[..., go.Figure]]:
    """Find every public figure function, by its name below ``tvlens.plots``."""
    found = {name: getattr(plots, name) for name in plots.__all__}
    for path in sorted(Path(plots.__file__).parent.glob("icl_*.py")):
        module = importlib.import_module(f"tvlens.plots.{path.stem}")
        for name, value in vars(module).items():
            if name[0] != "_" and getattr(value, "__module__", "") == module.__name__:
                found[f"{path.stem}.{name}"] = value
    return {name: value for name, value in found.items() if _is_figure(value)}


def _is_figure(value: Any) -> bool:
    return inspect.isfunction(value) and (inspect.signature(value).return_annotation is go.Figure)


class Drawn(SphinxDirective):
    """A figure, the lines that made it, and links to its function and its data."""

    required_arguments = 1
    option_spec = {"data": directives.unchanged}  # noqa: RUF012
    has_content = True

    def run(self) -> list[nodes.Node]:
        entry = Entry(self.arguments[0], self.options.get("data"), "\n".join(self.content))
        try:
            figure = entry.draw()
            # Where several figures show one result, its finding is said above the first.
            known = "" if entry.paragraphs[0] or entry.data is None else entry.result.finding()
        except Exception as error:
            told = f"tvlens.plots.{entry.function} could not be drawn: {error}"
            raise self.error(told) from error
        said = f"Drawn by {{py:func}}`~tvlens.plots.{entry.function}`"
        if entry.data is not None:
            self.env.note_dependency(str(entry.path))
            name, size = entry.path.name, entry.path.stat().st_size / 1000
            said += f" from {{download}}`{name} </gallery/data/{name}>` ({size:.0f} kB)"
        below = nodes.container(classes=["drawn-by"])
        below += self.parse_text_to_nodes(f"{said}.")
        return [
            nodes.raw("", reports._figure("main", figure, said=known), format="html"),
            nodes.literal_block(entry.code, entry.code, language="python"),
            below,
        ]


class Cards(SphinxDirective):
    """A card for each page of the gallery, with its questions and the functions that answer them."""

    def run(self) -> list[nodes.Node]:
        cards = []
        for name in _listed((PAGES / "index.md").read_text("utf-8")):
            self.env.note_dependency(str(PAGES / f"{name}.md"))
            text = (PAGES / f"{name}.md").read_text("utf-8")
            title = re.search(r"^# (.+)$", text, re.M)
            lines = [f":::{{grid-item-card}} [{title[1] if title else name}]({name}.md)"]
            for section in re.split(r"^## ", text, flags=re.M)[1:]:
                heading = section.partition("\n")[0]
                drawn = ", ".join(f"`{e.function.rpartition('.')[2]}`" for e in _read(section))
                lines.append(f"- [{heading}]({name}.md#{slugify(heading)}) {drawn}")
            cards += [*lines, ":::"]
        return self.parse_text_to_nodes(
            "\n".join(["::::{grid} 1 1 2 2", ":gutter: 3", *cards, "::::"])
        )


def _listed(text: str) -> list[str]:
    """The pages in the index's toctree."""
    return re.findall(r"^\w+$", text.partition("{toctree}")[2], re.M)


def entries(page: Path) -> list[Entry]:
    """Read the entries of a page of the gallery."""
    return _read(page.read_text("utf-8"))


def _read(text: str) -> list[Entry]:
    return [Entry(function, data or None, code) for function, data, code in _ENTRY.findall(text)]


def setup(app: Any) -> dict[str, Any]:
    """Tell Sphinx."""
    app.add_directive("drawn", Drawn)
    app.add_directive("gallery-cards", Cards)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
