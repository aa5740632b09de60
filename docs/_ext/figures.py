"""Figures of the site: one copy of Plotly for all pages, the script of reports, and no network.

Whatever draws a figure leaves a box with its JSON in the page, as `tvlens.reports` does. The outputs of
notebooks are set so as well, since Plotly's own renderer for them would ask the network.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from docutils import nodes
from plotly.offline import get_plotlyjs

from tvlens import reports

_PLOTLY = "plotly.min.js"


def _write_scripts(app: Any) -> None:
    """Put Plotly and what draws into the site, once for all pages."""
    if app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    (static / _PLOTLY).write_text(get_plotlyjs(), "utf-8")
    shutil.copy(Path(reports.__file__).with_name("report.js"), static)


def _redraw_outputs(app: Any, tree: nodes.document, page: str) -> None:
    """Set the figures of notebooks as those of the gallery."""
    for node in list(tree.findall(nodes.raw)):
        if "https://cdn.plot.ly/" in node.astext():
            node.replace_self(nodes.raw("", redrawn(node.astext()), format="html"))


def redrawn(output: str) -> str:
    """Set a figure that Plotly wrote as HTML, which would ask the network for Plotly, as ours are.

    Args:
        output: HTML that loads Plotly and mostly draws a figure, perhaps in a card of a result.

    Returns:
        The same with our box in place of the figure; nothing where Plotly is only loaded.
    """
    call = re.search(r'Plotly\.newPlot\(\s*"[\w-]+",\s*', output)
    if call is None:
        return ""
    read = json.JSONDecoder().raw_decode
    data, at = read(output, call.end())
    layout, at = read(output, output.index("{", at))
    figure = go.Figure(data, layout)
    known: Any = figure.layout
    if not known.title.text:  # a card has said it above, and taken its space away
        known.meta = {"min_width": (known.meta or {}).get("min_width", 0)}
    start = output.rindex("<div", 0, output.index("window.PlotlyConfig"))
    end = re.compile(r"</script>\s*</div>").search(output, at)
    box = reports._figure("main", figure, said="main")
    return output[:start] + box + (output[end.end() :] if end else "")


def _use_scripts(app: Any, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Load the scripts where there is something to draw."""
    if 'class="plot"' in context.get("body", ""):
        for name in (_PLOTLY, "report.js"):
            app.add_js_file(name, loading_method="defer")


def setup(app: Any) -> dict[str, Any]:
    """Tell Sphinx."""
    app.connect("builder-inited", _write_scripts)
    app.connect("doctree-resolved", _redraw_outputs)
    app.connect("html-page-context", _use_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
