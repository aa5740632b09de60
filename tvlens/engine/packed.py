"""One pass up the stack for every prompt and every cell: the growing batch of suffixes.

Three exact savings, all from causality. Nothing before the first edited position depends on the edit, so a
row runs only what comes after, on its prompt's own keys and values; prompts of several requests that begin
with the same demonstrations share these too. An edit at layer l changes nothing below l, so its row joins
only there. And in the last block only the tokens whose residual someone asked for go on past the keys and
values. What is left runs as one list of tokens through large matrix products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tvlens.engine.attention import Bucket, attend, group_rows, numbers_held
from tvlens.engine.edits import Write, collect
from tvlens.engine.layout import STAGES, Layout
from tvlens.engine.request import Kept, Read, Request
from tvlens.models.runner import Block, Runner


@dataclass(frozen=True)
class Pieces:
    """How large the pieces are that a pass works on, which changes its speed and memory, not its numbers.

    Attributes:
        tokens: Tokens that go through norms, projections and MLP at once.
        attention: Numbers that attention holds at once: gathered keys and values, and weights.
        overhead: What one more group of rows costs in attention, counted in queries of padding.
        logits: Rows that are unembedded at once.
    """

    tokens: int = 1024
    attention: int = 2**22
    overhead: int = 256
    logits: int = 256


class Indices:
    """All indices of a pass, which go to the device in one piece: a GPU waits for each transfer."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.sent: dict[torch.device, list[Tensor]] = {}

    def add(self, array: np.ndarray) -> int:
        """Note an array of indices; the number that comes back stands for it."""
        self.arrays.append(array)
        return len(self.arrays) - 1

    def on(self, device: torch.device, number: int) -> Int[Tensor, "..."]:
        """Give noted indices on a device."""
        if device not in self.sent:
            flat = torch.from_numpy(np.concatenate([a.ravel() for a in self.arrays]))
            ends = np.cumsum([0, *(a.size for a in self.arrays)]).tolist()
            flat = flat.to(device)
            self.sent[device] = [
                flat[begin:end].view(array.shape)
                for (begin, end), array in zip(pairwise(ends), self.arrays, strict=True)
            ]
        return self.sent[device][number]


