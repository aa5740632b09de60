import json
import re
from math import comb, exp, log, sqrt

import numpy as np
import pytest

from tests.browser import browse
from tvlens.icl.bounds import bounds_explorer
from tvlens.icl.predictors import (
    bayes_risk,
    in_context,
    kt,
    kt_excess,
    kt_regret,
    label_distribution,
    mixture,
)
from tvlens.icl.theory import crossover, in_context_bounds, in_weight_bound

# --- predictors -----------------------------------------------------------------------------------------


def test_kt_adds_half_a_count():
    counts = np.array([[3, 0, 1], [0, 0, 0]])
    assert kt(counts) == pytest.approx(
        np.array([[3.5, 0.5, 1.5], [0.5, 0.5, 0.5]]) / [[5.5], [1.5]]
    )


def test_in_context_is_the_softmax_of_the_definition():
    rng = np.random.default_rng(0)
    labels, similarity = rng.integers(0, 5, 6), rng.normal(size=6)
    for theta in (-2.0, 0.0, 1.5):
        found = in_context(labels, similarity, n_classes=5, epsilon=0.01, theta=theta)
        powers = [exp(s / exp(theta)) for s in similarity]
        said = [sum(p for p, y in zip(powers, labels, strict=True) if y == c) for c in range(5)]
        assert found == pytest.approx([(1 - 0.05) * p / sum(powers) + 0.01 for p in said])
        assert found.sum() == pytest.approx(1)


def test_temperature_can_fall_below_one():
    """With the temperature exponentiated twice, no item could ever have all the weight."""
    labels, similarity = np.array([0, 1]), np.array([0.0, -1.0])
    sharp = in_context(labels, similarity, n_classes=2, epsilon=1e-6, theta=-5.0)
    twice = in_context(labels, similarity, n_classes=2, epsilon=1e-6, theta=exp(-5.0))
    assert sharp[0] > 0.9999 and twice[0] < 0.74


def test_a_mixture_takes_one_gate_or_one_a_row():
    g, h = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    assert mixture(0.25, g, h).tolist() == [[0.25, 0.75], [0.25, 0.75]]
    assert mixture(np.array([0.0, 1.0]), g, h).tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("noise", ["shift", "uniform"])
def test_bayes_risk_is_the_loss_of_the_true_distribution(noise):
    falls = label_distribution(10, 0.05, noise=noise)
    assert falls.sum() == pytest.approx(1) and falls[0] == 0.95
    assert bayes_risk(10, 0.05, noise=noise) == pytest.approx(-sum(p * log(p) for p in falls if p))
    assert bayes_risk(10, 0.0, noise=noise) == 0 == bayes_risk(10, 1.0, noise="shift")


def test_excess_of_kt_against_sampling():
    falls, rng = label_distribution(6, 0.2, noise="uniform"), np.random.default_rng(0)
    for n in (0, 1, 30):
        guesses = kt(rng.multinomial(n, falls, size=100_000))
        sampled = (-np.log(guesses) @ falls).mean() - bayes_risk(6, 0.2, noise="uniform")
        assert kt_excess(n, falls) == pytest.approx(sampled, rel=0.01)


@pytest.mark.parametrize("label_noise", [0.0, 0.001, 0.01, 0.05, 0.1, 0.3])
def test_a1_excess_of_kt_is_half_a_unit_a_class(label_noise):
    falls = label_distribution(10, label_noise)
    ratios = [kt_excess(n, falls) * 2 * n / 9 for n in (100, 200, 500, 1000, 10_000, 1_000_000)]
    assert 0.9 <= min(ratios) <= max(ratios) <= 1.1


def test_a_class_that_comes_once_in_a_while_costs_less():
    """The limit of A1: nine classes that each come a third of a time in n samples."""
    falls = label_distribution(10, 0.03, noise="uniform")
    assert kt_excess(100, falls) * 2 * 100 / 9 < 0.7
    assert kt_excess(100_000, falls) * 2 * 100_000 / 9 == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("label_noise", [0.0, 0.05])
def test_what_kt_pays_in_sum_grows_like_the_logarithm(label_noise):
    falls = label_distribution(10, label_noise)
    paid = kt_regret(1000, falls)
    assert paid == pytest.approx(np.cumsum([kt_excess(n, falls) for n in range(1000)]), rel=1e-4)
    assert paid[999] - paid[99] == pytest.approx(4.5 * log(10), rel=0.02)


# --- bounds ---------------------------------------------------------------------------------------------


