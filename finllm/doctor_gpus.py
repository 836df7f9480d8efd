"""The checks of a machine that concern GPUs: from the driver up to a sum over all of them."""

import logging
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

from finllm import machine
from finllm.diagnosis import Finding, first_line
from finllm.errors import RunError
from finllm.machine import Gpu

SMI_SECONDS = 20
"""nvidia-smi takes some seconds where the driver has been unloaded meanwhile, and for ever where a GPU is stuck."""
MEETING_SECONDS = 60
"""In which the processes of a sum must have found each other."""
RELATIVE_ERROR = 0.02
"""Of a bf16 product: 8 bits of mantissa, 2^-8 for each factor."""
NF4_ERROR = 0.2
"""Of weights up to 1. NF4's values are at most 0.30 apart (Dettmers et al. 2023, appendix E), so rounding costs 0.15."""


def checks(num_gpus: int) -> dict[str, Callable[[], Finding]]:
    """What is checked, in this order; where there is no GPU, each row says so."""
    known = cache(here)  # nvidia-smi is asked once: where it hangs, each time costs half a minute
    with_gpus = partial(_with_gpus, known)
    return {
        "driver": lambda: driver(smi()),
        "GPU": lambda: gpus(known(), num_gpus),
        "CUDA and torch": lambda: with_gpus("CUDA and torch", lambda found: match(found, built())),
        "bf16": lambda: with_gpus("bf16", bf16),
        "bitsandbytes": bitsandbytes,
        "NCCL between GPUs": lambda: with_gpus("NCCL between GPUs", nccl),
    }


@dataclass(frozen=True)
class Smi:
    """What nvidia-smi answered."""

    status: int
    """-1 where it did not end."""
    words: str


def smi() -> Smi | None:
    """The driver's version, by nvidia-smi; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return Smi(-1, f"nvidia-smi has not answered in {SMI_SECONDS} s")
    lines = (answer.stdout + answer.stderr).strip().splitlines()
    return Smi(answer.returncode, lines[0] if lines else "")


def driver(answer: Smi | None) -> Finding:
    """Whether the driver answers."""
    if answer is None:
        return Finding("driver", "absent", "no nvidia-smi: no NVIDIA driver is installed, or it is not on the PATH")
    if answer.status:
        return Finding(
            "driver", "wrong", answer.words or f"nvidia-smi ended with {answer.status}", _driver_mend(answer)
        )
    if not answer.words or "No devices" in answer.words:
        return Finding(
            "driver", "warning", "nvidia-smi lists no GPU", "lspci | grep -i nvidia; on a cluster, ask for GPUs"
        )
    return Finding("driver", "ok", answer.words)


def _driver_mend(answer: Smi) -> str:
    if "mismatch" in answer.words:
        return "sudo reboot (the driver was updated under a loaded kernel module)"
    if answer.status < 0:
        return "dmesg | grep -i xid says which GPU is stuck; sudo reboot"
    return "sudo modprobe nvidia; where that fails, install the driver for this kernel"


def here() -> tuple[Gpu, ...] | str:
    """The GPUs that processes may use, or why nobody knows."""
    try:
        return machine.here().gpus
    except (RunError, subprocess.TimeoutExpired, ValueError) as error:
        return first_line(error)


def gpus(found: tuple[Gpu, ...] | str, wanted: int = 0) -> Finding:
    """Kind and number of GPUs; fewer than a cluster profile asks for are wrong."""
    if isinstance(found, str):
        return Finding("GPU", "absent", "not checked: the driver does not answer")
    if len(found) < wanted:
        said = f"{len(found)} visible, and the profile asks for {wanted}"
        return Finding("GPU", "wrong", said, "try the other `gpu_request`, or give `gpu_type`; `sinfo -o '%N %G'`")
    if not found:
        return Finding("GPU", "absent", "none is visible: runs compute on the CPU")
    kinds = {gpu: found.count(gpu) for gpu in found}
    said = ", ".join(f"{n} x {gpu.name}, {gpu.memory_gib:.1f} GiB" for gpu, n in kinds.items())
    if len(kinds) > 1:
        return Finding(
            "GPU", "warning", f"{said}: a run waits for the slowest", "export CUDA_VISIBLE_DEVICES=... of one kind"
        )
    return Finding("GPU", "ok", said)


def _with_gpus(
    known: Callable[[], tuple[Gpu, ...] | str], what: str, check: Callable[[tuple[Gpu, ...]], Finding]
) -> Finding:
    found = known()
    if isinstance(found, str):
        return Finding(what, "absent", "not checked: the driver does not answer")
    return check(found) if found else Finding(what, "absent", "not checked: no GPU here")


@dataclass(frozen=True)
class Built:
    """torch, as it is installed."""

    version: str
    cuda: str | None
    """That it was built with; None for a build without."""
    architectures: tuple[str, ...] = ()
    """Such as sm_90 and compute_90."""
    count: int = 0
    """Of GPUs that it sees."""
    complaint: str = ""


def built() -> Built:
    """What torch says of itself and of the GPUs."""
    import torch

    if torch.version.cuda is None:
        return Built(torch.__version__, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    words = str(said[0].message).splitlines()[0] if said else ""
    return Built(torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()), count, words)


def match(found: Sequence[Gpu], torch: Built) -> Finding:
    """Whether torch was built for these GPUs and for this driver."""
    what, name = "CUDA and torch", f"torch {torch.version}"
    if torch.cuda is None:
        mend = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        return Finding(what, "wrong", f"{name} is built without CUDA", mend)
    if torch.count < len(found):
        said = f"{name} for CUDA {torch.cuda} sees {torch.count} of {len(found)} GPUs"
        mend = f"update the driver to one for CUDA {torch.cuda} (`nvidia-smi` names its own), or install torch for that"
        return Finding(what, "wrong", f"{said}: {torch.complaint}" if torch.complaint else said, mend)
    if left_out := [gpu for gpu in found if not covered(gpu.capability, torch.architectures)]:
        said = f"{name} has no code for {left_out[0].name} (compute capability {left_out[0].capability})"
        mend = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
        return Finding(what, "wrong", f"{said}; it has {' '.join(torch.architectures)}", mend)
    return Finding(what, "ok", f"{name} for CUDA {torch.cuda} sees {torch.count} GPU(s)")


def covered(capability: float, architectures: Sequence[str]) -> bool:
    """Whether code for these architectures runs on a GPU: binaries within a major version, PTX on all later GPUs.

    CUDA C++ Programming Guide, 3.1.2 and 3.1.3; an `a` at the end is for that one capability alone.
    """
    level = round(10 * capability)
    for name in architectures:
        kind = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name)
        if kind is None:
            continue
        least = int(kind[2])
        if kind[3] == "a":
            fits = least == level
        else:
            fits = least <= level and (kind[1] == "compute" or least // 10 == level // 10)
        if fits:
            return True
    return False


def bf16(found: Sequence[Gpu]) -> Finding:
    """Whether each GPU multiplies in bf16, by doing it."""
    import torch

    if without := [gpu.name for gpu in found if not gpu.has_bf16]:
        said = f"{without[0]} has none: runs compute in fp32 there, several times slower"
        return Finding("bf16", "warning", said, "use GPUs from compute capability 8.0 on (A100, L4, RTX 30 and later)")
    if not torch.cuda.is_available():
        return Finding("bf16", "absent", "not checked: torch sees no GPU")
    for index in range(len(found)):
        error = product_error(f"cuda:{index}")
        if not error < RELATIVE_ERROR:  # NaN too
            return Finding(
                "bf16", "wrong", f"GPU {index} multiplies with an error of {error:.2g}", "nvidia-smi -q -d ECC"
            )
    return Finding("bf16", "ok", f"{len(found)} GPU(s) multiply in it")


def product_error(device: str) -> float:
    """Largest error of a bf16 product against fp64 on the CPU, as a share of the largest entry."""
    import torch

    left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = left.double() @ right.double()
    made = (left.to(device) @ right.to(device)).cpu().double()
    return float((made - exact).abs().max() / exact.abs().max())


def bitsandbytes() -> Finding:
    """Whether its library loads and keeps 4-bit weights, by doing it on the GPU, or without one on the CPU."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its faster CPU kernels come from the hub, or not
    import torch
    from bitsandbytes import __version__, functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mend = "python -m bitsandbytes says what is missing; pip install --force-reinstall --no-deps bitsandbytes"
    weights = torch.linspace(-1, 1, 4096).reshape(64, 64)
    try:
        packed, state = functional.quantize_4bit(weights.to(device), quant_type="nf4")
        error = float((functional.dequantize_4bit(packed, state).cpu() - weights).abs().max())
    except (RuntimeError, NotImplementedError, AttributeError, OSError) as fault:
        return Finding("bitsandbytes", "wrong", f"{__version__} does not work on {device}: {first_line(fault)}", mend)
    if not error < NF4_ERROR:
        return Finding("bitsandbytes", "wrong", f"{__version__}: NF4 on {device} is wrong by {error:.2g}", mend)
    return Finding("bitsandbytes", "ok", f"{__version__} keeps NF4 weights on {device}")


