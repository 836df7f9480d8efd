"""Two real SLURM clusters on this machine, one with accounting and one without, for the tests of this folder."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "slurm" / "devcluster"
# A place and ports beside those of the cluster that somebody works with, which is left alone.
PLACE = Path(os.environ.get("FINLLM_DEVCLUSTER", "/tmp/finllm-devcluster") + "-tests")
PORT = int(os.environ.get("FINLLM_DEVCLUSTER_PORT", "16800")) + 200
PATIENCE = 120.0
"""Seconds for what takes a few on an idle machine; other tests have the cores too."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    accounting: bool

    @property
    def conf(self) -> Path:
        """What SLURM_CONF must be for SLURM's commands to reach it."""
        return (PLACE if self.accounting else PLACE.with_name(f"{PLACE.name}-bare")) / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a command that is to reach it: the one of this process, and SLURM_CONF."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    @property
    def name(self) -> str:
        """Its ClusterName, which its jobs find in SLURM_CLUSTER_NAME."""
        return self.settings(self.conf.read_text())["ClusterName"]

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What up, down or node says for this cluster."""
        option = [] if self.accounting else ["--no-accounting"]
        environment = {**os.environ, "FINLLM_DEVCLUSTER": str(PLACE), "FINLLM_DEVCLUSTER_PORT": str(PORT)}
        return subprocess.run(
            [SCRIPTS / name, *option, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    def ask(self, *command: str) -> str:
        """What one of SLURM's commands prints."""
        return subprocess.run(command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def sbatch(self, body: str, folder: Path, *options: str) -> int:
        """The number of a new job; all its attempts write to `folder`/NUMBER.out."""
        command = ["sbatch", "--parsable", f"--output={folder}/%j.out", "--open-mode=append", *options]
        done = subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, input=f"#!/bin/bash\n{body}\n"
        )
        return int(done.stdout)

    def show(self, job: int) -> dict[str, str]:
        """What scontrol knows of a job, also for an hour after its end: JobState, Restarts, NodeList, ..."""
        return self.settings(self.ask("scontrol", "show", "job", "-o", str(job)).replace(" ", "\n"))

    @staticmethod
    def settings(text: str) -> dict[str, str]:
        """The lines KEY=VALUE of a text."""
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def wait(self, job: int, state: str, restarts: int = 0, seconds: float = PATIENCE) -> dict[str, str]:
        """What scontrol knows of the job once it is in the state, after so many restarts at least."""

        def there() -> bool:
            known = self.show(job)
            return known["JobState"] == state and int(known["Restarts"]) >= restarts

        if not wait_until(there, seconds):
            pytest.fail(f"job {job} is not {state} with {restarts} restart(s) after {seconds:.0f} s: {self.show(job)}")
        return self.show(job)

    def save(self, job: int) -> None:
        """Returns once slurmctld has the job as it is now on its disk: it saves every 5 s, and a killed one forgets the rest."""
        mark = f"saved-{job}-{time.monotonic_ns()}"
        self.ask("scontrol", "update", f"JobId={job}", f"Comment={mark}")
        file = self.conf.parent / "state" / "job_state"
        assert wait_until(lambda: file.is_file() and mark.encode() in file.read_bytes()), f"{file} lacks job {job}"

    def processes(self, *variables: str) -> dict[int, str]:
        """Process id and command line of what this cluster's jobs have started and that lives.

        Given NAME=VALUE, only those that have it in their environment.
        """
        marks = {variable.encode() for variable in (f"SLURM_CLUSTER_NAME={self.name}", *variables)}
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            if marks.issubset(environment) and (command := command_of(int(entry.name))):
                found[int(entry.name)] = command
        return found

    def orphans(self) -> dict[int, str]:
        """Those of its processes whose job has left the queue."""
        before = self.processes()
        alive = [self.processes(f"SLURM_JOB_ID={job}") for job in self.ask("squeue", "-h", "-o", "%A").split()]
        return {pid: command for pid, command in before.items() if not any(pid in mine for mine in alive)}

    def clear(self) -> dict[int, str]:
        """Ends all jobs, and returns the processes that outlive them, which it then kills."""
        self.ask("scancel", "--quiet", "--user=root")
        # A step that ignores SIGTERM has 30 s (KillWait), and a job waits for whatever holds its step's output open.
        if wait_until(lambda: not self.ask("squeue", "-h"), 60):
            wait_until(lambda: not self.processes(), 10)
        left = self.processes()
        for process in left:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGKILL)
        assert wait_until(lambda: not self.ask("squeue", "-h")), self.ask("squeue")
        return left


def command_of(process: int) -> str:
    """The process's command line; empty for one that has ended, even if nobody has waited for it."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


@pytest.fixture(scope="session")
def clusters() -> Iterator[None]:
    """One test session at a time has the clusters: another one waits here."""
    with PLACE.with_suffix(".session").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def started(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster while it is up; CI must have one, elsewhere a machine that cannot have one skips."""
    cluster.script("down")  # what a session that was killed has left
    done = cluster.script("up")
    if done.returncode == 3 and not os.environ.get("CI"):
        pytest.skip(f"needs a SLURM cluster; {done.stderr.strip()}")
    if done.returncode:
        pytest.fail(f"slurm/devcluster/up failed: {done.stderr}")
    yield cluster
    done = cluster.script("down")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def cluster(clusters: None) -> Iterator[Cluster]:  # noqa: ARG001 -- holds the lock
    """A cluster with accounting."""
    yield from started(Cluster(accounting=True))


@pytest.fixture(scope="session")
def bare_cluster(clusters: None) -> Iterator[Cluster]:  # noqa: ARG001 -- holds the lock
    """A cluster without accounting, where sacct fails."""
    yield from started(Cluster(accounting=False))


@pytest.fixture(autouse=True)
def on_cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's SLURM_CONF is its cluster's, and no job nor process of a job outlives the test."""
    name = next((name for name in ("bare_cluster", "cluster") if name in request.fixturenames), None)
    if name is None:
        yield
        return
    cluster: Cluster = request.getfixturevalue(name)
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    yield
    left = cluster.clear()
    if left:
        pytest.fail(f"these processes outlived their jobs: {left}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder are marked `slurm`."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("slurm")
