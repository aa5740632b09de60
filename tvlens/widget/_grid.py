"""The panel where no panel can run: the same heat map and the same numbers, as plain HTML."""

import html
from typing import TYPE_CHECKING

from tvlens.patching.pairs import spelled
from tvlens.plots.theme import SEQUENTIAL, visible

if TYPE_CHECKING:
    from tvlens.widget._explorer import Explorer

_NOTE = "This is a still picture of the panel."
_CELL = "padding:1px 5px;text-align:center;white-space:nowrap;max-width:7em;overflow:hidden;"


def static_grid(explorer: "Explorer", *, note: str = "") -> str:
    """Write what the panel shows as a table that needs neither a kernel nor JavaScript.

    Args:
        explorer: The explorer.
        note: Why there is no panel.

    Returns:
        An HTML fragment.

    Example:
        >>> import tvlens as tv
        >>> "<table" in static_grid(tv.explore(tv.load_model("toy"), "example:a->A"))
        True
    """
    scene, state, seen = explorer.scene, explorer.state, explorer.effect.map
    words = dict(
        zip(ids := seen.top_id.unique().tolist(), spelled(explorer.model, ids), strict=True)
    )
    chosen = (state.layer, state.position - scene.first) if state.action != "nothing" else None
    rows = []
    for layer in reversed(range(len(scene.resid))):
        cells = [f"<th style='padding:1px 8px;text-align:right'>{layer}</th>"]
        for column in range(len(scene.tokens) - scene.first):
            best = [words[i] for i in seen.top_id[layer, column].tolist()]
            shares = seen.top_probability[layer, column].tolist()
            hover = "\n".join(f"{visible(w)} {p:.3f}" for w, p in zip(best, shares, strict=True))
            frame = (
                "outline:2px solid #d55e00;outline-offset:-2px;"
                if chosen == (layer, column)
                else ""
            )
            cells.append(
                f"<td title='{html.escape(hover, quote=True)}' style='{_CELL}{frame}{_paint(shares[0])}'>"
                f"{html.escape(visible(best[0], limit=9))}</td>"
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    foot = "".join(
        f"<th style='{_CELL}'>{html.escape(visible(token, limit=9))}</th>"
        for token in scene.tokens[scene.first :]
    )
    return (
        "<div style='border:1px solid #d9dee5;border-radius:8px;padding:12px 16px;background:#fff;"
        "color:#1f2933;font:13px system-ui,sans-serif'>"
        f"<p style='margin:0 0 8px'>{html.escape(explorer.says())}</p>"
        f"<div style='overflow-x:auto'><table style='border-collapse:collapse;font-size:12px'>"
        f"{''.join(rows)}<tr><th>layer</th>{foot}</tr></table></div>"
        f"{_next_tokens(explorer)}"
        f"<p style='margin:8px 0 0;color:#5f6b7a'>{_NOTE} {html.escape(note)}</p></div>"
    )


def _next_tokens(explorer: "Explorer") -> str:
    effect = explorer.effect
    rows = "".join(
        f"<tr><td style='padding:0 12px 0 0'>{html.escape(visible(word))}</td>"
        f"<td style='padding:0 12px'>{before:.3f}</td><td style='padding:0 12px'>{after:.3f}</td></tr>"
        for word, before, after in zip(
            effect.words, effect.before.tolist(), effect.after.tolist(), strict=True
        )
    )
    return (
        "<table style='margin-top:8px;font-size:12px'><tr><th>next token</th><th>before</th>"
        f"<th>after</th></tr>{rows}</table>"
    )


def _paint(share: float) -> str:
    """Background and ink of a cell, on the figures' own scale."""
    stops = [(at, tuple(int(c[i : i + 2], 16) for i in (1, 3, 5))) for at, c in SEQUENTIAL]
    below = max((s for s in stops if s[0] <= share), key=lambda s: s[0])
    above = min((s for s in stops if s[0] >= share), key=lambda s: s[0])
    part = (share - below[0]) / ((above[0] - below[0]) or 1)
    color = [round(a + part * (b - a)) for a, b in zip(below[1], above[1], strict=True)]
    ink = "#fff" if 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] < 140 else "#1f2933"
    return f"background:rgb{tuple(color)};color:{ink};"
