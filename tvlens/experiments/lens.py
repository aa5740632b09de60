"""Lenses among the experiments, so that their results can be loaded from files; see `tvlens.lens`."""

from tvlens.lens.projection import Projection
from tvlens.lens.results import Lens

__all__ = ["Lens", "Projection"]
