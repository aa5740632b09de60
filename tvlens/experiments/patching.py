"""Patching among the experiments, so that its results can be loaded from files; see `tvlens.patching`."""

from tvlens.patching.results import Patching

__all__ = ["Patching"]
