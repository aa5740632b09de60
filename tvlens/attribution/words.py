"""Attribution in words: which answers are meant, and which tokens attention read from."""

import numpy as np
import xarray as xr

from tvlens._words import fixed, listed
from tvlens.plots.theme import visible

_SEVERAL = " | "  # between answers that are all right
_ROLES = {"query": "the query", "last": "the last token", "bos": "the first token"}


def answers(data: xr.Dataset) -> str:
    """Say which tokens are meant, or only their parts where prompts have different ones.

    Args:
        data: Data with ``answer``, perhaps ``wrong``, and the texts whose first tokens they are.

    Returns:
        Such as ``"␣Paris against ␣Rome"``.

    Example:
        >>> answers(xr.Dataset(coords={"answer": ("prompt", [" Paris"]), "wrong": ("prompt", [" Rome"])}))
        '␣Paris against ␣Rome'
    """
    there = [name for name in ("answer", "wrong") if name in data.coords]
    shared = all(len(set(map(str, data[name].values))) == 1 for name in there)
    if not shared:
        parts = any(_longer(data, name) for name in there)
        said = "right against wrong answer" if "wrong" in there else "each prompt's own answer"
        return said + ", first tokens" * parts
    return " against ".join(_token(data, name) for name in there)


def _token(data: xr.Dataset, name: str) -> str:
    """The token, and of which text it is the first where there is more."""
    said = _SEVERAL.join(visible(t) for t in str(data[name].values[0]).split(_SEVERAL))
    if not _longer(data, name):
        return said
    return f"{said} of {visible(str(data[f'{name}_text'].values[0]))}"


def _longer(data: xr.Dataset, name: str) -> bool:
    """Whether an answer goes on after the token that is meant."""
    if f"{name}_text" not in data.coords:
        return False
    pairs = zip(data[name].values, data[f"{name}_text"].values, strict=True)
    return any(_parts(whole) - _parts(token) for token, whole in pairs)


def _parts(said: str) -> set[str]:
    # Where prompt and answer would run into one word, a space was put between them.
    return {part.strip() for part in said.split(_SEVERAL)} - {""}


def read_from(attention: xr.DataArray) -> str:
    """Say which tokens, or which parts of which demonstrations, attention read most from.

    Args:
        attention: What attention added, by position or by demonstration and role.

    Returns:
        The two largest sums over layers and heads; nothing where attention was not split so far.

    Example:
        >>> attention = xr.DataArray(
        ...     [[0.5, 2.0]], dims=("prompt", "position"), coords={"token": ("position", ["0: a", "1: b"])}
        ... )
        >>> read_from(attention)
        'position 1 (b) +2.00 and position 0 (a) +0.50'
    """
    kept = [d for d in ("position", "demonstration", "role") if d in attention.dims]
    if not kept:
        return ""
    over = [d for d in attention.dims if d not in (*kept, "prompt")]
    there = attention.notnull().any(over)
    sums = attention.sum(over, skipna=True).where(there).mean("prompt", skipna=True)
    cells = sums.stack(cell=kept)
    size = np.abs(np.nan_to_num(cells.values))
    order = [i for i in np.argsort(-size, kind="stable")[:2] if size[i] > 0.005]
    named = []
    for at in order:
        cell = cells.isel(cell=int(at))
        place = _position(cell) if "position" in kept else _origin(cell)
        named.append(f"{place} {fixed(float(cell), sign=True)}")
    return listed(named)


def _position(cell: xr.DataArray) -> str:
    token = str(cell["token"].values).partition(": ")[2] if "token" in cell.coords else ""
    # Where prompts have several tokens there, none of them is named.
    named = f" ({visible(token)})" if token and not token.endswith("…") else ""
    return f"position {int(cell['position'])}{named}"


def _origin(cell: xr.DataArray) -> str:
    role, where = str(cell["role"].values), str(cell["demonstration"].values)
    if role in _ROLES:
        return _ROLES[role]
    said = "the words around" if role == "other" else f"the {role} of"
    return f"{said} {'the query' if where == 'query' else f'demonstration {where}'}"
