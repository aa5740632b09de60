"""Type checks of every function that tvlens has, at a cost that tests can bear.

``--jaxtyping-packages`` puts ``jaxtyped(typechecker=beartype)`` on all of them. That keeps a table of axis
sizes for each call and checks every argument twice, a hundred times the cost of beartype by itself, and
where no annotation names a shape there is nothing to put into the table. So those get beartype by itself.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def cheaper(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """Make a jaxtyped that leaves functions without shapes to beartype."""

    def check(fn: Any = None, *, typechecker: Any) -> Any:
        if fn is None:
            return partial(check, typechecker=typechecker)
        if inspect.isclass(fn):
            # What a class inherits, and what stands in its body, is checked already.
            if dataclasses.is_dataclass(fn) and not hasattr(fn.__init__, "__wrapped__"):
                fn.__init__ = check(fn.__init__, typechecker=typechecker)
            return fn
        hints = {name: _hint(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
        # Beartype looks at a generator's arguments only when it is asked for the first value.
        if any(map(_has_shape, hints.values())) or inspect.isgeneratorfunction(fn):
            return jaxtyped(fn, typechecker=typechecker)
        given, fn.__annotations__ = fn.__annotations__, hints
        try:
            checked = _beartype(fn)
        finally:
            fn.__annotations__ = given
        if checked is not fn:
            checked.__annotations__ = given
        return checked

    return check


def _hint(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation says; anything, as for jaxtyping, where a name in it is not known yet."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation
    holder = SimpleNamespace(__annotations__={"value": annotation})
    try:
        return get_type_hints(holder, names, include_extras=True)["value"]
    except Exception:
        return Any


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, list | tuple):  # the arguments of a Callable
        return any(map(_has_shape, hint))
    named = str(getattr(hint, "__module__", "")).partition(".")[0] == "jaxtyping"
    return named or any(map(_has_shape, get_args(hint)))
