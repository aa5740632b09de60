"""Figures: data in, `plotly.graph_objects.Figure` out.

A figure function takes results' data (xarray, pandas), never a model, and shows nothing by itself.
Everything after the data is keyword-only and named after a dimension or a visual channel.
"""

from tvlens.plots.accuracy_bars import accuracy_bars
from tvlens.plots.accuracy_by_layer import accuracy_by_layer
from tvlens.plots.agreement import agreement_scatter
from tvlens.plots.answers import answer_bars
from tvlens.plots.attribution import origins, token_highlights, waterfall
from tvlens.plots.bijection import bijection_bars
from tvlens.plots.checking import check_dots
from tvlens.plots.choices import choices_dots
from tvlens.plots.circuit import circuit_graph, faithfulness_curves
from tvlens.plots.comparison import comparison_heatmap
from tvlens.plots.composition import composition_bars, composition_layers
from tvlens.plots.conflict import conflict_controls, conflict_matrix
from tvlens.plots.decodability import decode_by_layer, steer_and_decode, word_table
from tvlens.plots.function_vectors import function_vector_bars, function_vector_layers
from tvlens.plots.geometry import centroid_map, distance_histogram, theta_map
from tvlens.plots.grid import grid
from tvlens.plots.heads import ablation_costs, head_map, logit_differences
from tvlens.plots.lens import lens_by_layer, lens_heatmap
from tvlens.plots.patching import patching_heatmap
from tvlens.plots.projection import projection_heatmap
from tvlens.plots.suite import accuracy_by_depth, model_bars
from tvlens.plots.template_transfer import template_matrix
from tvlens.plots.theme import ROLES, token_label
from tvlens.plots.transfer import cross_matrix, transfer_bars
from tvlens.plots.variance import variance_by_layer
from tvlens.plots.vocabulary import vocabulary

__all__ = [
    "ROLES",
    "ablation_costs",
    "accuracy_bars",
    "accuracy_by_depth",
    "accuracy_by_layer",
    "agreement_scatter",
    "answer_bars",
    "bijection_bars",
    "centroid_map",
    "check_dots",
    "choices_dots",
    "circuit_graph",
    "comparison_heatmap",
    "composition_bars",
    "composition_layers",
    "conflict_controls",
    "conflict_matrix",
    "cross_matrix",
    "decode_by_layer",
    "distance_histogram",
    "faithfulness_curves",
    "function_vector_bars",
    "function_vector_layers",
    "grid",
    "head_map",
    "lens_by_layer",
    "lens_heatmap",
    "logit_differences",
    "model_bars",
    "origins",
    "patching_heatmap",
    "projection_heatmap",
    "steer_and_decode",
    "template_matrix",
    "theta_map",
    "token_highlights",
    "token_label",
    "transfer_bars",
    "variance_by_layer",
    "vocabulary",
    "waterfall",
    "word_table",
]
