"""What all figures have in common: one of every kind is drawn, and looked at from all sides.

The results are those of the gallery, of which every figure function has an entry.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

import tvlens as tv
from tests.fake_results import FakeSweep, sweep_data
from tvlens.icl import bounds_explorer
from tvlens.plots import palette
from tvlens.plots.palette import DARK, DIVERGING, SEQUENTIAL
from tvlens.results import Result

pytestmark = pytest.mark.slow

GALLERY = Path(__file__).parent.parent / "docs" / "gallery" / "data"
# Titles without a number: what is true of the theory, and a table.
UNCOUNTED = {
    "The more items with other labels, the earlier the weights overtake the context",
    "Words that theta promotes",
    "When the context serves, and when the weights",
}
# Names that stand in data and mean nothing to a reader, and what a number looks like that nobody rounded.
INTERNAL = re.compile(
    r"<xarray|dtype|\barray\(|\bnan\b|\bNone\b|n_sequences|n_classes|\w_low\b|\w_high\b|\d\.\d{6,}"
)
Spec = dict[str, Any]


def of_the_toy() -> list[Result]:
    """Kinds of which the gallery has no file of its own."""
    model, asked = tv.load_model("toy"), {"answers": "B", "wrong": "A"}
    prompt, other = "example:a->A\nexample:b->", "example:a->A\nexample:c->"
    task = tv.models.toy_tasks()["plural"]
    return [
        tv.attribute_gradients(model, prompt, **asked),
        tv.edge_scores(model, prompt, other, **asked),
        tv.head_effects(model, task, shots=2, n_means=4, n_trials=2),
        FakeSweep(sweep_data(layers=12, n=8)),
    ]


@pytest.fixture(scope="module")
def figures() -> dict[str, go.Figure]:
    sweeps = [FakeSweep(sweep_data(f"t{i}", seed=i, layers=12, n=8)) for i in range(4)]
    results = {path.stem: tv.load(path) for path in sorted(GALLERY.glob("*.nc"))}
    results |= {type(result).__name__: result for result in of_the_toy()}
    drawn = {
        f"{type(result).__name__} ({file}): {name}": figure
        for file, result in results.items()
        for name, figure in result.figures().items()
    }
    drawn |= {f"overview: {name}": one for name, one in FakeSweep.overview(sweeps).items()}
    return drawn | {"bounds": bounds_explorer().figure()}


@pytest.fixture(scope="module")
def specs(figures: dict[str, go.Figure]) -> dict[str, Spec]:
    return {name: json.loads(str(figure.to_json())) for name, figure in figures.items()}


def test_every_kind_of_result_is_drawn(figures: dict[str, go.Figure]) -> None:
    kinds = {name.split(" ")[0] for name in figures}
    known = {kind.__name__ for kind in _subclasses(Result) if kind.__module__.startswith("tvlens.")}
    assert known - kinds == set() and len(known) > 30


def _subclasses(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def test_titles_say_what_came_out(figures: dict[str, go.Figure]) -> None:
    bad = {}
    for name, figure in figures.items():
        said = figure.layout.meta["title"]
        lines = re.sub(r"<[^>]*>", "", figure.layout.title.text.replace("<br>", "\n")).split("\n")
        counted = said in UNCOUNTED or re.search(r"\d", said)
        if len(said.split()) < 4 or not counted or len(lines) > 9 or max(map(len, lines)) > 140:
            bad[name] = said
    assert not bad


def test_the_look_is_the_templates(figures: dict[str, go.Figure]) -> None:
    for name, figure in figures.items():
        assert figure.layout.template == pio.templates["tvlens"], name
        assert figure.layout.width is None and figure.layout.font.family is None, name


def axes_of(spec: Spec, way: str) -> list[Spec]:
    used = {str(trace.get(f"{way}axis", way)) for trace in spec["data"] if trace["type"] != "table"}
    names = [f"{way}axis{key[1:]}" for key in sorted(used)]
    return [spec["layout"].get(name, {}) for name in names]


def test_axes_say_what_stands_on_them(specs: dict[str, Spec]) -> None:
    bad = []
    for name, spec in specs.items():
        for way in "xy":
            axes = [a for a in axes_of(spec, way) if a.get("visible", True)]
            named = [bool(axis.get("title", {}).get("text")) for axis in axes]
            told = [any(not _number(t) for t in axis.get("ticktext", ())) for axis in axes]
            told = [t or _categories(spec, way) for t in told]
            # Panels in a row or column share what the outer ones say.
            if axes and not (any(named) or all(told)):
                bad.append((name, way))
    assert not bad


def _number(text: object) -> bool:
    return re.fullmatch(r"[\d,.−-]*(<sup>[\d−]+</sup>)?", str(text)) is not None


def _categories(spec: Spec, way: str) -> bool:
    first = [trace.get(way) for trace in spec["data"] if isinstance(trace.get(way), list)]
    return bool(first) and all(isinstance(v, str) for values in first for v in values)


def test_logarithmic_axes_have_ticks_of_their_own(specs: dict[str, Spec]) -> None:
    found = [
        (name, axis)
        for name, spec in specs.items()
        for way in "xy"
        for axis in axes_of(spec, way)
        if axis.get("type") == "log"
    ]
    assert len(found) > 20
    for name, axis in found:
        assert len(axis["tickvals"]) == len(axis["ticktext"]) >= 1, name


def test_hovering_tells_it_in_words(figures: dict[str, go.Figure]) -> None:
    bad: list[tuple[str, str]] = []
    for name, figure in figures.items():
        for trace in figure.data:
            # A bar of a histogram names its own ends.
            if trace.type in ("table", "histogram") or trace.hoverinfo == "skip":
                continue
            template = trace.hovertemplate
            if not template or "<extra></extra>" not in template:
                bad.append((name, f"no template: {trace.name}"))
                continue
            words = [template, *_texts(trace.customdata)]
            bad += [(name, text) for text in words if INTERNAL.search(text)]
            for part in re.findall(r"%\{(x|y|z|customdata)\}", template):
                values = np.asarray(trace[part] if trace[part] is not None else [])
                if values.dtype.kind == "f" and (values[np.isfinite(values)] % 1).any():
                    bad.append((name, f"%{{{part}}} is not rounded in {template}"))
    assert not bad, "\n".join(map(str, bad))


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif (
        isinstance(values, list | tuple | np.ndarray) and np.asarray(values, object).dtype == object
    ):
        for value in values:
            yield from _texts(value)


def colors(value: Any, key: str = "") -> Iterator[str]:
    """All colours of a figure but those of its template and its scales."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("template", "colorscale"):
                yield from colors(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from colors(inner, key)
    elif isinstance(value, str) and key.endswith("color"):
        yield value
    elif isinstance(value, str):
        yield from re.findall(r'<\w+ style="[^"]*color: ?(#\w+)', value)


def test_colours_are_the_palettes(specs: dict[str, Spec]) -> None:
    known = set(DARK)
    found = {color for spec in specs.values() for color in colors(spec)}
    assert len(found) > 30
    bad = set()
    for color in found:
        parts = re.fullmatch(r"rgba?\((\d+), (\d+), (\d+)(, [\d.]+)?\)", color)
        own = "#" + "".join(f"{int(p):02x}" for p in parts.groups()[:3]) if parts else color
        on_scale = parts is not None and parts[4] is None and _on_scale(own)
        if own not in known and not on_scale:
            bad.add(color)
    assert not bad


def _on_scale(color: str) -> bool:
    """Whether a colour lies between neighbours of one of the two scales."""

    def parts(text: str) -> np.ndarray:
        return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)], float)

    for scale in (SEQUENTIAL, DIVERGING):
        for (_, one), (_, other) in itertools.pairwise(scale):
            start, step = parts(str(one)), parts(str(other)) - parts(str(one))
            at = np.clip((parts(color) - start) @ step / (step @ step), 0, 1)
            if np.abs(parts(color) - start - at * step).max() <= 1:
                return True
    return False


