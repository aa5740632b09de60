"""What does a vector say? Project it onto the vocabulary, at the way out or at the way in.

Forwards, through the unembedding: which tokens does a vector promote, and which does it suppress. Backwards,
through the embedding: the tokens whose embeddings point along it, those that excite a neuron or a head that
reads this direction.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import needs
from tvlens.lens.measures import pieces
from tvlens.models.runner import Runner, runner
from tvlens.patching.pairs import spelled
from tvlens.plots.theme import visible
from tvlens.results import Result
from tvlens.vectors import TaskVector

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Projection(Result):
    """What `project` found: the tokens at both ends of each vector's row of the vocabulary."""

    kind: ClassVar[str] = "projection"
    references: ClassVar[Any] = ("dar2023analyzing", "geva2022transformer")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "top_token": ("row", "rank"),
        "top_value": ("row", "rank"),
        "bottom_token": ("row", "rank"),
        "bottom_value": ("row", "rank"),
    }
    table: ClassVar[tuple[str, ...]] = ("top_token", "top_value", "bottom_token", "bottom_value")
    method: ClassVar[str] = (
        "Vectors are multiplied with the unembedding (after the model's final norm, where asked for) or with "
        "the embedding; the tokens with the largest and the smallest values are kept."
    )

    @property
    def title(self) -> str:
        """Which way was looked, and in which model."""
        made = self.provenance
        way = "input tokens along" if made["transposed"] else "output tokens of"
        return f"{way.capitalize()} {made['what']} in {made['model']}"

    def finding(self) -> str:
        """Name the strongest tokens of the row that stands out most."""
        data = self.data
        away = (data["top_value"].isel(rank=0) - data["mean"]) / data["spread"]
        best = data.isel(row=int(away.fillna(-np.inf).argmax("row")))
        tokens, verb = [visible(str(t), limit=16) for t in best["top_token"].values[:3]], "promotes"
        if self.provenance["transposed"]:
            verb = "is excited most by"
        low = visible(str(best["bottom_token"].values[0]), limit=16)
        least = "least by" if self.provenance["transposed"] else "suppresses"
        return (
            f"{str(best['label'].values).capitalize()} {verb} {', '.join(tokens)} "
            f"({float(away.max()):.1f} standard deviations above the mean token) and {least} {low}."
        )

    def summary(self) -> dict[str, Any]:
        """The number of vectors and the strongest token of the one that stands out most."""
        made = self.provenance
        return {
            "model": made["model"],
            "rows": self.data.sizes["row"],
            "transposed": made["transposed"],
            "finding": self.finding(),
        }

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the tokens by row and rank; see `tvlens.plots.projection_heatmap`."""
        from tvlens.plots.projection import projection_heatmap

        return projection_heatmap(self.data.assign_attrs(finding=self.finding()), **channels)


def project(
    model: Any,
    vectors: TaskVector | Float[Tensor, "*row d_model"],
    *,
    k: int = 10,
    transposed: bool = False,
    norm: bool | None = None,
    labels: Sequence[str] | None = None,
    memory: int | None = None,
) -> Projection:
    """Project vectors of the residual stream onto the vocabulary.

    Args:
        model: A TransformerLens model.
        vectors: A `TaskVector`, a vector, or a matrix whose rows are projected each for itself: rows of an
            MLP's output weights, what a head makes of some inputs, differences of means.
        k: How many tokens are kept at either end.
        transposed: Multiply with the embedding instead: which input tokens excite what reads this direction.
        norm: Whether the vector passes the final norm first, as a state of the residual stream does (the
            default; values are then logits, soft cap included). False multiplies with the unembedding alone:
            for differences and directions, whose length and sign mean something. Not for ``transposed``.
        labels: Names of the rows.
        memory: Bytes that values over the vocabulary may take; rows are taken in parts.

    Returns:
        For each row the tokens with the largest and smallest values, mean and standard deviation of all of
        them, and with ``norm`` the probabilities.

    Raises:
        ValueError: The vectors have another width than the model, hold NaN, ``k`` is no number of tokens,
            or the numbers of labels and rows differ.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> found = project(model, model.W_out[1, :5].detach(), norm=False, k=3)
        >>> dict(found.data["top_token"].sizes)
        {'row': 5, 'rank': 3}

    References:
        Geva et al. 2022, arXiv:2203.14680; Dar et al. 2023, arXiv:2209.02535.
    """
    started = time.perf_counter()
    drive, d_vocab = runner(model), int(model.cfg.d_vocab)
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k = {k} tokens asked for; this model has {d_vocab}: 1 to {d_vocab}.")
    if transposed and norm:
        raise ValueError(
            "norm=True asks for the final norm, which stands before the unembedding; with transposed=True "
            "there is only the embedding. Leave norm out."
        )
    normed = not transposed and norm is not False
    rows, names, what = _rows(model, drive, vectors)
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"labels needs one for each of {len(rows)} rows; {len(labels)} arrived.")
    table = _table(model, drive, rows, k=k, transposed=transposed, normed=normed, memory=memory)
    data = xr.Dataset(
        table, coords={"label": ("row", np.array(list(labels or names), dtype=object))}
    )
    return _result(
        model, data, what=what, k=k, transposed=transposed, norm=normed,
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip


def _rows(
    model: Any, drive: Runner, vectors: TaskVector | Tensor
) -> tuple[Float[Tensor, "row d_model"], list[str], str]:
    """Vectors one below the other, their names, and what they are together."""
    if isinstance(vectors, TaskVector):
        vectors.check(model)
        rows = rearrange(vectors.values, "prompt layer d_model -> (prompt layer) d_model")
        several = len(vectors.values) > 1
        names = [
            f"layer {layer}" + f", prompt {i}" * several
            for i in range(len(vectors.values))
            for layer in vectors.layers
        ]
        return rows.to(drive.device), names, f"the task vector of {vectors.made.get('task', '?')}"
    needs("vectors", vectors, Tensor, "a tensor (row, d_model) or a TaskVector")
    width = drive.site_shape("resid_post")[0]
    if vectors.ndim == 0 or vectors.shape[-1] != width or not vectors.numel():
        raise ValueError(
            f"vectors of the residual stream have width {width} in this model (d_model, the last axis); "
            f"shape {tuple(vectors.shape)} arrived."
        )
    if not torch.isfinite(vectors).all():
        raise ValueError("the vectors hold NaN or infinity.")
    rows = vectors.detach().reshape(-1, width).to(drive.device)
    inner = vectors.shape[:-1]
    names = [", ".join(map(str, i)) for i in np.ndindex(*inner)] if inner else ["the vector"]
    names = [f"row {name}" if inner else name for name in names]
    return rows, names, f"{len(rows)} vector{'s' * (len(rows) != 1)}"


@torch.no_grad()
def _table(
    model: Any,
    drive: Runner,
    rows: Float[Tensor, "row d_model"],
    *,
    k: int,
    transposed: bool,
    normed: bool,
    memory: int | None,
) -> dict[str, Any]:
    kept: dict[str, list[Tensor]] = {}
    ids: dict[str, list[Tensor]] = {"top": [], "bottom": []}
    for values in _values(model, drive, rows, transposed, normed, memory):
        for end, largest in (("top", True), ("bottom", False)):
            best = values.topk(k, dim=-1, largest=largest)
            ids[end].append(best.indices.cpu())
            kept.setdefault(f"{end}_value", []).append(best.values.cpu())
            if normed:
                shares = (best.values - values.logsumexp(dim=-1, keepdim=True)).exp()
                kept.setdefault(f"{end}_probability", []).append(shares.cpu())
        kept.setdefault("mean", []).append(values.mean(dim=-1).cpu())
        kept.setdefault("spread", []).append(values.std(dim=-1).cpu())
    table: dict[str, Any] = {}
    for end, found in ids.items():
        chosen = torch.cat(found)
        words = [spelled(model, row) for row in chosen.tolist()]
        table[f"{end}_id"] = (("row", "rank"), chosen.numpy())
        table[f"{end}_token"] = (("row", "rank"), np.array(words, dtype=object))
    for name, parts in kept.items():
        whole = torch.cat(parts).numpy()
        table[name] = (("row", "rank")[: whole.ndim], whole)
    return table


def _values(
    model: Any,
    drive: Runner,
    rows: Float[Tensor, "row d_model"],
    transposed: bool,
    normed: bool,
    memory: int | None,
) -> Iterator[Float[Tensor, "row d_vocab"]]:
    """Values over the vocabulary, some rows at a time."""
    weights = None
    if not normed:
        weights = model.W_E.T * _embedding_scale(drive) if transposed else model.W_U
    for part in pieces(drive, len(rows), int(model.cfg.d_vocab), memory=memory):
        there = rows[part]
        if weights is None:
            yield drive.logits(there.to(drive.dtype)).float()
        else:
            yield (there.to(weights) @ weights).float()


def _embedding_scale(drive: Runner) -> float:
    """What the model multiplies its embedding with on the way in; a TransformerBridge's W_E is without it."""
    weights = drive.model.W_E
    tokens = torch.tensor([0, len(weights) - 1], device=drive.device)
    # At the same position, so that what is added for the position falls out.
    inside = drive.embed(tokens, torch.zeros_like(tokens)).float()
    raw, seen = (weights[0] - weights[-1]).float(), inside[0] - inside[1]
    along = torch.cosine_similarity(raw, seen.to(raw), dim=0)
    return float(seen.norm() / raw.norm()) if along > 0.99 else 1.0


def _result(model: Any, data: xr.Dataset, **note: Any) -> Projection:
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    known = facts(model)
    data.attrs[ATTRIBUTE] = encode(
        collect(
            kind=Projection.kind, model=known.name, model_facts=known.to_dict(), n_rows=data.sizes["row"],
            **note,
        )
    )  # fmt: skip
    return Projection(data)
