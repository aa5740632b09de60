"""A tiny random model that needs no network: for examples, and for tests of code that uses tvlens.

It has the shape of a Llama, two layers, and a tokenizer that knows printable ASCII characters and →. It has
learned nothing, so its accuracies mean nothing; everything else works on it in milliseconds.
"""

from functools import lru_cache
from typing import Any

from tvlens._typing import Model


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Any:
    """Build a tokenizer with one token for each printable ASCII character, the newline and →."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["\n", *map(chr, range(32, 127)), "→"]
    vocab = {"<unk>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")


@lru_cache(maxsize=1)
def tiny_model() -> Model:
    """Build the tiny model, always with the same random weights.

    Returns:
        A HookedTransformer, or on TransformerLens 4 a TransformerBridge: 2 layers, width 32, 4 query
        heads and 2 key-value heads.

    Example:
        >>> tiny_model().cfg.n_layers
        2
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tvlens.models import load_model

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
        return load_model(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, device="cpu")
