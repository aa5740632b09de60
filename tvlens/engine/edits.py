"""The edits of all cells, gathered so that each site of each layer is written at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tvlens.engine.layout import Layout, edited_tokens
from tvlens.engine.request import Edit, Request, Taken


@dataclass
class Write:
    """Edits of one site that are carried out at once: one token (and head) for each row of values.

    Attributes:
        tokens: Places in the site's activation.
        heads: Head of each; None where all heads are written.
        values: Gives what is written; only then is it put together, so that one site's values are held
            at a time.
        mode: ``"replace"`` or ``"add"``.
        source: Places in the same activation whose values, times ``scale``, are written instead.
        scale: Factor on these.
    """

    tokens: np.ndarray
    heads: np.ndarray | None
    values: Callable[[], Tensor] | None
    mode: str
    source: np.ndarray | None = None
    scale: float = 1.0

    def there(self) -> "Write":
        """Leave out places that do not exist: nobody asks what becomes of them."""
        there = self.tokens >= 0
        if there.all():
            return self
        heads = None if self.heads is None else self.heads[there]
        if self.source is not None or self.values is None:
            source = None if self.source is None else self.source[there]
            return Write(self.tokens[there], heads, None, self.mode, source, self.scale)
        return Write(self.tokens[there], heads, partial(_some, self.values, there), self.mode)

    def within(self, place: np.ndarray, n_keys: int) -> "Write":
        """The part of an edit of attention weights that falls into a group of rows with so many keys."""
        values = partial(_first_keys, self.values, n_keys) if self.values is not None else None
        return Write(place[self.tokens], self.heads, values, self.mode).there()


def _some(values: Callable[[], Tensor], chosen: np.ndarray) -> Tensor:
    every = values()
    return every[torch.from_numpy(np.flatnonzero(chosen)).to(every.device)]


def _first_keys(values: Callable[[], Tensor], n_keys: int) -> Tensor:
    kept = values()[..., :n_keys]
    return pad(kept, (0, n_keys - kept.shape[-1]))


def _joined(values: Sequence[Callable[[], Tensor]]) -> Tensor:
    first = values[0]()
    return (
        first
        if len(values) == 1
        else torch.cat([first, *(each().to(first) for each in values[1:])])
    )


def collect(requests: Sequence[Request], layout: Layout) -> dict[tuple[int, str], list[Write]]:
    """Gather the edits of all cells by layer and site; those of one cell keep their order.

    Args:
        requests: The requests.
        layout: Their rows.

    Returns:
        For layer and site, what to write, in turn.
    """
    groups: dict[tuple, list[tuple[int, int, Edit]]] = {}
    for r, request in enumerate(requests):
        for c, cell in enumerate(request.cells):
            turns: dict[tuple[int, str], int] = {}
            for edit in cell:
                place = (edit.layer, edit.site)
                turn = turns[place] = turns.get(place, -1) + 1
                if edit.layer <= layout.final:
                    taken = edit.scale if isinstance(edit.values, Taken) else None
                    key = (*place, turn, edit.mode, edit.head is None, taken)
                    groups.setdefault(key, []).append((r, c, edit))
    writes: dict[tuple[int, str], list[Write]] = {}
    lengths = [request.batch.lengths.cpu().numpy() for request in requests]
    for key in sorted(groups, key=lambda key: key[:3]):
        layer, site, _, mode, headless, taken = key
        parts = list(_parts(groups[key], layout, lengths))
        tokens = layout.place(np.concatenate([part[0] for part in parts]), site, layer)
        heads = None if headless else np.concatenate([part[1] for part in parts])
        if taken is None:
            write = Write(tokens, heads, partial(_joined, [part[2] for part in parts]), mode)
        else:
            source = layout.place(np.concatenate([part[3] for part in parts]), site, layer)
            write = Write(tokens, heads, None, mode, source, taken)
        writes.setdefault((layer, site), []).append(write.there())
    return writes


# Tokens, heads, values, and the tokens that values are taken from instead.
Part = tuple[np.ndarray, np.ndarray, Callable[[], Tensor], np.ndarray]


def _parts(
    group: list[tuple[int, int, Edit]], layout: Layout, lengths: list[np.ndarray]
) -> Iterator[Part]:
    """Tokens, heads and values of a group of edits; those of the common kind all at once."""
    common: dict[int, list[tuple[int, Edit]]] = {}
    for r, c, edit in group:
        if edit.position is None or edit.where is not None or edit.site == "pattern":
            yield _one(edit, layout, layout.row_of[r][c], lengths[r])
        else:
            common.setdefault(r, []).append((c, edit))
    for r, found in common.items():
        yield _many(found, layout, r, lengths[r])


def _many(found: list[tuple[int, Edit]], layout: Layout, r: int, lengths: np.ndarray) -> Part:
    """Edits of one position in every prompt."""
    position = np.array([edit.position for _, edit in found])[:, None]
    at = np.where(position < 0, lengths + position, position)
    tokens = layout.rows.source[layout.row_of[r][[c for c, _ in found]], at]
    heads = np.repeat([edit.head or 0 for _, edit in found], len(lengths))
    edits = [edit for _, edit in found]
    source = tokens
    others = [e.values.request for e in edits if isinstance(e.values, Taken)]
    if others:
        other = np.array(others)[:, None]
        source = layout.clean_tokens(other, np.arange(len(lengths)), position)
    return tokens.ravel(), heads, partial(_for_all, edits, len(lengths)), source.ravel()


def _for_all(edits: list[Edit], n_prompts: int) -> Tensor:
    """The values of edits of one position, for every prompt."""
    given = [(edit, edit.given) for edit in edits]
    values = [
        _scaled(edit, v if len(v) == n_prompts else v.expand(n_prompts, *v.shape[1:]))
        for edit, v in given
    ]
    return values[0] if len(values) == 1 else torch.cat([each.to(values[0]) for each in values])


def _one(edit: Edit, layout: Layout, row_of: np.ndarray, lengths: np.ndarray) -> Part:
    prompts, position = edited_tokens(edit, lengths)
    tokens = layout.rows.source[row_of[prompts], position]
    values = partial(_for_some, edit, prompts, position, lengths)
    source = tokens
    if isinstance(edit.values, Taken):
        asked = position if edit.position is None else edit.position
        source = layout.clean_tokens(edit.values.request, prompts, asked)
    return tokens, np.full(len(tokens), edit.head or 0), values, source


def _for_some(edit: Edit, prompts: np.ndarray, position: np.ndarray, lengths: np.ndarray) -> Tensor:
    """The values of an edit for these tokens."""
    given = edit.given
    index = (prompts if len(given) > 1 else np.zeros_like(prompts),)
    if edit.position is None:
        index += (position if given.shape[1] > 1 else np.zeros_like(position),)
    device = given.device
    values = given[tuple(torch.from_numpy(i.copy()).to(device) for i in index)]
    if edit.site == "pattern":
        # What lies beyond a prompt's end is no key of its own.
        beyond = np.arange(values.shape[-1]) >= lengths[prompts][:, None]
        beyond = torch.from_numpy(beyond).to(device)
        values = values.masked_fill(beyond if edit.head is not None else beyond[:, None], 0)
    return _scaled(edit, values)


def _scaled(edit: Edit, values: Tensor) -> Tensor:
    return values if edit.scale == 1.0 else edit.scale * values