def draws(n=5000, *, seed=0):
    """Random contexts of many settings that keep the assumptions of Corollary 1."""
    rng = np.random.default_rng(seed)
    for length in (1, 2, 4, 8, 16):
        for n_classes, epsilon, b in ((2, 0.5, 1.0), (2, 1e-3, 4.0), (5, 0.1, 0.0), (10, 1e-3, 1.0),
                                      (10, 1e-6, 2.0), (100, 1e-3, 0.3)):  # fmt: skip
            k = rng.integers(0, length + 1, n)
            similarity = np.sort(rng.uniform(-sqrt(b), sqrt(b), (n, length)), axis=1)[:, ::-1]
            wrong = np.arange(length) >= (length - k)[:, None]
            target = rng.integers(0, n_classes, n)
            other = (target[:, None] + rng.integers(1, n_classes, (n, length))) % n_classes
            labels = np.where(wrong, other, target[:, None])
            yield k, labels, target, similarity, {"n_classes": n_classes, "epsilon": epsilon}, b


def loss(labels, target, similarity, told):
    return -np.log(in_context(labels, similarity, **told)[np.arange(len(target)), target])


def violations(found, k, length, told, b):
    low, high = in_context_bounds(length, k, told["n_classes"], told["epsilon"], b)
    return int((found < low - 1e-12).sum()), int((found > high + 1e-12).sum())


def test_a1_no_draw_leaves_the_bounds():
    seen = 0
    for k, labels, target, similarity, told, b in draws():
        found = loss(labels, target, similarity, told)
        assert violations(found, k, labels.shape[1], told, b) == (0, 0)
        seen += len(found)
    assert seen >= 100_000


def test_draws_that_break_the_assumptions_leave_the_bounds():
    below = above = 0
    for k, labels, target, similarity, told, b in draws(500):
        found = loss(labels, target, 4 * similarity, told)  # more similar than sqrt(b) allows
        below += violations(found, k, labels.shape[1], told, b)[0]
        found = loss(labels, target, -similarity, told)  # wrong items are the more similar ones
        above += violations(found, k, labels.shape[1], told, b)[1]
    assert below > 1000 and above > 1000


def test_both_ends_are_reached():
    told, wrong = {"n_classes": 10, "epsilon": 1e-3}, np.array([0] * 5 + [1] * 3)
    low, high = in_context_bounds(8, 3, 10, 1e-3, 1.0)
    equal = in_context(wrong, np.zeros(8), **told)[0]
    best = in_context(wrong, np.array([1.0] * 5 + [-1.0] * 3), **told)[0]
    assert -log(equal) == pytest.approx(float(high))
    assert 1 - best == pytest.approx(
        float(low)
    )  # -log p >= 1 - p is the only step that loses anything


def test_where_all_items_are_wrong_only_epsilon_is_left():
    low, high = in_context_bounds(4, 4, 10, 1e-3, 1.0)
    assert float(low) == float(high) == pytest.approx(log(1000))


def test_ends_grow_with_irrelevant_items():
    low, high = in_context_bounds(8, np.arange(9), 10, 1e-3, 1.0)
    assert (np.diff(low) > 0).all() and (np.diff(high) > 0).all() and (low <= high).all()


@pytest.mark.parametrize("noise", ["shift", "uniform"])
def test_noise_averages_the_ends_over_labels(noise):
    length, k, rho, n = 5, 2, 0.2, 200_000
    rng, falls = np.random.default_rng(0), label_distribution(4, 0.2, noise=noise)
    said = rng.choice(4, p=falls, size=(n, length - k + 1))
    wrong = k + (said[:, 1:] != said[:, :1]).sum(axis=1)
    sampled = [end.mean() for end in in_context_bounds(length, wrong, 4, 0.01, 1.0)]
    found = in_context_bounds(length, k, 4, 0.01, 1.0, label_noise=rho, noise=noise)
    assert [float(end) for end in found] == pytest.approx(sampled, rel=0.01)


def test_noise_with_one_item_is_the_closed_form():
    rho, epsilon = 0.05, 1e-3
    low, high = in_context_bounds(1, 0, 10, epsilon, 1.0, label_noise=rho)
    apart = 2 * rho * (1 - rho)
    right = -log(1 - 10 * epsilon + epsilon)
    assert float(high) == pytest.approx(apart * log(1 / epsilon) + (1 - apart) * right)
    assert float(low) == pytest.approx(apart * log(1 / epsilon) + (1 - apart) * 9 * epsilon)


def test_forms_of_the_in_weight_loss():
    n, risk = np.array([1.0, 8.0, 1e6]), bayes_risk(10, 0.01)
    assert in_weight_bound(n, 10, label_noise=0.01) == pytest.approx(risk + 4.5 * np.log(n) / n)
    next_one = in_weight_bound(n, 10, label_noise=0.01, form="instantaneous")
    assert next_one == pytest.approx(risk + 4.5 / n)
    assert in_weight_bound(n, 10, constant=-4096.0).tolist() == [0, 0, pytest.approx(0, abs=1e-3)]
    assert in_weight_bound(64, 10, constant=64.0) == pytest.approx(4.5 * log(64) / 64 + 1)


