"""Mixtures of HMMs: the exact predictor against enumeration, a transformer against the exact predictor."""

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from tvlens.icl.draws import generator
from tvlens.icl.hmm import DELIMITER, Mixture, bayes, each_concept, ginc, prompts, sample
from tvlens.icl.studies import get
from tvlens.icl.studies import hmm_mixture as module
from tvlens.icl.studies._hmm_mixture import HMMMixture
from tvlens.icl.studies.hmm_mixture import _divergence, hmm_mixture
from tvlens.plots.icl_hmm_mixture import hmm_accuracy, hmm_training
from tvlens.results import Result

SMALL: dict[str, Any] = {
    "n_concepts": 2, "n_values": 2, "n_slots": 2, "n_tokens": 4, "d_model": 8, "n_heads": 2, "batch": 4,
    "n_prompts": 12, "lengths": (2, 3), "examples": (0, 2), "progress": False,
}  # fmt: skip


def random_mixture(seed: int, zeros: bool = False) -> Mixture:
    """Two models with three states, emissions not deterministic, where asked with impossible transitions."""
    rng = np.random.default_rng(seed)
    start, transition, emission = (
        rng.dirichlet(np.ones(n), size=m) for n, m in ((3, 2), (3, 6), (4, 3))
    )
    transition = transition.reshape(2, 3, 3)
    if zeros:
        transition[:, :, 0], emission[:, 0] = 0, (1, 0, 0)
        transition /= transition.sum(-1, keepdims=True)
        emission /= emission.sum(-1, keepdims=True)
    return Mixture(*(torch.tensor(x) for x in (start, transition, emission)))


def enumerate_paths(mixture: Mixture, tokens: tuple[int, ...]) -> np.ndarray:
    """Probability of the tokens under each concept: the sum over every path of hidden states."""
    start, transition, emission = (
        x.numpy() for x in (mixture.start, mixture.transition, mixture.emission)
    )
    total = np.zeros(len(start))
    for path in product(range(start.shape[1]), repeat=len(tokens)):
        weight = start[:, path[0]].copy()
        for s, t in pairwise(path):
            weight *= transition[:, s, t]
        total += weight * np.prod([emission[s, x] for s, x in zip(path, tokens, strict=True)])
    return total


@pytest.mark.parametrize("seed, zeros", [(0, False), (1, False), (2, True)])
def test_exact_predictor_is_enumeration(seed: int, zeros: bool) -> None:
    mixture = random_mixture(seed, zeros)
    tokens = (2, 1, 3, 3, 2)
    found = bayes(mixture, torch.tensor([tokens, tokens[::-1]]))
    for row, read in enumerate((tokens, tokens[::-1])):
        for n in range(1, len(tokens) + 1):
            each = enumerate_paths(mixture, read[:n])
            after = np.stack([enumerate_paths(mixture, (*read[:n], x)) for x in range(4)])
            at = (row, n - 1)
            np.testing.assert_allclose(found.log_posterior[at].exp(), each / each.sum(), atol=1e-12)
            np.testing.assert_allclose(
                found.log_next[at].exp(), after.sum(1) / each.sum(), atol=1e-12
            )
            np.testing.assert_allclose(found.log_next_each[at].exp(), (after / each).T, atol=1e-12)
            prior = (after / each).mean(1)
            np.testing.assert_allclose(found.log_next_prior[at].exp(), prior, atol=1e-12)
    log_likelihood, log_next = each_concept(mixture, torch.tensor([tokens]))
    np.testing.assert_allclose(log_likelihood[0].exp(), enumerate_paths(mixture, tokens))
    torch.testing.assert_close(log_next, found.log_next_each[:1, -1])


def test_long_documents_do_not_underflow() -> None:
    mixture = ginc(seed=1)
    tokens, _ = sample(mixture, torch.tensor([2]), 1500, generator(0))
    found = bayes(mixture, tokens)
    assert found.log_posterior[0, -1].argmax() == 2
    torch.testing.assert_close(found.log_next.exp().sum(-1), torch.ones(1, 1500).double())
    single = bayes(
        Mixture(*(x.float() for x in (mixture.start, mixture.transition, mixture.emission))), tokens
    )
    assert (single.log_next[:, -50:].exp() - found.log_next[:, -50:].exp()).abs().max() < 1e-3


