"""`finllm doctor`: what each check finds in facts, and what the command finds on this machine."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finllm import doctor, doctor_gpus
from finllm.diagnosis import Finding, Started, line, read, without_secrets
from finllm.doctor_gpus import Built, Smi
from finllm.machine import Gpu
from launch import cli, examination
from launch.doctor import show
from launch.tether import start_ticks

TOKEN = "hf_planted0123456789"
H100, V100 = Gpu("NVIDIA H100", 79.2, 9.0), Gpu("Tesla V100", 31.7, 7.0)
FOR_BOTH = ("sm_75", "sm_80", "sm_90", "compute_90")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a token and a model are asked about; it echoes the token in each error."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """A known token has access to `open`, not to `gated`; nothing else exists."""
        given = self.headers.get("Authorization", "")
        known = given == f"Bearer {TOKEN}"
        if self.path == "/api/whoami-v2":
            return self._answer(200 if known else 401, "")
        name = self.path.removeprefix("/api/models/me/").removesuffix("/auth-check")
        if name == "broken":
            return self._answer(500, f"Server error for {given}")
        if name == "open" and known:
            return self._answer(200, "")
        return self._answer(403 if name == "gated" else 404, "GatedRepo" if name == "gated" else "RepoNotFound")

    def _answer(self, status: int, code: str) -> None:
        text = json.dumps({"name": "somebody", "error": f"not with {self.headers.get('Authorization')}"}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"not with {self.headers.get('Authorization')}")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """What $HF_ENDPOINT must be."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def asked(expression: str, endpoint: str, home: Path, **environment: str) -> Finding:
    """The finding of an expression over finllm.doctor, in a process with its own hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
    code = f"from finllm import doctor, diagnosis; print(diagnosis.line(doctor.{expression}))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env=kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment},
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr
    (finding,) = read(done.stdout.splitlines())
    assert isinstance(finding, Finding)
    return finding


@pytest.mark.parametrize(
    ("expression", "token", "state", "said"),
    [
        ("hub_token()", TOKEN, "ok", "of somebody"),
        ("hub_token()", "hf_unknown_98765", "wrong", "refuses it (401)"),
        ("hub_token()", "", "warning", "none; gated models"),
        ("gated_model('me/open', wanted=True)", TOKEN, "ok", "me/open is open to you"),
        ("gated_model('me/gated', wanted=True)", TOKEN, "wrong", "access is not granted"),
        ("gated_model('me/gated', wanted=False)", TOKEN, "warning", "access is not granted"),
        ("gated_model('me/none', wanted=True)", TOKEN, "wrong", "has none of that name"),
        ("gated_model('no name/at/all', wanted=True)", TOKEN, "wrong", "has none of that name"),
        ("gated_model('me/broken', wanted=True)", TOKEN, "warning", "not checked"),
    ],
    ids=[
        "known token",
        "refused token",
        "no token",
        "open",
        "gated",
        "gated, not asked for",
        "missing",
        "no name",
        "500",
    ],
)
def test_the_hub_is_asked_about_the_token_and_the_model(
    expression: str, token: str, state: str, said: str, hub: str, tmp_path: Path
) -> None:
    """What it answers decides, and no error quotes the token, though the hub does."""
    finding = asked(expression, hub, tmp_path, HF_TOKEN=token)
    assert finding.state == state
    assert said in finding.found
    assert bool(finding.mend) == (state != "ok")


@pytest.mark.parametrize(
    "given", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "no hub"]
)
def test_a_hub_that_is_not_there_is_not_judged(given: dict[str, str], tmp_path: Path) -> None:
    """A row that says so, not a claim about the token."""
    finding = asked("hub_token()", "http://127.0.0.1:9", tmp_path, HF_TOKEN=TOKEN, **given)
    assert finding.state in ("absent", "warning")
    assert "not checked" in finding.found


def test_a_hub_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up its name has no time limit of its own."""
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.1)
    began = time.monotonic()
    assert doctor._asked(lambda: time.sleep(3)) is doctor.SILENT
    assert time.monotonic() - began < 2


def test_only_a_key_that_is_there_is_claimed(hub: str, tmp_path: Path) -> None:
    """W&B itself is not asked; a key of the wrong form is none."""
    alone = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    assert asked("wandb_key()", hub, tmp_path, **alone, WANDB_API_KEY="f" * 40).state == "ok"
    missing = asked("wandb_key()", hub, tmp_path, **alone)
    assert (missing.state, missing.mend) == ("warning", "wandb login")
    assert "WANDB_MODE is offline" in asked("wandb_key()", hub, tmp_path, WANDB_MODE="offline").found


def test_secrets_are_taken_out_of_what_libraries_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable's name stands instead; short switches are no secrets."""
    monkeypatch.setenv("MY_API_KEY", "abcdefgh12345")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    said = line(Finding("hub", "wrong", "Illegal header value b'Bearer abcdefgh12345', false"))
    assert "abcdefgh12345" not in said
    assert without_secrets("Bearer abcdefgh12345, false") == "Bearer $MY_API_KEY, false"


