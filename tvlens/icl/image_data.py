"""Sequences whose inputs are pictures: training exemplars in training, held-out ones in every probe.

Everything else is as in `tvlens.icl.data.Data`: which classes are asked for, where the context helps, how
labels are moved. Which class of pictures bears which label is drawn by the member's seed.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.icl.data import Data, Setting
from tvlens.icl.draws import generator, keys, uniforms
from tvlens.icl.features import Features

_EXEMPLAR = 7  # field of a sequence's key; `Data` uses 0 to 6


class ImageData(Data):
    """Datasets of an ensemble's members, with vectors of pictures as inputs.

    Args:
        settings: One for every member, of one shape; ``noise`` is added to the vectors, which have length
            1.
        features: The vectors. Classes beyond those that they were fitted on are the novel ones.
        device: Where sequences are drawn.

    Raises:
        ValueError: The settings have another number of classes, or another width, than the features.

    Example:
        >>> table = F.normalize(torch.randn(12, 3, 8), dim=-1)
        >>> some = Features(table, n_seen=10, n_train=2, digest="")
        >>> data = ImageData([Setting(n_sequences=64, d_model=8, noise=0.0)], some)
        >>> data.batch(torch.tensor(0), 8).inputs.shape
        torch.Size([1, 8, 2, 8])
    """

    def __init__(
        self, settings: Sequence[Setting], features: Features, *, device: str | torch.device = "cpu"
    ) -> None:
        self.features, self.table = features, features.table.to(device)
        for setting in settings:
            _check(setting, features)
        super().__init__(settings, device=device)

    @property
    def digest(self) -> str:
        """A mark of the vectors, for the name of a file that keeps a training's state."""
        return hashlib.sha256(self.features.digest.encode()).hexdigest()[:10]

    def _inputs(
        self,
        classes: Int[Tensor, "member item slot"],
        key: Int[Tensor, "member item"],
        *,
        split: str,
        group: str | None,
    ) -> Float[Tensor, "member item slot d_model"]:
        """Vectors of training exemplars in training and of held-out ones in every other split, with noise."""
        rows = self._novel_rows(classes) if group == "novel" else self._rows(classes)
        n_train = self.features.n_train
        first, n = (0, n_train) if split == "train" else (n_train, self.table.shape[1] - n_train)
        chosen = first + (uniforms(keys(key, _EXEMPLAR), classes.shape[-1]) * n).long()
        return self.table[rows, chosen] + self._noise(key, classes.shape[-1])

    def _rows(self, classes: Int[Tensor, "member item slot"]) -> Int[Tensor, "member item slot"]:
        """Pictures' classes that bear these labels."""
        member = rearrange(torch.arange(len(classes), device=self.device), "m -> m 1 1")
        return self.order[member, classes]

    def _novel_rows(
        self, classes: Int[Tensor, "member item slot"]
    ) -> Int[Tensor, "member item slot"]:
        """Novel classes of pictures, perhaps fewer than labels: only the query's differs from all others."""
        n = len(self.table) - self.features.n_seen
        if n < 2:
            raise ValueError(
                f"novel classes need pictures of at least 2 classes beyond the {self.features.n_seen} that "
                f"are trained on; there are {n}. Draw more classes, or leave novel probes out."
            )
        query = classes[..., -1:]
        ahead = (classes - query) % self.n_classes
        ahead = torch.where(ahead == 0, 0, 1 + (ahead - 1) % (n - 1))
        return self.features.n_seen + (query + ahead) % n

    def _prototypes(self, name: str) -> Float[Tensor, "member label d_model"]:
        """Mean training vectors of the classes, by label; of all novel ones, whatever their number."""
        means = F.normalize(
            reduce(self.table[:, : self.features.n_train], "label exemplar d -> label d", "mean"),
            dim=-1,
        )
        if name == "novel":
            return means[self.features.n_seen :].expand(len(self.settings), -1, -1)
        orders = [
            torch.randperm(self.n_classes, generator=generator(s.seed, "image classes"))
            for s in self.settings
        ]
        self.order = torch.stack(orders).to(self.device)
        return means[self.order]


def _check(setting: Setting, features: Features) -> None:
    width = features.table.shape[-1]
    if setting.n_classes != features.n_seen:
        raise ValueError(
            f"the features were fitted on {features.n_seen} classes; a setting with {setting.n_high} + "
            f"{setting.n_low} = {setting.n_classes} arrived. "
            f"Nearest: n_low={max(1, features.n_seen - setting.n_high)}."
        )
    if setting.d_model != width:
        raise ValueError(
            f"the features are {width} wide; a setting with d_model = {setting.d_model} arrived. "
            f"Nearest: d_model={width}."
        )