def test_ginc() -> None:
    mixture = ginc(n_concepts=3, n_values=4, n_slots=6, n_tokens=9, floor=0.0)
    assert mixture.transition.shape == (3, 24, 24) and mixture.emission.shape == (24, 9)
    for x in (mixture.start, mixture.transition, mixture.emission):
        torch.testing.assert_close(x.sum(-1), torch.ones(x.shape[:-1]).double())
    tokens = mixture.emission.argmax(-1).reshape(4, 6)
    assert (tokens[:, 0] == DELIMITER).all() and (tokens[:, 1:] != DELIMITER).all()
    # Values stay with at least `identity`, in all concepts alike; slots differ between concepts.
    values = mixture.transition.reshape(3, 4, 6, 4, 6).sum(-1)[:, :, 0]
    assert (torch.diagonal(values, dim1=1, dim2=2) > 0.9 - 1e-9).all()
    torch.testing.assert_close(values[0], values[1])
    slots = mixture.transition.reshape(3, 4, 6, 4, 6).sum(3)[:, 0]
    assert (slots[0] - slots[1]).abs().max() > 0.1 and (slots == 0).any()
    assert (ginc(floor=0.05).transition > 0).any(-1).all()
    assert not torch.equal(ginc(seed=1).transition, ginc(seed=0).transition)


def test_samples_follow_the_model() -> None:
    mixture = ginc()
    concept = torch.full((6000,), 3)
    tokens, states = sample(mixture, concept, 2, generator(1))
    begun = torch.bincount(states[:, 0], minlength=25) / 6000
    assert (begun - mixture.start[3]).abs().max() < 0.02
    from_7 = sample(mixture, concept, 2, generator(2), first=torch.full((6000,), 7))[1][:, 1]
    assert (
        torch.bincount(from_7, minlength=25) / 6000 - mixture.transition[3, 7]
    ).abs().max() < 0.03
    assert (mixture.emission[states].argmax(-1) == tokens).all()


def test_prompts() -> None:
    mixture = ginc()
    none, many = (prompts(mixture, 50, examples=n, length=4, n_slots=5) for n in (0, 3))
    assert none.tokens.shape == (50, 3) and many.tokens.shape == (50, 3 * 5 + 3)
    assert (many.tokens[:, 4:15:5] == DELIMITER).all()
    assert torch.equal(none.concept, many.concept) and torch.equal(none.answer, many.answer)
    assert torch.equal(none.tokens, many.tokens[:, -3:])


def test_examples_tell_the_concept() -> None:
    mixture = ginc()
    sure, right = [], []
    for n in (0, 8):
        asked = prompts(mixture, 300, examples=n, length=5, n_slots=5)
        found = bayes(mixture, asked.tokens)
        sure.append(found.log_posterior[torch.arange(300), -1, asked.concept].exp().mean())
        right.append([(x[:, -1].argmax(-1) == asked.answer).float().mean() for x in
                      (found.log_next, found.log_next_prior)])  # fmt: skip
    assert sure[1] > sure[0] + 0.1
    assert right[1][0] > right[0][0] + 0.05 and right[1][0] > right[1][1] + 0.3


@pytest.fixture(scope="module")
def found() -> HMMMixture:
    return hmm_mixture(**SMALL | {"steps": 60, "lr": 0.01})


def test_training_comes_nearer_to_exact(found: HMMMixture) -> None:
    curve = found.data["training"]
    assert curve.sel(measure="divergence")[-1] < 0.5 * curve.sel(measure="divergence")[0]
    # On documents of the mixture nobody predicts better, up to the sample's noise.
    gap = curve.sel(measure="loss") - curve.sel(measure="exact_loss")
    assert (gap > -0.02).all()
    exact = found.data["divergence"].sel(predictor="exact")
    assert abs(exact).max() == 0
    assert float(found.data["divergence"].sel(predictor="concept known").min()) >= -1e-12