@pytest.mark.parametrize(
    ("answer", "state", "said"),
    [
        (None, "absent", "no nvidia-smi"),
        (Smi(0, "570.172.08"), "ok", "570.172.08"),
        (Smi(18, "Failed to initialize NVML: Driver/library version mismatch"), "wrong", "mismatch"),
        (Smi(-1, "nvidia-smi has not answered in 20 s"), "wrong", "not answered"),
        (Smi(0, "No devices were found"), "warning", "no GPU"),
    ],
    ids=["none", "well", "mismatch", "hangs", "no devices"],
)
def test_a_driver_that_does_not_answer_is_wrong_and_none_is_absent(answer: Smi | None, state: str, said: str) -> None:
    """A machine without a GPU is not broken."""
    finding = doctor_gpus.driver(answer)
    assert finding.state == state
    assert said in finding.found
    assert bool(finding.mend) == (state in ("wrong", "warning"))


@pytest.mark.parametrize(
    ("gpus", "torch", "state", "said"),
    [
        ([H100], Built("2.13.0+cpu", None), "wrong", "built without CUDA"),
        ([H100, H100], Built("2.13.0", "12.8", FOR_BOTH, 2), "ok", "sees 2 GPU(s)"),
        (
            [H100, H100],
            Built("2.13.0", "12.8", FOR_BOTH, 0, "the driver is too old"),
            "wrong",
            "0 of 2 GPUs: the driver",
        ),
        ([V100], Built("2.13.0", "12.8", FOR_BOTH, 1), "wrong", "no code for Tesla V100 (compute capability 7.0)"),
    ],
    ids=["CPU build", "matches", "old driver", "old GPU"],
)
def test_torch_must_be_built_for_gpu_and_driver(gpus: list[Gpu], torch: Built, state: str, said: str) -> None:
    """The command that mends it is a build that fits."""
    finding = doctor_gpus.match(gpus, torch)
    assert finding.state == state
    assert said in finding.found
    assert bool(finding.mend) == (state == "wrong")


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        (8.9, ["sm_80"], True),
        (9.0, ["sm_80"], False),
        (9.0, ["sm_80", "compute_80"], True),
        (8.0, ["sm_86"], False),
        (9.0, ["sm_90a"], True),
        (10.0, ["sm_90a", "compute_90a"], False),
        (12.0, ["sm_100", "sm_120"], True),
        (7.0, [], False),
    ],
)
def test_binaries_run_within_a_major_version_and_ptx_on_later_ones(
    capability: float, architectures: list[str], runs: bool
) -> None:
    """CUDA C++ Programming Guide, 3.1."""
    assert doctor_gpus.covered(capability, architectures) is runs


def test_gpus_are_counted_and_told_apart() -> None:
    """Mixed kinds wait for each other; fewer than a profile asks for are wrong."""
    assert doctor_gpus.gpus(()).state == "absent"
    assert doctor_gpus.gpus((), wanted=1).state == "wrong"
    assert doctor_gpus.gpus("RunError: broken").found == "not checked: the driver does not answer"
    assert doctor_gpus.gpus((H100, H100)) == Finding("GPU", "ok", "2 x NVIDIA H100, 79.2 GiB")
    assert doctor_gpus.gpus((H100, V100)).state == "warning"
    assert doctor_gpus.gpus((H100,), wanted=2).state == "wrong"
    assert doctor_gpus.bf16([V100]).state == "warning"
    assert doctor_gpus.nccl([H100]).state == "absent"


def test_disk_memory_and_compilers_are_judged_by_what_a_run_needs() -> None:
    """Thresholds from both sides."""
    assert [doctor.disk({"runs": gib}).state for gib in (50.0, 5.0, 0.5, None)] == ["ok", "warning", "wrong", "wrong"]
    assert [doctor.memory(64.0, gib).state for gib in (32.0, 2.0, None)] == ["ok", "warning", "absent"]
    assert [doctor.memory(2.0, 32.0).state] == ["warning"]  # the control group's share is the limit
    assert [doctor.shared_memory({"": gib}).state for gib in (8.0, 0.06, None)] == ["ok", "warning", "wrong"]
    assert doctor.deepspeed(installed=False, tools={"nvcc": False}).state == "absent"
    assert "ninja" in doctor.deepspeed(installed=True, tools={"c++": True, "ninja": False}).mend
    assert doctor.deepspeed(installed=True, tools={"c++": True, "ninja": True}).state == "ok"


def test_real_arithmetic_is_done() -> None:
    """On the CPU here, the same that a GPU is asked for: a bf16 product, and NF4 weights."""
    assert 1e-5 < doctor_gpus.product_error("cpu") < doctor_gpus.RELATIVE_ERROR
    assert doctor_gpus.bitsandbytes().state == "ok"