def test_colour_never_speaks_alone(specs: dict[str, Spec]) -> None:
    """What a legend tells apart by colour differs in dash, marker or width, or is named in the figure."""
    bad = []
    for name, spec in specs.items():
        written = " ".join(note.get("text", "") for note in spec["layout"].get("annotations", []))
        looks: dict[tuple[Any, ...], str] = {}
        for trace in spec["data"]:
            shown = (
                trace.get("showlegend", True) and trace.get("name") and trace["type"] == "scatter"
            )
            if not shown or f"<b>{trace['name']}</b>" in written:
                continue
            line, marker = trace.get("line", {}), trace.get("marker", {})
            mode = trace.get("mode", "")
            look = (
                mode, trace.get("fill"), line.get("dash", "solid") if "lines" in mode else "",
                line.get("width") if "lines" in mode else "",
                (str(marker.get("symbol", "circle")), marker.get("size")) if "markers" in mode else "",
                marker.get("opacity"), marker.get("color") == palette.PAPER,
            )  # fmt: skip
            if looks.setdefault((trace.get("legend"), *look), trace["name"]) != trace["name"]:
                bad.append((name, trace["name"], looks[trace.get("legend"), *look]))
    assert not bad, "\n".join(map(str, bad))


def test_legends_stand_beside_the_plot(specs: dict[str, Spec]) -> None:
    template = pio.templates["tvlens"].layout.legend
    for name, spec in specs.items():
        legends = [v for k, v in spec["layout"].items() if k.startswith("legend")] or [{}]
        for legend in legends:
            x, y = legend.get("x", template.x), legend.get("y", template.y)
            low = y <= 0 and legend.get("yanchor", "top") == "top"
            high = y >= 1 and legend.get("yanchor") == "bottom"
            assert low or high or x >= 1, (name, legend)


