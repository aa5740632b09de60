"""Function vectors: which heads write the task, and their sum as a vector that can be added.

Demonstrations with shuffled labels hold the same words but no task. Put one head's mean output on proper
prompts into such a prompt, at the last token: if the right answer becomes more probable, this head brings the
task there. The heads that do so most, summed as they write into the residual stream, are the function
vector; added to a prompt without demonstrations it makes the model do the task.

- `head_effects` measures every head, by patching and by gradient, and keeps the heads' mean outputs;
- `universal_heads` ranks heads over several tasks;
- `function_vector` sums heads into a `TaskVector`, for `tvlens.score(..., mode="add")`;
- the experiment ``function_vectors`` does all of it for a task, with its controls.
"""

from tvlens.function_vectors.effects import (
    Indirect,
    estimated_effects,
    head_effects,
    head_outputs,
    indirect_effects,
)
from tvlens.function_vectors.outcomes import FunctionVectors
from tvlens.function_vectors.results import HeadEffects, universal_heads
from tvlens.function_vectors.vectors import function_vector, head_parts

__all__ = [
    "FunctionVectors",
    "HeadEffects",
    "Indirect",
    "estimated_effects",
    "function_vector",
    "head_effects",
    "head_outputs",
    "head_parts",
    "indirect_effects",
    "universal_heads",
]
