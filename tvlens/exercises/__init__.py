"""Checks for the exercises of the notebooks: each takes an answer and says whether it is right, and why.

A check computes the truth by another way than the exercise asks for, knows the usual wrong answers, and says
what is wrong with them without giving the right one away.
"""

from tvlens.exercises._context import check_crossover, check_gated_loss, check_source
from tvlens.exercises._extend import check_circuit, check_experiment, check_task
from tvlens.exercises._floors import check_floor, check_interval, check_layer_chosen
from tvlens.exercises._lenses import check_lens_layer, check_share
from tvlens.exercises._moving import check_composed, check_function_vector, check_obeyed
from tvlens.exercises._patching import check_mover, check_patch, check_recovered
from tvlens.exercises._theta import check_injected, check_last_layer, check_theta
from tvlens.exercises._verdict import Verdict

__all__ = [
    "Verdict",
    "check_circuit",
    "check_composed",
    "check_crossover",
    "check_experiment",
    "check_floor",
    "check_function_vector",
    "check_gated_loss",
    "check_injected",
    "check_interval",
    "check_last_layer",
    "check_layer_chosen",
    "check_lens_layer",
    "check_mover",
    "check_obeyed",
    "check_patch",
    "check_recovered",
    "check_share",
    "check_source",
    "check_task",
    "check_theta",
]
