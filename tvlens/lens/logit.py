"""The logit lens: what would the model say if it stopped after this layer?"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import needs
from tvlens.encoding import TokenBatch
from tvlens.engine import Plan
from tvlens.lens.measures import Measured, joined, log_probabilities, measured, pieces
from tvlens.lens.reading import (
    STREAM,
    chosen_positions,
    read_parts,
    wide_site,
)
from tvlens.lens.results import Lens
from tvlens.lens.tuned import TunedLens
from tvlens.models.runner import Runner, runner
from tvlens.patching.pairs import (
    Answers,
    Prompts,
    answer_ids,
    as_batch,
    lengths_of,
    real_tokens,
    spelled,
    token_labels,
)
from tvlens.sites import check_layers


@dataclass(frozen=True, eq=False)
class _Found:
    """Rows (a prompt at a position) and what was measured there, by lens and layer; the end comes last."""

    rows: Int[np.ndarray, "row 2"]
    kept: dict[tuple[str, int], Measured]
    final: Measured
    plan: Plan


def logit_lens(
    model: Any,
    prompts: Prompts,
    *,
    site: str = STREAM,
    layers: int | Sequence[int] | None = None,
    positions: int | Sequence[int] | None = None,
    k: int = 5,
    tokens: Answers | None = None,
    lens: TunedLens | None = None,
    compare: bool = False,
    plan: str = "auto",
    memory: int | None = None,
) -> Lens:
    """Read every layer through the model's own final norm, unembedding and soft cap.

    Args:
        model: A TransformerLens model.
        prompts: A text, a list of texts, token ids ``prompt position``, or a `TokenBatch`.
        site: What is read, a site of width d_model.
        layers: Which layers, negative ones from the end; all by default.
        positions: Which positions, negative ones from each prompt's end; all by default.
        k: How many of the likeliest tokens are kept.
        tokens: Tokens whose rank and log probability are followed: a text or token id, or a list of them,
            the same for all prompts; or a list of lists, one for each prompt. Texts count by their first
            token, as answers do in `patch`.
        lens: A tuned lens to read through, in place of the plain logit lens.
        compare: With ``lens``, whether the logit lens is computed, too.
        plan: How the engine runs the prompts, see `tvlens.engine.run`.
        memory: Bytes that activations and distributions may take; prompts and rows are taken in parts.

    Returns:
        By layer, position and prompt: likeliest tokens, entropy and KL from the final distribution (nats),
        and rank (1 is the likeliest) and log probability (nats) of the tokens that are followed.

    Raises:
        ValueError: A site, layer or position does not exist, ``k`` is no number of tokens, a token is
            outside the vocabulary, or the tuned lens belongs to another model or site.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> found = logit_lens(tiny_model(), "a->A b->", tokens="B")
        >>> dict(found.data["kl"].sizes)
        {'lens': 1, 'layer': 2, 'position': 8, 'prompt': 1}
        >>> float(found.data["kl"].sel(layer=1).max())
        0.0

    References:
        nostalgebraist 2020, nostalgebraist2020interpreting; Belrose et al. 2023, arXiv:2303.08112.
    """
    started = time.perf_counter()
    drive, batch = runner(model), as_batch(model, prompts)
    wide_site(drive, site)
    deep = check_layers(layers, drive.n_layers)
    labels, at = chosen_positions(positions, lengths_of(batch))
    d_vocab = int(model.cfg.d_vocab)
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k = {k} tokens asked for; this model has {d_vocab}: 1 to {d_vocab}.")
    lenses = _lenses(model, lens, site, deep, compare=compare)
    names, targets = _targets(model, batch, tokens)
    reads = [(site, deep), (STREAM, (drive.n_layers - 1,))]
    found = []
    for rows, (resid, last), done in read_parts(model, batch, at, reads, plan=plan, memory=memory):
        kept, final = _measure(
            drive, lenses, deep, resid, last[0], targets[rows[:, 0]], k=k, memory=memory,
            d_vocab=d_vocab,
        )  # fmt: skip
        found.append(_Found(rows, kept, final, done))
    data = _labelled(model, batch, found, tuple(lenses), deep, labels, names, targets)
    return _result(
        model, data, found[0].plan, lens, site=site, k=k,
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip


def _lenses(
    model: Any, lens: TunedLens | None, site: str, layers: tuple[int, ...], *, compare: bool
) -> dict[str, TunedLens | None]:
    """By name, what is applied before the read-out."""
    if lens is None:
        if compare:
            raise ValueError(
                "compare=True needs a tuned lens to compare with: lens=TunedLens(...)."
            )
        return {"logit": None}
    needs("lens", lens, TunedLens, "a TunedLens, as TunedLens.train(model) gives")
    lens.check(model)
    if lens.site != site:
        raise ValueError(
            f"this tuned lens was trained on {lens.site}; {site} was asked for. "
            "Train one with TunedLens.train(model, site=...)."
        )
    for layer in layers:
        lens.index(layer)
    return {"logit": None, "tuned": lens} if compare else {"tuned": lens}


def _targets(
    model: Any, batch: TokenBatch, tokens: Answers | None
) -> tuple[list[str], Int[Tensor, "prompt target"]]:
    """Names and ids of the tokens that are followed."""
    if tokens is None:
        return [], torch.zeros(len(batch), 0, dtype=torch.long)
    given = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    given = [given] if isinstance(given, str | int) else list(given)
    own = any(not isinstance(each, str | int) for each in given)
    rows = [[each] if isinstance(each, str | int) else list(each) for each in given]
    rows = rows if own else [given] * len(batch)
    if len(rows) != len(batch) or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(
            f"tokens as a list of lists needs one list for each of {len(batch)} prompts, equally long; "
            f"lists of {', '.join(str(len(row)) for row in rows)} arrived."
        )
    columns = [
        [ids[0] for ids in answer_ids(model, batch, list(column), name="tokens")]
        for column in zip(*rows, strict=True)
    ]
    ids = torch.tensor(columns).T.contiguous()
    words = [_common(spelled(model, column)) for column in columns]
    return [f"{i}: {word}" if words.count(word) > 1 else word for i, word in enumerate(words)], ids


def _common(words: list[str]) -> str:
    return words[0] if len(set(words)) == 1 else f"{words[0]}…"


def _measure(
    drive: Runner,
    lenses: dict[str, TunedLens | None],
    layers: tuple[int, ...],
    resid: Float[Tensor, "layer row d_model"],
    last: Float[Tensor, "row d_model"],
    targets: Int[Tensor, "row target"],
    *,
    k: int,
    d_vocab: int,
    memory: int | None,
) -> tuple[dict[tuple[str, int], Measured], Measured]:
    kept: dict[tuple[str, int], list[Measured]] = {(n, i): [] for n in lenses for i in layers}
    finals: list[Measured] = []
    with torch.no_grad():
        for rows in pieces(drive, len(last), d_vocab, memory=memory):
            final = log_probabilities(drive, last[rows])
            followed = targets[rows].to(final.device)
            finals.append(measured(final, final, followed, k=k))
            for name, lens in lenses.items():
                for i, layer in enumerate(layers):
                    there = resid[i, rows]
                    there = there if lens is None else lens.translate(there, layer)
                    logp = log_probabilities(drive, there)
                    kept[name, layer].append(measured(logp, final, followed, k=k))
    return {key: joined(parts) for key, parts in kept.items()}, joined(finals)


def _labelled(
    model: Any,
    batch: TokenBatch,
    found: list[_Found],
    lenses: tuple[str, ...],
    layers: tuple[int, ...],
    positions: tuple[int, ...],
    targets: list[str],
    ids: Int[Tensor, "prompt target"],
) -> xr.Dataset:
    """Put rows back to where they belong: lens, layer, position, prompt."""
    rows = np.concatenate([part.rows for part in found])
    prompt, column = rows[:, 0], rows[:, 1]
    place = (len(positions), len(batch))

    def spread(name: str, *keys: tuple[str, int]) -> np.ndarray:
        """A variable of some lenses and layers, or of the end, missing where a prompt is shorter."""
        chosen = [[part.kept[key] for key in keys] if keys else [part.final] for part in found]
        values = np.concatenate(
            [np.stack([getattr(each, name).numpy() for each in part]) for part in chosen], axis=1
        )
        values = values.astype("float32") if name == "rank" else values
        empty: Any = -1 if values.dtype.kind == "i" else np.nan
        table = np.full((len(values), *place, *values.shape[2:]), empty, values.dtype)
        table[:, column, prompt] = values
        return table

    keys = [(lens, layer) for lens in lenses for layer in layers]
    dims, end = ("lens", "layer", "position", "prompt"), ("position", "prompt")
    axes = {"top_id": ("rank",), "top_probability": ("rank",), "entropy": (), "kl": ()}
    if targets:
        axes |= {"log_probability": ("target",), "rank": ("target",)}
    table: dict[str, Any] = {}
    for name, own in axes.items():
        each = spread(name, *keys)
        key = "target_rank" if name == "rank" else name
        table[key] = ((*dims, *own), each.reshape(len(lenses), len(layers), *each.shape[1:]))
        table[f"final_{key}"] = ((*end, *own), spread(name)[0])
    del table["final_kl"]
    for name in ("top", "final_top"):
        where, numbers = table[f"{name}_id"]
        table[f"{name}_token"] = (where, _written(model, numbers))
    words = [spelled(model, row) for row in real_tokens(batch)]
    return xr.Dataset(
        table, coords=_coords(model, batch, words, lenses, layers, positions, targets, ids)
    )


def _coords(
    model: Any,
    batch: TokenBatch,
    words: list[list[str]],
    lenses: tuple[str, ...],
    layers: tuple[int, ...],
    positions: tuple[int, ...],
    targets: list[str],
    ids: Int[Tensor, "prompt target"],
) -> dict[str, Any]:
    at = [[row[p] if -len(row) <= p < len(row) else "" for p in positions] for row in words]
    coords: dict[str, Any] = {
        "lens": list(lenses),
        "layer": list(layers),
        "position": list(positions),
        "token": ("position", np.array(token_labels(words, positions), dtype=object)),
        "prompt_token": (("prompt", "position"), np.array(at, dtype=object)),
        "text": ("prompt", np.array(batch.text, dtype=object)),
    }
    if targets:
        coords["target"] = np.array(targets, dtype=object)
        coords["target_id"] = (("prompt", "target"), ids.numpy())
    return coords


def _written(model: Any, ids: np.ndarray) -> np.ndarray:
    """Write token ids, each distinct one once; nothing where there is none."""
    distinct, back = np.unique(ids, return_inverse=True)
    words = spelled(model, [i for i in distinct.tolist() if i >= 0])
    words = np.array([*[""] * int((distinct < 0).sum()), *words, ""], dtype=object)[:-1]
    return words[back.reshape(ids.shape)]


def _result(model: Any, data: xr.Dataset, plan: Plan, lens: TunedLens | None, **note: Any) -> Lens:
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    known = facts(model)
    data.attrs[ATTRIBUTE] = encode(
        collect(
            kind=Lens.kind,
            n_prompts=data.sizes["prompt"],
            model=known.name,
            n_layers=known.n_layers,
            model_facts=known.to_dict(),
            plan=plan.name,
            plan_reason=str(plan),
            tuned=None if lens is None else dict(lens.made),
            **note,
        )
    )
    return Lens(data)
