"""The whole thread on a real model against plain Hugging Face: other code, same predictions.

The reference knows nothing of tvlens' engine or of TransformerLens: it takes `Prompts.text`, tokenises it
anew, runs one prompt at a time through the Hugging Face model, and reads and writes with forward hooks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import tvlens as tv

pytestmark = pytest.mark.slow

N = 17  # three tasks, 51 prompts, five kinds of run: 255 predictions
TASKS = ("to_upper", "gerund", "country_capital")
LAYERS = (8, 16, 22)


@pytest.fixture(scope="module")
def reference(smollm2_folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(smollm2_folder)


def last_logits(model: Any, ids: list[int], patch: dict[int, torch.Tensor]) -> torch.Tensor:
    """Logits after the prompt, with the last position of some blocks' outputs replaced."""

    def hook(value: torch.Tensor) -> Any:
        def after(module: object, args: object, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            hidden = hidden.clone()
            hidden[0, -1] = value
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return after

    handles = [model.model.layers[i].register_forward_hook(hook(v)) for i, v in patch.items()]
    try:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def theta(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Mean over prompts of the last position after each block, by forward hooks."""
    total: dict[int, torch.Tensor] = {}
    for ids in prompts:
        handles = [
            block.register_forward_hook(
                lambda m, a, out, i=i: total.__setitem__(
                    i, total.get(i, 0) + (out[0] if isinstance(out, tuple) else out)[0, -1]
                )
            )
            for i, block in enumerate(model.model.layers)
        ]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
    return torch.stack([total[i] for i in sorted(total)]) / len(prompts)


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether our prediction is theirs, or one of two that theirs cannot tell apart (< 1e-3)."""
    return bool(theirs[ours] >= theirs.max() - 1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_predictions_equal_plain_hugging_face(name: str, smollm2: Any, reference: Any) -> None:
    hf, tokenizer = reference
    prompts = tv.build_prompts(tv.load_task(name), smollm2, n=N, split="test", seed=1)
    vector = tv.extract(smollm2, prompts)
    ours = {
        "regular": tv.score(smollm2, prompts),
        "baseline": tv.score(smollm2, prompts, view="zero_shot"),
    } | {
        layer: tv.score(smollm2, prompts, view="zero_shot", vector=vector, layer=layer)
        for layer in LAYERS
    }
    equal = {key: 0 for key in ours}
    for row in range(N):
        few, zero = (
            tokenizer(prompts.text[row])["input_ids"],
            tokenizer(prompts.zero_shot.text[row])["input_ids"],
        )
        mean = theta(hf, [tokenizer(d.text[row])["input_ids"] for d in prompts.dummies])
        torch.testing.assert_close(vector.values[row], mean, atol=2e-3, rtol=1e-3)
        theirs = {"regular": last_logits(hf, few, {}), "baseline": last_logits(hf, zero, {})} | {
            layer: last_logits(hf, zero, {layer: mean[layer]}) for layer in LAYERS
        }
        for key, logits in theirs.items():
            predicted = ours[key].predicted[row]
            assert agree(predicted, logits), f"{name}, {key}, prompt {row}: more than a near-tie"
            equal[key] += int(predicted == logits.argmax())
            expected = logits.log_softmax(dim=-1)[list(prompts.answer_ids[row])].max()
            assert abs(ours[key].answer_log_prob[row] - expected) < 5e-3
    assert all(count >= 0.99 * N for count in equal.values()), equal
