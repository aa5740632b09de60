"""Circuits: which parts of a model do a piece of work together?

- `head_scores` finds previous-token, duplicate-token and induction heads by where they look;
- `induction_test` takes the best of them away, and random ones for comparison;
- `ioi_prompts` and other `Contrast`s pose a task as pairs of prompts, ready for `tvlens.patch`;
- `behaviour` says whether a model does such a task at all;
- `edge_scores` estimates what every part of the model tells every other; `circuit` chooses among these edges;
- `faithfulness` runs a circuit alone, and the model without it.
"""

from tvlens.circuits.contrast import Behaviour, Contrast, behaviour
from tvlens.circuits.edges import edge_scores
from tvlens.circuits.faithfulness import faithfulness
from tvlens.circuits.graph import Graph, graph_of
from tvlens.circuits.heads import HeadScores, head_scores, repeated_tokens
from tvlens.circuits.induction import InductionTest, induction_test
from tvlens.circuits.ioi import ioi_prompts
from tvlens.circuits.results import Circuit, EdgeScores, Faithfulness
from tvlens.circuits.search import circuit

__all__ = [
    "Behaviour",
    "Circuit",
    "Contrast",
    "EdgeScores",
    "Faithfulness",
    "Graph",
    "HeadScores",
    "InductionTest",
    "behaviour",
    "circuit",
    "edge_scores",
    "faithfulness",
    "graph_of",
    "head_scores",
    "induction_test",
    "ioi_prompts",
    "repeated_tokens",
]
