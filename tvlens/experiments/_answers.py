"""What `whole_answers` found: each answer judged by its first token and as a whole."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from tvlens.intervals import over_tasks, wilson
from tvlens.results import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RUNS = ("regular", "theta", "random", "baseline")
JUDGED = ("first", "begins", "exact")
_ASKED = ("task", "run", "prompt")


class WholeAnswers(Result):
    """Outcomes of prompts judged by first token and by whole answer, in every run."""

    kind: ClassVar[str] = "whole_answers"
    references: ClassVar[tuple[str, ...]] = ("hendel2023context", "wilson1927", "efron1979")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **{
            name: _ASKED
            for name in (*JUDGED, "stopped", "n_tokens", "log_prob", "text", "likeliest")
        },
        "query": ("task", "prompt"),
        "layer": ("task",),
    }
    table: ClassVar[tuple[str, ...]] = (*JUDGED, "stopped", "n_tokens", "log_prob", "text")
    method: ClassVar[str] = (
        "The model goes on by itself, greedily, until the text that follows an answer in the template, EOS "
        "or two tokens more than the longest accepted answer has. first: its first token begins an accepted "
        "answer; begins: its text begins with one; exact: its text is one. regular: demonstrations stand in "
        "the prompt. All other runs are zero-shot prompts: theta of the prompt's own demonstrations replaces "
        "the residual stream at the prompt's last token, at every step and in no new token, at the layer that"
        " answers most dev queries by first token unless one was given; random: a random vector as long as "
        "theta; baseline: nothing. log_prob: of all tokens of the likeliest accepted answer, in nats; answers"
        " of several tokens are those where this one has several, which can differ from run to run. Wilson "
        "95 % intervals count distinct queries; those of means over tasks draw each task's queries again."
    )

    @property
    def title(self) -> str:
        """How many tasks, and the model."""
        n = self.data.sizes["task"]
        on = f"{n} tasks" if n > 1 else str(self.data["task"].values[0])
        return f"First token and whole answer: {on} on {self.provenance['model']}"

    def rates(self) -> "pd.DataFrame":
        """Give the accuracies of every run.

        Returns:
            One row per task and run: task, run, layer; first, begins and exact, each with ``_low`` and
            ``_high`` of its 95 % interval (Wilson); n_queries (distinct); stopped (share of texts that came
            to an end by themselves); several (share of prompts whose likeliest accepted answer has several
            tokens); first_several and exact_several with intervals (among those; NaN where there are none);
            log_prob (mean, in nats) and log_prob_token (mean, in nats a token).
        """
        import pandas as pd

        data = self.data.transpose(*_ASKED)
        rows = []
        for i, task in enumerate(data["task"].values.tolist()):
            asked, layer = data["query"].values[i], int(data["layer"].values[i])
            for j, run in enumerate(data["run"].values.tolist()):
                one = {
                    str(name): values.values[i, j]
                    for name, values in data.items()
                    if "run" in values.dims
                }
                rows.append({"task": task, "run": run, "layer": layer} | _rates(one, asked))
        return pd.DataFrame(rows)

    def means(self) -> "pd.DataFrame":
        """Give means over the tasks.

        Returns:
            One row per run, and one for ``regular - theta``: run; first, begins, exact and lost (first less
            exact), each with ``_low`` and ``_high`` of an interval that draws every task's queries
            again, its prompts in all runs together.
        """
        import pandas as pd

        data = self.data.transpose("task", "prompt", "run")
        first, begins, exact = (data[name].values.astype(float) for name in JUDGED)
        kinds = np.stack([first, begins, exact, first - exact], axis=-1)
        at = [data["run"].values.tolist().index(name) for name in ("regular", "theta")]
        gap = kinds[:, :, at[:1]] - kinds[:, :, at[1:]]
        each = np.concatenate([kinds, gap], axis=2)
        names = [*data["run"].values.tolist(), "regular - theta"]
        flat = each.reshape(*each.shape[:2], -1)[None]
        low, high = over_tasks(flat, data["query"].transpose("task", "prompt").values[None])
        ends = dict(zip(("", "_low", "_high"), (flat.mean(axis=(0, 1, 2)), low, high), strict=True))
        columns = {
            f"{name}{end}": values.reshape(len(names), -1)[:, k]
            for k, name in enumerate((*JUDGED, "lost"))
            for end, values in ends.items()
        }
        return pd.DataFrame({"run": names, **columns})

    def summary(self) -> dict[str, Any]:
        """Means over the tasks by first token and by whole answer, and what is lost between them."""
        made, flat = self.provenance, dict[str, Any]()
        for row in self.means().to_dict("records"):
            run = str(row.pop("run")).replace("regular - theta", "gap")
            flat |= {f"{run}_{name}": float(value) for name, value in row.items()}
        several: Any = self.data["n_tokens"].sel(run="regular") > 1
        return {
            "model": made["model"],
            "n_tasks": self.data.sizes["task"],
            "n_test": self.data.sizes["prompt"],
            **flat,
            "several": float(several.mean()),
            "seconds": made["seconds"],
        }

    def finding(self) -> str:
        """The result in one sentence."""
        s = self.summary()
        return (
            f"Demonstrations get {s['regular_exact']:.2f} of whole answers right "
            f"({s['regular_first']:.2f} by first token), theta {s['theta_exact']:.2f} "
            f"({s['theta_first']:.2f}), a random vector {s['random_exact']:.2f} ({s['random_first']:.2f}): "
            f"from first token to whole answer theta loses {s['theta_lost']:.2f} "
            f"[{s['theta_lost_low']:.2f}, {s['theta_lost_high']:.2f}], but begins with the whole answer in "
            f"{s['theta_begins']:.2f}; demonstrations lose {s['regular_lost']:.2f} "
            f"[{s['regular_lost_low']:.2f}, {s['regular_lost_high']:.2f}]."
        )

    def tables(self) -> "dict[str, pd.DataFrame]":
        """Accuracies with intervals, among answers of several tokens too, and how answers end."""
        rates: Any = self.rates().set_index("task")
        ends = ("", "_low", "_high")
        several = [f"{name}_several{end}" for name in ("first", "exact") for end in ends]
        return {
            "Mean over tasks": self.means().set_index("run"),
            "Accuracy by task and run": rates[
                ["run", "layer", *(f"{name}{end}" for name in JUDGED for end in ends), "n_queries"]
            ],
            "Answers of several tokens": rates[rates["several"] > 0][["run", "several", *several]],
            "How texts end, and log probability of the likeliest accepted answer": rates[
                ["run", "stopped", "log_prob", "log_prob_token"]
            ],
        }

    def drawn(self) -> xr.Dataset:
        """Give what the figure shows: rates by task and run."""
        table = self.rates().set_index(["task", "run"]).to_xarray()
        order = {name: self.data[name].values for name in ("task", "run")}
        return table.reindex(order).assign_attrs(self.data.attrs | {"finding": self.finding()})

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw paired bars, see `tvlens.plots.answers.answer_bars`."""
        from tvlens.plots.answers import answer_bars

        return answer_bars(self.drawn(), **channels)


def _rates(one: Mapping[str, np.ndarray], asked: np.ndarray) -> dict[str, float]:
    """Accuracies of one run on one task."""
    several = one["n_tokens"] > 1
    everything = np.full(len(asked), True)
    row: dict[str, float] = {}
    for name in JUDGED:
        row |= _share(name, one[name], asked, everything)
    row |= {"n_queries": len(set(asked.tolist())), "stopped": float(one["stopped"].mean())}
    row["several"] = float(several.mean())
    for name in ("first", "exact"):
        row |= _share(f"{name}_several", one[name], asked, several)
    per_token = one["log_prob"] / one["n_tokens"]
    return row | {
        "log_prob": float(one["log_prob"].mean()),
        "log_prob_token": float(per_token.mean()),
    }


def _share(name: str, right: np.ndarray, asked: np.ndarray, which: np.ndarray) -> dict[str, float]:
    """The share of some prompts that are right, and its interval."""
    n = len(set(asked[which].tolist()))
    rate = float(right[which].mean()) if n else float("nan")
    low, high = wilson(rate * n if n else 0.0, n)
    return {name: rate, f"{name}_low": low, f"{name}_high": high}
