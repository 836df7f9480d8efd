"""Tracking: Weights & Biases through its own SDK, and `metrics.jsonl` in the run folder, which mirrors it always.

A run folder has one W&B run. Its id is made once and kept in `wandb_id`, so that an attempt that was requeued and the
evaluation afterwards continue the same run. Tracking never ends a run: without a key, a network or a living W&B
process it goes on offline, or with `metrics.jsonl` alone, and says so.
"""

import io
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from typing_extensions import override

from finllm import sweeps
from finllm.journal import Board, Journal
from finllm.plan import Plan
from finllm.run import Run

INIT_SECONDS = 20.0
"""How long an online start may take before it goes offline."""
FINISH_SECONDS = 60.0
"""How long the upload at the end may take; what is left can be synced later."""
STEP = "train/global_step"
"""The x-axis. W&B's own step must only increase and drops what a rollback replays; this figure may go back."""
Mode = Literal["online", "offline", "disabled"]


class Tracker(Protocol):
    """Where the figures of a run go."""

    def log(self, step: int, /, **numbers: float) -> None:
        """Figures of one optimizer step; a step may come again after a rollback."""
        ...

    def summary(self, **numbers: float) -> None:
        """Figures of the whole run, such as the scores on the test part."""
        ...

    def tables(self, tables: Mapping[str, Board], /) -> None:
        """Tables of the whole run, by name, such as its predictions."""
        ...

    def pictures(self, pictures: Mapping[str, bytes], /) -> None:
        """Figures of the whole run, by name, as PNG."""
        ...

    def finish(self, exit_code: int = 0) -> None:
        """Nothing more comes; anything but 0 marks the run as failed."""
        ...


class NoTracker(Tracker):
    """Keeps nothing: what all processes but the main one get."""

    @override
    def log(self, step: int, /, **numbers: float) -> None: ...
    @override
    def summary(self, **numbers: float) -> None: ...
    @override
    def tables(self, tables: Mapping[str, Board], /) -> None: ...
    @override
    def pictures(self, pictures: Mapping[str, bytes], /) -> None: ...
    @override
    def finish(self, exit_code: int = 0) -> None: ...


class Wandb(Tracker):
    """A W&B run beside the journal; when W&B breaks, the journal goes on alone."""

    def __init__(self, run: Run, journal: Journal, session: Any) -> None:
        self._run, self._journal, self._session = run, journal, session
        # W&B counts from 0 in every offline session; the journal's lines go on counting over all of them.
        self._next = max(journal.lines, session.starting_step)
        session.define_metric(STEP, hidden=True)
        session.define_metric("*", step_metric=STEP)

    @override
    def log(self, step: int, /, **numbers: float) -> None:
        self._journal.log(step, **numbers)
        self._send(lambda: self._session.log({STEP: step, **numbers}, step=self._next, commit=True))
        self._next += 1

    @override
    def summary(self, **numbers: float) -> None:
        self._journal.summary(**numbers)
        self._send(lambda: self._session.summary.update(numbers))

    @override
    def tables(self, tables: Mapping[str, Board], /) -> None:
        import wandb

        self._log_media(
            lambda: {
                f"tables/{name}": wandb.Table(columns=list(board.columns), data=[list(row) for row in board.rows])
                for name, board in tables.items()
            }
        )

    @override
    def pictures(self, pictures: Mapping[str, bytes], /) -> None:
        import wandb
        from PIL import Image

        self._log_media(
            lambda: {
                f"figures/{name}": wandb.Image(Image.open(io.BytesIO(data)), caption=name)
                for name, data in pictures.items()
            }
        )

    def _log_media(self, made: Callable[[], dict[str, Any]]) -> None:
        """Log tables or pictures as one more line of the history; metrics.jsonl has no place for them."""
        self._send(lambda: self._session.log(made(), step=self._next, commit=True))
        self._next += 1

    @override
    def finish(self, exit_code: int = 0) -> None:
        self._journal.finish()
        self._send(lambda: _end(self._session, exit_code))
        if self._session is not None:
            print(_where(self._run, self._session), flush=True)

    def _send(self, call: Callable[[], object]) -> None:
        import wandb

        if self._session is None:
            return
        try:
            call()
        except (wandb.Error, OSError) as error:  # its process was killed, the disk is full, the upload took too long
            self._session = None
            print(
                f"W&B stopped ({_first_line(error)}); figures go on into {self._run.metrics}. "
                f"What W&B has can be uploaded later: wandb sync {self._run.folder / 'wandb'}/*run-*",
                flush=True,
            )


