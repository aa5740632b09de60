"""The benchmark of attribution patching, run small: both peers patch the same cells truly."""

import pytest

from benchmarks import attribution
from tests.test_benchmarks import KEYS
from tests.tiny import needs_hooked


@needs_hooked
@pytest.mark.parametrize("cells", attribution.MAPS)
def test_both_peers_are_compared_with_the_same_estimate(cells: str) -> None:
    small = {"size": "tiny", "length": 8, "repeats": 1}
    plain, theirs = (attribution.record(cells, peer=peer, **small) for peer in attribution.PEERS)
    for record in (plain, theirs):
        assert set(record) >= KEYS | {"spearman", "pearson", "cells", "failures"}
        assert -1 <= record["spearman"] <= 1
    # Two true patchings are off from one estimate by the same.
    assert theirs["max_abs_diff"] == pytest.approx(plain["max_abs_diff"], abs=1e-4)
    assert theirs["spearman"] == plain["spearman"]
    assert plain["cells"] == {"layer_position": 16, "heads": 2}[cells]


@needs_hooked
def test_edges_are_timed() -> None:
    record = attribution.record_edges(model="gpt2", size="tiny", pairs=2, repeats=1)
    assert record["seconds"] > 0 and record["edges"] == 23 and record["pairs"] == 2
