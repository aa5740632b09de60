"""What edges, circuits and their tests look like as results: saved, loaded, cited and drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from jaxtyping import Bool

from tvlens._words import fixed, listed
from tvlens.circuits.graph import Graph, Node
from tvlens.patching.statistics import bootstrap_ratio
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

_ENOUGH = 0.9  # of the metric: a circuit that keeps it is worth telling
_METHODS = {
    "eap": ("edge attribution patching", ("syed2023attribution",)),
    "eap-ig": (
        "edge attribution patching with integrated gradients",
        ("hanna2024faith", "syed2023attribution"),
    ),
}


class _References:
    """The papers behind the method that was used; behind the class, those of all methods."""

    def __get__(self, result: "Result | None", kind: type) -> tuple[str, ...]:
        if result is None:
            return tuple(dict.fromkeys(key for _, keys in _METHODS.values() for key in keys))
        return _METHODS[str(result.provenance["method"])][1]


def node_coords(dim: str, nodes: Sequence[Node]) -> dict[str, Any]:
    """Give coordinates that name nodes and say where they are.

    Args:
        dim: ``"sender"`` or ``"receiver"``.
        nodes: The nodes.

    Returns:
        Names, kinds, layers and heads.
    """
    return {
        dim: (dim, np.array([node.name for node in nodes], dtype=object)),
        f"{dim}_kind": (dim, np.array([node.kind for node in nodes], dtype=object)),
        f"{dim}_layer": (dim, np.array([node.layer for node in nodes])),
        f"{dim}_head": (dim, np.array([node.head for node in nodes])),
    }


class EdgeScores(Result):
    """How much every edge matters, to first order; NaN where there is no edge."""

    kind: ClassVar[str] = "edge_scores"
    references: ClassVar[Any] = _References()
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "score": ("sender", "receiver"),
        "clean": ("prompt",),
    }
    table: ClassVar[tuple[str, ...]] = ("score",)
    method: ClassVar[str] = (
        "An edge is what one part of the model contributes to what another one reads. Its score is the "
        "sender's clean output less its corrupted one, times the metric's gradient by the receiver's input, "
        "summed over positions: a first-order estimate of what the metric loses where the edge carries the "
        "corrupted message. Mean over prompts."
    )

    @property
    def graph(self) -> Graph:
        """The graph that was scored."""
        return Graph(**self.provenance["graph"])

    @property
    def score(self) -> xr.DataArray:
        """Mean score of every edge, by sender and receiver."""
        return self.data["score"]

    @property
    def title(self) -> str:
        """The method and the model."""
        made = self.provenance
        return f"{_METHODS[made['method']][0].capitalize()} in {made['model']}"

    def top(self, n: int = 20) -> Any:
        """Give the edges with the largest scores, whichever sign they have.

        Args:
            n: How many.

        Returns:
            A table: ``sender``, ``receiver``, ``score``, largest first; all edges where there are no more.

        Raises:
            ValueError: ``n`` is less than 1.

        Example:
            >>> scores.top(5)  # doctest: +SKIP
        """
        import pandas as pd

        if n < 1:
            raise ValueError(f"n must be at least 1; {n} arrived.")
        values = self.score.values
        sent, read = np.nonzero(self.graph.edges)
        order = np.argsort(-np.abs(np.nan_to_num(values[sent, read])), kind="stable")[:n]
        sent, read = sent[order], read[order]
        return pd.DataFrame(
            {
                "sender": self.data["sender"].values[sent],
                "receiver": self.data["receiver"].values[read],
                "score": values[sent, read],
            }
        )

    def sent(self) -> xr.DataArray:
        """Sum the scores of each sender's edges: what attribution patching says of the sender itself.

        Returns:
            A score for each sender.

        Example:
            >>> scores.sent().idxmax("sender")  # doctest: +SKIP
        """
        return self.score.sum("receiver", skipna=True).rename("sent")

    def finding(self) -> str:
        """The strongest edge by gradient, and how few edges hold half of all there is."""
        sizes = np.sort(np.abs(self.score.values[self.graph.edges]))[::-1]
        n, metric = self.data.sizes["prompt"], str(self.provenance["metric"]).replace("_", " ")
        over = f"{n} prompt{'s' * (n != 1)}"
        clean, corrupted = (float(self.data[run].mean()) for run in ("clean", "corrupted"))
        if not sizes[0]:
            return (
                f"No edge has a score: nothing that reaches the {metric} differs between the clean and the "
                f"corrupted run ({fixed(clean)} and {fixed(corrupted)}); {over}."
            )
        half = int(np.searchsorted(np.cumsum(sizes), sizes.sum() / 2)) + 1
        best = self.top(1).iloc[0]
        return (
            f"By gradient, the strongest edge, {best['sender']} → {best['receiver']}, is worth about "
            f"{fixed(best['score'], sign=True)} of the {fixed(clean - corrupted)} by which the {metric} "
            f"changes from the corrupted run ({fixed(corrupted)}) to the clean one ({fixed(clean)}); "
            f"{half:,} of {len(sizes):,} edges hold half of all scores, over {over}."
        )

    def summary(self) -> dict[str, Any]:
        """The strongest edge, both runs, and the time taken."""
        best, made = self.top(1).iloc[0], self.provenance
        runs = {run: float(self.data[run].mean()) for run in ("clean", "corrupted")}
        return {
            "model": made["model"], "metric": made["metric"], "sender": best["sender"],
            "receiver": best["receiver"], "score": float(best["score"]), **runs,
            "n_edges": self.graph.n_edges, "n_prompts": self.data.sizes["prompt"],
            "seconds": made["seconds"],
        }  # fmt: skip

    def plot(self, *, n_edges: int = 60, **channels: Any) -> "go.Figure":
        """Draw the strongest edges as a graph; see `tvlens.plots.circuit.circuit_graph`.

        Args:
            n_edges: How many edges, at most.
            **channels: As in `circuit_graph`.

        Returns:
            The figure.
        """
        from tvlens.circuits.search import circuit

        found = circuit(self, n_edges=min(n_edges, self.graph.n_edges))
        return found.plot(**{"title": self.finding()} | channels)


class Circuit(Result):
    """Some edges of a model: those that are thought to do the work."""

    kind: ClassVar[str] = "circuit"
    references: ClassVar[Any] = _References()
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        name: ("edge",) for name in ("sender", "receiver", "score", "live")
    }
    table: ClassVar[tuple[str, ...]] = ("sender", "receiver", "score", "live")
    method: ClassVar[str] = (
        "Edges of the largest absolute score: of all edges (top), or taken one after the other from those "
        "that end in what is in the circuit already, beginning at the logits (greedy). A random circuit "
        "grows in the same way, by edges that are drawn. An edge is live where it lies on a path of chosen "
        "edges from the embedding to the logits; the others change nothing."
    )

    @property
    def graph(self) -> Graph:
        """The graph of which this is a part."""
        return Graph(**self.provenance["graph"])

    @property
    def n_edges(self) -> int:
        """How many edges it has."""
        return self.data.sizes["edge"]

    @property
    def chosen(self) -> Bool[np.ndarray, "sender receiver"]:
        """Which edges of the graph are in the circuit."""
        graph = self.graph
        sent = {node.name: i for i, node in enumerate(graph.senders)}
        read = {node.name: i for i, node in enumerate(graph.receivers)}
        found = np.zeros(graph.edges.shape, dtype=bool)
        for sender, receiver in zip(
            self.data["sender"].values, self.data["receiver"].values, strict=True
        ):
            found[sent[str(sender)], read[str(receiver)]] = True
        return found

    @property
    def chosen_by(self) -> str:
        """How its edges were scored and chosen, such as ``"eap-ig, greedy"``; ``"random"`` asks no scores."""
        choice = str(self.provenance["choice"])
        return choice if choice == "random" else f"{self.provenance['method']}, {choice}"

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of those who write over live edges, in order."""
        live = set(map(str, self.data["sender"].values[self.data["live"].values]))
        return tuple(node.name for node in self.graph.senders if node.name in live)

    @property
    def title(self) -> str:
        """How many edges, and of which model."""
        return f"Circuit of {self.n_edges:,} edges in {self.provenance['model']}"

    def finding(self) -> str:
        """How large it is, and how much of it is live."""
        graph, live = self.graph, int(self.data["live"].sum())
        return (
            f"{self.n_edges:,} of {graph.n_edges:,} edges ({self.provenance['choice']}), {live:,} of them on "
            f"a path from the embedding to the logits, through {len(self.nodes)} of {len(graph.senders)} "
            "nodes."
        )

    def summary(self) -> dict[str, Any]:
        """Sizes."""
        made = self.provenance
        return {
            "model": made["model"], "choice": made["choice"], "n_edges": self.n_edges,
            "n_live": int(self.data["live"].sum()), "n_nodes": len(self.nodes),
        }  # fmt: skip

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the graph; see `tvlens.plots.circuit.circuit_graph`."""
        from tvlens.plots.circuit import circuit_graph

        return circuit_graph(self.data.assign_attrs(finding=self.finding()), **channels)


class Faithfulness(Result):
    """What circuits do alone, and what the model does without them; the metric is kept prompt by prompt."""

    kind: ClassVar[str] = "faithfulness"
    references: ClassVar[tuple[str, ...]] = ("wang2023interpretability", "hanna2024faith")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "value": ("circuit", "prompt"),
        "without": ("circuit", "prompt"),
        "clean": ("prompt",),
        "corrupted": ("prompt",),
        "n_edges": ("circuit",),
    }
    table: ClassVar[tuple[str, ...]] = ("value", "without")
    method: ClassVar[str] = (
        "The model is run with true ablation: every edge outside the circuit carries what its sender says in "
        "the corrupted run. Faithfulness: which share of the way from the corrupted to the clean metric that "
        "run keeps; 1 is the whole model. Completeness: which share is lost where instead the circuit's own "
        "edges are cut and all others left; 1 is all. Ratios of means over prompts, with percentile "
        "bootstrap intervals over prompts, 95 %."
    )

    def mean(
        self, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
    ) -> dict[str, xr.Dataset]:
        """Average over prompts, with bootstrap intervals.

        Args:
            level: Confidence level between 0 and 1.
            n_resamples: How many draws of the prompts.
            seed: Seed of the draws.

        Returns:
            ``"faithfulness"`` and ``"completeness"``, each with ``mean, low, high`` by circuit.

        Example:
            >>> found.mean()["faithfulness"]["mean"]  # doctest: +SKIP
        """
        clean, corrupted = self.data["clean"], self.data["corrupted"]
        way = (clean - corrupted).broadcast_like(self.data["value"]).transpose("prompt", "circuit")
        shares = {
            "faithfulness": self.data["value"] - corrupted,
            "completeness": clean - self.data["without"],
        }
        found = {}
        for name, moved in shares.items():
            above, below = moved.transpose("prompt", "circuit").values.astype(float), way.values
            with np.errstate(invalid="ignore", divide="ignore"):
                # Where both runs say the same there is no way of which a share could be kept.
                mean = np.where(below.sum(axis=0), above.sum(axis=0) / below.sum(axis=0), np.nan)
            mean = mean + 0.0  # no negative zero
            low, high = bootstrap_ratio(
                above, below.astype(float), level=level, n_resamples=n_resamples, seed=seed
            )
            table = {"mean": mean, "low": low, "high": high}
            found[name] = xr.Dataset(
                {k: ("circuit", v) for k, v in table.items()},
                coords={n: self.data[n] for n in ("n_edges", "chosen_by") if n in self.data.coords},
            )
        return found

    @property
    def title(self) -> str:
        """What was tested, in which model."""
        n = self.data.sizes["circuit"]
        return f"Faithfulness of {n} circuit{'s' * (n != 1)} in {self.provenance['model']}"

    def finding(self) -> str:
        """What the smallest and the largest circuit keep alone, and what cutting them loses."""
        found = self.mean(n_resamples=200)
        mean, n = found["faithfulness"]["mean"].values, self.data.sizes["prompt"]
        metric = str(self.provenance["metric"]).replace("_", " ")
        if np.isnan(mean).all():
            clean = fixed(float(self.data["clean"].mean()))
            return (
                f"The {metric} is {clean} in the clean and in the corrupted "
                "run, so no circuit can keep a share of the way between them."
            )
        told = self._told(mean)
        kept = [
            self._kept(found["faithfulness"].isel(circuit=at), first=at == told[0]) for at in told
        ]
        rest = f", and {listed(kept[1:])}" if kept[1:] else ""
        lost = dict.fromkeys(fixed(float(found["completeness"]["mean"][at])) for at in told)
        return (
            f"{kept[0]} of the {metric}{rest}; cutting them loses {listed(list(lost))}; "
            f"{n} prompt{'s' * (n != 1)}."
        )

    def _told(self, mean: np.ndarray) -> list[int]:
        """Circuits worth telling: the smallest, the first that keeps nine tenths, the largest."""
        order = np.lexsort([mean, self.data["n_edges"].values])
        enough = [int(at) for at in order if mean[at] >= _ENOUGH]
        return list(dict.fromkeys([int(order[0]), *enough[:1], int(order[-1])]))

    def _kept(self, one: xr.Dataset, *, first: bool) -> str:
        """A circuit's size and what it keeps, with its interval; how it was made where that differs."""
        n, ends = int(one["n_edges"]), (float(one["low"]), float(one["high"]))
        interval = "" if np.isnan(ends).any() else f" ({fixed(ends[0])} to {fixed(ends[1])})"
        named = self.data.coords.get("chosen_by")
        several = named is not None and len(set(named.values.tolist())) > 1
        by = f" ({one['chosen_by'].item()})" if several else ""
        size = (
            f"{n:,} of {self.provenance['all_edges']:,} edges{by} alone" if first else f"{n:,}{by}"
        )
        return f"{size} keep{'s' * (n == 1)} {fixed(float(one['mean']))}{interval}"

    def summary(self) -> dict[str, Any]:
        """Faithfulness and completeness of the largest circuit."""
        at, found = int(self.data["n_edges"].values.argmax()), self.mean()
        made: dict[str, Any] = {
            "model": self.provenance["model"],
            "metric": self.provenance["metric"],
            "n_edges": int(self.data["n_edges"][at]),
        }
        for name, table in found.items():
            one = table.isel(circuit=at)
            ends = {f"{name}_{end}": float(one[end]) for end in ("low", "high")}
            made |= {name: float(one["mean"]), **ends}
        return made | {
            "n_prompts": self.data.sizes["prompt"],
            "seconds": self.provenance["seconds"],
        }

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the two curves; see `tvlens.plots.circuit.faithfulness_curves`."""
        from tvlens.plots.circuit import faithfulness_curves

        return faithfulness_curves(self.drawn(), **channels)

    def drawn(self) -> xr.Dataset:
        """Give what the figure shows.

        Returns:
            ``mean, low, high`` by share (faithfulness, completeness) and circuit.
        """
        parts = self.mean()
        whole = xr.concat(list(parts.values()), dim="share").assign_coords(share=list(parts))
        return whole.assign_attrs(**self.data.attrs, finding=self.finding())
