"""Real images for the laboratory: Omniglot from a folder of one's own, or drawings of characters.

`omniglot` reads a folder as torchvision unpacks it; nothing is downloaded. `tvlens.icl.glyphs.glyphs`
draws a stand-in. Both give `Images`, from which `tvlens.icl.features.features` makes the vectors a
transformer reads.

References:
    Lake et al. 2015, Human-level concept learning through probabilistic program induction (Omniglot).
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from tvlens._errors import unknown
from tvlens.icl.presets import at_least, several

PARTS = ("background", "evaluation")
_LAYOUT = (
    "images_background/ALPHABET/characterNN/*.png and images_evaluation/ALPHABET/characterNN/*.png"
)


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Grey pictures of classes, the same number of each.

    Args:
        pixels: Ink is bright, paper 0.
        names: One for every class.
        source: Where they come from, in words.

    Raises:
        ValueError: Names and classes differ in number.

    Example:
        >>> Images(np.zeros((2, 3, 8, 8), dtype=np.uint8), ("a", "b"), "nowhere")
        Images(2 classes of 3, 8 x 8 pixels, nowhere)
    """

    pixels: UInt8[np.ndarray, "label exemplar height width"]
    names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if len(self.names) != len(self.pixels):
            raise ValueError(
                f"{len(self.pixels)} classes need as many names; {len(self.names)} arrived."
            )

    def __repr__(self) -> str:
        n, of, height, width = self.pixels.shape
        return f"Images({n} classes of {of}, {height} x {width} pixels, {self.source})"

    def first(self, n: int) -> "Images":
        """Keep the first classes.

        Args:
            n: How many.

        Returns:
            Pictures of those.
        """
        return Images(self.pixels[:n], self.names[:n], self.source)

    @property
    def digest(self) -> str:
        """A mark of all pixels."""
        shape = repr(self.pixels.shape).encode()
        return hashlib.sha256(shape + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()[:16]


def omniglot(
    folder: str | Path,
    *,
    size: int = 28,
    exemplars: int = 20,
    parts: str | Sequence[str] = PARTS,
    seed: int = 0,
) -> Images:
    """Read Omniglot from a folder as torchvision unpacks it.

    Args:
        folder: The folder that holds ``images_background`` and ``images_evaluation``, or torchvision's
            root, which holds it as ``omniglot-py``.
        size: Side to which the 105 x 105 pictures are brought.
        exemplars: Pictures of each class, in the order of their file names: number i is by drawer i + 1,
            so that what is held out are drawers.
        parts: Which of ``"background"`` (964 classes) and ``"evaluation"`` (659).
        seed: Decides the order of classes.

    Returns:
        The pictures, ink bright.

    Raises:
        FileNotFoundError: The folder is not laid out like that; the message says what is there.
        ImportError: Pillow is missing.
        ValueError: A class has too few pictures, a file is no picture, or a part does not exist.

    Example:
        >>> omniglot("data/omniglot-py")  # doctest: +SKIP
        Images(1623 classes of 20, 28 x 28 pixels, Omniglot)
    """
    at_least(1, exemplars=exemplars)
    at_least(8, size=size)
    at_least(0, seed=seed)
    parts = several("parts", parts)
    for part in parts:
        if part not in PARTS:
            raise unknown("part of Omniglot", part, PARTS)
    root = _root(Path(folder).expanduser(), parts)
    if importlib.util.find_spec("PIL") is None:
        raise needs_extra("Reading Omniglot needs Pillow")
    classes = [
        found for part in parts for found in sorted(root.glob(f"images_{part}/*/character*"))
    ]
    classes = [found for found in classes if found.is_dir()]
    if not classes:
        raise FileNotFoundError(f"{root} should hold {_LAYOUT}; no characterNN folder is there.")
    order = np.random.default_rng(seed).permutation(len(classes))
    chosen = [classes[i] for i in order]
    pixels = np.stack([_read_class(found, exemplars, size) for found in chosen])
    return Images(pixels, tuple(f"{c.parent.name}/{c.name}" for c in chosen), "Omniglot")


def needs_extra(what: str) -> ImportError:
    """Build the error for a missing optional package.

    Args:
        what: What needs which package.

    Returns:
        The error, with the command that helps.
    """
    return ImportError(f'{what}. Install: pip install "tvlens[images]"')


def _root(folder: Path, parts: Sequence[str]) -> Path:
    """The folder that holds all parts, or an error: what was expected, what is there, what is near."""
    wanted = [f"images_{part}" for part in parts]
    for root in (folder, folder / "omniglot-py"):
        if all((root / name).is_dir() for name in wanted):
            return root
    expected = f"Omniglot is read from a folder that holds {_LAYOUT}, as torchvision unpacks it"
    if not folder.is_dir():
        near = next((up for up in folder.parents if up.is_dir()), Path())
        raise FileNotFoundError(f"{expected}; there is no folder {folder}. Nearest: {near}.")
    missing = [name for name in wanted if not (folder / name).is_dir()]
    there = sorted(path.name for path in folder.iterdir())
    seen = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "") if there else "nothing"
    hint = ""
    around = [folder.parent, *(path for path in sorted(folder.iterdir()) if path.is_dir())]
    near = [path for path in around if all((path / name).is_dir() for name in wanted)]
    zipped = [name for name in wanted if (folder / f"{name}.zip").is_file()]
    if near:
        hint = f" Nearest: {near[0]}."
    elif zipped:
        hint = f" Unpack {zipped[0]}.zip there."
    elif len(missing) < len(wanted):
        hint = f" Nearest: parts={tuple(p for p in parts if f'images_{p}' not in missing)}."
    raise FileNotFoundError(
        f"{expected}; {folder} lacks {' and '.join(missing)} and holds {seen}.{hint}"
    )


def _read_class(
    folder: Path, exemplars: int, size: int
) -> UInt8[np.ndarray, "exemplar height width"]:
    from PIL import Image, UnidentifiedImageError

    files = sorted(folder.glob("*.png"))
    if len(files) < exemplars:
        raise ValueError(
            f"every class needs {exemplars} pictures; {folder} holds {len(files)}. "
            f"Nearest: exemplars={len(files)}."
            if files
            else f"every class needs {exemplars} pictures (*.png); {folder} holds none."
        )
    pictures = []
    for file in files[:exemplars]:
        try:
            with Image.open(file) as opened:
                grey = opened.convert("L").resize((size, size), Image.Resampling.BOX)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} is no picture that can be read: {error}.") from None
        pictures.append(255 - np.asarray(grey, dtype=np.uint8))
    return np.stack(pictures)
