"""Opening a model where it lies: a folder, a GGUF file, the hub, or memory.

Everything here ends in a Hugging Face model, its tokenizer and a note of where they came from. The
libraries underneath print, warn and draw progress bars; none of that reaches the user.
"""

import contextlib
import hashlib
import io
import logging
import mmap
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvlens.models._facts import Origin

_log = logging.getLogger("tvlens")


class ModelUnavailableError(RuntimeError):
    """A model is not on this machine and cannot be fetched either."""


@dataclass(frozen=True)
class Opened:
    """A Hugging Face model that has been read, and where it came from.

    Attributes:
        hf_model: The model.
        tokenizer: Its tokenizer.
        origin: Where they came from.
        ours: Whether nobody else holds the model, so that its memory may be reused.
        trusted: Whether this very model's conversion has been checked before.
    """

    hf_model: Any
    tokenizer: Any
    origin: Origin
    ours: bool = True
    trusted: bool = False


def open_folder(
    folder: Path, *, dtype: Any, tokenizer: Any = None, **places: Any
) -> tuple[Any, Any]:
    """Read a model and its tokenizer from a Hugging Face folder, and from nowhere else.

    Args:
        folder: The folder, with a ``config.json`` and weights.
        dtype: The torch dtype to read the weights in.
        tokenizer: Taken instead of the folder's own.
        **places: Where to put the weights, as Hugging Face takes it.

    Returns:
        The Hugging Face model and the tokenizer.

    Raises:
        FileNotFoundError: There is no ``config.json``.
        ValueError: The files are damaged, or there is no tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no Hugging Face model folder: it has no config.json. "
            "Give the folder that save_pretrained wrote, or a .gguf file."
        )
    try:
        hf_model = _read_model(folder, dtype=dtype, local_files_only=True, **places)
    except Exception as error:
        raise ValueError(f"the model in {folder} cannot be read: {first_line(error)}") from error
    return hf_model, tokenizer or _read_tokenizer(folder, f"the folder {folder}")


def open_gguf(path: Path, *, tokenizer: Any = None) -> tuple[Any, Any]:
    """Read and dequantise a GGUF file to float32.

    Args:
        path: The file.
        tokenizer: Taken instead of the one in the file.

    Returns:
        The Hugging Face model and the tokenizer.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no GGUF, is cut off, or holds an architecture transformers cannot
            read.
    """
    import torch
    from transformers import AutoConfig

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with 'GGUF'.")
    _log.info("dequantising %s", path.name)
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        with quiet():
            # Read once for both: parsing the header takes seconds.
            where["config"] = AutoConfig.from_pretrained(path.parent, **where)
            options = _dequantise_fully()
        hf_model = _read_model(path.parent, dtype=torch.float32, **where, **options)
        if tokenizer is None:
            tokenizer = _gguf_tokenizer(path, where)
    except Exception as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: it is cut off or damaged, or "
            f"transformers does not know its kind ({first_line(error)}). Fetch it again."
        ) from error
    # The weights are plain numbers now, and the model must not pass for a quantised one.
    if hasattr(hf_model.config, "quantization_config"):
        del hf_model.config.quantization_config
    hf_model.hf_quantizer = None
    hf_model.is_quantized = False
    return hf_model, tokenizer


def open_hub(
    name: str, *, revision: str | None, dtype: Any, tokenizer: Any = None, **places: Any
) -> Opened:
    """Fetch a model from the Hugging Face hub, or from its cache.

    Args:
        name: The hub id.
        revision: Commit, tag or branch.
        dtype: The torch dtype to read the weights in.
        tokenizer: Taken instead of the model's own.
        **places: Where to put the weights, as Hugging Face takes it.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelUnavailableError: The hub has no such model or cannot be reached, and it is not cached.
    """
    _log.info("loading %s from the hub", name)
    try:
        hf_model = _read_model(name, dtype=dtype, revision=revision, **places)
        if tokenizer is None:
            tokenizer = _read_tokenizer(name, f"the model {name}", revision=revision)
    except OSError as error:
        raise no_hub(name, error) from error
    commit = getattr(hf_model.config, "_commit_hash", None) or revision
    return Opened(hf_model, tokenizer, Origin(name=name, source="hub", revision=commit))


def no_hub(name: str, error: Exception) -> ModelUnavailableError:
    """Build the error for a model that the hub did not give."""
    return ModelUnavailableError(
        f"{name} is no known model, folder or file here, and the hub did not give it: "
        f"{first_line(error)} With a network, this command fixes it: hf download {name}. "
        "Without one, load_model('smollm2-135m') works: it needs no hub."
    )


def open_memory(hf_model: Any, *, tokenizer: Any = None) -> Opened:
    """Take a Hugging Face model that is in memory already.

    Args:
        hf_model: The model.
        tokenizer: Its tokenizer; looked for where the model was read from if not given.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: There is no tokenizer.
    """
    path = getattr(hf_model, "name_or_path", "") or ""
    if tokenizer is None:
        what = f"this {type(hf_model).__name__} in memory"
        if not path:
            raise ValueError(
                f"{what} comes without a tokenizer: pass load_model(model, tokenizer=...)."
            )
        tokenizer = _read_tokenizer(path, what, local_files_only=True)
    name = Path(path).name or hf_model.config.model_type
    return Opened(hf_model, tokenizer, Origin(name=name, source="memory"), ours=False)


def sha256_of(path: Path) -> str:
    """Give the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars, prints and warnings off the terminal."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _read_model(where: str | Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        # Soft caps are left out by the fused attention kernels.
        return AutoModelForCausalLM.from_pretrained(
            where, attn_implementation="eager", **options
        ).eval()


def _read_tokenizer(where: str | Path, what: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(
            f"{what} comes without a tokenizer: pass load_model(..., tokenizer=...)."
        ) from error


def _gguf_tokenizer(path: Path, where: dict[str, Any]) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    if _gguf_text(path, "tokenizer.ggml.pre") == "smollm":
        # transformers leaves out what llama.cpp means by "smollm": every digit stands alone.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return tokenizer


def _gguf_text(path: Path, key: str) -> str | None:
    """Read one text of a GGUF header, without the seconds that parsing all of it takes."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # A field is its key's length, its key, its type (8 for text), the text's length, the text.
        start = data.find(struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 8))
        if start < 0:
            return None
        data.seek(start + 8 + len(key) + 4)
        (length,) = struct.unpack("<Q", data.read(8))
        return data.read(length).decode()


def _dequantise_fully() -> dict[str, Any]:
    """Ask newer transformers not to keep weights in GGUF blocks; older ones never do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def first_line(error: BaseException) -> str:
    """Give the first line of what an error says, or its kind where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
