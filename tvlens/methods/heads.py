"""Function vectors: the sum of what a few heads write, added."""

import time

from tvlens.engine import Edit
from tvlens.function_vectors import function_vector
from tvlens.methods.work import Fitted, Work, always

N_HEADS = 10


def function(work: Work) -> Fitted:
    """The heads with the largest effects on prompts with shuffled labels, summed and added."""
    return _function(work, "effect", int(work.effects().provenance["cells"]))


def function_gradient(work: Work) -> Fitted:
    """The same with heads chosen by gradient: one forward and backward in place of one forward a head."""
    return _function(work, "estimate", 3 * int(work.effects().data.sizes["trial"]))


def _function(work: Work, by: str, cost: int) -> Fitted:
    effects, n = work.effects(), work.n_layers
    started, spent = time.perf_counter(), effects.provenance["seconds"]
    n_heads = min(N_HEADS, effects.outputs.shape[0] * effects.outputs.shape[1])
    heads = effects.heads(n_heads, by=by)
    vector = function_vector(work.model, effects.outputs, heads)
    edits = [Edit("resid_post", i, vector.at(i), mode="add") for i in range(n)]
    layer = work.best([(edit,) for edit in edits])
    cost += int(effects.provenance["n_means"]) + len(work.dev) * n
    # Effects are measured once for both ways to choose; each is charged as if it were alone.
    seconds = spent["means"] + spent[by] + time.perf_counter() - started
    note = {"heads": [list(head) for head in heads]}
    return Fitted(always(edits[layer]), layer, cost, seconds, note)
