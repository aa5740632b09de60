"""The models that tvlens itself carries: a folder of this package each, with checkpoints of their training.

Such a folder holds ``config.json``, ``tokenizer.json`` and one ``step_N.safetensors`` for every
checkpoint, in half precision and under Hugging Face's names; the last step is the model. Nothing is
fetched or unpacked, so they load in well under a second.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvlens._errors import unknown
from tvlens.models._facts import Origin
from tvlens.models._files import Opened, quiet, sha256_of

_STEP = "step_"


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights lie in this package.

    Attributes:
        name: The name `load_model` takes.
        parameters: Their number, for people.
        licence: Its licence.
        folder: Where its files lie.
        needs: What its user has to know.
    """

    name: str
    parameters: str
    licence: str
    folder: Path
    needs: str = ""

    @property
    def revisions(self) -> tuple[str, ...]:
        """Its checkpoints, first to last; the last is the model."""
        names = [path.stem for path in self.folder.glob(f"{_STEP}*.safetensors")]
        return tuple(sorted(names, key=lambda name: int(name.removeprefix(_STEP))))

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def weights(self, revision: str | None) -> Path:
        """Find the file of a checkpoint.

        Args:
            revision: One of `revisions`, also as the bare number of a step; None for the last.

        Returns:
            The file.

        Raises:
            ValueError: There is no such checkpoint.
        """
        known = self.revisions
        name = known[-1] if revision is None else f"{_STEP}{str(revision).removeprefix(_STEP)}"
        if name not in known:
            raise unknown(f"checkpoint of {self.name!r}", str(revision), known)
        return self.folder / f"{name}.safetensors"


TOY = PackagedModel(
    name="toy",
    parameters="0.71M",
    licence="MIT",
    folder=Path(__file__).parent / "data" / "toy",
    needs="its own tasks: tvlens.models.toy_tasks()",
)
PACKAGED: dict[str, PackagedModel] = {TOY.name: TOY}


def open_packaged(
    known: PackagedModel, *, revision: str | None, tokenizer: Any, dtype: Any
) -> Opened:
    """Read a packaged model, or a checkpoint of its training.

    Args:
        known: The model.
        revision: One of its revisions, also as the bare number of a step; None for the last.
        tokenizer: Taken instead of its own.
        dtype: The torch dtype of its weights.

    Returns:
        The Hugging Face model, ready to run, and its tokenizer.

    Raises:
        ValueError: There is no such checkpoint.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    path = known.weights(revision)
    config = AutoConfig.for_model(**json.loads((known.folder / "config.json").read_text("utf-8")))
    # Making the model draws weights, which must not move the caller's random numbers.
    with quiet(), torch.random.fork_rng(devices=[]):
        hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    state = {name: weight.to(dtype) for name, weight in load_file(path).items()}
    hf_model.load_state_dict(state, strict=False, assign=True)  # the unembedding is the embedding
    hf_model.tie_weights()
    origin = Origin(known.name, "package", revision=path.stem, weights_sha256=sha256_of(path))
    return Opened(hf_model, tokenizer or _tokenizer(known.folder), origin, trusted=True)


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<bos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
