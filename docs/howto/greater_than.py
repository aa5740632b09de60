"""Greater-than: a war that began in 1743 did not end in 1730."""

from typing import Any

import numpy as np

from tvlens.circuits import Contrast
from tvlens.encoding import Encoder

EVENTS = ("war", "siege", "journey", "strike", "dispute", "reign", "festival", "project")
TEMPLATE = "The {event} lasted from the year {century}{year:02} to the year {century}"


def greater_than(model: Any, *, n: int = 32, seed: int = 0) -> Contrast:
    """Make prompts that want a later year; the corrupted ones begin in the year 01, so any will do."""
    encoder, rng = Encoder.of(model), np.random.default_rng(seed)
    rows = [_row(encoder, rng) for _ in range(n)]
    clean, corrupted, answers, wrong, years = zip(*rows, strict=True)
    return Contrast(clean, corrupted, answers, wrong, name="greater_than", labels={"year": years})


def _row(encoder: Encoder, rng: np.random.Generator) -> tuple[Any, ...]:
    event, century = EVENTS[rng.integers(len(EVENTS))], rng.integers(11, 18)
    year = int(rng.integers(20, 80))
    clean = TEMPLATE.format(event=event, century=century, year=year)
    corrupted = TEMPLATE.format(event=event, century=century, year=1)
    # Some tokenizers write 43 as one token, some as 4 and 3: first tokens that fit both sides are left out.
    first = [encoder.continuation(clean, f"{end:02}")[0] for end in range(100)]
    later, earlier = first[year + 1 :], first[:year]
    right = [i for i in dict.fromkeys(later) if i not in earlier and i != first[year]]
    wrong = [i for i in dict.fromkeys(earlier) if i not in later and i != first[year]]
    return clean, corrupted, tuple(right), tuple(wrong), year
