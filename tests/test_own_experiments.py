"""A user's own experiment, in a file anywhere: read, read again, run from the terminal and in a pool."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tvlens as tv
from tvlens import experiments

SHOTS_CURVE = Path(__file__).parent.parent / "docs" / "howto" / "shots_curve.py"
OWN = """
from tvlens.experiments import experiment


@experiment("own_count")
def own_count(*, seed=0, progress=True):
    return {number} + seed
"""
SWEPT = """
import own_file
import tvlens as tv

found = tv.sweep("own_count", seeds=[0, 1], out="grid", executor=2, on_error="raise", progress=False)
print(*found.to_dataframe()["value"])
"""


pytestmark = pytest.mark.usefixtures("own_modules")


def write(folder: Path, text: str, name: str = "own_file.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    # Of one length and within a second, which compiled files do not tell apart.
    for number in (1, 2):
        assert experiments.read(write(tmp_path, OWN.format(number=number))) == "own_count"
        assert experiments.get("own_count")() == number
    renamed = OWN.format(number=3).replace('"own_count"', '"own_other"')
    assert experiments.read(str(write(tmp_path, renamed))) == "own_other"
    assert "own_count" not in experiments.names()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("own_none.py", "x = 1", "registers none"),
        ("own_two.py", OWN + OWN.replace("own_count", "own_more"), "registers own_count, own_more"),
        ("json.py", OWN, "so is .*json"),
        ("own-dash.py", OWN, "own-dash' is no module's name"),
        ("own_sweep.py", OWN.replace("own_count", "layer_sweep"), "exists already, in tvlens"),
    ],
)
def test_files_that_are_no_experiment_are_refused(
    name: str, text: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        experiments.read(write(tmp_path, text.format(number=1), name))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.py"):
        experiments.read(tmp_path / "missing.py")


@pytest.mark.slow
def test_a_file_runs_from_the_terminal(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tvlens import cli

    asked = ["--tasks", "to_upper", "--out", str(tmp_path / "found")]
    run = ["run", str(SHOTS_CURVE), "--model", "toy", *asked, "--n-test", "4", "--json"]
    done = CliRunner().invoke(cli.app, run)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["experiment"] == "shots_curve"
    saved = tv.load(tmp_path / "found" / "shots_curve-to_upper.nc")
    assert saved.data.sizes == {"shots": 6, "prompt": 4}

    swept = ["sweep", str(SHOTS_CURVE), "--models", "toy", "--set", "n_test=4", "--json"]
    done = CliRunner().invoke(cli.app, [*swept, *asked])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sweep"] == "shots_curve"


@pytest.mark.slow
def test_a_pool_started_in_a_notebook_finds_it(tmp_path: Path) -> None:
    """New processes know nothing of what a notebook imported, and have no script to run again."""
    write(tmp_path, OWN.format(number=5))
    done = subprocess.run(
        [sys.executable, "-c", SWEPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "6"]
