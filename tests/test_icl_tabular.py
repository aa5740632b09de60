import time
from collections import defaultdict
from math import exp, log, sqrt

import numpy as np
import plotly.graph_objects as go
import pytest

from tvlens import load
from tvlens.icl import tabular
from tvlens.icl.predictors import in_context, kt, mixture
from tvlens.icl.studies import REGISTRY
from tvlens.icl.studies.theory import _exact, predicted, theory
from tvlens.icl.tabular import Stream, algorithm1, draw, switching_times

# --- streams --------------------------------------------------------------------------------------------


def test_shares_of_a_stream():
    stream = Stream(length=3, p_relevant=0.7, label_noise=0.1, p_high=0.8)
    drawn = draw(stream, 100_000)
    assert np.bincount(drawn.query) / 1e5 == pytest.approx(stream.probabilities, abs=0.005)
    relevant = (drawn.context == drawn.query[:, None]).any(axis=1)
    assert relevant.mean() == pytest.approx(0.7, abs=0.005)
    for labels, classes in ((drawn.target, drawn.query), (drawn.labels, drawn.context)):
        assert set(np.unique((labels - classes) % 10)) == {0, 1}
        assert (labels != classes).mean() == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("relevant", [True, False])
def test_contexts_are_those_that_rejection_keeps(relevant):
    stream = Stream(
        n_high=1, n_low=2, p_high=0.6, length=3, p_relevant=float(relevant), epsilon=0.1
    )
    drawn, rng = draw(stream, 60_000), np.random.default_rng(1)
    tried = rng.choice(3, p=stream.probabilities, size=(400_000, 3))
    for query in range(3):
        kept = tried[(tried == query).any(axis=1) == relevant]
        ours = drawn.context[drawn.query == query]
        for found in (np.sort(ours, axis=1), np.sort(kept, axis=1)):
            assert len(found) > 5000
        codes = [
            np.bincount(np.sort(x, axis=1) @ [9, 3, 1], minlength=27) / len(x) for x in (ours, kept)
        ]
        assert codes[0] == pytest.approx(codes[1], abs=0.02)


def test_the_number_of_relevant_items_can_be_set():
    drawn = draw(Stream(length=4, n_relevant=2, p_relevant=0.5), 2000)
    counts = (drawn.context == drawn.query[:, None]).sum(axis=1)
    assert set(counts.tolist()) == {0, 2}


def test_a_seed_decides_a_stream():
    first, same, other = (draw(Stream(), 500, seed=seed) for seed in (3, 3, 4))
    assert (first.query == same.query).all() and (first.labels == same.labels).all()
    assert (first.query != other.query).any()


# --- Algorithm 1 ----------------------------------------------------------------------------------------


def literal(stream, drawn):
    """Algorithm 1 as it is written, round by round, with weights that are multiplied out."""
    n_classes, epsilon = stream.n_classes, stream.epsilon
    counts = np.zeros((n_classes, n_classes))
    lost = defaultdict(lambda: [0.0, 0.0, 0])
    paid, gates = [], []
    for query, target, context, labels in zip(
        drawn.query, drawn.target, drawn.context, drawn.labels, strict=True
    ):
        cell = (query, *sorted(context))
        in_weights, in_contexts, visits = lost[cell]
        reach = max(log(1 / epsilon), log(2 * counts[query].sum() + n_classes))
        rate = 2 * sqrt(log(2) / (visits + 1)) / reach
        weights = exp(-rate * in_weights), exp(-rate * in_contexts)
        alpha = weights[0] / sum(weights)
        g = kt(counts[query])
        similarity = np.where(context == query, sqrt(stream.b), -sqrt(stream.b))
        h = in_context(labels, similarity, n_classes=n_classes, epsilon=epsilon)
        paid.append(-log(mixture(alpha, g, h)[target]))
        lost[cell] = [in_weights - log(g[target]), in_contexts - log(h[target]), visits + 1]
        counts[query, target] += 1
        gates.append((cell, alpha))
    return paid, lost, gates, counts


