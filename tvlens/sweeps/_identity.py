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
import types
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tvlens import provenance
from tvlens.tasks import Task

COMPUTES = ("tvlens", "torch", "transformer-lens", "transformers", "numpy")
"""Packages whose version is part of a cell's identity."""
# What a model folder is loaded from; what a training leaves beside it decides nothing.
_FILES = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.gguf", "config.json",
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "*.jinja",
)  # fmt: skip
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
        return {"type": type(value).__qualname__, "fields": plain(fields, what=what)}
    if hasattr(value, "state_dict"):
        return {"type": type(value).__qualname__, "weights": _weights(value)}
    if hasattr(value, "backend_tokenizer"):
        return _tokenizer(value)
    if hasattr(value, "tolist"):
        return _numbers(value, what=what)
    if isinstance(value, functools.partial | types.FunctionType | types.MethodType | type) or (
        inspect.isbuiltin(value)
    ):
        return of_function(value)
    raise TypeError(
        f"{what} must be something that can be written down (numbers, text, lists, mappings, dataclasses, "
        f"arrays, functions), so that a rerun knows it again; a {type(value).__name__} arrived."
    )


def _numbers(value: Any, *, what: str) -> Any:
    """A number of numpy or torch is a number; more of them are known by the hash of their bytes."""
    if not getattr(value, "shape", ()):
        return plain(value.tolist(), what=what)
    kind = str(value.dtype)
    if kind == "object":
        return plain(value.tolist(), what=what)
    content = hashlib.sha256(_raw(value) if hasattr(value, "detach") else value.tobytes())
    return {"array": [kind, *value.shape], "sha256": content.hexdigest()}


def _raw(tensor: Any) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _weights(module: Any) -> str:
    content = hashlib.blake2b()  # twice as fast as SHA-256, which gigabytes feel
    for name, tensor in module.state_dict().items():
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(_raw(tensor))
    return content.hexdigest()[:_DIGITS]


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(
        tokenizer.special_tokens_map, sort_keys=True, default=str
    )
    return {"tokenizer": hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}


def of_function(function: Callable[..., Any]) -> dict[str, Any]:
    """Know a function by its place, its code, and what it holds: defaults, closures, the object of a method.

    Args:
        function: A function, a method, a class, or a `functools.partial` of one.

    Returns:
        Plain values. A function of tvlens is known by its name, since its code is that of the version; a
        partial of `tvlens.load_model` by the weights that it loads.

    Raises:
        TypeError: It holds something that cannot be written down, or is an object of a class of one's own.

    Example:
        >>> of_function(of_task)
        {'function': 'tvlens.sweeps._identity:of_task'}
    """
    if isinstance(function, functools.partial):
        return _of_partial(function)
    if isinstance(function, types.MethodType):
        owner = plain(function.__self__, what="the object of a method")
        return {"method": of_function(function.__func__), "self": owner}
    name = f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    if name.startswith("tvlens.") or inspect.isbuiltin(function):
        return {"function": name}
    if isinstance(function, type):
        source = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:_DIGITS]
        return {"class": name, "source": source}
    if isinstance(function, functools._lru_cache_wrapper):
        return of_function(function.__wrapped__)
    if not isinstance(function, types.FunctionType):
        return {"function": name, "self": plain(function, what="a callable object")}
    held = {
        variable: plain(cell.cell_contents, what=f"{variable}, which {name} has from around it,")
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        )
        if cell.cell_contents is not function
    }
    known = {"defaults": function.__defaults__, "kwdefaults": function.__kwdefaults__}
    return {
        "function": name,
        "code": _code(function.__code__),
        **({"held": held} if held else {}),
        **{key: plain(v, what=f"a default of {name}") for key, v in known.items() if v},
    }


def _of_partial(function: Any) -> dict[str, Any]:
    from tvlens.models import load_model

    args, given = list(function.args), dict(function.keywords)
    if function.func is load_model:
        what = args.pop(0) if args else given.pop("name_or_model", "")
        loads = {"loads": of_model(what, revision=given.get("revision"))}
    else:
        loads = of_function(function.func)
    said = "an argument of a partial"
    return {**loads, "args": plain(args, what=said), "keywords": plain(given, what=said)}


def _code(code: types.CodeType) -> str:
    """Hash what a function does; unlike its source, that is what was imported."""
    consts = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    content = [code.co_code.hex(), consts, code.co_names, code.co_varnames[: code.co_argcount]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:_DIGITS]


