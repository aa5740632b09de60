"""Tensors in safetensors files, with metadata that says what they are and checksums that hold them to it.

The metadata hold the SHA-256 of every tensor, and beside them stands their own. So what a file says of
itself can be checked without reading its numbers, and no number is given out that is not the one saved.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvlens._files import must_exist, replacing

SUFFIX = ".safetensors"
SCHEMA = 2  # of every file written here; those of schema 1 have no checksums and are read without
_KEY, _SUM = "tvlens", "sha256"
_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NEEDED = frozenset({"schema", "site", "layers"})


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, what: str
) -> Path:
    """Write tensors with their metadata and checksums, if the suffix is safetensors'; never half a file.

    Args:
        path: Where; the suffix is ``.safetensors``.
        tensors: The tensors by name.
        meta: What they are, JSON-ready; the schema is added.
        what: What the file is called in errors, e.g. ``"a task vector"``.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix.
    """
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"{what} is saved as {SUFFIX}; {Path(path).name!r} was asked for.")
    return write_tensors(path, tensors, meta)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write tensors with their metadata and checksums; never half a file."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    sums = {name: _sum(tensor) for name, tensor in whole.items()}
    text = json.dumps({"schema": SCHEMA, **meta, _SUM: sums})
    with replacing(path) as part:
        save_file(whole, part, metadata={_KEY: text, _SUM: _of(text.encode())})
    return path


def read_header(path: str | Path, *, what: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Read what a file says of itself, without its numbers.

    Args:
        path: The file.
        what: What it is called in errors, without an article, e.g. ``"task vector"``.

    Returns:
        Metadata, empty where tvlens did not write them, and the tensors' shapes by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is cut short or damaged, or of a newer schema.
    """
    from safetensors import safe_open

    path = Path(path)
    must_exist(path)
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        meta = json.loads(said.get(_KEY, "null"))
    except Exception as error:  # as the damage has it, safetensors' own errors and Python's
        raise _unreadable(path, what, error) from error
    if not isinstance(meta, dict):
        return {}, shapes
    schema = meta.get("schema", 1)
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise _unreadable(
            path, what, f"its schema is {schema!r}, no whole number from 1 to {SCHEMA}"
        )
    if schema > SCHEMA:
        raise ValueError(
            f"{str(path)!r} has schema {schema}; this tvlens reads up to {SCHEMA}. "
            "Upgrade with: pip install -U tvlens"
        )
    if (schema > 1 or _SUM in said) and said.get(_SUM) != _of(said[_KEY].encode()):
        raise _unreadable(path, what, "its metadata are not those that were saved")
    return meta, shapes


def read_tensors(path: str | Path, meta: Mapping[str, Any], *, what: str) -> dict[str, Tensor]:
    """Read all tensors of a file, and hold them against their checksums where there are any.

    Args:
        path: The file.
        meta: What `read_header` gave.
        what: What it is called in errors, without an article.

    Returns:
        The tensors by name.

    Raises:
        ValueError: A number is not the one that was saved.
    """
    from safetensors import safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise _unreadable(path, what, error) from error
    if meta.get("schema", 1) > 1:
        sums = meta.get(_SUM)
        if sums != {name: _sum(tensor) for name, tensor in tensors.items()}:
            raise _unreadable(path, what, "its numbers are not those that were saved")
    return tensors


def load_tensors(
    path: str | Path, names: Collection[str], *, what: str, kind: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of slices by layer that `save_tensors` wrote, if it is of this kind.

    Args:
        path: The file.
        names: Tensors that it must hold.
        what: What it is called in errors, without an article, e.g. ``"task vector"``.
        kind: What its metadata must say it is; None where they say nothing.

    Returns:
        Metadata, and the tensors by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is cut short, damaged, of another kind, or of a newer schema.
    """
    meta, shapes = read_header(path, what=what)
    if not (meta.get("kind") == kind and set(meta) >= _NEEDED and set(shapes) == set(names)):
        raise ValueError(
            f"{str(Path(path))!r} is a safetensors file, but no {what} saved by tvlens."
        )
    check_meta(path, meta, what=what)
    tensors = read_tensors(path, meta, what=what)
    if other := [name for name, tensor in tensors.items() if tensor.dtype not in _TYPES]:
        said = f"{other[0]!r} holds {tensors[other[0]].dtype}, not one of: {', '.join(map(str, _TYPES))}"
        raise _unreadable(Path(path), what, said)
    return meta, tensors


def check_meta(path: str | Path, meta: Mapping[str, Any], *, what: str) -> None:
    """Refuse metadata that do not say which site and layers there are."""
    site, layers, made = meta["site"], meta["layers"], meta.get("made", {})
    sane = isinstance(site, str) and isinstance(layers, list) and isinstance(made, dict)
    sane = sane and all(type(layer) is int and layer >= 0 for layer in layers)
    if not sane or len(set(layers)) < len(layers):
        said = f"{site!r}, {layers!r} and {made!r}"
        raise _unreadable(
            Path(path),
            what,
            "a site, different layers from 0 and an origin are needed; it says "
            f"{said[:80]}{'…' * (len(said) > 80)}",
        )


def _unreadable(path: Path, what: str, why: object) -> ValueError:
    said = str(why)
    return ValueError(
        f"{str(path)!r} is no readable safetensors file of a {what} ({said[:200]}). It may have been cut "
        "short or changed while it was copied: copy or make it again."
    )


def _of(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _sum(tensor: Tensor) -> str:
    """SHA-256 of a tensor: its type, its shape and its bytes."""
    head = f"{tensor.dtype}{list(tensor.shape)}".encode()
    digest = hashlib.sha256(head)
    content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    digest.update(content)
    return digest.hexdigest()
