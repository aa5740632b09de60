"""Which cells a sweep has, and which of them can change anything.

A cell is one place of the model whose activation is exchanged: a site and layer, and where the sweep goes by
them a position and a head. Causality makes many cells free: before the first token in which two prompts
differ all activations are equal, and in the last block only the last position is ever read out.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.models.runner import Runner
from tvlens.sites import SITES, check_layers

BY = ("layer", "position", "head")
# What a block's later tokens look at; anything else at a position stays at that position.
_SEEN_BY_OTHERS = ("resid_pre", "k", "v")
# In the first block these depend on the token alone.
_OF_THE_TOKEN = ("resid_pre", "q", "k", "v")


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep, as labels of its axes.

    Attributes:
        sites: Names of the sites.
        layers: Layers, from 0.
        positions: Positions by which the sweep goes, or None.
        heads: Heads by which it goes, or None.
        together: Positions that are exchanged at once where it does not go by position; None for all.
        heads_together: Heads that are exchanged at once where it does not go by head; None for all.
        n_heads: For each site, how many heads it has; 0 where it has none.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    together: tuple[int, ...] | None
    heads_together: tuple[int, ...] | None
    n_heads: dict[str, int]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes, without that of prompts."""
        there = {"position": self.positions, "head": self.heads}
        return ("site", "layer", *(name for name, axis in there.items() if axis is not None))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        axes = (self.sites, self.layers, self.positions, self.heads)
        return tuple(len(axis) for axis in axes if axis is not None)

    @property
    def by(self) -> tuple[str, ...]:
        """What varies from cell to cell."""
        return self.dims[1:]

    def cells(self) -> Iterator[tuple[int, str, int, int | None, int | None]]:
        """Go through all cells in the order of the axes: number, site, layer, position, head."""
        axes = (self.sites, self.layers, self.positions or (None,), self.heads or (None,))
        for number, cell in enumerate(itertools.product(*axes)):
            yield number, *cell

    def heads_of(self, site: str, head: int | None) -> tuple[int | None, ...]:
        """The heads that a cell exchanges; None is all of them. Empty where the site lacks the head."""
        if head is not None:
            return (head,) if head < self.n_heads[site] else ()
        return (None,) if self.heads_together is None else self.heads_together


def make_grid(
    runner: Runner,
    lengths: Int[np.ndarray, " prompt"],
    *,
    sites: str | Sequence[str],
    layers: int | Sequence[int] | None,
    by: Sequence[str],
    positions: int | Sequence[int] | None,
    heads: int | Sequence[int] | None,
) -> Grid:
    """Turn what was asked for into the cells of a sweep.

    Args:
        runner: The model.
        lengths: Number of tokens of each prompt.
        sites: One site or several.
        layers: Layers, negative ones from the end; all if None.
        by: What varies from cell to cell.
        positions: Which positions, negative ones from each prompt's end; all if None.
        heads: Which heads; all if None.

    Returns:
        The grid.

    Raises:
        ValueError: A name is unknown, or a site, layer, position or head does not exist.
    """
    by = (by,) if isinstance(by, str) else tuple(by)
    for name in by:
        if name not in BY:
            raise unknown("axis", name, BY)
    chosen = tuple(dict.fromkeys((sites,) if isinstance(sites, str) else sites))
    if not chosen:
        raise ValueError(f"no site asked for; there are: {', '.join(SITES)}.")
    deep = check_layers(layers, runner.n_layers)
    n_heads = {
        site: _heads_of(runner, site, deep, by_head="head" in by or heads is not None)
        for site in chosen
    }
    most = max(n_heads.values())
    # Side by side, heads that a site lacks are missing there; all at once, they cannot be exchanged.
    there = most if "head" in by else min(n_heads.values())
    for head in _several(heads, 0):
        if not 0 <= head < there:
            counts = ", ".join(f"{site!r} has {n}" for site, n in n_heads.items())
            raise ValueError(
                f"head {head} asked for, but of heads in this model {counts}: 0 to {there - 1}."
            )
    where = _positions(positions, int(lengths.max()))
    return Grid(
        sites=chosen,
        layers=tuple(dict.fromkeys(deep)),
        positions=(where or tuple(range(int(lengths.max())))) if "position" in by else None,
        heads=tuple(_several(heads, most)) if "head" in by else None,
        together=where if "position" not in by else None,
        heads_together=tuple(_several(heads, most))
        if heads is not None and "head" not in by
        else None,
        n_heads=n_heads,
    )


