"""What a machine offers, found out without torch: GPUs by nvidia-smi, cores by the operating system."""

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from finllm.errors import RecipeError, RunError

KNOWN_GPUS: dict[str, tuple[str, float, float]] = {
    "a100-40gb": ("NVIDIA A100 40 GB", 39.4, 8.0),
    "a100-80gb": ("NVIDIA A100 80 GB", 79.2, 8.0),
    "h100-80gb": ("NVIDIA H100 80 GB", 79.2, 9.0),
    "h200-141gb": ("NVIDIA H200", 139.8, 9.0),
    "l4-24gb": ("NVIDIA L4", 22.0, 8.9),
    "rtx4090-24gb": ("NVIDIA GeForce RTX 4090", 23.5, 8.9),
    "a10-24gb": ("NVIDIA A10", 22.0, 8.6),
    "v100-32gb": ("NVIDIA V100 32 GB", 31.7, 7.0),
    "t4-16gb": ("NVIDIA T4", 14.6, 7.5),
}
"""Name, usable memory in GiB (as CUDA reports it), compute capability; for plans for a GPU that is not here."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_gib: float
    capability: float
    """CUDA compute capability; from 8.0 on there is bf16 arithmetic."""

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16."""
        return self.capability >= 8.0


@dataclass(frozen=True)
class Machine:
    """What processes can be started on."""

    gpus: tuple[Gpu, ...]
    cores: int
    memory_gib: float | None = None
    """Main memory that processes may fill; None where it is not known."""


def here() -> Machine:
    """Cores, and the GPUs less those that CUDA_VISIBLE_DEVICES hides."""
    return Machine(_visible(_nvidia_smi()), len(os.sched_getaffinity(0)), memory_gib())


def memory_gib() -> float | None:
    """Main memory, or the control group's share of it where that is less; None where the system does not say."""
    known = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known += [float(line.split()[1]) / 2**20 for line in lines if line.startswith("MemTotal:")]  # KiB
    with contextlib.suppress(OSError, ValueError):  # `max` is no limit
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")) / 2**30)
    return min(known, default=None)


def imagined(name: str, count: int) -> Machine:
    """A machine with `count` GPUs of a kind that need not be here."""
    if name not in KNOWN_GPUS:
        raise RecipeError(f"resources.gpu is {name!r}; known are {', '.join(sorted(KNOWN_GPUS))}")
    return Machine((Gpu(*KNOWN_GPUS[name]),) * count, len(os.sched_getaffinity(0)))


def _nvidia_smi() -> tuple[Gpu, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    if answer.returncode != 0:
        words = (answer.stdout + answer.stderr).strip().splitlines()
        raise RunError(f"nvidia-smi failed ({words[0] if words else answer.returncode}); mend the driver, or gpus=0")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    return tuple(Gpu(name, float(mib) / 1024, float(capability)) for name, mib, capability in rows)


def _visible(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    indices = [part.strip() for part in chosen.split(",") if part.strip() not in ("", "-1")]
    return tuple(gpus[int(i)] if i.isdigit() and int(i) < len(gpus) else gpus[0] for i in indices[: len(gpus)])
