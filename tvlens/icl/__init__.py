"""The in-context versus in-weight laboratory: when a model uses its context, when its weights."""

from tvlens.icl.bounds import BoundsExplorer, bounds_explorer
from tvlens.icl.data import Data, Items, Setting
from tvlens.icl.export import as_tokens, export
from tvlens.icl.five_way import five_way
from tvlens.icl.predictors import (
    bayes_risk,
    in_context,
    kt,
    kt_excess,
    kt_regret,
    label_distribution,
    mixture,
)
from tvlens.icl.probes import PROBES, Probe, measure
from tvlens.icl.tabular import Stream, algorithm1, switching_times
from tvlens.icl.theory import crossover, in_context_bounds, in_weight_bound
from tvlens.icl.training import Plan, Training, train
from tvlens.icl.transformer import Transformer, positions

__all__ = [
    "PROBES",
    "BoundsExplorer",
    "Data",
    "Items",
    "Plan",
    "Probe",
    "Setting",
    "Stream",
    "Training",
    "Transformer",
    "algorithm1",
    "as_tokens",
    "bayes_risk",
    "bounds_explorer",
    "crossover",
    "export",
    "five_way",
    "in_context",
    "in_context_bounds",
    "in_weight_bound",
    "kt",
    "kt_excess",
    "kt_regret",
    "label_distribution",
    "measure",
    "mixture",
    "positions",
    "switching_times",
    "train",
]
