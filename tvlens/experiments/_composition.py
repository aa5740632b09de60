"""What composing vectors found, and the tasks that compose: a place in a list, and what is done to it."""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens._errors import whole
from tvlens.intervals import over_tasks
from tvlens.results import Result
from tvlens.scoring import of_queries
from tvlens.tasks import Task

if TYPE_CHECKING:
    import plotly.graph_objects as go

CORNERS = ("ac", "bc", "ad", "bd")
"""Other place as it is, place as it is, other place with the rule applied, place with the rule applied."""
RUNS = ("composed", "direct", "ad", "bc", "ac", "random")
KINDS = ("theta", "function_vector")
PLACES = {
    "last": {"ac": "first", "bc": "last", "ad": "first_rule", "bd": "last_rule"},
    "first": {"ac": "last", "bc": "first", "ad": "last_rule", "bd": "first_rule"},
}
"""Which task stands at which corner, by the place that the composed task takes its item from."""


def list_tasks(
    rule: Task, *, n_lists: int = 200, lengths: int | Sequence[int] = (2, 3, 4), seed: int = 0
) -> dict[str, Task]:
    """Make four tasks over the same lists: first or last item, as it is or with a rule applied to it.

    Args:
        rule: What is applied, e.g. ``to_upper``: from ``a,b,c`` the last with the rule is ``C``.
        n_lists: How many lists, at most.
        lengths: How many items a list may have; one number, or several.
        seed: Decides the lists.

    Returns:
        ``first``, ``last``, and ``first_rule``, ``last_rule`` with the rule applied. All have one name,
        because it is the name that decides which prompts a seed gives. No list has an answer that is
        right in two of them (of ``b,x,a``, say, the first is ``b``, and so is the letter after the last);
        a rule that leaves all its items as they are is taken as it is.

    Raises:
        ValueError: The rule has too few items without a comma, a length is below 2, or every list has an
            answer that is right in two tasks.
        TypeError: A length is no whole number.

    Example:
        >>> import tvlens as tv
        >>> made = list_tasks(tv.load_task("to_upper"), n_lists=2, lengths=(3,))
        >>> [task.pairs[0] for task in made.values()]  # doctest: +SKIP
        [('b,x,a', 'b'), ('b,x,a', 'a'), ('b,x,a', 'B'), ('b,x,a', 'A')]

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3.3.
    """
    sizes = several_lengths(lengths)
    every = [x for x in rule.inputs if "," not in x]
    items = [x for x in every if x not in rule.answers[x]] or every
    if len(items) < max(sizes):
        raise ValueError(
            f"lists of {', '.join(map(str, sizes))} items asked for, but task {rule.name!r} has {len(items)} "
            "without a comma that the rule changes. Rules that work: to_upper, next_letter."
        )
    rng, lists = random.Random(f"{seed}:{rule.name}:lists"), {}
    for i in range(20 * n_lists):
        chosen = rng.sample(items, sizes[i % len(sizes)])
        first, last = ({x, *rule.answers[x]} for x in (chosen[0], chosen[-1]))
        if first.isdisjoint(last):
            lists[",".join(chosen)] = chosen
        if len(lists) == n_lists:
            break
    if not lists:
        raise ValueError(
            f"no list of items of task {rule.name!r} keeps the answers of its first and last item apart "
            f"(n_lists = {n_lists}). Rules that work: to_upper, next_letter."
        )
    made = {
        "first": {x: (some[0],) for x, some in lists.items()},
        "last": {x: (some[-1],) for x, some in lists.items()},
        "first_rule": {x: rule.answers[some[0]] for x, some in lists.items()},
        "last_rule": {x: rule.answers[some[-1]] for x, some in lists.items()},
    }
    name, known = f"{rule.name}_in_lists", {"source": rule.source, "licence": rule.licence}
    return {
        which: Task(name, "composition", answers, spaced=rule.spaced, **known)
        for which, answers in made.items()
    }


