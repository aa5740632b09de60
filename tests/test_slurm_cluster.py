"""The Slurm of one node that other tests run on: it takes jobs, and nothing of it is left afterwards."""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import slurm_cluster


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path sockets can bear, which pytest's own may not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_single_node_takes_jobs_and_leaves_nothing_behind(short: Path) -> None:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.single_node(short) as variables:
        environment = os.environ | variables
        assert _run(environment, "srun", "hostname") == os.uname().nodename
        log, orphan = short / "job.log", short / "orphan"
        # The job ends before its child, which Slurm then no longer knows.
        stubborn = f"trap '' TERM; echo $$ > {orphan}; while :; do sleep 0.1; done"
        script = f'echo job $SLURM_JOB_ID; sh -c "{stubborn}" & sleep 0.2'.replace("$$", r"\$\$")
        job = _run(environment, "sbatch", "--parsable", f"--output={log}", f"--wrap={script}")
        _wait(lambda: orphan.exists() and orphan.read_text().endswith("\n"))
        assert log.read_text() == f"job {job}\n"
        _wait(lambda: not _run(environment, "squeue", "-h"))
        assert int(orphan.read_text()) in _processes(f"SLURM_CONF={short}")
    _wait(lambda: not _processes(f"SLURM_CONF={short}"))


def test_a_folder_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="a folder of at most 70 bytes"),
        slurm_cluster.single_node(tmp_path / ("x" * 70)),
    ):
        pass


def test_missing_names_the_programs_and_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        slurm_cluster, "_find", lambda program: None if program == "slurmd" else program
    )
    assert slurm_cluster.missing() == (
        "Slurm is not installed (no slurmd); apt-get install --no-install-recommends slurm-wlm munge"
    )
    monkeypatch.setattr(slurm_cluster, "_find", str)
    assert slurm_cluster.missing() is None


def _run(environment: dict[str, str], *command: str) -> str:
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def _processes(variable: str) -> list[int]:
    """The running processes that were started with an environment variable like this."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)
