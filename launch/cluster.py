"""A cluster profile: WHERE a run goes. Every default of a submission stands here, and nowhere else."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from finllm import machine, yamlfile
from finllm.data.spec import AbsolutePath
from finllm.files import read_model, write_json
from finllm.machine import Machine
from finllm.run import Run
from finllm.yamlfile import Spec

SCHEDULER_EARLY_SECONDS = 60
"""SLURM may send the signal before a time limit so much earlier (sbatch(1), --signal); never later."""
MARGIN_SECONDS = 30.0
"""Between the end of the trainer's time to save and the time limit, for the requeue."""
OURS = {
    "array": "--sweep", "chdir": "the folder that you submit from", "dependency": "--evaluate-on",
    "error": "the run folder", "export": "nothing: all is exported", "job-name": "--name", "ntasks": "nodes",
    "ntasks-per-node": "nodes", "open-mode": "nothing: logs grow", "output": "the run folder", "signal": "signal_seconds",
    "requeue": "requeues", "no-requeue": "requeues: 0", "wait": "nothing", "wrap": "nothing",
}  # fmt: skip
"""Options of sbatch that would break a run, or that have no key of the same name, and what to use."""


def _minutes(value: Any) -> Any:
    """SLURM's ways to write a time, as minutes: `90`, `90:00`, `1:30:00`, `1-12`, `1-12:30`, `1-12:30:00`."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", value)
    if match is None:
        raise ValueError(f"{value!r} is no time; write minutes, such as 90, or D-HH:MM:SS, such as 1-12:00:00")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:  # hours first
        seconds = ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        seconds = ((first or 0) * 60 + (second or 0)) * 60 + third
    else:
        seconds = (first or 0) * 60 + (second or 0)
    return -(-seconds // 60)


def _memory(value: Any) -> Any:
    """`64G`, `64GB` or `512M` for one node; 0 is all of it."""
    text = str(value)
    if not re.fullmatch(r"0|\d+[KMGT]B?", text):
        raise ValueError(f"{value!r} is no amount of memory; write such as 64G or 512M, or 0 for all of a node's")
    return text


class Cluster(Spec):
    """A place in a SLURM cluster, and how to submit there. Keys that are left out are left to the cluster."""

    purpose: str = ""
    """One line for people."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have, such as `a100&nvlink`."""
    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    """0 trains on CPUs (the recipe's `resources.cpu_processes` on each node)."""
    gpu: str | None = None
    """Kind of GPU, for the plan: such as `a100-80gb`."""
    network_gbit: float | None = Field(default=None, gt=0)
    """What connects a node with the others, all its adapters together, in Gbit/s; for the plan's pace."""
    gpu_request: Literal["gres", "gpus-per-node"] = "gres"
    """The option by which the cluster hands out GPUs."""
    gpu_type: str | None = None
    """Name of the kind in the cluster's configuration, where GPUs must be asked for by it: `gres=gpu:TYPE:N`."""
    cpus: int = Field(default=1, ge=1)
    """Cores of one node."""
    memory: Annotated[str, BeforeValidator(_memory, json_schema_input_type=str | int)] | None = None
    """Main memory of one node, such as `64G`; 0 is all of it."""
    time: Annotated[int, BeforeValidator(_minutes, json_schema_input_type=int | str), Field(ge=1)]
    """Limit of one attempt, in minutes or as D-HH:MM:SS; the run goes on in the next attempt."""
    exclusive: bool = False
    """Whole nodes."""
    setup: tuple[str, ...] = ()
    """Lines of bash before anything else on the first node, such as `module load cuda/12.8`."""
    python: str | None = None
    """Interpreter on the nodes; null is the one that submits."""
    runs: AbsolutePath | None = None
    """Folder of all runs, on a file system that all nodes share; null is the one that `finllm launch` uses."""
    offline: bool = False
    """Compute nodes have no network: W&B writes into the run folder, models and data come from the caches."""
    requeues: int = Field(default=20, ge=0)
    """How often one job may start again after a time limit, preemption or a broken node."""
    signal_seconds: int = Field(default=300, ge=10)
    """Before the time limit, when the trainer is asked to save: at least a step, a validation and a checkpoint long."""
    parallel: int = Field(default=8, ge=1)
    """Cells of a sweep that run at once."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Further options of sbatch, without `--`: `{reservation: spring, mail-type: END}`; `false` leaves one out."""

    @model_validator(mode="after")
    def _agrees(self) -> "Cluster":
        if self.gpus_per_node and self.gpu is None:
            raise ValueError(
                f"gpus_per_node is {self.gpus_per_node}, but gpu is not given, and the plan depends on it; "
                f"known are {', '.join(sorted(machine.KNOWN_GPUS))}"
            )
        if self.gpu is not None and self.gpu not in machine.KNOWN_GPUS:
            raise ValueError(f"gpu is {self.gpu!r}; known are {', '.join(sorted(machine.KNOWN_GPUS))}")
        if self.gpu is not None and not self.gpus_per_node:
            raise ValueError("gpu is given, but gpus_per_node is 0; write how many, or take gpu out")
        if self.signal_seconds >= 60 * self.time:
            raise ValueError(
                f"signal_seconds is {self.signal_seconds}, but the time limit is {60 * self.time} s: no time is left to "
                "train in; write less, or a longer time"
            )
        if repeated := [f"{key} (use {self._instead(key)})" for key in self.sbatch if self._instead(key)]:
            raise ValueError(f"sbatch holds {', '.join(repeated)}; these are set elsewhere")
        if wrong := [key for key in self.sbatch if not re.fullmatch(r"[a-z][a-z-]*", key)]:
            raise ValueError(
                f"sbatch holds {', '.join(wrong)}; write sbatch's long options without --, such as mail-type"
            )
        return self

    def _instead(self, option: str) -> str | None:
        """What to use instead of an option of sbatch; None where it is free."""
        own = {
            "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "nodes": "nodes",
            "gres": "gpus_per_node", "gpus-per-node": "gpus_per_node", "gpus": "gpus_per_node",
            "gpus-per-task": "gpus_per_node", "cpus-per-task": "cpus", "cpus-per-gpu": "cpus", "mem": "memory",
            "mem-per-cpu": "memory", "mem-per-gpu": "memory", "time": "time", "exclusive": "exclusive",
        }  # fmt: skip
        taken = {**OURS, **own}
        # sbatch also takes the beginning of a name, where it is not that of several: `part` for `partition`.
        return taken.get(option) or next((use for name, use in taken.items() if name.startswith(option)), None)

    @property
    def wait(self) -> float:
        """Seconds in which a trainer that was asked to stop may save."""
        return max(self.signal_seconds / 2, self.signal_seconds - MARGIN_SECONDS)

    @property
    def interpreter(self) -> str:
        """Python on the nodes."""
        return self.python or sys.executable

    def machine(self) -> Machine:
        """GPUs and cores of one node, and the main memory of all, for the plan."""
        gpus = machine.imagined(self.gpu, self.gpus_per_node).gpus if self.gpu else ()
        each = _gib(self.memory)
        return Machine(gpus, self.cpus, None if each is None else self.nodes * each)

    def parameters(self, *, name: str, setup: Sequence[str], dependency: str | None = None) -> dict[str, Any]:
        """What submitit calls the parameters of a job."""
        asked = {
            "job_name": name, "partition": self.partition, "account": self.account, "qos": self.qos,
            "constraint": self.constraint, "nodes": self.nodes, "ntasks_per_node": 1, "cpus_per_task": self.cpus,
            "mem": self.memory, "time": self.time, "exclusive": self.exclusive or None, "dependency": dependency,
            "signal_delay_s": self.signal_seconds, "array_parallelism": self.parallel, **self._gpus(),
        }  # fmt: skip
        further = {option: value for option, value in self.sbatch.items() if value is not False}
        # Without --requeue a job whose node breaks is lost where the cluster's default is so. submitit's own work-load
        # key is refused by clusters that check it. A dependency that cannot be met any more must not wait for ever.
        more: dict[str, Any] = {"requeue": True, "wckey": "", **further}
        if dependency is not None:
            more["kill-on-invalid-dep"] = "yes"
        return {
            **{key: value for key, value in asked.items() if value is not None},
            "setup": [*self.setup, *setup],
            "srun_args": ["--kill-on-bad-exit=1"],
            "additional_parameters": more,
        }

    def _gpus(self) -> dict[str, Any]:
        if not self.gpus_per_node:
            return {}
        typed = f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else str(self.gpus_per_node)
        return {"gres": f"gpu:{typed}"} if self.gpu_request == "gres" else {"gpus_per_node": typed}


def _gib(memory: str | None) -> float | None:
    if memory in (None, "0"):
        return None
    match = re.fullmatch(r"(\d+)([KMGT])B?", str(memory))
    assert match, "validated before"
    return int(match[1]) * {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}[match[2]]


def load(path: Path) -> Cluster:
    """The profile at `path`; raises RecipeError with every fault at once."""
    return yamlfile.parse(Cluster, yamlfile.read(path))


def of(run: Run) -> Cluster:
    """The profile that a run was submitted with."""
    return read_model(run.cluster, Cluster)


def save(run: Run, cluster: Cluster) -> None:
    """Keep the profile with the run."""
    write_json(run.cluster, cluster.model_dump(mode="json"))
