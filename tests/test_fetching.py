"""How far a download is can be read in the run folder while it lasts."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from finllm import fetching
from finllm.run import Progress, Run

MB = 1_000_000
FILES = {"model-00001-of-00002.safetensors": 30 * MB, "model-00002-of-00002.safetensors": 2 * MB}


@contextmanager
def slow_hub() -> Iterator[tuple[str, threading.Event]]:
    """A hub that sends the first half of a file, and the other half once it is told to."""
    go_on = threading.Event()

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            body = self._body()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()

        def do_GET(self) -> None:
            body = self._body()
            self.do_HEAD()
            self.wfile.write(body[: len(body) // 2])
            if not self.path.startswith("/api/"):
                assert go_on.wait(30)
            self.wfile.write(body[len(body) // 2 :])

        def _body(self) -> bytes:
            if self.path.startswith("/api/"):
                others = {"consolidated.safetensors": 9 * MB, "config.json": 100}
                siblings = [{"rfilename": name, "size": size} for name, size in {**FILES, **others}.items()]
                return json.dumps({"id": "some/model", "siblings": siblings}).encode()
            return b"x" * FILES[self.path.rpartition("/")[2]]

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", go_on
        server.shutdown()
        thread.join()


def test_a_download_from_the_hub_is_counted_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that Transformers takes, in megabytes, as they arrive in huggingface_hub's own cache."""
    run = Run(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with slow_hub() as (address, go_on):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        folder = fetching.hub_folder("some/model")
        with fetching.shown("fetching some/model", folder, lambda: fetching.hub_bytes("some/model", None), run):
            where = {"cache_dir": tmp_path / "hub"}
            fetch = threading.Thread(target=hf_hub_download, args=("some/model", next(iter(FILES))), kwargs=where)
            fetch.start()
            end = time.monotonic() + 30
            while (now := Progress.of(run)) is None or now.done < 1:
                assert time.monotonic() < end, "nothing was counted"
                time.sleep(0.05)
            go_on.set()
            fetch.join()
    assert (now.stage, now.total, now.unit) == ("fetching some/model", 32, "MB")
    assert 1 <= now.done < 30


def test_what_is_at_hand_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing arrives: no progress, and nobody is asked for a size."""
    monkeypatch.setattr(fetching, "EVERY_SECONDS", 0.01)
    (tmp_path / "there").write_bytes(b"x" * 2 * MB)
    with fetching.shown("fetching", tmp_path, lambda: pytest.fail("asked for the size"), Run(tmp_path)):
        time.sleep(0.1)
    assert Progress.of(Run(tmp_path)) is None


def test_a_hub_that_does_not_say_leaves_the_size_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The download itself will say what is wrong."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetching.hub_bytes("some/model", None) == 0
