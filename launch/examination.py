"""The checks of a machine in a process that may hang or die: here, or on the nodes of a job."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finllm.diagnosis import Finding, Started, read, without_secrets
from finllm.doctor import checks
from finllm.files import write_json

SECONDS = 240.0
"""For all checks: torch comes from a slow shared file system in one minute, and NCCL gives up after another."""
KILLED_SECONDS = 5.0
"""In which a killed process goes; one that waits for a driver does not, and is left behind."""
CLIENTS = ("sbatch", "squeue", "scontrol")


def examined(python: str, arguments: Sequence[str], seconds: float = SECONDS) -> list[Finding]:
    """The findings of this machine, made by the interpreter `python`; what hung or died is among them."""
    with tempfile.TemporaryDirectory(prefix="finllm-doctor-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("wb") as lines, err.open("wb") as words:
            command = [python, "-P", "-m", "finllm.doctor", "--json", *arguments]
            try:
                child = subprocess.Popen(command, stdout=lines, stderr=words, start_new_session=True)
            except OSError as error:
                return [
                    Finding("Python", "wrong", f"{python}: {error.strerror}", "make install; `python` in the profile")
                ]
            end = _ended(child, seconds)
        said = out.read_text(encoding="utf-8", errors="replace").splitlines()
        last = err.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return completed(list(read(said)), end, without_secrets(" ".join(last)))


def _ended(child: "subprocess.Popen[bytes]", seconds: float) -> str:
    """How the process ended, with all that it started; empty where it came to its own end."""
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(KILLED_SECONDS)
    if status is None:
        return f"not done after {seconds:g} s"
    if status < 0:
        return f"its process died of {signal.Signals(-status).name}"
    return "" if status in (0, 1) else f"its process ended with exit status {status}"


def completed(said: Sequence[Finding | Started], end: str, last_words: str) -> list[Finding]:
    """All findings: those that were made, the check that was not finished, and those that it kept from being made."""
    found = {finding.what: finding for finding in said if isinstance(finding, Finding)}
    names = list(checks(None, Path(), 0))
    if not said:
        what = f"{end or 'nothing was said'}: {last_words}".rstrip(": ")
        return [Finding("Python", "wrong", what, "make install; on a cluster, `python` in the profile")]
    begun = next((one.checking for one in reversed(said) if isinstance(one, Started)), names[0])
    if begun not in found:
        why = " ".join([end or "its process ended", f"({last_words})" if last_words else ""]).strip()
        found[begun] = Finding(begun, "wrong", why, "dmesg | tail says what the kernel knows; then sudo reboot")
    rest = [name for name in names if name not in found]
    return [*found.values(), *(Finding(name, "absent", f"not checked: {begun} was not finished") for name in rest)]


def clients(*, needed: bool) -> Finding:
    """Whether SLURM's commands are here, and whether its controller answers."""
    missing = [name for name in CLIENTS if shutil.which(name) is None]
    if missing:
        state = "wrong" if needed else "absent"
        mend = "ssh to a login node of the cluster" if needed else ""
        return Finding("SLURM", state, f"no {', '.join(missing)} on the PATH", mend)  # type: ignore[arg-type]
    try:
        answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False, timeout=30)
        words = (answer.stdout + answer.stderr).strip().splitlines() or ["scontrol ping says nothing"]
    except subprocess.TimeoutExpired:
        return Finding("SLURM", "wrong", "the controller has not answered in 30 s", "scontrol ping; sinfo")
    if answer.returncode or " UP" not in answer.stdout:
        return Finding("SLURM", "wrong" if needed else "warning", words[0], "export SLURM_CONF=..., or ask who runs it")
    accounting = "" if shutil.which("sacct") else "; no sacct, so that old jobs are forgotten"
    return Finding("SLURM", "ok", words[0] + accounting)


@dataclass(frozen=True)
class Examination:
    """A callable for submitit: the checks on each node of a job."""

    folder: str
    """Where each node leaves what it has found."""
    arguments: tuple[str, ...]

    def __call__(self) -> str:
        """Examine this node; returns its name."""
        name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        found = examined(sys.executable, self.arguments)
        write_json(Path(self.folder) / f"{name}.found", {"findings": [asdict(finding) for finding in found]})
        return name


def left(folder: Path) -> dict[str, list[Finding]]:
    """What the nodes of a job have left, by the node's name."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.found"))}
    return {name: [Finding(**one) for one in json.loads(text)["findings"]] for name, text in texts.items()}