# --- crossover ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cumulative", "instantaneous"])
@pytest.mark.parametrize("n_classes", [2, 10, 100])
@pytest.mark.parametrize("label_noise", [0.0, 0.1])
def test_losses_are_equal_where_they_cross(form, n_classes, label_noise):
    told = {"label_noise": label_noise, "form": form}
    losses = bayes_risk(n_classes, label_noise) + np.geomspace(1e-9, 0.1, 50)
    n = crossover(losses, n_classes, **told)
    real = n > 1
    assert real.sum() > 45 and (np.diff(n) <= 0).all()
    there = in_weight_bound(n[real], n_classes, **told)
    assert there == pytest.approx(losses[real], rel=1e-9)
    assert (in_weight_bound(1.01 * n[real], n_classes, **told) < losses[real]).all()


def test_never_and_at_once():
    risk = bayes_risk(10, 0.1)
    assert crossover(np.array([risk, risk / 2, 0.0]), 10, label_noise=0.1).tolist() == [np.inf] * 3
    assert crossover(np.array([risk + 4.5 / np.e + 1e-9, 50.0]), 10, label_noise=0.1).tolist() == [
        1,
        1,
    ]
    assert crossover(0.0, 10) == np.inf
    assert crossover(1e-300, 10) > 1e300
    assert crossover(50.0, 10, form="instantaneous") == 1


def test_crossover_takes_the_later_of_two_solutions():
    """log(n) / n rises to e first: the loss of a learner that has paid nothing yet is no crossing."""
    value = 4.5 * log(1.5) / 1.5
    assert crossover(value, 10) > np.e
    assert float(crossover(value, 10)) == pytest.approx(7.407, abs=0.01)


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: in_context_bounds(4, 5, 10, 1e-3, 1.0), "0 to 4 items can be irrelevant.*5 arrived"),
        (lambda: in_context_bounds(4, np.array([0, -1]), 10, 1e-3, 1.0), "-1 arrived"),
        (lambda: in_context_bounds(0, 0, 10, 1e-3, 1.0), "length = 0"),
        (lambda: in_context_bounds(4, 1, 1, 1e-3, 1.0), "at least 2 classes.*n_classes = 1"),
        (lambda: in_context_bounds(4, 1, 10, 0.11, 1.0), "at most 1 / 10 = 0.1; 0.11 arrived"),
        (lambda: in_context_bounds(4, 1, 10, 0.0, 1.0), "above 0"),
        (lambda: in_context_bounds(4, 1, 10, float("nan"), 1.0), "nan arrived"),
        (lambda: in_context_bounds(4, 1, 10, 1e-3, -1.0), "b >= 0; -1.0 arrived"),
        (lambda: in_context_bounds(4, 1, 10, 1e-3, 1.0, label_noise=1.5), "between 0 and 1; 1.5"),
        (lambda: in_weight_bound(0, 10), "from 1; 0 arrived"),
        (lambda: in_weight_bound(5, 1), "at least 2 classes"),
        (lambda: in_weight_bound(5, 10, form="cumulativ"), "Nearest: cumulative"),
        (lambda: in_weight_bound(5, 10, noise="shfit"), "Nearest: shift"),
        (lambda: crossover(-0.1, 10), "0 or more; -0.1"),
        (lambda: crossover(float("nan"), 10), "nan arrived"),
        (lambda: crossover(0.1, 10, form="both"), "unknown form 'both'"),
        (lambda: kt(np.array([3])), "n_classes = 1"),
        (lambda: kt(np.array([3, -1])), "-1 arrived"),
        (lambda: kt_excess(-1, np.array([0.5, 0.5])), "-1 arrived"),
        (lambda: kt_regret(0, np.array([0.5, 0.5])), "1 or more; 0"),
        (lambda: kt_excess(10, np.array([0.5, 0.6])), "sum to 1; 1.1 arrived"),
        (lambda: in_context(np.array([0, 3]), np.zeros(2), n_classes=3), "0 to 2 .*0 to 3 arrived"),
        (lambda: mixture(1.2, np.ones(2), np.ones(2)), "alpha must lie between 0 and 1; 1.2"),
        (lambda: label_distribution(10, -0.1), "label_noise must lie between 0 and 1; -0.1"),
        (lambda: bounds_explorer(length=17), "from 1 to 16; 17 arrived"),
        (lambda: bounds_explorer(4, 5), "0 to 4 items"),
        (lambda: bounds_explorer(epsilon=0.1), "epsilon.*from 1e-06 to 0.01; 0.1 arrived"),
        (lambda: bounds_explorer(label_noise=0.7), "0 to 0.5; 0.7"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_counts_must_be_whole():
    with pytest.raises(TypeError, match="length must be a whole number; True"):
        bounds_explorer(length=True)


# --- the explorer ---------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"length": 1, "n_irrelevant": 0, "label_noise": 0.05},
    {"length": 4, "n_irrelevant": 4, "n_classes": 2, "epsilon": 0.01, "b": 0.0, "label_noise": 0.0},
    {
        "length": 16,
        "n_irrelevant": 7,
        "n_classes": 100,
        "epsilon": 1e-6,
        "b": 4.0,
        "label_noise": 0.5,
    },
    {
        "length": 5,
        "n_irrelevant": 0,
        "n_classes": 37,
        "epsilon": 3e-4,
        "b": 0.7,
        "label_noise": 0.01,
    },
    {
        "length": 3,
        "n_irrelevant": 1,
        "n_classes": 10,
        "epsilon": 1e-3,
        "b": 1.0,
        "label_noise": 0.3,
    },
]


