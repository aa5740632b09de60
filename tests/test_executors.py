"""The same numbers wherever cells are computed, and no finished cell lost, whatever dies."""

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

import tvlens as tv
from tests import slurm_cluster
from tests import sweep_cells as cells
from tvlens import executors, sweeps
from tvlens.sweeps._folder import Folder
from tvlens.testing import tiny_model

ROOT = Path(__file__).parent.parent
run = partial(tv.sweep, progress=False)
GRID: dict[str, Any] = {
    "tasks": ["to_upper", "next_letter"],
    "models": {"toy": "toy", "tiny": tiny_model},
    "seeds": [0, 1],
    "n_dev": 6,
    "n_test": 8,
}


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    folder = tmp_path_factory.mktemp("serial")
    run("layer_sweep", out=folder, **GRID)
    return sweeps.join(folder)


def test_what_an_executor_may_be() -> None:
    assert executors.resolve(None) == executors.Serial()
    assert executors.resolve(2) == executors.Processes(2)
    ray = executors.Ray(workers=2)
    assert executors.resolve(ray) is ray and executors.resolve(executors.Ray) == executors.Ray()
    with ThreadPoolExecutor(1) as pool:
        assert executors.resolve(pool) == executors.Futures(pool)


def test_answers_that_are_no_futures_are_asked(tmp_path: Path) -> None:
    class Answer:
        def __init__(self, value: Any) -> None:
            self.value, self.asked = value, 0

        def done(self) -> bool:
            self.asked += 1
            return self.asked > 2

        def result(self) -> Any:
            return self.value

        def cancel(self) -> None:
            pass

    class Pool:
        def submit(self, function: Any, item: Any) -> Answer:
            return Answer(function(item))

    found = run(cells.scalar, seeds=range(3), executor=Pool(), out=tmp_path)
    assert found.counts()["done"] == 3


@pytest.mark.slow
def test_threads_share_a_model_in_hand(tmp_path: Path) -> None:
    asked = {"tasks": ["to_upper", "gerund"], "seeds": [0, 1], "n_dev": 4, "n_test": 4}
    with ThreadPoolExecutor(3) as pool:
        run("layer_sweep", models=tiny_model(), executor=pool, out=tmp_path / "threads", **asked)
    run("layer_sweep", models=tiny_model(), out=tmp_path / "serial", **asked)
    assert sweeps.join(tmp_path / "threads").identical(sweeps.join(tmp_path / "serial"))


@pytest.mark.slow
def test_processes_find_the_same_bits(serial: xr.Dataset, tmp_path: Path) -> None:
    found = run("layer_sweep", out=tmp_path, executor=2, **GRID)
    assert found.counts()["done"] == 8, found.failures()["error"].tolist()
    assert sweeps.join(tmp_path).identical(serial)
    with pytest.raises(TypeError, match="a model in hand cannot go to another process"):
        run("layer_sweep", out=tmp_path / "hand", executor=2, **{**GRID, "models": tiny_model()})


@pytest.mark.slow
def test_a_process_that_dies_ends_the_pool_and_nothing_else(tmp_path: Path) -> None:
    asked = {"seeds": range(4), "out": tmp_path}
    with pytest.raises(RuntimeError, match="What was finished is kept: run the same call again"):
        run(cells.dies, executor=1, **asked)
    assert len(Folder(tmp_path).finished()) >= 1
    assert not Folder(tmp_path).failed()


# Ray leaves files and sockets of its own open until they are collected.
quiet_ray = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


