"""Learned vectors, and the control that says what learning does without a task."""

import random
from dataclasses import replace

from tvlens.engine import Edit
from tvlens.extraction import extract
from tvlens.learning import learn, split_by_query
from tvlens.methods.work import Fitted, Work, always
from tvlens.prompts import Prompts, deranged

DEPTHS = (0.55, 0.69)  # where vectors are learned, as shares of the depth
_RATE, _STEPS, _BATCH, _HOLDOUT = 0.03, 150, 32, 0.2


def learned(work: Work) -> Fitted:
    """A vector trained by gradient, at the better of two layers."""
    return _learned(work, work.dev)


def learned_shuffled(work: Work) -> Fitted:
    """A control: the same training from the same start, with the answers of other queries."""
    ids = dict(zip(work.dev.queries, work.dev.answer_ids, strict=True))
    queries = sorted(ids)
    moved = deranged([ids[query] for query in queries], random.Random(work.seed))
    given = dict(zip(queries, moved, strict=True))
    return _learned(work, replace(work.dev, answer_ids=tuple(given[x] for x in work.dev.queries)))


def _learned(work: Work, dev: Prompts) -> Fitted:
    layers = sorted({round(depth * (work.n_layers - 1)) for depth in DEPTHS})
    theta = extract(work.model, dev, layers=layers).mean()
    found = [
        learn(
            work.model, dev, layer=layer, start=theta, steps=_STEPS, rate=_RATE, batch_size=_BATCH,
            holdout=_HOLDOUT, seed=work.seed,
        )
        for layer in layers
    ]  # fmt: skip
    best = min(found, key=lambda one: one.lowest)
    (layer,) = best.vector.layers
    fit, held = split_by_query(dev.queries, _HOLDOUT, seed=work.seed)
    # A step is a forward and a backward of its batch; now and then the held-out queries are looked at.
    steps = sum(3 * len(one.losses) * min(_BATCH, len(fit)) for one in found)
    looks = sum(len(one.held_out) * len(held) for one in found)
    cost = len(dev) * (len(dev.dummies) + len(layers)) + steps + looks
    note = {"steps": best.best, "stopped": best.stopped}
    return Fitted(always(Edit("resid_post", layer, best.vector.at(layer))), layer, cost, note=note)
