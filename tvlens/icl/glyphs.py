"""Pictures of 1,600 characters and more without a download: signs of a font, bent a little at random.

matplotlib carries DejaVu Sans, which draws some 5,300 characters of scripts from Latin to Canadian
syllabics. Many look alike (Latin A, Greek Alpha and Cyrillic A are one drawing) and many are drawn as the
box that stands for a missing character. Every character is drawn to one size first; a class is kept only
if its drawing differs from that of every class kept before it. An exemplar is a class' drawing under a
random affine map, a pure function of (seed, character, exemplar).
"""

import functools
import importlib.util
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.icl.draws import keys, number, uniforms
from tvlens.icl.images import Images, needs_extra
from tvlens.icl.presets import at_least, within

FONT = "DejaVuSans.ttf"
ALIKE = 0.94
"""Two drawings whose blurred pixels have this cosine or more are one class."""
_CANVAS, _BODY = 56, 40  # side of a drawing, and of the character in it, in pixels
_AFFINE = number("glyph affine")
_KINDS = ("Lo", "Lu", "Ll", "Lt", "Nd", "Nl", "Lm")
_SKIPPED = (
    (0x2800, 0x28FF), (0x1D300, 0x1D35F), (0x1F030, 0x1F0FF),  # Braille, tetragrams, dominoes, cards
    (0x3400, 0xD7FF), (0xE000, 0xFB00),  # Chinese, Korean, private: not in the font
)  # fmt: skip


def glyphs(
    n_classes: int = 1623,
    *,
    exemplars: int = 20,
    size: int = 28,
    strength: float = 1.0,
    seed: int = 0,
) -> Images:
    """Draw characters of the font that matplotlib carries, each under several random affine maps.

    Args:
        n_classes: How many characters; which ones and in what order depends on the seed alone, so that a
            smaller set is the start of a larger one.
        exemplars: Drawings of each.
        size: Side of a drawing in pixels.
        strength: How far maps go: 1 turns by up to 15 degrees, stretches both axes by up to 15%, shears by
            up to 0.2 and moves by up to 2.5% of the side; 0 makes all exemplars the same.
        seed: Decides the order of classes and the maps.

    Returns:
        The drawings, ink bright.

    Raises:
        ImportError: Pillow or matplotlib is missing.
        ValueError: A size is too small, or there are fewer distinct characters than asked for.

    Example:
        >>> glyphs(8, exemplars=2).pixels.shape  # doctest: +SKIP
        (8, 2, 28, 28)
    """
    at_least(1, n_classes=n_classes, exemplars=exemplars)
    at_least(8, size=size)
    at_least(0, seed=seed)
    within(0, 2, strength=strength)
    codes, drawings = _distinct()
    if n_classes > len(codes):
        raise ValueError(
            f"{FONT} has {len(codes)} characters that differ in looks; n_classes = {n_classes} arrived. "
            f"Nearest: {len(codes)}."
        )
    lots = keys(torch.tensor(seed), number("glyph order"), torch.from_numpy(codes))
    chosen = lots.argsort()[:n_classes].numpy()
    codes, drawn = codes[chosen], torch.from_numpy(drawings[chosen])
    maps = _maps(torch.from_numpy(codes), exemplars, strength, seed)
    pixels = torch.cat(
        [
            _bend(some, how, size)
            for some, how in zip(drawn.split(100), maps.split(100), strict=True)
        ]
    )
    names = tuple(f"U+{c:04X} {unicodedata.name(chr(c), 'unnamed')}" for c in codes.tolist())
    return Images(pixels.numpy(), names, f"glyphs of {FONT}")


def characters() -> tuple[str, ...]:
    """Give the characters that differ in looks, letters first.

    Returns:
        The characters that `glyphs` chooses from.

    Raises:
        ImportError: Pillow or matplotlib is missing.

    Example:
        >>> len(characters())  # doctest: +SKIP
        2174
    """
    return tuple(map(chr, _distinct()[0].tolist()))


