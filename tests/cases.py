"""What tests of the engine share: prompts, edits of every kind, and a reference written by hand.

The reference knows nothing of the engine: one prompt at a time, without padding, one row for each cell,
through TransformerLens' own `run_with_hooks`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests import tiny
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, Output, Read, Request
from tvlens.models.runner import runner
from tvlens.sites import SITES

TOLERANCE = 1e-4
PLANS = ("plain", "growing", "suffix")


def _marks(name: str, kind: str) -> tuple[pytest.MarkDecorator, ...]:
    """Where both classes are installed, all models in the second one take a minute of their own."""
    return () if kind == tiny.KINDS[0] or name == "llama" else (pytest.mark.slow,)


# Every tiny model in every TransformerLens class that is installed.
GRID = [
    pytest.param(name, kind, id=f"{name}-{kind}", marks=_marks(name, kind))
    for kind in tiny.KINDS
    for name in tiny.ARCHITECTURES
]
GRID_SITES = [
    pytest.param(*param.values, site, id=f"{param.id}-{site}", marks=param.marks)
    for param in GRID
    for site in SITES
    if (param.values[0], site) != ("pythia", "resid_mid")
]
# The engine's own work is the same for both classes: what is about it alone needs one of them.
KIND = tiny.KINDS[0]


def model_of(name: str) -> Any:
    """A tiny model of whichever class the installed TransformerLens prefers."""
    return tiny.model(name, KIND)


def sites_of(model: Any) -> tuple[str, ...]:
    """The sites that a model has."""
    return tuple(site for site in SITES if runner(model).has(site, 0))


def make_batch(lengths: list[int], *, shared: int = 0, seed: int = 0) -> TokenBatch:
    """Left-padded random prompts; the first `shared` tokens of a row do not depend on `seed`."""
    width = max(lengths)
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        common = torch.Generator().manual_seed(1000 + row)
        own = torch.Generator().manual_seed(7919 * seed + row)
        k = min(shared, length - 1)
        drawn = torch.cat(
            [
                torch.randint(3, 90, (k,), generator=common),
                torch.randint(3, 90, (length - k,), generator=own),
            ]
        )
        tokens[row, width - length :], mask[row, width - length :] = drawn, True
    return TokenBatch(("",) * len(lengths), tokens, mask, mask.long() - 1)


def ids_of(batch: TokenBatch, row: int) -> list[int]:
    """One prompt's token ids, without padding."""
    return batch.tokens[row][batch.mask[row]].tolist()


class Values:
    """Random values of the right shapes for a model's sites, for prompts of up to `width` tokens."""

    def __init__(self, model: Any, *, n: int, width: int, seed: int = 0) -> None:
        self.runner, self.n, self.width = runner(model), n, width
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        site: str,
        *,
        n: int | None = None,
        positions: int | None = None,
        one_head: bool = False,
    ) -> torch.Tensor:
        shape = self.runner.site_shape(site)[1 if one_head else 0 :]
        shape = (*shape, self.width) if site == "pattern" else shape
        before = (self.n if n is None else n, *(() if positions is None else (positions,)))
        drawn = torch.randn(*before, *shape, generator=self.generator)
        return drawn.softmax(-1) if site == "pattern" else drawn


def random_edit(model: Any, site: str, layer: int, n: int, **kwargs: Any) -> Edit:
    """An edit of one position, with values that depend on the layer."""
    width = kwargs.pop("width", 32)
    return Edit(site, layer, Values(model, n=n, width=width, seed=layer)(site), **kwargs)


def every_edit(model: Any, site: str, batch: TokenBatch) -> tuple[tuple[Edit, ...], ...]:
    """Cells that edit a site in every way an edit can; prompts have at least three tokens."""
    n, width = len(batch), batch.tokens.shape[1]
    make = Values(model, n=n, width=width, seed=1)
    some = torch.arange(n) % 2 == 0
    cells: list[tuple[Edit, ...]] = [
        (),
        (Edit(site, 0, make(site), -1),),
        (Edit(site, 1, make(site, n=1), 0),),
        (Edit(site, 3, make(site), 1),),
        (Edit(site, 2, make(site), -3),),
        (Edit(site, 1, make(site, positions=width), None),),
        (Edit(site, 3, make(site, n=1, positions=1), None, scale=2.0),),
        (Edit(site, 0, make(site), -2, mode="add", scale=0.5, where=some),),
        (Edit(site, 1, make(site, n=1, positions=1), None, mode="add", where=~some),),
        # What comes later in a cell sees what came before, in one place as in several.
        (Edit(site, 2, make(site), -1), Edit(site, 2, make(site), -1, mode="add")),
        (Edit(site, 2, make(site), -1, mode="add"), Edit(site, 2, make(site), -1)),
        (Edit(site, 3, make(site), -2), Edit("resid_post", 0, make("resid_post"), 2)),
        (Edit(site, 1, make(site), 0, where=torch.zeros(n, dtype=torch.bool)),),
    ]
    if "head" in SITES[site].dims:
        last = runner(model).site_shape(site)[0] - 1
        cells += [
            (Edit(site, 1, make(site, one_head=True), -2, head=last),),
            (Edit(site, 0, make(site, one_head=True, positions=width), None, head=0),),
            (
                Edit(site, 2, make(site, one_head=True), 1, head=0, mode="add"),
                Edit(site, 2, make(site, one_head=True), -1, head=last),
                Edit(site, 3, make(site), -1, mode="add"),
            ),
        ]
    return tuple(cells)


