"""What the cluster of slurm/devcluster must do, for the tests that run on it to mean something."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from slurm.conftest import SCRIPTS, Cluster, command_of, wait_until

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
# Says where and in which attempt it runs, then waits.
WAITING = 'echo "attempt ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"; srun sleep 600'
REFUSED = {
    "partition": ("--partition=nowhere", "Invalid partition name specified"),
    "account": ("--account=nobody", "Invalid account or account/partition combination specified"),
    "qos": ("--qos=none", "Invalid qos specification"),
    "gpus": ("--gpus-per-node=3", "Requested node configuration is not available"),
    "time": ("--partition=short --time=10", "Requested time limit is invalid"),
    "memory": ("--mem=17G", "Memory specification can not be satisfied"),
    "constraint": ("--constraint=a100", "Invalid feature specification"),
}


def test_a_job_of_two_nodes_runs_on_both_at_once_with_their_gpus(cluster: Cluster, tmp_path: Path) -> None:
    """Each task sees its node's name, which is an address, and the GPU that was asked for."""
    body = "srun bash -c 'echo $SLURMD_NODENAME $(getent ahostsv4 $SLURMD_NODENAME | head -n 1 | cut -d\" \" -f1) $CUDA_VISIBLE_DEVICES'"
    job = cluster.sbatch(body, tmp_path, *TWO_NODES, "--gpus-per-node=1")
    cluster.wait(job, "COMPLETED")
    assert sorted((tmp_path / f"{job}.out").read_text().splitlines()) == ["node1 127.0.0.1 0", "node2 127.0.0.1 0"]


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_no_node_or_account_allows_is_refused(cluster: Cluster, tmp_path: Path, options: str, words: str) -> None:
    """Sbatch itself refuses, in its own words."""
    with pytest.raises(subprocess.CalledProcessError) as refused:
        cluster.sbatch("true", tmp_path, *options.split())
    assert words in refused.value.stderr


def test_a_known_account_and_qos_are_taken(cluster: Cluster, tmp_path: Path) -> None:
    """The refusals above are not refusals of everything."""
    job = cluster.sbatch("true", tmp_path, "--account=research", "--qos=batch", "--gpus-per-node=2", "--mem=16000M")
    cluster.wait(job, "COMPLETED")
    assert wait_until(lambda: "COMPLETED|batch|research" in cluster.ask("sacct", "-XnPo", "state,qos,account"))


@pytest.mark.slow
def test_requeued_and_preempted_jobs_start_again_in_seconds(cluster: Cluster, tmp_path: Path) -> None:
    """After a requeue by hand, and one by a job of the partition urgent that wants the node: 120 s on other clusters."""
    requeued = cluster.sbatch(WAITING, tmp_path, "--nodelist=node1")
    preempted = cluster.sbatch(WAITING, tmp_path, "--nodelist=node2")
    for job in (requeued, preempted):
        cluster.wait(job, "RUNNING")
    start = time.monotonic()
    cluster.ask("scontrol", "requeue", str(requeued))
    urgent = cluster.sbatch("sleep 1", tmp_path, "--partition=urgent", "--nodelist=node2", "--exclusive")
    cluster.wait(urgent, "COMPLETED")
    for job in (requeued, preempted):
        cluster.wait(job, "RUNNING", restarts=1)
    assert time.monotonic() - start < 60
    assert wait_until(lambda: "attempt 1 on node1" in (tmp_path / f"{requeued}.out").read_text())
    assert "DUE TO PREEMPTION" in (tmp_path / f"{preempted}.out").read_text()
    assert "DUE TO PREEMPTION" not in (tmp_path / f"{requeued}.out").read_text()


def test_a_job_of_the_graced_partition_is_warned_before_it_is_preempted(cluster: Cluster, tmp_path: Path) -> None:
    """The signal that it asked for arrives at once, and it may end in its own way."""
    step = "trap 'echo warned; exit 7' USR2; echo ready; while :; do sleep 0.1; done"
    job = cluster.sbatch(f'srun bash -c "{step}"', tmp_path, "--partition=graced", "--signal=USR2@60", "-w", "node1")
    output = tmp_path / f"{job}.out"
    assert wait_until(lambda: output.exists() and "ready" in output.read_text())
    urgent = cluster.sbatch("true", tmp_path, "--partition=urgent", "--nodelist=node1", "--exclusive")
    cluster.wait(urgent, "COMPLETED")
    assert "warned" in output.read_text()
    assert cluster.show(job)["ExitCode"] == "7:0"


