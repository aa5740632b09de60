"""Edges and circuits among the experiments, so that results load from files; see `tvlens.circuits`."""

from tvlens.circuits.results import Circuit, EdgeScores, Faithfulness
from tvlens.patching.agreement import Agreement

__all__ = ["Agreement", "Circuit", "EdgeScores", "Faithfulness"]
