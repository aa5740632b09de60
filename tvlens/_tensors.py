"""Tensors in safetensors files, with metadata that says what they are."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tvlens._files import must_exist, replacing

SUFFIX = ".safetensors"
_KEY = "tvlens"
_NEEDED = frozenset({"schema", "site", "layers"})


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, what: str
) -> Path:
    """Write tensors with their metadata; never half a file.

    Args:
        path: Where; the suffix is ``.safetensors``.
        tensors: The tensors by name.
        meta: What they are, JSON-ready.
        what: What the file is called in errors, e.g. ``"a task vector"``.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{what} is saved as {SUFFIX}; {path.name!r} was asked for.")
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    with replacing(path) as part:
        save_file(whole, part, metadata={_KEY: json.dumps(meta)})
    return path


def load_tensors(
    path: str | Path,
    names: Collection[str],
    *,
    what: str,
    schema: int,
    kind: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that `save_tensors` wrote, if it is of this kind.

    Args:
        path: The file.
        names: Tensors that it must hold.
        what: What it is called in errors, without an article, e.g. ``"task vector"``.
        schema: The newest schema that is understood.
        kind: What its metadata must say it is; None where they say nothing.

    Returns:
        Metadata, and the tensors by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is cut short, of another kind, or of a newer schema.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    must_exist(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(_KEY, "null"))
            ours = isinstance(meta, dict) and meta.get("kind") == kind and set(meta) >= _NEEDED
            ours = ours and set(file.keys()) == set(names)
            tensors = {name: file.get_tensor(name) for name in names} if ours else {}
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} is no readable safetensors file ({error}). It may have been cut short "
            f"while it was copied; save the {what.rpartition(' ')[2]} again."
        ) from error
    if not ours:
        raise ValueError(f"{str(path)!r} is a safetensors file, but no {what} saved by tvlens.")
    if meta["schema"] > schema:
        raise ValueError(
            f"{str(path)!r} has schema {meta['schema']}; this tvlens reads up to {schema}. "
            "Upgrade with: pip install -U tvlens"
        )
    return meta, tensors
