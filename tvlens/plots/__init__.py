"""Figures: data in, `plotly.graph_objects.Figure` out.

A figure function takes results' data (xarray, pandas), never a model, and shows nothing by itself.
Everything after the data is keyword-only and named after a dimension or a visual channel.
"""

from tvlens.plots.accuracy_bars import accuracy_bars
from tvlens.plots.accuracy_by_layer import accuracy_by_layer
from tvlens.plots.agreement import agreement_scatter
from tvlens.plots.attribution import origins, token_highlights, waterfall
from tvlens.plots.circuit import circuit_graph, faithfulness_curves
from tvlens.plots.heads import ablation_costs, head_map, logit_differences
from tvlens.plots.lens import lens_by_layer, lens_heatmap
from tvlens.plots.patching import patching_heatmap
from tvlens.plots.projection import projection_heatmap
from tvlens.plots.theme import ROLES, token_label
from tvlens.plots.vocabulary import vocabulary

__all__ = [
    "ROLES",
    "ablation_costs",
    "accuracy_bars",
    "accuracy_by_layer",
    "agreement_scatter",
    "circuit_graph",
    "faithfulness_curves",
    "head_map",
    "lens_by_layer",
    "lens_heatmap",
    "logit_differences",
    "origins",
    "patching_heatmap",
    "projection_heatmap",
    "token_highlights",
    "token_label",
    "vocabulary",
    "waterfall",
]
