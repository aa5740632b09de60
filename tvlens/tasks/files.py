"""Task files: JSON and CSV, read strictly.

A task file that is read wrongly gives wrong accuracies without a word, so everything doubtful is an
error that names the file and, where there is one, the line.
"""

import csv
import io
import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tvlens._errors import unknown

Items = dict[str, tuple[str, ...]]

_TEXT_KEYS = ("name", "family", "description", "source", "licence")
_HEADER_KEYS = (*_TEXT_KEYS, "spaced", "reverse", "items")


class _DuplicateKeyError(ValueError):
    """Two equal keys in one JSON object, of which json would keep the last in silence."""


def read_task_file(path: Path) -> tuple[Items, dict[str, Any]]:
    """Read the items of a task file and what it says about itself.

    Args:
        path: A ``.json`` or ``.csv`` file.

    Returns:
        The items, input -> accepted answers, and the header (empty unless the file is in tvlens'
        own form).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read as a task; the message says why.

    Example:
        >>> items, header = read_task_file(Path("capitals.csv"))  # doctest: +SKIP
    """
    readers = {".json": _read_json, ".csv": _read_csv}
    if not path.is_file():
        raise _not_a_file(path, tuple(readers))
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: a task file ends in {' or '.join(readers)}; this one ends in {path.suffix!r}."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: not UTF-8 text: byte 0x{error.object[error.start]:02x} on line {line}. "
            f"Save the file as UTF-8."
        ) from None
    return reader(path, text)


def slug(text: str) -> str:
    """Turn any text into a valid task name.

    Args:
        text: E.g. a file's name.

    Returns:
        Lower-case letters, digits and ``_``, starting with a letter.

    Example:
        >>> slug("My Task-2")
        'my_task_2'
    """
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    return name if name[:1].isalpha() else f"task_{name}".rstrip("_")


def _not_a_file(path: Path, suffixes: tuple[str, ...]) -> OSError:
    if path.is_dir():
        return IsADirectoryError(f"{path} is a folder; a task is one .json or .csv file.")
    near: list[str] = []
    if path.parent.is_dir():
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in suffixes)
        near = get_close_matches(path.name, names, n=3, cutoff=0.5)
    offer = f" Nearest there: {', '.join(near)}." if near else ""
    return FileNotFoundError(
        f"no task file {path}.{offer} Built-in tasks load with load_task(name)."
    )


def _read_json(path: Path, text: str) -> tuple[Items, dict[str, Any]]:
    try:
        raw = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except _DuplicateKeyError as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        # Whole numbers of thousands of digits, lists in thousands of lists.
        raise ValueError(f"{path}: no task in JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(
            f'{path}: a task is a JSON object, {{"input": "output", ...}}; this is a '
            f"{type(raw).__name__}."
        )
    # A task may well have an input called "items"; then its value is an answer, not an object.
    own_form = isinstance(raw.get("items"), dict)
    header = {key: value for key, value in raw.items() if key != "items"} if own_form else {}
    _check_header(path, header)
    items = raw["items"] if own_form else raw
    return {x: _accepted(path, x, value) for x, value in items.items()}, header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise _DuplicateKeyError(
                f"duplicate key {key!r}; give each input once, several accepted answers as a list: "
                f'{{{json.dumps(key, ensure_ascii=False)}: ["first", "second"]}}.'
            )
        out[key] = value
    return out


def _check_header(path: Path, header: dict[str, Any]) -> None:
    for key, value in header.items():
        if key not in _HEADER_KEYS:
            raise ValueError(f"{path}: {unknown('key of a task file', key, _HEADER_KEYS)}")
        kind = str if key in _TEXT_KEYS else bool if key == "spaced" else dict
        if not isinstance(value, kind):
            raise ValueError(
                f"{path}: {key!r} must be a {kind.__name__}; got {type(value).__name__} {value!r}."
            )


def _accepted(path: Path, x: str, value: object) -> tuple[str, ...]:
    accepted: list[str] = []
    for y in value if isinstance(value, list) else [value]:
        if not isinstance(y, str):
            raise ValueError(
                f"{path}: the answer of {x!r} must be a string or a list of strings; "
                f'got {type(y).__name__} {y!r}. Write it in quotes: "{y}".'
            )
        accepted.append(y)
    return tuple(accepted)


def _read_csv(path: Path, text: str) -> tuple[Items, dict[str, Any]]:
    items: Items = {}
    lines: dict[str, int] = {}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells) or (not lines and [c.lower() for c in cells] == ["input", "output"]):
                continue
            x, y = _two_cells(path, reader.line_num, cells)
            if x in lines:
                raise ValueError(
                    f"{path}: duplicate key {x!r} on line {reader.line_num} (first on line "
                    f"{lines[x]}: {items[x][0]!r}). Several accepted answers need the JSON form: "
                    f'{{{json.dumps(x, ensure_ascii=False)}: ["first", "second"]}}.'
                )
            items[x], lines[x] = (y,), reader.line_num
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV: {error} on line {reader.line_num}.") from None
    return items, {}


def _two_cells(path: Path, line: int, cells: list[str]) -> tuple[str, str]:
    if len(cells) != 2:
        raise ValueError(
            f"{path}: line {line} has {len(cells)} column{'' if len(cells) == 1 else 's'}, not the "
            f'2 of input,output. A cell with a comma stands in quotes: "a,b,c",a.'
        )
    for cell, column in zip(cells, ("input", "output"), strict=True):
        if not cell:
            raise ValueError(f"{path}: line {line} has an empty {column}.")
    return cells[0], cells[1]