@pytest.mark.slow
def test_processes_add_up_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two over gloo, as GPUs do over NCCL; a backend that is not there is a reason, not a traceback."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not doctor_gpus.sum_fault("gloo", 2)
    assert doctor_gpus.sum_fault("no such backend", 1)


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_what_hangs_is_named_and_killed_with_all_it_started(tmp_path: Path) -> None:
    """Its process says what it begins; what was found before stays, what comes after was not checked."""
    child = tmp_path / "child"
    said = f"echo '{line(Finding('disk', 'ok', 'fine'))}'\necho '{line(Started('driver'))}'"
    python = program(tmp_path / "python", f"{said}\nsleep 60 & echo $! > '{child}'\nwait")
    found = {one.what: one for one in examination.examined(str(python), (), seconds=2.5)}
    assert found["disk"].state == "ok"
    assert (found["driver"].state, found["driver"].found) == ("wrong", "not done after 2.5 s")
    assert found["NCCL between GPUs"] == Finding("NCCL between GPUs", "absent", "not checked: driver was not finished")
    assert set(found) == set(doctor.checks(None, Path(), 0))
    pid = int(child.read_text())
    until = time.monotonic() + 10
    while start_ticks(pid) and time.monotonic() < until:  # the signal is on its way
        time.sleep(0.05)
    assert not start_ticks(pid)


def test_what_dies_is_named_with_its_signal_and_last_words(tmp_path: Path) -> None:
    """A library may take its process with it, and an interpreter may lack the package."""
    begun = line(Started("bitsandbytes"))
    python = program(tmp_path / "python", f"echo '{begun}'\necho 'last words' >&2\nkill -SEGV $$")
    died = {one.what: one for one in examination.examined(str(python), ())}["bitsandbytes"]
    assert (died.state, died.found) == ("wrong", "its process died of SIGSEGV (last words)")
    bare = program(tmp_path / "bare", "echo 'No module named finllm' >&2\nexit 1")
    (alone,) = examination.examined(str(bare), ())
    assert (alone.what, alone.state) == ("Python", "wrong")
    assert "No module named finllm" in alone.found
    (missing,) = examination.examined(str(tmp_path / "none"), ())
    assert missing.state == "wrong"


def test_a_check_that_breaks_is_a_finding() -> None:
    """And the others go on."""
    finding = doctor.examined("disk", lambda: doctor.disk({"runs": 1 / 0}))
    assert (finding.state, finding.found) == ("wrong", "the check broke: ZeroDivisionError: division by zero")


@pytest.mark.slow
def test_the_command_finds_a_broken_driver_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, as JSON and as a table, with a program that stands in for nvidia-smi."""
    said = "Failed to initialize NVML: Driver/library version mismatch"
    program(tmp_path / "nvidia-smi", f"echo '{said}'\nexit 18")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cli.main(["doctor", "--json", "--runs", str(tmp_path / "runs")]) == 1
    shown = capsys.readouterr().out
    found = {one["what"]: one for one in json.loads(shown)}
    assert found["driver"] == {
        "where": "here", "what": "driver", "state": "wrong", "found": said,
        "mend": "sudo reboot (the driver was updated under a loaded kernel module)",
    }  # fmt: skip
    assert found["bf16"]["found"] == "not checked: the driver does not answer"
    assert set(found) == {"SLURM", *doctor.checks(None, Path(), 0)}
    assert TOKEN not in shown
    assert not (tmp_path / "runs").exists()
    show(
        {"node1": [Finding(**{key: one[key] for key in ("what", "state", "found", "mend")}) for one in found.values()]}
    )
    table = capsys.readouterr().out.splitlines()
    assert any(row.split()[:2] == ["driver", "wrong"] and "sudo reboot" in row for row in table)
    assert table[-1].endswith("not here or not checked")


def test_the_gpus_of_the_driver_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program stands in for nvidia-smi; `CUDA_VISIBLE_DEVICES` hides what it lists."""
    answers = 'case "$*" in *name*) echo "NVIDIA H100, 81559, 9.0";; *) echo 570.1;; esac'
    program(tmp_path / "nvidia-smi", answers)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    rows = doctor_gpus.checks(0)
    assert rows["driver"]() == Finding("driver", "ok", "570.1")
    assert rows["GPU"]() == Finding("GPU", "ok", "1 x NVIDIA H100, 79.6 GiB")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor_gpus.checks(0)["GPU"]().state == "absent"


def test_slurm_is_absent_where_nobody_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And wrong where somebody does; a controller that answers is well."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [examination.clients(needed=needed).state for needed in (False, True)] == ["absent", "wrong"]
    for name in examination.CLIENTS:
        program(tmp_path / name, "echo 'Slurmctld(primary) at head is DOWN'")
    assert [examination.clients(needed=needed).state for needed in (False, True)] == ["warning", "wrong"]
    program(tmp_path / "scontrol", "echo 'Slurmctld(primary) at head is UP'")
    assert "no sacct" in examination.clients(needed=True).found
