"""Causal tracing: where is a fact about the subject looked up?

Blur the subject by adding noise to its embeddings, and the model no longer knows the answer. Then restore
one clean activation at a time: where the answer comes back, the fact passes through. No second prompt is
needed, and no choice of what it should say instead.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.encoding import Encoder, TokenBatch
from tvlens.engine import Edit
from tvlens.metrics import Metric
from tvlens.models.runner import Runner, runner
from tvlens.patching.assemble import assemble, make_task
from tvlens.patching.grid import effects, make_grid
from tvlens.patching.pairs import Answers, Prompts, as_batch, lengths_of, real_tokens
from tvlens.patching.results import Patching
from tvlens.patching.sweep import Swept, exchanges, joined, observe, sweep

Subject = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
_SAMPLED = 8192  # token embeddings whose spread is measured


def trace(
    model: Any,
    prompts: Prompts,
    subject: Subject,
    *,
    noise: float | int = 3.0,
    samples: int = 10,
    window: int = 1,
    seed: int = 0,
    metric: str | Metric | Callable[..., Any] = "probability",
    answers: Answers | None = None,
    wrong: Answers | None = None,
    sites: str | Sequence[str] = "resid_post",
    layers: int | Sequence[int] | None = None,
    by: str | Sequence[str] = ("layer", "position"),
    positions: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    top: int = 0,
    plan: str = "auto",
    memory: int | None = None,
) -> Patching:
    """Blur the subject with noise, restore activations place by place, and measure each time.

    Args:
        model: A TransformerLens model.
        prompts: A text, a list of texts, token ids ``prompt position``, or a `TokenBatch`.
        subject: What is blurred: a text that stands in the prompts, a list with one for each, positions of
            tokens, or a list with positions for each.
        noise: Standard deviation of the noise, in units of the spread of the token embeddings.
        samples: How many times noise is drawn; the metric is averaged over them.
        window: How many layers around a cell's layer are restored at once. Meng et al. take 1 for the
            residual stream and 10 for ``attn_out`` and ``mlp_out``.
        seed: Decides the noise, for each prompt by itself.
        metric: As in `patch`; by default the probability of the answer.
        answers: As in `patch`; by default what the clean run predicts.
        wrong: As in `patch`; by default the clean run's second choice.
        sites: As in `patch`.
        layers: As in `patch`.
        by: As in `patch`.
        positions: As in `patch`.
        heads: As in `patch`.
        top: As in `patch`; tokens are those of the first noise.
        plan: As in `patch`.
        memory: As in `patch`.

    Returns:
        The metric in every cell for every prompt; the corrupted run is the blurred one. The coordinate
        ``subject`` says which positions are blurred.

    Raises:
        ValueError: As in `patch`; or a prompt does not hold its subject; or noise, samples or window make no
            sense.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> result = tv.trace(tiny_model(), "Rome is in", "Rome", samples=2)
        >>> result.data["subject"].values[0].tolist()[:5]
        [True, True, True, True, False]

    References:
        Meng, Bau, Andonian, Belinkov 2022, arXiv:2202.05262.
    """
    started = time.perf_counter()
    for name, value, least in (("noise", noise, 0), ("samples", samples, 1), ("window", window, 1)):
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}; {value} arrived.")
    batch = as_batch(model, prompts)
    drive, lengths = runner(model), lengths_of(batch)
    blurred = find_subject(model, batch, subject)
    grid = make_grid(
        drive, lengths, sites=sites, layers=layers, by=by, positions=positions, heads=heads
    )
    around = lambda layer: range(  # noqa: E731
        max(0, layer - window // 2), min(drive.n_layers, layer + (window + 1) // 2)
    )
    read = tuple(sorted({deep for layer in grid.layers for deep in around(layer)}))
    limits = {"plan": plan, "memory": memory}
    seen = observe(model, {"clean": batch}, "clean", {s: read for s in grid.sites}, **limits)
    task = make_task(model, batch, metric, seen.logits, answers=answers, wrong=wrong)
    scale = noise * embedding_spread(drive)
    swept = []
    for rows, source in seen.parts:
        some, where = batch.rows(rows), blurred[rows, : lengths[rows].max()]
        cells = list(
            exchanges(grid, effects(drive, lengths[rows], where), source(), layers_of=around)
        )
        readout = task.readout(rows)
        runs = [
            sweep(
                model, some, grid, cells, readout,
                base=edits, top=top if i == 0 else 0, **limits,
            )
            for i, edits in enumerate(_noises(drive, some, where, scale, samples, seed))
        ]  # fmt: skip
        swept.append(_averaged(runs))
    return assemble(
        model,
        grid,
        joined(swept),
        task,
        {"clean": batch},
        started=started,
        coords=_subject_coords(blurred, lengths, grid.positions),
        method="trace",
        direction="denoise",
        noise=noise,
        noise_scale=scale,
        samples=samples,
        window=window,
        seed=seed,
        heading="Causal tracing",
        verb="Restoring" + (f" {window} layers of" if window > 1 else ""),
    )


def find_subject(
    model: Any, batch: TokenBatch, subject: Subject
) -> Bool[np.ndarray, "prompt position"]:
    """Find the tokens of the subject.

    Args:
        model: The model whose tokenizer is used.
        batch: The prompts.
        subject: Texts or positions, as in `trace`.

    Returns:
        True at the tokens that hold any character of the subject's first occurrence, from each prompt's
        first token on.

    Raises:
        ValueError: A prompt does not hold it, or the positions do not exist.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> find_subject(model, as_batch(model, "a->b"), "->").tolist()
        [[False, True, True, False]]
    """
    lengths = lengths_of(batch)
    given: list[Any] = list(subject) if not isinstance(subject, str) else [subject] * len(batch)
    if given and all(isinstance(each, int) for each in given):
        given = [given] * len(batch)
    if len(given) != len(batch):
        raise ValueError(
            f"subject needs one for each of {len(batch)} prompts, or one for all; {len(given)} arrived."
        )
    found = np.zeros((len(batch), int(lengths.max())), dtype=bool)
    for row, (each, length) in enumerate(zip(given, lengths.tolist(), strict=True)):
        positions = _span(model, batch, row, each) if isinstance(each, str) else list(each)
        for position in positions:
            if not -length <= position < length:
                raise ValueError(
                    f"subject at position {position} asked for, but prompt {row} has {length} tokens: "
                    f"{-length} to {length - 1}."
                )
            found[row, position % length] = True
        if not found[row].any():
            raise ValueError(f"the subject of prompt {row} has no tokens.")
    return found


def _span(model: Any, batch: TokenBatch, row: int, subject: str) -> list[int]:
    """Positions of the tokens that hold a text."""
    text, encoder = batch.text[row], Encoder.of(model)
    begin = text.find(subject)
    if not subject or begin < 0:
        raise ValueError(
            f"prompt {row} does not hold the subject {subject!r}; it is {text[:80]!r}."
        )
    coded = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = real_tokens(batch.rows(slice(row, row + 1)))[0]
    shift = len(ids) - len(coded["input_ids"])
    if shift < 0 or ids[shift:] != coded["input_ids"]:
        raise ValueError(
            f"the tokens of prompt {row} are not those of its text, so {subject!r} cannot be found in "
            "them; give positions."
        )
    end = begin + len(subject)
    offsets = enumerate(coded["offset_mapping"])
    # A token that is only the space before the subject is no part of it.
    return [shift + i for i, (a, b) in offsets if a < end and b > begin and text[a:b].strip()]


def embedding_spread(drive: Runner) -> float:
    """Standard deviation of the token embeddings, over tokens, pooled over dimensions.

    Args:
        drive: The model.

    Returns:
        The spread; of an even choice of tokens where the vocabulary is large.
    """
    size = drive.model.cfg.d_vocab
    tokens = torch.arange(0, size, max(size // _SAMPLED, 1), device=drive.device)
    # All at the same position: what positions add does not vary then.
    with torch.no_grad():
        embedded = drive.embed(tokens, torch.zeros_like(tokens)).float()
    return float(embedded.var(dim=0).mean().sqrt())


def _noises(
    drive: Runner,
    batch: TokenBatch,
    blurred: Bool[np.ndarray, "prompt position"],
    scale: float,
    samples: int,
    seed: int,
) -> list[tuple[Edit, ...]]:
    """For each sample the edits that blur the subject, which depend on prompt and seed alone."""
    width = drive.site_shape("resid_pre")[0]
    positions = np.flatnonzero(blurred.any(axis=0)).tolist()
    drawn: list[Float[Tensor, "sample token d_model"]] = []
    for ids, where in zip(real_tokens(batch), blurred, strict=True):
        key = zlib.crc32(np.array([seed, *ids], dtype=np.int64).tobytes())
        generator = torch.Generator().manual_seed(key)
        each = torch.randn(samples, int(where.sum()), width, generator=generator) * scale
        whole = each.new_zeros(samples, len(positions), width)
        whole[:, where[positions]] = each
        drawn.append(whole)
    noise = torch.stack(drawn, dim=1).to(drive.device, drive.dtype)
    masks = [None if blurred[:, p].all() else torch.from_numpy(blurred[:, p]) for p in positions]
    return [
        tuple(
            Edit("resid_pre", 0, noise[s, :, i], p, mode="add", where=mask)
            for i, (p, mask) in enumerate(zip(positions, masks, strict=True))
        )
        for s in range(samples)
    ]


def _averaged(runs: list[Swept]) -> Swept:
    """The mean over samples; tokens are those of the first."""
    return replace(
        runs[0],
        values=np.mean([run.values for run in runs], axis=0),
        base=np.mean([run.base for run in runs], axis=0),
    )


def _subject_coords(
    blurred: np.ndarray, lengths: np.ndarray, positions: tuple[int, ...] | None
) -> dict[str, Any]:
    if positions is None:
        return {}
    at = np.array(positions)
    place = np.where(at < 0, lengths[:, None] + at, at)
    there = (place >= 0) & (place < lengths[:, None])
    inside = np.clip(place, 0, blurred.shape[1] - 1)
    found = blurred[np.arange(len(blurred))[:, None], inside] & there
    return {"subject": (("prompt", "position"), found)}
