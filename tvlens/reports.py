"""A report is one file: every figure, number and source of a set of results, with no network.

Plotly's script stands in the file once. Figures are drawn one after the other, those in view first,
so that a report over many tasks opens at once; they are dark where the reader's screen is, and light
on paper. Nothing in the page reaches out: its content policy forbids it.
"""

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from tvlens._errors import needs
from tvlens._files import replacing
from tvlens.pages import cells
from tvlens.results import Result

_HERE = Path(__file__).parent
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="muted">{about}</p></header>
<nav aria-label="Contents"><h2>Contents</h2>{contents}</nav>
<main>
<noscript><p>The figures need JavaScript; the tables and the data do not.</p></noscript>
{body}
</main>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def report(
    results: Result | Iterable[Result],
    path: str | Path = "report.html",
    *,
    title: str | None = None,
) -> Path:
    """Write results as one self-contained HTML page.

    Args:
        results: One result or several, of any kinds. Where a kind has ``overview(results)`` and
            there are two or more of it, its figures come first.
        path: Where to write; an existing file is replaced only by a whole one.
        title: Heading of the page.

    Returns:
        The path.

    Raises:
        ValueError: There are no results.
        TypeError: Something among them is no `Result`.
        FileNotFoundError: The folder does not exist.

    Example:
        >>> report([sweep], "report.html", title="Task vectors in GPT-2")  # doctest: +SKIP
    """
    from plotly.offline import get_plotlyjs

    needs("results", results, (Result, Iterable), "a Result or several")
    found = [results] if isinstance(results, Result) else list(results)
    if not found:
        raise ValueError("a report needs at least one result, got none")
    for item in found:
        if not isinstance(item, Result):
            raise TypeError(f"a report holds results, got {type(item).__name__}: {item!r:.80}")
    title = title or (found[0].title if len(found) == 1 else f"{len(found)} results")
    page = _PAGE.format(
        policy=_POLICY,
        title=_text(title),
        about=_about(found),
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        script=(_HERE / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        contents=_contents(found),
        body="\n".join([_summary(found), _overview(found), *_sections(found), _sources(found)]),
    )
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return Path(path)


_OFFLINE = (
    "this.parentElement.insertAdjacentText('beforeend', 'No network, so Plotly could not be loaded here: "
    "use .plot() for the figure.')"
)


def card(result: Result) -> str:
    """Write a result as a small HTML card for a notebook; Plotly's script comes from its CDN.

    Args:
        result: Any result.

    Returns:
        An HTML fragment.

    Example:
        >>> card(sweep).startswith("<div")  # doctest: +SKIP
    """
    figure, caption = _untitled(result.plot(), "main", said=result.finding())
    drawn = figure.to_html(full_html=False, include_plotlyjs="cdn")
    # Without a network the figure stays empty: say so, and how to see it.
    drawn = drawn.replace("<script ", f'<script onerror="{_OFFLINE}" ', 1)
    sizes = "".join(
        f"<td style='padding:0 1.2em 0 0'>{_text(name)} <b>{size}</b></td>"
        for name, size in result.data.sizes.items()
    )
    return (
        "<div style='border:1px solid #d9dee5;border-radius:8px;padding:12px 16px;max-width:1000px;"
        "background:#fff;color:#1f2933;font-family:system-ui,sans-serif'>"
        f"<div style='font-size:1.15em;font-weight:600'>{_text(result.title)}</div>"
        f"<div style='margin:4px 0 8px'>{_text(result.finding())}</div>"
        f"<div>{caption}</div><div style='overflow-x:auto'>"
        f"<div style='min-width:{_least(figure)}px'>{drawn}</div></div>"
        f"<table style='margin:6px 0;font-size:.9em'><tr>{sizes}</tr></table>"
        f"{_provenance(result)}</div>"
    )


def _text(value: object) -> str:
    """Escape text for HTML, also where it holds what UTF-8 cannot write."""
    return html.escape(str(value)).encode("utf-8", "backslashreplace").decode().replace("\0", "␀")


def _about(results: list[Result]) -> str:
    notes = [result.provenance for result in results]
    # What was trained for a study has no name, only its sizes.
    models = sorted({str(note["model"]) for note in notes if "model" in note})
    models = [name for name in models if "(" not in name]
    when = max((str(note.get("created", "")) for note in notes), default="")[:16].replace("T", " ")
    count = f"{len(results)} result{'s' if len(results) > 1 else ''}"
    version = notes[0].get("versions", {}).get("tvlens")
    parts = [count, *models, f"{when} UTC" if when else "", f"tvlens {version}" if version else ""]
    return " · ".join(_text(part) for part in parts if part)


def _contents(results: list[Result]) -> str:
    items = [("summary", "Summary")] if len(results) > 1 else []
    if any(_overview_of(group) for group in _groups(results)):
        items.append(("overview", "Overview"))
    items += [(f"result-{i}", name) for i, name in enumerate(_short(results), start=1)]
    items.append(("sources", "References"))
    links = "".join(f'<li><a href="#{anchor}">{_text(name)}</a></li>' for anchor, name in items)
    return f"<ul>{links}</ul>"


def _short(results: list[Result]) -> list[str]:
    """Give the titles without the words that all of them begin or end with."""
    words = [result.title.split(" ") for result in results]
    for _ in range(2):  # from the front, then from the back
        while len(words) > 1 and all(len(w) > 1 for w in words) and len({w[0] for w in words}) == 1:
            words = [w[1:] for w in words]
        words = [w[::-1] for w in words]
    short = [" ".join(w).strip(" :·") for w in words]
    return short if len(set(short)) == len(short) else [result.title for result in results]


def _groups(results: list[Result]) -> list[list[Result]]:
    """Collect the results of each kind, in the order of first appearance."""
    kinds: dict[type[Result], list[Result]] = {}
    for result in results:
        kinds.setdefault(type(result), []).append(result)
    return list(kinds.values())


def _summary(results: list[Result]) -> str:
    """A table of the results of each kind; of a kind alone, what came out."""
    if len(results) == 1:
        return ""
    named = zip(results, _short(results), strict=True)
    links = {
        id(result): f'<a href="#result-{i}">{_text(name)}</a>'
        for i, (result, name) in enumerate(named, start=1)
    }
    groups = _groups(results)
    alone = [group[0] for group in groups if len(group) == 1]
    tables = [_compared(group, links) for group in groups if len(group) > 1]
    lines = [f"<li>{links[id(result)]}: {_text(result.finding())}</li>" for result in alone]
    found = f"<ul class=findings>{''.join(lines)}</ul>" if lines else ""
    note = "<p class=muted>Small numbers are the ends of the intervals.</p>" if tables else ""
    return f'<section id="summary"><h2>Summary</h2>{"".join(tables)}{note}{found}</section>'


def _compared(group: list[Result], links: Mapping[int, str]) -> str:
    rows = [_cells(result.summary()) for result in group]
    columns = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if not all(_said(result, name) for result in group)
    ]
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in columns)
    lines = []
    for result, row in zip(group, rows, strict=True):
        found = "".join(row.get(name, "<td></td>") for name in columns)
        lines.append(f"<tr><th scope=row>{links[id(result)]}</th>{found}</tr>")
    body = "\n".join(lines)
    return (
        f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _said(result: Result, name: str) -> bool:
    """Tell whether the title, the first column of the summary, already holds this text."""
    value = result.summary().get(name)
    return isinstance(value, str) and value in result.title


def _cells(summary: Mapping[str, Any]) -> dict[str, str]:
    """Make table cells of a summary's values; ``x_low`` and ``x_high`` join the cell of ``x``."""
    cells = {}
    for name, value in summary.items():
        stem = name.removesuffix("_low").removesuffix("_high")
        if name in ("kind", "title", "finding") or (stem != name and stem in summary):
            continue
        if not isinstance(value, str | int | float | type(None)):
            continue
        shown = _number(value)
        ends = [summary.get(f"{name}_{end}") for end in ("low", "high")]
        if not any(end is None or end != end for end in ends):
            shown += f" <small>{_number(ends[0])} to {_number(ends[1])}</small>"
        cells[name] = f"<td>{shown}</td>"
    return cells


def _number(value: Any) -> str:
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return _text(value)


def _overview_of(group: list[Result]) -> dict[str, go.Figure]:
    draw = getattr(type(group[0]), "overview", None)
    return draw(group) if draw and len(group) > 1 else {}


def _overview(results: list[Result]) -> str:
    figures = [
        _figure(name, figure) for g in _groups(results) for name, figure in _overview_of(g).items()
    ]
    if not figures:
        return ""
    return f'<section id="overview"><h2>Overview</h2>{"".join(figures)}</section>'


def _sections(results: list[Result]) -> list[str]:
    sections = []
    for i, result in enumerate(results, start=1):
        finding = result.finding()
        figures = "".join(
            _figure(name, figure, said=finding) for name, figure in result.figures().items()
        )
        method = (
            f"<p class=method><b>Method.</b> {_text(result.method)}</p>" if result.method else ""
        )
        sections.append(
            f'<section id="result-{i}"><h2>{_text(result.title)}</h2>'
            f"<p class=finding>{_text(finding)}</p>{figures}{_tables(result)}{method}"
            f"<p>{_download(result)}</p>{_provenance(result)}</section>"
        )
    return sections


def _tables(result: Result) -> str:
    """The tables of a result and the numbers of its summary, folded."""
    tables = {
        caption: "".join(
            _row(line, "th" if i == 0 else "td") for i, line in enumerate(cells(frame))
        )
        for caption, frame in result.tables().items()
    }
    numbers = _cells(result.summary()).items()
    rows = [
        f"<tr><th scope=row>{_text(n.replace('_', ' '))}</th>{cell}</tr>" for n, cell in numbers
    ]
    tables |= {"All numbers": "".join(rows)} if rows else {}
    return "".join(
        f"<details><summary>{_text(caption)}</summary><div class=scroll><table>{rows}</table></div></details>"
        for caption, rows in tables.items()
    )


def _row(line: list[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in line)}</tr>"


def _figure(name: str, figure: go.Figure, *, said: str = "") -> str:
    """Hand a figure to the page: its title as a caption that wraps, the rest as JSON."""
    figure, caption = _untitled(figure, name, said=said)
    layout: Any = figure.layout
    # "<" could close the script element; JSON may write it as an escape.
    spec = str(figure.to_json()).replace("<", "\\u003c")
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="scroll paper">'
        f'<div class="plot" style="min-height:{layout.height:.0f}px;min-width:{_least(figure)}px">'
        f'<script type="application/json">{spec}</script></div></div></figure>'
    )