def several_lengths(lengths: int | Sequence[int]) -> tuple[int, ...]:
    """Turn one length or several into a tuple, or say what is valid.

    Args:
        lengths: How many items a list may have.

    Returns:
        The same, at least one, each at least 2.

    Raises:
        ValueError: There is none, or one is below 2.
        TypeError: One is no whole number.

    Example:
        >>> several_lengths(3), several_lengths([2, 4])
        ((3,), (2, 4))
    """
    given = lengths if isinstance(lengths, Sequence | np.ndarray) else [lengths]
    sizes = tuple(whole("a length", one) for one in given)
    if not sizes or min(sizes) < 2:
        said = ", ".join(map(str, sizes)) or "none"
        raise ValueError(
            f"lists need a length of at least 2 items, e.g. (2, 3, 4); {said} arrived."
        )
    return sizes


class Composition(Result):
    """What `composition` found: for each target, vector and run, which task each prompt obeyed."""

    kind: ClassVar[str] = "composition"
    references: ClassVar[tuple[str, ...]] = ("todd2024function", "hendel2023context", "wilson1927")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "says": ("target", "vector", "run", "prompt", "corner"),
        "says_baseline": ("target", "prompt", "corner"),
        "says_regular": ("target", "prompt", "corner"),
        "dev": ("target", "vector", "run", "layer"),
        "layer_chosen": ("target", "vector", "run"),
        "norm": ("target", "vector", "run"),
        "query": ("target", "prompt"),
    }
    table: ClassVar[tuple[str, ...]] = ("says", "token")
    method: ClassVar[str] = (
        "Four tasks share lists: first or last item, as it is (C) or with a rule applied (D); B is the place "
        "of the composed task, A the other. Of AC, BC and AD come vectors, from the same lists in one "
        "order; v_AD + v_BC - v_AC is tried at BD, which it was not made from. Theta, averaged over prompts, "
        "replaces the residual stream at the last token of a bare query; function vectors, sums of the "
        "mean outputs of heads chosen by their effects on AC, BC and AD, are added there. Every vector, "
        "controls too, is put at the layer where it does best at BD on dev queries. Lists of test queries "
        "are none of those that vectors were made of. Random vector: a new direction for each prompt, as "
        "long as the composed one. Lists with an answer that is right at two corners are left out. Wilson "
        "95 % intervals count distinct queries; those of differences draw them again (bootstrap)."
    )

    @property
    def title(self) -> str:
        """The rules, and the model."""
        targets = ", ".join(map(str, self.data["target"].values))
        return f"Composed vectors: {targets} on {self.provenance['model']}"

    def rates(self) -> pd.DataFrame:
        """Say how often each vector does the composed task, and what it does else.

        Returns:
            One row for each target, vector and run: ``accuracy`` (BD) with ``low`` and ``high``; ``says_ac,
            says_bc, says_ad``, the share of prompts that obeyed another corner; ``layer``, ``norm`` there.
            Runs ``baseline`` and ``regular`` inject nothing.
        """
        rows = []
        for target in map(str, self.data["target"].values):
            one = self.data.sel(target=target)
            queries = one["query"].values.tolist()
            for vector in map(str, one["vector"].values):
                some = one.sel(vector=vector)
                for run in map(str, one["run"].values):
                    at = some.sel(run=run)
                    place = {"layer": int(at["layer_chosen"]), "norm": float(at["norm"])}
                    rows.append(
                        {"target": target, "vector": vector, "run": run}
                        | _rate(at["says"], queries)
                        | place
                    )
            for run in ("baseline", "regular"):
                rate = _rate(one[f"says_{run}"], queries)
                nowhere = {"layer": np.nan, "norm": np.nan}
                rows.append({"target": target, "vector": "none", "run": run} | rate | nowhere)
        return pd.DataFrame(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Accuracy at each composed task."""
        rates = self.rates()
        found = {}
        for target, some in rates.groupby("target", sort=False):
            named = some.assign(
                run=some["vector"].where(some["vector"] != "none", "") + " " + some["run"]
            )
            caption = f"{str(target).capitalize()} of a list"
            bare = named.drop(columns=["target", "vector"]).set_index("run")
            found[caption] = bare.set_axis(
                bare.index.str.strip().str.replace("_", " ")
            ).rename_axis("run")
        return found

    def gap(self, target: str, vector: str, *, other: str = "direct") -> tuple[float, float, float]:
        """Compare the composed vector with another one on the same prompts.

        Args:
            target: The composed task.
            vector: ``"theta"`` or ``"function_vector"``.
            other: Another run.

        Returns:
            Accuracy of the composed vector less that of the other, and the ends of a bootstrap interval over
            distinct queries.
        """
        one = self.data.sel(target=target, vector=vector, corner="bd")
        said = one["says"].astype(float)
        each = (said.sel(run="composed") - said.sel(run=other)).values
        if not each.any():
            return 0.0, 0.0, 0.0
        low, high = over_tasks(each[None, None, :, None], one["query"].values[None, None])
        return float(each.mean()), float(low[0]), float(high[0])

    def finding(self) -> str:
        """How composed vectors do, against direct ones and the best part."""
        table = self.rates()
        keys = zip(table["target"], table["vector"], table["run"], strict=True)
        rates = dict(zip(keys, table["accuracy"].tolist(), strict=True))
        said = []
        for target in map(str, self.data["target"].values):
            parts = []
            for vector in map(str, self.data["vector"].values):
                runs = {run: rates[target, vector, run] for run in RUNS}
                best = max(("ad", "bc", "ac"), key=runs.__getitem__)
                gap = self.gap(target, vector, other=best)
                parts.append(
                    f"{vector.replace('_', ' ')} composed {runs['composed']:.2f}, direct "
                    f"{runs['direct']:.2f}, best part {runs[best]:.2f} ({best.upper()}; difference "
                    f"{gap[1]:+.2f} to {gap[2]:+.2f}), random {runs['random']:.2f}"
                )
            said.append(
                f"{target}: {'; '.join(parts)}; demonstrations {rates[target, 'none', 'regular']:.2f}, bare "
                f"query {rates[target, 'none', 'baseline']:.2f}"
            )
        text = ". ".join(said)
        return f"{text[0].upper()}{text[1:]}."

    def summary(self) -> dict[str, Any]:
        """Accuracies with their intervals, by target, vector and run."""
        flat: dict[str, Any] = {"model": self.provenance["model"]}
        table: Any = self.rates()
        for row in table[~table["run"].isin(["bc", "ac"])].to_dict("records"):
            vector = "" if row["vector"] == "none" else f" {row['vector']}"
            name = f"{row['target']}{vector} {row['run']}"
            flat |= {name: row["accuracy"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
        return flat | {"n_test": self.data.sizes["prompt"], "seconds": self.provenance["seconds"]}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw accuracies at the composed task; see `tvlens.plots.composition.composition_bars`."""
        from tvlens.plots.composition import composition_bars

        return composition_bars(self.rates(), **({"title": self.finding()} | channels))

    def figures(self) -> "dict[str, go.Figure]":
        """Bars, and the layers at which vectors do it on dev queries."""
        from tvlens.plots.composition import composition_layers

        layers = composition_layers(self.data.assign_attrs(finding=self.finding()))
        return {"Composed and direct vectors": self.plot(), "By layer": layers}


def _rate(said: xr.DataArray, queries: Sequence[str]) -> dict[str, float]:
    right = said.astype(float)
    share = float(right.sel(corner="bd").mean())
    low, high = of_queries(share, queries)
    others = {f"says_{c}": float(right.sel(corner=c).mean()) for c in CORNERS if c != "bd"}
    return {"accuracy": share, "low": low, "high": high, **others}


def dataset(
    found: Mapping[str, Mapping[str, Any]], *, vectors: Sequence[str], layers: Sequence[int]
) -> xr.Dataset:
    """Label everything.

    Args:
        found: What came out, by target.
        vectors: Kinds of vectors.
        layers: The model's layers.

    Returns:
        The data of a `Composition`.
    """
    dims = dict(Composition.variables) | {"token": ("target", "vector", "run", "prompt")}
    queries = np.array([one["query"] for one in found.values()], dtype=object)
    return xr.Dataset(
        {
            name: (axes, np.stack([one[name] for one in found.values()]))
            for name, axes in dims.items()
            if name != "query"
        },
        coords={
            "target": list(found),
            "vector": list(vectors),
            "run": list(RUNS),
            "corner": list(CORNERS),
            "layer": list(layers),
            "query": (("target", "prompt"), queries),
        },
    )
