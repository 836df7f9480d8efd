"""Handing a run to SLURM through submitit: the text of the batch script, the jobs, and what a refusal means."""

import io
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finllm.data.places import CHECKOUT
from finllm.errors import RunError
from finllm.files import read_json, write_json
from finllm.run import Run
from launch.cluster import Cluster
from launch.scheduler import clean_environment

KEYS = (
    ("gres", "gpus_per_node, gpu_type or gpu_request"),
    ("account", "account (`sacctmgr show associations user=$USER` lists yours)"),
    ("partition", "partition"),
    ("qos", "qos"),
    ("feature|constraint", "constraint"),
    ("time limit", "time"),
    ("memory", "memory"),
    ("node count|more nodes|too many nodes", "nodes"),
    ("processors", "nodes or cpus"),
    (
        "node configuration",
        "what a node of that partition does not have: gpus_per_node, gpu_type, cpus, memory or nodes",
    ),
    ("cpu", "cpus"),
    ("option|argument", "sbatch"),
)
"""Words of sbatch, and the key of the profile that they speak of."""
UNREACHABLE = "unable to contact|unable to resolve|timed out|zero bytes|connection refused"
"""What sbatch says where the controller does not answer."""


@dataclass(frozen=True)
class Submission:
    """The jobs of a run, as the queue numbers them."""

    job: str
    evaluation: str = ""
    """The job that evaluates, where that is another."""
    folder: str = ""
    """Where submitit writes, and SLURM what the start of a job says."""
    sweep: str = ""
    """Folder of the sweep of which the run is a cell."""

    def save(self, run: Run) -> None:
        """Write it into the run folder."""
        write_json(run.submission, asdict(self))

    @classmethod
    def of(cls, run: Run) -> "Submission | None":
        """The jobs of a run; None where it was never submitted."""
        return cls(**read_json(run.submission)) if run.submission.is_file() else None

    @property
    def jobs(self) -> list[str]:
        """Both, or the one."""
        return [self.job, self.evaluation] if self.evaluation else [self.job]


def submit(
    folder: Path, name: str, jobs: Sequence[Callable[[], str]], cluster: Cluster, dependency: str | None = None
) -> list[str]:
    """Put jobs into the queue, several as one array; returns their ids. Raises RunError in sbatch's own words.

    A job is what each of its nodes calls. `folder` is that of a run or of a sweep: the code stands there, and what
    submitit writes goes there.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if shutil.which("sbatch") is None:
        raise RunError("sbatch is not installed here; run this on a login node of the SLURM cluster")
    written = Run(folder).slurm
    written.mkdir(parents=True, exist_ok=True)
    try:
        with clean_environment(_overruling(cluster)), redirect_stderr(io.StringIO()):
            executor = SlurmExecutor(written, python=shlex.quote(cluster.interpreter))
            executor.update_parameters(**parameters(folder, name, cluster, dependency))
            if len(jobs) == 1:
                return [str(executor.submit(jobs[0]).job_id)]
            with executor.batch():
                made = [executor.submit(job) for job in jobs]
            return [str(job.job_id) for job in made]
    except (FailedJobError, FailedSubmissionError) as error:
        raise RunError(_refusal(str(error), cluster)) from error


def script(folder: Path, name: str, cluster: Cluster, *, cells: int = 1, dependency: str | None = None) -> str:
    """The batch script that `submit` would hand to sbatch, also where there is no SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    written = Run(folder).slurm
    command = f"{shlex.quote(cluster.interpreter)} -u -m submitit.core._submit {shlex.quote(str(written))}"
    given = parameters(folder, name, cluster, dependency) | ({"map_count": cells} if cells > 1 else {})
    return str(_make_sbatch_string(command=command, folder=written, **given))


def parameters(folder: Path, name: str, cluster: Cluster, dependency: str | None = None) -> dict[str, Any]:
    """What submitit calls the parameters of a job."""
    return cluster.parameters(name=name, setup=_exports(cluster, Run(folder).code), dependency=dependency)


def _exports(cluster: Cluster, code: Path) -> list[str]:
    """Lines of bash: the code of submission time comes first, and nothing else of this folder is imported."""
    lines = {"PYTHONPATH": f"{shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}", "PYTHONSAFEPATH": "1"}
    beside = CHECKOUT.parent / "shared" / "data"
    if beside.is_dir():  # the copied code does not stand beside it
        lines["FINLLM_DATA"] = f"${{FINLLM_DATA:-{shlex.quote(str(beside))}}}"
    if cluster.offline:
        lines |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    lines["SRUN_CPUS_PER_TASK"] = "$SLURM_CPUS_PER_TASK"  # srun does not inherit it from Slurm 22.05 on
    return [f"export {name}={value}" for name, value in lines.items()]


def _overruling(cluster: Cluster) -> list[str]:
    """Variables that sbatch would put above the script's lines: SBATCH_PARTITION where the profile has a partition."""
    given = [key for key, value in cluster.model_dump().items() if value not in (None, False, ())]
    names = [*given, "timelimit", "gres", "gpus_per_node", "mem_per_node", "signal", "requeue", "no_requeue", "export"]
    return [f"SBATCH_{name.upper()}" for name in names]


def _refusal(said: str, cluster: Cluster) -> str:
    """What sbatch said, and which key of the profile to change."""
    lines = [line.strip() for line in said.splitlines() if re.match(r"\s*sbatch: (error|fatal)", line)]
    words = " ".join(line.removeprefix("sbatch: ") for line in lines) or said.strip()
    if re.search(UNREACHABLE, words, re.IGNORECASE):
        return f"SLURM does not answer: {words}; try again later, and see `scontrol ping`"
    key = next((key for pattern, key in KEYS if re.search(pattern, words, re.IGNORECASE)), None)
    if key is None and cluster.sbatch:
        key = f"sbatch ({', '.join(cluster.sbatch)})"
    hint = f"in the cluster profile, change {key}" if key else "change the cluster profile"
    return f"SLURM refused the job: {words}; {hint}"
