"""A page says what results say, in Markdown that renders."""

import pandas as pd
import pytest

import tvlens as tv
from tests import tiny
from tvlens.pages import cells, page


def test_a_page_holds_command_finding_and_tables() -> None:
    small = {"shots": 2, "n_dev": 3, "n_test": 4, "progress": False}
    found = [
        tv.layer_sweep(tiny.model("llama"), name, **small) for name in ("to_upper", "antonyms")
    ]
    text = page(found, title="Two tasks", command="tvlens run layer_sweep")
    assert (
        text.startswith("# Two tasks\n\nMade on cpu on ") and "\ntvlens run layer_sweep\n" in text
    )
    for result in found:
        assert f"> {result.finding()}" in text and f"## {result.title}" in text
    assert text.count(found[0].method) == 1
    head = next(line for line in text.splitlines() if line.startswith("| task"))
    rows = [line for line in text.splitlines() if line.startswith(("| to_upper", "| antonyms"))]
    assert len(rows) == 2 and {line.count(" | ") for line in rows} == {head.count(" | ")}
    alone = page(found[0])
    assert alone.startswith(f"# {found[0].title}") and "```" not in alone
    with pytest.raises(ValueError, match="at least one result"):
        page([])


def test_cells_are_written_for_reading() -> None:
    frame = pd.DataFrame(
        {"a_b": [0.5, None], "a_b_low": [0.25, None], "a_b_high": [0.75, None], "n": [1234, 5]},
        index=pd.Index(["x|y", "z"], name="task"),
    )
    assert cells(frame) == [
        ["task", "a b", "n"],
        ["x|y", "0.50 (0.25 to 0.75)", "1,234"],
        ["z", "", "5"],
    ]


@pytest.mark.slow
def test_every_experiment_with_tables_fills_a_page() -> None:
    model, small = tiny.model("llama"), {"shots": 2, "progress": False}
    letters = ["to_upper", "next_letter"]
    found = [
        tv.conflict(model, letters, n=4, n_dev=4, **small),
        tv.geometry(model, letters, n=4, n_dev=4, **small),
        tv.variance(model, "to_upper", shots=[0, 1, 2], n=4, n_dev=4, progress=False),
    ]
    for result in found:
        text, tables = page(result), result.tables()
        assert tables and result.finding() in text
        for caption, frame in tables.items():
            assert f"**{caption}**" in text and len(frame)
            head, *rows = cells(frame)
            assert len(rows) == len(frame) and not {"low", "high"} & set(head)
            assert any(" to " in cell for row in rows for cell in row) or "nearest" not in head
