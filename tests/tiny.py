"""Tiny random models and tokenizers of five families, made in memory in well under a second."""

from functools import cache
from importlib.metadata import version
from typing import Any

import pytest

# The TransformerLens classes that the installed TransformerLens has.
HAS_HOOKED = int(version("transformer-lens").split(".")[0]) < 4
KINDS = ("hooked", "bridge") if HAS_HOOKED else ("bridge",)
needs_hooked = pytest.mark.skipif(
    not HAS_HOOKED, reason="this TransformerLens has no HookedTransformer"
)
ARCHITECTURES = ("gpt2", "llama", "qwen2", "gemma3", "pythia")

_TEXT = (
    "example:hello->HELLO\nexample:world->WORLD\nexample:cat->chat\nexample:dog->chien\n"
    "Paris is the capital of France. Berlin is the capital of Germany. Rome is in Italy.\n"
    "one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9\n"
    "a b c d e f g h i j k l m n o p q r s t u v w x y z\n"
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z\n"
    "running walked cats houses happy sad big small hot cold Europe Asia Africa America\n"
    "Q: What is it?\nA: It is this one, not that one; these, those -> and → or.\n"
)
_VOCABULARY = 640  # more than any of the tokenizers below has
_SIZE = {"vocab_size": _VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4}


@cache
def hf(name: str, seed: int = 0) -> Any:
    """A tiny Hugging Face model with random weights, in evaluation mode."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(name)
        for parameter in model.parameters():
            # Larger than the usual initial weights, and no norm left at one or zero, so that a
            # wrong conversion shows in the logits.
            spread = 0.15 if parameter.ndim > 1 else 0.3
            parameter.data += spread * torch.randn_like(parameter)
    return model.eval()


@cache
def tokenizer(name: str) -> Any:
    """A small tokenizer of the family's kind."""
    return {"gpt2": _byte_level, "pythia": _byte_level, "qwen2": _qwen}.get(name, _metaspace)(name)


@cache
def model(name: str, kind: str = "auto", processing: str = "none") -> Any:
    """The tiny model, loaded by tvlens. Shared: do not change it."""
    from tvlens import load_model

    settings = {"backend": kind, "processing": processing}
    return load_model(hf(name), tokenizer=tokenizer(name), device="cpu", **settings)


def difference(model: Any, hf: Any, tokens: Any, *, log_probs: bool = False) -> float:
    """The largest difference between two models' logits, or log-probabilities."""
    import torch

    with torch.no_grad():
        ours, theirs = model(tokens, prepend_bos=False), hf(tokens).logits
    if log_probs:
        ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((ours - theirs).abs().max())


def _build(name: str) -> Any:
    import transformers as t

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    size = {**_SIZE, "intermediate_size": 96, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    match name:
        case "gpt2":
            config = t.GPT2Config(
                vocab_size=_VOCABULARY, n_embd=64, n_layer=4, n_head=4, n_positions=256, **ids
            )
            return t.GPT2LMHeadModel(config)
        case "llama":
            config = t.LlamaConfig(**size, **heads, **ids, tie_word_embeddings=True)
            return t.LlamaForCausalLM(config)
        case "qwen2":
            return t.Qwen2ForCausalLM(t.Qwen2Config(**size, **heads, **ids))
        case "gemma3":
            # A window shorter than the prompts, one global layer, and a head width of its own.
            kinds = ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]
            config = t.Gemma3TextConfig(
                **size,
                **heads,
                **ids,
                head_dim=24,
                sliding_window=8,
                query_pre_attn_scalar=24,
                layer_types=kinds,
            )
            return t.Gemma3ForCausalLM(config)
        case "pythia":
            config = t.GPTNeoXConfig(**size, num_attention_heads=4, **ids)
            return t.GPTNeoXForCausalLM(config)
    raise ValueError(f"no tiny model {name!r}; there are: {', '.join(ARCHITECTURES)}")


def _byte_level(name: str) -> Any:
    """Like GPT-2's: bytes, a leading space belongs to the word, one special token, no BOS added."""
    return _fast(_train_byte_level(["<|endoftext|>"]), bos="<|endoftext|>", eos="<|endoftext|>")


def _qwen(name: str) -> Any:
    """Like Qwen's: bytes, and no BOS token at all."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _fast(_train_byte_level(tokens), eos="<|im_end|>", pad="<|endoftext|>")


def _train_byte_level(special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def _metaspace(name: str) -> Any:
    """Like Llama's and Gemma's: spaces as ▁, unknown characters as bytes, BOS before every text.

    Llama's also puts a ▁ before the first word, Gemma's does not.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors

    gemma = name == "gemma3"
    bos, eos, pad = ("<bos>", "<eos>", "<pad>") if gemma else ("<s>", "</s>", "<pad>")
    tokenizer = Tokenizer(_train_metaspace([pad, bos, eos, "<unk>"]))
    tokenizer.add_special_tokens([pad, bos, eos, "<unk>"])
    bytes_back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(bytes_back)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([*bytes_back, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 1)]
    )
    side = "left" if gemma else "right"
    return _fast(tokenizer, bos=bos, eos=eos, unk="<unk>", pad=pad, padding_side=side)


def _train_metaspace(special: list[str]) -> Any:
    """Learn merges inside words only, as sentencepiece does, and add the 256 bytes."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=370, special_tokens=special, show_progress=False)
    trained.train_from_iterator(_TEXT.splitlines(keepends=True), trainer)
    learned = json.loads(trained.to_str())["model"]
    vocabulary = learned["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in learned["merges"]]
    return models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def _fast(tokenizer: Any, *, padding_side: str = "right", **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    named = {f"{kind}_token": token for kind, token in special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side=padding_side, model_max_length=128, **named
    )
