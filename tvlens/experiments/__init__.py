"""Experiments: each one function, one result class, one file; the registry finds them by itself.

A new experiment is a new file in this folder whose function ``f(model, task, **settings) -> Result`` carries
``@experiment("name")``. Nothing else needs an edit: `get` and ``tvlens run NAME`` know it from then on. A
file that lies elsewhere is known as soon as it is imported, and ``tvlens run FILE.py`` imports it by `read`.
"""

from tvlens._registry import Registry

REGISTRY = Registry("experiment", __name__, __path__)
experiment, read, discover, names, get = (
    REGISTRY.register,
    REGISTRY.read,
    REGISTRY.discover,
    REGISTRY.names,
    REGISTRY.get,
)
