"""Do the induction heads matter? Take them away, and see what happens to tokens that are said again.

A high score says where a head looks, not that anything depends on it. A model that knows induction predicts
random tokens well the second time it sees them, for no other reason than having seen them before. If the
heads with high scores do that, ablating them costs this prediction, and ablating as many others does not. The
sequences are not those on which the heads were chosen.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import einops
import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from tvlens._errors import needs, unknown
from tvlens.circuits.heads import HeadScores, repeated_tokens
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, Read, Request, run
from tvlens.models.runner import Runner, runner
from tvlens.patching.sweep import parts
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

ABLATIONS = ("mean", "zero")
CONTROLS = ("any", "layer")
_LOGITS = 2**26  # bytes of logits at once
Head = tuple[int, int]
"""Layer and head."""


class InductionTest(Result):
    """Loss on repeated tokens, by sequence: untouched, without the top heads, without random ones."""

    kind: ClassVar[str] = "induction_test"
    references: ClassVar[tuple[str, ...]] = ("olsson2022context",)
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "first": ("prompt",),
        "clean": ("prompt",),
        "top": ("prompt",),
        "random": ("draw", "prompt"),
    }
    table: ClassVar[tuple[str, ...]] = ("first", "clean", "top")
    method: ClassVar[str] = (
        "Sequences of random tokens are said twice, others than those the heads were chosen on. The loss is "
        "that of the second half from its second token on, in nats a token; cost is its rise when heads are "
        "ablated. Intervals: percentile bootstrap, 95 %, over sequences and, for random heads, over draws "
        "of heads as well."
    )

    def costs(
        self, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
    ) -> dict[str, tuple[float, float, float]]:
        """Give what ablations cost, with intervals over sequences and over draws of random heads.

        Args:
            level: Confidence level between 0 and 1.
            n_resamples: How many draws.
            seed: Seed of the draws.

        Returns:
            Mean, lower and upper end, in nats a token: ``top``, ``random`` (mean of all draws) and
            ``difference`` (of these two, on the same sequences).

        Raises:
            ValueError: The level is outside 0 to 1.

        Example:
            >>> test.costs()["difference"]  # doctest: +SKIP
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, e.g. 0.95; {level!r} arrived.")
        top = (self.data["top"] - self.data["clean"]).values
        random = (self.data["random"] - self.data["clean"]).transpose("draw", "prompt").values
        rng, (n_draws, n) = np.random.default_rng(seed), random.shape
        prompts = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) / n
        draws = rng.multinomial(n_draws, np.full(n_draws, 1 / n_draws), size=n_resamples) / n_draws
        again = {
            "top": prompts @ top,
            "random": np.einsum("rd,dp,rp->r", draws, random, prompts),
        }
        again["difference"] = again["top"] - again["random"]
        means = {
            "top": top.mean(),
            "random": random.mean(),
            "difference": top.mean() - random.mean(),
        }
        found = {}
        for name, draw in again.items():
            low, high = np.quantile(draw, [(1 - level) / 2, (1 + level) / 2])
            found[name] = (float(means[name]), float(low), float(high))
        return found

    def rank(self) -> tuple[int, int]:
        """Count the draws of random heads that cost as much as the top heads, or more.

        Returns:
            How many, and of how many.
        """
        random = self.data["random"].mean("prompt").values
        return int((random >= float(self.data["top"].mean())).sum()), len(random)

    @property
    def title(self) -> str:
        """What was ablated, in which model."""
        made = self.provenance
        return f"{made['n_heads']} {made['chosen']} heads ablated: {made['model']}"

    def finding(self) -> str:
        """What both ablations cost, in one sentence."""
        made, costs = self.provenance, self.costs()
        said = {
            name: f"{mean:.2f} nats ({low:.2f} to {high:.2f})"
            for name, (mean, low, high) in costs.items()
        }
        first, clean = float(self.data["first"].mean()), float(self.data["clean"].mean())
        n, n_draws = made["n_heads"], self.data.sizes["draw"]
        return (
            f"{made['ablation'].capitalize()}-ablating the {n} best {made['chosen']} heads raises the "
            f"loss on repeated tokens by {said['top']}, {n} random heads by {said['random']}, mean of "
            f"{n_draws} draws; difference {said['difference']}. Untouched, it is {clean:.2f}, and "
            f"{first:.2f} the first time."
        )

    def summary(self) -> dict[str, Any]:
        """The costs with their intervals."""
        made = self.provenance
        found: dict[str, Any] = {"model": made["model"], "ablation": made["ablation"]}
        for name, (mean, low, high) in self.costs().items():
            found |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        return found | {"n_prompts": self.data.sizes["prompt"], "seconds": made["seconds"]}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the costs; see `tvlens.plots.heads.ablation_costs`."""
        from tvlens.plots.heads import ablation_costs

        data = self.data.assign_attrs(finding=self.finding(), means=self.costs())
        return ablation_costs(data, **channels)


def induction_test(
    model: Any,
    scores: HeadScores,
    *,
    kind: str = "induction",
    n_heads: int = 8,
    n_random: int = 10,
    ablation: str = "mean",
    control: str = "any",
    n_prompts: int = 16,
    seed: int = 0,
    plan: str = "auto",
    memory: int | None = None,
) -> InductionTest:
    """Ablate the heads with the highest scores, and as many random ones, and compare the loss.

    Args:
        model: The model that was scored.
        scores: What `head_scores` gave.
        kind: By which score heads are chosen.
        n_heads: How many heads are ablated together, at all positions.
        n_random: How many times random heads are drawn; never among the chosen ones.
        ablation: What comes in a head's place: its ``"mean"`` at each position over fresh sequences of the
            same kind, or ``"zero"``.
        control: Where random heads come from: ``"any"`` layer, or as many from each ``"layer"`` as the
            chosen ones.
        n_prompts: How many sequences; they differ from those of the scores.
        seed: Seed of the sequences and of the random heads.
        plan: The engine's plan, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        The loss of every run, sequence by sequence, as a result that draws itself.

    Raises:
        ValueError: The scores are another model's, there are too few heads, or an unknown name.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> from tvlens.circuits import head_scores
        >>> scores = head_scores(tiny_model(), n_prompts=2, length=8)
        >>> test = induction_test(tiny_model(), scores, n_heads=2, n_random=3, n_prompts=2)
        >>> dict(test.data.sizes)
        {'prompt': 2, 'draw': 3, 'rank': 2}

    References:
        Olsson et al. 2022, arXiv:2209.11895.
    """
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    started = time.perf_counter()
    needs("scores", scores, HeadScores, "what tv.head_scores(model) gives")
    for what, asked, known in (
        ("ablation", ablation, ABLATIONS), ("control", control, CONTROLS),
    ):  # fmt: skip
        if asked not in known:
            raise unknown(what, asked, known)
    drive, length = runner(model), int(scores.provenance["length"])
    _same_model(drive, scores, facts(model).name)
    table = scores.top(kind, n_heads)
    top = list(zip(table["layer"].astype(int), table["head"].astype(int), strict=True))
    drawn = _random_heads(drive, top, n_random, control=control, seed=seed)
    # Neither the sequences of the scores nor those of the means are those of the test.
    fresh = {"model": model, "n_prompts": n_prompts, "length": length}
    batch, other = (repeated_tokens(**fresh, seed=[seed, i]) for i in (1, 2))
    limits = {"plan": plan, "memory": memory}
    named = list(dict.fromkeys(head for heads in (top, *drawn) for head in heads))
    values = _values(model, drive, other, named, ablation, **limits)
    cells = tuple(
        tuple(Edit("z", h[0], values[h], None, h[1]) for h in heads) for heads in ((), top, *drawn)
    )
    first, second = _losses(model, drive, batch, cells, length, **limits)
    heads = np.array([top, *drawn])
    note = collect(
        kind=InductionTest.kind, model=facts(model).name, chosen=kind, n_heads=n_heads,
        ablation=ablation, control=control, n_prompts=n_prompts, length=length, seed=seed,
        scores=scores.provenance, model_facts=facts(model).to_dict(),
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    data = xr.Dataset(
        {
            "first": ("prompt", first),
            "clean": ("prompt", second[0]),
            "top": ("prompt", second[1]),
            "random": (("draw", "prompt"), second[2:]),
        },
        coords={
            "top_layer": ("rank", heads[0, :, 0]),
            "top_head": ("rank", heads[0, :, 1]),
            "random_layer": (("draw", "rank"), heads[1:, :, 0]),
            "random_head": (("draw", "rank"), heads[1:, :, 1]),
        },
    )
    return InductionTest(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _same_model(drive: Runner, scores: HeadScores, name: str) -> None:
    found = (drive.n_layers, drive.site_shape("z")[0])
    asked = (scores.data.sizes["layer"], scores.data.sizes["head"])
    if found != asked or name != scores.provenance["model"]:
        raise ValueError(
            f"the scores are those of {scores.provenance['model']!r} with {asked[0]} layers of {asked[1]} "
            f"heads; {name!r} with {found[0]} layers of {found[1]} heads arrived. Score it with "
            "head_scores."
        )


def _random_heads(
    drive: Runner, top: list[Head], n_random: int, *, control: str, seed: int
) -> list[list[Head]]:
    """Draw sets of heads, none of them among the top ones."""
    if n_random < 1:
        raise ValueError(f"n_random must be at least 1; {n_random} arrived.")
    rng, n_heads = np.random.default_rng([seed, 3]), drive.site_shape("z")[0]
    layers = range(drive.n_layers)
    # From which layers together, and how many.
    groups = [(list(layers), len(top))]
    if control == "layer":
        groups = [([i], sum(layer == i for layer, _ in top)) for i in layers]
    pools = [
        ([(i, h) for i in among for h in range(n_heads) if (i, h) not in top], n)
        for among, n in groups
    ]
    for pool, n in pools:
        if len(pool) < n:
            where = "a layer" if control == "layer" else "the model"
            raise ValueError(
                f"{n} random heads besides the chosen ones asked for, but {where} has only {len(pool)} "
                "others; take fewer as n_heads."
            )
    return [
        [pool[i] for pool, n in pools for i in rng.choice(len(pool), size=n, replace=False)]
        for _ in range(n_random)
    ]


def _values(
    model: Any, drive: Runner, other: TokenBatch, heads: list[Head], ablation: str, **limits: Any
) -> dict[Head, Float[Tensor, "one position d_head"]]:
    """What is written in each head's place."""
    if ablation == "zero":
        nothing = torch.zeros(
            1, 1, drive.site_shape("z")[1], device=drive.device, dtype=drive.dtype
        )
        return dict.fromkeys(heads, nothing)
    layers = tuple(sorted({layer for layer, _ in heads}))
    summed = []
    for rows in parts(drive, other, ("z",), len(layers)):
        request = Request(other.rows(rows), reads=(Read("z", layers, None),))
        (output,) = run(model, [request], **limits)
        each = output.activations[0][0].float()
        summed.append(
            einops.reduce(each, "prompt layer position head d -> layer head position d", "sum")
        )
    mean = (torch.stack(summed).sum(dim=0) / len(other)).to(drive.dtype)
    return {(layer, head): mean[layers.index(layer), head][None] for layer, head in heads}


