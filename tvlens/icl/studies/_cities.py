"""What a language model says that was told something else than it knows, and where that was decided."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from tvlens.icl.studies._cities_data import GROUP, Pairs
from tvlens.icl.studies._cities_where import DIRECTIONS, HOWS, PLACES
from tvlens.intervals import bootstrap, wilson
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

ARMS = ("adamw", "sgd", "rehearsed")
NAMES = ("trained", "untouched", "real", "invented", "authors", "own")
_ENDS = ("", "_low", "_high")
_TOLD = ("arm", "step", "wording", "name", "context")
_BARE = ("arm", "step", "name")


class Cities(Result):
    """Log probabilities by arm, checkpoint, name and stated city; effects of patches and grafts."""

    kind: ClassVar[str] = "icl_cities"
    references: ClassVar[tuple[str, ...]] = ("chan2025toward",)
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("log_prob_stated", "log_prob_memorised", "said", "written"), _TOLD),
        **dict.fromkeys(("bare_log_prob", "bare_said", "bare_written"), _BARE),
        "retained": ("arm", "step", "measure"),
        "clean": ("weights", "name"),
        "patched": ("direction", "place", "layer", "name"),
        "grafted": ("how", "part", "name"),
        "recalled": ("how", "part", "name"),
        **dict.fromkeys(("kind", "origin", "city", "group", "position"), ("name",)),
    }
    table: ClassVar[tuple[str, ...]] = ("log_prob_stated", "log_prob_memorised", "said", "written")
    method: ClassVar[str] = (
        "All weights are trained on the answer's tokens after the bare question (embedding and "
        "unembedding, tied in SmolLM2, apart). Whole answers are scored: the log probabilities of all "
        "tokens of each of the eight cities of a name's group. A model follows its context where the "
        "stated city is the likeliest of the eight; the matrix's diagonal, where the stated city is the "
        "memorised one, is left out. Intervals are bootstrapped over names. Untouched names have a city "
        "of their own that is never trained. Patches and grafts are judged by the log odds of stated "
        "against memorised city at the first token in which they differ, in the last wording listed."
    )

    @property
    def title(self) -> str:
        """Model and number of pairs."""
        return f"Cities by heart: {self.provenance['model']}, {self._names('trained').sum()} pairs"

    def _names(self, which: str) -> np.ndarray:
        """Which names are meant: ``trained``, ``untouched``, ``real``, ``invented``, ``authors``, ``own``."""
        untouched = self.data["origin"].values == "control"
        if which in ("trained", "untouched"):
            return untouched if which == "untouched" else ~untouched
        if which in ("authors", "own"):
            return self.data["origin"].values == which
        return ~untouched & (self.data["kind"].values == which)

    def conflicts(self, arm: str, wording: str = "same") -> xr.Dataset:
        """Give outcomes of all conflict prompts of an arm; NaN on the diagonal.

        Args:
            arm: ``"adamw"``, ``"sgd"`` or ``"rehearsed"``.
            wording: ``"same"`` or ``"other"``.

        Returns:
            ``delta``, log p(stated) - log p(memorised) of whole answers in nats; ``pairwise``, whether it is
            above zero; ``follows``, whether the stated city is the likeliest of eight; ``recalls``, whether
            the memorised one is; ``writes``, whether greedy decoding writes the stated one; by step, name and
            context.
        """
        one = self.data.sel(arm=arm, wording=wording)
        off = one["position"] != one["context"]
        delta = (one["log_prob_stated"] - one["log_prob_memorised"]).where(off)
        outcomes = {
            "pairwise": delta > 0,
            "follows": one["said"] == one["context"],
            "recalls": one["said"] == one["position"],
            "writes": one["written"] == one["context"],
        }
        known = {name: value.astype(float).where(off) for name, value in outcomes.items()}
        return xr.Dataset({"delta": delta, **known})

    def rates(self) -> pd.DataFrame:
        """Give shares with their intervals.

        Returns:
            One row for each arm, wording, step and set of names (``trained``, ``untouched``, ``real``,
            ``invented``, ``authors``, ``own``): ``delta, pairwise, follows, recalls, writes`` each with
            ``_low`` and ``_high``, bootstrapped over names; ``bare``, the share of bare questions that get
            the memorised city as the likeliest of eight, and ``bare_written``, that is written greedily.
        """
        return self._rates.copy()

    @cached_property
    def _rates(self) -> pd.DataFrame:
        rows = []
        sets = {which: self._names(which) for which in NAMES}
        for arm, wording in product(
            self.data["arm"].values.tolist(), self.data["wording"].values.tolist()
        ):
            means = self.conflicts(arm, wording).mean("context").transpose("name", "step")
            for which, chosen in sets.items():
                if not chosen.any():
                    continue
                ends = {
                    str(name): _interval(values.values[chosen]) for name, values in means.items()
                }
                for k, step in enumerate(means["step"].values.tolist()):
                    row = {"arm": arm, "wording": wording, "step": step, "names": which}
                    for name, (mean, low, high) in ends.items():
                        row |= {name: mean[k], f"{name}_low": low[k], f"{name}_high": high[k]}
                    rows.append(row | self._bare(arm, step, chosen))
        return pd.DataFrame(rows)

    def _bare(self, arm: str, step: int, chosen: np.ndarray) -> dict[str, float]:
        one = self.data.sel(arm=arm, step=step).isel(name=chosen)
        said, written = (one[x] == one["position"] for x in ("bare_said", "bare_written"))
        return {"bare": float(said.mean()), "bare_written": float(written.mean())}

    def memorised_at(self, arm: str) -> int | None:
        """First checkpoint at which every bare question is answered with the memorised city, greedily."""
        one = self.data.sel(arm=arm).isel(name=self._names("trained"))
        known = (one["bare_written"] == one["position"]).all("name")
        return int(one["step"].values[known.values.argmax()]) if bool(known.any()) else None

    def difference(self, arm: str, wording: str = "same") -> tuple[float, float, float]:
        """Compare real with invented names at the last checkpoint.

        Args:
            arm: The arm.
            wording: The wording.

        Returns:
            Share of conflicts in which real names' contexts are followed less that of invented ones, and
            the ends of a bootstrap interval over names.
        """
        last = self.conflicts(arm, wording)["follows"].mean("context").isel(step=-1)
        real, invented = (last.values[self._names(kind)] for kind in ("real", "invented"))
        rng = np.random.default_rng(0)
        draws = [
            rng.choice(real, len(real)).mean() - rng.choice(invented, len(invented)).mean()
            for _ in range(2000)
        ]
        low, high = np.quantile(draws, (0.025, 0.975))
        return float(real.mean() - invented.mean()), float(low), float(high)

    def criteria(self) -> pd.DataFrame:
        """Give what the experiment is to show, and whether it does, by arm and wording.

        Returns:
            ``base_follows`` in trained names' conflicts before training (at least 0.9 asked); ``bare``, share
            of bare questions answered at the end (1 asked); ``delta_base`` and ``delta_end``, with ``falls``;
            ``untouched_change`` of the share that follows (within 0.1 asked), ``untouched_writes_change`` of
            the share that greedy decoding writes; ``loss_change`` on prose.
        """
        table = self.rates()
        rows = []
        pairs = table[["arm", "wording"]].drop_duplicates().to_numpy().tolist()
        for arm, wording in pairs:
            some: Any = table[(table["arm"] == arm) & (table["wording"] == wording)]
            ours: Any = some[some["names"] == "trained"]
            first, last = ours.iloc[0], ours.iloc[-1]
            row = {"arm": arm, "wording": wording, "base_follows": first["follows"]}
            row |= {"bare": last["bare_written"]}
            row |= {"delta_base": first["delta"], "delta_end": last["delta"]}
            row |= {"falls": bool(last["delta"] < first["delta"]), "follows_end": last["follows"]}
            others: Any = some[some["names"] == "untouched"]
            for name, one in (("change", others["follows"]), ("writes_change", others["writes"])):
                row[f"untouched_{name}"] = one.iloc[-1] - one.iloc[0] if len(one) else np.nan
            prose = self.data["retained"].sel(arm=arm, measure="corpus loss")
            rows.append(row | {"loss_change": float(prose[-1] - prose[0])})
        return pd.DataFrame(rows)

    def effects(self) -> xr.Dataset:
        """Give log odds of stated against memorised city under patches and grafts, in nats.

        Returns:
            ``clean`` by weights, ``patched`` by direction, place and layer, ``grafted`` by how and part:
            means over trained names, with ``_low`` and ``_high`` bootstrapped over them; the same of
            untouched names, as ``untouched_clean`` and so on; ``recalled``, the share of trained names' bare
            questions that a graft answers by heart.
        """
        there = np.isfinite(self.data["clean"].values).all(axis=0)
        ours, others = self._names("trained") & there, self._names("untouched") & there
        found = {}
        for name in ("clean", "patched", "grafted"):
            one = self.data[name].transpose("name", ...)
            ends = _interval(one.values[ours].reshape(ours.sum(), -1)).reshape(3, *one.shape[1:])
            found |= {f"{name}{end}": (one.dims[1:], ends[i]) for i, end in enumerate(_ENDS)}
            n = others.sum() or np.nan
            found[f"untouched_{name}"] = (one.dims[1:], one.values[others].sum(axis=0) / n)
        found["recalled"] = self.data["recalled"].isel(name=ours).mean("name", skipna=False)
        labels = ("weights", "direction", "place", "layer", "how", "part")
        return xr.Dataset(found, coords={name: self.data[name] for name in labels})

    def finding(self) -> str:
        """How far the model still follows its context, and where the change sits."""
        table, said = self.rates(), []
        arm = str(self.data["arm"].values[0])
        for wording in map(str, self.data["wording"].values):
            some: Any = table[(table["arm"] == arm) & (table["wording"] == wording)]
            at = {str(which): one["follows"].tolist() for which, one in some.groupby("names")}
            written = some.loc[some["names"] == "untouched", "writes"].tolist()
            words = "the question's words" if wording == "same" else "other words"
            text = (
                f"told in {words}, {at['trained'][0]:.2f} before and {at['trained'][-1]:.2f} after"
            )
            text += f" (real {at['real'][-1]:.2f}, invented {at['invented'][-1]:.2f}"
            if "untouched" in at:
                text += f"; untouched names {at['untouched'][0]:.2f} and {at['untouched'][-1]:.2f}, and "
                text += f"written freely {written[0]:.2f} and {written[-1]:.2f}"
            said.append(f"{text})")
        n, step = int(self._names("trained").sum()), self.memorised_at(arm)
        learnt = f"known by heart at step {step}" if step is not None else "not all known by heart"
        return f"{n} cities {learnt}. Conflicts in which the context wins: {'; '.join(said)}."

    def summary(self) -> dict[str, Any]:
        """Criteria of the first arm, real against invented, and what was forgotten."""
        arm = str(self.data["arm"].values[0])
        flat: dict[str, Any] = {
            "model": self.provenance["model"],
            "memorised_at": self.memorised_at(arm),
        }
        known: Any = self.criteria()
        for row in known[known["arm"] == arm].to_dict("records"):
            wording = row["wording"]
            told = ("base_follows", "follows_end", "delta_base", "delta_end", "untouched_change")
            flat |= {f"{name} {wording}": row[name] for name in told}
            gap = self.difference(arm, wording)
            name = f"real less invented {wording}"
            flat |= dict(zip((name, f"{name}_low", f"{name}_high"), gap, strict=True))
        return super().summary() | flat | {"seconds": self.provenance["seconds"]}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Criteria, shares at both ends, what was retained, and where in the model the change sits."""
        rates: Any = self.rates()
        ends = rates[rates["step"].isin([rates["step"].min(), rates["step"].max()])]
        retained = self.data["retained"].isel(step=[0, -1]).to_dataframe().reset_index()
        return {
            "What the experiment is to show": self.criteria(),
            "Conflicts, before and after": ends.reset_index(drop=True),
            "Loss on prose, accuracy at tasks": retained,
            **self._where(),
        }

    def _where(self) -> dict[str, pd.DataFrame]:
        """Grafts, and the layer at which a patch of each place does most."""
        effects = self.effects()
        if not np.isfinite(effects["clean"].values).all():
            return {}
        names = [f"grafted{end}" for end in _ENDS]
        grafts: Any = (
            effects[[*names, "untouched_grafted", "recalled"]].to_dataframe().dropna(subset=names)
        )
        receives = {"tuned_into_base": "base", "base_into_tuned": "tuned"}
        rows = []
        for direction, place in product(DIRECTIONS, PLACES):
            one = effects.sel(direction=direction, place=place)
            clean = float(effects["clean"].sel(weights=receives[direction]))
            best = one.isel(layer=int(np.abs(one["patched"].values - clean).argmax()))
            rows.append(
                {
                    "direction": direction,
                    "place": place,
                    "layer": int(best["layer"]),
                    "clean": clean,
                }
                | {f"patched{end}": float(best[f"patched{end}"]) for end in _ENDS}
                | {"untouched_patched": float(best["untouched_patched"])}
            )
        return {
            "Grafted weights: log odds of the stated city, and share of bare questions known by heart": (
                grafts.reset_index()
            ),
            "Patched activations: log odds at the layer that moves them most": pd.DataFrame(rows),
        }

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw shares and log odds over steps; see `tvlens.plots.icl_cities.cities_curves`."""
        from tvlens.plots.icl_cities import cities_curves

        return cities_curves(self.rates(), **({"title": self.finding()} | channels))

    def figures(self) -> "dict[str, go.Figure]":
        """Curves, the matrix before and after, patches, grafts."""
        from tvlens.plots.icl_cities import cities_grafts, cities_matrix, cities_patches

        arm, wording = (str(self.data[x].values[i]) for x, i in (("arm", 0), ("wording", -1)))
        effects = self.effects()
        return {
            "Context against memory": self.plot(),
            "Matrix": cities_matrix(
                self.conflicts(arm, wording).isel(step=[0, -1], name=slice(0, GROUP))
            ),
            "Patches": cities_patches(effects),
            "Grafts": cities_grafts(effects),
        }


def _interval(values: Float[np.ndarray, "name column"]) -> Float[np.ndarray, "3 column"]:
    """Mean over names with its interval; Wilson's where all are 0 or all 1, NaN where one is missing."""
    missing = np.isnan(values).any(axis=0)
    known = np.where(missing, 0, values)
    found = np.stack([known.mean(axis=0), *bootstrap(known, n_resamples=1000)])
    for k in np.flatnonzero((known == known[0]).all(axis=0) & np.isin(known[0], (0, 1))):
        found[1:, k] = wilson(found[0, k] * len(values), len(values))
    return np.where(missing, np.nan, found)


