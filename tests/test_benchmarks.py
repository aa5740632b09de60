"""Each benchmark compares two ways to the same numbers: run small, they agree."""

from benchmarks import layer_sweep


def test_layer_sweep() -> None:
    record = layer_sweep.record("tiny", n=3, repeats=1)
    assert record["max_abs_diff"] < 1e-4
    assert {"name", "ratio", "ours_s", "peer_s", "repeats", "max_abs_diff", "device"} <= set(record)
