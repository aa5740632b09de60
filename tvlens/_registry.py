"""Functions that users find by name; a folder's modules register theirs when they are imported."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tvlens._errors import unknown

F = TypeVar("F", bound=Callable[..., Any])


class Registry:
    """Named functions of one kind, one module each.

    Args:
        kind: What such a function is called, for errors.
        package: The package whose modules hold them.
        path: That package's ``__path__``.

    Example:
        >>> fruit = Registry("fruit", "tvlens.tasks", ())
        >>> @fruit.register("apple")
        ... def apple():
        ...     return "red"
        >>> fruit.get("apple")()
        'red'
    """

    def __init__(self, kind: str, package: str, path: Iterable[str]) -> None:
        self.kind, self.package, self.path = kind, package, path
        self.functions: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Give a decorator that enters a function and hands it back unchanged.

        Args:
            name: What users call it.

        Returns:
            The decorator.

        Raises:
            ValueError: Another function has that name already.
        """

        def enter(function: F) -> F:
            known = self.functions.setdefault(name, function)
            places = [(f.__module__, f.__qualname__) for f in (known, function)]
            if places[0] != places[1]:
                raise ValueError(f"{self.kind} {name!r} exists already, in {known.__module__}.")
            return function

        return enter

    def discover(self) -> None:
        """Import every module of the package, so that all functions and result kinds are known."""
        for module in pkgutil.iter_modules(self.path):
            importlib.import_module(f"{self.package}.{module.name}")

    def names(self) -> tuple[str, ...]:
        """Names of all functions, sorted."""
        self.discover()
        return tuple(sorted(self.functions))

    def get(self, name: str) -> Callable[..., Any]:
        """Find a function by its name.

        Args:
            name: The name.

        Returns:
            The function.

        Raises:
            ValueError: There is none of that name; the nearest are offered.
        """
        if name not in self.names():
            raise unknown(self.kind, name, self.functions)
        return self.functions[name]
