"""Experiments: each one function, one result class, one file; the registry finds them by itself.

A new experiment is a new file in this folder whose function carries ``@experiment("name")``. Nothing else
needs an edit: `get` and ``tvlens run NAME`` know it from then on.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from tvlens._errors import unknown

F = TypeVar("F", bound=Callable[..., Any])
_REGISTRY: dict[str, Callable[..., Any]] = {}


def experiment(name: str) -> Callable[[F], F]:
    """Register a function ``f(model, task, **settings) -> Result`` as an experiment.

    Args:
        name: What users call it.

    Returns:
        A decorator that gives the function back unchanged.

    Raises:
        ValueError: Another function has that name already.

    Example:
        >>> "layer_sweep" in names()
        True
    """

    def register(function: F) -> F:
        known = _REGISTRY.setdefault(name, function)
        if (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(f"experiment {name!r} exists already, in {known.__module__}.")
        return function

    return register


def discover() -> None:
    """Import every module of this folder, so that all experiments and result kinds are registered."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def names() -> tuple[str, ...]:
    """Names of all experiments, sorted."""
    discover()
    return tuple(sorted(_REGISTRY))


def get(name: str) -> Callable[..., Any]:
    """Find an experiment's function by its name.

    Args:
        name: The name.

    Returns:
        The function.

    Raises:
        ValueError: There is none of that name; the nearest are offered.
    """
    if name not in names():
        raise unknown("experiment", name, _REGISTRY)
    return _REGISTRY[name]
