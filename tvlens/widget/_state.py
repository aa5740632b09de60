"""What a reader has chosen: a prompt, a cell, and what is written there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tvlens._errors import unknown

ACTIONS = ("nothing", "patch", "inject")
MODES = ("replace", "add")
MAPS = ("before", "after")


@dataclass(frozen=True)
class State:
    """One setting of the panel.

    Attributes:
        prompt: What the model reads.
        answer: A text whose first token is followed; empty for none.
        task: The task that the prompt was taken from; empty for a prompt of one's own.
        example: Which of the task's prompts.
        shown: ``"query"`` for a task's query alone, ``"examples"`` for its examples and the query.
        action: ``"nothing"``, ``"patch"`` (the state of another prompt) or ``"inject"`` (a vector).
        source: The other prompt, for a patch.
        vector: Name of the vector, to inject.
        layer: After which block it is written, from 0.
        position: At which token, from 0; negative counts from the end.
        strength: 0 changes nothing; 1 replaces the state, or adds the vector once.
        mode: ``"replace"`` goes from the state towards what is written; ``"add"`` adds it.
        map: Whether the heat map shows the run ``"before"`` or ``"after"`` the change.
    """

    prompt: str = ""
    answer: str = ""
    task: str = ""
    example: int = 0
    shown: str = "query"
    action: str = "nothing"
    source: str = ""
    vector: str = ""
    layer: int = 0
    position: int = -1
    strength: float = 1.0
    mode: str = "replace"
    map: str = "before"

    def __post_init__(self) -> None:
        for kind, choices in (
            ("action", ACTIONS),
            ("mode", MODES),
            ("map", MAPS),
            ("shown", SHOWN),
        ):
            if getattr(self, kind) not in choices:
                raise unknown(kind, getattr(self, kind), choices)
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be a finite number; {self.strength} arrived.")

    def changed(self, changes: Mapping[str, Any]) -> "State":
        """Give a state with some settings changed.

        Args:
            changes: Settings by name. A whole number may stand for a fraction.

        Returns:
            The new state.

        Raises:
            ValueError: There is no such setting, or it cannot have this value.
            TypeError: A setting is of another type.

        Example:
            >>> State(layer=3).changed({"layer": 4}).layer
            4
        """
        kinds = {each.name: each.type for each in fields(self)}
        for name, value in changes.items():
            if name not in kinds:
                raise unknown("setting", name, kinds)
            wanted = (int, float) if kinds[name] is float else kinds[name]
            if not isinstance(value, wanted) or isinstance(value, bool):  # type: ignore[arg-type]
                raise TypeError(
                    f"{name} must be of type {kinds[name].__name__}; {value!r:.40} arrived."  # type: ignore[union-attr]
                )
        fractions = {name: float(value) for name, value in changes.items() if kinds[name] is float}
        return replace(self, **{**changes, **fractions})


SHOWN = ("query", "examples")
