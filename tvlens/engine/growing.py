"""The growing plan: one pass up the stack serves every prompt view and every cell.

Three exact savings, all from causality. Nothing before the first edited or read position depends on what
happens there, so that prefix runs once and its keys and values serve every row that continues it; prompts
of several requests that start with the same demonstrations share it too. An edit at layer l changes
nothing below l, so the row that carries the edit joins the batch only there. And only last positions
reach the unembedding. At any moment one layer's keys and values are alive, never the whole stack's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from tvlens.engine.request import Edit, Output, Request
from tvlens.models.runner import Runner
from tvlens.sites import hook_name

LOGIT_ROWS = 256  # rows a call of the unembedding: 50 MB of fp32 logits for a vocabulary of 49,152


@dataclass
class _Stream:
    """Rows of one request: suffixes that continue shared prefixes, growing as edited cells join.

    Attributes:
        tokens: Suffix tokens of the clean rows, padded on the right.
        mask: 1 where real, prefix included, for every row.
        prompt: Which prompt (and so which prefix) each row runs.
        starts: For each prompt, the absolute position of its first suffix token.
        lengths: For each prompt, its whole length.
        row_of: For each cell and prompt, its row: the clean one until the cell joins.
    """

    tokens: Int[Tensor, "prompt suffix"]
    mask: Int[Tensor, "row whole"]
    prompt: Int[Tensor, " row"]
    starts: Int[Tensor, " prompt"]
    lengths: Int[Tensor, " prompt"]
    row_of: Int[Tensor, "cell prompt"]
    resid: Tensor = field(init=False)

    def columns(self, position: int) -> Int[Tensor, " prompt"]:
        """Where a position lies in each prompt's suffix."""
        absolute = (
            self.lengths + position if position < 0 else torch.full_like(self.starts, position)
        )
        return absolute - self.starts

    def join(self, cell: int) -> None:
        """Give a cell rows of its own, as copies of the clean ones."""
        rows = self.row_of[cell].clone()  # read before it is overwritten
        self.row_of[cell] = len(self.prompt) + torch.arange(len(rows), device=rows.device)
        self.resid = torch.cat([self.resid, self.resid[rows]])
        self.mask = torch.cat([self.mask, self.mask[rows]])
        self.prompt = torch.cat([self.prompt, self.prompt[rows]])

    def write(self, activation: Tensor, edit: Edit, cell: int) -> Tensor:
        """Apply one cell's edit to an activation of all rows."""
        rows, at = self.row_of[cell], self.columns(edit.position)
        changed = activation.clone()
        changed[rows, at] = edit.apply(activation[rows, at])
        return changed

    def read(self, activation: Tensor, position: int) -> Tensor:
        """Take a position of an activation for every cell and prompt."""
        return activation[self.row_of, self.columns(position).expand_as(self.row_of)]


def run_growing(runner: Runner, requests: Sequence[Request]) -> list[Output]:
    """Run requests whose rows belong together, sharing what they share.

    Args:
        runner: The model, block by block.
        requests: Requests with equally many prompts; row i of each may start with the same tokens.

    Returns:
        One output for each request.
    """
    device = runner.device
    texts = [_token_lists(request) for request in requests]
    starts = _suffix_starts(requests, texts)
    prefix_tokens, prefix_mask = _pad_left(
        [text[:s] for text, s in zip(texts[0], starts, strict=True)]
    )
    prefix_tokens, prefix_mask = prefix_tokens.to(device), prefix_mask.to(device)
    streams = [
        _stream(text, starts, prefix_mask, r, device)
        for text, r in zip(texts, requests, strict=True)
    ]
    kept: list[list[dict[int, Tensor]]] = [[{} for _ in r.reads] for r in requests]
    shared = prefix_tokens.shape[1] > 0
    prefix = runner.embed(prefix_tokens, prefix_mask) if shared else None
    for stream in streams:
        stream.resid = runner.embed(stream.tokens, stream.mask)
    for layer in range(runner.n_layers):
        past = None
        if prefix is not None:
            prefix, past = runner.block(layer, prefix, prefix_mask)
        for stream, request, store in zip(streams, requests, kept, strict=True):
            _step(runner, layer, stream, request, store, past)
    return [
        Output(
            activations=tuple(
                torch.stack([found[layer] for layer in read.layers], dim=2)
                for read, found in zip(request.reads, store, strict=True)
            ),
            values=_read_out(runner, stream, request),
            plan=f"growing: {int(prefix_mask.sum())} prefix tokens shared, {len(stream.prompt)} rows",
        )
        for stream, request, store in zip(streams, requests, kept, strict=True)
    ]


