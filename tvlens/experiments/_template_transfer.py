"""What came of theta made in one template and used in another."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from tvlens._words import fixed
from tvlens.intervals import over_tasks
from tvlens.results import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class TemplateTransfer(Result):
    """What `template_transfer` found: outcomes by task, template it was made in, used in, and prompt."""

    kind: ClassVar[str] = "template_transfer"
    references: ClassVar[tuple[str, ...]] = ("hendel2023context", "todd2024function")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hypothesis": ("task", "made", "used", "prompt"),
        "control": ("task", "made", "used", "prompt"),
        "baseline": ("task", "used", "prompt"),
        "regular": ("task", "used", "prompt"),
        "dev": ("task", "made", "used", "layer"),
        "best_layer": ("task", "made", "used"),
        "query": ("task", "prompt"),
    }
    table: ClassVar[tuple[str, ...]] = ("hypothesis", "control")
    method: ClassVar[str] = (
        "Theta is read in prompts of one template and replaces the residual stream at the last token of bare "
        "queries in another, at the layer that is best for this pair on dev queries in the template where it "
        "is used. The same test queries are asked in all templates, judged by first token; where a template "
        "cannot judge a query, it is left out wherever theta is made or used in it. Control: random vectors "
        "of the same norm at the same layer and place. Baseline: the bare query; regular: demonstrations, "
        "both in the template of the column. Intervals, 95 %: percentile bootstrap over distinct queries "
        "within each task, and Wilson's for accuracies of 0 and 1."
    )

    @property
    def templates(self) -> list[str]:
        """The templates, as they were named."""
        return [str(name) for name in self.data["used"].values]

    @property
    def title(self) -> str:
        """How many templates, on what."""
        tasks = [str(name) for name in self.data["task"].values]
        on = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
        n = len(self.templates)
        return f"Theta between {n} template{'s' * (n != 1)}: {on} on {self.provenance['model']}"

    def means(self) -> xr.Dataset:
        """Average over tasks and prompts.

        Returns:
            ``hypothesis, control`` by made and used and ``baseline, regular`` by used, each with ``_low``
            and ``_high``; ``best_layer``, the median over tasks.
        """
        queries = self.data["query"].transpose("task", "prompt").values[None]
        found = {}
        for name in ("hypothesis", "control", "baseline", "regular"):
            one = self.data[name].transpose("task", "prompt", ...)
            values = one.values.astype(float)
            flat = values.reshape(1, *values.shape[:2], -1)
            parts = (np.nanmean(flat[0], axis=1).mean(axis=0), *over_tasks(flat, queries))
            for ending, part in zip(("", "_low", "_high"), parts, strict=True):
                found[name + ending] = (one.dims[2:], part.reshape(values.shape[2:]))
        layer = self.data["best_layer"].median("task")
        return xr.Dataset(
            {**found, "best_layer": layer}, coords={k: self.templates for k in _SIDES}
        )

    def matrix(self) -> "pd.DataFrame":
        """Accuracy with theta, made (rows) by used (columns)."""
        found: Any = self.means()["hypothesis"].to_pandas()
        return found

    def by_template(self) -> "pd.DataFrame":
        """Compare the templates.

        Returns:
            One row per template: baseline, regular and own (theta made and used there), each with ``_low``
            and ``_high``; control; of_regular, own as a share of regular; own_layer; used (mean of theta
            from the other templates) and made (mean of its theta in the others); NaN where there are none.
        """
        import pandas as pd

        means = self.means()
        theta = means["hypothesis"].values
        table = pd.DataFrame(index=pd.Index(self.templates, name="template"))
        for name in ("baseline", "regular"):
            for ending in ("", "_low", "_high"):
                table[name + ending] = means[name + ending].values
        for ending in ("", "_low", "_high"):
            table[f"own{ending}"] = np.diag(means[f"hypothesis{ending}"].values)
        table["control"] = np.diag(means["control"].values)
        with np.errstate(invalid="ignore", divide="ignore"):
            table["of_regular"] = table["own"] / table["regular"]
        table["own_layer"] = np.diag(means["best_layer"].values)
        away = np.where(np.eye(len(theta), dtype=bool), np.nan, theta)
        for axis, name in enumerate(("used", "made")):
            n = max(len(theta) - 1, 1)
            table[name] = np.nansum(away, axis=axis) / n if len(theta) > 1 else np.nan
        return table

    def finding(self) -> str:
        """Own against other templates, and which side decides."""
        table, s = self.by_template(), self.summary()
        said = f"Theta answers {s['own']:.2f} of bare queries in the template it was made in"
        if len(table) == 1:
            return f"{said} (regular {s['regular']:.2f}, random vector {s['control']:.2f})."
        more = "more" if s["by_used"] > s["by_made"] else "less"
        return (
            f"{said} and {s['other']:.2f} in others (regular {s['regular']:.2f}, random vector "
            f"{s['control']:.2f}); where it is used moves that {more} than where it was made: between "
            f"templates by {s['by_used']:.2f}, against {s['by_made']:.2f}."
        )

    def summary(self) -> dict[str, Any]:
        """Means over templates; how far accuracy moves with each side, as a range of means."""
        means = self.means()
        theta = means["hypothesis"].values
        own = np.eye(len(theta), dtype=bool)
        return {
            "model": self.provenance["model"],
            "n_tasks": self.data.sizes["task"],
            "n_templates": len(theta),
            "own": float(theta[own].mean()),
            "other": float(theta[~own].mean()) if len(theta) > 1 else None,
            **{name: float(means[name].mean()) for name in ("control", "baseline", "regular")},
            "by_used": float(np.ptp(theta.mean(axis=0))),
            "by_made": float(np.ptp(theta.mean(axis=1))),
            "seconds": self.provenance["seconds"],
        }

    def tables(self) -> "dict[str, pd.DataFrame]":
        """The matrix, with intervals in words, and the templates."""
        means = self.means()
        parts = [means[f"hypothesis{end}"].values for end in ("", "_low", "_high")]
        said = np.vectorize(lambda a, b, c: f"{fixed(a, 2)} ({fixed(b, 2)} to {fixed(c, 2)})")(
            *parts
        )
        matrix = self.matrix().astype(object)
        matrix.loc[:, :] = said
        control: Any = means["control"].to_pandas()
        return {
            "Accuracy with theta: made in (rows), used in (columns)": matrix,
            "The same with a random vector": control,
            "Templates": self.by_template(),
        }

    def drawn(self) -> xr.Dataset:
        """Give what the figure shows: `means`, with the finding."""
        return self.means().assign_attrs(self.data.attrs | {"finding": self.finding()})

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the matrix, see `tvlens.plots.template_transfer.template_matrix`."""
        from tvlens.plots.template_transfer import template_matrix

        return template_matrix(self.drawn(), **channels)


_SIDES = ("made", "used")
