"""Five ways to ask a model of context pairs where it has its answer from.

A model may match the query with the context and copy that label (in-context learning, ICL), recall the
label from its weights (in-weight learning, IWL), or recall it and copy it only if it stands in the context
(context-constrained in-weight learning, CIWL). What a model was trained on tells none of these apart;
these do:

- ``train``: query class and a distractor in the context, with their own labels. Everything works.
- ``icl``: both have labels 0 and 1, in random order. Only matching works.
- ``flip``: both have each other's label, and that is the answer. Matching gives 1, recalling 0.
- ``ciwl``: the class is not in the context, but its label is, on a wrong item. Recalling works, with or
  without the context; matching does not.
- ``pure_iwl``: neither class nor label is in the context. Only recalling without the context works.
"""

from dataclasses import dataclass

import torch
import xarray as xr
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.icl.draws import generator
from tvlens.icl.presets import at_least
from tvlens.icl.training import Training

KINDS = ("train", "icl", "flip", "ciwl", "pure_iwl")
_SUPPORTED = ("train", "icl", "flip")


@dataclass(frozen=True, eq=False)
class Sequences:
    """Contexts of pairs and a query: which classes are shown, and what they are called.

    Args:
        classes: Class of every context item, and last that of the query.
        labels: Label of every context item, and last the right answer.
    """

    classes: Int[Tensor, "item pair"]
    labels: Int[Tensor, "item pair"]


def five_way(training: Training, *, n: int = 1000, copies: int = 1, seed: int = 0) -> xr.Dataset:
    """Ask every member of a trained ensemble in all five ways.

    Common and rare classes come equally often; inputs are as noisy as in training, and new. A model that
    copies either of two labels, whatever the query, is right half the time but for ``pure_iwl``.

    Args:
        training: What `tvlens.icl.train` returned, with two or more pairs in the context.
        n: Sequences of each kind.
        copies: How often the query's class stands in the context, and a distractor.
        seed: Seed of the draws.

    Returns:
        By ``member`` and ``kind``, shares of right answers: ``right`` among all labels; ``in_context`` among
        those that the context shows, NaN for ``pure_iwl``, whose context shows none that is right.

    Raises:
        ValueError: The context is too short for the copies, or there are too few classes.

    Example:
        >>> from tvlens.icl import Plan, Setting, train
        >>> plan = Plan(steps=1, probes=())
        >>> done = train([Setting(length=2)], plan, device="cpu", progress=False)
        >>> five_way(done, n=50)["right"].sizes
        Frozen({'member': 1, 'kind': 5})

    References:
        Singh et al. 2025, Strategy Coopetition, arXiv 2503.05631.
    """
    data, found = training.data, []
    for kind in KINDS:
        asked = sequences(
            kind, n, n_classes=data.n_classes, pairs=data.length, copies=copies, seed=seed
        )
        items = data.items_of(f"five_way {kind} {seed}", asked.classes, asked.labels)
        with torch.no_grad():
            says = training.model.log_probs(training.weights, items)
        found.append([score(one, asked) for one in says])
    return xr.Dataset(
        {
            name: (("member", "kind"), [[one[m][name].mean().item() for one in found]
                                        for m in range(len(data.settings))])
            for name in ("right", "in_context")
        },
        coords={"kind": list(KINDS)},
    )  # fmt: skip


