"""Vectors of pictures, frozen: a random convolution, then the directions in which classes differ.

The paper trains a ResNet together with the transformer, for hours. Here pictures become vectors once: 16
random filters, a rectifier and means over a grid of 7 by 7 give 784 numbers, which a linear map, fitted on
training exemplars of the classes that are trained on, brings to the transformer's width. Held-out
exemplars and novel classes have no part in the fit. `Features.accuracy` says how much of a class a single
vector tells.

References:
    Chan et al. 2025, arXiv:2410.23042, section 5.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.icl.draws import generator
from tvlens.icl.images import Images
from tvlens.icl.presets import at_least

KINDS = ("discriminant", "pca")
_FILTERS, _WIDTH, _GRID = 16, 5, 7
_RIDGE = 0.01  # share of the mean variance that is added to every direction
_PICTURES = 1000  # at a time: the filters' answers are 16 times as large


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """One vector for every picture.

    Args:
        table: Vectors of length 1; classes that are trained on first, then novel ones.
        n_seen: How many classes are trained on.
        n_train: How many exemplars of each are: the first ones. The others are held out.
        digest: A mark of the pictures and of the map.

    Raises:
        ValueError: No class, or no exemplar is left to be held out.

    Example:
        >>> Features(torch.eye(4).reshape(2, 2, 4), n_seen=2, n_train=1, digest="")
        Features(2 classes and 0 novel ones, 1 exemplars in training and 1 held out, width 4)
    """

    table: Float[Tensor, "label exemplar d_model"]
    n_seen: int
    n_train: int
    digest: str

    def __post_init__(self) -> None:
        classes, exemplars, _ = self.table.shape
        if not 1 <= self.n_seen <= classes:
            raise ValueError(
                f"there are {classes} classes; n_seen = {self.n_seen} arrived. Nearest: {classes}."
            )
        if not 1 <= self.n_train < exemplars:
            raise ValueError(
                f"of {exemplars} exemplars 1 to {exemplars - 1} can be trained on, others are held out; "
                f"n_train = {self.n_train} arrived. Nearest: {min(max(1, self.n_train), exemplars - 1)}."
            )

    def __repr__(self) -> str:
        classes, exemplars, width = self.table.shape
        return (
            f"Features({self.n_seen} classes and {classes - self.n_seen} novel ones, "
            f"{self.n_train} exemplars in training and {exemplars - self.n_train} held out, width {width})"
        )

    @property
    def trained(self) -> Float[Tensor, "label exemplar d_model"]:
        """Vectors that training may show."""
        return self.table[: self.n_seen, : self.n_train]

    @property
    def held_out(self) -> Float[Tensor, "label exemplar d_model"]:
        """Vectors of the same classes that it never shows."""
        return self.table[: self.n_seen, self.n_train :]

    def accuracy(self, *, novel: bool = False) -> float:
        """Say how often a held-out vector lies nearest to the mean of its class' training vectors.

        Args:
            novel: Whether to ask novel classes, each among the other novel ones.

        Returns:
            A share; chance is one in the number of classes. NaN where there is no such class.
        """
        rows = self.table[self.n_seen :] if novel else self.table[: self.n_seen]
        if not len(rows):
            return float("nan")
        means = F.normalize(
            reduce(rows[:, : self.n_train], "label exemplar d -> label d", "mean"), dim=-1
        )
        own = rearrange(torch.arange(len(rows), device=rows.device), "label -> label 1")
        return float(((rows[:, self.n_train :] @ means.T).argmax(dim=-1) == own).float().mean())


def features(
    images: Images,
    *,
    n_seen: int | None = None,
    n_train: int = 15,
    d_model: int = 64,
    kind: str = "discriminant",
    seed: int = 0,
) -> Features:
    """Turn pictures into vectors.

    Args:
        images: The pictures.
        n_seen: How many classes will be trained on, the first ones; all where None.
        n_train: How many exemplars of each.
        d_model: Width of a vector.
        kind: ``"discriminant"``: directions in which means of classes differ most, against the spread
            within classes (needs two exemplars). ``"pca"``: directions in which pictures differ most,
            whatever their class.
        seed: Decides the filters.

    Returns:
        The vectors.

    Raises:
        ValueError: There are too few classes or exemplars, the width is too large, or the kind does not
            exist.

    Example:
        >>> import numpy as np
        >>> drawn = np.random.default_rng(0).integers(0, 255, (6, 4, 8, 8), dtype=np.uint8)
        >>> some = Images(drawn, tuple("abcdef"), "noise")
        >>> features(some, n_train=3, d_model=5)
        Features(6 classes and 0 novel ones, 3 exemplars in training and 1 held out, width 5)
    """
    classes, exemplars = images.pixels.shape[:2]
    seen = classes if n_seen is None else n_seen
    at_least(1, n_seen=seen, n_train=n_train, d_model=d_model)
    if kind not in KINDS:
        raise unknown("kind of features", kind, KINDS)
    # Bounds of both numbers are those of the table that comes of them.
    Features(torch.zeros(classes, exemplars, 1), seen, n_train, "")
    if kind == "discriminant" and n_train < 2:
        raise ValueError(
            "discriminant features need two training exemplars of each class; n_train = 1 arrived. "
            'Nearest: n_train=2, or kind="pca".'
        )
    most = min(seen - 1 if kind == "discriminant" else seen * n_train - 1, _FILTERS * _GRID**2)
    if d_model > most:
        raise ValueError(
            f"{seen} classes give at most {most} directions; d_model = {d_model} arrived."
        )
    answers = _answers(images, seed)
    known = answers[:seen, :n_train]
    centre = reduce(known, "label exemplar unit -> unit", "mean")
    onto = (_discriminant if kind == "discriminant" else _principal)(known - centre, d_model)
    table = F.normalize((answers - centre) @ onto, dim=-1)
    return Features(
        table, seen, n_train, f"{images.digest}:{kind}:{seen}:{n_train}:{d_model}:{seed}"
    )


def _answers(images: Images, seed: int) -> Float[Tensor, "label exemplar unit"]:
    """Mean answers of random filters on a grid of places."""
    filters = torch.randn(_FILTERS, 1, _WIDTH, _WIDTH, generator=generator(seed, "image filters"))
    filters = filters - reduce(filters, "filter 1 h w -> filter 1 1 1", "mean")
    pixels = rearrange(torch.from_numpy(images.pixels), "label n h w -> (label n) 1 h w")
    found = []
    for some in pixels.split(_PICTURES):
        answer = F.conv2d(some.float() / 255, filters, padding=_WIDTH // 2).relu()
        found.append(
            rearrange(
                F.adaptive_avg_pool2d(answer, _GRID), "picture unit h w -> picture (unit h w)"
            )
        )
    return rearrange(torch.cat(found), "(label n) unit -> label n unit", n=images.pixels.shape[1])


def _discriminant(
    x: Float[Tensor, "label exemplar unit"], d_model: int
) -> Float[Tensor, "unit d_model"]:
    """Fisher's discriminant: make the spread within classes round, then take the widest spread of means."""
    means = reduce(x, "label exemplar unit -> label 1 unit", "mean")
    within = _spread(rearrange(x - means, "label exemplar unit -> (label exemplar) unit"))
    variances, axes = torch.linalg.eigh(
        within + _RIDGE * within.diag().mean() * torch.eye(len(within))
    )
    rounded = axes / variances.sqrt()
    return rounded @ _principal(means @ rounded, d_model)


def _principal(
    x: Float[Tensor, "label exemplar unit"], d_model: int
) -> Float[Tensor, "unit d_model"]:
    axes = torch.linalg.eigh(_spread(rearrange(x, "label exemplar unit -> (label exemplar) unit")))[
        1
    ]
    return axes[:, -d_model:]


def _spread(x: Float[Tensor, "row unit"]) -> Float[Tensor, "unit other"]:
    return x.T @ x / len(x)
