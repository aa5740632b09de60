"""Run the checks one after another; none can stop the others."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from tvlens._errors import unknown
from tvlens.checking.results import ModelCheck
from tvlens.checking.subject import Subject
from tvlens.checking.table import CHECKS, Check, NotApplicable


@dataclass(frozen=True)
class _Outcome:
    """One row of the result."""

    status: str
    measured: float = float("nan")
    tolerance: float = float("nan")
    note: str = ""
    seconds: float = 0.0


def check_model(
    model: Any, *, checks: Sequence[str] | None = None, memory: int | None = None
) -> ModelCheck:
    """Check that a model does what tvlens takes for granted, each claim with its number and tolerance.

    The model is left as it was; your own hooks stay and take part.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        checks: Names from `tvlens.checking.CHECKS`; those that they need run as well. All by default.
        memory: Bytes that the engine's activations may take, as for a sweep.

    Returns:
        For each check whether it passed, the number, the tolerance and what a failure means. A check that
        raises an error has failed, and says which; one whose needs are not met is skipped.

    Raises:
        ValueError: There is no such check, or no such model.
        TypeError: It is no TransformerLens model.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> check_model(tiny_model(), checks=["self_patch"]).passed
        True
    """
    started = time.perf_counter()
    names = _chosen(checks)
    if isinstance(model, str):
        from tvlens.models import load_model

        model = load_model(model)
    from tvlens.models import facts
    from tvlens.models._facts import kind_of

    if kind_of(model) is None:
        raise TypeError(
            "a HookedTransformer, a TransformerBridge or a model's name is needed; "
            f"{type(model).__name__} arrived. Load it with tvlens.load_model(model, tokenizer=...)."
        )
    known = facts(model)
    subject = Subject(model, memory)
    found: dict[str, _Outcome] = {}
    for name in names:
        found[name] = _run(CHECKS[name], subject, found)
    return _result(found, known, seconds=round(time.perf_counter() - started, 3))


def _chosen(checks: Sequence[str] | None) -> list[str]:
    """The checks asked for and those they need, in the order of the table."""
    if isinstance(checks, str):
        raise TypeError(f"checks is a list of names; the text {checks!r} arrived: [{checks!r}].")
    asked = list(CHECKS) if checks is None else list(checks)
    if not asked:
        raise ValueError("checks is empty; leave it out for all checks.")
    wanted: set[str] = set()
    while asked:
        name = asked.pop()
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
        wanted.add(name)
        asked += CHECKS[name].needs
    return [name for name in CHECKS if name in wanted]


def _run(check: Check, subject: Subject, found: dict[str, _Outcome]) -> _Outcome:
    lacking = [name for name in check.needs if found[name].status != "passed"]
    if lacking:
        said = ", ".join(f"{name} ({found[name].status})" for name in lacking)
        return _Outcome("skipped", note=f"needs {said}")
    started = time.perf_counter()
    try:
        with torch.no_grad():
            measured = check.function(subject)
        tolerance = float("nan") if measured.tolerance is None else float(measured.tolerance)
        status = "passed" if measured.passed else "failed"
        values = (float(measured.value), tolerance, measured.note)
    except NotApplicable as reason:
        status, values = "skipped", (float("nan"), float("nan"), str(reason))
    # Whatever a broken model does, the other checks still run, and the user reads a sentence.
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        status = "failed"
        values = (float("nan"), float("nan"), f"{type(error).__name__}: {first[:300]}")
    return _Outcome(status, *values, seconds=time.perf_counter() - started)


def _result(found: dict[str, _Outcome], known: Any, *, seconds: float) -> ModelCheck:
    from tvlens.provenance import ATTRIBUTE, collect, encode

    def texts(values: list[str]) -> tuple[str, np.ndarray]:
        return "check", np.array(values, dtype=object)

    rows = list(found.values())
    table = {
        "status": texts([row.status for row in rows]),
        "measured": ("check", np.array([row.measured for row in rows])),
        "tolerance": ("check", np.array([row.tolerance for row in rows])),
        "seconds": ("check", np.array([round(row.seconds, 3) for row in rows])),
        "what": texts([CHECKS[name].what for name in found]),
        "note": texts([row.note for row in rows]),
        "means": texts([CHECKS[name].means for name in found]),
    }
    data = xr.Dataset(table, coords={"check": texts(list(found))})
    note = collect(
        kind=ModelCheck.kind, model=known.name, model_facts=known.to_dict(), seconds=seconds
    )
    return ModelCheck(data.assign_attrs({ATTRIBUTE: encode(note)}))
