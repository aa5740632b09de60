"""tvlens: find, move and explain the vector a language model computes from its context.

Names load on first use, so that ``import tvlens`` costs nothing: neither torch nor transformer_lens is
imported until a function that needs them is called. With the environment variable ``TVLENS_CHECK_SHAPES=1``
every tensor signature of the library is checked at run time, by jaxtyping and beartype.
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

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
    "TaskVector": "tvlens.vectors",
    "extract": "tvlens.extraction",
    "inject": "tvlens.injection",
    "score": "tvlens.scoring",
    "layer_sweep": "tvlens.experiments.layer_sweep",
    "LayerSweep": "tvlens.experiments.layer_sweep",
    "Result": "tvlens.results",
    "load": "tvlens.results",
    "report": "tvlens.reports",
    "cite": "tvlens.citations",
}

__all__ = ["__version__"]
__all__ += sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tvlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


if os.environ.get("TVLENS_CHECK_SHAPES", "0") not in ("", "0"):
    from jaxtyping import install_import_hook

    install_import_hook("tvlens", "beartype.beartype")
