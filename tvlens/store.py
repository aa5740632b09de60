"""A folder of task vectors that can be searched: which are there, where each came from, which are alike.

Every vector is one safetensors file that holds its own origin, and the index is read off the files each
time it is asked for. So there is nothing that two processes could break by writing at once, nothing that
grows stale when a file is copied in or deleted by hand, and any single file is good without the store.
Files appear whole or not at all, under a name that nobody else has.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import needs, unknown, whole
from tvlens._tensors import SUFFIX, check_meta, read_header
from tvlens.vectors import TaskVector

if TYPE_CHECKING:
    import pandas as pd

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_MADE = ("task", "model", "processing", "template", "shots", "n_dummy", "seed", "created")
COLUMNS = (
    "name",
    *_MADE[:3],
    "site",
    "layers",
    "d_model",
    "sets",
    *_MADE[3:],
    "weights_sha256",
    "problem",
)


class VectorStore:
    """A folder of task vectors: save, load, list, find, and the nearest by cosine.

    Args:
        path: The folder; it is made when the first vector is saved.
        model: If given, only vectors of this model go in and out: the same weights, width and weight
            processing. Without one, vectors of any models lie side by side, and only those of one model
            are ever compared.

    Raises:
        NotADirectoryError: There is a file of that name.

    Example:
        >>> import tempfile
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> theta = tv.extract(model, tv.build_prompts("to_upper", model, n=3))
        >>> store = VectorStore(tempfile.mkdtemp(), model=model)
        >>> name = store.save(theta, "upper")
        >>> store.find(task="to_upper")["name"].tolist(), store.load("upper").values.shape[0]
        (['upper'], 3)
    """

    def __init__(self, path: str | Path, *, model: Any = None) -> None:
        needs("path", path, (str, os.PathLike), "the path of a folder")
        self.path = Path(path).expanduser()
        self.model = model
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(
                f"a vector store is a folder, but {self.path} is a file. Load a single vector with "
                "TaskVector.load(path)."
            )

    def __len__(self) -> int:
        return len(self.names())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __repr__(self) -> str:
        return f"VectorStore({str(self.path)!r}): {len(self)} vectors"

    def names(self) -> tuple[str, ...]:
        """Names of all vectors, sorted."""
        # A name that begins with a point is a file that is being written.
        files = self.path.glob(f"*{SUFFIX}")
        return tuple(sorted(p.name.removesuffix(SUFFIX) for p in files if p.name[0] != "."))

    def save(self, vector: TaskVector, name: str | None = None) -> str:
        """Add a vector; safe while other processes add theirs.

        Args:
            vector: The vector.
            name: What to call it: letters, digits and ``_ . + -``. By default task, model and a
                fingerprint of the content, so that saving the same vector again changes nothing.

        Returns:
            The name.

        Raises:
            ValueError: The name is taken or cannot be a file's, or the vector is of another model than
                the store's.
        """
        needs("vector", vector, TaskVector, "a TaskVector, as tv.extract(model, prompts) gives")
        if self.model is not None:
            self._check(vector, "the vector to save")
        chosen = _default_name(vector) if name is None else _checked_name(name)
        self.path.mkdir(parents=True, exist_ok=True)
        part = vector.save(self.path / f".{uuid.uuid4().hex}{SUFFIX}")
        try:
            _claim(part, self.path / f"{chosen}{SUFFIX}")
        except FileExistsError:
            if name is not None:
                raise ValueError(
                    f"the store at {self.path} has a vector {name!r} already. Choose another name, "
                    f"leave the name out, or remove({name!r}) first."
                ) from None
        finally:
            part.unlink(missing_ok=True)
        return chosen

    def load(self, name: str) -> TaskVector:
        """Read a vector.

        Args:
            name: Its name, see `names`.

        Returns:
            The vector, equal to the one saved.

        Raises:
            ValueError: There is none of that name (the nearest are offered), the file is damaged, or the
                vector is of another model than the store's.
        """
        vector = TaskVector.load(self._file(name))
        if self.model is not None:
            self._check(vector, f"vector {name!r}")
        return vector

    def remove(self, name: str) -> None:
        """Delete a vector's file.

        Args:
            name: Its name.

        Raises:
            ValueError: There is none of that name.
        """
        self._file(name).unlink(missing_ok=True)

    def list(self) -> "pd.DataFrame":
        """List all vectors with where they came from.

        Returns:
            One row per file, by name: name, task, model, processing, site, layers, d_model, sets (of
            demonstrations), template, shots, n_dummy, seed, created (UTC), weights_sha256, and problem:
            why a file cannot be read, empty where it can.
        """
        import pandas as pd

        rows = [row for name in self.names() if (row := self._row(name))]
        table = pd.DataFrame(rows, columns=[*COLUMNS])
        whole = ("d_model", "sets", "shots", "n_dummy", "seed")
        return table.astype({column: "Int64" for column in whole})

    def find(self, *, layer: int | None = None, **origin: Any) -> "pd.DataFrame":
        """List the vectors whose origin is as asked; unreadable files are left out.

        Args:
            layer: Only vectors that hold this layer.
            **origin: Columns of `list` with the value wanted, e.g. ``task="to_upper", shots=5``.

        Returns:
            Those rows of `list`; none if none match.

        Raises:
            ValueError: There is no such column.
        """
        import pandas as pd

        table: Any = self.list()
        table = table[table["problem"] == ""]
        for column, wanted in origin.items():
            if column not in table.columns:
                raise unknown("column", column, table.columns, hint="Layers are found by layer=14.")
            # A missing value equals nothing, whatever pandas' NA makes of the comparison.
            table = table[[v is not pd.NA and v == wanted for v in table[column]]]
        if layer is not None:
            table = table[[layer in layers for layers in table["layers"]]]
        return table.reset_index(drop=True)

    def nearest(self, vector: TaskVector, *, layer: int, k: int = 5) -> "pd.DataFrame":
        """Find the vectors most alike at one layer, each averaged over its sets of demonstrations.

        Vectors of other models, widths, processings or sites are not compared: their axes mean
        something else.

        Args:
            vector: What to look for; if it was saved in this store, it is its own nearest.
            layer: The layer compared, counted from 0; negative counts from the last layer of ``vector``.
            k: How many.

        Returns:
            The nearest rows of `list` with their cosine similarity, -1 to 1, highest first.

        Raises:
            ValueError: The store is empty, the vector has no such layer, ``k`` is less than 1, or nothing
                in the store can be compared with it.

        Example:
            >>> store.nearest(theta, layer=14)  # doctest: +SKIP
        """
        needs("vector", vector, TaskVector, "a TaskVector, as tv.extract(model, prompts) gives")
        if whole("k", k) < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if self.model is not None:
            self._check(vector, "the vector to look for")
        direction = vector.at(layer).float().mean(dim=0).cpu()
        layer = vector.layers[layer] if layer < 0 else layer
        table = self._comparable(vector, layer)
        cosines = [
            torch.cosine_similarity(self._mean_at(name, layer), direction, dim=0).item()
            for name in table["name"]
        ]
        ranked = table.assign(cosine=cosines).sort_values("cosine", ascending=False, kind="stable")
        return ranked.head(k).reset_index(drop=True)

    def _comparable(self, vector: TaskVector, layer: int) -> "pd.DataFrame":
        """Rows whose numbers mean the same as the vector's, or why there are none."""
        everything: Any = self.list()
        if everything.empty:
            raise ValueError(f"the store at {self.path} is empty; save(vector) adds one.")
        mine = _origin(vector)
        same = [
            row["problem"] == "" and _difference(mine, row) == "" and row["site"] == vector.site
            for row in everything.to_dict("records")
        ]
        kept = everything[same]
        kept = kept[[layer in layers for layers in kept["layers"]]]
        if kept.empty:
            there = everything[["model", "d_model", "processing", "site"]].drop_duplicates()
            rows = there.to_dict("records")[:6]
            lines = [", ".join(f"{column} {v}" for column, v in row.items()) for row in rows]
            raise ValueError(
                f"nothing in the store at {self.path} can be compared with this vector (model "
                f"{mine['model']}, d_model {mine['d_model']}, processing {mine['processing']}, site "
                f"{vector.site}, layer {layer}). It holds: {'; '.join(lines)}."
            )
        return kept

    def _check(self, vector: TaskVector, what: str) -> None:
        """Refuse a vector of another model than the store's."""
        from tvlens.models import facts

        known = facts(self.model).to_dict()
        known["model"] = known["name"]
        problem = _difference(_origin(vector), known)
        if problem:
            raise ValueError(f"{what} is not of this store's model {known['name']!r}: {problem}")
        vector.check(self.model)

    def _file(self, name: str) -> Path:
        names = self.names()
        if not names:
            raise ValueError(
                f"vector {name!r} asked for, but the store at {self.path} is empty; save(vector) adds one."
            )
        if name not in names:
            raise unknown("vector", name, names)
        return self.path / f"{name}{SUFFIX}"

    def _row(self, name: str) -> dict[str, Any]:
        """One row of the index; nothing if the file went away meanwhile."""
        try:
            head = _header(self.path / f"{name}{SUFFIX}")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            return {"name": name, "problem": str(error)}
        sets, _, width = head["shape"]
        fixed = {"name": name, "site": head["site"], "d_model": width, "sets": sets}
        made = {key: head["made"].get(key) for key in (*_MADE, "weights_sha256")}
        return fixed | made | {"layers": tuple(head["layers"]), "problem": ""}

    def _mean_at(self, name: str, layer: int) -> Float[Tensor, " d_model"]:
        """One layer of a stored vector, averaged over its sets."""
        # The whole file, whose checksum no slice has.
        return TaskVector.load(self._file(name)).at(layer).float().mean(dim=0)


