"""The folder of a sweep: finished cells, failed ones, and what was planned.

``cells/ab/KEY.json`` says that a cell is finished, and holds its few numbers; where there are more, it names
a safetensors file beside it and that file's hash. The record is written last, each file appears whole or
not at all, holds a hash of its own content, and is not written again. So a process may be killed at any
moment, and any number of processes may write at once. On an object store the same holds, since an object
appears when it is whole.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tvlens import provenance
from tvlens._files import replacing

SCHEMA = 1
RECORD, FAILURE, PLAN = "sweep cell", "failed sweep cell", "sweep plan"
_PARTS = {
    RECORD: ("key", "cell", "numbers", "seconds"),
    FAILURE: ("key", "cell", "error", "traceback", "attempts"),
    PLAN: ("plan", "made"),
}


class Folder:
    """Where a sweep lies: a local or shared folder.

    Args:
        place: The folder's path; it is made when something is written.

    Raises:
        NotADirectoryError: There is a file of that name.
    """

    def __init__(self, place: str | Path) -> None:
        self.path = Path(place).expanduser().absolute()
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"a sweep is kept in a folder, but {self.path} is a file.")

    @staticmethod
    def at(place: "str | Path | Folder") -> "Folder":
        """Open a folder by its path, or by a URL that fsspec knows, e.g. ``s3://bucket/sweep``."""
        if isinstance(place, Folder):
            return place
        if isinstance(place, str) and place.startswith("file://"):
            return Folder(place.removeprefix("file://"))
        if isinstance(place, str) and "://" in place:
            return _Remote(place)
        return Folder(place)

    def __str__(self) -> str:
        return str(self.path)

    def finished(self) -> set[str]:
        """Keys of all finished cells."""
        return self._keys("cells")

    def failed(self) -> set[str]:
        """Keys of all cells that failed and have not succeeded since."""
        return self._keys("failed")

    def has(self, key: str) -> bool:
        """Whether a cell is finished."""
        return self._is_there(_place("cells", key))

    def keep(self, key: str, record: Mapping[str, Any], arrays: bytes | None = None) -> None:
        """Write a finished cell.

        Args:
            key: The cell's key.
            record: What is known about it, and its few numbers.
            arrays: Its many numbers, as `to_bytes` writes them.
        """
        known = {"schema": SCHEMA, "kind": RECORD, "key": key, **record}
        if arrays is not None:
            digest = hashlib.sha256(arrays).hexdigest()
            # Named by its content: two processes that compute the same cell do not touch each other's file.
            name = _named(key, digest)
            self._write(_place("cells", key, name), arrays)
            known["file"] = {"name": name, "sha256": digest, "bytes": len(arrays)}
        if not self.has(key):
            self._write(_place("cells", key), _json(known))
        self._remove(_place("failed", key))

    def fail(self, key: str, record: Mapping[str, Any]) -> None:
        """Write down that a cell failed, and how often it did."""
        place = _place("failed", key)
        try:
            before = self._checked(place, FAILURE)["attempts"]
        except (ValueError, FileNotFoundError):
            before = 0  # none, or damaged, or another process has just succeeded
        known = {"schema": SCHEMA, "kind": FAILURE, "key": key, **record, "attempts": before + 1}
        self._write(place, _json(known))

    def record(self, key: str) -> dict[str, Any]:
        """Read what is known about a finished cell."""
        return self._record("cells", key, RECORD)

    def failure(self, key: str) -> dict[str, Any]:
        """Read how a cell failed."""
        return self._record("failed", key, FAILURE)

    def content(self, record: Mapping[str, Any]) -> bytes:
        """Read a cell's file of arrays, and make sure that it is the one that was written.

        Args:
            record: The cell's record.

        Returns:
            The file's bytes.

        Raises:
            ValueError: It is missing, damaged, or named as no cell of ours would.
        """
        key, file = record["key"], record["file"]
        name = file["name"]
        again = "remove the cell's record and run the sweep again to compute it anew"
        if name != _named(key, str(file["sha256"])):
            raise ValueError(
                f"cell {key} of {self} names a file {name!r} that is not its own: {again}."
            )
        place = _place("cells", key, name)
        try:
            content = self._read(place)
        except FileNotFoundError:
            raise ValueError(f"{self}/{place} is missing: {again}.") from None
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise ValueError(f"{self}/{place} is not what was written there: {again}.")
        return content

    def save_plan(self, name: str, plan: Mapping[str, Any]) -> None:
        """Write down what was asked for, once."""
        place = f"plans/{name}.json"
        if not self._is_there(place):
            note = {"versions": provenance.versions(), "time_ns": time.time_ns()}
            self._write(place, _json({"schema": SCHEMA, "kind": PLAN, "plan": plan, "made": note}))

    def plans(self) -> dict[str, dict[str, Any]]:
        """Read all plans by name, the oldest first."""
        names = [n for n in self._names("plans") if n.endswith(".json") and n[0] != "."]
        read = {name.removesuffix(".json"): self._checked(f"plans/{name}", PLAN) for name in names}
        by_time = sorted(read.items(), key=lambda item: (item[1]["made"]["time_ns"], item[0]))
        return {name: document["plan"] for name, document in by_time}

    def _record(self, part: str, key: str, kind: str) -> dict[str, Any]:
        record = self._checked(_place(part, key), kind)
        if record["key"] != key:
            raise ValueError(f"{self}/{_place(part, key)} holds another cell, {record['key']!r}.")
        return record

    def _checked(self, place: str, kind: str) -> dict[str, Any]:
        document = _read_json(self._read(place), f"{self}/{place}")
        if document.get("kind") != kind:
            raise ValueError(f"{self}/{place} is no {kind}, but {document.get('kind')!r}.")
        lacking = [part for part in _PARTS[kind] if part not in document]
        if lacking:
            raise ValueError(f"{self}/{place} is no whole {kind}: it has no {lacking[0]!r}.")
        return document

    def _keys(self, part: str) -> set[str]:
        return {
            name.removesuffix(".json")
            for shelf in self._names(part)
            for name in self._names(f"{part}/{shelf}")
            if name.endswith(".json") and name[0] != "."
        }

    def _names(self, place: str) -> list[str]:
        try:
            return sorted(os.listdir(self.path / place))  # noqa: PTH208 - names, of thousands
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _is_there(self, place: str) -> bool:
        return (self.path / place).is_file()

    def _read(self, place: str) -> bytes:
        return (self.path / place).read_bytes()

    def _write(self, place: str, content: bytes) -> None:
        path = self.path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(content)

    def _remove(self, place: str) -> None:
        (self.path / place).unlink(missing_ok=True)


