"""Write the page of a comparison of methods that the documents show.

tvlens compare --seeds 0,1,2 --out runs/compare
python -m benchmarks.compare_table runs/compare/comparison.nc > docs/results/compare.md
"""

import argparse

import pandas as pd

import tvlens as tv

HEAD = """# Eight ways to make a task vector, on {model}

{n} tasks, {n_test} test prompts each, {n_seeds} seeds, made on {device} with torch {torch} on {date} by

```bash
tvlens compare --seeds {seeds} --out runs/compare
python -m benchmarks.compare_table runs/compare/comparison.nc > docs/results/compare.md
```

> {finding}

Methods see {n_dev} dev prompts of {shots} demonstrations; neither the queries nor the demonstrations there
are test queries. Layers are chosen on them. `hendel` also reads each test prompt's own demonstrations,
`mean_more` has up to 20 a prompt, and head effects come from 125 further dev prompts of 10. *Random* has the
layer and length of the first method's vectors. 95 % bootstrap intervals over seeds and distinct queries;
*seeds* is the lowest and the highest of the seeds' means, *of regular* the share of the accuracy with
demonstrations, *wins* on how many tasks a method is at least as good as these, *KL* the divergence from the
prediction with demonstrations in nats, *forwards* prompts through the model (a training step counts three
times) and *seconds*, both for one task; head effects are measured once, for both function vectors, and
their seconds stand with the first.

"""


def row(*cells: object) -> str:
    """One line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def page(result: "tv.Result") -> str:
    """Write the tables of a comparison as Markdown.

    Args:
        result: What ``tvlens compare`` wrote to ``comparison.nc``.

    Returns:
        The page.
    """
    made, means = result.provenance, result.means()  # pyright: ignore
    head = HEAD.format(
        model=made["model"], n=result.data.sizes["task"], n_test=made["n_test"],
        n_seeds=result.data.sizes["seed"], device=made["model_facts"]["device"],
        torch=made["versions"]["torch"],
        date=str(made["created"])[:10], seeds=",".join(map(str, result.data["seed"].values)),
        finding=result.finding(), n_dev=made["n_dev"], shots=made["shots"],
    )  # fmt: skip
    lines = [
        row("run", "accuracy", "seeds", "of regular", "wins", "KL", "forwards", "seconds"),
        "|" + "---|" * 8,
    ]
    for name, each in means.iterrows():
        cost = [f"{each['forwards']:,.0f}", f"{each['seconds']:.1f}"]
        lines.append(
            row(
                name, f"{each['accuracy']:.3f} ({each['low']:.3f}-{each['high']:.3f})",
                f"{each['lowest']:.3f}-{each['highest']:.3f}", f"{each['of_regular']:.2f}",
                f"{each['wins']:.0f}", f"{abs(each['kl']):.2f}",
                *(cost if pd.notna(each["forwards"]) else ("", "")),
            )
        )  # fmt: skip
    lines += ["", "## By task", "", *_frame(result.by_task(), "task")]  # pyright: ignore
    lines += ["", "## Elsewhere", "", ELSEWHERE, "", *_frame(result.elsewhere(), "writer")]  # pyright: ignore
    return head + "\n".join(lines) + "\n"


ELSEWHERE = """The same vectors where they were not made for: in prompts that have demonstrations, and in
other templates without any; accuracy. *unrelated KL*: by how many nats the prediction at the end of
unrelated text moves."""


def _frame(frame: pd.DataFrame, name: str) -> list[str]:
    columns = [str(column).replace("_", " ") for column in frame.columns]
    return [
        row(name, *columns),
        "|" + "---|" * (len(columns) + 1),
        *(
            row(index, *(f"{v:.2f}" for v in each))
            for index, each in zip(frame.index, frame.values, strict=True)
        ),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    print(page(tv.load(parser.parse_args().path)), end="")