class _Pass:
    """A pass: everything that is known beforehand, and the steps that use it."""

    def __init__(
        self, runner: Runner, requests: Sequence[Request], layout: Layout, pieces: Pieces
    ) -> None:
        self.runner, self.requests, self.layout, self.pieces = runner, requests, layout, pieces
        self.device = runner.device
        self.writes = collect(requests, layout)
        self.kept: list[list[dict[int, Tensor]]] = [[{} for _ in r.reads] for r in requests]
        self.indices = Indices()
        note = self.indices.add
        self.tokens = note(layout.token_ids[: layout.tokens_at(-1)])
        self.position = note(layout.position)
        self.copies = {
            time: note(copied)
            for time in np.unique(layout.rows.time).tolist()
            if time >= 0 and len(copied := layout.copies(time))
        }
        self.groups = self.note_groups()
        self.buckets: dict[tuple[int, torch.device], list[Bucket]] = {}
        n_before = layout.tokens_at(layout.final * STAGES)
        self.needed = note(layout.keep[layout.keep < n_before])
        self.written = {
            id(write): (
                note(write.tokens),
                None if write.heads is None else note(write.heads),
                None if write.source is None else note(write.source),
            )
            for writes in self.writes.values()
            for write in writes
        }
        self.read: dict[tuple[str, int], list[tuple[int, int, int, int | None]]] = {}
        for r, i, layer in self.reads():
            place = (requests[r].reads[i].site, layer)
            self.read.setdefault(place, []).append((r, i, *self.note_read(r, i, layer)))
        self.ends = {r: self.note_ends(r) for r, asked in enumerate(requests) if asked.readout}

    def index(self, number: int) -> Tensor:
        """Give noted indices where the current block is."""
        return self.indices.on(self.device, number)

    def run(self) -> Tensor:
        """Take all tokens up the stack; give the residual of those that are needed at the end."""
        first = self.index(self.tokens)
        resid = self.runner.embed(first, self.index(self.position)[: len(first)])
        for layer in range(self.layout.final + 1):
            block = self.runner.block(layer)
            self.device = block.device
            resid = self.block(layer, block, resid.to(block.device))
        return resid

    def block(self, layer: int, block: Block, resid: Tensor) -> Tensor:
        """Run one block: rows arrive, sites are edited and read in the order the block reaches them."""
        (resid,) = self.arrive(layer, 0, resid)
        resid = self.touch("resid_pre", layer, resid)
        q, k, v = self.by_piece(block.project, resid)
        q, k, v = (self.touch(s, layer, x) for s, x in (("q", q), ("k", k), ("v", v)))
        q, k = block.rotate(q, k, self.index(self.position)[: len(resid)])
        z = attend(block, q, k, v, self.buckets_of(layer), touch=self.pattern_touch(layer))
        if layer == self.layout.final:
            resid, z = resid[self.index(self.needed)], z[self.index(self.needed)]
        resid, z = self.arrive(layer, 1, resid, z)
        (attn_out,) = self.by_piece(block.attn_out, self.touch("z", layer, z))
        resid, attn_out = self.arrive(layer, 2, resid, attn_out)
        attn_out = self.touch("attn_out", layer, attn_out)
        summed = resid + attn_out
        if not block.parallel:
            resid = summed = self.touch("resid_mid", layer, summed)
        (mlp_out,) = self.by_piece(block.mlp_out, resid)
        summed, mlp_out = self.arrive(layer, 3, summed, mlp_out)
        (resid,) = self.arrive(layer, 4, summed + self.touch("mlp_out", layer, mlp_out))
        return self.touch("resid_post", layer, resid)

    def by_piece(self, function: Callable[[Tensor], Tensor | tuple], x: Tensor) -> tuple:
        """Apply what acts on each token alone, in pieces that fit a cache."""
        pieces = (x,) if len(x) <= self.pieces.tokens else x.split(self.pieces.tokens)
        outs = [function(piece) for piece in pieces]
        parts = [out if isinstance(out, tuple) else (out,) for out in outs]
        if len(parts) == 1:
            return parts[0]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def arrive(self, layer: int, stage: int, *states: Tensor) -> tuple[Tensor, ...]:
        """Let the rows join that are first edited here, as copies of clean tokens."""
        time = layer * STAGES + stage
        if time not in self.copies:
            return states
        at = self.index(self.copies[time])
        return tuple(torch.cat([state, state[at]]) for state in states)

    def touch(self, site: str, layer: int, activation: Tensor) -> Tensor:
        """Edit a site, then keep what is read there."""
        for write in self.writes.get((layer, site), ()):
            tokens, heads, source = self.written[id(write)]
            at = None if heads is None else self.index(heads)
            other = None if source is None else self.index(source)
            _apply(write, activation, self.index(tokens), at, other)
        for r, i, tokens, missing in self.read.get((site, layer), ()):
            kept = activation[self.index(tokens)]
            if missing is not None:
                kept = kept.flatten(0, 2)
                kept[self.index(missing)] = 0
                kept = kept.unflatten(0, self.index(tokens).shape)
            self.kept[r][i][layer] = kept
        return activation

    def reads(self, *, pattern: bool = False) -> list[tuple[int, int, int]]:
        """Request, read and layer of everything that is kept."""
        return [
            (r, i, layer)
            for r, request in enumerate(self.requests)
            for i, read in enumerate(request.reads)
            for layer in read.layers
            if (read.site == "pattern") == pattern
        ]

    def note_read(self, r: int, i: int, layer: int) -> tuple[int, int | None]:
        """Note which tokens a read keeps, and which of them do not exist."""
        read = self.requests[r].reads[i]
        tokens, there = self.layout.read_tokens(r, read.site, layer, read.position)
        place = np.maximum(self.layout.place(tokens, read.site, layer), 0)
        missing = None if there.all() else self.indices.add(np.flatnonzero(~there))
        return self.indices.add(place), missing

    def note_ends(self, r: int) -> tuple[int, int, int]:
        """Note the distinct last tokens, the prompt of each, and which one each cell and prompt has."""
        last = self.layout.last[r]
        used, first, again = np.unique(last, return_index=True, return_inverse=True)
        note = self.indices.add
        places = self.layout.place(used, "resid_post", self.layout.final)
        return note(places), note(first % last.shape[1]), note(again.reshape(last.shape))

    def note_groups(self) -> list[list[tuple[int, ...]]]:
        """Note each layer's groups of rows; layers between which none arrives share one list of them."""
        arrived, final = self.layout.rows.arrived, self.layout.final
        noted: dict[tuple[int, bool], list[tuple[int, ...]]] = {}
        for layer in range(final + 1):
            key = (arrived(layer * STAGES), layer == final)
            if key not in noted:
                noted[key] = [tuple(map(self.indices.add, g)) for g in self.rows_in_groups(layer)]
        return [noted[arrived(i * STAGES), i == final] for i in range(final + 1)]

    def buckets_of(self, layer: int) -> list[Bucket]:
        """Groups of rows where the current block is, kept while the next blocks have the same."""
        key = (id(self.groups[layer]), self.device)
        if key not in self.buckets:
            self.buckets = {key: [Bucket(*map(self.index, g)) for g in self.groups[layer]]}
        return self.buckets[key]

    def rows_in_groups(self, layer: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Group the rows that are there by their number of queries: queries, keys, positions."""
        layout, rows = self.layout, self.layout.rows
        offset = rows.offset[: rows.arrived(layer * STAGES) + 1]
        final = layer == layout.final
        if final:
            offset = np.searchsorted(layout.keep, offset)
        counts, width = np.diff(offset), int(rows.length.max())
        fixed, each = numbers_held(self.runner, width)
        found = []
        overhead, most = self.pieces.overhead, self.pieces.attention
        for group in group_rows(counts, overhead=overhead, fixed=fixed, each=each, most=most):
            # A row with fewer queries repeats its last one, which changes nothing.
            column = np.minimum(np.arange(int(counts[group[0]])), counts[group][:, None] - 1)
            queries = offset[group][:, None] + column
            queries = layout.keep[queries] if final else queries
            keys = rows.source[group, : int(rows.length[group].max())]
            found.append((queries, keys, layout.position[queries]))
        return found

    def pattern_touch(self, layer: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What edits and reads attention weights, if anyone asked for that in this layer."""
        writes = self.writes.get((layer, "pattern"), [])
        reads = [(r, i) for r, i, deep in self.reads(pattern=True) if deep == layer]
        return partial(self.touch_pattern, layer, writes, reads) if writes or reads else None

    def touch_pattern(
        self,
        layer: int,
        writes: list[Write],
        reads: list[tuple[int, int]],
        pattern: Float[Tensor, "row query head key"],
        queries: Int[Tensor, "row query"],
    ) -> Float[Tensor, "row query head key"]:
        """Edit the attention weights of a group of rows, then keep what is read there."""
        flat, asked = pattern.flatten(0, 1), queries.cpu().numpy()
        place = np.full(len(self.layout.token_ids), -1)
        place[asked.ravel()] = np.arange(asked.size)
        for write in writes:
            here = write.within(place, flat.shape[-1])
            heads = None if here.heads is None else self.sent(here.heads)
            _apply(here, flat, self.sent(here.tokens), heads)
        for r, i in reads:
            self.keep_pattern(r, i, layer, self.requests[r].reads[i], flat, place)
        # Repeated queries were not edited: they get what the one they repeat has.
        return flat[self.sent(place[asked])] if writes else pattern

    def keep_pattern(
        self, r: int, i: int, layer: int, read: Read, flat: Tensor, place: np.ndarray
    ) -> None:
        """Keep those attention weights of one group of rows that a read asked for."""
        tokens, there = self.layout.read_tokens(r, "pattern", layer, read.position)
        n_keys = int(self.requests[r].batch.lengths.max())
        at = np.where(there, place[tokens], -1)
        if layer not in self.kept[r][i]:
            self.kept[r][i][layer] = flat.new_zeros(*tokens.shape, flat.shape[1], n_keys)
        found = at >= 0
        weights = flat[self.sent(at[found])][..., :n_keys]
        self.kept[r][i][layer][self.sent(found)] = pad(weights, (0, n_keys - weights.shape[-1]))

    def sent(self, array: np.ndarray) -> Tensor:
        """Bring indices that were not known beforehand to where the current block is."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def read_out(self, r: int, resid: Tensor) -> dict[str, Tensor]:
        """Unembed each distinct row's last position once, and hand the results out to cells."""
        readout = self.requests[r].readout
        if readout is None:
            return {}
        places, prompts, again = map(self.index, self.ends[r])
        rows, columns = resid[places], readout.columns
        columns = None if columns is None else columns.to(prompts.device)[prompts]
        parts = []
        for begin in range(0, len(rows), self.pieces.logits):
            some = slice(begin, begin + self.pieces.logits)
            logits = self.runner.logits(rows[some], None if columns is None else columns[some])
            parts.append(readout(logits, prompts[some].to(logits.device)))
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return {key: values[again.to(values.device)] for key, values in joined.items()}


def run_packed(
    runner: Runner, requests: Sequence[Request], layout: Layout, pieces: Pieces
) -> list[Kept]:
    """Run requests whose rows belong together, sharing what they share.

    Args:
        runner: The model in parts.
        requests: Requests with equally many prompts; row i of each may start with the same tokens.
        layout: The order of work, from `tvlens.engine.layout.lay_out`.
        pieces: Sizes of the pieces.

    Returns:
        For each request what its reads kept and what its readout computed.
    """
    runner.prepare(int(layout.rows.length.max()))
    state = _Pass(runner, requests, layout, pieces)
    resid = state.run()
    return [
        (
            [
                torch.stack([store[layer].to(runner.device) for layer in read.layers], dim=2)
                for read, store in zip(request.reads, state.kept[r], strict=True)
            ],
            state.read_out(r, resid),
        )
        for r, request in enumerate(requests)
    ]


def one_block(
    runner: Runner, layout: Layout, pieces: Pieces
) -> Callable[[], Float[Tensor, "token d_model"]]:
    """Give a function that runs the first block once, for measuring it.

    Args:
        runner: The model in parts.
        layout: Rows without edits or reads.
        pieces: Sizes of the pieces.

    Returns:
        The function.
    """
    layout.final = 1  # so that the first block keeps all its tokens
    state = _Pass(runner, (), layout, pieces)
    resid = runner.embed(state.index(state.tokens), state.index(state.position))
    block = runner.block(0)
    state.device = block.device
    return lambda: state.block(0, block, resid.to(block.device))


def _apply(
    write: Write,
    activation: Tensor,
    tokens: Tensor,
    heads: Tensor | None,
    source: Tensor | None = None,
) -> None:
    """Carry out edits, each token in place."""
    where = (tokens,) if heads is None else (tokens, heads)
    if source is not None:
        values = activation[(source,) if heads is None else (source, heads)]
        values = values if write.scale == 1.0 else write.scale * values
    elif write.values is not None:
        values = write.values().to(activation)
    else:
        raise ValueError("an edit needs values or places to take them from.")
    activation[where] = values if write.mode == "replace" else activation[where] + values
