"""Lens: read what stands in the residual stream as if it were the model's last word.

Every block writes into one stream, and the last norm and the unembedding turn that stream into a prediction.
The logit lens applies them early, after every block, and shows the prediction grow. Early layers write in a
basis of their own, so that they look more confused than they are; a tuned lens learns one affine map for
each layer into the last one's basis. Directions (task vectors, what a head or a neuron writes) are projected
the same way.
"""

from tvlens.lens.logit import logit_lens
from tvlens.lens.projection import Projection, project
from tvlens.lens.results import Lens
from tvlens.lens.tuned import TunedLens

__all__ = ["Lens", "Projection", "TunedLens", "logit_lens", "project"]
