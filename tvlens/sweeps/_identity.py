"""What decides a cell's numbers, written down as plain values, and the hash of it.

Two calls that would compute the same thing have the same hash in every process and on every day, and a call
that could compute something else has another: other weights, other items of a task, another setting
(defaults are settings, too), other source of a user's function, other versions of the packages that compute.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tvlens import provenance
from tvlens.tasks import Task

COMPUTES = ("tvlens", "torch", "transformer-lens", "transformers")
"""Packages whose version is part of a cell's identity."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "*.txt", "*.jinja")
_DIGITS = 32


def digest(identity: Mapping[str, Any]) -> str:
    """Hash an identity.

    Args:
        identity: Plain values, as the functions of this module give them.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> digest({"seed": 0, "task": "a"}) == digest({"task": "a", "seed": 0})
        True
    """
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def plain(value: Any, *, what: str) -> Any:
    """Write a setting down as plain values, so that equal settings read equally.

    Args:
        value: Numbers, text, lists, mappings, dataclasses, tasks, functions, arrays or tensors.
        what: What it is, for the error.

    Returns:
        What JSON can hold.

    Raises:
        TypeError: It is anything else, whose content cannot be known.

    Example:
        >>> plain({"b": (1, 2)}, what="b")
        {'b': [1, 2]}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else repr(value)
    if isinstance(value, Task):
        return of_task(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, what=what) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item, what=what) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item, what=what) for item in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **plain(fields, what=what)}
    if hasattr(value, "tolist"):
        return _numbers(value, what=what)
    if callable(value):
        return of_function(value)
    raise TypeError(
        f"{what} must be something that can be written down (numbers, text, lists, mappings, dataclasses, "
        f"arrays, functions), so that a rerun knows it again; a {type(value).__name__} arrived."
    )


def _numbers(value: Any, *, what: str) -> Any:
    """A number of numpy or torch is a number; more of them are known by their hash."""
    if not getattr(value, "shape", ()):
        return plain(value.tolist(), what=what)
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    content = hashlib.sha256(value.tobytes() if value.dtype.kind != "O" else repr(value).encode())
    return {"array": [str(value.dtype), *value.shape], "sha256": content.hexdigest()}


def of_function(function: Callable[..., Any]) -> dict[str, Any]:
    """Know a function by its place and its source.

    Args:
        function: A function, or a `functools.partial` of one.

    Returns:
        Its name and a hash of its source, where that can be read; what a partial was given.

    Example:
        >>> sorted(of_function(len))
        ['function', 'source']
    """
    if isinstance(function, functools.partial):
        given = {
            "args": plain(function.args, what="an argument of a partial"),
            "keywords": plain(function.keywords, what="an argument of a partial"),
        }
        return {**of_function(function.func), **given}
    inner = inspect.unwrap(function)
    name = f"{inner.__module__}:{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    if name.startswith("tvlens."):
        return {"function": name}  # its source is that of the version
    try:
        source = hashlib.sha256(inspect.getsource(inner).encode()).hexdigest()[:_DIGITS]
    except (OSError, TypeError):
        source = None
    return {"function": name, "source": source}


def of_task(task: Task) -> dict[str, Any]:
    """Know a task by its name, its family and what its prompts are made of."""
    return {"task": task.name, "family": task.family, "fingerprint": task.fingerprint}


def of_model(what: Any) -> dict[str, Any]:
    """Know a model's weights, without loading them where that can be had.

    Args:
        what: A name that `tvlens.load_model` knows, a path, a function that makes the model, or the model.

    Returns:
        For names and paths, the hash of the weights or the commit; for a function, its source and arguments;
        for a model in hand, the hash of its weights.

    Raises:
        ValueError: There is no such model.
    """
    from tvlens.models._known import KNOWN
    from tvlens.models._packaged import PACKAGED

    if isinstance(what, str):
        if what in KNOWN:
            return {"model": what, "sha256": KNOWN[what].gguf_sha256}
        if what in PACKAGED:
            return {"model": what}  # it comes with the version
        if not Path(what).expanduser().exists():
            return {"model": what, "revision": _commit(what)}
        return {"model": Path(what).name, "sha256": _files(Path(what).expanduser())}
    if hasattr(what, "state_dict"):
        return _in_hand(what)
    return of_function(what)


def _files(path: Path) -> str:
    """Hash of all that decides what a model folder or a GGUF file loads as."""
    files = [path] if path.is_file() else sorted({f for kind in _WEIGHTS for f in path.glob(kind)})
    stamps = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return _hashed(stamps)


@lru_cache
def _hashed(stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Read gigabytes once a process, as long as nobody touches them."""
    from tvlens.models._files import sha256_of

    parts = [[Path(name).name, sha256_of(Path(name))] for name, *_ in stamps]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_DIGITS]


def _commit(name: str) -> str | None:
    """The commit that a name on the hub stands for, from this machine's cache or else from the hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from tvlens.models._load import _hub_id

    name = _hub_id(name)
    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        try:
            found = hf_hub_download(name, "config.json")
        except (OSError, ValueError):
            return None  # loading will say why
    return Path(found).parent.name


def _in_hand(model: Any) -> dict[str, Any]:
    import torch

    from tvlens.models import facts

    content = hashlib.blake2b()  # twice as fast, which gigabytes feel
    for name, tensor in model.state_dict().items():
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    known = facts(model)
    return {
        "model": known.name,
        "blake2b": content.hexdigest()[:_DIGITS],
        "processing": known.processing,
        "prepend_bos": known.prepend_bos,
    }


def versions() -> dict[str, str]:
    """Versions of the packages that are part of a cell's identity."""
    return {name: v for name, v in provenance.versions().items() if name in COMPUTES}
