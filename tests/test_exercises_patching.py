"""Exercises of the notebook on patching: right answers pass, usual mistakes are named."""

import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

import tvlens as tv
from tvlens.exercises import Verdict, check_mover, check_patch, check_recovered

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "03_patching.ipynb"
CLEAN, CORRUPTED = (f"example:a->A\nexample:b->B\nexample:{x}->" for x in "cd")
ASKED = {"answers": "C", "wrong": "D", "layer": 3, "head": 1}
RUNS = {
    "clean": [7.3, 10.8, 5.7, 0.4],
    "corrupted": [-6.0, -10.0, -4.8, 0.1],
    "patched": [6.4, 6.7, 4.1, 1.0],
}


def solutions() -> list[str]:
    """The hidden solutions of the notebook, in the order of its exercises."""
    cells = nbformat.read(NOTEBOOK, 4).cells
    hidden = r"<summary>Solution</summary>\s*```python\n(.*?)```"
    return [code for cell in cells for code in re.findall(hidden, cell.source, re.S)]


def by_hand(
    model: Any, run: str, other: str, *, head: int | None = 1, layer: int = 3, at: Any = -1
) -> float:
    """The logit difference of a run with ``z`` of another, exchanged by a plain hook."""
    right, wrong = (model.to_single_token(answer) for answer in "CD")
    point = f"blocks.{layer}.attn.hook_z"
    _, cache = model.run_with_cache(other)

    def exchange(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        heads = slice(None) if head is None else head
        z[:, at, heads] = cache[point][:, at, heads]
        return z

    with torch.no_grad():
        logits = model.run_with_hooks(run, fwd_hooks=[(point, exchange)])[0, -1]
    return float(logits[right] - logits[wrong])


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy")


@pytest.fixture(scope="module")
def ends(toy: Any) -> tuple[float, float]:
    """Logit differences of the corrupted and the clean run, which exchange nothing."""
    runs = [by_hand(toy, text, text, head=None, at=slice(None)) for text in (CORRUPTED, CLEAN)]
    return runs[0], runs[1]


def said(verdict: Verdict, part: str) -> bool:
    return not verdict and part in verdict.says


def patched(toy: Any, answer: object, **asked: Any) -> Verdict:
    return check_patch(answer, toy, CLEAN, CORRUPTED, **ASKED | asked)


def test_a_head_by_hand_is_right(toy: Any, ends: tuple[float, float]) -> None:
    low, high = ends
    share = (by_hand(toy, CORRUPTED, CLEAN) - low) / (high - low)
    assert 0.4 < share < 0.5
    for answer in (share, round(share, 2), torch.tensor([share]), np.float32(share)):
        verdict = patched(toy, answer)
        assert verdict and "45%" in verdict.says


def test_mistakes_with_a_head_are_named(toy: Any, ends: tuple[float, float]) -> None:
    low, high = ends

    def share(value: float) -> float:
        return (value - low) / (high - low)

    value, noise = by_hand(toy, CORRUPTED, CLEAN), by_hand(toy, CLEAN, CORRUPTED)
    assert said(patched(toy, 1 - share(value)), "counts from the clean run")
    assert said(patched(toy, value), "the logit difference itself")
    assert said(patched(toy, value - low), "how far the logit difference moved")
    for answer in (share(noise), 1 - share(noise), noise):
        assert said(patched(toy, answer), "You ran the clean prompt")
    assert said(patched(toy, share(by_hand(toy, CORRUPTED, CLEAN, head=None))), "all heads")
    next_layer = by_hand(toy, CORRUPTED, CLEAN, layer=4)
    assert said(patched(toy, share(next_layer)), "another layer")
    last_two = {"layer": 0, "head": 3}
    everywhere = share(by_hand(toy, CORRUPTED, CLEAN, **last_two, at=slice(None)))
    assert said(patched(toy, everywhere, **last_two), "every position")
    value = by_hand(toy, CORRUPTED, CLEAN, layer=3, head=0)
    assert said(patched(toy, share(value)), "Not one of the usual slips")
    assert said(patched(toy, -30), "lies near 0 or 1")
    for answer in (None, "0.5", True, [0.4, 0.5], float("nan")):
        assert said(patched(toy, answer), "Put one number there")


def test_shares_of_many_pairs_are_one_share() -> None:
    clean, corrupted, at = (np.array(RUNS[run]) for run in ("clean", "corrupted", "patched"))
    ratios = (at - corrupted) / (clean - corrupted)
    share = 38.9 / 44.9
    assert check_recovered(share, **RUNS) and check_recovered(0.87, **RUNS)
    assert said(check_recovered(ratios.mean(), **RUNS), "mean of the shares of single pairs")
    assert said(check_recovered(np.median(ratios), **RUNS), "median")
    assert said(check_recovered(1 - share, **RUNS), "still missing")
    assert said(check_recovered(-share, **RUNS), "sign")
    assert said(check_recovered(1 / share, **RUNS), "exchanged")
    assert said(check_recovered((at - corrupted).mean(), **RUNS), "in logits")
    assert said(check_recovered(at.sum() / clean.sum(), **RUNS), "stood at 0")
    assert said(check_recovered(38.9 / 24.2, **RUNS), "clean run alone")
    assert said(check_recovered(0.1, **RUNS), "How far did the runs move")
    assert said(check_recovered(None, **RUNS), "Put one number there")


def test_the_block_that_moves_the_answer(toy: Any) -> None:
    def check(answer: object) -> Verdict:
        return check_mover(answer, toy, CLEAN, CORRUPTED, answers="C", wrong="D")

    # The second witness: at the last position, one block's attention out of six.
    outs = [by_hand(toy, CORRUPTED, CLEAN, head=None, layer=layer) for layer in range(6)]
    assert int(np.argmax(outs)) == 3
    assert check(3) and check(torch.tensor(3))
    assert said(check(4), "goes into the block")
    assert said(check(5), "Of all MLPs")
    assert said(check(0), "all there is to read")
    assert said(check(2), "change places")
    for answer in (6, -1, 2.5, "3", None):
        assert said(check(answer), "from 0 to 5")


@pytest.mark.slow
def test_solutions_are_right(smollm2: Any) -> None:
    clean, corrupted = "The capital of France is", "The capital of Italy is"
    runs = {
        name: smollm2.run_with_cache(text)
        for name, text in {"clean": clean, "corrupted": corrupted}.items()
    }
    known = {"tv": tv, "torch": torch, "model": smollm2, "runs": runs, "corrupted": corrupted}
    first, second, third = solutions()
    answers = []
    for code in (first, second, third):
        scope: dict[str, Any] = {**known, "pairs_run": RUNS}
        exec(code, scope)
        answers.append(scope["answer"])
    head = {"answers": " Paris", "wrong": " Rome", "layer": 23, "head": 4}
    keys = "The keys on the table", "The key on the table"
    assert check_patch(answers[0], smollm2, clean, corrupted, **head)
    assert said(check_patch(0.0, smollm2, clean, corrupted, **head), "another position")
    assert check_recovered(answers[1], **RUNS)
    assert check_mover(answers[2], smollm2, *keys)
    assert said(check_mover(answers[2] + 1, smollm2, *keys), "goes into the block")
    assert said(check_mover(23, smollm2, *keys), "change places")


def test_numbers_of_the_exercise_are_those_tested() -> None:
    cell = next(c for c in nbformat.read(NOTEBOOK, 4).cells if "pairs_run = {" in c.source)
    scope: dict[str, Any] = {}
    exec(cell.source.split("answer =")[0], scope)
    assert scope["pairs_run"] == RUNS