@pytest.mark.slow
def test_a_job_of_a_dead_node_is_requeued_onto_others(cluster: Cluster, tmp_path: Path) -> None:
    """A node without power loses its processes at once; SLURM notices, and starts the job where the node is not."""
    job = cluster.sbatch(WAITING, tmp_path, *TWO_NODES)
    cluster.wait(job, "RUNNING")
    output = tmp_path / f"{job}.out"
    assert wait_until(lambda: output.exists() and sum("sleep" in line for line in cluster.processes().values()) >= 3)
    try:
        assert cluster.script("node", "power-off", "node2").returncode == 0
        nodes = cluster.wait(job, "RUNNING", restarts=1)["NodeList"]
        assert "node2" not in cluster.ask("scontrol", "show", "hostnames", nodes)
        assert "node2" in cluster.ask("sinfo", "-h", "--states=down,no_respond", "-o", "%N")
    finally:
        assert cluster.script("up").returncode == 0
    assert wait_until(lambda: cluster.ask("sinfo", "-h", "-n", "node2", "-p", "debug", "-o", "%T").strip() == "idle")


def test_a_process_that_outlives_its_job_is_found_and_ended(cluster: Cluster, tmp_path: Path) -> None:
    """The check that follows each test can fail: SLURM lets go of a daemon that a job leaves behind."""
    job = cluster.sbatch("srun bash -c '(setsid sleep 600 </dev/null &>/dev/null &)'", tmp_path)
    cluster.wait(job, "COMPLETED")
    left = cluster.clear()
    assert list(left.values()) == ["sleep 600 "]
    assert wait_until(lambda: not command_of(*left))


@pytest.mark.slow
def test_up_mends_a_cluster_whose_daemons_were_killed_and_keeps_its_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """The line to type is the same, and the job runs on in its first attempt."""
    job = cluster.sbatch(WAITING, tmp_path)
    cluster.wait(job, "RUNNING")
    line = f"export SLURM_CONF={cluster.conf}\n"
    assert cluster.script("up").stdout == line
    cluster.save(job)
    for daemon in ("slurmctld", "slurmd-node1", "munge"):
        os.kill(int((cluster.conf.parent / "run" / f"{daemon}.pid").read_text()), signal.SIGKILL)
    assert cluster.script("up").stdout == line
    assert cluster.show(job)["JobState"] == "RUNNING"
    assert cluster.show(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_bare_cluster_has_no_sacct_and_leaves_only_logs(bare_cluster: Cluster, tmp_path: Path) -> None:
    """Squeue and scontrol know the job, sacct does not; down ends the job and the daemons, and up starts anew."""
    job = bare_cluster.sbatch(WAITING, tmp_path, *TWO_NODES, "--account=nobody")
    bare_cluster.wait(job, "RUNNING")
    assert bare_cluster.ask("squeue", "-h", "-o", "%i %T").split() == [str(job), "RUNNING"]
    with pytest.raises(subprocess.CalledProcessError):
        bare_cluster.ask("sacct")
    place, mark = bare_cluster.conf.parent, f"# finllm-devcluster {bare_cluster.conf.parent}\n"
    assert mark in Path("/etc/hosts").read_text()
    assert wait_until(lambda: bool(bare_cluster.processes()))
    before = bare_cluster.processes()
    try:
        assert bare_cluster.script("down").returncode == 0
        assert not [process for process in before if command_of(process)]
        assert [path.name for path in place.iterdir()] == ["log"]
        assert mark not in Path("/etc/hosts").read_text()
    finally:
        assert bare_cluster.script("up").returncode == 0
    assert not bare_cluster.ask("squeue", "-h")


def test_up_says_in_one_line_why_it_cannot() -> None:
    """Where there can be no cluster it ends with 3, by which tests know when to be skipped."""
    environment = {**os.environ, "FINLLM_DEVCLUSTER": "/tmp/with blanks"}
    done = subprocess.run([SCRIPTS / "up"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith("up: FINLLM_DEVCLUSTER is '/tmp/with blanks'")
    assert done.stderr.count("\n") == 1
