"""Starts a service and ends it: listens, and on SIGTERM answers what it has taken before it goes."""

import logging
import signal
import sys
from pathlib import Path
from socket import socket

import uvicorn

from finllm.errors import RunError
from finllm.service.app import create
from finllm.service.reader import Reader
from finllm.service.settings import TOKEN, Settings

log = logging.getLogger(__name__)


def serve(source: str | Path, settings: Settings, device: str | None = None) -> None:
    """Serve a run or a model until SIGTERM or Ctrl-C; raises RunError where it cannot be loaded, or listen."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    reader = Reader(source, device)
    if settings.token is None and not settings.is_local:
        log.warning("everyone who reaches %s can ask this service; set %s to ask for a token", settings.host, TOKEN)
    server = Server(_configuration(reader, settings))
    # After draining, uvicorn raises the signal again for whoever had handled it: being asked to end is no failure.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way to say that it could not listen; it has logged why
        raise RunError(
            f"cannot listen on {settings.host}:{settings.port}; choose another --port, or 0 for any that is free"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _configuration(reader: Reader, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        create(reader, settings),
        host=settings.host,
        port=settings.port,
        access_log=False,  # it would show paths and queries; ours shows routes
        log_config=None,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=int(settings.drain_seconds),
        server_header=False,
    )


class Server(uvicorn.Server):
    """Tells where it listens once it does."""

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                print(f"serving on http://{place} (its description: /docs); Ctrl-C ends", flush=True)
