"""Path patching: what does one component tell another, and nobody else?

Patching a head changes everything that comes after it. To see only what it tells one receiver, hold all
other heads to what they said in the untouched run, let the change flow along the residual stream to the
receiver's input, and then run the model with that input and nothing else changed.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, Read, Readout, Request, run
from tvlens.metrics import Metric
from tvlens.models.runner import Runner, runner
from tvlens.patching.assemble import assemble, make_task
from tvlens.patching.grid import Grid, effects, make_grid
from tvlens.patching.pairs import Answers, Prompts, differences, lengths_of, paired
from tvlens.patching.results import Patching
from tvlens.patching.sweep import Cell, Source, Swept, exchanges, joined, observe, parts, sweep
from tvlens.sites import SITES, check_layer

SENDERS = ("z", "attn_out", "mlp_out")
INPUTS = ("q", "k", "v")
_AT_ONCE = 2**29  # bytes of held and received activations in one run


@dataclass(frozen=True)
class Receivers:
    """Who listens.

    Attributes:
        heads: Layer and head of each; empty for the final residual stream, which the logits read.
        inputs: Through which of its inputs a head listens.
        positions: At which positions; None for all.
    """

    heads: tuple[tuple[int, int], ...]
    inputs: tuple[str, ...]
    positions: tuple[int, ...] | None

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the heads, sorted."""
        return tuple(sorted({layer for layer, _ in self.heads}))


def patch_paths(
    model: Any,
    clean: Prompts,
    corrupted: Prompts,
    *,
    receivers: str | Sequence[Sequence[int]] = "final",
    inputs: str | Sequence[str] = "q",
    receiver_positions: int | Sequence[int] | None = None,
    senders: str | Sequence[str] = "z",
    freeze_mlps: bool = False,
    metric: str | Metric | Callable[..., Any] = "logit_difference",
    answers: Answers | None = None,
    wrong: Answers | None = None,
    layers: int | Sequence[int] | None = None,
    by: str | Sequence[str] | None = None,
    positions: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    direction: str = "noise",
    top: int = 0,
    plan: str = "auto",
    memory: int | None = None,
) -> Patching:
    """Exchange what each sender tells the receivers along the residual stream, and measure each time.

    In one run a sender's output comes from the other prompt, and all heads of later layers say what they
    said in the untouched run; what the receivers would hear is kept. In a second run the receivers hear that,
    and everything after them follows. For the final residual stream one run is enough.

    Args:
        model: A TransformerLens model.
        clean: As in `patch`.
        corrupted: As in `patch`.
        receivers: ``"final"``, the residual stream that the logits read, or layer and head of each receiver;
            they listen at once.
        inputs: Through which inputs heads listen: ``"q"``, ``"k"``, ``"v"``, or several. With ``"k"`` and
            ``"v"``, a receiver's head is a key-value head.
        receiver_positions: Positions at which heads listen, negative ones from the end; all by default.
        senders: ``"z"`` for heads, ``"mlp_out"`` or ``"attn_out"`` for whole layers, or several.
        freeze_mlps: Whether later MLPs, too, say what they said in the untouched run. Otherwise a path may
            lead through them.
        metric: As in `patch`.
        answers: As in `patch`.
        wrong: As in `patch`.
        layers: Layers of the senders; all by default.
        by: As in `patch`; layer by head for heads, else layer.
        positions: Positions at which senders are exchanged; all by default.
        heads: Heads that send; all by default.
        direction: ``"noise"``, as Wang et al.: clean prompts, what is sent is corrupted; or ``"denoise"``.
        top: As in `patch`.
        plan: As in `patch`.
        memory: As in `patch`.

    Returns:
        The metric by sender for every prompt. A sender that no receiver comes after changes nothing.

    Raises:
        ValueError: As in `patch`; or a receiver, input or sender does not exist.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> result = tv.patch_paths(model, "a->A b->", "a->a b->", answers="B", wrong="b")
        >>> dict(result.value.sizes)
        {'site': 1, 'layer': 2, 'head': 4, 'prompt': 1}

    References:
        Wang, Variengien, Conmy, Shlegeris, Steinhardt 2023, arXiv:2211.00593; Goldowsky-Dill, MacLeod, Sato,
        Arora 2023, arXiv:2304.05969.
    """
    started = time.perf_counter()
    sent = (senders,) if isinstance(senders, str) else tuple(senders)
    for site in sent:
        if site not in SENDERS:
            raise unknown("sender", site, SENDERS)
    if by is None:
        by = ("layer", "head") if all("head" in SITES[site].dims for site in sent) else ("layer",)
    batches, changed, written = paired(model, clean, corrupted, direction=direction)
    drive, lengths = runner(model), lengths_of(batches["clean"])
    listen = _receivers(drive, receivers, inputs, receiver_positions, int(lengths.min()))
    grid = make_grid(
        drive, lengths, sites=sent, layers=layers, by=by, positions=positions, heads=heads
    )
    limits = {"plan": plan, "memory": memory}
    seen = observe(model, batches, "clean", {}, **limits)
    task = make_task(model, batches["clean"], metric, seen.logits, answers=answers, wrong=wrong)
    held = ("z", "mlp_out") if freeze_mlps else ("z",)
    differs = differences(batches["clean"], batches["corrupted"])
    swept = []
    for rows in parts(drive, batches[changed], (*held, *sent), drive.n_layers):
        can = effects(drive, lengths[rows], differs[rows, : lengths[rows].max()])
        stay, give = batches[changed].rows(rows), batches[written].rows(rows)
        base, source = _activations(model, stay, give, held, grid, drive.n_layers, **limits)
        readout = task.readout(rows)
        work = _Work(model, drive, stay, grid, listen, base, readout, top, limits)
        swept.append(work.run(exchanges(grid, can, source)))
    return assemble(
        model,
        grid,
        joined(swept),
        task,
        batches,
        started=started,
        method="patch_paths",
        direction=direction,
        receivers=[list(head) for head in listen.heads] or "final",
        inputs=list(listen.inputs) if listen.heads else None,
        receiver_positions=list(listen.positions) if listen.positions else None,
        freeze_mlps=freeze_mlps,
        heading=f"Path patching ({direction})",
        verb=f"Letting {_named(listen)} hear the {written}",
    )