def test_divergence() -> None:
    p, q = (torch.tensor(x).double().log() for x in ([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]))
    assert _divergence(p, q).item() == pytest.approx(0.5 * np.log(2))
    assert _divergence(p, p).item() == 0


def test_killed_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies resumes, and ends with the same numbers as one that did not."""
    monkeypatch.setattr(module, "_SAVED", 4)
    settings = SMALL | {"steps": 10}
    whole = hmm_mixture(**settings)
    documents, calls = module._documents, []

    def dying(*arguments: Any) -> Any:
        calls.append(arguments[-1])
        if arguments[-1] == 6:
            raise KeyboardInterrupt
        return documents(*arguments)

    monkeypatch.setattr(module, "_documents", dying)
    with pytest.raises(KeyboardInterrupt):
        hmm_mixture(**settings, out=tmp_path)
    monkeypatch.setattr(module, "_documents", lambda *a: calls.append(a[-1]) or documents(*a))
    calls.clear()
    again = hmm_mixture(**settings, out=tmp_path)
    assert [step for step in calls if step != "held"] == [4, 5, 6, 7, 8, 9]
    xr.testing.assert_identical(again.data.drop_attrs(), whole.data.drop_attrs())
    with pytest.raises(ValueError, match="another training: lr differ"):
        hmm_mixture(**settings, lr=0.5, out=tmp_path)


def test_result(found: HMMMixture, tmp_path: Path) -> None:
    assert found.finding().startswith("After 2 examples of 3 tokens the transformer is right in ")
    again = Result.load(found.save(tmp_path / "h.nc"))
    assert isinstance(again, HMMMixture)
    xr.testing.assert_equal(again.data, found.data)
    rates = found.rates()
    one = rates[(rates["predictor"] == "exact") & (rates["length"] == 2) & (rates["examples"] == 0)]
    right = found.data["right"].sel(predictor="exact", length=2, examples=0)
    assert one["accuracy"].item() == float(right.mean())
    assert found.summary()["exact"] == rates[rates["predictor"] == "exact"]["accuracy"].iloc[-1]
    assert "2111.02080" in found.cite() and get("hmm_mixture") is hmm_mixture
    assert set(found.tables()) == {
        "Accuracy by examples of 2 tokens",
        "Accuracy by examples of 3 tokens",
    }


def test_figures(found: HMMMixture) -> None:
    assert list(found.figures()) == ["Accuracy by examples", "Training"]
    fig = hmm_accuracy(found.rates())
    exact = [t for t in fig.data if t.name.startswith("exact")]
    assert len(exact) == 2  # no divergence from itself
    np.testing.assert_allclose(
        exact[0].y, found.data["right"].sel(predictor="exact", length=2).mean("prompt")
    )
    with pytest.raises(ValueError, match="the table lacks"):
        hmm_accuracy(pd.DataFrame({"length": [1]}))
    with pytest.raises(ValueError, match="the data lacks training"):
        hmm_training(xr.Dataset())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="n_slots must be at least 2; 1 arrived"):
        ginc(n_slots=1)
    with pytest.raises(ValueError, match="identity must lie in 0 to 1; 1.5 arrived. Nearest: 1"):
        ginc(identity=1.5)
    with pytest.raises(ValueError, match="tokens must lie in 0 to 19; 0 to 20 arrived"):
        bayes(ginc(), torch.tensor([[0, 20]]))
    with pytest.raises(ValueError, match="at least one token"):
        bayes(ginc(), torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"lengths\[1\] must be at least 2; 1 arrived"):
        hmm_mixture(**SMALL | {"lengths": (3, 1)})
    with pytest.raises(ValueError, match="3 heads do not divide d_model = 8"):
        hmm_mixture(**SMALL | {"n_heads": 3})
    with pytest.raises(ValueError, match="length must be at least 2"):
        prompts(ginc(), 1, examples=0, length=1, n_slots=5)