def _several(given: int | Sequence[int] | None, n: int) -> list[int]:
    """A list of numbers: those that were given, once each, or 0 to n - 1."""
    if given is None:
        return list(range(n))
    return list(dict.fromkeys([given] if isinstance(given, int) else map(int, given)))


def _heads_of(runner: Runner, site: str, layers: Sequence[int], *, by_head: bool) -> int:
    if site not in SITES:
        spellings = {"head_z": "z", "head_q": "q", "head_k": "k", "head_v": "v", "head_out": "z"}
        near = spellings.get(site)
        if near:
            raise ValueError(f"unknown site {site!r}. Nearest: {near}.")
        raise unknown("site", site, SITES)
    for layer in layers:
        if not runner.has(site, layer):
            there = [name for name in SITES if runner.has(name, layer)]
            raise ValueError(f"this model has no site {site!r}; it has {', '.join(there)}.")
    if "head" in SITES[site].dims:
        return runner.site_shape(site)[0]
    if by_head:
        headed = [name for name, known in SITES.items() if "head" in known.dims]
        raise ValueError(f"{site} has no heads; these sites have: {', '.join(headed)}.")
    return 0


def _positions(given: int | Sequence[int] | None, width: int) -> tuple[int, ...] | None:
    if given is None:
        return None
    if isinstance(given, str):
        raise TypeError(f"positions are numbers, -1 for the last; {given!r} arrived.")
    chosen = tuple(_several(given, 0))
    for position in chosen:
        if not -width <= position < width:
            raise ValueError(
                f"position {position} asked for, but the longest prompt has {width} tokens: "
                f"{-width} to {width - 1}."
            )
    if not chosen:
        raise ValueError("positions is empty; leave it out for all positions.")
    return chosen


@dataclass
class Effects:
    """Says for which prompts exchanging an activation can change the logits.

    Attributes:
        lengths: Number of tokens of each prompt.
        differs: Where the tokens of the two runs differ, from each prompt's first token on.
        n_layers: Number of blocks.
        causal: Whether tokens see earlier ones only.
    """

    lengths: Int[np.ndarray, " prompt"]
    differs: Bool[np.ndarray, "prompt position"]
    n_layers: int
    causal: bool = True
    _known: dict[tuple[int | None, str], Tensor | bool] = field(default_factory=dict)

    @property
    def first(self) -> Int[np.ndarray, " prompt"]:
        """The first position at which each pair differs; its length where it does not."""
        return np.where(self.differs.any(axis=1), self.differs.argmax(axis=1), self.lengths)

    def where(self, site: str, layer: int, position: int | None) -> Bool[Tensor, " prompt"] | bool:
        """Prompts in which an exchange matters: True for all, False for none."""
        rule = ""
        if layer == 0 and site in _OF_THE_TOKEN:
            rule = "token"
        elif layer == self.n_layers - 1 and site not in _SEEN_BY_OTHERS:
            rule = "last"
        key = (position, rule)
        if key not in self._known:
            found = self._where(position, rule)
            mixed = found.any() and not found.all()
            self._known[key] = torch.from_numpy(found) if mixed else bool(found.all())
        return self._known[key]

    def _where(self, position: int | None, rule: str) -> Bool[np.ndarray, " prompt"]:
        if position is None:
            return np.asarray(self.differs.any(axis=1))
        at = np.where(position < 0, self.lengths + position, position)
        found = (at >= 0) & (at < self.lengths)
        if not self.causal:
            return found & self.differs.any(axis=1)
        if rule == "token":
            inside = np.clip(at, 0, self.differs.shape[1] - 1)
            return found & self.differs[np.arange(len(at)), inside]
        if rule == "last":
            found &= at == self.lengths - 1
        return found & (at >= self.first)


def effects(runner: Runner, lengths: Any, differs: Any) -> Effects:
    """Say what exchanging activations between two runs can change.

    Args:
        runner: The model.
        lengths: Number of tokens of each prompt.
        differs: Where tokens differ.

    Returns:
        The rule.
    """
    causal = getattr(runner.model.cfg, "attention_dir", "causal") == "causal"
    return Effects(lengths, differs, runner.n_layers, causal)