def dataset(
    found: Mapping[str, Mapping[str, Any]],
    *,
    pairs: Pairs,
    used: Mapping[str, Any],
    parts: Sequence[str],
) -> xr.Dataset:
    """Label everything.

    Args:
        found: What came out, by arm; the first has what patches and grafts did, too.
        pairs: The pairs.
        used: The settings.
        parts: Parts that were grafted.

    Returns:
        The data of a `Cities`.
    """
    every = Cities.variables
    of_arms = {name for name, dims in every.items() if dims[0] == "arm"}
    of_where = {"clean", "patched", "grafted", "recalled"}
    first = next(iter(found.values()))
    values = {
        name: (every[name], np.stack([one[name].numpy() for one in found.values()]))
        for name in of_arms
    }
    values |= {name: (every[name], first[name].numpy()) for name in of_where}
    labels = {
        "kind": [pair.kind for pair in pairs.pairs],
        "city": [pair.city for pair in pairs.pairs],
        "group": [pair.group for pair in pairs.pairs],
        "origin": [pairs.origins[pair.group] for pair in pairs.pairs],
        "position": np.arange(len(pairs)) % GROUP,
        "name_tokens": [pairs.n_tokens(pair.name) for pair in pairs.pairs],
        "city_tokens": [len(ids) for ids in pairs.answers],
    }
    return xr.Dataset(
        {name: values[name] for name in sorted(values)},
        coords={
            "arm": list(found), "step": list(used["checkpoints"]), "wording": list(used["wordings"]),
            "name": [pair.name for pair in pairs.pairs], "context": np.arange(GROUP),
            "measure": ["corpus loss", *used["tasks"]], "weights": ["base", "tuned"],
            "direction": list(DIRECTIONS), "place": list(PLACES), "layer": list(used["layers"]),
            "how": list(HOWS), "part": list(parts), **{k: ("name", v) for k, v in labels.items()},
        },
    )  # fmt: skip
