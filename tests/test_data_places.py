"""finllm.data.places: where data sets are looked for, and what is said when they are nowhere."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finllm.data import places
from finllm.data.fiqa import Fiqa
from finllm.data.phrasebank import PhraseBank
from finllm.errors import DataError

GET = "Get it somewhere"
HUB = places.HubFiles("nobody/nothing", ("a.csv",))


@pytest.fixture(autouse=True)
def offline_and_far_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of its own in tmp_path, no FINLLM_DATA, no hub."""
    monkeypatch.setattr(places, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.delenv("FINLLM_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def made(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("x")
    return folder


def test_the_environment_comes_before_the_folder_beside_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is used where the environment's folder does not hold the file."""
    beside = made(tmp_path / "shared" / "data" / "mine", "a.csv")
    named = made(tmp_path / "env" / "mine", "a.csv")
    assert places.locate("mine", None, ("a.csv",), GET) == beside
    monkeypatch.setenv("FINLLM_DATA", str(tmp_path / "env"))
    assert places.locate("mine", None, ("a.csv",), GET) == named
    (named / "a.csv").unlink()
    assert places.locate("mine", None, ("a.csv",), GET) == beside


def test_a_path_in_the_recipe_is_the_only_place_looked_at(tmp_path: Path) -> None:
    """Silently using another copy than the one named would be worse than stopping."""
    made(tmp_path / "shared" / "data" / "mine", "a.csv")
    with pytest.raises(DataError) as caught:
        places.locate("mine", tmp_path / "wrong", ("a.csv",), GET, HUB)
    assert str(caught.value) == (
        f"the data set mine is not at hand; looked at\n  {tmp_path / 'wrong'}: does not exist\nGet it somewhere"
    )


def test_missing_data_says_exactly_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place with its reason, then how to get the data."""
    monkeypatch.setenv("FINLLM_DATA", str(tmp_path / "env"))
    made(tmp_path / "env" / "mine", "b.csv")
    with pytest.raises(DataError) as caught:
        places.locate("mine", None, ("a.csv", "b.csv"), GET, HUB)
    assert str(caught.value).splitlines() == [
        "the data set mine is not at hand; looked at",
        f"  {tmp_path / 'env' / 'mine'}: has no a.csv",
        f"  {tmp_path / 'shared' / 'data' / 'mine'}: does not exist",
        "  https://huggingface.co/datasets/nobody/nothing (a.csv): not in the cache, and not asked because HF_HUB_OFFLINE is set",
        GET,
    ]


def test_an_unset_environment_is_said_too() -> None:
    """A newcomer learns that the variable exists; FiQA has no hub copy to name."""
    with pytest.raises(DataError) as caught:
        Fiqa(name="fiqa").read()
    assert "$FINLLM_DATA/fiqa: FINLLM_DATA is not set" in str(caught.value)
    assert "huggingface.co/datasets" not in str(caught.value)
    assert "commit 31b144b" in str(caught.value)


def test_a_file_that_is_no_zip_and_a_zip_without_the_file_are_refused(tmp_path: Path) -> None:
    """A download that was cut short, or another archive."""
    torn = tmp_path / "torn.zip"
    torn.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match=r"torn.zip: neither a folder nor a zip file"):
        PhraseBank(name="phrasebank", path=torn).read()
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as out:
        out.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match=r"other.zip: has no Sentences_50Agree.txt"):
        PhraseBank(name="phrasebank", path=other).read()


@contextmanager
def hub_serving(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A small hub on this machine: its address, and the paths it was asked for; all other paths are 404."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            if body is None:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def read_from(address: str, home: Path, spec: str = "phrasebank.PhraseBank", offline: str = "0") -> str:
    """What reading a set prints where only the hub has it; huggingface_hub takes its address from the environment."""
    name = spec.partition(".")[0]
    code = (
        "from pathlib import Path\n"
        f"from finllm.data import places, {name}\n"
        "from finllm.errors import DataError\n"
        f"places.CHECKOUT = Path({str(home / 'checkout')!r})\n"
        "try:\n"
        f"    print(len({spec}(name={name!r}).read()))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FINLLM_"))}
    environment = kept | {"HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": offline}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_phrasebank_comes_from_the_hub_as_a_zip_and_then_from_the_cache(shared_data: Path, tmp_path: Path) -> None:
    """A real download from a hub on this machine; the second reading, offline, needs no hub."""
    archive = shutil.make_archive(str(tmp_path / "bank"), "zip", shared_data / "phrasebank")
    path = "/datasets/takala/financial_phrasebank/resolve/main/data/FinancialPhraseBank-v1.0.zip"
    with hub_serving({path: Path(archive).read_bytes()}) as (address, asked):
        assert read_from(address, tmp_path) == "4833\n"
        assert path in asked
    assert read_from(address, tmp_path, offline="1") == "4833\n"


def test_tfns_comes_from_the_hub_as_two_files(shared_data: Path, tmp_path: Path) -> None:
    """Both land in one folder, which is then read like any other."""
    files = {
        f"/datasets/zeroshot/twitter-financial-news-sentiment/resolve/main/{file.name}": file.read_bytes()
        for file in (shared_data / "tfns").glob("*.csv")
    }
    with hub_serving(files) as (address, _):
        assert read_from(address, tmp_path, "tfns.Tfns") == "11478\n"


def test_a_hub_that_refuses_is_one_of_the_places_looked_at(tmp_path: Path) -> None:
    """An error of the hub is a fault with directions, not a traceback."""
    with hub_serving({}) as (address, _):
        shown = read_from(address, tmp_path)
    assert "https://huggingface.co/datasets/takala/financial_phrasebank" in shown
    assert "RepositoryNotFoundError" in shown
    assert "Get FinancialPhraseBank-v1.0.zip" in shown
