"""What works on this machine and what does not: `python -m finllm.doctor`, in the interpreter that runs train in.

`finllm doctor` starts this with a time limit. The checks that cannot hang come first, so that a driver that does costs
nothing but its own rows.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finllm import doctor_gpus, embedded, machine
from finllm.diagnosis import Finding, Started, first_line, line

GATED = "meta-llama/Meta-Llama-3-8B"
"""Asked for where no model is named: the shipped recipes train it, and its page asks for consent."""
HUB_SECONDS = 5.0
"""In which the hub must answer, looking up its name included."""
LEAST_DISK_GIB, ENOUGH_DISK_GIB = 1.0, 20.0
"""Below the first nothing can be written; 20 GiB hold the weights of a 7B model in bf16 (13.5 GiB), and checkpoints."""
ENOUGH_MEMORY_GIB = 4.0
"""torch, transformers and CUDA's libraries take 2 to 3 GiB in each process before any weights."""
ENOUGH_SHARED_GIB = 1.0
"""NCCL and data loaders pass buffers through /dev/shm; Docker gives 64 MiB unless told."""
SHARED = Path("/dev/shm")  # noqa: S108 - is looked at, not written
SILENT = object()


def main(arguments: list[str] | None = None) -> int:
    """Check everything, a line for each finding; exit status 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m finllm.doctor", description=__doc__)
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object a line, as they are found")
    parser.add_argument("--model", help=f"of the hub, to be accessible (else {GATED} is only asked about)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--gpus", type=int, default=0, help="as many there must be")
    options = parser.parse_args(arguments)
    wrong = False
    for what, check in checks(options.model, options.runs, options.gpus).items():
        if options.as_json:
            print(line(Started(what)), flush=True)
        finding = examined(what, check)
        wrong |= finding.state == "wrong"
        print(line(finding) if options.as_json else _plain(finding), flush=True)
    return int(wrong)


def checks(model: str | None, runs: Path, num_gpus: int) -> dict[str, Callable[[], Finding]]:
    """What is checked, in this order."""
    return {
        "disk": lambda: disk(_free_gib(_places(runs))),
        "memory": lambda: memory(machine.memory_gib(), _available_gib()),
        "shared memory": lambda: shared_memory(_free_gib({"": SHARED})),
        "DeepSpeed": lambda: deepspeed(find_spec("deepspeed") is not None, _build_tools()),
        "hub token": hub_token,
        "gated model": lambda: gated_model(model or GATED, wanted=model is not None),
        "W&B key": wandb_key,
        **doctor_gpus.checks(num_gpus),
    }


def examined(what: str, check: Callable[[], Finding]) -> Finding:
    """The finding of a check; one that breaks has found that much."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a broken installation may raise anything, and the other checks go on
        return Finding(what, "wrong", f"the check broke: {first_line(error)}", "reinstall what it names")


def _plain(finding: Finding) -> str:
    return f"{finding.state:8} {finding.what}: {finding.found}" + (f" -> {finding.mend}" if finding.mend else "")


def disk(free_gib: dict[str, float | None]) -> Finding:
    """Whether runs, caches and temporary files have room; None stands for a folder that cannot be written."""
    found = ", ".join(f"{n} not writable" if gib is None else f"{n} {gib:.1f} GiB" for n, gib in free_gib.items())
    closed = [name for name, gib in free_gib.items() if gib is None]
    low = [name for name, gib in free_gib.items() if gib is not None and gib < ENOUGH_DISK_GIB]
    mend = "export FINLLM_RUNS=, HF_HOME= or TMPDIR= to a larger disk; `hf cache ls` and `hf cache rm` free some"
    if closed or any((gib or 0.0) < LEAST_DISK_GIB for gib in free_gib.values()):
        return Finding("disk", "wrong", found, mend)
    return Finding("disk", "warning" if low else "ok", f"free: {found}", mend if low else "")


def memory(total_gib: float | None, available_gib: float | None) -> Finding:
    """Main memory: how much there is, and how much is free."""
    if total_gib is None or available_gib is None:
        return Finding("memory", "absent", "not checked: the system does not say")
    available = min(total_gib, available_gib)
    found = f"{available:.1f} of {total_gib:.1f} GiB free"
    if available < ENOUGH_MEMORY_GIB:
        return Finding("memory", "warning", found, "end what takes it (`top -o %MEM`); on a cluster, a larger `memory`")
    return Finding("memory", "ok", found)


def shared_memory(free_gib: dict[str, float | None]) -> Finding:
    """What processes on one machine pass their buffers through."""
    (free,) = free_gib.values()
    if free is None:
        return Finding("shared memory", "wrong", f"{SHARED} cannot be written", f"sudo chmod 1777 {SHARED}")
    if free < ENOUGH_SHARED_GIB:
        mend = f"sudo mount -o remount,size=8G {SHARED}; in Docker, start with --shm-size=8g"
        return Finding("shared memory", "warning", f"{SHARED} has {free:.2f} GiB; several GPUs need more", mend)
    return Finding("shared memory", "ok", f"{SHARED} has {free:.1f} GiB")


