"""The toy's tokenizer: one token a word, white space means nothing but where a line ends."""

from collections.abc import Sequence
from typing import Any


def build_tokenizer(vocabulary: Sequence[str]) -> Any:
    """Make the tokenizer.

    Args:
        vocabulary: The words in the order of their ids, ``<pad>``, ``<bos>``, ``<unk>`` first.

    Returns:
        A `tokenizers.Tokenizer` that puts ``<bos>`` before every text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.add_special_tokens(["<pad>", "<bos>", "<unk>"])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[ \t]+"), "removed"),
            pre_tokenizers.Split(Regex(r"\n|->|[\p{L}_]+|\d+|[^\s\p{L}\d_]"), "isolated"),
        ]
    )
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return core
