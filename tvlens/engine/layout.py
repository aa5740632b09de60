"""The order of work of a pass: which tokens run, when each arrives, and where its row finds its keys.

A *row* is one prompt in one cell. All rows' tokens stand in one long list, each with its position in its
prompt. A row holds only the tokens that are its own, those from its first edited position on; what comes
before is its parent's, the clean row of the prompt, and a clean row may in turn continue another request's.
Tokens are sorted by when they arrive: an edit in layer l changes nothing below l, so its row is copied from
the clean one only there. The table `source` says for each row and position which token stands there, its
own or an ancestor's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tvlens.engine.request import Edit, Request, Taken

# In which order a block reaches its sites, and at which of five points a row can arrive for an edit there.
ARRIVAL = {
    "resid_pre": 0,
    "q": 0,
    "k": 0,
    "v": 0,
    "pattern": 0,
    "z": 1,
    "attn_out": 2,
    "resid_mid": 2,
    "mlp_out": 3,
    "resid_post": 4,
}
STAGES = 5
_ALWAYS = -1  # when clean rows arrive
# Sites before the final block drops the tokens whose residual nobody needs any more.
_EARLY = ("resid_pre", "q", "k", "v")


def time_of(site: str, layer: int) -> int:
    """When in a pass a site of a layer is reached, in points of arrival."""
    return layer * STAGES + ARRIVAL[site]


@dataclass
class Rows:
    """All rows of a pass, sorted by when they arrive.

    Attributes:
        start: First own position.
        length: Length of the whole prompt.
        time: When it arrives.
        clean: The clean row it is copied from; its own number for a clean row.
        offset: Where its tokens begin in the list; the last entry is the number of tokens.
        source: For each position, the token that stands there.
    """

    start: np.ndarray
    length: np.ndarray
    time: np.ndarray
    clean: np.ndarray
    offset: np.ndarray
    source: np.ndarray

    def arrived(self, time: int) -> int:
        """How many rows are there at a time."""
        return int(np.searchsorted(self.time, time, side="right"))

    def at(self, row_of: np.ndarray, time: int) -> np.ndarray:
        """Replace rows that have not arrived by the clean rows that still stand for them."""
        return np.where(self.time[row_of] <= time, row_of, self.clean[row_of])


@dataclass
class Layout:
    """What a pass needs to know before it starts.

    Attributes:
        rows: The rows.
        row_of: For each request, cell and prompt, its row.
        token_ids: Token id of every token.
        position: Position of every token in its prompt.
        final: The last block that is run.
        n_prompts: Number of prompts of each request; the clean row of prompt b of request r is row
            r * n_prompts + b.
        keep: Tokens that are needed after the final block's keys and values; sorted.
        last: For each request, cell and prompt, its last token.
    """

    rows: Rows
    row_of: list[np.ndarray]
    token_ids: np.ndarray
    position: np.ndarray
    final: int
    n_prompts: int
    keep: np.ndarray = field(init=False)
    last: list[np.ndarray] = field(init=False)

    def tokens_at(self, time: int) -> int:
        """How many tokens are there at a time."""
        return int(self.rows.offset[self.rows.arrived(time)])

    def dropped(self, site: str, layer: int) -> bool:
        """Whether unneeded tokens are gone when this site is reached."""
        return layer == self.final and site not in _EARLY and site != "pattern"

    def place(self, tokens: np.ndarray, site: str, layer: int) -> np.ndarray:
        """Where tokens stand in the activation of a site; -1 for those that were dropped."""
        if not self.dropped(site, layer):
            return tokens
        if not len(self.keep):
            return np.full_like(tokens, -1)
        at = np.searchsorted(self.keep, tokens)
        found = self.keep[np.minimum(at, len(self.keep) - 1)] == tokens
        return np.where(found, at, -1)

    def copies(self, time: int) -> np.ndarray:
        """For the tokens that arrive at a time, the places of the tokens they are copies of."""
        rows = self.rows
        begin, end = rows.arrived(time - 1), rows.arrived(time)
        tokens = np.arange(rows.offset[begin], rows.offset[end])
        if not len(tokens):
            return tokens
        layer, stage = divmod(time, STAGES)
        if layer == self.final and stage > 0:
            tokens = tokens[np.isin(tokens, self.keep, assume_unique=True)]
            return np.searchsorted(self.keep, self._originals(tokens))
        return self._originals(tokens)

    def _originals(self, tokens: np.ndarray) -> np.ndarray:
        """The clean tokens that own tokens of edited rows are copied from."""
        row = np.searchsorted(self.rows.offset, tokens, side="right") - 1
        return self.rows.source[self.rows.clean[row], self.position[tokens]]

    def clean_tokens(
        self, request: np.ndarray | int, prompt: np.ndarray, position: np.ndarray | int
    ) -> np.ndarray:
        """Tokens of clean rows at these positions, negative ones counted from the end."""
        clean = request * self.n_prompts + prompt
        length = self.rows.length[clean]
        at = np.where(np.less(position, 0), length + position, position)
        # A prompt that is too short for it is left out by the edit's own mask.
        return self.rows.source[clean, np.clip(at, 0, length - 1)]

    def read_tokens(
        self, request: int, site: str, layer: int, position: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that a read keeps, for cell and prompt (and position), and which of them exist."""
        rows = self.rows
        row = rows.at(self.row_of[request], time_of(site, layer))
        length = rows.length[row]
        if position is not None:
            at = length + position if position < 0 else np.full_like(length, position)
            return rows.source[row, at], np.ones_like(length, dtype=bool)
        width = int(length.max())
        return rows.source[row][..., :width], np.arange(width) < length[..., None]


