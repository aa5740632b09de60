"""A tokenizer that TransformerLens can use, and whether prompts begin with BOS.

TransformerLens assumes that every tokenizer can be loaded again by name with BOS switched on, and
adds BOS unless told otherwise. Neither holds here: the tokenizer stays the one that was given, and
BOS is added when the tokenizer itself adds it, or when the model is of a family that is broken
without it.
"""

import copy
from dataclasses import dataclass
from typing import Any

# Without BOS these models are far worse than with it, whatever their tokenizer does.
_NEEDS_BOS = ("Gemma",)


@dataclass(frozen=True)
class PreparedTokenizer:
    """A tokenizer with what TransformerLens needs to know about it.

    Attributes:
        tokenizer: The tokenizer: a changed copy where something had to be changed.
        prepends_itself: Whether the tokenizer puts BOS before every text.
        prepend_bos: Whether prompts of this model begin with BOS.
    """

    tokenizer: Any
    prepends_itself: bool
    prepend_bos: bool


def prepare_tokenizer(
    tokenizer: Any, architecture: str, *, ours: bool = False
) -> PreparedTokenizer:
    """Make a tokenizer ready for TransformerLens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        architecture: The class of the model that it belongs to, e.g. ``"LlamaForCausalLM"``.
        ours: Whether nobody else holds the tokenizer, so that it may be changed itself.

    Returns:
        The tokenizer, and what it does about BOS.

    Raises:
        ValueError: The model needs BOS, and the tokenizer has none.
    """
    ids, bos = tokenizer("x")["input_ids"], tokenizer.bos_token_id
    prepends = bos is not None and bool(ids) and ids[0] == bos
    needs = architecture.startswith(_NEEDS_BOS)
    if needs and bos is None:
        raise ValueError(
            f"a {architecture} needs BOS before every prompt, and its tokenizer has no bos_token: "
            "set tokenizer.bos_token."
        )
    changes = _changes(tokenizer)
    if changes and not ours:
        tokenizer = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return PreparedTokenizer(tokenizer, prepends, prepends or needs)


def _changes(tokenizer: Any) -> dict[str, str]:
    """Say what TransformerLens needs otherwise: it pads and stops with tokens that may be unset."""
    end = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    wanted = {
        "eos_token": end,
        "pad_token": tokenizer.pad_token or end,
        "bos_token": tokenizer.bos_token or end,
    }
    if "gemma" in (tokenizer.name_or_path or ""):
        # With this word in it, to_str_tokens of TransformerLens 3.9 takes a way that fails.
        wanted["name_or_path"] = ""
    return {name: value for name, value in wanted.items() if getattr(tokenizer, name) != value}