def _header(path: Path) -> dict[str, Any]:
    """Read what a file says about itself, without its numbers.

    Raises:
        FileNotFoundError: It is gone.
        ValueError: It is damaged, or no task vector.
    """
    what = "task vector"
    meta, shapes = read_header(path, what=what)
    shape = shapes.get("values", [])
    if len(shape) != 3 or not {"site", "layers"} <= set(meta):
        raise ValueError(f"a safetensors file, but no {what} saved by tvlens")
    check_meta(path, meta, what=what)
    return {"made": {}, **meta, "shape": shape}


def _origin(vector: TaskVector) -> dict[str, Any]:
    return {"model": None, "processing": None, **vector.made, "d_model": vector.d_model}


def _difference(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say why numbers of two origins do not mean the same; nothing where they do."""
    if mine["d_model"] != other["d_model"]:
        return f"width {mine['d_model']} against {other['d_model']}."
    if mine["processing"] != other["processing"]:
        return f"weight processing {mine['processing']!r} against {other['processing']!r}."
    hashes = mine.get("weights_sha256"), other.get("weights_sha256")
    if all(isinstance(h, str) for h in hashes):
        # The same weights may go by several names, and one name by several weights.
        return "" if hashes[0] == hashes[1] else f"other weights ({mine['model']!r})."
    same = mine["model"] == other["model"]
    return "" if same else f"model {mine['model']!r} against {other['model']!r}."


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name) or name.endswith(SUFFIX):
        offer = _slug(name.removesuffix(SUFFIX)) or "vector"
        raise ValueError(
            f"a vector's name has letters, digits and _ . + - and no suffix; {name!r} arrived. "
            f"Valid would be {offer!r}."
        )
    return name


def _default_name(vector: TaskVector) -> str:
    """Task, model, and a fingerprint of all there is."""
    values = vector.values.detach().cpu().contiguous()
    content = hashlib.sha256(values.flatten().view(torch.uint8).numpy().tobytes())
    origin = {"site": vector.site, "layers": vector.layers, "made": dict(vector.made)}
    content.update(json.dumps(origin, sort_keys=True).encode())
    parts = [vector.made.get("task"), vector.made.get("model")]
    words = [_slug(str(part).rpartition("/")[2])[:40] for part in parts if part]
    return "-".join([*filter(None, words), content.hexdigest()[:12]])


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")


def _claim(part: Path, place: Path) -> None:
    """Give a finished file its name, unless another process has taken it."""
    try:
        os.link(part, place)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links. Claim the name, then fill it; readers may see it empty between.
        place.open("xb").close()
        part.replace(place)
