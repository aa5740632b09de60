import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from tvlens.intervals import accuracy, bootstrap, differences_over_tasks, over_tasks, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Values of R's prop.test(correct = FALSE).
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (9, 10, 0.5958, 0.9821), (50, 50, 0.9287, 1)],
)
def test_wilson_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0.5, 0.999))
def test_wilson_encloses_the_share_and_mirrors(right, wrong, level):
    n = right + wrong
    low, high = wilson(right, n, level=level)
    if n == 0:
        assert np.isnan(low) and np.isnan(high)
        return
    assert 0 <= low <= right / n <= high <= 1
    assert low < high
    assert wilson(wrong, n, level=level) == pytest.approx((1 - high, 1 - low))


def test_wilson_covers_the_true_rate_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(50, 0.1, 20000)
    low, high = wilson(draws, 50)
    assert 0.93 < np.mean((low <= 0.1) & (high >= 0.1)) < 0.98


def test_wilson_is_vectorised():
    low, high = wilson(np.array([[0, 5], [10, 0]]), [10, 10])
    assert low.shape == high.shape == (2, 2)
    assert (low[0, 1], high[0, 1]) == wilson(5, 10)
    assert all(type(end) is float for end in wilson(5, 10))


@pytest.mark.parametrize("successes", [-1, 11, float("nan")])
def test_wilson_refuses_impossible_counts(successes):
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(successes, 10)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_levels_lie_between_0_and_1(level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, level=level)
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap([1, 2], level=level)


def test_bootstrap_of_a_mean_agrees_with_theory():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap(values, seed=0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap(values, seed=0) == (low, high)
    assert bootstrap(values, seed=1) != (low, high)


def test_bootstrap_keeps_rows_together():
    column = np.random.default_rng(2).random(60)
    low, high = bootstrap(
        np.stack([column, column], 1), statistic=lambda v: (v[:, 0] - v[:, 1]).sum()
    )
    assert (low, high) == (0, 0)


def test_bootstrap_of_many_columns_at_once():
    outcomes = np.random.default_rng(3).random((50, 7)) < 0.5
    low, high = bootstrap(outcomes, n_resamples=200)
    assert low.shape == high.shape == (7,)
    assert (low <= outcomes.mean(0)).all() and (outcomes.mean(0) <= high).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "at least one"), (np.array(3.0), "at least one"), ([1, float("nan")], "NaN")],
)
def test_bootstrap_refuses_what_has_no_answer(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(values)


def test_bootstrap_needs_a_draw():
    with pytest.raises(ValueError, match="n_resamples"):
        bootstrap([1, 2], n_resamples=0)


@pytest.fixture
def outcomes():
    return xr.Dataset(
        {
            "right": (("prompt", "layer"), [[1.0, np.nan], [0, np.nan], [1, np.nan], [1, 1]]),
            "flat": ("prompt", [True, False, False, True]),
        },
        coords={"split": ("prompt", ["dev", "dev", "test", "test"]), "layer": [0, 1]},
    )


def test_accuracy_counts_only_what_exists(outcomes):
    share = accuracy(outcomes, "right", split="dev")
    assert share["n"].values.tolist() == [2, 0]
    assert share["accuracy"].values[0] == 0.5
    assert np.isnan(share["accuracy"].values[1]) and np.isnan(share["low"].values[1])
    assert share["layer"].values.tolist() == [0, 1]
    assert (float(share["low"][0]), float(share["high"][0])) == wilson(1, 2)


def test_accuracy_by_split(outcomes):
    assert float(accuracy(outcomes, "flat", split="all")["accuracy"]) == 0.5
    assert float(accuracy(outcomes, "flat")["n"]) == 2


def test_accuracy_names_what_there_is(outcomes):
    with pytest.raises(ValueError, match=r"unknown variable 'rihgt'.*right"):
        accuracy(outcomes, "rihgt")
    with pytest.raises(ValueError, match=r"unknown split 'tset'.*test"):
        accuracy(outcomes, "right", split="tset")


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_a_seed_drawn_twice_brings_other_queries(n_seeds):
    """Where seeds make no difference, two levels make intervals sqrt(2 - 1 / n) times as wide."""
    rng, n = np.random.default_rng(0), 60
    asked = np.arange(n_seeds * n).reshape(n_seeds, 1, n)
    # Every run is another sample of the same world.
    outcomes = (rng.random((n_seeds, 1, n, 300)) < 0.5).astype(float)
    low, high = over_tasks(outcomes, asked, n_resamples=1000)
    ideal = 2 * 1.96 * np.sqrt(0.25 / (n_seeds * n))
    assert np.sqrt(2 - 1 / n_seeds) == pytest.approx((high - low).mean() / ideal, rel=0.05)
    assert ((low <= 0.5) & (high >= 0.5)).mean() > 0.94


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_always_right_and_never_are_no_certainties(share):
    asked = np.array([[["a", "b", "b"], ["a", "c", "d"]], [["b", "a", "a"], ["c", "e", "d"]]])
    outcomes = np.full((2, 2, 3, 3), share)
    outcomes[0, 0, 0, 1] = 1 - share
    outcomes[:, 1, 2, 2] = np.nan  # "d" does not exist there
    low, high = over_tasks(outcomes, asked)
    # a and b of the first task; a, c, d and e of the second one.
    assert (low[0], high[0]) == wilson(share * 6, 6)
    assert (low[2], high[2]) == wilson(share * 5, 5)
    drawn = differences_over_tasks(outcomes, asked)
    assert (low[1], high[1]) == (drawn[0][1], drawn[1][1])
    assert 0 < high[1] - low[1] < 0.6


def test_differences_are_left_to_the_bootstrap():
    asked = np.arange(10).reshape(1, 1, 10)
    outcomes = np.zeros((1, 1, 10, 2))
    outcomes[..., 3:5, 1] = -1
    low, high = over_tasks(outcomes, asked)
    assert (low[0], high[0]) == (0, 0) and low[1] < -0.2 < high[1]
    gains = differences_over_tasks(np.ones((1, 1, 10, 1)), asked)
    assert [float(end[0]) for end in gains] == [1, 1]
