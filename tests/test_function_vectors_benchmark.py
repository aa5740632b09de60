"""The benchmark of head effects, run small: one engine call and one forward for each agree."""

import pytest

from benchmarks import function_vectors
from tests.test_benchmarks import KEYS
from tests.tiny import needs_hooked


def test_all_heads_at_once_give_what_one_forward_for_each_gives() -> None:
    record = function_vectors.record("tiny", trials=3, shots=3)
    assert set(record) >= KEYS | {"peer_measured_cells", "max_trial_diff", "cells", "trials"}
    assert record["max_abs_diff"] < 1e-4 and record["max_trial_diff"] < 1e-4
    assert record["cells"] == record["peer_measured_cells"] == 8
    assert record["peer_s"] == pytest.approx(record["peer_measured_s"], abs=1e-3)


def test_a_peer_that_ran_some_heads_is_scaled_by_its_forwards() -> None:
    record = function_vectors.record("tiny", trials=3, shots=3, peer_heads=2)
    assert record["peer_measured_cells"] == 2 and record["max_abs_diff"] < 1e-4
    # Three forwards a trial were run, nine are needed.
    assert record["peer_s"] == pytest.approx(3 * record["peer_measured_s"], abs=1e-3)
    assert record["ratio"] == pytest.approx(record["peer_s"] / record["ours_s"], rel=0.02)


def test_heads_are_chosen_evenly() -> None:
    chosen = function_vectors.evenly(4, 5, 4)
    assert len(chosen) == 4 and chosen[0] == (0, 0) and chosen[-1] == (3, 4)
    assert {layer for layer, _ in chosen} == {0, 1, 2, 3}
    assert len(function_vectors.evenly(4, 5, None)) == 20


@needs_hooked
def test_random_prompts_need_no_real_model() -> None:
    from benchmarks.patching import make

    model = make("transformer_lens", "hooked", "cpu", "tiny")
    outputs, shuffled = function_vectors.random_prompts(model, trials=3, length=7)
    ours = function_vectors.ours(model, shuffled, outputs)
    heads = function_vectors.evenly(*outputs.shape[:2], None)
    theirs = function_vectors.peer(model, shuffled, outputs, heads)
    assert float((ours.flatten(0, 1) - theirs).abs().max()) < 1e-5 and float(ours.abs().max()) > 0
