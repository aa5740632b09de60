"""First token beside whole answer: how much of what a run begins right it also ends right.

Two bars a run, the pale one by first token, the full one by the whole answer. A mark above the full bar shows
where it would end if texts that begin with an answer and do not stop were right, too.
"""

from typing import Any

import plotly.graph_objects as go
import xarray as xr

from tvlens._errors import unknown
from tvlens.plots._bars import grouped, headed, share_bars, task_axes, told_shots
from tvlens.plots.palette import GREY, INK, MUTED, PAPER
from tvlens.plots.theme import ROLES, percent

# Run: what it is called, its role.
_RUNS = {
    "regular": ("demonstrations", ROLES["regular"]),
    "theta": ("theta", ROLES["hypothesis"]),
    "random": ("random vector", ROLES["control"]),
    "baseline": ("query only", ROLES["baseline"]),
}
_KINDS = {"first": ("first token", 0.38, -0.21), "exact": ("whole answer", 1.0, 0.21)}
_MARK: dict[str, Any] = {"symbol": "diamond", "size": 7, "line": {"color": PAPER, "width": 0.8}}


def answer_bars(
    data: xr.Dataset, *, runs: tuple[str, ...] = tuple(_RUNS), title: str | None = None
) -> go.Figure:
    """Draw accuracies by first token and by whole answer as paired bars, with intervals.

    Args:
        data: What `tvlens.experiments._answers.WholeAnswers.drawn` gives.
        runs: Which runs.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure; the hover says the same of answers of several tokens alone.

    Raises:
        ValueError: There is no such run.

    Example:
        >>> answer_bars(result.drawn(), runs=("regular", "theta"))  # doctest: +SKIP
    """
    for name in runs:
        if name not in _RUNS:
            raise unknown("run", name, _RUNS)
    tasks = [str(name) for name in data["task"].values]
    fig, places, step = grouped(len(tasks), len(runs))
    for run, at in zip(runs, places, strict=True):
        (name, role), one = _RUNS[run], data.sel(run=run)
        more = [_several(one.isel(task=i)) for i in range(len(tasks))]
        for kind, (words, strength, shift) in _KINDS.items():
            ends = {kind: "accuracy", f"{kind}_low": "low", f"{kind}_high": "high"}
            share_bars(
                fig, one[list(ends)].rename(ends), tasks, at=at + shift * step, width=step * 0.4,
                name=name, color=role.faint(strength), what=f", {words}", more=more, legendgroup=run,
                showlegend=kind == "exact",
            )  # fmt: skip
        fig.add_scatter(
            x=at + _KINDS["exact"][2] * step, y=one["begins"].values, mode="markers", hoverinfo="skip",
            marker=_MARK | {"color": INK}, legendgroup=run, showlegend=False,
        )  # fmt: skip
    for words, strength, _ in _KINDS.values():
        marker = {"symbol": "square", "size": 11, "color": GREY, "opacity": strength}
        fig.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker=marker,
            name=f"right by {words}",
            hoverinfo="skip",
        )
    fig.add_scatter(
        x=[None], y=[None], mode="markers", marker=_MARK | {"color": MUTED},
        name="begins with the whole answer", hoverinfo="skip",
    )  # fmt: skip
    task_axes(fig, tasks, floor=-0.015)
    fig.update_layout(height=420, meta={"min_width": 150 * len(tasks) + 120})
    small = "pale: first token, full: whole answer · error bars: 95% intervals"
    return headed(fig, data, title, told_shots(data), small)


def _several(one: xr.Dataset) -> str:
    """What is known of one task's answers of several tokens in one run."""
    value = {str(name): float(values) for name, values in one.data_vars.items()}
    lines = [
        f"begins with an answer {percent(value['begins'])}, ends by itself {percent(value['stopped'])}"
    ]
    if not value["several"]:
        return "<br>".join([*lines, "no answers of several tokens"])
    lines.append(f"answers of several tokens ({percent(value['several'])} of prompts):")
    for kind, (words, *_) in _KINDS.items():
        rate, low, high = (percent(value[f"{kind}_several{end}"]) for end in ("", "_low", "_high"))
        lines.append(f"  {words} {rate} [{low}, {high}]")
    return "<br>".join(lines)