def _font(size: int) -> Any:
    """The font, without importing matplotlib, which would take longer than all drawings."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or importlib.util.find_spec("PIL") is None:
        raise needs_extra("Drawing characters needs Pillow, and a font that matplotlib carries")
    from PIL import ImageFont

    folder = Path(next(iter(spec.submodule_search_locations or ())))
    return ImageFont.truetype(str(folder / "mpl-data" / "fonts" / "ttf" / FONT), size)


@functools.cache
def _distinct() -> tuple[Int[np.ndarray, " label"], Float[np.ndarray, "label side side"]]:
    """Characters that differ in looks, as code points and as drawings of one size."""
    codes = _drawn_by(_font(16))
    font = _font(64)
    drawings = np.stack([_draw(font, chr(code)) for code in codes])
    x = rearrange(torch.from_numpy(drawings), "label h w -> label 1 h w")
    blurred = F.avg_pool2d(x, 8, stride=4)
    flat = F.normalize(rearrange(blurred, "label 1 h w -> label (h w)"), dim=-1)
    left = torch.ones(len(codes), dtype=torch.bool)
    kept = []
    for i in range(len(codes)):
        if left[i]:
            kept.append(i)
            left &= flat @ flat[i] < ALIKE
    return np.array(codes)[kept], drawings[kept]


def _drawn_by(font: Any) -> list[int]:
    """Code points that the font draws, letters and digits first; the box for what it lacks is no drawing."""
    box = font.getmask("\uffff")
    lacking = box.size, bytes(box)
    found = []
    for code in range(0x21, 0x20000):
        kind = unicodedata.category(chr(code))
        if kind[0] not in "LNSP" or any(low <= code <= high for low, high in _SKIPPED):
            continue
        mask = font.getmask(chr(code))
        if min(mask.size) and (mask.size, bytes(mask)) != lacking:
            found.append((_KINDS.index(kind) if kind in _KINDS else len(_KINDS), code))
    return [code for _, code in sorted(found)]


def _draw(font: Any, character: str) -> Float[np.ndarray, "side side"]:
    """Draw a character in the middle of the canvas, its longer side being the body's."""
    from PIL import Image

    mask = font.getmask(character)
    body = Image.frombytes("L", mask.size, bytes(mask))
    scale = _BODY / max(mask.size)
    width, height = (max(2, round(side * scale)) for side in mask.size)
    body = body.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    canvas.paste(body, ((_CANVAS - width) // 2, (_CANVAS - height) // 2))
    return np.asarray(canvas, dtype=np.float32) / 255


def _maps(
    codes: Int[Tensor, " label"], n: int, strength: float, seed: int
) -> Float[Tensor, "label exemplar 2 3"]:
    """Affine maps, each a function of the seed, the code point, and the exemplar's number."""
    place = rearrange(codes, "label -> label 1")
    u = uniforms(keys(torch.tensor(seed), _AFFINE, place, torch.arange(n)), 6) * 2 - 1
    turn, wide, high, shear, x, y = (strength * u).unbind(dim=-1)
    turn, wide, high = turn * np.deg2rad(15), (0.15 * wide).exp(), (0.15 * high).exp()
    first = torch.stack([turn.cos() * wide, 0.2 * shear - turn.sin() * high, 0.05 * x], dim=-1)
    second = torch.stack([turn.sin() * wide, turn.cos() * high, 0.05 * y], dim=-1)
    return torch.stack([first, second], dim=-2)


def _bend(
    drawings: Float[Tensor, "label side side"], maps: Float[Tensor, "label exemplar 2 3"], size: int
) -> Tensor:
    """Apply every map to its class' drawing, as bytes."""
    n = maps.shape[1]
    # Fewer pixels are read than there are, so each is a mean of its neighbours first.
    soft = F.avg_pool2d(rearrange(drawings, "label h w -> label 1 h w"), 3, stride=1, padding=1)
    every = repeat(soft, "label 1 h w -> (label n) 1 h w", n=n)
    shape = [len(every), 1, size, size]
    grid = F.affine_grid(
        rearrange(maps, "label n a b -> (label n) a b"), shape, align_corners=False
    )
    bent = F.grid_sample(every, grid, align_corners=False)
    return rearrange((bent * 255).round().byte(), "(label n) 1 h w -> label n h w", n=n)
