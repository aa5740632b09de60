"""How a function is called for one cell: which of model, task and seed it takes, and under which names."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvlens import experiments
from tvlens._errors import unknown
from tvlens.icl import studies

MODEL, TASK, SEED = ("model", "models"), ("task", "tasks"), ("seed", "seeds")
_NOT_SETTINGS = (
    "progress",
    "keep",
    "out",
)  # of experiments and studies; a user's own may have them


@dataclass(frozen=True)
class Call:
    """A function that computes a cell.

    Attributes:
        name: What the sweep is called after it.
        function: The function.
    """

    name: str
    function: Callable[..., Any]

    @classmethod
    def of(cls, asked: str | Callable[..., Any]) -> "Call":
        """Find an experiment or a study by its name, or take a user's own function.

        Args:
            asked: The name or the function.

        Returns:
            The call.

        Raises:
            ValueError: Nothing goes by that name.
            TypeError: It is neither name nor function.
        """
        if isinstance(asked, str):
            names = (*experiments.names(), *studies.names())
            if asked not in names:
                raise unknown("experiment", asked, names)
            home = experiments if asked in experiments.names() else studies
            return cls(asked, home.get(asked))
        if not callable(asked):
            raise TypeError(
                f"a sweep takes an experiment's name or a function; a {type(asked).__name__} arrived."
            )
        inner = getattr(asked, "func", asked)
        return cls(getattr(inner, "__name__", type(inner).__name__), asked)

    def __reduce__(self) -> tuple[Any, ...]:
        # One of tvlens is found by its name in another process, which registers the rest of them, too; that
        # process knows nothing of a user's own until it imports the module that has it.
        known = self.registered and self.function.__module__.startswith("tvlens.")
        return (_call, (self.name, None if known else self.function))

    @property
    def registered(self) -> bool:
        """Whether the library knows the function by its name."""
        known = (experiments.REGISTRY.functions, studies.REGISTRY.functions)
        return any(functions.get(self.name) is self.function for functions in known)

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the function takes."""
        return inspect.signature(self.function).parameters

    def taken(self, names: tuple[str, str]) -> str | None:
        """Say which of two names the function takes, if any."""
        return next((name for name in names if name in self.parameters), None)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Give every setting with its value, given or by default.

        Args:
            given: Settings that were given.

        Returns:
            All settings by name, in the function's order.

        Raises:
            ValueError: The function has no such setting, or needs one that was not given.
        """
        not_own = (*MODEL, *TASK, *SEED, *(_NOT_SETTINGS if self.registered else ("progress",)))
        kinds = inspect.Parameter
        own = {
            name: one
            for name, one in self.parameters.items()
            if name not in not_own and one.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
        }
        open_ended = any(p.kind is kinds.VAR_KEYWORD for p in self.parameters.values())
        for name in given:
            if name not in own and (not open_ended or name in not_own):
                raise unknown(f"setting of {self.name}", name, own)
        lacking = [n for n, one in own.items() if one.default is one.empty and n not in given]
        if lacking:
            raise ValueError(f"{self.name} needs {lacking[0]}=, which was not given.")
        return {n: one.default for n, one in own.items() if n not in given} | dict(given)

    def __call__(self, *, model: Any, task: Any, seed: int | None, settings: Any) -> Any:
        """Compute one cell."""
        given = dict(settings)
        for names, value in ((MODEL, model), (TASK, task)):
            name = self.taken(names)
            if name is not None and value is not None:
                given[name] = value
        which = self.taken(SEED)
        if which is not None:
            given[which] = seed if which == "seed" else [seed]
        if "progress" in self.parameters:
            given["progress"] = False
        return self.function(**given)


def _call(name: str, function: Callable[..., Any] | None) -> Call:
    return Call.of(name) if function is None else Call(name, function)