def _step(
    runner: Runner,
    layer: int,
    stream: _Stream,
    request: Request,
    store: list[dict[int, Tensor]],
    past: object,
) -> None:
    """Take one request's rows through one block: join, run with edits, keep what is read."""
    here = [(c, e) for c, cell in enumerate(request.cells) for e in cell if e.layer == layer]
    late = [(c, e) for c, e in here if e.site == "resid_post"]
    early = [(c, e) for c, e in here if e.site != "resid_post"]
    joined = stream.row_of[:, 0] >= stream.row_of.shape[1]
    for cell in dict.fromkeys(c for c, _ in early):
        if not joined[cell]:
            stream.join(cell)
            joined[cell] = True
    seen: dict[int, Tensor] = {}

    def inside(activation: Tensor, hook: object, *, site: str) -> Tensor:
        for cell, edit in early:
            if edit.site == site:
                activation = stream.write(activation, edit, cell)
        for i, read in enumerate(request.reads):
            if read.site == site and layer in read.layers:
                seen[i] = stream.read(activation, read.position)
        return activation

    sites = {e.site for _, e in early} | {
        r.site for r in request.reads if r.site != "resid_post" and layer in r.layers
    }
    with runner.hooked(
        [(hook_name(s, layer), lambda a, hook, s=s: inside(a, hook, site=s)) for s in sorted(sites)]
    ):
        stream.resid, _ = runner.block(
            layer, stream.resid, stream.mask, past=past, rows=stream.prompt
        )
    # An edit after the block needs no block of its own: the cell joins above it.
    for cell, edit in late:
        if not joined[cell]:
            stream.join(cell)
            joined[cell] = True
        stream.resid = stream.write(stream.resid, edit, cell)
    for i, read in enumerate(request.reads):
        if layer in read.layers:
            store[i][layer] = seen[i] if i in seen else stream.read(stream.resid, read.position)


def _read_out(runner: Runner, stream: _Stream, request: Request) -> dict[str, Tensor]:
    """Unembed each distinct row's last position once, and hand the results out to cells."""
    if request.readout is None:
        return {}
    used, position_of = stream.row_of.unique(return_inverse=True)
    prompts = stream.prompt[used]
    last = stream.resid[used, stream.columns(-1)[prompts]]
    parts = [
        request.readout(runner.logits(rows), which)
        for rows, which in zip(last.split(LOGIT_ROWS), prompts.split(LOGIT_ROWS), strict=True)
    ]
    return {key: torch.cat([part[key] for part in parts])[position_of] for key in parts[0]}


def _token_lists(request: Request) -> list[list[int]]:
    batch = request.batch
    return [t[m].tolist() for t, m in zip(batch.tokens, batch.mask, strict=True)]


def _suffix_starts(requests: Sequence[Request], texts: list[list[list[int]]]) -> list[int]:
    """For each row, where the part begins that must be run for each request and cell by itself."""
    if len(requests) == 1 and requests[0].cells == ((),):
        return [0] * len(texts[0])  # nothing would be shared: run prompts whole
    starts = []
    for row in range(len(texts[0])):
        tokens = [text[row] for text in texts]
        first = min(
            len(t) + p if p < 0 else p
            for t, request in zip(tokens, requests, strict=True)
            for p in request.positions()
        )
        alike = next(
            (i for i, column in enumerate(zip(*tokens, strict=False)) if len(set(column)) > 1),
            min(map(len, tokens)),
        )
        starts.append(max(min(first, alike), 0))
    return starts


def _stream(
    texts: list[list[int]],
    starts: list[int],
    prefix_mask: Tensor,
    request: Request,
    device: torch.device,
) -> _Stream:
    suffixes = [text[start:] for text, start in zip(texts, starts, strict=True)]
    width = max(map(len, suffixes))
    tokens = torch.tensor([s + [0] * (width - len(s)) for s in suffixes], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in suffixes], device=device)
    everyone = torch.arange(len(texts), device=device)
    return _Stream(
        tokens=tokens,
        mask=torch.cat([prefix_mask, mask], dim=1),
        prompt=everyone,
        starts=torch.tensor(starts, device=device),
        lengths=torch.tensor([len(t) for t in texts], device=device),
        row_of=everyone.repeat(len(request.cells), 1),
    )


def _pad_left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(r)) + r for r in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], dtype=torch.long)
    return tokens.reshape(len(rows), width), mask.reshape(len(rows), width)
