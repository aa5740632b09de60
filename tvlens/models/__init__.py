"""Models: where they come from, and what is known about them.

`load_model` turns a name, a path or a model in memory into a TransformerLens model whose logits
equal those of the original. It hands out the TransformerLens object itself, never a wrapper, with
raw weights unless asked otherwise. What cannot be seen on the object, such as its source and the
checksum of its weights, is kept aside; `facts` puts both together.

One model comes with tvlens itself, ``"toy"``; `toy_tasks` has what it can do.
"""

from tvlens.models._facts import ModelFacts, facts
from tvlens.models._files import ModelUnavailableError
from tvlens.models._load import list_models, load_model
from tvlens.models._toy import toy_held_out, toy_revisions, toy_tasks
from tvlens.models._wheels import LicenceNotAcceptedError
from tvlens.models.hooked.config import UnsupportedModelError, supported_architectures

__all__ = [
    "LicenceNotAcceptedError",
    "ModelFacts",
    "ModelUnavailableError",
    "UnsupportedModelError",
    "facts",
    "list_models",
    "load_model",
    "supported_architectures",
    "toy_held_out",
    "toy_revisions",
    "toy_tasks",
]
