"""Cluster profiles: what they may say, what is made of it for sbatch, and what is refused."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finllm.distributed import ACCELERATE
from finllm.errors import RecipeError
from finllm.run import State, Status, create
from launch import cluster, slurm, submission
from launch.cli import main
from launch.cluster import Cluster
from launch.job import with_rank
from launch.scheduler import clean_environment
from launch.submission import Submission

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "slurm").glob("*.yaml"))
SMALL = "cpus: 2\ntime: 30\n"


def profile(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_profile_plans_a_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its batch script asks for what it says, and its purpose is told."""
    found = cluster.load(path)
    assert found.purpose
    overrides = ["model.quantization=none"] if found.nodes * found.gpus_per_node > 1 else []
    overrides.append(f"train.global_batch={64 * max(1, found.nodes)}")
    assert main(["launch", "demo", "--cluster", str(path), "--dry-run", *overrides]) == 0
    said = capsys.readouterr().out
    assert f"#SBATCH --nodes={found.nodes}\n" in said
    assert f"#SBATCH --time={found.time}\n" in said
    assert ("#SBATCH --gres=gpu:" in said) == bool(found.gpus_per_node)
    assert said.count("--machine_rank") == (found.nodes if found.nodes > 1 else 0)


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("90", 90), ("'90:30'", 91), ("'1:30:00'", 90), ("1-12", 2160), ("'1-12:30'", 2190),
        ("'2-00:00:01'", 2881),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(tmp_path: Path, written: str, minutes: int) -> None:
    """Minutes, and all forms of sbatch(1); seconds are rounded up, since submitit needs whole minutes."""
    assert cluster.load(profile(tmp_path, f"time: {written}\n")).time == minutes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SMALL + "partion: gpu\n", "partition"),
        (SMALL + "gpus_per_node: 2\n", "a100-80gb"),
        (SMALL + "gpus_per_node: 1\ngpu: a101\n", "a100-40gb"),
        (SMALL + "gpu: a100-80gb\n", "gpus_per_node is 0"),
        ("cpus: 2\ntime: soon\n", "D-HH:MM:SS"),
        ("cpus: 2\ntime: 1\n", "no time is left to train"),
        (SMALL + "memory: lots\n", "64G"),
        (SMALL + "sbatch: {requeue: true}\n", "use requeues"),
        (SMALL + "sbatch: {partition: gpu}\n", "use partition"),
        (SMALL + "sbatch: {part: gpu}\n", "use partition"),
        (SMALL + "sbatch: {output: here.txt}\n", "use the run folder"),
        (SMALL + "sbatch: {--mail-type: END}\n", "without --"),
        ("cpus: 2\n", "time"),
    ],
)
def test_a_faulty_profile_is_refused_with_its_line_and_a_way_out(tmp_path: Path, text: str, said: str) -> None:
    """As recipes are."""
    with pytest.raises(RecipeError) as refused:
        cluster.load(profile(tmp_path, text))
    assert said in str(refused.value)
    assert "mine.yaml" in str(refused.value)


def test_options_reach_the_batch_script(tmp_path: Path) -> None:
    """Each key becomes the option that sbatch knows; what is left out is left to the cluster."""
    full = Cluster(
        partition="gpu", account="research", qos="high", constraint="a100&nvlink", nodes=2, gpus_per_node=4,
        gpu="a100-80gb", gpu_type="a100", cpus=16, memory="64G", time=90, exclusive=True,
        setup=("module load cuda",), sbatch={"reservation": "spring", "mail-type": "END", "hold": False}, signal_seconds=120,
    )  # fmt: skip
    text = submission.script(tmp_path, "x", full)
    options = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        "partition=gpu", "account=research", "qos=high", "constraint='a100&nvlink'", "nodes=2", "gres=gpu:a100:4",
        "cpus-per-task=16", "mem=64G", "time=90", "exclusive", "reservation=spring", "mail-type=END", "requeue",
        "signal=USR2@120", "ntasks-per-node=1",
    }  # fmt: skip
    assert "hold" not in text
    assert text.index("module load cuda") < text.index("export PYTHONPATH") < text.index("\nsrun ")
    plain = submission.script(tmp_path, "x", Cluster(time=90))
    assert not any(word in plain for word in ("--partition", "--account", "--gres", "--mem", "--exclusive", "--qos"))
    other = Cluster(gpus_per_node=4, gpu="a100-80gb", gpu_request="gpus-per-node", time=90)
    assert "#SBATCH --gpus-per-node=4\n" in submission.script(tmp_path, "x", other)


