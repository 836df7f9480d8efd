"""`finllm doctor`: what is wrong with this machine, or with the nodes of a cluster, and what mends it."""

import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from finllm.diagnosis import Finding
from finllm.run import Run
from launch import cluster, examination, scheduler, snapshot, submission, tables
from launch.cluster import Cluster
from launch.endings import DONE, FAILED
from launch.examination import Examination
from launch.show import Tail

POLL_SECONDS = 1.0
LATE_SECONDS = 30.0
"""In which a shared file system shows what another node has written; NFS keeps a listing so long (nfs(5), acdirmin)."""
JOB_MINUTES = 8
"""Time limit of the job; an examination ends after four minutes."""
COLOURS = {"ok": "green", "warning": "yellow", "wrong": "bold red", "absent": "dim"}


def doctor(*, cluster_profile: Path | None, model: str | None, runs: Path, as_json: bool) -> int:
    """Check this machine, or the nodes of a cluster; returns 1 where something is wrong."""
    profile = None if cluster_profile is None else cluster.load(cluster_profile)
    runs = (profile.runs if profile and profile.runs else runs).absolute()
    arguments = ("--runs", str(runs), *(() if model is None else ("--model", model)))
    found = {"here": [examination.clients(needed=profile is not None)]}
    if profile is None:
        found["here"] += examination.examined(sys.executable, arguments)
    else:
        found |= on_nodes(profile, runs, (*arguments, "--gpus", str(profile.gpus_per_node)))
    print(as_lines(found)) if as_json else show(found)
    return FAILED if any(one.state == "wrong" for each in found.values() for one in each) else DONE


def show(found: Mapping[str, Sequence[Finding]]) -> None:
    """Print one table, and how much of it is wrong."""
    table = Table(box=None, pad_edge=False, header_style="bold", highlight=False)
    places = len(found) > 1
    for name in (*(["where"] if places else []), "check", "state", "found", "mend"):
        table.add_column(name, overflow="fold", no_wrap=name in ("where", "check", "state"))
    for place, each in found.items():
        for one in each:
            row = [Text(one.what), Text(one.state, COLOURS[one.state]), Text(one.found), Text(one.mend)]
            table.add_row(*([Text(place)] if places else []), *row)
    tables.show(table)
    counts = Counter(one.state for each in found.values() for one in each)
    print(f"\n{counts['wrong']} wrong, {counts['warning']} to look at, {counts['absent']} not here or not checked")


def as_lines(found: Mapping[str, Sequence[Finding]]) -> str:
    """All findings as one JSON list."""
    return json.dumps([{"where": place, **asdict(one)} for place, each in found.items() for one in each], indent=1)


def on_nodes(profile: Cluster, runs: Path, arguments: tuple[str, ...]) -> dict[str, list[Finding]]:
    """The findings of each node of a small job with the profile's options; Ctrl-C takes the job out of the queue.

    Raises RunError where SLURM refuses the job.
    """
    runs.mkdir(parents=True, exist_ok=True)
    home = Run(Path(tempfile.mkdtemp(prefix=".doctor-", dir=runs)))  # where the nodes can write, or runs could not
    home.folder.chmod(0o755)
    short = profile.model_copy(update={"time": min(profile.time, JOB_MINUTES), "signal_seconds": 10})
    try:
        snapshot.take(home.code)
        task = Examination(str(home.folder), arguments)
        (job,) = submission.submit(home.folder, "finllm-doctor", [task], short)
        try:
            last = _attend(job)
        except BaseException:
            scheduler.cancel(job)
            raise
        found = _gathered(home.folder, profile.nodes if last.state == "COMPLETED" else 0)
        if len(found) < profile.nodes:
            found["nodes"] = [_silent(home, last, profile.nodes - len(found))]
        return found
    finally:
        shutil.rmtree(home.folder, ignore_errors=True)


def _gathered(folder: Path, nodes: int) -> dict[str, list[Finding]]:
    """What the nodes have left, waiting until so many are there: a shared file system may show files late."""
    until = time.monotonic() + LATE_SECONDS
    while len(found := examination.left(folder)) < nodes and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    return found


def _attend(job: str) -> scheduler.Job:
    """The job once it has left the queue; says on standard error what it waits for."""
    said = ""
    while True:
        seen = scheduler.look([job])[job]
        if not seen.waits and not seen.runs:
            return seen
        word = f"waits ({seen.reason or 'its turn'})" if seen.waits else f"runs on {seen.nodes}"
        if word != said:
            print(f"job {job} {word}; Ctrl-C ends it", file=sys.stderr)
            said = word
        time.sleep(POLL_SECONDS)


def _silent(home: Run, job: scheduler.Job, missing: int) -> Finding:
    """That nodes have left nothing, with the last words of the job."""
    files = sorted(home.slurm.glob(f"{job.id}_*_log.err"))
    lines = [line for file in files for line in Tail(file).read(to_end=True) if line.strip()]
    said = [line for line in lines if not line.startswith(("submitit ", "srun: ", "slurmstepd: "))] or lines
    words = f"{missing} node(s) have said nothing; SLURM says {job.state or 'nothing'} of job {job.id}"
    mend = f"let all nodes see {home.folder.parent} and the interpreter: `runs` and `python` in the profile"
    return Finding("job", "wrong", f"{words}: {said[-1].strip()[:300]}" if said else words, mend)
