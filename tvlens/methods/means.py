"""Vectors that are read and averaged: theta and its relatives."""

import time
from dataclasses import replace
from functools import cache

from tvlens.encoding import TokenBatch
from tvlens.engine import Edit
from tvlens.extraction import extract
from tvlens.methods.work import Fitted, Work, always, rows_for, states
from tvlens.models import facts
from tvlens.prompts import Prompts, build_prompts
from tvlens.templates import Role

MORE_SHOTS = 20


def hendel(work: Work) -> Fitted:
    """Theta of each prompt's own demonstrations, in place of the residual stream at one layer."""
    theta, n = extract(work.model, work.dev), work.n_layers
    layer = work.best([(Edit("resid_post", i, theta.at(i)),) for i in range(n)])

    own = cache(lambda prompts: extract(work.model, prompts, layers=[layer]).at(layer))

    def write(prompts: Prompts, view: TokenBatch) -> tuple[Edit, ...]:
        return (Edit("resid_post", layer, rows_for(view, own(prompts))),)

    return Fitted(write, layer, len(work.dev) * (len(work.dev.dummies) + n))


def mean(work: Work) -> Fitted:
    """Theta averaged over all demonstrations: one vector for the task."""
    return _mean(work, work.dev)


def mean_more(work: Work) -> Fitted:
    """Theta averaged over prompts with more demonstrations than are compared with."""
    shots = min(MORE_SHOTS, work.n_items - 1 - len(work.dev.dummies), _room(work))
    more = build_prompts(work.task, work.model, **{**work.how, "shots": shots})
    return replace(_mean(work, more), note={"shots": shots})


def _room(work: Work) -> int:
    """How many demonstrations fit into the model's context, if all are as long as in the longest prompt."""
    n_ctx, shots = facts(work.model).n_ctx, int(work.dev.facts["shots"])
    longest = int(work.dev.regular.lengths.max())
    return MORE_SHOTS if n_ctx is None else max(shots, n_ctx * (shots + 1) // longest - 1)


def _mean(work: Work, source: Prompts) -> Fitted:
    theta, n = extract(work.model, source).mean(), work.n_layers
    edits = [Edit("resid_post", i, theta.at(i)) for i in range(n)]
    layer = work.best([(edit,) for edit in edits])
    cost = len(source) * len(source.dummies) + len(work.dev) * n
    return Fitted(always(edits[layer]), layer, cost)


def attention(work: Work) -> Fitted:
    """Mean attention outputs in all layers up to one, as state vectors have them."""
    found, n = extract(work.model, work.dev, site="attn_out").mean(), work.n_layers
    edits = [Edit("attn_out", i, found.at(i)) for i in range(n)]
    layer = work.best([tuple(edits[: i + 1]) for i in range(n)])
    cost = len(work.dev) * (len(work.dev.dummies) + n)
    return Fitted(always(*edits[: layer + 1]), layer, cost)


def multi_position(work: Work) -> Fitted:
    """Mean theta at the last token, and what demonstrations change on average at the tokens before it.

    These are the query's last token and whatever of the separator comes after it. Each token has its layer,
    chosen one after the other, from the last token on; a token that does not help is left alone.
    """
    first = work.fitted(mean)
    (last,) = first.write(work.dev, work.dev.zero_shot)
    started = time.perf_counter()
    edits, cost, n = [last], first.forwards, work.n_layers
    for position in range(-2, -2 - _after_query(work.dev.zero_shot), -1):
        bare, shown = states(work, position=position)
        moved = (shown - bare).mean(dim=0).float()
        tried = [Edit("resid_post", i, moved[i][None], position, mode="add") for i in range(n)]
        best = work.best([tuple(edits), *((*edits, edit) for edit in tried)])
        edits += [tried[best - 1]] if best else []
        cost += len(work.dev) * (2 + n + 1)

    def write(prompts: Prompts, view: TokenBatch) -> tuple[Edit, ...]:
        # Only tokens that the view has: other templates have longer or shorter separators.
        return tuple(edit for edit in edits if (edit.position or 0) >= -1 - _after_query(view))

    note = {"places": [[edit.position, edit.layer] for edit in edits]}
    seconds = first.seconds + time.perf_counter() - started
    return Fitted(write, max(edit.layer for edit in edits), cost, seconds, note)


def _after_query(view: TokenBatch) -> int:
    """How many tokens before the last one reach back to the query's last token, in every prompt."""
    asked = (view.roles == int(Role.QUERY)).flip(1)
    if not bool(asked.any(dim=1).all()):
        return 0
    return int(asked.int().argmax(dim=1).min())


def chosen(work: Work) -> Fitted:
    """Whichever of the means answers most dev prompts."""
    tried = (mean, mean_more, attention, multi_position)
    found = {method.__name__: work.fitted(method) for method in tried}
    started, view = time.perf_counter(), work.dev.zero_shot
    best = list(found)[work.best([one.write(work.dev, view) for one in found.values()])]
    cost = sum(one.forwards for one in found.values()) + len(found) * len(work.dev)
    seconds = sum(one.seconds for one in found.values()) + time.perf_counter() - started
    note = {"chosen": best, **found[best].note}
    return replace(found[best], forwards=cost, seconds=seconds, note=note)
