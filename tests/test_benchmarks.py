"""Each benchmark compares two ways to the same numbers: run small, they agree."""

from benchmarks import layer_sweep, table


def test_layer_sweep() -> None:
    record = layer_sweep.record("tiny", n=3, repeats=1)
    assert record["max_abs_diff"] < 1e-4
    assert {"name", "ratio", "ours_s", "peer_s", "repeats", "max_abs_diff", "device"} <= set(record)


def test_table_holds_every_task_and_the_means() -> None:
    rates = ("baseline", "hypothesis", "regular", "majority", "query_blind", "control")
    one = {"task": "a", "model": "m", "layer": 3, "depth": 0.5, "ratio": 0.5, "n_test": 9}
    one |= {"one_token_share": 1.0}
    one |= {f"{r}{e}": 0.25 for r in rates for e in ("", "_low", "_high")}
    two = one | {"task": "b", "regular": 0.75, "ratio": None}
    text = table.page([one, two], "the command")
    assert "the command" in text and "regular 0.50" in text and "is 0.50 of regular" in text
    assert "| a | 3 (0.50) | 0.25 (0.25-0.25) |" in text and "| b |" in text
