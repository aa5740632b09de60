"""What a test of decodability found: what vectors say in words, beside what they make the model do."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from tvlens.experiments._readout import answers_above
from tvlens.intervals import accuracy, bootstrap
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

WORDS = 20
"""Words of a row of the paper's table."""


class Decodability(Result):
    """What `decodability` found for several tasks: ranks of answers under thetas, and what thetas do."""

    kind: ClassVar[str] = "decodability"
    references: ClassVar[tuple[str, ...]] = (
        "nadaf2026steerable",
        "hendel2023context",
        "nostalgebraist2020interpreting",
        "wilson1927",
    )
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rank": ("task", "half", "layer", "token"),
        "shown": ("task", "half", "token"),
        "member": ("task", "token"),
        "asked": ("task", "half", "part", "token"),
        "auc": ("task", "other", "layer", "part"),
        "auc_random": ("draw", "task", "layer", "part"),
        "share": ("task", "other", "layer"),
        "share_random": ("task", "layer"),
        "top_token": ("task", "layer", "place"),
        "steer": ("task", "layer", "prompt"),
        "steer_random": ("task", "layer", "prompt"),
        "bare": ("task", "prompt"),
        "query": ("task", "prompt"),
        "split": ("prompt",),
    }
    table: ClassVar[tuple[str, ...]] = ("steer", "steer_random", "bare")
    method: ClassVar[str] = (
        "A task's answers are cut into halves, such that no first token is accepted in both. Mean theta is "
        "made from prompts of one half; its queries, demonstrations and dummy queries hold no answer of the "
        "other, and both halves take turns. Steerable: theta replaces the residual stream at the last token "
        "of bare queries that have those unseen answers, at the layer that is best for this on dev queries. "
        "Decodable: the same vector goes through the final norm and the unembedding; AUC is the chance that "
        "the first token of an unseen answer ranks above one of another task's answers, tokens that occur in "
        "theta's own prompts left out; where a theta is judged on another task's answers, those of its own "
        "task are left out of what they are compared with. Best AUC: at the layer that is best for reading, "
        "chosen on dev answers. Both are reported on test answers. Controls: thetas of the other tasks (task "
        "labels shuffled; three tasks or more) and random directions, for the best AUC with a layer chosen "
        "in the same way; for steering, random vectors of the same norm, one for each query, and the bare "
        "query. Intervals, 95 %: bootstrap over answers for AUC, Wilson for accuracies. A task counts as "
        "decodable if the interval of its AUC lies above 0.5 and above the mean "
        "of other tasks' thetas, and the AUC above 95 % of random directions; as steerable if the bootstrap "
        "interval of its gain over each of random vector and bare query lies above 0."
    )

    @property
    def title(self) -> str:
        """How many tasks, and the model."""
        made = self.provenance
        return f"Decodable and steerable: {self.data.sizes['task']} tasks on {made['model']}"

    @property
    def lens(self) -> str:
        """How theta was read out: ``"logit"`` or ``"tuned"``."""
        return str(self.provenance["lens"])

    def decode_layers(self) -> xr.DataArray:
        """Give each task's layer with the highest AUC of dev answers, the lowest such."""
        dev = _diagonal(self.data["auc"].sel(part="dev"))
        return dev["layer"][dev.fillna(-1).argmax("layer")].reset_coords(drop=True)

    def steer_layers(self) -> xr.DataArray:
        """Give each task's layer at which theta answers most dev queries, the lowest such."""
        dev = self.data["steer"].isel(prompt=np.flatnonzero(self.data["split"].values == "dev"))
        return self.data["layer"][dev.mean("prompt").argmax("layer")].reset_coords(drop=True)

    def each(self, task: str, *, part: str = "test") -> Float[np.ndarray, "answer layer"]:
        """Give, for each unseen answer of a task, the share of other tasks' answers it ranks above.

        Args:
            task: Which task.
            part: ``"dev"`` or ``"test"`` answers.

        Returns:
            The shares; their mean over answers is the AUC.
        """
        one = self.data.sel(task=task)
        rank, asked = one["rank"], one["asked"].sel(part=part)
        return answers_above(
            rank.transpose("half", "layer", "token").values,
            asked.transpose("half", "token").values,
            ~one["member"].values,
            one["shown"].transpose("half", "token").values,
        )

    def rates(self) -> pd.DataFrame:
        """Say for each task how decodable and how steerable theta is, with controls.

        Returns:
            By task: family; ``steer`` with its interval, ``steer_random``, ``bare``, ``steer_layer``; at that
            layer ``auc`` with its interval, ``auc_other`` (mean over the other tasks' thetas;
            NaN of two tasks, since there is no third one to judge against),
            ``auc_random`` (mean of random directions) and ``auc_random_high`` (their 95 % quantile), and
            ``share`` of the top tokens that are answers or words of the task, with ``share_other`` and
            ``share_random``; the same of ``auc_best``, at ``decode_layer``; ``answers``, how many unseen
            ones there are; ``steerable``, ``decodable`` (at the layer that steers) and ``decodable_best``.
        """
        rows = {}
        decode, steer = self.decode_layers(), self.steer_layers()
        for name in map(str, self.data["task"].values):
            at, best = int(steer.sel(task=name)), int(decode.sel(task=name))
            each = self.each(name)
            rows[name] = {
                "family": str(self.data["family"].sel(task=name).values),
                **self._steered(name, at),
                **self._decoded("auc", name, each[:, at], at),
                **self._shares(name, at),
                **self._decoded("auc_best", name, each[:, best], best),
                "decode_layer": best,
                "answers": len(each),
            }
            for found, area in (("decodable", "auc"), ("decodable_best", "auc_best")):
                rows[name][found] = _above(rows[name], area)
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")

    def _decoded(
        self, area: str, name: str, each: Float[np.ndarray, " answer"], at: int
    ) -> dict[str, float]:
        low, high = bootstrap(each) if len(each) and not np.isnan(each).any() else (np.nan, np.nan)
        own, random = self.data["auc"].sel(other=name), self.data["auc_random"].sel(task=name)
        others = own.isel(task=np.flatnonzero(self.data["task"].values != name))
        if area == "auc":
            shuffled, drawn = (one.sel(part="test", layer=at) for one in (others, random))
        else:
            shuffled, drawn = _chosen(others), _chosen(random)
        return {
            area: float(own.sel(part="test", task=name, layer=at)),
            f"{area}_low": low,
            f"{area}_high": high,
            f"{area}_other": float(shuffled.mean()),
            f"{area}_random": float(drawn.mean()),
            f"{area}_random_high": float(np.quantile(drawn.values, 0.95)),
        }

    def _shares(self, name: str, at: int) -> dict[str, float]:
        share = self.data["share"].sel(other=name, layer=at)
        others = np.flatnonzero(self.data["task"].values != name)
        return {
            "share": float(share.sel(task=name)),
            "share_other": float(share.isel(task=others).mean()),
            "share_random": float(self.data["share_random"].sel(task=name, layer=at)),
        }

    def _steered(self, name: str, at: int) -> dict[str, Any]:
        one = self.data[["steer", "steer_random", "bare"]].sel(task=name, layer=at)
        rate = accuracy(one, "steer")
        test = one.isel(prompt=np.flatnonzero(one["split"].values == "test")).dropna("prompt")
        gains = [bootstrap((test["steer"] - test[c]).values)[0] for c in ("steer_random", "bare")]
        return {
            "steer": float(rate["accuracy"]),
            "steer_low": float(rate["low"]),
            "steer_high": float(rate["high"]),
            "steer_random": float(accuracy(one, "steer_random")["accuracy"]),
            "bare": float(accuracy(one, "bare")["accuracy"]),
            "steer_layer": at,
            "steerable": min(gains) > 0,
        }

    def words(self, *, after: int = 2, n: int = WORDS) -> pd.DataFrame:
        """Give the paper's table: the words that theta promotes some layers after the best one.

        Args:
            after: How many layers after the one that steers best.
            n: How many words.

        Returns:
            By task: ``layer`` and ``words``, those among the top 100 tokens that are plain letters, each once
            however it is capitalised.

        References:
            Hendel, Geva, Globerson 2023, arXiv:2310.15916, table 4.
        """
        last, rows = int(self.data["layer"][-1]), {}
        for name in map(str, self.data["task"].values):
            at = min(int(self.steer_layers().sel(task=name)) + after, last)
            tokens = self.data["top_token"].sel(task=name, layer=at).values
            plain = [str(t).strip() for t in tokens if re.fullmatch("[a-zA-Z]+", str(t).strip())]
            once = {word.lower(): word for word in reversed(plain)}
            kept = [word for word in plain if once[word.lower()] == word]
            rows[name] = {"layer": at, "words": ", ".join(list(dict.fromkeys(kept))[:n])}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")

    def curves(self) -> xr.Dataset:
        """Give decodability and steering by task and layer, with controls.

        Returns:
            ``auc, auc_low, auc_high, auc_other, auc_random, steer, steer_low, steer_high, steer_random`` by
            task and layer; ``bare``, ``decode_layer`` and ``steer_layer`` by task. All of test answers.
        """
        auc = self.data["auc"].sel(part="test", drop=True)
        others = auc.where(auc["task"] != auc["other"]).mean("task").rename(other="task")
        table = {
            "auc": _diagonal(auc),
            "auc_other": others,
            "auc_random": self.data["auc_random"].sel(part="test", drop=True).mean("draw"),
            "decode_layer": self.decode_layers(),
            "steer_layer": self.steer_layers(),
        }
        parts = [self._curve(name) for name in map(str, self.data["task"].values)]
        found = xr.Dataset(table).reset_coords(drop=True)
        return found.merge(xr.concat(parts, found["task"])).assign_attrs(self.data.attrs)

    def _curve(self, name: str) -> xr.Dataset:
        one, each = self.data.sel(task=name), self.each(name)
        whole = len(each) and not np.isnan(each).any()
        low, high = bootstrap(each) if whole else np.full((2, one.sizes["layer"]), np.nan)
        rate = accuracy(one, "steer")
        return xr.Dataset(
            {
                "auc_low": ("layer", low),
                "auc_high": ("layer", high),
                "steer": rate["accuracy"],
                "steer_low": rate["low"],
                "steer_high": rate["high"],
                "steer_random": accuracy(one, "steer_random")["accuracy"],
                "bare": accuracy(one, "bare")["accuracy"],
            }
        ).reset_coords(drop=True)

    def finding(self) -> str:
        """How many tasks are steerable, and how many of these can be read off."""
        table: Any = self.rates()
        steers, n = table[table["steerable"]], len(table)
        read, later = int(steers["decodable"].sum()), int(steers["decodable_best"].sum())
        name = "tuned lens" if self.lens == "tuned" else "vocabulary projection"
        mean = table.select_dtypes("number").mean()
        others, best_others = (
            f"other tasks' thetas {mean[name]:.2f}" if mean[name] == mean[name] else "no third task"
            for name in ("auc_other", "auc_best_other")
        )
        return (
            f"Theta steers {len(steers)} of {n} tasks towards answers it has not seen; in {read} of these "
            f"{len(steers)} the {name} of the same vector ranks those answers above other tasks', at the "
            f"best layer for reading in {later}. Means: accuracy {mean['steer']:.2f} (random "
            f"{mean['steer_random']:.2f}); AUC {mean['auc']:.2f} where it steers, layer "
            f"{table['steer_layer'].median():.0f} ({others}, random "
            f"{mean['auc_random']:.2f}), and {mean['auc_best']:.2f} at layer "
            f"{table['decode_layer'].median():.0f} ({best_others})."
        )

    def summary(self) -> dict[str, Any]:
        """Means over tasks, and how many are decodable and steerable."""
        table: Any = self.rates()
        steerable, decodable = table["steerable"], table["decodable"]
        means = {
            name: float(table[name].mean())
            for name in ("steer", "steer_random", "bare", "auc", "auc_other", "auc_random", "share",
                         "share_other", "share_random", "auc_best", "auc_best_other")
        }  # fmt: skip
        return {
            "model": self.provenance["model"],
            "lens": self.lens,
            "n_tasks": len(table),
            **{name: value if value == value else None for name, value in means.items()},
            "steerable": int(steerable.sum()),
            "decodable": int(decodable.sum()),
            "steerable_not_decodable": int((steerable & ~decodable).sum()),
            "decodable_not_steerable": int((decodable & ~steerable).sum()),
            "decodable_somewhere": int(table["decodable_best"].sum()),
            "seconds": self.provenance["seconds"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Rates by task, and what theta says two layers after the one that steers best."""
        return {"Decodable and steerable": self.rates(), "What theta says": self.words()}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw steering against decoding; see `tvlens.plots.decodability.steer_and_decode`."""
        from tvlens.plots.decodability import steer_and_decode

        words = self.words().drop(columns="layer")
        table = self.rates().join(words).reset_index()
        return steer_and_decode(table, **({"title": self.finding()} | channels))

    def figures(self) -> "dict[str, go.Figure]":
        """Steering against decoding, both by layer, and what theta says."""
        from tvlens.plots.decodability import decode_by_layer, word_table

        curves = self.curves().assign_attrs(finding=self.finding())
        return {
            "Steerable and decodable": self.plot(),
            "By layer": decode_by_layer(curves),
            "What theta says": word_table(self.words().reset_index()),
        }


def _above(row: Mapping[str, Any], area: str) -> bool:
    """Whether an AUC passes chance and its controls."""
    # Of two tasks there is no third one against which the other's theta could be judged.
    passes = row[f"{area}_low"] > np.nanmax([0.5, row[f"{area}_other"]])
    return bool(passes and row[area] > row[f"{area}_random_high"])


def _chosen(area: xr.DataArray) -> xr.DataArray:
    """AUC of test answers at the layer that dev answers choose."""
    best = area.sel(part="dev").fillna(-1).argmax("layer")
    return area.sel(part="test", drop=True).isel(layer=best)


def _diagonal(auc: xr.DataArray) -> xr.DataArray:
    """What each task's own theta does for it."""
    names = xr.DataArray(auc["task"].values, dims="task", coords={"task": auc["task"].values})
    return auc.sel(task=names, other=names).reset_coords("other", drop=True)
