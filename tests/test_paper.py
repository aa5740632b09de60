"""Paper A's effect in a real model: the vector works, its controls do not, and only in the middle."""

from typing import Any

import pytest

import tvlens as tv
from tvlens.intervals import accuracy

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", ["to_upper", "gerund"])
def test_one_vector_replaces_the_demonstrations(task: str, smollm2: Any) -> None:
    sweep = tv.layer_sweep(smollm2, task, n_dev=26, n_test=26, progress=False)
    found = sweep.summary()
    assert found["hypothesis"] >= 0.55 and found["ratio"] >= 0.75
    assert found["baseline"] <= 0.25 * found["regular"]
    assert found["control"] <= found["baseline"] + 0.1
    assert 0.4 <= found["depth"] <= 0.8
    # Above the layers where the query is read, theta can no longer be applied to it.
    curve = accuracy(sweep.data, "hypothesis")["accuracy"]
    assert float(curve[-4:].max()) <= found["query_blind"] + 0.1
    assert float(curve[:8].max()) <= found["baseline"] + 0.1
