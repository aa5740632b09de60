"""Error rates of the authors' transformers, read off the figures of their notebooks by eye (about ± .05).

By study, dial and probe: dataset size as a power of two, and 0-1 error on 3,000 sequences, mean of 5 seeds.

References:
    Chan et al. 2025, arXiv:2410.23042.
"""

from collections.abc import Mapping

RARE, COMMON = "relevant low flipped", "relevant high flipped"
RARE_KNOWN, COMMON_KNOWN = "irrelevant low base", "irrelevant high base"
_SIX = (6, 8, 10, 12, 14, 16)


def _curve(*errors: float, at: tuple[int, ...] = _SIX) -> dict[int, float]:
    return dict(zip(at, errors, strict=True))


ERRORS: Mapping[str, Mapping[float, Mapping[str, Mapping[int, float]]]] = {
    "noise": {
        0.0: {RARE: {6: 0.78}},
        0.2: {
            COMMON: _curve(0.30, 0.38, 0.90, 1.0, 1.0, 1.0),
            RARE: _curve(0.62, 0.25, 0.40, 0.62, 0.93, 0.97),
            COMMON_KNOWN: _curve(0.88, 0.77, 0.15, 0.05, 0.01, 0.0),
            RARE_KNOWN: _curve(1.0, 0.98, 0.70, 0.35, 0.10, 0.03),
        },
        0.4: {
            COMMON: _curve(0.22, 0.05, 0.30, 0.60, 0.72, 0.78),
            RARE: _curve(0.70, 0.22, 0.12, 0.20, 0.40, 0.58),
            RARE_KNOWN: {20: 0.62},
        },
    },
    "relevant": {
        1: {RARE: _curve(*[0.95] * 6)},
        2: {RARE: {8: 0.75, 10: 0.60, 14: 0.9}},
        3: {RARE: {6: 0.42, 10: 0.22, 14: 0.9}},
        4: {RARE: _curve(0.27, 0.08, 0.08, 0.3, 0.7, 0.95)},
    },
    "rare": {
        45: {RARE: {10: 0.45, 12: 0.17}},
        95: {RARE: {14: 0.14, 16: 0.5}},
        495: {RARE: {14: 0.15, 16: 0.31, 18: 0.45}},
    },
}

GATES: Mapping[str, Mapping[int, float]] = {
    "relevant high": {6: 0.05, 8: 0.16, 10: 0.80, 12: 0.98},
    "relevant low": {6: 0.08, 8: 0.08, 10: 0.08, 12: 0.08, 14: 0.08, 16: 0.08, 18: 0.20, 20: 0.30},
    "irrelevant low": {6: 0.09, 8: 0.13, 10: 0.43, 12: 0.75, 14: 0.85, 16: 0.93, 18: 0.98},
}
"""Mean gate of their stylised model at noise .2 and L = 1, by probe and dataset size."""
