"""A real Slurm of one node on the loopback address, for the time of a test.

`munged`, `slurmctld` and `slurmd` run as the user who runs the tests, on free ports, with their
configuration, key, sockets, state and logs in one folder; nothing outside it is used, so that a machine's own
Slurm is left alone. Jobs are contained by their process tree (no cgroups), and no accounting database runs:
`sacct` fails here as it does on a cluster without one.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CPUS = 2
START_S = 30.0
STOP_S = 15.0
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scancel")
_NODE = "node1"
# A socket's path holds at most 107 bytes, and slurmd adds "/spool/node1_<job>.<step>" to the folder.
_LONGEST_FOLDER = 70

# KillWait: a job under submitit ignores SIGTERM, so that a scancel lasts longer than this (30 s unless told).
# cred_expire: a requeued job waits this long (120 s unless told).
# batch_sched_delay, sched_interval: jobs start within a second, not up to 3 s later.
# config_overrides: the node has the size given here, whatever the machine's.
_CONFIGURATION = """\
ClusterName=tvlens
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
{listen}
ProctrackType=proctrack/linuxproc
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8192 State=UNKNOWN
PartitionName=all Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""
# The daemons then listen on the address of the host's name and nowhere else.
_LOOPBACK_ONLY = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"


def missing() -> str | None:
    """What `single_node` needs and is not installed, as a reason to skip a test; None if all is there."""
    absent = [program for program in _PROGRAMS if _find(program) is None]
    return f"Slurm is not installed (no {', '.join(absent)}); {INSTALL}" if absent else None


@contextlib.contextmanager
def single_node(folder: Path) -> Iterator[dict[str, str]]:
    """Run a Slurm of one node with two CPUs; yields the environment variables that its commands need.

    Raises:
        ValueError: `folder` is too long a path for the sockets in it.
        RuntimeError: A daemon stopped, or the node was not idle in time; the message ends with the logs.
    """
    folder = folder.absolute()
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        raise ValueError(
            f"Slurm's sockets need a folder of at most {_LONGEST_FOLDER} bytes, not {folder}"
        )
    _write(folder)
    variables = {"SLURM_CONF": f"{folder}/slurm.conf"}
    with contextlib.ExitStack() as daemons:
        munge = folder / "munge"
        # --force: a folder of tests may be open to others, which munged otherwise refuses.
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        command = ["munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files]
        running = {"munged": daemons.enter_context(_daemon(command, folder, variables))}
        _wait((munge / "socket").exists, "munged to listen", running, folder)
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", _NODE]):
            running[command[0]] = daemons.enter_context(_daemon(command, folder, variables))
        _wait(lambda: _state(variables) == "idle", "the node to be idle", running, folder)
        daemons.callback(_end_jobs, variables)
        yield variables


def _write(folder: Path) -> None:
    """Write the configuration and the key that the daemons share."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True, mode=0o700)
    key = os.open(folder / "munge" / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(key, "wb") as file:
        file.write(os.urandom(1024))
    controller_port, node_port = _free_ports(2)
    text = _CONFIGURATION.format(
        listen=_LOOPBACK_ONLY if _host_is_loopback() else "",
        host=socket.gethostname().split(".")[0],
        user=pwd.getpwuid(os.getuid()).pw_name,
        folder=folder,
        node=_NODE,
        cpus=CPUS,
        controller_port=controller_port,
        node_port=node_port,
    )
    (folder / "slurm.conf").write_text(text)
    # From 23.11 on slurmd insists on cgroups unless told; before, the word is unknown.
    if _version() >= (23, 11):
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


@contextlib.contextmanager
def _daemon(
    command: list[str], folder: Path, variables: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon in the foreground of a session of its own, until the end."""
    program, *arguments = command
    # Where the tests themselves run in a job, the daemons are no part of it.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_")
    }
    with (folder / f"{program}.out").open("wb") as output:
        process = subprocess.Popen(
            [_find(program) or program, *arguments],
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(
    done: Callable[[], bool], what: str, running: dict[str, subprocess.Popen[bytes]], folder: Path
) -> None:
    """Wait until `done`, a daemon has stopped, or the time is up."""
    end = time.monotonic() + START_S
    while not done():
        stopped = [name for name, process in running.items() if process.poll() is not None]
        if stopped or time.monotonic() > end:
            why = f"{', '.join(stopped)} stopped" if stopped else f"{START_S:.0f} s passed"
            logs = [
                f"{file.name}: {file.read_text()[-2000:]}" for file in sorted(folder.glob("*.out"))
            ]
            raise RuntimeError("\n".join([f"{why} while waiting for {what}", *logs]))
        time.sleep(0.05)


def _state(variables: dict[str, str]) -> str:
    return _ask(variables, "sinfo", "-h", "-o", "%T")


def _end_jobs(variables: dict[str, str]) -> None:
    """End every job, those that wait first, so that none of them starts in between.

    A scancel of a running job that ignores SIGTERM takes 7 s; once its processes are killed it ends at once.
    """
    end = time.monotonic() + STOP_S
    while True:
        jobs = _ask(variables, "squeue", "-h", "-o", "%A").split()
        if jobs:
            _ask(variables, "scancel", "--state=PENDING", *dict.fromkeys(jobs))
        _end_processes(variables)
        if not jobs or time.monotonic() > end:
            return
        time.sleep(0.1)


def _end_processes(variables: dict[str, str]) -> None:
    """Kill the jobs' processes, those too whose parent died: without cgroups they are lost to Slurm."""
    ours = {f"{name}={value}".encode() for name, value in variables.items()}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_bytes().split(b"\0")
            if ours <= set(environment) and any(
                entry.startswith(b"SLURM_JOB_ID=") for entry in environment
            ):
                os.kill(int(process.name), signal.SIGKILL)


def _ask(variables: dict[str, str], program: str, *arguments: str) -> str:
    """What one of Slurm's commands answers, without spaces at the ends; nothing where it fails."""
    command = [_find(program) or program, *arguments]
    environment = os.environ | variables
    answer = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=START_S
    )
    return answer.stdout.strip()


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _version() -> tuple[int, ...]:
    """Slurm's year and month, say (22, 5)."""
    return tuple(map(int, re.findall(r"\d+", _ask({}, "slurmd", "-V"))[:2]))


def _host_is_loopback() -> bool:
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
