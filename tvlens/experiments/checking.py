"""Checks of models, so that their results can be loaded from files; see `tvlens.checking`."""

from tvlens.checking.results import ModelCheck

__all__ = ["ModelCheck"]
