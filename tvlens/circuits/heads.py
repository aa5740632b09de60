"""Which heads look where? Scores from random tokens that are said twice.

Random tokens hold no meaning, so what a head does on them it does for their order alone. Said a second
time, each token has three places worth looking at: the token just before it, its own first occurrence, and
the token that came after that. The last is induction: what followed once will follow again. A head's score
is the attention it pays to that place, averaged over the second half. Function-vector heads are found by
what they write, not by where they look; they are not scored here.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import einops
import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import Encoder, TokenBatch
from tvlens.engine import Read, Request, run
from tvlens.models.runner import Runner, runner
from tvlens.patching.statistics import bootstrap_ratio
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

KINDS = {
    "previous": "the token before",
    "duplicate": "the same token's first occurrence",
    "induction": "the token after its first occurrence",
}
"""What a head of each kind looks at."""
_KEPT = 2**28  # bytes of attention weights that are kept at once
_SHORTEST = 3  # of two tokens, the one before is also the one after the first occurrence


class HeadScores(Result):
    """How much attention every head pays to three places in repeated random tokens, by sequence."""

    kind: ClassVar[str] = "head_scores"
    references: ClassVar[tuple[str, ...]] = ("olsson2022context", "elhage2021mathematical")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "score": ("kind", "layer", "head", "prompt")
    }
    table: ClassVar[tuple[str, ...]] = ("score",)
    method: ClassVar[str] = (
        "Sequences of distinct random tokens are said twice. A head's score is its attention weight from a "
        "token of the second half to the token before it (previous), to the same token's first occurrence "
        "(duplicate), or to the token after that (induction), averaged over the second half. Intervals: "
        "percentile bootstrap over sequences, 95 %."
    )

    def mean(self, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> xr.Dataset:
        """Average over sequences, with bootstrap intervals.

        Args:
            level: Confidence level between 0 and 1.
            n_resamples: How many draws of the sequences.
            seed: Seed of the draws.

        Returns:
            ``mean, low, high`` by kind, layer and head; ends are NaN for a single sequence.

        Example:
            >>> scores.mean()["mean"].sel(kind="induction").max()  # doctest: +SKIP
        """
        score = self.data["score"].transpose("prompt", "kind", "layer", "head")
        rows = einops.rearrange(score.values.astype(float), "prompt ... -> prompt (...)")
        low, high = bootstrap_ratio(
            rows, np.ones_like(rows), level=level, n_resamples=n_resamples, seed=seed
        )
        found = {"mean": rows.mean(axis=0), "low": low, "high": high}
        shape = {k: (score.dims[1:], v.reshape(score.shape[1:])) for k, v in found.items()}
        return xr.Dataset(shape, coords={d: score[d] for d in score.dims[1:]})

    def top(self, kind: str = "induction", n: int = 8) -> pd.DataFrame:
        """Give the heads with the highest scores of one kind.

        Args:
            kind: ``"previous"``, ``"duplicate"`` or ``"induction"``.
            n: How many heads.

        Returns:
            ``layer, head, mean, low, high``, highest first.

        Raises:
            ValueError: That kind was not scored, or there are fewer heads.

        Example:
            >>> scores.top("induction", 3)  # doctest: +SKIP
        """
        self._check(kind)
        many = self.data.sizes["layer"] * self.data.sizes["head"]
        if not 1 <= n <= many:
            raise ValueError(f"{n} heads asked for, but this model has {many}: 1 to {many}.")
        frame = self.mean().sel(kind=kind, drop=True).to_dataframe().reset_index()
        best = frame.sort_values("mean", ascending=False, kind="stable").head(n)
        return best.reset_index(drop=True)

    def _check(self, kind: str) -> None:
        if kind not in self.data["kind"].values:
            raise unknown("kind of head", kind, map(str, self.data["kind"].values))

    @property
    def title(self) -> str:
        """What was scored, in which model."""
        return f"Head scores of {self.provenance['model']}"

    def finding(self) -> str:
        """The highest score of each kind, and the median head's, in one sentence."""
        said = []
        for kind in reversed([str(k) for k in self.data["kind"].values]):
            best, median = self.top(kind, 1).iloc[0], self._median(kind)
            interval = (
                "" if np.isnan(best["low"]) else f" ({best['low']:.2f} to {best['high']:.2f})"
            )
            where = f"layer {best['layer']:.0f}, head {best['head']:.0f}"
            said.append(f"{kind} {best['mean']:.2f}{interval} at {where} (median {median:.3f})")
        n = self.data.sizes["prompt"]
        return f"Highest scores: {'; '.join(said)}; {n} sequence{'s' * (n != 1)}."

    def _median(self, kind: str) -> float:
        return float(self.data["score"].sel(kind=kind).mean("prompt").median())

    def summary(self) -> dict[str, Any]:
        """The best head of each kind with its interval."""
        made = self.provenance
        found: dict[str, Any] = {"model": made["model"]}
        for kind in map(str, self.data["kind"].values):
            best = self.top(kind, 1).iloc[0]
            found |= {
                f"{kind}_head": f"{best['layer']:.0f}.{best['head']:.0f}",
                kind: float(best["mean"]),
                f"{kind}_low": float(best["low"]),
                f"{kind}_high": float(best["high"]),
                f"{kind}_median": self._median(kind),
            }
        return found | {"n_prompts": self.data.sizes["prompt"], "seconds": made["seconds"]}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the map of layers and heads; see `tvlens.plots.heads.head_map`."""
        from tvlens.plots.heads import head_map

        return head_map(self.drawn(), **channels)

    def drawn(self) -> xr.Dataset:
        """Give what the map shows: means and intervals, without sequences.

        Returns:
            ``mean, low, high`` by kind, layer and head.
        """
        return self.mean().assign_attrs(**self.data.attrs, finding=self.finding())


def head_scores(
    model: Any,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    n_prompts: int = 16,
    length: int = 48,
    seed: int = 0,
    plan: str = "auto",
    memory: int | None = None,
) -> HeadScores:
    """Score every head on repeated random tokens, as previous-token, duplicate-token or induction head.

    Args:
        model: A TransformerLens model.
        kinds: What is scored: ``"previous"``, ``"duplicate"``, ``"induction"``.
        n_prompts: How many sequences.
        length: Tokens that are said twice; in a model whose attention reaches less far back, duplicate
            and induction scores are zero there.
        seed: Seed of the random tokens.
        plan: The engine's plan, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        The scores, sequence by sequence, as a result that draws itself.

    Raises:
        ValueError: A kind is unknown, or the sequences do not fit the model.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> scores = head_scores(tiny_model(), n_prompts=2, length=8)
        >>> dict(scores.data["score"].sizes)
        {'kind': 3, 'layer': 2, 'head': 4, 'prompt': 2}

    References:
        Olsson et al. 2022, arXiv:2209.11895; Elhage et al. 2021, elhage2021mathematical.
    """
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    started = time.perf_counter()
    chosen = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in chosen:
        if kind not in KINDS:
            raise unknown("kind of head", kind, KINDS)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"kinds needs some of {', '.join(KINDS)}, each once; {chosen} arrived.")
    batch = repeated_tokens(model, n_prompts=n_prompts, length=length, seed=seed)
    drive = runner(model)
    at_once, layers = _at_once(drive, batch, memory)
    found = [
        _score(
            model,
            batch.rows(slice(s, s + at_once)),
            layers,
            chosen,
            length,
            plan=plan,
            memory=memory,
        )
        for s in range(0, n_prompts, at_once)
    ]
    score = np.concatenate(found, axis=-1)
    known = facts(model)
    note = collect(
        kind=HeadScores.kind, model=known.name, n_prompts=n_prompts, length=length, seed=seed,
        model_facts=known.to_dict(), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    data = xr.Dataset(
        {
            "score": (("kind", "layer", "head", "prompt"), score),
            "tokens": (("prompt", "position"), batch.tokens.numpy()),
        },
        coords={
            "kind": chosen,
            "layer": np.arange(score.shape[1]),
            "head": np.arange(score.shape[2]),
        },
    )
    return HeadScores(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _score(
    model: Any,
    batch: TokenBatch,
    layers: Sequence[tuple[int, ...]],
    kinds: Sequence[str],
    length: int,
    **limits: Any,
) -> Float[np.ndarray, "kind layer head prompt"]:
    """Score the heads on some sequences, some layers at a time."""
    scores = []
    for some in layers:
        request = Request(batch, reads=(Read("pattern", some, None),))
        (output,) = run(model, [request], **limits)
        scores.append(looked_at(output.activations[0][0], kinds=kinds, length=length))
    return torch.cat(scores, dim=1).cpu().numpy()


def _at_once(
    drive: Runner, batch: TokenBatch, memory: int | None
) -> tuple[int, list[tuple[int, ...]]]:
    """How many sequences, and which layers, have their attention weights kept at once.

    Layers are separated only where one sequence is too much, for each group of them costs a forward.
    """
    limit = min(memory or _KEPT, _KEPT)
    width, n = batch.tokens.shape[1], drive.n_layers
    one = drive.site_shape("pattern")[0] * width * width * drive.dtype.itemsize
    deep = min(max(limit // one, 1), n)
    layers = [tuple(range(s, min(s + deep, n))) for s in range(0, n, deep)]
    return max(limit // (one * deep), 1), layers


def looked_at(
    pattern: Float[Tensor, "prompt layer query head key"],
    *,
    kinds: Sequence[str] = tuple(KINDS),
    length: int,
) -> Float[Tensor, "kind layer head prompt"]:
    """Average the attention that the second half pays to the place of each kind.

    Args:
        pattern: Attention weights of tokens that end in ``length`` tokens said twice.
        kinds: What is scored.
        length: How many tokens are said twice.

    Returns:
        The scores, 0 to 1.

    Example:
        >>> looks_back = torch.zeros(1, 1, 6, 1, 6)
        >>> looks_back[0, 0, [3, 4, 5], 0, [1, 2, 3]] = 1
        >>> looked_at(looks_back, length=3).flatten().tolist()
        [0.0, 0.0, 1.0]
    """
    back = {"previous": 1, "duplicate": length, "induction": length - 1}
    diagonals = [pattern.diagonal(-back[kind], dim1=2, dim2=4)[..., -length:] for kind in kinds]
    return einops.reduce(
        torch.stack(diagonals).float(),
        "kind prompt layer head token -> kind layer head prompt",
        "mean",
    )


def repeated_tokens(
    model: Any, *, n_prompts: int = 16, length: int = 48, seed: int | Sequence[int] = 0
) -> TokenBatch:
    """Draw sequences of distinct random tokens and say each twice, after BOS where the model wants one.

    Args:
        model: The model; its tokenizer's special tokens are left out.
        n_prompts: How many sequences.
        length: Tokens that are said twice.
        seed: Seed of the draws, one number or several.

    Returns:
        The sequences, of ``2 * length`` tokens and BOS.

    Raises:
        ValueError: There are no sequences, they are too short to tell kinds of heads apart, or longer than
            the context or the vocabulary.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> batch = repeated_tokens(tiny_model(), n_prompts=1, length=3)
        >>> bool((batch.tokens[0, -3:] == batch.tokens[0, -6:-3]).all())
        True
    """
    from tvlens.models import facts

    tokenizer, known = getattr(model, "tokenizer", None), facts(model)
    bos = Encoder.of(model).bos if tokenizer is not None else None
    ids = _ordinary(tokenizer, known.d_vocab)
    longest = min((known.n_ctx - (bos is not None)) // 2, len(ids))
    if n_prompts < 1:
        raise ValueError(f"n_prompts must be at least 1; {n_prompts} arrived.")
    if not _SHORTEST <= length <= longest:
        raise ValueError(
            f"length must be {_SHORTEST} to {longest} in this model, whose context is {known.n_ctx} tokens "
            f"and whose vocabulary has {len(ids)} ordinary ones; {length} arrived."
        )
    rng = np.random.default_rng(seed)
    once = np.stack([rng.choice(ids, size=length, replace=False) for _ in range(n_prompts)])
    twice = torch.from_numpy(einops.repeat(once, "prompt token -> prompt (two token)", two=2))
    if bos is not None:
        twice = torch.cat([torch.full((n_prompts, 1), bos), twice], dim=1)
    text = [tokenizer.decode(row) if tokenizer is not None else "" for row in once]
    return TokenBatch.of_ids(twice, text)


def _ordinary(tokenizer: Any, d_vocab: int) -> np.ndarray:
    """Ids of tokens that stand for text."""
    if tokenizer is None:
        return np.arange(d_vocab)
    added = [*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder]
    return np.setdiff1d(np.arange(min(d_vocab, len(tokenizer))), added)
