"""Grids of task, model, seed and more: each cell kept as it is finished, and what was found so far.

`tvlens.sweep` runs a grid; `status` says how far it is, `collect` gives one row a cell, `join` the arrays of
all cells over the axes of the grid, `cells` one result after the other. The folder is safe: a process may be
killed at any moment, several may write at once, and a rerun computes only what is missing.
"""

from tvlens.sweeps._calls import Call
from tvlens.sweeps._read import cells, collect, join, status
from tvlens.sweeps._result import Sweep
from tvlens.sweeps._run import sweep

__all__ = ["Call", "Sweep", "cells", "collect", "join", "status", "sweep"]
