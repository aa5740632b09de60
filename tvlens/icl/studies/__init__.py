"""Studies of the laboratory: each one function, one result class, one file.

A new study is a new file in this folder whose function carries ``@study("name")`` and is called as
``f(preset="quick", seed=0, progress=True, **settings) -> Result``. Nothing else needs an edit: `get` and
``tvlens icl run NAME`` know it from then on.
"""

from tvlens._registry import Registry

REGISTRY = Registry("study", __name__, __path__)
study, discover, names, get = REGISTRY.register, REGISTRY.discover, REGISTRY.names, REGISTRY.get