def lay_out(requests: Sequence[Request], *, n_layers: int, whole: bool) -> Layout:
    """Plan a pass over requests whose row i belongs together.

    Args:
        requests: Requests with equally many prompts.
        n_layers: Number of blocks of the model.
        whole: Let every row begin at its first token, sharing nothing.

    Returns:
        The layout.
    """
    final = _final_layer(requests, n_layers)
    rows, row_of, ids, position = _rows(requests, final, whole=whole)
    layout = Layout(rows, row_of, ids, position, final, len(requests[0].batch))
    ends = [rows.at(each, final * STAGES + STAGES - 1) for each in row_of]
    layout.last = [rows.source[row, rows.length[row] - 1] for row in ends]
    layout.keep = _needed(layout, requests)
    return layout


def edited_tokens(edit: Edit, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and positions that an edit touches, in the order of its values.

    Args:
        edit: The edit.
        lengths: Length of each prompt.

    Returns:
        The prompts and the positions, one entry for each edited token.
    """
    prompts = np.arange(len(lengths))
    if edit.where is not None:
        prompts = prompts[edit.where.cpu().numpy()]
    if edit.position is not None:
        at = lengths[prompts] + edit.position if edit.position < 0 else edit.position
        return prompts, np.broadcast_to(at, prompts.shape)
    length = lengths[prompts]
    every = np.repeat(prompts, length)
    return every, np.arange(len(every)) - np.repeat(np.cumsum(length) - length, length)


def _final_layer(requests: Sequence[Request], n_layers: int) -> int:
    """The last block that anything asked for depends on."""
    if any(request.readout is not None for request in requests):
        return n_layers - 1
    layers = [layer for request in requests for read in request.reads for layer in read.layers]
    return max(layers, default=-1)


def _rows(
    requests: Sequence[Request], final: int, *, whole: bool
) -> tuple[Rows, list[np.ndarray], np.ndarray, np.ndarray]:
    """Make all rows, sort them by arrival, and lay out their tokens."""
    tokens, lengths = _texts(requests)
    n_prompts = lengths.shape[1]
    start, parent = _shared(tokens, lengths)
    if whole:
        start = np.zeros_like(start)
    # First the clean rows; the number of such a row is also that of its text.
    text, starts, times = (
        [np.arange(lengths.size)],
        [start.ravel()],
        [np.full(lengths.size, _ALWAYS)],
    )
    row_of, n_rows = [], lengths.size
    for r, request in enumerate(requests):
        own = r * n_prompts + np.arange(n_prompts)
        first, when = _first_edits(request.cells, lengths[r])
        cell, prompt = np.nonzero(when <= final * STAGES + STAGES - 1)
        numbers = np.tile(own, (len(request.cells), 1))
        numbers[cell, prompt] = n_rows + np.arange(len(cell))
        n_rows += len(cell)
        row_of.append(numbers)
        text.append(own[prompt])
        starts.append(np.zeros_like(cell) if whole else first[cell, prompt])
        times.append(when[cell, prompt])
    time, of = np.concatenate(times), np.concatenate(text)
    order = np.argsort(time, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    # The sort is stable and clean rows come first, so their numbers do not change.
    rows, position = _tokens(
        lengths.ravel()[of[order]], np.concatenate(starts)[order], time[order], of[order], parent
    )
    ids = tokens.reshape(lengths.size, -1)[np.repeat(of[order], np.diff(rows.offset)), position]
    return rows, [rank[numbers] for numbers in row_of], ids, position


def _texts(requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all requests' prompts, moved to the left, and their lengths: request, prompt."""
    width = max(request.batch.tokens.shape[1] for request in requests)
    tokens = np.zeros((len(requests), len(requests[0].batch), width), dtype=np.int64)
    lengths = np.stack([request.batch.lengths.cpu().numpy() for request in requests])
    for r, request in enumerate(requests):
        real = request.batch.mask.cpu().numpy()
        tokens[r][np.arange(width) < lengths[r][:, None]] = request.batch.tokens.cpu().numpy()[real]
    return tokens, lengths


def _shared(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each prompt the earlier request that begins most like it, and how many tokens they share."""
    shared, parent = np.zeros_like(lengths), np.zeros_like(lengths)
    columns = np.arange(tokens.shape[2])
    for r in range(1, len(tokens)):
        there = columns < np.minimum(lengths[:r], lengths[r])[..., None]
        common = np.cumprod((tokens[:r] == tokens[r]) & there, axis=2).sum(axis=2)
        parent[r] = common.argmax(axis=0)
        shared[r] = common.max(axis=0)
    return shared, parent


def _tokens(
    length: np.ndarray, start: np.ndarray, time: np.ndarray, clean: np.ndarray, parent: np.ndarray
) -> tuple[Rows, np.ndarray]:
    own = length - start
    offset = np.concatenate([[0], np.cumsum(own)])
    position = np.arange(offset[-1]) - np.repeat(offset[:-1] - start, own)
    columns = np.arange(length.max(initial=0))
    source = offset[:-1, None] + columns - start[:, None]
    # A row inherits from one before it: request by request, since that one may have inherited in its turn.
    n_requests, n_prompts = parent.shape
    heirs = [
        (slice(r * n_prompts, (r + 1) * n_prompts), parent[r] * n_prompts + np.arange(n_prompts))
        for r in range(1, n_requests)
    ]
    for rows, parents in (*heirs, (slice(parent.size, None), clean[parent.size :])):
        source[rows] = np.where(columns < start[rows, None], source[parents], source[rows])
    # Columns beyond a prompt's end are never looked at: any token will do.
    source = np.where(columns < length[:, None], source, 0)
    return Rows(start, length, time, clean, offset, source), position


def _first_edits(
    cells: Sequence[tuple[Edit, ...]], lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each cell and prompt, the first position that is edited, and when that is first done."""
    never, longest = np.iinfo(np.int64).max, int(lengths.max())
    # The first of the positions that count from the start, and of those that count from the end.
    counted = np.full((len(cells), 2), longest)
    time = np.full(len(cells), never)
    special = []
    for c, cell in enumerate(cells):
        for edit in cell:
            if edit.where is not None:
                special.append((c, edit))
                continue
            position = edit.position or 0
            if position < 0:
                counted[c, 1] = min(counted[c, 1], position)
            else:
                counted[c, 0] = min(counted[c, 0], position)
            time[c] = min(time[c], time_of(edit.site, edit.layer))
    first = np.minimum(counted[:, :1], counted[:, 1:] + lengths)
    when = np.repeat(time[:, None], len(lengths), axis=1)
    for c, edit in special:
        prompts, at = edited_tokens(edit, lengths)
        np.minimum.at(first[c], prompts, at)
        when[c, prompts] = np.minimum(when[c, prompts], time_of(edit.site, edit.layer))
    return first, when


def _needed(layout: Layout, requests: Sequence[Request]) -> np.ndarray:
    """Tokens whose residual is needed after the final block's keys and values."""
    wanted: list[np.ndarray] = []
    for r, request in enumerate(requests):
        wanted += _sources(layout, request)
        if request.readout is not None:
            wanted.append(layout.last[r].ravel())
        for site, position in _final_reads(request, layout.final):
            tokens, there = layout.read_tokens(r, site, layout.final, position)
            wanted.append(tokens[there])
    if not wanted:
        return np.empty(0, dtype=np.int64)
    tokens = np.unique(np.concatenate(wanted))
    # Rows that arrive within the block are copied from clean tokens, which must be there too.
    late = layout.tokens_at(layout.final * STAGES)
    originals = layout._originals(tokens[tokens >= late])
    return np.unique(np.concatenate([tokens, originals]))


def _sources(layout: Layout, request: Request) -> list[np.ndarray]:
    """Tokens that values are taken from after the final block's keys and values."""
    asked = {
        (edit.values.request, edit.position)
        for cell in request.cells
        for edit in cell
        if edit.layer == layout.final
        and isinstance(edit.values, Taken)
        and layout.dropped(edit.site, edit.layer)
    }
    found = []
    for other, position in asked:
        prompts = np.arange(layout.n_prompts)
        every = np.arange(layout.rows.source.shape[1])
        at = every if position is None else np.array([position])
        found.append(layout.clean_tokens(other, prompts[:, None], at).ravel())
    return found


def _final_reads(request: Request, final: int) -> Iterator[tuple[str, int | None]]:
    for read in request.reads:
        if final in read.layers and read.site not in _EARLY:
            yield read.site, read.position