# Where an object appears when it is whole; elsewhere a file is written beside its place and moved there.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"}


class _Remote(Folder):
    """A folder on whatever fsspec reaches: an object store, a server, the memory of this process."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.system, self.root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            scheme = url.partition("://")[0]
            raise ValueError(f"{url} needs fsspec's package for {scheme}://: {error}") from error
        self.url = url.rstrip("/")
        protocol = self.system.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self.whole = bool(names & _OBJECT_STORES)

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return _Remote, (self.url,)

    def _names(self, place: str) -> list[str]:
        where = f"{self.root}/{place}"
        # What another process wrote since the last look is there, too.
        self.system.invalidate_cache()
        try:
            found: Iterable[str] = self.system.ls(where, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def _is_there(self, place: str) -> bool:
        return bool(self.system.exists(f"{self.root}/{place}"))

    def _read(self, place: str) -> bytes:
        return bytes(self.system.cat_file(f"{self.root}/{place}"))

    def _write(self, place: str, content: bytes) -> None:
        path = f"{self.root}/{place}"
        if self.whole:
            self.system.pipe_file(path, content)
            return
        self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        part = f"{path}.{uuid.uuid4().hex}"
        self.system.pipe_file(part, content)
        self.system.mv(part, path)

    def _remove(self, place: str) -> None:
        if self._is_there(place):
            self.system.rm_file(f"{self.root}/{place}")


def _place(part: str, key: str, name: str | None = None) -> str:
    # A folder of a million names is slow on many file systems; 256 folders of four thousand are not.
    return f"{part}/{key[:2]}/{name or f'{key}.json'}"


def _named(key: str, digest: str) -> str:
    return f"{key}-{digest[:8]}.safetensors"


def _json(document: Mapping[str, Any]) -> bytes:
    sealed = {**document, "sha256": _seal(document)}
    return (json.dumps(sealed, allow_nan=False) + "\n").encode()


def _seal(document: Mapping[str, Any]) -> str:
    """Hash of a document, whatever the order of its parts."""
    rest = {name: part for name, part in document.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_json(content: bytes, place: str) -> dict[str, Any]:
    """Read a document of ours; schema and damage are looked at here, for all of them."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{place} holds no JSON, it may be cut off: remove it, and run the sweep again."
        ) from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise ValueError(f"{place} was not written by a sweep of tvlens: it has no schema.")
    if schema <= SCHEMA and document.get("sha256") != _seal(document):
        raise ValueError(
            f"{place} is not what a sweep wrote there: remove it, and run the sweep again."
        )
    if schema > SCHEMA:
        raise ValueError(
            f"{place} was written by a newer tvlens: schema {schema}, this version reads up to {SCHEMA}. "
            "Update with: pip install -U tvlens"
        )
    return document
