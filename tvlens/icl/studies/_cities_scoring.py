"""Whole answers of several candidates after each prompt, and what else a model must not unlearn."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.encoding import Encoder, TokenBatch
from tvlens.engine import Read, Request, run
from tvlens.icl.studies._cities_data import extended
from tvlens.lens.training import corpus
from tvlens.models.runner import Runner, runner

_LOGITS = 1 << 24  # that are held at once on a CPU, times sixteen on a GPU
Ways = Sequence[Sequence[Sequence[int]]]


def score_candidates(
    model: object, batch: TokenBatch, candidates: Ways
) -> tuple[Float[Tensor, "prompt candidate"], Bool[Tensor, "prompt candidate"]]:
    """Say how likely each candidate is after each prompt, all its tokens, and which is written greedily.

    Args:
        model: The model.
        batch: The prompts; each is run once, and only the candidates' own tokens after it.
        candidates: For each prompt the tokens of its candidates, equally many for all.

    Returns:
        Log probability of whole candidates in nats; whether greedy decoding writes them.

    Raises:
        ValueError: Prompts have unequally many candidates.
    """
    numbers = {len(row) for row in candidates}
    if len(numbers) != 1:
        raise ValueError(f"each prompt needs equally many candidates; {sorted(numbers)} arrived.")
    n, drive = numbers.pop(), runner(model)
    last = (drive.n_layers - 1,)
    requests = [Request(batch, reads=(Read("resid_post", last),))]
    for k in range(n):
        longest = max(len(row[k]) for row in candidates) - 1
        if longest:
            # Of a shorter candidate also tokens before its own are read, which nobody looks at.
            reads = tuple(Read("resid_post", last, -1 - j) for j in range(longest))
            requests.append(
                Request(extended(batch, [row[k][:-1] for row in candidates]), reads=reads)
            )
    outputs = iter(run(model, requests))
    first = next(outputs).activations[0][0, :, 0]
    rows = torch.arange(len(batch)).repeat_interleave(n)
    starts = torch.tensor([ids[0] for row in candidates for ids in row])
    found, greedy = _read_out(drive, first, rows, starts)
    log_prob, written = (rearrange(x, "(p c) -> p c", c=n) for x in (found, greedy))
    for k in range(n):
        longest = max(len(row[k]) for row in candidates) - 1
        if not longest:
            continue
        seen = torch.stack([kept[0, :, 0] for kept in next(outputs).activations])
        places = [
            (j * len(batch) + i, row[k][-1 - j], i)
            for j in range(longest)
            for i, row in enumerate(candidates)
            if j < len(row[k]) - 1
        ]
        at, token, prompt = torch.tensor(places).unbind(1)
        found, greedy = _read_out(drive, rearrange(seen, "j p d -> (j p) d"), at, token)
        log_prob[:, k].index_add_(0, prompt, found)
        written[prompt[~greedy], k] = False
    return log_prob, written


@torch.no_grad()
def _read_out(
    drive: Runner, resid: Float[Tensor, "row d_model"], at: Tensor, token: Tensor
) -> tuple[Float[Tensor, " token"], Bool[Tensor, " token"]]:
    """Log probability of tokens after some of the rows, and whether they are the likeliest."""
    found = torch.empty(len(at), dtype=torch.float32)
    greedy = torch.empty(len(at), dtype=torch.bool)
    used, where = at.unique(return_inverse=True)
    step = max(1, _LOGITS * (1 if resid.device.type == "cpu" else 16) // 50_000)
    for start in range(0, len(used), step):
        chosen = (where >= start) & (where < start + step)
        logits = drive.logits(resid[used[start : start + step].to(resid.device)]).float()
        row, ids = (where[chosen] - start).to(logits.device), token[chosen].to(logits.device)
        found[chosen] = (logits[row, ids] - logits.logsumexp(dim=-1)[row]).cpu()
        greedy[chosen] = (logits.argmax(dim=-1)[row] == ids).cpu()
    return found, greedy


@torch.no_grad()
def corpus_loss(model: object, *, n_windows: int, context: int = 128) -> float:
    """Give the loss on prose that has nothing to do with names, in nats a token.

    Args:
        model: The model.
        n_windows: Pieces of the packaged text, spread over it.
        context: Tokens in each.

    Returns:
        The mean over all tokens but each piece's first.
    """
    drive, encoder = runner(model), Encoder.of(model)
    ids = torch.tensor(encoder.ids(corpus()))
    whole = ids[: len(ids) // context * context].unflatten(0, (-1, context))
    if n_windows > len(whole):
        raise ValueError(
            f"the packaged text has {len(whole)} pieces of {context} tokens; n_windows = {n_windows} arrived."
        )
    tokens = whole[[i * len(whole) // n_windows for i in range(n_windows)]]
    total = 0.0
    for piece in tokens.split(4):
        batch = piece.to(drive.device)
        resid = drive.whole(batch, torch.ones_like(batch), [])[:, :-1]
        logits = drive.logits(resid.flatten(0, 1)).float()
        total += torch.nn.functional.cross_entropy(
            logits, batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (n_windows * (context - 1))