def by_hand(model: Any, request: Request) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits for cell and prompt, and what each read keeps, by TransformerLens' own hooks."""
    width = request.batch.tokens.shape[1]
    logits, kept = [], []
    for prompt in range(len(request.batch)):
        ids = torch.tensor([ids_of(request.batch, prompt)] * len(request.cells))
        store: dict[tuple[str, int], torch.Tensor] = {}
        hooks = []
        for site, layer in _places(request):
            hook = _hook(model, site, layer, request, prompt, store)
            # A bridge's resid_mid is what the second norm reads; the sum with the MLP passes by it.
            if site == "resid_mid" and "Bridge" in type(model).__name__:
                hooks += _through_attention(model, layer, hook)
            else:
                hooks.append((runner(model).hook_name(site, layer), hook))
        with torch.no_grad():
            logits.append(model.run_with_hooks(ids, fwd_hooks=hooks, return_type="logits")[:, -1])
        kept.append([_kept(read, store, width) for read in request.reads])
    reads = [torch.stack([one[i] for one in kept], dim=1) for i in range(len(request.reads))]
    return torch.stack(logits, dim=1), reads


def _places(request: Request) -> list[tuple[str, int]]:
    edited = {(edit.site, edit.layer) for cell in request.cells for edit in cell}
    return sorted(edited | {(r.site, layer) for r in request.reads for layer in r.layers})


def _hook(
    model: Any, site: str, layer: int, request: Request, prompt: int, store: dict
) -> Callable[..., torch.Tensor]:
    def hook(activation: torch.Tensor, hook: object) -> torch.Tensor:
        mine = activation.clone()
        if site == "pattern":
            mine = mine.transpose(1, 2)  # cell, query, head, key
        elif site in ("q", "k", "v", "z"):
            mine = mine.view(*mine.shape[:2], *runner(model).site_shape(site))
        for cell, edits in enumerate(request.cells):
            for edit in edits:
                if (edit.site, edit.layer) == (site, layer):
                    _put(mine[cell], edit, prompt)
        store[site, layer] = mine.clone()
        return mine.transpose(1, 2) if site == "pattern" else mine.view(activation.shape)

    return hook


def _through_attention(model: Any, layer: int, hook: Callable[..., torch.Tensor]) -> list:
    """Hooks that edit the sum of residual and attention's output by changing the latter."""
    before: list[torch.Tensor] = []

    def keep(activation: torch.Tensor, hook: object) -> None:
        before.append(activation.clone())

    def change(activation: torch.Tensor, hook: object) -> torch.Tensor:
        return inner(before[0] + activation, hook) - before[0]

    inner = hook
    names = [runner(model).hook_name(site, layer) for site in ("resid_pre", "attn_out")]
    return list(zip(names, (keep, change), strict=True))


def _put(own: torch.Tensor, edit: Edit, prompt: int) -> None:
    """Edit one cell's activation in place: position, then the site's axes."""
    if edit.where is not None and not edit.where[prompt]:
        return
    values, length = edit.values[prompt % len(edit.values)], len(own)
    for position in range(length) if edit.position is None else [edit.position]:
        value = values if edit.position is not None else values[position % len(values)]
        value = value[..., :length] if edit.site == "pattern" else value
        at = own[position] if edit.head is None else own[position, edit.head]
        at.copy_(edit.scale * value + (at if edit.mode == "add" else 0))


def _kept(read: Read, store: dict, width: int) -> torch.Tensor:
    """One prompt's read for all cells, with zeros up to the longest prompt: cell, layer, then axes."""
    each = []
    for layer in read.layers:
        whole = store[read.site, layer]
        if read.site == "pattern":
            whole = torch.nn.functional.pad(whole, (0, width - whole.shape[-1]))
        if read.position is None:
            padding = whole.new_zeros(len(whole), width - whole.shape[1], *whole.shape[2:])
            each.append(torch.cat([whole, padding], dim=1))
        else:
            each.append(whole[:, read.position])
    return torch.stack(each, dim=1)


def tensors(output: Output) -> Iterator[torch.Tensor]:
    """Everything an output holds, in order."""
    yield from output.activations
    yield from (output.values[key] for key in sorted(output.values))


def difference(one: Output, other: Output) -> float:
    """The largest difference between two outputs of the same shapes."""
    found = []
    for mine, yours in zip(tensors(one), tensors(other), strict=True):
        assert (mine.shape, mine.dtype) == (yours.shape, yours.dtype)
        found.append(float((mine.double() - yours.double()).abs().max()))
    return max(found)


def assert_same(one: Output, other: Output, tolerance: float = TOLERANCE) -> None:
    """Two outputs have the same numbers."""
    found = difference(one, other)
    assert found <= tolerance, f"{one.plan.name} and {other.plan.name} differ by {found:.1e}"