def _least(figure: go.Figure) -> int:
    """How narrow a figure may become before it is scrolled, in pixels."""
    layout: Any = figure.layout
    return int(layout.meta.get("min_width", 0)) if isinstance(layout.meta, dict) else 0


def _untitled(figure: go.Figure, name: str, *, said: str = "") -> tuple[go.Figure, str]:
    """Take the title out of a copy of the figure and give it as HTML; where it was said, its name."""
    figure = go.Figure(figure)
    layout: Any = figure.layout
    meta = layout.meta if isinstance(layout.meta, dict) else {}
    heading = meta.get("title") or _strip(layout.title.text or "") or name
    if said and heading == said:
        heading = "" if name == "main" else name[0].upper() + name[1:]
    parts = [f"<b>{_text(heading)}</b>"] if heading else []
    if meta.get("subtitle"):
        parts.append(f"<small>{_text(meta['subtitle'])}</small>")
    space = meta.get("space", 0)
    layout.update(title={"text": None}, height=(layout.height or 450) - space, width=None)
    if space:
        layout.margin.t -= space
    return figure, "<br>".join(parts)


def _strip(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br\s*/?>", " ", markup)))


def _download(result: Result) -> str:
    table = result.to_dataframe().to_csv(index=False)
    data = base64.b64encode(table.encode("utf-8", "backslashreplace")).decode()
    name = re.sub(r"[^a-z0-9]+", "-", result.title.lower()).strip("-") or "data"
    return (
        f'<a class=button download="{name}.csv" href="data:text/csv;charset=utf-8;base64,{data}">'
        "Data (CSV)</a>"
    )


def _provenance(result: Result) -> str:
    text = json.dumps(result.provenance, indent=2, ensure_ascii=False)
    return f"<details><summary>Provenance</summary><pre>{_text(text)}</pre></details>"


def _sources(results: list[Result]) -> str:
    from tvlens.citations import cite

    keys = dict.fromkeys(key for result in results for key in result.references)
    text = _text(cite(*keys, "tvlens", "nanda2022transformerlens"))
    return f'<section id="sources"><h2>References</h2><pre>{text}</pre></section>'
