"""What SLURM says of jobs, and what it is told: squeue, then scontrol, then sacct, so that accounting is not needed."""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from finllm.errors import RunError

SECONDS = 60
"""A busy controller answers late."""
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
NEVER = {"DependencyNeverSatisfied"}
"""Reasons of waiting that have no end."""


@dataclass(frozen=True)
class Job:
    """One job, or one element of an array, as SLURM sees it."""

    id: str
    state: str
    """As in squeue(1), such as PENDING; empty where SLURM does not know the job (any more)."""
    reason: str = ""
    """Why it waits, such as Resources or BeginTime."""
    nodes: str = ""

    @property
    def waits(self) -> bool:
        """Whether it is still to be started, or started again."""
        return self.state in WAITING and self.reason not in NEVER

    @property
    def runs(self) -> bool:
        """Whether it has nodes."""
        return self.state in RUNNING

    @property
    def is_known(self) -> bool:
        """Whether SLURM knows it."""
        return bool(self.state)


def look(ids: Sequence[str]) -> dict[str, Job]:
    """The jobs of these ids; one that nobody knows (any more) has no state. Raises RunError where SLURM is not there."""
    found = _squeue(ids) if ids else {}
    for missing in [number for number in ids if number not in found]:
        found[missing] = _scontrol(missing) or _sacct(missing) or Job(missing, "")
    return {number: found[number] for number in ids}


def cancel(job: str) -> None:
    """End a job, or take it out of the queue."""
    answer = _ask("scancel", job)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise RunError(f"scancel {job}: {answer.stderr.strip()}")


def requeue(job: str) -> str:
    """Put a running job back into the queue; returns why SLURM refuses, or nothing."""
    answer = _ask("scontrol", "requeue", job)
    return answer.stderr.strip() if answer.returncode else ""


@contextmanager
def clean_environment(also: Sequence[str] = ()) -> Iterator[None]:
    """Without what an enclosing job left in the environment, and without the variables `also`.

    sbatch hands the environment on, and SLURM_CPU_BIND, SLURM_NTASKS and their like change what srun does in the new
    job. SLURM_CONF says where the cluster is, and stays.
    """
    names = [n for n in os.environ if re.match(r"(SLURM|SLURMD|SRUN|PMI|PMIX)_", n) and n != "SLURM_CONF"]
    kept = {name: os.environ.pop(name) for name in [*names, *also] if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _squeue(ids: Sequence[str]) -> dict[str, Job]:
    """All jobs that are in the queue. Asked for all of ours: squeue fails for a list in which one id is unknown."""
    answer = _ask("squeue", "--noheader", "--array", "--me", "--states=all", "--format=%i|%T|%r|%N")
    if answer.returncode:
        raise RunError(f"squeue: {answer.stderr.strip() or answer.returncode}; is this a login node of the cluster?")
    rows = (line.strip().split("|") for line in answer.stdout.splitlines() if line.count("|") == 3)
    wanted = set(ids)
    return {row[0]: Job(row[0], row[1], _reason(row[2]), row[3]) for row in rows if row[0] in wanted}


def _scontrol(job: str) -> Job | None:
    answer = _ask("scontrol", "--oneliner", "show", "job", job)
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
        nodes = fields.get("NodeList", "")
        return Job(job, fields["JobState"], _reason(fields.get("Reason", "")), "" if nodes == "(null)" else nodes)
    return None


def _sacct(job: str) -> Job | None:
    try:
        answer = _ask("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job, "--format=State,NodeList")
    except RunError:  # a cluster without accounting may lack the command
        return None
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    if not lines:
        return None
    state, nodes = lines[-1].split("|")
    return Job(job, state.split()[0], "", "" if nodes == "None assigned" else nodes)  # `CANCELLED by 1000`


def _reason(text: str) -> str:
    return "" if text in ("None", "(null)") else text.strip("()")


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except FileNotFoundError as error:
        raise RunError(
            f"{command[0]} is not installed here; run this on a login node of the SLURM cluster, or leave --cluster out"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{' '.join(command)}: SLURM has not answered in {SECONDS} s; try again later") from error