@pytest.mark.parametrize(
    "stream",
    [
        Stream(),
        Stream(length=3, label_noise=0.2, b=0.5, epsilon=0.01),
        Stream(length=2, n_relevant=2, p_relevant=0.5, n_high=2, n_low=1, label_noise=0.0),
        Stream(length=20, n_high=1, n_low=1, p_high=0.6, label_noise=0.3),
    ],
    ids=["default", "three items", "all relevant", "long"],
)
def test_sorted_sums_give_what_the_loop_gives(stream):
    rounds = 700
    drawn = draw(stream, rounds, seed=5)
    paid, lost, _, counts = literal(stream, drawn)
    found = algorithm1(stream, rounds=rounds, seeds=[5]).isel(stream=0, seed=0)
    times = found["time"].values
    assert found["loss"].values == pytest.approx((np.cumsum(paid)[times - 1]) / times, rel=1e-10)
    best = sum(min(g, h) for g, h, _ in lost.values())
    assert float(found["best"][-1]) * rounds == pytest.approx(best, rel=1e-10)
    assert float(found["regret"][-1]) == pytest.approx(sum(paid) - best, rel=1e-8)
    known = sum(sqrt(n * log(2) / 2) for _, _, n in lost.values()) * log(1 / stream.epsilon)
    assert float(found["bound_known"][-1]) == pytest.approx(known, rel=1e-10)
    for i, frequency in enumerate(("C_H", "C_L")):
        for context in ("relevant", "irrelevant"):
            total = weight = 0.0
            for (query, *items), (in_weights, in_contexts, n) in lost.items():
                if (query >= stream.n_high) == i and (query in items) == (context == "relevant"):
                    reach = max(
                        log(1 / stream.epsilon), log(2 * counts[query].sum() + stream.n_classes)
                    )
                    rate = 2 * sqrt(log(2) / (n + 1)) / reach
                    total += n / (1 + exp(rate * (in_weights - in_contexts)))
                    weight += n
            shown = float(found["alpha"].sel(frequency=frequency, context=context)[-1])
            assert shown == pytest.approx(total / weight, rel=1e-10)