@pytest.mark.slow
@quiet_ray
def test_ray_finds_the_same_bits_with_a_worker_killed(serial: xr.Dataset, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(
        "local", num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR"
    )
    try:
        found = run("layer_sweep", out=tmp_path / "plain", executor=executors.Ray(2), **GRID)
        assert found.counts()["done"] == 8, found.failures()["error"].tolist()
        assert sweeps.join(tmp_path / "plain").identical(serial)
        marks = tmp_path / "marks"
        marks.mkdir()
        asked = {"tasks": ["gerund", "to_upper"], "seeds": range(5), "folder": str(marks)}
        found = run(cells.dies_once, out=tmp_path / "once", executor=executors.Ray(2), **asked)
        assert len(list(marks.iterdir())) == 2
        assert found.data["value"].values.tolist() == [[0, 1, 2, 3, 4]] * 2
        found = run(
            cells.dies, seeds=range(3), out=tmp_path / "ever", executor=executors.Ray(2, retries=1)
        )
        assert found.counts() == {"done": 2, "failed": 1, "missing": 0}
        assert "its worker died 2 times" in found.failures()["error"][0]
        with pytest.raises(ValueError, match="this Ray cluster has 2 CPUs and 0 GPUs, room for 0"):
            run(cells.scalar, out=tmp_path / "gpu", executor=executors.Ray(1, gpus=1))
    finally:
        ray.shutdown()


@pytest.mark.slow
@quiet_ray
def test_ray_loses_a_node_and_no_cell(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = (
        "import sys, threading, time\n"
        "import ray, tvlens as tv\n"
        "from pathlib import Path\n"
        "from ray.cluster_utils import Cluster\n"
        "from tests.sweep_cells import slowly\n"
        "from tvlens.executors import Ray\n"
        "out = Path(sys.argv[1])\n"
        "head = {'num_cpus': 1, 'include_dashboard': False}\n"
        "cluster = Cluster(initialize_head=True, head_node_args=head)\n"
        "second = cluster.add_node(num_cpus=1)\n"
        "ray.init(address=cluster.address, log_to_driver=False, logging_level='ERROR')\n"
        "assert len([n for n in ray.nodes() if n['Alive']]) == 2\n"
        "def lose():\n"
        "    while not list(out.glob('cells/*/*.json')):\n"
        "        time.sleep(0.02)\n"
        "    cluster.remove_node(second, allow_graceful=False)\n"
        "    cluster.add_node(num_cpus=1)\n"
        "threading.Thread(target=lose).start()\n"
        "asked = {'tasks': ['gerund', 'to_upper'], 'seeds': range(8)}\n"
        "found = tv.sweep(slowly, out=out, executor=Ray(2), progress=False, **asked)\n"
        "until = time.monotonic() + 40\n"
        "while (dead := sum(not n['Alive'] for n in ray.nodes())) == 0 and time.monotonic() < until:\n"
        "    time.sleep(0.2)\n"
        "Path(sys.argv[2]).write_text(f\"{found.counts()['done']} {dead}\")\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "out"), str(tmp_path / "said")],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "said").read_text() == "16 1"
    run(
        cells.numbers, tasks=["gerund", "to_upper"], seeds=range(8), size=4, out=tmp_path / "serial"
    )
    assert sweeps.join(tmp_path / "out").identical(sweeps.join(tmp_path / "serial"))


@pytest.mark.slow
def test_slurm_finds_the_same_bits_and_says_which_job_died(
    serial: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    monkeypatch.chdir(ROOT)
    # Sockets want a short path.
    with (
        tempfile.TemporaryDirectory() as short,
        slurm_cluster.single_node(Path(short)) as environment,
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(executors, "_LATE", 1.0)
        slurm = executors.Slurm(2, tmp_path / "logs", minutes=20)
        found = run("layer_sweep", out=tmp_path / "out", executor=slurm, **GRID)
        assert found.counts()["done"] == 8, found.failures()["error"].tolist()
        assert sweeps.join(tmp_path / "out").identical(serial)
        found = run(cells.dies, seeds=range(5), out=tmp_path / "dies", executor=slurm)
        # The first job has seeds 0 to 2, and dies with 1; 2 was not begun.
        assert found.data["state"].values.tolist() == ["done", "failed", "missing", "done", "done"]
        assert "ended without a result" in found.failures()["error"][0]
        found = run(cells.dies, seeds=range(5), out=tmp_path / "dies")
        assert found.counts() == {"done": 4, "failed": 1, "missing": 0}


@pytest.mark.slow
def test_submitits_local_jobs_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.chdir(ROOT)
    asked = {"tasks": ["gerund"], "seeds": range(4)}
    jobs = executors.Slurm(2, tmp_path / "logs", cluster="local")
    run(cells.numbers, out=tmp_path / "jobs", executor=jobs, **asked)
    run(cells.numbers, out=tmp_path / "here", **asked)
    assert sweeps.join(tmp_path / "jobs").identical(sweeps.join(tmp_path / "here"))


def test_packages_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, where in (("ray", executors.Ray()), ("submitit", executors.Slurm(1, tmp_path))):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"needs {name}.*pip install 'tvlens\["):
            run(cells.scalar, out=tmp_path / name, executor=where)


def _contents(folder: Path) -> dict[str, str]:
    """Every finished cell with a hash of its files."""
    found = {}
    for record in folder.glob("cells/*/[!.]*.json"):
        parts = sorted(record.parent.glob(f"{record.stem}*"))
        found[record.stem] = hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()
    return found


def _compute(kind: str, folder: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    if kind == "numbers":
        run(cells.numbers, tasks=["to_upper", "gerund"], seeds=range(400), out=folder)
    else:
        run(
            "layer_sweep",
            **{**GRID, "models": {"tiny": tiny_model}, "seeds": range(12)},
            out=folder,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("numbers", 20), ("layer_sweep", 3)])
def test_a_killed_sweep_loses_no_finished_cell(kind: str, kills: int, tmp_path: Path) -> None:
    # A server that has everything imported forks each run, which then begins at once.
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["tests.test_executors", "tvlens.experiments.layer_sweep"])
    draw, killed, before = random.Random(0), 0, {}
    folder = tmp_path / "killed"
    while killed < kills:
        process = start.Process(target=_compute, args=(kind, folder))
        process.start()
        n = len(before)
        while process.is_alive() and len(_contents(folder)) == n:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
        now = _contents(folder)
        assert before.items() <= now.items(), "a finished cell was lost or changed"
        before = now
    total = 800 if kind == "numbers" else 24
    assert 0 < len(before) < total, "the kills were to come while the sweep runs"
    _compute(kind, folder)
    after = _contents(folder)
    assert before.items() <= after.items() and len(after) == total
    _compute(kind, tmp_path / "undisturbed")
    assert sweeps.join(folder).identical(sweeps.join(tmp_path / "undisturbed"))
    assert not Folder(folder).failed()


@pytest.mark.slow
def test_two_processes_write_one_sweep_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.sweep_cells", str(tmp_path), "40"]
    both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [one.wait(timeout=120) for one in both] == [0, 0]
    assert sweeps.status(tmp_path)["done"].tolist() == [80]
    assert sweeps.join(tmp_path)["x"].shape == (2, 40, 50, 50)