def test_the_static_figure_shows_the_same_curves():
    explorer = bounds_explorer(length=4, n_irrelevant=2)
    figure = explorer.figure()
    assert figure.data[3].y == pytest.approx(explorer.data["in_weight"].values)
    assert "k = 2" in figure.layout.meta["subtitle"]


def test_a_saved_page_reaches_for_nothing(tmp_path):
    page = bounds_explorer().save(tmp_path / "bounds.html").read_text(encoding="utf-8")
    start = page.index("<script>/**")
    rest = page[:start] + page[page.index("</script>", start) :]
    assert "default-src 'none'" in rest and "https:" not in rest
    with pytest.raises(FileNotFoundError, match="create it first"):
        bounds_explorer().save(tmp_path / "no" / "bounds.html")


def test_in_a_notebook_several_have_ids_of_their_own():
    explorer = bounds_explorer()
    first, second = explorer._repr_html_(), explorer._repr_html_()
    ids = [re.findall(r'id="(tvlens-bounds-\w+)"', text) for text in (first, second)]
    assert len(ids[0]) == 1 and ids[0] != ids[1]
    assert "https://cdn.plot.ly/plotly-" in first and len(first) < 60_000


MOVES = """<script>
document.querySelectorAll(".tvlens-bounds").forEach((box, i) => {
  const moved = %s[i];
  for (const [name, value] of Object.entries(moved)) {
    const slider = box.querySelector(`[name=${name}]`);
    slider.value = name === "epsilon" ? Math.log10(value) : value;
    slider.dispatchEvent(new Event("input"));
  }
  const data = box.querySelector(".plot").data;
  box.querySelector("form").dataset.curves = JSON.stringify([data[3].y, data[4].y]);
});
</script>"""


@pytest.mark.browser
@pytest.mark.slow
def test_javascript_and_python_agree(tmp_path):
    """Six explorers on one page: three stay where they begin, of three all sliders are moved."""
    begin = [bounds_explorer(**setting) for setting in [*SETTINGS[:3], *SETTINGS[:3]]]
    page = begin[0].save(tmp_path / "bounds.html")
    more = "".join(one._fragment(None) for one in begin[1:])
    default = {key: getattr(begin[0], key) for key in begin[0].__dataclass_fields__}
    moves = [{}] * 3 + [default | target for target in SETTINGS[3:]]
    text = page.read_text(encoding="utf-8").replace("</body>", more + MOVES % json.dumps(moves))
    page.write_text(text, encoding="utf-8")
    dom, console = browse(page, tmp_path / "profile", width=1000)
    assert console == []
    assert dom.count('class="failed" hidden') == 6 and dom.count('class="main-svg"') >= 12
    boxes = dom.split('class="tvlens-bounds"')[1:]
    assert len(boxes) == 6
    for box, target in zip(boxes, SETTINGS, strict=True):
        data = bounds_explorer(**target).data
        said = re.findall(r'data-name="(\w+)" data-value="([^"]+)"', box)
        shown = {name: float(value) for name, value in said}
        for name in ("in_context", "crossover"):
            for end in ("low", "high"):
                assert shown[f"{name}_{end}"] == pytest.approx(
                    float(data[name].sel(end=end)), rel=1e-9
                ), name
        assert shown["risk"] == pytest.approx(float(data["risk"]), rel=1e-12)
        curves = json.loads(re.search(r'data-curves="(.*?)"', box).group(1))
        for name, curve in zip(("in_weight", "in_weight_next"), curves, strict=True):
            assert curve == pytest.approx(data[name].values.tolist(), rel=1e-12)


def test_ways_to_choose():
    """The chance of wrong labels sums to one for every k, whatever the noise."""
    from tvlens.icl.theory import _wrong_labels

    chance = _wrong_labels(6, 0.3)
    assert chance.sum(axis=1) == pytest.approx(np.ones(7))
    assert chance[2, 3] == pytest.approx(comb(4, 3) * 0.3**3 * 0.7)
