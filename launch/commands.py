"""What each verb of the command does; every function returns the exit status."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from finllm import embedded
from finllm.errors import RunError
from finllm.files import write_text
from finllm.run import ALIVE, Progress, Run, State, find
from launch import BACKENDS, finding, pairs, planning, shipped, tables
from launch.endings import DONE
from launch.place import WAITING
from launch.show import Tail

LINES_AT_ONCE = 64
"""Texts from standard input that are predicted together."""


def status(*, names: list[str], runs: Path, as_json: bool) -> int:
    """How runs stand."""
    chosen = [run for name in names for run in finding.runs_of(name, runs)] if names else _all(runs)
    standings = tables.standings(chosen)
    if as_json:
        print(json.dumps([asdict(standing) for standing in standings], indent=1))
        return DONE
    if not standings:
        print(f"no runs in {runs.absolute()} yet; `finllm launch demo` makes one")
        return DONE
    if names and len(chosen) == 1 and (why := _why(chosen[0])):
        print(why, end="\n\n")
    tables.show(tables.runs(standings))
    print(*tables.remarks(standings), sep="\n")
    return DONE


def _all(runs: Path) -> list[Run]:
    """Every run, the oldest first."""
    plans = sorted(runs.glob("*/plan.json"), key=lambda plan: plan.stat().st_mtime)
    return [Run(plan.parent.absolute()) for plan in plans]


def logs(*, run: str, runs: Path, follow: bool) -> int:
    """The logs of a run's nodes, the reason of a failure first."""
    found = finding.run_of(run, runs)
    if why := _why(found):
        print(why, "\n--- the whole log:\n", sep="\n")
    tails: dict[Path, Tail] = {}
    told = ""
    while follow and (state := State.of(found)) is not None and BACKENDS[state.backend].alive(found, state):
        _print_new(found, tails)
        told = _tell_what_it_waits_for(found, state, told)
        time.sleep(0.2)
    _print_new(found, tails, to_end=True)
    return DONE


def _why(run: Run) -> str:
    """Why a run failed or was lost, with its traceback; empty for all others."""
    state, progress = State.of(run), Progress.of(run)
    if state is None:
        return ""
    if state.status == "failed" and progress is not None and progress.error:
        return progress.error.rstrip()
    return "\n".join(seen.error for seen in BACKENDS[state.backend].seen([(run, state)]))


def _tell_what_it_waits_for(run: Run, state: State, told: str) -> str:
    """Say it beside the log, once; returns what has been said last."""
    seen = BACKENDS[state.backend].seen([(run, state)])[0]
    now = f"{seen.status} {f'({seen.waits_for})' if seen.waits_for else ''}".rstrip()
    if now != told and seen.status in ("waiting", "starting"):
        print(f"[finllm] {now}", file=sys.stderr, flush=True)
    return now


def _print_new(run: Run, tails: dict[Path, Tail], *, to_end: bool = False) -> None:
    """What has been said since the last call; lines of all nodes but the first say so."""
    for path in run.logs:
        prefix = "" if path == run.log else f"{path.stem.removeprefix('log-')} | "
        for line in tails.setdefault(path, Tail(path)).read(to_end=to_end):
            print(f"{prefix}{line}", flush=True)


def cancel(*, run: str, runs: Path, wait: float) -> int:
    """End a run, or all cells of a sweep."""
    found = finding.runs_of(run, runs)
    for one in found:  # all are asked before the first is waited for
        state = State.of(one)
        if len(found) > 1 and state is not None and state.status in ALIVE:
            write_text(one.stop_request, "cancel\n")
    for one in found:
        _cancel(one, wait)
    return DONE


def _cancel(run: Run, wait: float) -> None:
    state = State.of(run)
    if state is None:
        raise RunError(f"{run.name} was not started by `finllm launch`; create {run.stop_request} to ask it to stop")
    backend = BACKENDS[state.backend]
    if state.status not in ALIVE and not backend.alive(run, state):
        print(f"{run.name} has ended already: {state.status}")
        return
    print(f"asked {run.name} to save and stop; it is ended by force in {wait:.0f} s", flush=True)
    after = backend.cancel(run, state, wait)
    print(f"{run.name}: {after.status}")


