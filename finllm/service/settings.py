"""What a service allows, and where it listens."""

import os

from pydantic import Field, SecretStr

from finllm.errors import RunError
from finllm.service.schema import MAX_TEXTS
from finllm.yamlfile import Spec

TOKEN = "FINLLM_TOKEN"  # noqa: S105 - the name of the variable, not its value
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(Spec):
    """Limits of a service; the defaults suit one small machine."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    """0 takes any free port."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    batch_texts: int = Field(default=64, ge=1)
    """That the model reads together, at most."""
    batch_explained: int = Field(default=8, ge=1)
    """That it explains together; texts to classify wait meanwhile."""
    queue_texts: int = Field(default=1024, ge=MAX_TEXTS)
    """That may wait for the model; a request that would pass this gets 429."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """For one request, from its last byte to its answer, and for its bytes to arrive."""
    drain_seconds: float = Field(default=30.0, gt=0)
    """For requests to be answered after SIGTERM."""
    max_connections: int = Field(default=1024, ge=1)
    """At one time; more are answered with 503."""
    log_texts: bool = False
    """Write texts and answers into the log."""
    token: SecretStr | None = None
    """What a client must send as bearer token; None asks for none."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK


def token_of_environment() -> SecretStr | None:
    """The bearer token in $FINLLM_TOKEN; raises RunError where it is set but cannot be one."""
    given = os.environ.get(TOKEN)
    if given is None:
        return None
    if not given.isascii() or not given.isprintable() or not given.strip() or " " in given:
        raise RunError(f"{TOKEN} is set but empty, or holds spaces or other than ASCII; set it to a long random word")
    return SecretStr(given)
