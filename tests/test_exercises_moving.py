"""Checks of notebook 05: who is obeyed, sums of vectors, sums of heads; right and wrong in the usual ways."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

import tvlens as tv
from tvlens.exercises import Verdict, check_composed, check_function_vector, check_obeyed
from tvlens.experiments.conflict import Conflict
from tvlens.models import toy_tasks
from tvlens.prompts import Prompts

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "05_moving_vectors.ipynb"
HEADS = [(2, 3), (1, 0), (1, 2)]


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy", device="cpu")


def said(verdict: Verdict, part: str) -> None:
    assert not verdict and part in verdict.says, verdict


# Who was obeyed


@pytest.fixture(scope="module")
def fight() -> Conflict:
    """Ten prompts in four runs, in numbers that no two runs share."""
    from tvlens.testing import tiny_model

    tasks = ["to_upper", "next_letter"]
    found = tv.conflict(
        tiny_model(), tasks, pairs=[("to_upper", "next_letter")], n=10, layer=0, progress=False
    )
    data = found.data.copy(deep=True)
    obeyed = {"none": (0, 9), "other": (5, 2), "own": (1, 8), "random": (1, 1)}
    for kind, (vector, shown) in obeyed.items():
        at = {"pair": 0, "injection": data["injection"].values.tolist().index(kind)}
        data["obeys_vector"][at] = np.arange(10) < vector
        data["obeys_demonstrations"][at] = np.arange(10) >= 10 - shown
    return Conflict(data)


@pytest.mark.parametrize(
    "rates", [(0.5, 0.2, 0.3), [0.5, 0.2, 0.3], np.float32([0.5, 0.2, 0.3]), torch.tensor([0.5, 0.2, 0.3])]
)  # fmt: skip
def test_shares_of_the_run_are_right(fight: Conflict, rates: Any) -> None:
    assert check_obeyed(rates, fight)
    assert check_obeyed((0.1, 0.1, 0.8), fight, injection="random")
    rows = fight.rates().set_index("injection").loc["other"]
    assert [rows[f"{side}_rate"] for side in ("vector", "demonstrations", "neither")] == [
        pytest.approx(rate) for rate in (0.5, 0.2, 0.3)
    ]


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        (None, "no answer yet"),
        ((0.5, 0.2), "Three numbers"),
        (0.5, "Three numbers"),
        ("many", "Three numbers"),
        ((0.5, None, 0.5), "Three numbers"),
        ((50, 20, 30), "per cent"),
        ((5, 2, 3), "numbers of prompts"),
        ((0.2, 0.5, 0.3), "exchanged"),
        ((0.0, 0.9, 0.1), "nothing was injected"),
        ((0.1, 0.8, 0.1), "demonstrations' own task"),
        ((0.1, 0.1, 0.8), "a random vector"),
        ((0.175, 0.5, 0.325), "all ways of running"),
        ((0.5, 0.2, 0.5), "in your third share"),
        ((0.5, 0.2, 0.8), "in your third share"),
        ((0.0, 0.0, 1.0), "begin with a space"),
        ((5 / 7, 2 / 7, 0.0), "obey at all"),
        ((0.4, 0.4, 0.4), "sum to 1; yours to 1.20"),
        ((0.4, 0.3, 0.3), "prompt by prompt"),
    ],
)
def test_wrong_shares_are_told_why(fight: Conflict, rates: Any, says: str) -> None:
    said(check_obeyed(rates, fight), says)


def test_runs_that_do_not_exist_are_refused(fight: Conflict) -> None:
    with pytest.raises(ValueError, match="unknown injection"):
        check_obeyed((0.5, 0.2, 0.3), fight, injection="others")
    with pytest.raises(TypeError, match="result"):
        check_obeyed((0.5, 0.2, 0.3), fight.data)  # type: ignore


# A sum


@pytest.fixture(scope="module")
def parts(toy: Any) -> dict[str, tv.TaskVector]:
    names = {"ac": "list_first", "bc": "list_last", "ad": "first_upper"}
    how: Any = {"n": 12, "demonstrations": "split"}
    return {
        corner: tv.extract(toy, tv.build_prompts(toy_tasks()[name], toy, **how)).mean()
        for corner, name in names.items()
    }


@pytest.fixture(scope="module")
def asked(toy: Any) -> Prompts:
    return tv.build_prompts(toy_tasks()["last_upper"], toy, n=30, split="test")


@pytest.fixture(scope="module")
def composed(toy: Any, parts: dict[str, tv.TaskVector], asked: Prompts) -> tuple[Any, float]:
    """The sum in plain numbers, and what it answers when a hook writes it, prompt by prompt."""
    value = sum(sign * parts[c].at(3)[0] for c, sign in (("ad", 1), ("bc", 1), ("ac", -1)))
    right = []
    for text, ids in zip(asked.zero_shot.text, asked.answer_ids, strict=True):
        with torch.no_grad(), toy.hooks(fwd_hooks=[_written(value)]):
            right.append(int(toy(text)[0, -1].argmax()) in ids)
    return value, float(np.mean(right))


def _written(value: Any) -> tuple[str, Any]:
    def write(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([resid[:, :-1], value.expand(len(resid), 1, -1)], dim=1)

    return "blocks.3.hook_resid_post", write


def test_a_sum_by_hand_is_right(
    toy: Any, parts: dict[str, tv.TaskVector], asked: Prompts, composed: tuple[Any, float]
) -> None:
    value, share = composed
    assert 0.7 < share < 1
    wide = parts["bc"] + parts["ad"] - parts["ac"]
    for vector in (value, value.half(), value[None], value.numpy(), wide):
        verdict = check_composed(vector, share, toy, asked, **parts, layer=3)
        assert verdict and f"{share:.2f} of 30" in verdict.says, verdict
    assert check_composed(value, np.float32(share), toy, asked, **parts, layer=3)


@pytest.mark.parametrize(
    ("amounts", "says"),
    [
        ((0, 1, 1), "twice what every theta has"),
        ((0, 0.5, 0.5), "Halfway"),
        ((1, 1, 1), "Nothing is taken off"),
        ((1, -1, 1), "places are exchanged"),
        ((1, 1, -1), "takes the rule off"),
        ((1, -1, -1), "sign is turned around"),
        ((-1, 1, 0), "Where does it start"),
        ((-1, 0, 1), "what the rule adds"),
        ((1, 0, 0), "plain task of the other place"),
        ((0, 1, 0), "the rule is missing"),
        ((0, 0, 1), "rule at the wrong place"),
        ((-0.5, 0.5, 0.5), "the length is not"),
        ((-1, 2, 1), "-1.00 ac +2.00 bc +1.00 ad"),
    ],
)
def test_other_sums_are_told_why(
    toy: Any, parts: dict[str, tv.TaskVector], asked: Prompts, amounts: Any, says: str
) -> None:
    ac, bc, ad = (a * parts[corner] for a, corner in zip(amounts, ("ac", "bc", "ad"), strict=True))
    vector = ac + bc + ad
    said(check_composed(vector, 0.9, toy, asked, **parts, layer=3), says)


def test_what_is_no_sum_of_these_is_told_why(
    toy: Any, parts: dict[str, tv.TaskVector], asked: Prompts, composed: tuple[Any, float]
) -> None:
    value, share = composed
    wide = parts["bc"] + parts["ad"] - parts["ac"]
    few = replace(wide, values=wide.values[:, :2], layers=(0, 1))
    for vector, says in (
        (None, "no answer yet"),
        (wide.random_like(seed=0), "does not come from these three at layer 3"),
        (wide.at(2), "another layer"),
        (few, "no layer 3"),
        (value.repeat(4, 1), "averaged over its prompts"),
        (value[:5], "(5,) arrived"),
        ("bc + ad - ac", "A tensor is needed; str"),
        (value * float("nan"), "NaN or infinity"),
    ):
        said(check_composed(vector, share, toy, asked, **parts, layer=3), says)


def test_shares_of_a_right_sum_are_told_why(
    toy: Any, parts: dict[str, tv.TaskVector], asked: Prompts, composed: tuple[Any, float]
) -> None:
    value, share = composed
    wide = parts["bc"] + parts["ad"] - parts["ac"]
    bare = {"view": "zero_shot"}
    added = tv.score(toy, asked, **bare, vector=wide, layer=3, mode="add").accuracy
    higher = tv.score(toy, asked, **bare, vector=wide, layer=4).accuracy
    assert len({share, added, higher}) == 3
    for given, says in (
        (None, "as one number"),
        ("most", "as one number"),
        (100 * share, "in per cent"),
        (30 * share, "number of prompts"),
        (added, "of adding the vector"),
        (higher, "another layer than 3"),
        (tv.score(toy, asked, **bare).accuracy, "nothing written"),
        (tv.score(toy, asked).accuracy, "prompts with demonstrations"),
        (0.123, "is another"),
    ):
        verdict = check_composed(value, given, toy, asked, **parts, layer=3)
        said(verdict, says)
        assert "The vector is right" in verdict.says


# A function vector


@pytest.fixture(scope="module")
def shown(toy: Any) -> Prompts:
    return tv.build_prompts("to_upper", toy, n=6)


@pytest.fixture(scope="module")
def caches(toy: Any, shown: Prompts) -> dict[str, Any]:
    """All activations of every view, by TransformerLens alone; the prompts of a view are equally long."""
    views = {"regular": shown.regular, "zero_shot": shown.zero_shot, "dummy": shown.dummies[1]}
    with torch.no_grad():
        return {name: toy.run_with_cache(batch.tokens)[1] for name, batch in views.items()}


def by_hand(toy: Any, cache: Any, heads: Any = HEADS, at: int = -1) -> torch.Tensor:
    """What each head writes in every prompt: (head, prompt, d_model)."""
    return torch.stack([(cache["z", i][:, at, j] @ toy.W_O[i, j]).detach() for i, j in heads])


def test_heads_summed_by_hand_are_right(toy: Any, shown: Prompts, caches: dict[str, Any]) -> None:
    summed = by_hand(toy, caches["regular"]).mean(dim=1).sum(dim=0)
    for values in (summed, summed.half(), summed.numpy(), summed.tolist(), summed.requires_grad_()):
        verdict = check_function_vector(values, toy, shown, HEADS)
        assert verdict and "3 heads, each averaged over 6 prompts" in verdict.says, verdict


def test_heads_summed_wrongly_are_told_why(
    toy: Any, shown: Prompts, caches: dict[str, Any]
) -> None:
    each = by_hand(toy, caches["regular"])
    summed = each.mean(dim=1).sum(dim=0)
    vector = tv.extract(toy, shown).mean()
    every = [(i, j) for i in (1, 2) for j in range(4)]
    for values, says in (
        (None, "no answer yet"),
        (vector, "TaskVector"),
        (summed / 3, "mean of the heads"),
        (summed * 6, "summed over the prompts"),
        (each[1].mean(dim=0), "one head alone"),
        (each.mean(dim=1), "one by one: sum them"),
        (each.sum(dim=0), "average over them"),
        (summed[None], "Take the row out"),
        (caches["regular"]["z", 1][:, -1, 0].mean(dim=0), "through W_O"),
        ("sum", "A tensor is needed; str"),
        (summed * float("inf"), "NaN or infinity"),
        (vector.at(2)[0], "None of the usual slips"),
    ):
        said(check_function_vector(values, toy, shown, HEADS), says)
    for heads, says in (
        ([(i + 1, j) for i, j in HEADS], "one layer off"),
        ([(i - 1, j) for i, j in HEADS], "one layer off"),
        ([(j, i) for i, j in HEADS], "Layer and head are exchanged"),
        (every, "all heads of these layers"),
    ):
        other = by_hand(toy, caches["regular"], heads).mean(dim=1).sum(dim=0)
        said(check_function_vector(other, toy, shown, HEADS), says)
    for view, at, says in (
        ("regular", -2, "one token too early"),
        ("zero_shot", -1, "without demonstrations"),
        ("dummy", -1, "at a dummy query"),
    ):
        other = by_hand(toy, caches[view], at=at).mean(dim=1).sum(dim=0)
        said(check_function_vector(other, toy, shown, HEADS), says)


# The notebook


def test_the_notebooks_solutions_are_right() -> None:
    """Each solution ends in its check, and the check says that it is right; they run on the toy."""
    cells = nbformat.read(NOTEBOOK, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    folded = re.findall(r"<details><summary>Solution</summary>(.*?)</details>", text, re.S)
    found = [block for fold in folded for block in re.findall(r"```python\n(.*?)```", fold, re.S)]
    given = [c.source for c in cells if c.cell_type == "code" and "exercises.check_" in c.source]
    assert len(found) == len(given) == 3
    scope: dict[str, Any] = {}
    imports = next(c.source for c in cells if "import tvlens as tv" in c.source)
    exec(imports.partition("\ntorch.set_grad_enabled")[0], scope)
    for start, code in zip(given, found, strict=True):
        exec(compile(start, "exercise", "exec"), scope)
        exec(compile(code, "solution", "exec"), scope)
        assert scope["verdict"], scope["verdict"]