def test_each_run_is_its_own():
    streams = [Stream(), Stream(label_noise=0.2)]
    both = algorithm1(streams, rounds=500, seeds=[0, 1])
    alone = algorithm1(streams[1], rounds=500, seeds=[1])
    assert both["loss"].values[1, 1] == pytest.approx(alone["loss"].values[0, 0], rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("epsilon", [0.1, 1e-6])
def test_regret_stays_under_its_bound(rho, length, epsilon):
    found = algorithm1(
        Stream(label_noise=rho, length=length, epsilon=epsilon), rounds=5000, seeds=range(3)
    )
    assert (found["regret"] <= found["bound"]).all()
    assert (found["loss"] >= 0).all() and float(found["bound"][0, 0, -1]) < 5000 * 14


def test_a_gate_that_does_not_learn_breaks_the_bound(monkeypatch):
    """The control: one half for ever costs log(2) a round where one predictor is right and one is not."""
    stream = Stream(n_high=1, n_low=1, p_relevant=0.0, label_noise=0.0, epsilon=1e-3)
    learns = algorithm1(stream, rounds=2**15).isel(stream=0, seed=0)
    monkeypatch.setattr(
        tabular, "gate", lambda lead, visits, seen, **told: np.full(lead.shape, 0.5)
    )
    stuck = algorithm1(stream, rounds=2**15).isel(stream=0, seed=0)
    assert (stuck["alpha"].sel(context="irrelevant") == 0.5).all()
    # The bound is the same, and grows with the root of the rounds; a stuck gate pays for each of them.
    assert (stuck["bound"] == learns["bound"]).all()
    assert float(stuck["regret"][-1]) == pytest.approx(2**15 * log(2), rel=0.01)
    assert float(learns["regret"][-1]) < 0.05 * float(stuck["bound"][-1])
    assert float(stuck["regret"][-1]) > 5 * float(stuck["bound"][-1])


def test_2_to_the_17_rounds_are_quick():
    algorithm1(Stream(), rounds=100)
    started = time.process_time()
    algorithm1(Stream(), rounds=2**17)
    assert time.process_time() - started < 1


def test_when_gates_switch():
    alpha = np.array(
        [[0.5, 0.3, 0.7, 0.4, 0.6], [0.5] * 5, [0.5, 0.4, 0.4, 0.4, 0.4], [np.nan] * 5]
    )
    times = np.array([1, 10, 100, 1000, 10_000])
    found = switching_times(alpha, times, level=0.5)
    assert found[0] == pytest.approx(10**3.5) and found[1] == 1 and np.isnan(found[2:]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Stream(p_high=1.2), "p_high must lie between 0 and 1; 1.2"),
        (lambda: Stream(p_relevant=-0.1), "p_relevant must lie between 0 and 1; -0.1"),
        (lambda: Stream(label_noise=float("nan")), "label_noise must lie between 0 and 1; nan"),
        (lambda: Stream(length=2, n_relevant=3), "length 2 holds 1 to 2 relevant items; n_relevant = 3"),
        (lambda: Stream(length=0), "length must be at least 1; 0"),
        (lambda: Stream(n_low=0), "n_low must be at least 1; 0"),
        (lambda: Stream(epsilon=0.2), "at most 1 / 10 = 0.1; 0.2"),
        (lambda: Stream(b=-1.0), "b >= 0; -1.0"),
        (lambda: Stream(n_high=1, p_high=1.0), "one class has all draws"),
        (lambda: draw(Stream(), 0), "rounds = 0"),
        (lambda: algorithm1([]), "at least one stream"),
        (lambda: algorithm1(Stream(), seeds=[]), "one seed"),
        (lambda: algorithm1(Stream(), rounds=0), "rounds and n_times must be at least 1; 0"),
        (lambda: switching_times(np.zeros(2), np.array([1, 2]), level=2.0), "level must lie between 0 and 1"),
        (lambda: theory(preset="fast"), "unknown preset 'fast'"),
        (lambda: theory(rounds=0), "rounds must be at least 1; 0"),
        (lambda: theory(p_highs=(0.9, 1.0)), "p_highs lie above 0 and below 1.*1.0 arrived"),
        (lambda: theory(label_noises=(2.0,)), "label_noise must lie between 0 and 1; 2.0"),
        (lambda: theory(n_classes=1), "at least 2 classes"),
        (lambda: theory(label_noises=()), "label_noises needs at least one value"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the study ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick():
    started = time.process_time()
    found = theory(preset="quick", progress=False)
    return found, time.process_time() - started


def test_the_study_is_registered():
    assert REGISTRY.functions["theory"] is theory


def test_the_quick_preset_is_quick(quick):
    assert quick[1] < 10


def test_a2_gates_switch_in_the_ratio_of_frequencies(quick):
    row = quick[0].switches().loc[0.05]
    assert 4 <= row["ratio at 0.5"] <= 12 and 4 <= row["ratio at 0.85"] <= 12
    for frequency in ("C_H", "C_L"):
        assert row[f"{frequency} at 0.5"] == pytest.approx(row[f"{frequency} predicted"], rel=0.5)
        assert row[f"{frequency} at 0.5"] == pytest.approx(row[f"{frequency} exact"], rel=0.15)
    swept = quick[0].switches("p_high")
    off = np.log(swept["ratio at 0.85"] / swept["frequency ratio"])
    assert off.abs().max() < log(1.3)


def test_a2_the_mixture_is_nearly_as_good_as_the_best_choice(quick):
    data = quick[0].data.sel(label_noise=0.05).sel(time=2**16, method="nearest")
    assert ((data["loss"] - data["best"]) <= 0.005).all()
    assert (quick[0].data["regret"] <= quick[0].data["bound"]).all()


def test_a2_without_noise_rare_classes_stay_in_context(quick):
    end = quick[0].data["alpha"].sel(context="relevant", frequency="C_L").isel(time=-1)
    assert (end.sel(label_noise=0.0) < 0.6).all()
    assert (end.sel(label_noise=0.1) > 0.95).all()


def test_in_context_learning_comes_before_it_goes(quick):
    alpha = (
        quick[0]
        .data["alpha"]
        .sel(label_noise=0.05, context="relevant", frequency="C_L")
        .mean("seed")
    )
    assert float(alpha[0]) == pytest.approx(0.5, abs=0.02)
    assert (
        float(alpha.min()) < 0.46
        and 100 < int(alpha.idxmin("time")) < 2000
        and float(alpha[-1]) > 0.95
    )


def test_predictions_scale_with_frequencies():
    high, low = predicted(Stream(label_noise=0.05))
    assert low / high == pytest.approx(9)
    assert predicted(Stream(label_noise=0.05, p_high=0.5)) == pytest.approx((high * 1.8,) * 2)
    later = predicted(Stream(label_noise=0.01))
    assert later[0] > high and later[1] > low


def test_the_exact_prediction_is_cut_by_samples_and_not_by_rounds():
    """A common class has .18 of the rounds; a rare one has as many samples after nine times those rounds."""
    rounds = 2**17
    high, low = _exact(Stream(label_noise=0.0), rounds)
    assert high < rounds < low < 9 * rounds and low == pytest.approx(9 * high)
    assert _exact(Stream(label_noise=0.0), int(high) - 6) == (np.inf, np.inf)
    assert _exact(Stream(label_noise=0.0), int(high) + 6) == (high, low)


def test_the_result_is_kept_and_drawn(quick, tmp_path):
    found = quick[0]
    assert "8.8 times later" in found.finding()
    again = load(found.save(tmp_path / "theory.nc"))
    assert again.finding() == found.finding() and again.kind == "icl_theory"
    figures = found.figures()
    assert all(isinstance(figure, go.Figure) for figure in figures.values()) and len(figures) == 4
    panels = figures["Bounds (Figure 1)"]
    assert [note.text for note in panels.layout.annotations] == [
        f"<b>k = {k}</b>" for k in range(8)
    ]
    assert len(found.tables()) == 4 and found.summary()["ratio at 0.5"] > 4
    assert "chan2025toward" in found.cite()


def test_nothing_to_switch_is_said():
    found = theory(rounds=300, seeds=1, label_noises=0.0, p_highs=0.9, progress=False)
    assert "no number of" in found.finding()
    assert np.isnan(found.switches().loc[0.0, "ratio at 0.5"])
    assert len(found.figures()) == 4