def test_titles_of_colour_bars_fit(specs: dict[str, Spec]) -> None:
    seen = 0
    for name, spec in specs.items():
        layout = spec["layout"]
        bars = [trace["colorbar"] for trace in spec["data"] if "colorbar" in trace]
        bars += [layout["coloraxis"]["colorbar"]] if "coloraxis" in layout else []
        for bar in bars:
            seen += 1
            if bar.get("orientation") == "h":
                continue
            tall = layout["height"] - layout["margin"]["t"] - layout["margin"].get("b", 56)
            longest = max(map(len, bar["title"]["text"].split("<br>")))
            assert bar["title"]["side"] == "right" and 6 * longest <= tall + 12, (
                name,
                bar["title"],
            )
    assert seen > 20


# --- the palette ------------------------------------------------------------------------------

# Machado, Oliveira, Fernandes 2009, severity 1: what people see who lack red or green cones.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip
LINES = ("INK", "BLUE", "ORANGE", "GREEN", "PURPLE", "VERMILION", "SKY", "GREY")


def linear(color: str) -> np.ndarray:
    share = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
              [0.0193339, 0.1191920, 0.9503041]]  # fmt: skip
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("eyes", BLIND)
def test_colours_of_lines_are_told_apart(eyes: str, dark: bool) -> None:
    used = [getattr(palette, name) for name in LINES]
    seen = [lab(np.array(BLIND[eyes]) @ linear(DARK[c] if dark else c)) for c in used]
    near = {
        (LINES[i], LINES[j]): float(np.linalg.norm(seen[i] - seen[j]))
        for i in range(len(seen))
        for j in range(i)
    }
    assert min(near.values()) > 17, min(near.items(), key=lambda item: item[1])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_are_seen_on_paper(dark: bool) -> None:
    def seen(name: str) -> float:
        color, paper = getattr(palette, name), palette.PAPER
        return contrast(DARK[color], DARK[paper]) if dark else contrast(color, paper)

    assert seen("INK") > 12 and seen("MUTED") > 5
    # Orange and sky are light on white: they are drawn thick, with a dash or a marker.
    assert all(seen(name) > (3 if dark else 2.2) for name in LINES)
    assert all(seen(name) > 3.5 for name in ("BLUE", "GREEN", "PURPLE", "VERMILION"))


def test_pages_know_the_same_dark_colours() -> None:
    script = Path(tv.__file__).with_name("report.js").read_text("utf-8")
    block = re.search(r"const night = \{(.*?)\};", script, re.S)
    assert block and dict(re.findall(r'"(#\w{6})": "(#\w{6})"', block[1])) == DARK
