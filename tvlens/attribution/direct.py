"""Direct attribution: which parts of the model wrote the answer's logit?

The final residual is a sum, and from there to a logit there is one norm and one matrix. With the norm's scale
held where it stands in this run, the logit is the sum of what every part wrote into the stream along one
direction. This is what a part says to the answer itself, not what it does by way of other parts: that is what
patching asks. The parts add up, and what they miss by rounding is kept.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import whole
from tvlens.attribution.linear import pull, transpose
from tvlens.attribution.parts import Named, Split, Stream, contributions, joined, streams
from tvlens.attribution.results import Attribution
from tvlens.encoding import TokenBatch
from tvlens.metrics import Ids
from tvlens.models.runner import Runner, runner
from tvlens.patching.pairs import (
    Answers,
    Prompts,
    answer_ids,
    as_batch,
    distinct,
    real_tokens,
    spelled,
    token_labels,
)


def attribute(
    model: Any,
    prompts: Prompts,
    *,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    by: str | Sequence[str] = "layer",
    position: int = -1,
    plan: str = "auto",
    memory: int | None = None,
) -> Attribution:
    """Split the answer's logit into what each part of the model adds to it directly.

    Args:
        model: A TransformerLens model; its weights need no processing.
        prompts: A text, a list of texts, token ids ``prompt position``, or a `TokenBatch`.
        answers: The answer, a text or token id for all prompts or a list with one for each (a list within
            the list for several, whose logits are averaged); the first token counts, as it goes on at the
            position. By default what the model predicts.
        wrong: A wrong answer, likewise; its logit is subtracted. By default nothing is.
        by: How far attention is split: ``"layer"`` not at all, ``"head"``, ``"position"`` (of the tokens
            that it looks at), or both as a pair.
        position: The position whose logits are explained, negative from each prompt's end.
        plan: How the engine runs the prompts, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        ``embedding``, ``positional_embedding``, ``attention``, ``attention_bias`` (zero by layer, where it
        is part of attention), ``mlp``, ``final_norm_bias`` and ``unembedding_bias``, in logits by prompt;
        ``total``, which the model says, and ``residual``, what the parts miss of it. Where the model caps
        its logits, they are those before the cap, and ``capped`` is the total after it.

    Raises:
        ValueError: Right and wrong answer are the same token; a position or name does not exist.
        TypeError: Prompts are of another type, or the position is no whole number.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> found = attribute(tiny_model(), "a->A b->", answers="B", wrong="b", by="head")
        >>> dict(found.data["attention"].sizes)
        {'layer': 2, 'head': 4, 'prompt': 1}

    References:
        Elhage et al. 2021, elhage2021mathematical; Wang et al. 2023, arXiv:2211.00593.
    """
    started = time.perf_counter()
    position = whole("position", position)
    drive, split, batch = runner(model), Split.of(by), as_batch(model, prompts)
    read = _up_to(model, batch, position)
    given = [
        None if each is None else answer_ids(model, read, each, name=name)
        for name, each in (("answers", answers), ("wrong", wrong))
    ]
    pieces: list[Named] = []
    said: list[tuple[Ids, Ids | None]] = []
    found = streams(
        model,
        drive,
        batch,
        split,
        position=position,
        n_layers=drive.n_layers,
        plan=plan,
        memory=memory,
    )
    for stream in found:
        right, other = (None if each is None else each[stream.rows] for each in given)
        if right is None:
            with torch.no_grad():
                best = drive.logits(stream.final).argmax(dim=-1)
            right = tuple((i,) for i in best.tolist())
        pieces.append(_piece(drive, stream, split, right, other))
        said.append((right, other))
    right = sum((each for each, _ in said), ())
    other = None if wrong is None else sum((each or () for _, each in said), ())
    if other is not None:
        distinct(model, right, other)
    coords = {"answer": _spoken(model, right)} | (
        {} if other is None else {"wrong": _spoken(model, other)}
    )
    for name, each in (("answer", answers), ("wrong", wrong)):
        coords |= texts_of(f"{name}_text", each, len(batch))
    return label(
        model, batch, joined(pieces), split, coords=coords, started=started, method="attribute",
        metric="logit" if other is None else "logit_difference", position=position,
        soft_cap=drive.soft_cap, heading="Direct attribution",
    )  # fmt: skip


def _up_to(model: Any, batch: TokenBatch, position: int) -> TokenBatch:
    """The prompts with their texts as far as the position, which is where answers go on."""
    tokenizer = getattr(model, "tokenizer", None)
    if position == -1 or tokenizer is None:
        return batch
    rows = zip(batch.text, real_tokens(batch), strict=True)
    text = [
        tokenizer.decode(ids[: position + 1], skip_special_tokens=True)
        if len(ids[: position + 1]) < len(ids)
        else whole
        for whole, ids in rows
    ]
    return replace(batch, text=tuple(text))


def _spoken(model: Any, ids: Ids) -> tuple[str, np.ndarray]:
    return "prompt", np.array([" | ".join(spelled(model, row)) for row in ids], dtype=object)


def texts_of(name: str, answers: Answers | None, n: int) -> dict[str, Any]:
    """Give the answers as they were written, of which the first token is meant; nothing for token ids.

    Args:
        name: Of the coordinate.
        answers: Answers as `attribute` takes them.
        n: How many prompts there are.

    Returns:
        A coordinate by prompt, or none.
    """
    if answers is None or isinstance(answers, Tensor):
        return {}
    each = [answers] * n if isinstance(answers, str | int) else list(answers)
    several = [[one] if isinstance(one, str | int) else list(one) for one in each]
    if not any(isinstance(one, str) for row in several for one in row):
        return {}
    texts = [" | ".join(one for one in row if isinstance(one, str)) for row in several]
    return {name: ("prompt", np.array(texts, dtype=object))}


def _piece(drive: Runner, stream: Stream, split: Split, right: Ids, wrong: Ids | None) -> Named:
    """Everything about some prompts: parts, biases, total and residual."""
    columns, weights = _weighted(right, wrong)
    final = stream.final
    columns, weights = columns.to(final.device), weights.to(final.device)

    def read_out(normed: Tensor) -> Tensor:
        logits = drive.unembed(normed, columns)
        return (logits.double() * weights.to(logits.device)).sum(dim=-1, keepdim=True)

    with torch.no_grad():
        normed = drive.last_norm(final)
        total = read_out(normed)[:, 0].to(final.device)
        capped = drive.logits(final, columns).double()
    one = torch.ones_like(total, device=normed.device)[:, None]
    unembedded, unembedding_bias = transpose(read_out, normed, one)
    towards, norm_bias = pull(drive.last_norm, final.to(normed.device), unembedded)
    found = contributions(drive, stream, towards.to(final.device), split)
    found["final_norm_bias"] = (("prompt",), norm_bias.to(final.device))
    found["unembedding_bias"] = (("prompt",), unembedding_bias.to(final.device))
    found |= with_residual(found, total)
    if drive.soft_cap:
        found["capped"] = (("prompt",), (capped * weights.to(capped)).sum(dim=-1))
    return found


def with_residual(found: Named, total: Float[Tensor, " prompt"]) -> Named:
    """The total, and what the parts miss of it."""
    summed = sum(values.reshape(-1, len(total)).nansum(dim=0) for _, values in found.values())
    return {"total": (("prompt",), total), "residual": (("prompt",), total - summed)}


def _weighted(
    right: Ids, wrong: Ids | None
) -> tuple[Int[Tensor, "prompt column"], Float[Tensor, "prompt column"]]:
    """Tokens and what their logits count: the mean of the answers less the mean of the wrong ones."""
    other = wrong or ((),) * len(right)
    width = max(len(a) + len(w) for a, w in zip(right, other, strict=True))
    columns = torch.zeros(len(right), width, dtype=torch.long)
    weights = torch.zeros(len(right), width, dtype=torch.double)
    for row, (a, w) in enumerate(zip(right, other, strict=True)):
        n = len(a) + len(w)
        columns[row, :n] = torch.tensor([*a, *w])
        weights[row, : len(a)] = 1 / len(a)
        weights[row, len(a) : n] = -1 / max(len(w), 1)
    return columns, weights


def label(
    model: Any,
    batch: TokenBatch,
    found: Named,
    split: Split,
    *,
    coords: dict[str, Any],
    started: float,
    **note: Any,
) -> Attribution:
    """Make a result of values."""
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    table = {name: (dims, v.float().cpu().numpy()) for name, (dims, v) in found.items()}
    data = xr.Dataset(
        table, coords={"text": ("prompt", np.array(batch.text, dtype=object)), **coords}
    )
    sizes = {name: size for name, size in data.sizes.items() if name in ("layer", "head")}
    data = data.assign_coords({name: np.arange(size) for name, size in sizes.items()})
    if "position" in data.sizes:
        data = data.assign_coords(tokens_of(model, batch, data.sizes["position"]))
    known = facts(model)
    made = collect(
        kind=Attribution.kind, by=["layer", *(["head"] * split.heads), *(["position"] * split.origins)],
        n_prompts=len(batch), model=known.name, n_layers=known.n_layers, model_facts=known.to_dict(),
        **note, seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Attribution(data.assign_attrs({ATTRIBUTE: encode(made)}))


def tokens_of(model: Any, batch: TokenBatch, width: int) -> dict[str, Any]:
    """Labels of positions, and every prompt's own tokens there."""
    words = [spelled(model, ids) for ids in real_tokens(batch)]
    wide = [[*row, *[""] * (width - len(row))][:width] for row in words]
    return {
        "position": np.arange(width),
        "token": ("position", np.array(token_labels(words, range(width)), dtype=object)),
        "prompt_token": (("prompt", "position"), np.array(wide, dtype=object)),
    }