def start(run: Run, plan: Plan, stage: str, *, main: bool = True) -> Tracker:
    """The tracker of this process for one stage (`train`, `evaluate`); only the main process keeps anything."""
    if not main:
        return NoTracker()
    journal = Journal(run, stage)
    mode, reason = _mode(plan)
    if mode == "disabled":
        return journal
    session = _session(run, plan, mode, reason)
    return journal if session is None else Wandb(run, journal, session)


def run_id(run: Run) -> str:
    """The id of the folder's W&B run, made at the first call."""
    path = run.folder / "wandb_id"
    if not path.is_file():
        temporary = path.with_name(f".wandb_id.{secrets.token_hex(4)}")
        temporary.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        try:
            os.link(temporary, path)  # whole at once, and refused where another process was first
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return path.read_text(encoding="utf-8").strip()


def _mode(plan: Plan) -> tuple[Mode, str]:
    """How to track, and why where the recipe does not say so itself."""
    wanted, environment = plan.recipe.tracking.wandb, os.environ.get("WANDB_MODE", "")
    if wanted == "auto" and environment in ("offline", "dryrun", "disabled"):
        return "disabled" if environment == "disabled" else "offline", f"WANDB_MODE is {environment}"
    if wanted in ("offline", "disabled"):
        return ("offline" if wanted == "offline" else "disabled"), "as the recipe says"
    fault = key_fault()
    return ("offline", fault) if fault else ("online", "")


def key_fault() -> str:
    """Why there is no usable API key, found without contacting anything; empty where there is one."""
    import wandb
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth  # the SDK's own order: environment, netrc, its settings files

    try:
        host = wandb_setup.singleton().settings.base_url
        found = wbauth.authenticate_session(host=host, source="finllm", prompt=False, update_session=False)
    except (wandb.Error, ValueError) as error:
        return _first_line(error)
    return "" if found else "no API key; `wandb login` stores one"


def _session(run: Run, plan: Plan, mode: Mode, reason: str) -> Any:
    """A started W&B run, offline where it cannot be online; None where it cannot start at all."""
    import wandb

    # Even offline, the SDK reports on itself to its maker unless told not to.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        session = _init(run, plan, mode)
    except (wandb.Error, OSError) as error:
        reason = _first_line(error)
        wandb.teardown(exit_code=0)  # else its process says that the run id is in use
        if mode == "offline":
            print(f"W&B does not start ({reason}); figures go into {run.metrics} alone", flush=True)
            return None
        return _session(run, plan, "offline", reason)
    if mode == "offline":
        print(f"W&B is offline: {reason}. Figures go into {run.folder / 'wandb'} and {run.metrics}", flush=True)
    else:
        print(f"W&B: {session.url}", flush=True)
    return session


def _init(run: Run, plan: Plan, mode: Mode) -> Any:
    import wandb

    tracking = plan.recipe.tracking
    return wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group or sweeps.holding(run),
        tags=tracking.tags,
        name=run.name,
        id=run_id(run),
        resume="allow",
        reinit="create_new",
        dir=run.folder,
        mode=mode,
        config=config(plan),
        settings=_settings(),
    )


def _settings() -> Any:
    """Record figures and machine load, and nothing of code, console, command line or environment."""
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        quiet=True,
        disable_code=True,
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_save_requirements=False,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )


def config(plan: Plan) -> dict[str, Any]:
    """What W&B shows as the run's configuration: the resolved recipe and what was decided from it."""
    facts = plan.model_dump(mode="json", exclude={"recipe", "commands", "reasons"})
    return {**plan.recipe.model_dump(mode="json"), "plan": facts}


def _end(session: Any, exit_code: int) -> None:
    """End a session and W&B's own process, which writes the last figures only after `finish` has returned."""
    import wandb

    session.finish(exit_code=exit_code)
    wandb.teardown(exit_code=exit_code)


def _where(run: Run, session: Any) -> str:
    """Where the figures of a finished session can be seen."""
    if session.settings.mode == "online":
        return f"W&B: {session.url}"
    folder = run.folder / "wandb"
    return f"W&B, offline: `wandb leet {folder}` shows the figures, `wandb sync {folder}/offline-run-*` uploads them"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
