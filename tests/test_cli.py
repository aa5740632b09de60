"""The command line, as a user would call it; on a tiny model, which takes the real one's place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tvlens as tv
from tests import tiny
from tvlens import cli
from tvlens.cli._run import DEMO_TASKS
from tvlens.cli._shared import tasks_of

SUMMARY = {
    "task",
    "baseline",
    "hypothesis",
    "regular",
    "majority",
    "query_blind",
    "control",
    "layer",
    "seconds",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the CLI load a tiny model by the name smollm2-135m."""
    model = tiny.model("llama")
    monkeypatch.setattr("tvlens.models.load_model", lambda name: model)
    return "smollm2-135m"


def invoke(*arguments: str) -> object:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
def test_demo_writes_everything(small: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = invoke("demo", "--out", str(out), "--n-dev", "3", "--n-test", "4")
    names = {p.name for p in out.iterdir()}
    for task in DEMO_TASKS:
        assert {f"layer_sweep-{task}.nc", f"layer_sweep-{task}.safetensors"} <= names
        assert task in result.output
        vector = tv.load(out / f"layer_sweep-{task}.safetensors")
        assert vector.made["task"] == task
        assert tv.load(out / f"layer_sweep-{task}.nc").provenance["task"] == task
    summary = json.loads((out / "summary.json").read_text())
    assert [s["task"] for s in summary] == list(DEMO_TASKS) and set(summary[0]) >= SUMMARY
    assert {s["family"] for s in summary} == {
        "algorithmic",
        "translation",
        "linguistic",
        "knowledge",
    }
    assert "report.html" in names and names == {
        *(f"layer_sweep-{t}{s}" for t in DEMO_TASKS for s in (".nc", ".safetensors")),
        "summary.json",
        "page.md",
        "report.html",
    }


def test_run_json_is_one_object_and_nothing_else(small: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps({c: c.upper() for c in "abcdefghij"}))
    for tasks, count in (("antonyms,gerund", 2), (f"antonyms, {file}", 2), (str(file), 1)):
        result = invoke(
            *(
                "run",
                "layer_sweep",
                "--tasks",
                tasks,
                "--n-dev",
                "2",
                "--n-test",
                "3",
                "--shots",
                "2",
            ),
            *("--template", "Q: {x}\\nA: {y}\\n", "--seed", "4", "--json"),
        )
        document = json.loads(result.stdout)
        assert document["experiment"] == "layer_sweep" and document["seed"] == 4
        assert len(document["results"]) == count and set(document["results"][0]) >= SUMMARY


def test_run_prints_a_table_and_writes_files(small: str, tmp_path: Path) -> None:
    out = tmp_path / "o"
    result = invoke(
        "run",
        "layer_sweep",
        "--tasks",
        "antonyms",
        "--n-dev",
        "2",
        "--n-test",
        "2",
        "--out",
        str(out),
    )
    assert "antonyms" in result.stdout and "thesis" in result.stdout
    assert (out / "report.html").is_file()


def test_all_means_the_papers_18() -> None:
    from tvlens.tasks import PAPER_TASKS

    assert [task.name for task in tasks_of("all")] == list(PAPER_TASKS)
    assert len(PAPER_TASKS) == 18


def test_a_study_prints_json_where_a_number_is_infinite() -> None:
    """In so few rounds no class switches (NaN), nor is it said to (infinity)."""
    few = ("rounds=300", "seeds=1", "label_noises=0.0", "p_highs=0.9")
    settings = [part for setting in few for part in ("--set", setting)]
    document = json.loads(invoke("icl", "run", "theory", "--json", *settings).stdout)
    assert document["study"] == "theory" and document["loss"] > 0
    assert document["C_H predicted"] > 300
    assert document["C_H exact"] is None and document["ratio at 0.5"] is None


FEW = ("--set", "sizes=4", "--set", "seeds=1", "--set", "steps=2", "--set", "n_items=5")


def test_a_studys_folder_is_its_own(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    invoke("icl", "run", "noise", *FEW, "--set", "trained=transformer", "--out", str(out))
    assert {"noise.nc", "report.html", "summary.json"} <= {path.name for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"holds the report of noise.*Nearest: --out .*theory"):
        invoke("icl", "run", "theory", "--out", str(out))
    with pytest.raises(ValueError, match="--out takes a folder; .* is a file"):
        invoke("icl", "run", "noise", "--out", str(out / "noise.nc"))


def test_settings_of_a_study_are_shown_and_checked() -> None:
    from tvlens.icl import studies

    for name in studies.names():
        rows = json.loads(invoke("icl", "show", name, "--json").stdout)
        assert rows and all(row["what"] and row["quick"] and row["paper"] for row in rows), name
    with pytest.raises(ValueError, match="preset is no setting for --set; use --preset"):
        invoke("icl", "run", "noise", "--set", "preset=paper")
    with pytest.raises(ValueError, match="unknown setting of noise 'size'. Nearest: sizes"):
        invoke("icl", "run", "noise", "--set", "size=4")
    with pytest.raises(ValueError, match="theory does not train, and takes no --device"):
        invoke("icl", "run", "theory", "--device", "cpu")


def test_a_stopped_study_says_what_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.icl import studies

    def stopped(*, preset: str, seed: int, progress: bool, out: Path | None = None) -> None:
        raise KeyboardInterrupt

    studies.discover()
    monkeypatch.setitem(studies.REGISTRY.functions, "noise", stopped)
    for more, said in (
        ([], "nothing was saved"),
        (["--out", str(tmp_path)], "goes on from what was saved"),
    ):
        result = CliRunner().invoke(cli.app, ["icl", "run", "noise", *more])
        assert result.exit_code == 130 and said in " ".join(result.output.split())


def test_lists() -> None:
    assert "country_capital" in invoke("tasks", "--family", "knowledge").output
    tasks = json.loads(invoke("tasks", "--json").output)
    assert {"task", "family", "size", "example"} <= set(tasks[0])
    models = json.loads(invoke("models", "--json").output)
    assert "smollm2-135m" in json.dumps(models)
    assert tv.__version__ in invoke("--version").output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "layer_swep"], "unknown experiment 'layer_swep'. Nearest: layer_sweep"),
        (["run", "layer_sweep", "--tasks", "to_uper"], "unknown task 'to_uper'. Nearest: to_upper"),
        (["run", "layer_sweep", "--tasks", "absent.json"], "absent.json"),
        (["run", "layer_sweep", "--tasks", ","], "--tasks takes all, names with commas, or files"),
        (["run", "layer_sweep", "--tasks", "to_upper", "--model", "smollm2"], "smollm2-135m"),
        (["tasks", "--family", "lingustic"], "linguistic"),
    ],
)
def test_mistakes_get_one_line_and_an_exit_code(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tvlens.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.split()), done.stderr


