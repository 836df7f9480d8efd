"""What each verb of the command does; every function returns the exit status."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from finllm import embedded
from finllm.errors import RunError
from finllm.plan import Plan
from finllm.recipe import Recipe
from finllm.run import Progress, Run, State, find
from launch import BACKENDS, planning, shipped, tables
from launch.show import Tail, called
from launch.supervisor import STAGES, WAITING, Stage

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses; 130 is what shells give for Ctrl-C."""
LINES_AT_ONCE = 64
"""Texts from standard input that are predicted together."""
LAST_LINES = 15


def launch(*, recipe: str, overrides: list[str], name: str | None, runs: Path, dry_run: bool, detach: bool) -> int:
    """Start a run of a recipe, or show what it would be."""
    if dry_run:
        plan = planning.preview(recipe, tuple(overrides), name, runs)
        print(*tables.plan_lines(plan, runs / plan.name), "", *tables.command_lines(plan), sep="\n")
        return DONE
    run = planning.prepare(recipe, tuple(overrides), name, runs)
    print(*tables.plan_lines(Plan.of(run), run.folder), "", sep="\n", flush=True)
    return _start(run, detach=detach)


def resume(*, run: str, runs: Path, detach: bool) -> int:
    """Go on with a run that has ended early."""
    found = find(run, runs)
    state = State.of(found)
    if state is not None and state.status == "done":
        print(f"{found.name} is done; its report is {found.report}")
        return DONE
    return _start(found, detach=detach)


def evaluate(*, run: str, runs: Path) -> int:
    """Score a trained run (again)."""
    found = find(run, runs)
    if "train" in Plan.of(found).commands and not found.adapter.is_dir():
        raise RunError(
            f"{found.name} has no trained weights yet; `finllm resume {called(found)}` trains and evaluates it"
        )
    return _start(found, detach=False, stages=["evaluate"])


def _start(run: Run, *, detach: bool, stages: Sequence[Stage] = STAGES) -> int:
    before = State.of(run)
    backend = BACKENDS[before.backend if before else "local"]
    state = backend.start(run, detach=detach, stages=stages)
    if state.status == "running":
        print(f"{run.name} runs without this terminal (process {state.pid})")
        print(
            f"  follow   finllm logs {called(run)} -f\n  look     finllm status {called(run)}\n  end      finllm cancel {called(run)}"
        )
        return DONE
    return _say_the_end(run, state)


def _say_the_end(run: Run, state: State) -> int:
    if state.status == "done":
        made = {"report": run.report, "scores": run.scores, "adapter": run.adapter, "log": run.log}
        print("", *(f"{name:8} {path}" for name, path in made.items() if path.exists()), sep="\n")
        return DONE
    if state.status == "failed":
        _say_the_failure(run, state)
        return FAILED
    kept = run.complete_checkpoints()
    print(f"\n{run.name} is {state.status}; {f'newest checkpoint {kept[-1].name}' if kept else 'no checkpoint yet'}")
    print(f"  go on    finllm resume {called(run)}")
    return INTERRUPTED


def _say_the_failure(run: Run, state: State) -> None:
    progress = Progress.of(run)
    trace = progress.error.rstrip() if progress else ""
    said = trace.splitlines() or [line for line in Tail(run.log).read(to_end=True) if line.strip()]
    kept = run.complete_checkpoints()
    print("", *said[-LAST_LINES:], "", f"{run.name} failed in {state.stage}: {state.error}", sep="\n", file=sys.stderr)
    print(f"  log      {run.log}", file=sys.stderr)
    print(
        f"  go on    finllm resume {called(run)}, from "
        + (kept[-1].name if kept and state.stage == "train" else f"the beginning of {state.stage}"),
        file=sys.stderr,
    )


def status(*, names: list[str], runs: Path, as_json: bool) -> int:
    """How runs stand."""
    chosen = [find(name, runs) for name in names] if names else _all(runs)
    standings = [tables.standing(run) for run in chosen]
    if as_json:
        print(json.dumps([asdict(standing) for standing in standings], indent=1))
        return DONE
    if not standings:
        print(f"no runs in {runs.absolute()} yet; `finllm launch demo` makes one")
        return DONE
    tables.show(tables.runs(standings))
    print(*tables.remarks(standings), sep="\n")
    return DONE


