"""Patching: run a model with some of its activations exchanged, and see what that does to the answer.

Five functions share one kind of result, `Patching`:

- `patch` exchanges activations between two prompts, place by place;
- `ablate` takes activations away: zeros, means, or those of another prompt;
- `trace` corrupts the subject of a prompt with noise and restores single activations;
- `patch_paths` exchanges what one component sends to another, and nothing else;
- `attribution_patch` estimates all cells of `patch` from one backward pass; `agreement` says how well.
"""

from tvlens.patching.ablation import ablate
from tvlens.patching.agreement import Agreement, agreement
from tvlens.patching.exchange import patch
from tvlens.patching.gradients import attribution_patch
from tvlens.patching.paths import patch_paths
from tvlens.patching.results import Patching
from tvlens.patching.tracing import trace

__all__ = [
    "Agreement",
    "Patching",
    "ablate",
    "agreement",
    "attribution_patch",
    "patch",
    "patch_paths",
    "trace",
]