def recipes(*, folder: Path) -> int:
    """Recipes and what they are for."""
    if not shipped.names(folder):
        raise RunError(f"{folder.absolute()}: no *.yaml there; give the folder of your recipes")
    tables.show(tables.recipes(folder))
    return DONE


def check(*, recipe: str, overrides: list[str]) -> int:
    """Everything that is wrong with a recipe and its data; or their counts."""
    path, read, parts, notes = planning.checked(recipe, overrides)
    told = pairs.told(read, parts)  # folds may be missing
    print(f"{path}: no faults\n")
    tables.show(tables.data_counts(parts))
    print("", *(notes or ("no text, and no near twin of one, stands in two parts",)), sep="\n")
    if told:
        print("", *told, sep="\n")
    return DONE


def predict(*, run: str, texts: list[str], runs: Path, file: Path | None, as_json: bool) -> int:
    """The sentiment of texts, one line each."""
    for text, answer in _answers(run, texts, runs, file, lambda predictor, chunk: predictor.predict(chunk)):
        fields = (answer["sentiment"], f"{answer['confidence']:.3f}", _line(text))
        print(_json(text, answer) if as_json else "\t".join(fields), flush=True)
    return DONE


def explain(
    *, run: str, texts: list[str], runs: Path, file: Path | None, as_json: bool, max_tokens: int
) -> int:  # fmt: skip
    """The sentiment of texts and the model's reason for it, one line each."""
    for text, answer in _answers(
        run, texts, runs, file, lambda predictor, chunk: predictor.explain(chunk, max_tokens=max_tokens)
    ):
        fields = (answer["sentiment"], f"{answer['confidence']:.3f}", _line(answer["explanation"]), _line(text))
        print(_json(text, answer) if as_json else "\t".join(fields), flush=True)
    return DONE


def _answers(
    run: str, texts: list[str], runs: Path, file: Path | None, ask: Callable[[Any, list[str]], list[Any]]
) -> Iterator[tuple[str, Any]]:
    """Each text with what the run's predictor answers when it is asked."""
    if texts and file:
        raise RunError("texts and --file are both given; keep one")
    lines = iter(texts) if texts else _lines(file)
    model = source(run, runs)
    os.environ.setdefault("OMP_WAIT_POLICY", WAITING)  # read when torch is imported
    from finllm import SentimentPredictor

    predictor = SentimentPredictor(model)
    at_once = 1 if not texts and file is None and sys.stdin.isatty() else LINES_AT_ONCE
    while chunk := list(islice(lines, at_once)):
        yield from zip(chunk, ask(predictor, chunk), strict=True)


def _json(text: str, answer: Any) -> str:
    return json.dumps({"text": text, **answer}, ensure_ascii=False)


def _line(text: str) -> str:
    """The text on one line, without characters that could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def source(run: str, runs: Path) -> str | Path:
    """What the name stands for: a run first, then a folder, a model of the hub, the embedded model."""
    # A misspelt run is not looked for on the hub, which takes a minute where there is no network.
    is_other = Path(run).exists() or "/" in run or run == embedded.NAME
    is_run = (runs / run).is_dir() and not Path(run).is_absolute()  # an absolute path would replace `runs`
    return run if is_other and not is_run else find(run, runs).folder


def _lines(file: Path | None) -> Iterator[str]:
    """The lines of a file, or of standard input as they come."""
    if file is None:
        if sys.stdin.isatty():
            print("one text a line; Ctrl-D ends", file=sys.stderr)
        return (line.rstrip("\r\n") for line in sys.stdin)
    try:
        return iter(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: cannot be read ({error}); give a file in UTF-8 with one text a line") from error


Command = Callable[..., int]