def _receivers(
    drive: Runner,
    receivers: str | Sequence[Sequence[int]],
    inputs: str | Sequence[str],
    positions: int | Sequence[int] | None,
    shortest: int,
) -> Receivers:
    """Check who is to listen."""
    through = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    for name in through:
        if name not in INPUTS:
            raise unknown("input", name, INPUTS)
    if isinstance(receivers, str):
        if receivers != "final":
            raise unknown("receiver", receivers, ["final"], hint="Heads are (layer, head) pairs.")
        return Receivers((), (), None)
    found = []
    for receiver in receivers:
        if isinstance(receiver, int | str) or len(receiver) != 2:
            raise ValueError(
                f"receivers are pairs, as in [(23, 3)] for head 3 of layer 23; {receivers!r} arrived."
            )
        layer, head = check_layer(receiver[0], drive.n_layers), receiver[1]
        n_heads = min(drive.site_shape(name)[0] for name in through)
        if not 0 <= head < n_heads:
            raise ValueError(
                f"receiver head {head} asked for, but inputs {', '.join(through)} have {n_heads} heads in "
                f"this model: 0 to {n_heads - 1} (of k and v, heads are key-value heads)."
            )
        found.append((layer, head))
    if not found:
        raise ValueError("receivers is empty; give (layer, head) pairs, or 'final'.")
    at = None if positions is None else [positions] if isinstance(positions, int) else positions
    for position in at or ():
        if not -shortest <= position < shortest:
            raise ValueError(
                f"receiver position {position} asked for, but the shortest prompt has {shortest} "
                f"tokens: {-shortest} to {shortest - 1}."
            )
    return Receivers(tuple(dict.fromkeys(found)), through, None if at is None else tuple(at))


def _named(listen: Receivers) -> str:
    if not listen.heads:
        return "the logits"
    through = ", ".join(listen.inputs)
    return f"{through} of {', '.join(f'{layer}.{head}' for layer, head in listen.heads)}"


def _activations(
    model: Any,
    stay: TokenBatch,
    give: TokenBatch,
    held: tuple[str, ...],
    grid: Grid,
    n_layers: int,
    **limits: Any,
) -> tuple[Source, Source]:
    """What held components say, and what senders send instead."""
    every = tuple(range(n_layers))
    requests = [
        Request(stay, reads=tuple(Read(site, every, None) for site in held)),
        Request(give, reads=tuple(Read(site, grid.layers, None) for site in grid.sites)),
    ]
    base, other = run(model, requests, **limits)
    lengths = lengths_of(stay)
    return (
        Source({s: a[0] for s, a in zip(held, base.activations, strict=True)}, every, lengths),
        Source(
            {s: a[0] for s, a in zip(grid.sites, other.activations, strict=True)},
            grid.layers,
            lengths,
        ),
    )


