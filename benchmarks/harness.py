"""What every benchmark shares: alternate ours and the peer, take medians, print one JSON line."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any


def compare(
    name: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    difference: Callable[[Any, Any], float],
    repeats: int,
    device: str,
    same: Callable[[Any, Any], float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Time two ways of computing the same thing, alternating, and say how far they differ.

    Args:
        name: What is compared.
        ours: Our way; on a GPU it must synchronise before it returns.
        peer: The other way.
        difference: Largest absolute difference of the two results.
        repeats: Timed runs of each, after one untimed run; with one repeat, for peers that take minutes,
            the first run is the timed one.
        device: Where it ran.
        same: Share of the two results that agree, for results that can be counted.
        **more: Further facts for the record.

    Returns:
        The record that is printed: ratio of medians (peer / ours), seconds, spread, difference.
    """
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    found: dict[str, Any] = {}
    for i in range(repeats + (repeats > 1)):
        for key, run in (("ours", ours), ("peer", peer)):
            started = time.perf_counter()
            found[key] = run()
            if i or repeats == 1:
                seconds[key].append(time.perf_counter() - started)
    gap = difference(found["ours"], found["peer"])
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        "name": name,
        "ratio": round(medians["peer"] / medians["ours"], 2),
        "ours_s": round(medians["ours"], 4),
        "peer_s": round(medians["peer"], 4),
        "ours_range_s": [round(min(seconds["ours"]), 4), round(max(seconds["ours"]), 4)],
        "peer_range_s": [round(min(seconds["peer"]), 4), round(max(seconds["peer"]), 4)],
        "repeats": repeats,
        "max_abs_diff": gap,
        "device": device,
        **({"same": round(same(found["ours"], found["peer"]), 5)} if same else {}),
        **more,
    }


def show(record: dict[str, Any], *, as_json: bool) -> None:
    """Print a record: one JSON line, or one line for people."""
    if as_json:
        print(json.dumps(record))
        return
    print(
        f"{record['name']}: {record['ratio']}x ({record['ours_s']} s against {record['peer_s']} s, "
        f"{record['repeats']} repeats, {record['device']}), largest difference "
        f"{record['max_abs_diff']:.1e}"
    )
