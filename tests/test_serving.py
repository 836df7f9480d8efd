"""`finllm serve` as a process: it listens, asks for its token, drains, and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from finllm import SentimentPredictor
from finllm.errors import RunError
from finllm.run import Run
from finllm.service.settings import TOKEN
from launch import cli, serving


@pytest.fixture
def serve(tiny_run: Run) -> Iterator[Callable[..., tuple["subprocess.Popen[str]", str]]]:
    """Starts `finllm serve` on the tiny run; gives the process and its address."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, token: str | None = None) -> tuple["subprocess.Popen[str]", str]:
        program = str(Path(sys.executable).with_name("finllm"))
        runs = str(tiny_run.folder.parent)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({TOKEN: token} if token else {})}
        words = [program, "serve", tiny_run.name, "--runs", runs, "--port", "0", "--device", "cpu", *options]
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        found = re.search(r"serving on (http://\S+)", process.stdout.readline())
        assert found, process.communicate()
        return process, found[1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ask(address: str, texts: str | list[str], token: str | None = None) -> httpx2.Response:
    """The answer to a question."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx2.post(f"{address}/v1/classify", json={"texts": texts}, headers=headers, timeout=120)


@pytest.mark.slow
def test_a_service_answers_and_drains_at_sigterm(
    serve: Callable[..., tuple["subprocess.Popen[str]", str]], tiny_run: Run
) -> None:
    """Loopback only, with the token of the environment; what was taken before SIGTERM is answered; exit 0; no text."""
    process, address = serve(token="planted-token")
    assert address.startswith("http://127.0.0.1:")
    assert ask(address, "Planted profits.").status_code == 401
    answer = ask(address, "Planted profits.", "planted-token").json()
    right = SentimentPredictor(tiny_run.folder, device="cpu").predict("Planted profits.")
    assert answer["model"] == "tiny"
    assert answer["answers"][0]["probabilities"] == pytest.approx(right["probabilities"], abs=1e-5)

    texts = [f"Planted profits {i}. " + "Orders doubled. " * 20 for i in range(256)]
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(ask, address, texts, "planted-token")
        while httpx2.get(f"{address}/healthz").json()["waiting_texts"] == 0:
            assert not taken.done()
        process.send_signal(signal.SIGTERM)
        drained = taken.result(120)
    assert (drained.status_code, len(drained.json()["answers"])) == (200, 256)
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 0
    assert "POST /v1/classify 200" in said
    assert "Planted" not in said
    assert "planted-token" not in said


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])  # noqa: S104 - that is the point
def test_a_port_that_is_taken_is_said(
    tiny_run: Run, host: str, warned: bool, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Exit 2, with what to do; where others could reach the service without a token, a warning."""
    with socket.socket() as taken:
        taken.bind((host, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["serve", str(tiny_run.folder), "--host", host, "--port", port, "--device", "cpu"]
        assert cli.main(words) == 2
    assert f"cannot listen on {host}:{port}; choose another --port" in capfd.readouterr().err
    assert (f"set {TOKEN} to ask for a token" in caplog.text) == warned


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "tiny", "--port", "70000"], "70000 is no port"),
        (["serve", "tiny", "--batch-texts", "0"], "0 is no count"),
        (["serve", "no-such-run"], "no run 'no-such-run'"),
        (["demo", "no-such-run"], "no run 'no-such-run'"),
    ],
)
def test_wrong_words_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With exit 2 and before any model is loaded."""
    try:
        status: Any = cli.main([*arguments, "--runs", str(tmp_path)])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_queue_too_short_for_one_request_is_refused(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the model is loaded."""
    assert cli.main(["serve", str(tiny_run.folder), "--queue-texts", "8"]) == 2
    assert "must hold one request of 256 texts" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra() -> None:
    """Both are optional."""
    with pytest.raises(RunError, match=r"pip install 'finllm\[page\]'"):
        serving._need("no_such_package", "page")
