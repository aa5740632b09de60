"""What can be asked of the engine: which prompts, which edits, what to read.

A *cell* is one way of running the prompts: a tuple of edits, empty for the clean run. A sweep is many
cells over the same prompts. The request says nothing about how it is run; that is the plan's business.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from tvlens._errors import unknown
from tvlens.encoding import TokenBatch
from tvlens.engine.readout import Readout
from tvlens.sites import SITES

MODES = ("replace", "add")
# What a plan gives back for a request: what its reads kept, and what its readout computed.
Kept = tuple[list[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Taken:
    """Values that stand at the same place in the clean run of another request of the same call.

    Both runs go up the stack side by side, so nothing has to be kept: the way to exchange activations.

    Attributes:
        request: Number of the other request. Its prompt i is where prompt i's values come from.
    """

    request: int


# One row for each prompt, or one for all of them.
Values = Float[Tensor, " row *site"] | Taken


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of an activation.

    Attributes:
        site: Name of the site, see `tvlens.sites.SITES`.
        layer: Layer, from 0.
        values: What is written, for every prompt (or one row for all of them): the site's own axes, the
            head's left out where ``head`` is given. Where ``position`` is None, positions come second. Or
            `Taken`, from another run (for every site but ``pattern``).
        position: Token position; negative counts from the end of each prompt. None is every position;
            values then begin at each prompt's first token (or have one position for all of them).
        head: Head, for a site that has heads; None is all of them.
        mode: ``"replace"`` writes ``scale * values``; ``"add"`` adds it to what is there.
        scale: Factor on the values.
        where: Prompts in which the edit takes place; None is all. The others run as if it were not there.
    """

    site: str
    layer: int
    values: Values
    position: int | None = -1
    head: int | None = None
    mode: str = "replace"
    scale: float = 1.0
    where: Bool[Tensor, " prompt"] | None = None

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise unknown("site", self.site, SITES)
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        if self.head is not None and "head" not in SITES[self.site].dims:
            headed = [name for name, site in SITES.items() if "head" in site.dims]
            raise ValueError(f"{self.site} has no heads; these sites have: {', '.join(headed)}.")

    def rows(self, rows: slice) -> "Edit":
        """The same edit for a range of the prompts."""
        values = self.values
        if not isinstance(values, Taken) and len(values) > 1:
            values = values[rows]
        where = None if self.where is None else self.where[rows]
        return replace(self, values=values, where=where)

    @property
    def given(self) -> Float[Tensor, " row *site"]:
        """The values, where they are not taken from another run."""
        if isinstance(self.values, Taken):
            raise ValueError(f"the values are taken from request {self.values.request} in its run.")
        return self.values


@dataclass(frozen=True)
class Read:
    """Activations to keep: one position of one site, in some layers.

    Attributes:
        site: Name of the site, see `tvlens.sites.SITES`.
        layers: Layers, from 0.
        position: Token position; negative counts from the end of each prompt. None keeps every position,
            from each prompt's first token on, with zeros after its last.
    """

    site: str
    layers: tuple[int, ...]
    position: int | None = -1

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise unknown("site", self.site, SITES)


@dataclass(frozen=True, eq=False)
class Request:
    """One batch of prompts, in how many ways to run it, and what to keep.

    Attributes:
        batch: The prompts.
        cells: Ways of running them; ``((),)`` is the clean run alone.
        reads: Activations to keep, in every cell.
        readout: What to compute from the logits at each prompt's last position; None runs no unembedding.
    """

    batch: TokenBatch
    cells: tuple[tuple[Edit, ...], ...] = ((),)
    reads: tuple[Read, ...] = ()
    readout: Readout | None = None

    def part(self, prompts: slice, cells: slice) -> "Request":
        """The same request for a range of its prompts and of its cells."""
        chosen = tuple(tuple(edit.rows(prompts) for edit in cell) for cell in self.cells[cells])
        readout = self.readout.rows(prompts) if self.readout is not None else None
        return Request(self.batch.rows(prompts), chosen, self.reads, readout)


@dataclass(frozen=True)
class Plan:
    """How a request was run, and why so.

    Attributes:
        name: ``"suffix"``, ``"growing"`` or ``"plain"``.
        reason: Why this plan was taken.
        seconds: What each plan was expected to take, from measured costs; empty where there was no choice.
        tokens: How many tokens went through each block, over all chunks, on average over the blocks.
        chunks: In how many parts the request was run.
        bytes: Memory the largest part was expected to take, activations alone.
    """

    name: str
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    chunks: int = 1
    bytes: int = 0

    def __str__(self) -> str:
        costs = ", ".join(f"{name} {cost:.2g} s" for name, cost in self.seconds.items())
        expected = f"; expected: {costs}" if costs else ""
        return (
            f"{self.name}: {self.reason}{expected}; {self.tokens} tokens a block, "
            f"{self.chunks} chunks, {self.bytes / 2**20:.0f} MB"
        )


@dataclass(frozen=True, eq=False)
class Output:
    """What came back.

    Attributes:
        activations: One tensor for each `Read`: cell, prompt, layer, position where all were read, then
            the site's own axes.
        values: What the readout computed, by its names, with cell and prompt in front.
        plan: How it was run, and why so.
    """

    # Layers and axes differ from read to read, so they have no common name.
    activations: tuple[Float[Tensor, "cell prompt _ ..."], ...]
    values: dict[str, Tensor]
    plan: Plan


def join(parts: list[Output], *, dim: int) -> Output:
    """Put parts of one request together again, along cells (0) or prompts (1)."""
    first = parts[0]
    return Output(
        activations=tuple(
            torch.cat(_as_wide(tensors, dim), dim=dim)
            for tensors in zip(*(part.activations for part in parts), strict=True)
        ),
        values={
            key: torch.cat([part.values[key] for part in parts], dim=dim) for key in first.values
        },
        plan=first.plan,
    )


def _as_wide(parts: tuple[Tensor, ...], dim: int) -> list[Tensor]:
    """Fill up with zeros: the longest prompt of one part may be shorter than that of another."""
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    wide = []
    for part in parts:
        missing = [n - size for n, size in zip(shape, part.shape, strict=True)]
        missing[dim] = 0
        wide.append(
            pad(part, [n for m in reversed(missing) for n in (0, m)]) if any(missing) else part
        )
    return wide
