"""Functions that users find by name; a folder's modules register theirs when they are imported."""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from tvlens._errors import unknown
from tvlens._files import must_exist

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
            known = self.functions.get(name, function)
            places = [(f.__module__, f.__qualname__) for f in (known, function)]
            if places[0] != places[1]:
                raise ValueError(f"{self.kind} {name!r} exists already, in {known.__module__}.")
            self.functions[name] = function  # a module that is run again replaces its own
            return function

        return enter

    def read(self, file: str | Path) -> str:
        """Import a file from anywhere, anew if it was imported before, and name the function it registers.

        Its folder joins those that are searched for modules, so that other processes find it as well.

        Args:
            file: A Python file that registers one function.

        Returns:
            The function's name.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It registers none or several, or there is another module of its name.
        """
        path = Path(file).expanduser().resolve()
        must_exist(path)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
        if spec is None or spec.origin is None or Path(spec.origin).resolve() != path:
            why = f"{path.stem!r} is no module's name" if spec is None else f"so is {spec.origin}"
            raise ValueError(
                f"{path} cannot be imported as {path.stem!r}: {why}. Give the file another name, such as "
                f"my_{self.kind}.py."
            )
        # What is compiled counts as new by its time in seconds, and a notebook writes faster.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        self.functions = {n: f for n, f in self.functions.items() if f.__module__ != path.stem}
        known = sys.modules.get(path.stem)
        importlib.reload(known) if known else importlib.import_module(path.stem)
        found = [name for name, f in self.functions.items() if f.__module__ == path.stem]
        if len(found) != 1:
            raise ValueError(
                f"{path.name} must register one {self.kind}, by @{self.kind}('name') on its function; it "
                f"registers {', '.join(found) or 'none'}."
            )
        return found[0]

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