@dataclass(frozen=True)
class _Work:
    """One part of the prompts: senders in pieces that fit, each run once or twice."""

    model: Any
    drive: Runner
    batch: TokenBatch
    grid: Grid
    listen: Receivers
    base: Source
    readout: Readout
    top: int
    limits: dict[str, Any]

    def run(self, cells: Iterator[tuple[int, Cell]]) -> Swept:
        """Run all senders that someone hears."""
        layer_of = {number: layer for number, _, layer, _, _ in self.grid.cells()}
        last = max(self.listen.layers, default=self.drive.n_layers)
        heard = [(n, cell, layer_of[n]) for n, cell in cells if layer_of[n] < last]
        found: list[tuple[int, Cell]] = []
        swept: Swept | None = None
        step = self.at_once()
        for begin in range(0, len(heard), step):
            some = [
                (number, (*cell, *self.held(cell[0].site, layer, last)))
                for number, cell, layer in heard[begin : begin + step]
            ]
            if self.listen.heads:
                found += self.received(some)
            else:
                swept = self.measured(some, swept)
        return self.measured(found, swept) if self.listen.heads or swept is None else swept

    def at_once(self) -> int:
        """How many senders fit into one run, with all that is held and received for them."""
        sites = (*self.base.activations, *self.listen.inputs)
        numbers = sum(math.prod(self.drive.site_shape(site)) for site in sites)
        width = self.batch.tokens.shape[1]
        each = numbers * self.drive.n_layers * len(self.batch) * width * self.drive.dtype.itemsize
        return max(_AT_ONCE // max(each, 1), 1)

    def held(self, sender: str, layer: int, last: int) -> Iterator[Edit]:
        """Edits that let everyone after a sender say what they said in the untouched run."""
        for deep in range(layer, last):
            for site in self.base.activations:
                # The MLP of a head's own layer hears the head.
                if deep > layer or (site == "mlp_out" and sender != "mlp_out"):
                    yield Edit(site, deep, self.base.at(site, deep, None, None), None)

    def received(self, cells: list[tuple[int, Cell]]) -> list[tuple[int, Cell]]:
        """First run: turn what senders say into edits of what the receivers hear."""
        listen = self.listen
        reads = tuple(Read(name, listen.layers, None) for name in listen.inputs)
        request = Request(self.batch, cells=tuple(cell for _, cell in cells), reads=reads)
        (output,) = run(self.model, [request], **self.limits)
        # Copies of the receivers' part, so that the rest is forgotten.
        kept = {
            (name, layer, head): activations[:, :, listen.layers.index(layer), :, head].clone()
            for name, activations in zip(listen.inputs, output.activations, strict=True)
            for layer, head in listen.heads
        }
        return [
            (
                number,
                tuple(edit for key, each in kept.items() for edit in self.hears(*key, each[i])),
            )
            for i, (number, _) in enumerate(cells)
        ]

    def hears(
        self, name: str, layer: int, head: int, values: Float[Tensor, "prompt position d_head"]
    ) -> Iterator[Edit]:
        """Edits of one input of one receiver."""
        if self.listen.positions is None:
            yield Edit(name, layer, values, None, head)
            return
        heard = Source({name: values[:, None]}, (layer,), lengths_of(self.batch))
        for position in self.listen.positions:
            yield Edit(name, layer, heard.at(name, layer, position, None), position, head)

    def measured(self, cells: list[tuple[int, Cell]], before: Swept | None = None) -> Swept:
        """Run cells to the end, and put their values among those found before."""
        swept = sweep(
            self.model, self.batch, self.grid, cells, self.readout, top=self.top, **self.limits
        )
        if before is None:
            return swept
        numbers = [number for number, _ in cells]
        before.values[numbers] = swept.values[numbers]
        if before.top is not None and swept.top is not None:
            for old, new in zip(before.top, swept.top, strict=True):
                old[numbers] = new[numbers]
        return replace(before, n_run=before.n_run + swept.n_run)
