"""Studies of the laboratory: each one function, one result class, one file.

A new study is a new file in this folder whose function carries ``@study("name")`` and is called as
``f(preset="quick", seed=0, progress=True, **settings) -> Result``. Nothing else needs an edit: `get` and
``tvlens icl run NAME`` know it from then on.
"""

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tvlens._registry import Registry

REGISTRY = Registry("study", __name__, __path__)
study, discover, names, get = REGISTRY.register, REGISTRY.discover, REGISTRY.names, REGISTRY.get


def presets(function: Callable[..., Any]) -> Mapping[str, Mapping[str, Any]]:
    """Give what each preset of a study says.

    Args:
        function: A study.

    Returns:
        Settings by the preset's name.

    Example:
        >>> presets(get("theory"))["quick"]["rounds"] > 1000
        True
    """
    own = getattr(function, "presets", None)
    return own if own is not None else sys.modules[function.__module__].PRESETS


def words(function: Callable[..., Any]) -> dict[str, str]:
    """Give what a study's docstring says of its settings.

    Args:
        function: A study.

    Returns:
        Sentences by the setting's name.

    Example:
        >>> words(get("noise"))["seeds"]
        'How many seeds.'
    """
    args = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.split(r"^    (\w+): ", args, flags=re.MULTILINE)[1:]
    # What None stands for is said by the presets themselves.
    none = re.compile(r"[;.] None(, here and below,)? for what the preset says")
    clean = (none.sub("", " ".join(said.replace("``", "").split())) for said in found[1::2])
    return dict(zip(found[::2], clean, strict=True))