def test_the_script_stands_hard_names(tmp_path: Path) -> None:
    """Bash reads the folder as it was meant, with spaces and quotes."""
    folder = tmp_path / 'it\'s a "run" of $HOME'
    text = submission.script(folder, "x", Cluster(time=90))
    echoed = [
        line.replace("srun", "printf '%s\\n' srun", 1) if line.startswith("srun") else line
        for line in text.splitlines()
    ]
    echoed.append('printf "%s\\n" "$PYTHONPATH"')
    answer = subprocess.run(["bash", "-c", "\n".join(echoed)], capture_output=True, text=True, check=True)
    words = answer.stdout.splitlines()
    assert str(folder / "slurm") in words
    assert words[-1].split(":")[0] == str(folder / "code")


def test_every_node_gets_its_rank() -> None:
    """Before `-m finllm.train`, since what stands after it is the trainer's."""
    command = (
        sys.executable,
        "-m",
        ACCELERATE,
        "--config_file",
        "a b",
        "-m",
        "finllm.train",
        "run",
    )
    told = with_rank(command, "node7", 1234, 1)
    assert told[-3:] == ("-m", "finllm.train", "run")
    assert "--main_process_ip node7 --main_process_port 1234 --machine_rank 1 -m" in shlex.join(told)


def test_nothing_of_an_enclosing_job_reaches_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM_CONF stays, since it says where the cluster is; afterwards all is as before."""
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    with clean_environment(["SBATCH_PARTITION"]):
        assert "SLURM_CPU_BIND" not in os.environ
        assert "SBATCH_PARTITION" not in os.environ
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf"
    assert os.environ["SLURM_CPU_BIND"] == "quiet"
    assert os.environ["SBATCH_PARTITION"] == "other"


def test_submitting_needs_slurm_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a laptop the answer is one sentence."""
    monkeypatch.setenv("PATH", str(tmp_path))
    given = ["launch", "demo", "--cluster", str(profile(tmp_path, SMALL)), "--runs", str(tmp_path / "runs")]
    assert main(given) == 2
    assert "login node" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("Unable to contact slurm controller (connect failure)", "SLURM does not answer: "),
        ("Requested reservation is invalid", "change sbatch (reservation)"),
        ("Invalid account or account/partition combination specified", "change account"),
        ("Invalid generic resource (gres) specification", "gpu_type"),
    ],
)
def test_sbatchs_words_come_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    """Here a stand-in says them: a cluster that does not answer is no fault of the profile."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\necho 'sbatch: error: {words}' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    text = SMALL + "sbatch: {reservation: spring}\n"
    given = ["launch", "demo", "--cluster", str(profile(tmp_path, text)), "--runs", str(tmp_path / "runs")]
    assert main(given) == 2
    answer = capsys.readouterr().err
    assert words in answer
    assert said in answer
    assert not list((tmp_path / "runs").iterdir())


def test_runs_that_have_ended_are_shown_without_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred old runs are no reason to ask the controller a hundred times; here nobody could be asked."""
    monkeypatch.setenv("PATH", str(tmp_path))
    items = []
    ended: tuple[Status, ...] = ("done", "failed", "cancelled")
    for number, status in enumerate(ended):
        run = create(tmp_path, status)
        Submission(str(number)).save(run)
        items.append((run, State(status, stage="evaluate", backend="slurm", host="node1", error="why")))
    assert [seen.status for seen in slurm.seen(items)] == ["done", "failed", "cancelled"]
    assert {(seen.waits_for, seen.error) for seen in slurm.seen(items)} == {("", "why")}
    assert [seen.where for seen in slurm.seen(items)] == [f"slurm, job {number}, node1" for number in range(3)]
    Submission("4").save(run)
    (unknown,) = slurm.seen([(run, State("running", backend="slurm"))])
    assert "login node" in unknown.waits_for


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--evaluate-on", "X"], "--evaluate-on needs --cluster"),
        (["--sweep", "train.epochs=1,2", "--detach"], "nohup"),
        (["--sweep", "train.epochs"], "key=a,b,c"),
        (["--sweep", "train.epochs=1,1"], "twice"),
        (["--sweep", "train.epochs=1,2", "--sweep", "train.epochs=3"], "twice"),
        (["--sweep", "train.epoch=1,2"], "epochs"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    """Before anything is made."""
    given = [str(profile(tmp_path, SMALL)) if word == "X" else word for word in given]
    assert main(["launch", "demo", *given, "--runs", str(tmp_path / "runs")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
