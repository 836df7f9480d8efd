"""The verbs that put a model before people: `serve` over HTTP, `demo` as a page."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from finllm.errors import RunError
from launch.commands import source
from launch.endings import DONE
from launch.place import WAITING

LOCAL = "127.0.0.1"
PAGE = Path(__file__).with_name("page.py")


def add_serve_options(verb: argparse.ArgumentParser) -> None:
    """The options of `finllm serve`."""
    verb.add_argument("run", metavar="RUN", help="a run, an adapter's folder, or a model of the hub")
    verb.add_argument("--host", default=LOCAL, help=f"address to listen on ({LOCAL}: this machine only)")
    verb.add_argument("--port", type=_port, default=8000, help="0 takes any free one (8000)")
    verb.add_argument("--batch-texts", type=_count, default=64, metavar="N", help="read together at most (64)")
    verb.add_argument("--queue-texts", type=_count, default=1024, metavar="N", help="may wait; then 429 (1024)")
    verb.add_argument("--timeout", type=_count, default=60, metavar="SECONDS", help="for one request (60)")
    verb.add_argument("--device", choices=["cuda", "cpu"], help="else the GPU where there is one")
    verb.add_argument("--log-texts", action="store_true", help="write texts and answers into the log")


def add_demo_options(verb: argparse.ArgumentParser) -> None:
    """The options of `finllm demo`."""
    verb.add_argument("run", nargs="?", metavar="RUN", help="as for serve; else the page offers what there is")
    verb.add_argument("--host", default=LOCAL, help=f"address to listen on ({LOCAL}: this machine only)")
    verb.add_argument("--port", type=_port, default=8501, help="(8501)")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text} is no port; write a number from 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; write a whole number from 1")
    return int(text)


def serve(
    *,
    run: str,
    runs: Path,
    host: str,
    port: int,
    batch_texts: int,
    queue_texts: int,
    timeout: int,
    log_texts: bool,
    device: str | None,
) -> int:
    """Answer over HTTP until SIGTERM or Ctrl-C."""
    _need("fastapi", "serve")
    found = source(run, runs)
    os.environ.setdefault("OMP_WAIT_POLICY", WAITING)  # read when torch is imported
    from finllm.service.schema import MAX_TEXTS
    from finllm.service.server import serve
    from finllm.service.settings import Settings, token_of_environment

    try:
        settings = Settings(
            host=host,
            port=port,
            batch_texts=batch_texts,
            queue_texts=queue_texts,
            timeout_seconds=timeout,
            log_texts=log_texts,
            token=token_of_environment(),
        )
    except ValueError as error:
        raise RunError(f"--queue-texts {queue_texts}: must hold one request of {MAX_TEXTS} texts at least") from error
    serve(found, settings, device)
    return DONE


def demo(*, run: str | None, runs: Path, host: str, port: int) -> int:
    """Show a page in the browser until Ctrl-C; without a run, the page offers what there is."""
    _need("streamlit", "page")
    chosen = "" if run is None else str(source(run, runs))
    options = {
        "server.address": host,
        "server.port": port,
        "server.fileWatcherType": "none",
        "server.maxUploadSize": 20,
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "theme.primaryColor": "#1d4e89",
        # A full collection at every look for an answer would hold the model up: torch has millions of objects.
        "runner.postScriptGC": "false",
    }
    os.environ.setdefault("OMP_WAIT_POLICY", WAITING)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words = [sys.executable, "-m", "streamlit", "run", str(PAGE), *flags, "--", chosen, str(runs.absolute())]
    os.execv(sys.executable, words)  # noqa: S606 - Ctrl-C and signals then reach Streamlit itself


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise RunError(f"this needs the package {package}, which is not installed: pip install 'finllm[{extra}]'")
