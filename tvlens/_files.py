"""Files that are whole or not there: what every save and load of tvlens shares."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# It can only be read by setting it, and it is the whole process': other threads may be writing files.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file beside its place and move it there only when it is whole.

    Args:
        path: Where the file shall stand.

    Yields:
        The temporary path to write to.

    Raises:
        FileNotFoundError: The folder does not exist.

    Example:
        >>> with replacing("notes.txt") as part:  # doctest: +SKIP
        ...     part.write_text("whole or not at all")
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist; create it first")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        # mkstemp makes files private; a result is as readable as any file its owner writes.
        part.chmod(0o666 & ~_UMASK)
        _to_disk(part)
        part.replace(path)
        _to_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, would survive a loss of power."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folders
    try:
        # Some network file systems refuse it for folders; there the rename alone has to do.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def must_exist(path: Path) -> None:
    """Refuse a path that is no file, and name the files of its kind that lie beside it."""
    if path.is_file():
        return
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; name a file in it")
    there = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))[:6]
    offer = f" In {path.parent} there are: {', '.join(there)}." if there else ""
    raise FileNotFoundError(f"there is no file {path}.{offer}")
