"""Results of known circuits, so that they can be loaded from files; see `tvlens.circuits`."""

from tvlens.circuits.contrast import Behaviour
from tvlens.circuits.heads import HeadScores
from tvlens.circuits.induction import InductionTest

__all__ = ["Behaviour", "HeadScores", "InductionTest"]