def nccl(found: Sequence[Gpu]) -> Finding:
    """Whether the GPUs of this node can add up over NCCL, by doing it; between nodes is not checked."""
    import torch

    what = "NCCL between GPUs"
    if len(found) < 2:
        return Finding(what, "absent", "not checked: one GPU only")
    if torch.cuda.device_count() < len(found) or not torch.distributed.is_nccl_available():
        return Finding(what, "absent", "not checked: torch does not see the GPUs, or has no NCCL")
    fault = sum_fault("nccl", len(found))
    version = ".".join(map(str, torch.cuda.nccl.version()))
    if fault:
        mend = "NCCL_DEBUG=INFO finllm doctor says where; NCCL_P2P_DISABLE=1 goes round broken NVLink, NCCL_IB_DISABLE=1 round InfiniBand"
        return Finding(what, "wrong", f"NCCL {version}, {len(found)} GPUs: {fault}", mend)
    return Finding(what, "ok", f"NCCL {version} adds up over the {len(found)} GPUs of this node")


def sum_fault(backend: str, processes: int) -> str:
    """Why so many processes on this machine cannot add up their numbers; empty where they can."""
    from torch.multiprocessing.spawn import ProcessException, spawn

    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_add_up, (backend, processes, str(Path(folder) / "meeting")), nprocs=processes)
        except ProcessException as error:
            return str(error).strip().splitlines()[-1][:300]
    return ""


def _add_up(rank: int, backend: str, processes: int, meeting: str) -> None:
    """One process of a sum; raises RunError where the sum is wrong."""
    import torch
    from torch import distributed

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=processes,
        timeout=timedelta(seconds=MEETING_SECONDS),
    )  # fmt: skip
    try:
        number = torch.full((1 << 20,), float(rank + 1), device=device)  # 4 MiB: long enough for NVLink to be used
        distributed.all_reduce(number)
        wanted = processes * (processes + 1) / 2
        if not bool((number == wanted).all()):
            raise RunError(f"the sum over {processes} processes is {float(number[0])}, not {wanted}")
    finally:
        distributed.destroy_process_group()
