"""How a command ends: its exit status, and what it says of a run that has ended."""

import sys

from finllm.run import Progress, Run, State
from launch.show import Tail, called

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses; 130 is what shells give for Ctrl-C."""
LAST_LINES = 15


def say_the_end(run: Run, state: State) -> int:
    """Tell how a run ended, and what to do next; returns the exit status."""
    if state.status == "done":
        made = {"report": run.report, "": run.page, "scores": run.scores, "adapter": run.adapter, "log": run.log}
        print("", *(f"{name:8} {path}" for name, path in made.items() if path.exists()), sep="\n")
        if run.adapter.exists():
            print(f'use      finllm predict {called(run)} "Revenue beat estimates"')
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
