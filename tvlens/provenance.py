"""Where a number comes from: versions, settings, seed and time, as one JSON text.

netCDF attributes hold neither dictionaries nor None nor booleans, so everything tvlens knows about
a result travels as one attribute named ``tvlens`` that holds JSON. Its integer ``schema`` says how
to read it.
"""

import json
import math
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import PurePath
from typing import Any

ATTRIBUTE = "tvlens"
SCHEMA = 1
_PACKAGES = ("tvlens", "torch", "transformer-lens", "transformers", "numpy", "xarray")


def collect(*, kind: str, **facts: Any) -> dict[str, Any]:
    """Describe a run: the caller's facts, the versions of what computed it, and the time.

    Args:
        kind: What was computed, e.g. ``"layer_sweep"``.
        **facts: All that is needed to repeat it (task, model, seed, shots, template, seconds, ...).

    Returns:
        A JSON-ready dictionary with ``schema``, ``kind``, the facts, ``versions`` and ``created``
        (UTC).

    Example:
        >>> collect(kind="layer_sweep", task="to_upper", seed=0)["task"]
        'to_upper'
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return _plain(
        {"schema": SCHEMA, "kind": kind} | facts | {"versions": versions(), "created": created}
    )


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that compute, without importing any.

    Returns:
        Package name to version; packages that are not installed are left out.

    Example:
        >>> "torch" in versions()
        True
    """
    found = {name: version for name in _PACKAGES if (version := _version(name))}
    return {"python": platform.python_version()} | found


def encode(provenance: Mapping[str, Any]) -> str:
    """Write provenance as JSON text; numpy numbers, paths and tuples become plain, NaN null.

    Args:
        provenance: What `collect` returned, or any mapping of plain values.

    Returns:
        One line of strict JSON.

    Raises:
        TypeError: A value is no number, text, list or mapping.

    Example:
        >>> encode({"schema": 1, "score": float("nan")})
        '{"schema": 1, "score": null}'
    """
    # ASCII escapes keep lone surrogates and NUL, which HDF5 text cannot hold.
    return json.dumps(_plain(provenance), allow_nan=False)


def decode(text: str) -> dict[str, Any]:
    """Read provenance back and refuse what this version cannot understand.

    Args:
        text: The JSON text that `encode` wrote.

    Returns:
        The dictionary.

    Raises:
        ValueError: The text is no JSON object, has no schema, or has a newer one.

    Example:
        >>> decode('{"schema": 1, "kind": "layer_sweep"}')["kind"]
        'layer_sweep'
    """
    try:
        provenance = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"attribute {ATTRIBUTE!r} holds no JSON: {str(text)[:60]!r}") from None
    schema = provenance.get("schema") if isinstance(provenance, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise ValueError(
            f"attribute {ATTRIBUTE!r} has no integer 'schema', got {schema!r}: not from tvlens"
        )
    if schema < 1:
        raise ValueError(
            f"attribute {ATTRIBUTE!r} has schema {schema}; there are 1 to {SCHEMA}: not from tvlens"
        )
    if schema > SCHEMA:
        raise ValueError(
            f"written by a newer tvlens: schema {schema}, this version reads up to {SCHEMA}. "
            "Update with: pip install -U tvlens"
        )
    return provenance


def _plain(value: Any) -> Any:
    """Turn a value into what JSON knows, or say that it cannot."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"provenance holds plain values only, got {type(value).__name__}: {value!r}")
