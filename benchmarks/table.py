"""Write the page of results that the documents show, from the summary of a run.

tvlens run layer_sweep --tasks all --n-dev 50 --n-test 100 --seed 0 --out runs/paper
python -m benchmarks.table runs/paper/summary.json > docs/results/layer_sweep.md
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

HEAD = """# The 18 tasks on {model}

One task vector against five demonstrations: {n_test} test prompts a task, 95 % Wilson intervals that
count distinct queries, the layer chosen on other queries. Made by

```bash
{command}
```

Means over the {n} tasks: **baseline {baseline:.2f}, hypothesis {hypothesis:.2f}, regular {regular:.2f}**;
hypothesis is {ratio:.2f} of regular. Floors: majority {majority:.2f}, query-blind {query_blind:.2f},
random vector {control:.2f}. In the table, *blind* is the query-blind floor, *random* the random vector, and
*one token* the share of the task's answers that are a single token.

| task | layer (depth) | baseline | hypothesis | regular | ratio | majority | blind | random | one token |
|---|---|---|---|---|---|---|---|---|---|
"""


def page(summaries: list[dict[str, Any]], command: str) -> str:
    """Write the table of a layer sweep over tasks as Markdown.

    Args:
        summaries: What ``tvlens run`` wrote to ``summary.json``.
        command: The commands that made it.

    Returns:
        The page.
    """
    rates = ("baseline", "hypothesis", "regular", "majority", "query_blind", "control")
    means = {name: mean(s[name] for s in summaries) for name in rates}
    first = summaries[0]
    head = HEAD.format(
        model=first["model"],
        n_test=first["n_test"],
        n=len(summaries),
        command=command,
        ratio=means["hypothesis"] / means["regular"],
        **means,
    )
    return head + "".join(_row(s) for s in summaries)


def _row(s: dict[str, Any]) -> str:
    def rate(name: str) -> str:
        return f"{s[name]:.2f} ({s[name + '_low']:.2f}-{s[name + '_high']:.2f})"

    ratio = "-" if s["ratio"] is None else f"{s['ratio']:.2f}"
    cells = [
        s["task"],
        f"{s['layer']} ({s['depth']:.2f})",
        rate("baseline"),
        rate("hypothesis"),
        rate("regular"),
        ratio,
        f"{s['majority']:.2f}",
        f"{s['query_blind']:.2f}",
        f"{s['control']:.2f}",
        f"{s['one_token_share']:.2f}",
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("summary", type=Path)
    text = (__doc__ or "").split("\n\n", 1)[1]
    commands = "\n".join(line.strip() for line in text.strip().splitlines())
    print(page(json.loads(parser.parse_args().summary.read_text()), commands), end="")