def _all(runs: Path) -> list[Run]:
    """Every run, the oldest first."""
    plans = sorted(runs.glob("*/plan.json"), key=lambda plan: plan.stat().st_mtime)
    return [Run(plan.parent.absolute()) for plan in plans]


def logs(*, run: str, runs: Path, follow: bool) -> int:
    """The log of a run, the reason of a failure first."""
    found = find(run, runs)
    state, progress = State.of(found), Progress.of(found)
    if state is not None and state.status == "failed" and progress is not None and progress.error:
        print(progress.error.rstrip(), "\n--- the whole log:\n", sep="\n")
    tail = Tail(found.log)
    while follow and (state := State.of(found)) is not None and BACKENDS[state.backend].alive(found, state):
        print(*(f"{line}\n" for line in tail.read()), sep="", end="", flush=True)
        time.sleep(0.2)
    print(*(f"{line}\n" for line in tail.read(to_end=True)), sep="", end="", flush=True)
    return DONE


def cancel(*, run: str, runs: Path, wait: float) -> int:
    """End a run."""
    found = find(run, runs)
    state = State.of(found)
    if state is None:
        raise RunError(
            f"{found.name} was not started by `finllm launch`; create {found.stop_request} to ask it to stop"
        )
    backend = BACKENDS[state.backend]
    if state.status not in ("created", "running") and not backend.alive(found, state):
        print(f"{found.name} has ended already: {state.status}")
        return DONE
    print(f"asked {found.name} to save and stop; it is ended by force in {wait:.0f} s", flush=True)
    after = backend.cancel(found, state, wait)
    print(f"{found.name}: {after.status}")
    return DONE


def recipes(*, folder: Path) -> int:
    """Recipes and what they are for."""
    if not shipped.names(folder):
        raise RunError(f"{folder.absolute()}: no *.yaml there; give the folder of your recipes")
    tables.show(tables.recipes(folder))
    return DONE


def check(*, recipe: str, overrides: list[str]) -> int:
    """Everything that is wrong with a recipe and its data; or their counts."""
    path, _, parts, notes = planning.checked(recipe, overrides)
    print(f"{path}: no faults\n")
    tables.show(tables.data_counts(parts))
    print("", *(notes or ("no text, and no near twin of one, stands in two parts",)), sep="\n")
    return DONE


def schema() -> int:
    """The JSON schema of a recipe, for editors."""
    described = Recipe.model_json_schema()
    needed = described.pop("required")
    for part in described["$defs"].values():
        part.pop("required", None)  # it may stand in a file that this one extends
    described["properties"]["extends"] = {
        "description": "Files that this one adds to and changes, relative to it.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    described |= {"if": {"not": {"required": ["extends"]}}, "then": {"required": needed}}
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **described}, indent=1))
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
    source = _source(run, runs)
    os.environ.setdefault("OMP_WAIT_POLICY", WAITING)  # read when torch is imported
    from finllm import SentimentPredictor

    predictor = SentimentPredictor(source)
    at_once = 1 if not texts and file is None and sys.stdin.isatty() else LINES_AT_ONCE
    while chunk := list(islice(lines, at_once)):
        yield from zip(chunk, ask(predictor, chunk), strict=True)


def _json(text: str, answer: Any) -> str:
    return json.dumps({"text": text, **answer}, ensure_ascii=False)


def _line(text: str) -> str:
    """The text on one line, without characters that could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _source(run: str, runs: Path) -> str | Path:
    """What the name stands for: a run first, then a folder, a model of the hub, the embedded model."""
    # A misspelt run is not looked for on the hub, which takes a minute where there is no network.
    is_other = Path(run).exists() or "/" in run or run == embedded.NAME
    return run if is_other and not (runs / run).is_dir() else find(run, runs).folder


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