def _losses(
    model: Any,
    drive: Runner,
    batch: TokenBatch,
    cells: tuple[tuple[Edit, ...], ...],
    length: int,
    **limits: Any,
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, "cell prompt"]]:
    """Mean loss of the first half, untouched, and of the second half in every cell; no half's first token."""
    final = (drive.n_layers - 1,)
    first, second = [], []
    for rows in parts(drive, batch, ("resid_post",), len(cells)):
        some = batch.rows(rows)
        request = Request(some, cells=cells, reads=(Read("resid_post", final, None),))
        (output,) = run(model, [request], **limits)
        resid = output.activations[0][:, :, 0]
        halves = slice(-2 * length, -length), slice(-length, None)
        first.append(_mean_loss(drive, resid[0][:, halves[0]], some.tokens[:, halves[0]]))
        second.append(
            [_mean_loss(drive, r[:, halves[1]], some.tokens[:, halves[1]]) for r in resid]
        )
    return np.concatenate(first), np.concatenate(second, axis=1)


@torch.no_grad()
def _mean_loss(
    drive: Runner,
    resid: Float[Tensor, "prompt position d_model"],
    tokens: Int[Tensor, "prompt position"],
) -> Float[np.ndarray, " prompt"]:
    """Mean loss of all tokens but the first, each from the residual before it."""
    rows = einops.rearrange(resid[:, :-1], "prompt position d -> (prompt position) d")
    targets = einops.rearrange(tokens[:, 1:], "prompt position -> (prompt position)")
    at_once = max(_LOGITS // (4 * drive.model.cfg.d_vocab), 1)
    losses = []
    for some, wanted in zip(rows.split(at_once), targets.split(at_once), strict=True):
        logits = drive.logits(some).float()
        losses.append(cross_entropy(logits, wanted.to(logits.device), reduction="none"))
    each = einops.reduce(torch.cat(losses), "(prompt target) -> prompt", "mean", prompt=len(resid))
    return each.cpu().numpy()