@pytest.mark.slow
def test_compare_keeps_its_parts_and_refuses_those_of_other_settings(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", "--tasks", "to_upper,next_letter", "--methods", "mean, hendel"]
    arguments += ["--shots", "2", "--n-dev", "6", "--n-test", "4", "--out", str(tmp_path)]
    first = invoke(*arguments)
    assert "hendel" in first.output and (tmp_path / "report.html").is_file()
    assert {p.name for p in tmp_path.glob("comparison-*.nc")} == {
        "comparison-to_upper-0.nc",
        "comparison-next_letter-0.nc",
    }
    found = tv.load(tmp_path / "comparison.nc")
    assert found.by_task().index.tolist() == ["to_upper", "next_letter"]

    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("what is in the folder was run again")

    monkeypatch.setattr("tvlens.experiments.compare.fit", never)
    again = json.loads(invoke(*arguments, "--json").stdout)
    assert again["hendel"] == pytest.approx(found.means().loc["hendel", "accuracy"])
    with pytest.raises(ValueError, match="made with n_test 4, asked for 5"):
        invoke(*arguments[:-3], "5", *arguments[-2:])
    with pytest.raises(ValueError, match="whole numbers"):
        invoke("compare", "--seeds", "one")


@pytest.mark.slow
def test_experiments_over_several_tasks_run_once(small: str, tmp_path: Path) -> None:
    arguments = [
        "run",
        "conflict",
        "--tasks",
        "to_upper,next_letter",
        "--shots",
        "2",
        "--n-dev",
        "4",
    ]
    result = invoke(*arguments, "--set", "n=4", "--set", "min_queries=4", "--out", str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {
        "conflict.nc", "summary.json", "page.md", "report.html",
    }  # fmt: skip
    found = tv.load(tmp_path / "conflict.nc")
    assert found.provenance["n"] == 4 and found.provenance["min_queries"] == 4
    assert found.finding() in (tmp_path / "page.md").read_text()
    assert found.finding() in " ".join(result.stdout.split())
    with pytest.raises(ValueError, match="unknown setting of conflict 'n_dumy'. Nearest: n_dummy"):
        invoke(*arguments, "--set", "n_dumy=4")
    with pytest.raises(ValueError, match="--set takes name=value"):
        invoke(*arguments, "--set", "n")
    for reserved in ("model=x", "tasks=x", "progress=false"):
        with pytest.raises(ValueError, match="unknown setting of conflict"):
            invoke(*arguments, "--set", reserved)
