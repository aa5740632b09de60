"""A labelled dataset as the bytes of one safetensors file, and back.

netCDF is what people exchange, and what results are saved as. A sweep writes and reads thousands of cells,
of which most readers want one variable, and there a file whose header says where each array lies is a
hundred times faster. Text, of which HDF5 and safetensors hold little, stands in the header as JSON.
"""

import json
from collections.abc import Collection
from typing import Any

import numpy as np
import xarray as xr
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

SCHEMA, KIND = 1, "sweep cell arrays"
_NUMBERS = "biuf"
_TYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip


def to_bytes(data: xr.Dataset) -> bytes:
    """Write a dataset.

    Args:
        data: Numbers, truth values and texts, with attributes that JSON can hold.

    Returns:
        A safetensors file.

    Raises:
        TypeError: A variable holds something else.

    Example:
        >>> one = xr.Dataset({"said": ("token", ["a", "b"])})
        >>> from_bytes(to_bytes(one))["said"].values.tolist()
        ['a', 'b']
    """
    arrays, variables = {}, {}
    for name, variable in data.variables.items():
        known: dict[str, Any] = {"dims": list(variable.dims), "coord": name in data.coords}
        known |= {"attrs": dict(variable.attrs)} if variable.attrs else {}
        values = variable.values
        if values.dtype.kind in _NUMBERS:
            # It makes a vector of a single number.
            arrays[str(name)] = np.ascontiguousarray(values).reshape(values.shape)
        elif all(isinstance(text, str) for text in values.ravel().tolist()):
            known |= {"text": values.ravel().tolist(), "shape": list(values.shape)}
        else:
            raise TypeError(
                f"variable {name!r} holds {values.dtype}; a cell's variables hold numbers, truth values "
                "or texts."
            )
        variables[str(name)] = known
    note = {"schema": SCHEMA, "kind": KIND, "variables": variables, "attrs": dict(data.attrs)}
    # Attributes may be numbers of numpy.
    text = json.dumps(note, default=lambda value: value.tolist())
    return save(arrays, metadata={"tvlens": text})


def from_bytes(content: bytes, names: Collection[str] | None = None) -> xr.Dataset:
    """Read a dataset back.

    Args:
        content: What `to_bytes` gave.
        names: Only these variables, with the coordinates of their dimensions; all by default.

    Returns:
        The dataset; variables that it does not have are left out.

    Raises:
        ValueError: These bytes are none of ours, or are newer.

    Example:
        >>> both = xr.Dataset({"a": 1.0, "b": 2.0})
        >>> list(from_bytes(to_bytes(both), ["a"]))
        ['a']
    """
    note = header(content)
    try:
        arrays = {name: entry for name, entry in deserialize(content)}
        return _dataset(note, arrays, names)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"a cell's arrays are damaged: {error}") from error


def _dataset(note: Any, arrays: Any, names: Collection[str] | None) -> xr.Dataset:
    known = note["variables"]
    wanted = set(known if names is None else names) & set(known)
    dims = {dim for name in wanted for dim in known[name]["dims"]}
    variables = {}
    for name in known:
        if name not in wanted | dims:
            continue
        one = known[name]
        if "text" in one:
            values = np.array(one["text"], dtype=object).reshape(one["shape"])
        else:
            entry = arrays[name]
            flat = np.frombuffer(entry["data"], dtype=_TYPES[entry["dtype"]])
            values = flat.reshape(entry["shape"]).copy()
        variables[name] = (one["coord"], (one["dims"], values, one.get("attrs", {})))
    return xr.Dataset(
        {name: v for name, (coord, v) in variables.items() if not coord},
        {name: v for name, (coord, v) in variables.items() if coord},
        note["attrs"],
    )


def header(content: bytes) -> dict[str, Any]:
    """Read what the file says of itself.

    Raises:
        ValueError: It is none of ours, or newer.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        note = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["tvlens"])
        kind, schema = note["kind"], note["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("these are no arrays of a sweep's cell.") from None
    if kind != KIND or not isinstance(schema, int):
        raise ValueError(f"these are no arrays of a sweep's cell, but {kind!r}.")
    if schema > SCHEMA:
        raise ValueError(
            f"a cell was written by a newer tvlens: schema {schema}, this version reads up to {SCHEMA}. "
            "Update with: pip install -U tvlens"
        )
    return note
