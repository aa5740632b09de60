"""The theory under one's fingers: six sliders, two losses, and the place where they cross.

Plotly's own sliders each choose among figures that are drawn beforehand, so six of them do not compose. Here
a few lines of JavaScript (``bounds.js``) compute the closed forms of `tvlens.icl.theory` in the page.
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._files import replacing
from tvlens.icl.predictors import bayes_risk
from tvlens.icl.theory import crossover, in_context_bounds, in_weight_bound

_LOG_EPSILON = (-6.0, -2.0)
# Name, least, most, step, what it says. A whole context comes before what is in it: k is at most L.
_SLIDERS = (
    ("length", 1, 16, "1", "L: items in the context"),
    ("n_irrelevant", 0, 16, "1", "k: of them irrelevant"),
    ("n_classes", 2, 100, "1", "C: classes"),
    ("epsilon", *_LOG_EPSILON, "any", "ε: least probability"),
    ("b", 0, 4, "any", "B: bound of similarity, squared"),
    ("label_noise", 0, 0.5, "any", "ρ: share of wrong labels"),
)
_READOUT = (
    ("Bayes risk", ("risk",)),
    ("Loss in context", ("in_context_low", "in_context_high")),
    ("N<sub>x</sub>*", ("crossover_high", "crossover_low")),
)
_FAILED = "Plotly could not be loaded: .save(path) writes a page that needs no network."
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<script>{plotly}</script>
</head>
<body style="background: #f6f7f9">
{body}
</body>
</html>
"""
_TITLE = "When the context serves, and when the weights"


@dataclass(frozen=True)
class BoundsExplorer:
    """An interactive figure of the theory; in a notebook it shows itself. `bounds_explorer` makes it.

    Args:
        length: L at first.
        n_irrelevant: k.
        n_classes: C.
        epsilon: The least probability of any class.
        b: Similarities lie within plus and minus sqrt(b).
        label_noise: Share of labels that are shifted.
    """

    length: int
    n_irrelevant: int
    n_classes: int
    epsilon: float
    b: float
    label_noise: float

    @property
    def data(self) -> xr.Dataset:
        """The curves at the sliders' first setting."""
        low, high = in_context_bounds(
            self.length, self.n_irrelevant, self.n_classes, self.epsilon, self.b,
            label_noise=self.label_noise,
        )  # fmt: skip
        ends, n = np.stack([low, high]), np.geomspace(4, 1e7, 161)
        noise: Any = {"label_noise": self.label_noise}
        after = in_weight_bound(n, self.n_classes, form="instantaneous", **noise)
        return xr.Dataset(
            {
                "risk": bayes_risk(self.n_classes, self.label_noise),
                "in_context": ("end", ends),
                "crossover": ("end", crossover(ends, self.n_classes, **noise)),
                "in_weight": ("n", in_weight_bound(n, self.n_classes, **noise)),
                "in_weight_next": ("n", after),
            },
            coords={"n": n, "end": ["low", "high"]},
        )

    def figure(self) -> go.Figure:
        """Draw the first setting, without sliders; see `tvlens.plots.icl_theory.bounds`."""
        from tvlens.plots.icl_theory import bounds

        said = ", ".join(
            f"{name.split(':')[0]} = {getattr(self, key):g}" for key, *_, name in _SLIDERS
        )
        return bounds(self.data, title=_TITLE, subtitle=said)

    def save(self, path: str | Path) -> Path:
        """Write one HTML file that opens without a network.

        Args:
            path: Where; an existing file is replaced.

        Returns:
            The path.

        Raises:
            FileNotFoundError: The folder does not exist.
        """
        from plotly.offline import get_plotlyjs

        from tvlens.reports import _POLICY

        page = _PAGE.format(
            policy=_POLICY, title=_TITLE, plotly=get_plotlyjs(), body=self._fragment(None)
        )
        with replacing(path) as part:
            part.write_text(page, encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        from plotly.offline import get_plotlyjs_version

        return self._fragment(f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js")

    def _fragment(self, cdn: str | None) -> str:
        """Sliders, figure and script, with an id of their own, so that a page can hold several."""
        from tvlens.plots.icl_theory import TRACES, bounds

        data, mark = self.data, f"tvlens-bounds-{uuid.uuid4().hex}"
        drawn = json.loads(str(bounds(data).to_json()))
        spec = {"n": data["n"].values.tolist(), "traces": TRACES, "cdn": cdn, "figure": drawn}
        # "<" could close the script element; JSON may write it as an escape.
        text = json.dumps(spec).replace("<", "\\u003c")
        here = Path(__file__).parent
        style, script = (
            (here / f"bounds.{end}").read_text(encoding="utf-8") for end in ("css", "js")
        )
        sliders = "".join(self._slider(*one) for one in _SLIDERS)
        read = " · ".join(
            f"{what} " + " to ".join(f'<b data-name="{name}"></b>' for name in names)
            for what, names in _READOUT
        )
        return (
            f'<div id="{mark}" class="tvlens-bounds"><style>{style}</style><form>{sliders}</form>'
            f'<p>{read}</p><p class="failed" hidden>{_FAILED}</p><div class="plot"></div></div>'
            f"<script>(() => {{\n{script}\n"
            f"explore(document.getElementById({mark!r}), {text});\n}})();</script>"
        )

    def _slider(self, key: str, low: int | float, high: int | float, step: str, what: str) -> str:
        value = getattr(self, key)
        at = repr(float(np.log10(value))) if key == "epsilon" else repr(value)
        high = self.length if key == "n_irrelevant" else high
        return (
            f'<label>{what}<output></output><input type="range" name="{key}" min="{low}" max="{high}" '
            f'step="{step}" value="{at}"></label>'
        )


def bounds_explorer(
    length: int = 8,
    n_irrelevant: int = 1,
    *,
    n_classes: int = 10,
    epsilon: float = 1e-3,
    b: float = 1.0,
    label_noise: float = 0.001,
) -> BoundsExplorer:
    """Explore with six sliders when in-context learning pays, and until when.

    Args:
        length: Items in the context, 1 to 16; like all others, what its slider shows at first.
        n_irrelevant: How many of them are of another class than the query.
        n_classes: How many classes there are, 2 to 100.
        epsilon: The least probability that the in-context predictor gives a class, 1e-6 to 1e-2.
        b: Similarities lie within plus and minus sqrt(b); 0 to 4.
        label_noise: Share of labels, in context and query, that are shifted to the next class; 0 to .5.

    Returns:
        What shows itself in a notebook, and writes itself to a file with ``save(path)``.

    Raises:
        ValueError: A number outside its slider, or more irrelevant items than items.
        TypeError: A count that is no whole number.

    Example:
        >>> explorer = bounds_explorer(length=4, n_irrelevant=2)
        >>> float(explorer.data["crossover"].sel(end="high").round())
        19.0

    References:
        Chan et al. 2025, arXiv:2410.23042, Figure 1.
    """
    made = BoundsExplorer(length, n_irrelevant, n_classes, epsilon, b, label_noise)
    for key, low, high, _, what in _SLIDERS:
        if key == "epsilon":
            low, high = 10**low, 10**high
        if not low <= getattr(made, key) <= high:
            raise ValueError(
                f"the slider of {key} ({what}) goes from {low:g} to {high:g}; {getattr(made, key)} arrived."
            )
    in_context_bounds(
        length, n_irrelevant, n_classes, epsilon, b
    )  # refuses what contradicts itself
    return made
