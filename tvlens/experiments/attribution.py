"""Attribution among the experiments, so that its results load from files; see `tvlens.attribution`."""

from tvlens.attribution.results import Attribution
from tvlens.attribution.slopes import Gradients

__all__ = ["Attribution", "Gradients"]
