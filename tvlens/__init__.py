"""tvlens: find, move and explain the vector a language model computes from its context.

Names load on first use, so that ``import tvlens`` costs nothing: neither torch nor transformer_lens is
imported until a function that needs them is called. With the environment variable ``TVLENS_CHECK_SHAPES=1``
every tensor signature of the library is checked at run time, by jaxtyping and beartype.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    # What editors and type checkers see; at run time the same names load on first use, below.
    from tvlens import circuits as circuits
    from tvlens import experiments as experiments
    from tvlens import models as models
    from tvlens import plots as plots
    from tvlens import sweeps as sweeps
    from tvlens import tasks as tasks
    from tvlens.answers import score_answers as score_answers
    from tvlens.attribution import Attribution as Attribution
    from tvlens.attribution import Gradients as Gradients
    from tvlens.attribution import attribute as attribute
    from tvlens.attribution import attribute_gradients as attribute_gradients
    from tvlens.attribution import writers as writers
    from tvlens.checking import ModelCheck as ModelCheck
    from tvlens.checking import check_model as check_model
    from tvlens.circuits import circuit as circuit
    from tvlens.circuits import edge_scores as edge_scores
    from tvlens.circuits import faithfulness as faithfulness
    from tvlens.circuits import head_scores as head_scores
    from tvlens.circuits import induction_test as induction_test
    from tvlens.circuits import ioi_prompts as ioi_prompts
    from tvlens.citations import cite as cite
    from tvlens.experiments.answers import whole_answers as whole_answers
    from tvlens.experiments.bijection import bijection as bijection
    from tvlens.experiments.choices import choices as choices
    from tvlens.experiments.compare import compare as compare
    from tvlens.experiments.composition import composition as composition
    from tvlens.experiments.conflict import conflict as conflict
    from tvlens.experiments.decodability import decodability as decodability
    from tvlens.experiments.geometry import geometry as geometry
    from tvlens.experiments.layer_sweep import LayerSweep as LayerSweep
    from tvlens.experiments.layer_sweep import layer_sweep as layer_sweep
    from tvlens.experiments.suite import suite as suite
    from tvlens.experiments.template_transfer import template_transfer as template_transfer
    from tvlens.experiments.transfer import transfer as transfer
    from tvlens.experiments.variance import variance as variance
    from tvlens.extraction import extract as extract
    from tvlens.function_vectors import function_vector as function_vector
    from tvlens.function_vectors import head_effects as head_effects
    from tvlens.function_vectors import universal_heads as universal_heads
    from tvlens.injection import inject as inject
    from tvlens.learning import learn as learn
    from tvlens.lens import Lens as Lens
    from tvlens.lens import Projection as Projection
    from tvlens.lens import TunedLens as TunedLens
    from tvlens.lens import logit_lens as logit_lens
    from tvlens.lens import project as project
    from tvlens.models import facts as facts
    from tvlens.models import list_models as list_models
    from tvlens.models import load_model as load_model
    from tvlens.pages import page as page
    from tvlens.patching import Patching as Patching
    from tvlens.patching import ablate as ablate
    from tvlens.patching import agreement as agreement
    from tvlens.patching import attribution_patch as attribution_patch
    from tvlens.patching import patch as patch
    from tvlens.patching import patch_paths as patch_paths
    from tvlens.patching import trace as trace
    from tvlens.prompts import Prompts as Prompts
    from tvlens.prompts import build_prompts as build_prompts
    from tvlens.prompts import usable_items as usable_items
    from tvlens.reports import report as report
    from tvlens.results import Result as Result
    from tvlens.results import load as load
    from tvlens.scoring import score as score
    from tvlens.store import VectorStore as VectorStore
    from tvlens.sweeps import Sweep as Sweep
    from tvlens.sweeps import sweep as sweep
    from tvlens.tasks import Task as Task
    from tvlens.tasks import both_ways as both_ways
    from tvlens.tasks import list_tasks as list_tasks
    from tvlens.tasks import load_task as load_task
    from tvlens.tasks import register_task as register_task
    from tvlens.templates import Template as Template
    from tvlens.vectors import TaskVector as TaskVector
    from tvlens.widget import Explorer as Explorer
    from tvlens.widget import explore as explore

_HOME = {
    "load_model": "tvlens.models",
    "list_models": "tvlens.models",
    "facts": "tvlens.models",
    "Task": "tvlens.tasks",
    "load_task": "tvlens.tasks",
    "list_tasks": "tvlens.tasks",
    "register_task": "tvlens.tasks",
    "Template": "tvlens.templates",
    "Prompts": "tvlens.prompts",
    "build_prompts": "tvlens.prompts",
    "usable_items": "tvlens.prompts",
    "TaskVector": "tvlens.vectors",
    "VectorStore": "tvlens.store",
    "extract": "tvlens.extraction",
    "inject": "tvlens.injection",
    "score": "tvlens.scoring",
    "learn": "tvlens.learning",
    "patch": "tvlens.patching",
    "ablate": "tvlens.patching",
    "trace": "tvlens.patching",
    "patch_paths": "tvlens.patching",
    "attribution_patch": "tvlens.patching",
    "agreement": "tvlens.patching",
    "Patching": "tvlens.patching",
    "check_model": "tvlens.checking",
    "ModelCheck": "tvlens.checking",
    "head_scores": "tvlens.circuits",
    "induction_test": "tvlens.circuits",
    "ioi_prompts": "tvlens.circuits",
    "edge_scores": "tvlens.circuits",
    "circuit": "tvlens.circuits",
    "faithfulness": "tvlens.circuits",
    "Lens": "tvlens.lens",
    "Projection": "tvlens.lens",
    "TunedLens": "tvlens.lens",
    "logit_lens": "tvlens.lens",
    "project": "tvlens.lens",
    "attribute": "tvlens.attribution",
    "attribute_gradients": "tvlens.attribution",
    "writers": "tvlens.attribution",
    "Attribution": "tvlens.attribution",
    "Gradients": "tvlens.attribution",
    "head_effects": "tvlens.function_vectors",
    "function_vector": "tvlens.function_vectors",
    "universal_heads": "tvlens.function_vectors",
    "layer_sweep": "tvlens.experiments.layer_sweep",
    "LayerSweep": "tvlens.experiments.layer_sweep",
    "compare": "tvlens.experiments.compare",
    "conflict": "tvlens.experiments.conflict",
    "geometry": "tvlens.experiments.geometry",
    "variance": "tvlens.experiments.variance",
    "choices": "tvlens.experiments.choices",
    "template_transfer": "tvlens.experiments.template_transfer",
    "suite": "tvlens.experiments.suite",
    "decodability": "tvlens.experiments.decodability",
    "composition": "tvlens.experiments.composition",
    "bijection": "tvlens.experiments.bijection",
    "transfer": "tvlens.experiments.transfer",
    "whole_answers": "tvlens.experiments.answers",
    "score_answers": "tvlens.answers",
    "sweep": "tvlens.sweeps",
    "Sweep": "tvlens.sweeps",
    "both_ways": "tvlens.tasks",
    "page": "tvlens.pages",
    "Result": "tvlens.results",
    "load": "tvlens.results",
    "report": "tvlens.reports",
    "cite": "tvlens.citations",
    "explore": "tvlens.widget",
    "Explorer": "tvlens.widget",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore


_MODULES = ("circuits", "experiments", "models", "plots", "sweeps", "tasks")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tvlens.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tvlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})


if os.environ.get("TVLENS_CHECK_SHAPES", "0") not in ("", "0"):
    from jaxtyping import install_import_hook

    install_import_hook("tvlens", "beartype.beartype")