def of_task(task: Task) -> dict[str, Any]:
    """Know a task by its name, its family and what its prompts are made of."""
    return {"task": task.name, "family": task.family, "fingerprint": task.fingerprint}


def of_model(what: Any, *, revision: str | None = None) -> dict[str, Any]:
    """Know a model's weights, without loading them where that can be had.

    Args:
        what: A name that `tvlens.load_model` knows, a path, a function that makes the model, or the model.
        revision: Commit, tag or branch of a name on the hub, or a packaged model's checkpoint.

    Returns:
        For names and paths, the hash of the weights or the commit; for a function, its code and arguments;
        for a model in hand, the hash of its weights, its settings and its tokenizer.

    Raises:
        ValueError: There is no such model, its commit cannot be known, or it has hooks of its user.
        FileNotFoundError: There is no such path.
    """
    if isinstance(what, str | Path):
        return _of_name(str(what), revision)
    return _in_hand(what) if hasattr(what, "state_dict") else of_function(what)


def _of_name(name: str, revision: str | None) -> dict[str, Any]:
    from tvlens.models._known import KNOWN
    from tvlens.models._packaged import PACKAGED

    if name in KNOWN:
        return {"model": name, "sha256": KNOWN[name].gguf_sha256}
    if name in PACKAGED:
        return {"model": name, "revision": revision}  # the weights come with the version
    path = Path(name).expanduser()
    if name and path.exists():
        return {"files": _files(path)}
    return {"model": name, "revision": commit(name, revision)}


def is_path(name: str) -> bool:
    """Whether a model's name is a path here, which names that come with tvlens never are."""
    from tvlens.models._known import KNOWN
    from tvlens.models._packaged import PACKAGED

    return bool(name) and name not in {*KNOWN, *PACKAGED} and Path(name).expanduser().exists()


def _files(path: Path) -> str:
    """Hash of all that decides what a model folder or a GGUF file loads as."""
    files = [path] if path.is_file() else sorted({f for kind in _FILES for f in path.glob(kind)})
    stamps = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())
    return _hashed(stamps)


@lru_cache
def _hashed(stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Read gigabytes once a process, as long as nobody touches them."""
    from tvlens.models._files import sha256_of

    parts = [[Path(name).name, sha256_of(Path(name))] for name, *_ in stamps]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_DIGITS]


def commit(name: str, revision: str | None = None) -> str | None:
    """Say which commit a name on the hub stands for, from this machine's cache or else from the hub.

    Args:
        name: The name.
        revision: A commit, tag or branch; the main branch if None.

    Returns:
        The commit; None for the few models that TransformerLens alone reads, which have none.

    Raises:
        ValueError: There is no such name, or its commit cannot be known here.
        FileNotFoundError: It is a path at which there is nothing.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from tvlens.models._load import _hub_id, _transformer_lens_only, must_be_id

    if _transformer_lens_only(name):
        return None
    must_be_id(Path(name).expanduser())
    name = _hub_id(name)
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        try:
            found = hf_hub_download(name, "config.json", revision=revision)
        except Exception as error:  # the hub's client raises dozens of kinds
            raise ValueError(
                f"the commit of {name!r} cannot be known here, as neither the cache nor the hub has it: load "
                f"it once with tvlens.load_model, or give a folder. ({type(error).__name__})"
            ) from error
    return Path(found).parent.name


def _in_hand(model: Any) -> dict[str, Any]:
    from tvlens.models import facts
    from tvlens.models.runner import runner

    known = facts(model)
    if runner(model).has_user_hooks():
        raise ValueError(
            f"{known.name!r} has hooks, and a sweep cannot know what they do: give a function that loads the "
            "model and adds them, or take them off."
        )
    settings = {
        name: value
        for name, value in sorted(vars(model.cfg).items())
        if isinstance(value, bool | int | float | str) and name != "device"
    }
    return {
        "model": known.name,
        "weights": _weights(model),
        "settings": plain(settings, what="a model's settings"),
        "training": bool(model.training),
        "tokenizer": None
        if model.tokenizer is None
        else plain(model.tokenizer, what="a tokenizer"),
        "processing": known.processing,
        "prepend_bos": known.prepend_bos,
    }


def versions() -> dict[str, str]:
    """Versions of the packages that are part of a cell's identity."""
    return {name: v for name, v in provenance.versions().items() if name in COMPUTES}