def sequences(
    kind: str, n: int, *, n_classes: int, pairs: int = 2, copies: int = 1, seed: int = 0
) -> Sequences:
    """Draw sequences for one of the five ways; labels of classes are their own numbers.

    Args:
        kind: ``"train"``, ``"icl"``, ``"flip"``, ``"ciwl"`` or ``"pure_iwl"``.
        n: How many.
        n_classes: Classes that the model was trained on.
        pairs: Pairs in the context.
        copies: How often the query's class stands in the context, and a distractor; the rest is other
            classes. ``ciwl`` and ``pure_iwl`` have neither.
        seed: Seed of the draws.

    Returns:
        The sequences; the classes of one context are distinct but for the copies.

    Raises:
        ValueError: The kind does not exist, the copies do not fit into the context, or there are too few
            classes.

    Example:
        >>> some = sequences("flip", 1, n_classes=10)
        >>> bool((some.labels[0, -1] != some.classes[0, -1]).all())
        True

    References:
        Singh et al. 2025, Strategy Coopetition, arXiv 2503.05631.
    """
    if kind not in KINDS:
        raise unknown("kind of sequence", kind, KINDS)
    at_least(1, n=n, pairs=pairs, copies=copies)
    if 2 * copies > pairs:
        raise ValueError(
            f"{copies} copies of two classes need {2 * copies} pairs; pairs = {pairs} arrived. "
            f"Nearest: copies = {max(1, pairs // 2)}, pairs = {max(2, pairs)}."
        )
    if n_classes < pairs + 1:
        raise ValueError(
            f"{pairs} pairs and a query need {pairs + 1} classes; n_classes = {n_classes} arrived."
        )
    stream = generator(seed, "five_way", kind)
    # The first numbers of a random order are distinct classes: query, distractor, others.
    order = torch.rand(n, n_classes, generator=stream).argsort(dim=1)
    query, others = order[:, :1], order[:, 1:]
    if kind in _SUPPORTED:
        context = torch.cat(
            [query.expand(n, copies), others[:, :1].expand(n, copies),
             others[:, 1:][:, : pairs - 2 * copies]],
            dim=1,
        )  # fmt: skip
    else:
        context = others[:, :pairs]
    shuffled = torch.rand(n, pairs, generator=stream).argsort(dim=1)
    classes = torch.cat([context.gather(1, shuffled), query], dim=1)
    return Sequences(classes, _labels(kind, classes, others[:, :1], stream))


def _labels(
    kind: str,
    classes: Int[Tensor, "item pair"],
    distractor: Int[Tensor, "item 1"],
    stream: torch.Generator,
) -> Int[Tensor, "item pair"]:
    query, n = classes[:, -1:], len(classes)
    if kind == "ciwl":
        at = torch.randint(classes.shape[1] - 1, (n, 1), generator=stream)
        return classes.scatter(1, at, query)
    if kind == "icl":
        names = torch.rand(n, 2, generator=stream).argsort(dim=1)
    elif kind == "flip":
        names = torch.cat([distractor, query], dim=1)
    else:
        return classes
    renamed = torch.where(classes == query, names[:, :1], classes)
    return torch.where(classes == distractor, names[:, 1:], renamed)


def score(
    logits: Float[Tensor, "item label"], asked: Sequences
) -> dict[str, Float[Tensor, " item"]]:
    """Judge a model's answers.

    Args:
        logits: One row for each sequence.
        asked: The sequences.

    Returns:
        ``right``: 1 where the best of all labels is the answer. ``in_context``: the same among the labels
        that the context shows; NaN for ``pure_iwl``, which shows none that is right.

    Raises:
        ValueError: There is another number of rows, or too few labels.

    Example:
        >>> some = sequences("train", 3, n_classes=5)
        >>> score(torch.eye(5)[some.labels[:, -1]], some)["in_context"]
        tensor([1., 1., 1.])

    References:
        Singh et al. 2025, Strategy Coopetition, arXiv 2503.05631.
    """
    context, answer = asked.labels[:, :-1], asked.labels[:, -1]
    if len(logits) != len(answer) or logits.shape[1] <= int(asked.labels.max()):
        raise ValueError(
            f"{len(answer)} sequences with labels up to {int(asked.labels.max())} need logits of as many "
            f"rows and more columns; {tuple(logits.shape)} arrived."
        )
    shown = torch.zeros_like(logits, dtype=torch.bool).scatter(1, context.to(logits.device), True)
    there = reduce(context == rearrange(answer, "item -> item 1"), "item pair -> item", "max")
    among = logits.masked_fill(~shown, -torch.inf).argmax(dim=1).cpu() == answer
    return {
        "right": (logits.argmax(dim=1).cpu() == answer).float(),
        "in_context": torch.where(there, among.float(), torch.nan),
    }
