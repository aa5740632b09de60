"""Five ways to ask: idealised strategies must pass exactly those that they can."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tvlens.icl import Data, Items, Plan, Setting, five_way, train
from tvlens.icl.five_way import KINDS, Sequences, score, sequences

N, CLASSES = 400, 12


def matching(asked: Sequences) -> Tensor:
    """ICL: add up the labels of those context items that are of the query's class."""
    same = asked.classes[:, :-1] == asked.classes[:, -1:]
    one_hot = torch.nn.functional.one_hot(asked.labels[:, :-1], CLASSES)
    return (same[..., None] * one_hot).sum(1).float()


def recalling(asked: Sequences) -> Tensor:
    return torch.eye(CLASSES)[asked.classes[:, -1]]


def constrained(asked: Sequences) -> Tensor:
    """CIWL: recall, but only labels that the context shows."""
    shown = torch.nn.functional.one_hot(asked.labels[:, :-1], CLASSES).amax(1)
    return recalling(asked) * shown


@pytest.mark.parametrize("pairs, copies", [(2, 1), (8, 3), (7, 2)])
def test_strategies(pairs: int, copies: int) -> None:
    right = {
        "ICL": {"train": 1, "icl": 1, "flip": 1, "ciwl": 0, "pure_iwl": 0},
        "CIWL": {"train": 1, "icl": 0, "flip": 0, "ciwl": 1, "pure_iwl": 0},
        "IWL": {"train": 1, "icl": 0, "flip": 0, "ciwl": 1, "pure_iwl": 1},
    }
    strategies = {"ICL": matching, "CIWL": constrained, "IWL": recalling}
    for kind in KINDS:
        asked = sequences(kind, N, n_classes=CLASSES, pairs=pairs, copies=copies, seed=4)
        assert asked.classes.shape == asked.labels.shape == (N, pairs + 1)
        for name, answers in strategies.items():
            share = score(answers(asked), asked)["right"].mean().item()
            # A strategy that knows nothing names label 0; by luck that is right now and then.
            luck = {"icl": 0.6, "ciwl": 0.2, "pure_iwl": 0.2}.get(kind, 0)
            expected = right[name][kind]
            assert share == 1 if expected else share <= luck, (name, kind, share)


class Ideal:
    """A model that matches the query with the context, or recalls which prototype it is."""

    def __init__(self, data: Data, *, matches: bool) -> None:
        self.prototypes, self.matches = data.prototypes, matches

    def log_probs(self, w: dict[str, Tensor], items: Items) -> Tensor:
        context, query = items.inputs[:, :, :-1], items.inputs[:, :, -1]
        if self.matches:
            nearest = (context - query[:, :, None]).norm(dim=-1).argmin(-1, keepdim=True)
            label = items.labels.gather(2, nearest)[..., 0]
        else:
            label = torch.cdist(query, self.prototypes).argmin(-1)
        return torch.nn.functional.one_hot(label, self.prototypes.shape[1]).float().log()


def test_a_training_is_asked_in_all_five_ways() -> None:
    settings = [Setting(length=2, noise=0.02, n_sequences=64, seed=seed) for seed in (0, 1)]
    done = train(settings, Plan(steps=1, probes=()), device="cpu", progress=False)
    # Matching finds no match for ciwl, and copies either label. Recalling names label 0 or 1 for icl only
    # where that is the class.
    right = {True: [1, 1, 1, 0.5, 0], False: [1, 0.1, 0, 1, 1]}
    for matches, expected in right.items():
        ideal = replace(done, model=Ideal(done.data, matches=matches))
        found = five_way(ideal, n=N)
        assert found["kind"].values.tolist() == list(KINDS) and found.sizes["member"] == 2
        for kind, share in zip(KINDS, expected, strict=True):
            luck = 0 if share in (0, 1) else 0.1
            off = abs(found["right"].sel(kind=kind) - share)
            assert (off <= luck).all(), (matches, kind)
        assert found["in_context"].sel(kind="pure_iwl").isnull().all()
    learnt = five_way(done, n=N, seed=1)
    assert ((learnt["right"] >= 0) & (learnt["right"] <= 1)).all()
    assert not learnt.identical(five_way(done, n=N, seed=2))
    assert learnt.identical(five_way(done, n=N, seed=1))


def test_one_pair_is_too_short() -> None:
    done = train([Setting()], Plan(steps=1, probes=()), device="cpu", progress=False)
    with pytest.raises(ValueError, match="1 copies of two classes need 2 pairs; pairs = 1 arrived"):
        five_way(done)


def test_what_the_contexts_hold() -> None:
    for kind in KINDS:
        asked = sequences(kind, N, n_classes=CLASSES, pairs=6, copies=2)
        context, query = asked.classes[:, :-1], asked.classes[:, -1:]
        counts = (context == query).sum(1)
        assert (counts == (2 if kind in ("train", "icl", "flip") else 0)).all()
        label = (asked.labels[:, :-1] == asked.labels[:, -1:]).sum(1)
        at_least, at_most = {"pure_iwl": (0, 0), "ciwl": (1, 1)}.get(kind, (2, 3))
        assert label.min() >= at_least and label.max() <= at_most, kind
        several = [len(set(row.tolist())) for row in context]
        assert set(several) == ({4} if kind in ("train", "icl", "flip") else {6})
    again = sequences("icl", N, n_classes=CLASSES, pairs=6, copies=2)
    other = sequences("icl", N, n_classes=CLASSES, pairs=6, copies=2, seed=1)
    first = sequences("icl", N, n_classes=CLASSES, pairs=6, copies=2)
    assert torch.equal(again.labels, first.labels) and not torch.equal(other.labels, first.labels)
    assert 0.4 < first.labels[:, -1].float().mean() < 0.6
    # The query's class stands anywhere, not only first.
    places = (first.classes[:, :-1] == first.classes[:, -1:]).float().mean(0)
    assert places.min() > 0.2


def test_in_context_looks_only_at_shown_labels() -> None:
    asked = sequences("train", 50, n_classes=CLASSES)
    wrong = 2 * torch.eye(CLASSES)[(asked.labels.max(1).values + 1) % CLASSES]
    judged = score(wrong + torch.eye(CLASSES)[asked.labels[:, -1]], asked)
    assert judged["in_context"].mean() >= judged["right"].mean()
    assert score(recalling(asked), asked)["in_context"].mean() == 1
    none = sequences("pure_iwl", 50, n_classes=CLASSES)
    assert score(recalling(none), none)["in_context"].isnan().all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="unknown kind of sequence 'flips'. Nearest: flip"):
        sequences("flips", 1, n_classes=5)
    with pytest.raises(ValueError, match="2 copies of two classes need 4 pairs; pairs = 2 arrived"):
        sequences("flip", 1, n_classes=5, copies=2)
    with pytest.raises(ValueError, match="need 9 classes; n_classes = 8 arrived"):
        sequences("train", 1, n_classes=8, pairs=8)
    asked = sequences("train", 3, n_classes=5)
    with pytest.raises(
        ValueError, match=r"3 sequences with labels up to \d need .*\(3, 1\) arrived"
    ):
        score(torch.zeros(3, 1), asked)
