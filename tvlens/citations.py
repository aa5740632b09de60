"""Cite what you used.

Papers are named where the idea is used: in the "References" section of a function's docstring, by
arXiv id or by the key in ``references.bib``, and in the ``references`` of a result class. `cite`
collects them, so a citation list follows the code instead of being kept by hand.
"""

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

from tvlens._errors import unknown

ARXIV = re.compile(r"\d{4}\.\d{4,5}")
_DEFAULT = ("tvlens", "nanda2022transformerlens", "hendel2023context")
_SECTION = re.compile(r"^References:?\n(?:-+\n)?(.*?)(?=^\w[\w ]*:\n|\Z)", re.MULTILINE | re.DOTALL)


def cite(*objects: Any) -> str:
    """Give BibTeX for functions, classes, results, arXiv ids or BibTeX keys.

    Args:
        *objects: What was used. Nothing: tvlens itself, TransformerLens, and the paper on task
            vectors.

    Returns:
        BibTeX entries, each once, in the order of the objects.

    Raises:
        ValueError: An object names no reference, or a name is in no entry.

    Example:
        >>> from tvlens.intervals import wilson
        >>> "1927" in cite(wilson, "2310.15916")
        True
    """
    keys = [key for item in objects for key in _keys(item)] if objects else list(_DEFAULT)
    return "\n\n".join(entries()[key] for key in dict.fromkeys(keys)) + "\n"


@cache
def entries() -> dict[str, str]:
    """Read the bibliography.

    Returns:
        BibTeX key to the text of its entry.

    Example:
        >>> "hendel2023context" in entries()
        True
    """
    text = Path(__file__).with_name("references.bib").read_text(encoding="utf-8")
    found = re.findall(r"^@\w+\{([^,\s]+),\n.*?^\}", text, re.MULTILINE | re.DOTALL)
    blocks = [block.group(0) for block in re.finditer(r"^@.*?^\}", text, re.MULTILINE | re.DOTALL)]
    return dict(zip(found, blocks, strict=True))


def _keys(item: Any) -> list[str]:
    """Find the BibTeX keys that an object, a text or a result stands for."""
    if isinstance(item, str):
        return [_resolve(item)]
    keys = [_resolve(name) for name in getattr(item, "references", ())]
    documented = item if hasattr(item, "__name__") else type(item)
    section = _SECTION.search(inspect.getdoc(documented) or "")
    if section:
        words = re.findall(ARXIV.pattern + r"|[\w-]+", section.group(1))
        keys += [_resolve(word) for word in words if word in entries() or ARXIV.fullmatch(word)]
    if not keys:
        name = getattr(item, "__name__", type(item).__name__)
        raise ValueError(
            f"{name} names no reference. Give a function with a References section, a result, an "
            f"arXiv id, or a key: {', '.join(sorted(entries()))}"
        )
    return keys


def _resolve(name: str) -> str:
    """Turn a key or an arXiv id into a key of the bibliography."""
    if name in entries():
        return name
    match = ARXIV.search(name)
    if match and match.group(0) in _by_arxiv():
        return _by_arxiv()[match.group(0)]
    raise unknown("reference", name, [*entries(), *_by_arxiv()])


@cache
def _by_arxiv() -> dict[str, str]:
    pairs = ((re.search(r"eprint\s*=\s*\{([^}]+)\}", text), key) for key, text in entries().items())
    return {match.group(1): key for match, key in pairs if match}
