"""Circuits: which parts of a model do a piece of work together?

- `head_scores` finds previous-token, duplicate-token and induction heads by where they look;
- `induction_test` takes the best of them away, and random ones for comparison;
- `ioi_prompts` and other `Contrast`s pose a task as pairs of prompts, ready for `tvlens.patch`;
- `behaviour` says whether a model does such a task at all.
"""

from tvlens.circuits.contrast import Behaviour, Contrast, behaviour
from tvlens.circuits.heads import HeadScores, head_scores, repeated_tokens
from tvlens.circuits.induction import InductionTest, induction_test
from tvlens.circuits.ioi import ioi_prompts

__all__ = [
    "Behaviour",
    "Contrast",
    "HeadScores",
    "InductionTest",
    "behaviour",
    "head_scores",
    "induction_test",
    "ioi_prompts",
    "repeated_tokens",
]