def deepspeed(installed: bool, tools: dict[str, bool]) -> Finding:
    """What DeepSpeed compiles its operators with, at first use."""
    if not installed:
        return Finding("DeepSpeed", "absent", "not installed; only its own strategies need it")
    missing = [name for name, there in tools.items() if not there]
    if missing:
        mend = {"c++": "sudo apt-get install g++", "ninja": "pip install ninja",
                "nvcc": "module load cuda, or export CUDA_HOME=/usr/local/cuda"}  # fmt: skip
        said = f"{', '.join(missing)} not found: operators that it compiles, such as its CPU optimizer, fail"
        return Finding("DeepSpeed", "warning", said, "; ".join(mend[name] for name in missing))
    return Finding("DeepSpeed", "ok", f"installed, with {', '.join(tools)} to compile")


def hub_token() -> Finding:
    """Whether the hub knows the token."""
    from huggingface_hub import HfApi, constants, get_token

    if get_token() is None:
        return Finding("hub token", "warning", "none; gated models and uploads need one", "hf auth login")
    if constants.HF_HUB_OFFLINE:
        return Finding("hub token", "absent", "there is one, not checked: HF_HUB_OFFLINE is set")
    answer = _asked(HfApi().whoami)
    if isinstance(answer, dict):
        return Finding("hub token", "ok", f"of {answer.get('name', 'somebody')}")
    if _status(answer) == 401:
        mend = "unset HF_TOKEN, then hf auth login" if os.environ.get("HF_TOKEN") else "hf auth login --force"
        return Finding("hub token", "wrong", f"{constants.ENDPOINT} refuses it (401)", mend)
    return _unreached("hub token", answer)


def gated_model(model: str, *, wanted: bool) -> Finding:
    """Whether the hub would hand out the model."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError

    what = "gated model"
    if model == embedded.NAME or Path(model).is_dir():
        return Finding(what, "ok", f"{model} needs no hub")
    if constants.HF_HUB_OFFLINE:
        return Finding(what, "absent", f"{model}: not checked: HF_HUB_OFFLINE is set")
    answer = _asked(lambda: HfApi().auth_check(model))
    if answer is None:
        return Finding(what, "ok", f"{model} is open to you")
    state = "wrong" if wanted else "warning"
    if isinstance(answer, GatedRepoError):
        mend = f"ask at {constants.ENDPOINT}/{model}, then hf auth login"
        return Finding(what, state, f"{model}: access is not granted", mend)  # type: ignore[arg-type]  # both are states
    if _status(answer) in (401, 403, 404) or isinstance(answer, ValueError):
        said = f"{model}: the hub has none of that name that is open to you"
        return Finding(what, state, said, "check the spelling; hf auth login")  # type: ignore[arg-type]
    return _unreached(what, answer)


def _asked(question: Callable[[], Any]) -> Any:
    """The hub's answer, the error that came instead, or SILENT after HUB_SECONDS.

    Asked in a thread that may be left behind: looking up a name has no time limit of its own.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # imported there, not declared

    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(question())
        except (HTTPError, OSError, ValueError) as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers[0] if answers else SILENT


def _status(error: object) -> int | None:
    """The HTTP status that an error brought; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _unreached(what: str, answer: object) -> Finding:
    """A hub that gives no useful answer. The error's words are left out: they may quote the token."""
    from huggingface_hub import constants

    said = f"no answer in {HUB_SECONDS:.0f} s" if answer is SILENT else type(answer).__name__
    status = f" ({_status(answer)})" if _status(answer) else ""
    mend = f"curl -I {constants.ENDPOINT}; behind a proxy set https_proxy; without a network export HF_HUB_OFFLINE=1"
    return Finding(what, "warning", f"not checked: {constants.ENDPOINT}: {said}{status}", mend)


def wandb_key() -> Finding:
    """Whether there is a key in a form that W&B takes; W&B is not asked."""
    from finllm.tracking import key_fault

    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return Finding("W&B key", "absent", f"not checked: WANDB_MODE is {os.environ['WANDB_MODE']}")
    fault = key_fault()
    if fault:
        return Finding("W&B key", "warning", f"runs stay offline: {fault.split('; ')[0]}", "wandb login")
    return Finding("W&B key", "ok", "there is one; W&B was not asked whether it holds")


def _places(runs: Path) -> dict[str, Path]:
    """Where much is written."""
    from huggingface_hub import constants

    return {
        "runs": runs,
        "hub cache": Path(constants.HF_HUB_CACHE),
        "temporary": Path(tempfile.gettempdir()),
    }


def _free_gib(places: dict[str, Path]) -> dict[str, float | None]:
    """Free space of each folder, or of the nearest one above it that exists; None where it cannot be written."""
    found: dict[str, float | None] = {}
    for name, path in places.items():
        there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        found[name] = shutil.disk_usage(there).free / 2**30 if os.access(there, os.W_OK) else None
    return found


def _available_gib() -> float | None:
    """What the kernel would give to new processes without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(row.split()[1]) / 2**20 for row in lines if row.startswith("MemAvailable:")), None)  # KiB


def _build_tools() -> dict[str, bool]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or (Path(home) / "bin" / "nvcc").is_file()
    compilers = {"c++": bool(shutil.which("c++") or shutil.which("g++")), "ninja": bool(shutil.which("ninja"))}
    return {**compilers, "nvcc": bool(nvcc)} if shutil.which("nvidia-smi") else compilers


if __name__ == "__main__":
    sys.exit(main())
