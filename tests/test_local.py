"""The local backend, with real processes: small trainers that behave well, badly, or not at all."""

import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commandline import FINLLM, finllm
from finllm.distributed import ACCELERATE
from finllm.machine import Machine
from finllm.plan import Plan, Rows, decide
from finllm.recipe import load
from finllm.run import Run, State, create
from launch import local, tether
from launch.place import mark

PRELUDE = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from finllm.run import Progress, Run
    run = Run(Path(sys.argv[1]))
"""
TRAIN = """
    first = len(run.complete_checkpoints()) * 10
    for step in range(first + 1, 601):
        Progress("training", step, 600, loss=1 / step, seconds=step * 0.05).save(run)
        print("step", step)
        if run.stop_request.exists():
            checkpoint = run.checkpoints / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "COMPLETE").touch()
            Progress("training", step, 600, outcome="stopped").save(run)
            sys.exit(0)
        time.sleep(0.05)
"""
"""Saves and stops when it is asked to; else goes on for half a minute."""
QUICK = """
    for step in range(1, 4):
        Progress("training", step, 3, loss=0.5, seconds=step).save(run)
        print("step", step)
    run.adapter.mkdir()
"""
STUBBORN = """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()  # as torchrun does with its workers
    print("will not stop")
    time.sleep(600)
"""
LAUNCHER = """
    deaf = "import os, sys, time; os.setsid(); print('worker', os.getpid(), flush=True); time.sleep(600)"
    subprocess.run([sys.executable, "-c", deaf])
"""
"""As `accelerate launch`: dies of SIGTERM and leaves its worker behind."""
EVALUATE = """
    print("| system | accuracy |")
    run.report.write_text("# Report")
"""

Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes run folders whose commands are small programs; at the end nothing of them may be alive."""
    made: list[Run] = []

    def _make(name: str = "small", **programs: str) -> Run:
        recipe = tmp_path / "small.yaml"
        recipe.write_text("model: smollm2-135m\ndata: sample\ntrain: {method: sft}\n")
        run = create(tmp_path / "runs", name)
        rows = Rows(train=10, validation=1, test=1)
        plan = decide(load(recipe), here=Machine((), 2), rows=rows, folder=run.folder, source=str(recipe))
        commands = {stage: _program(run, stage, program) for stage, program in programs.items()}
        plan.model_copy(update={"commands": commands}).save(run)
        State("created").save(run)
        made.append(run)
        return run

    yield _make
    left = [pid for run in made for pid in tether.members(mark(run))]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes {left} were left alive"


def _program(run: Run, stage: str, program: str) -> tuple[str, ...]:
    path = run.folder / f"{stage}.py"
    path.write_text(textwrap.dedent(PRELUDE) + textwrap.dedent(program))
    return (sys.executable, str(path), str(run.folder))


def begin(run: Run, **environment: str) -> subprocess.Popen[str]:
    """The command that runs it in the foreground, its output in a pipe."""
    return subprocess.Popen(
        [*FINLLM, "resume", str(run.folder)], env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def until(what: Callable[[], object], seconds: float = 120) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def said(run: Run, text: str) -> Callable[[], bool]:
    """Whether the log holds a text."""
    return lambda: run.log.exists() and text in run.log.read_text(errors="replace")


def state(run: Run) -> State:
    found = State.of(run)
    assert found is not None
    return found


def test_a_run_goes_through_its_stages_and_says_where_everything_is(make: Make) -> None:
    """Exit 0, the log on the screen as plain lines, then the paths; the state is done."""
    run = make(train=QUICK, evaluate=EVALUATE)
    answer = finllm("resume", str(run.folder))
    assert (answer.returncode, answer.stderr) == (0, "")
    lines = answer.stdout.splitlines()
    assert lines.index("step 3") < lines.index("| system | accuracy |")
    assert f"report   {run.report}" in lines
    assert f"adapter  {run.adapter}" in lines
    assert lines[-1] == f'use      finllm predict {run.folder} "Revenue beat estimates"'
    assert "\x1b" not in answer.stdout
    assert "\r" not in answer.stdout
    assert (state(run).status, state(run).stage, state(run).attempt, state(run).error) == ("done", "evaluate", 1, "")


def test_a_terminal_shows_a_bar_with_the_time_left(make: Make) -> None:
    """The bar stands below the lines of the log, and is gone at the end."""
    run = make(train=QUICK + "    run.adapter.rename(run.folder / 'x')\n    time.sleep(1)\n", evaluate=EVALUATE)
    shown = _on_a_terminal(run, lambda _: None)
    assert "training" in shown
    assert "3/3" in shown
    assert "loss 0.5" in shown
    assert "0:00 left" in shown
    assert "| system | accuracy |" in shown


def _on_a_terminal(run: Run, act: Callable[[int], None]) -> str:
    """What a foreground run shows on a terminal of its own; `act` gets the terminal's other end, and may close it."""
    terminal, side = pty.openpty()
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
    launched = subprocess.Popen(
        [sys.executable, "-c", take, *FINLLM, "resume", str(run.folder)], start_new_session=True,
        stdin=side, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(side)
    act(terminal)
    shown = b""
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError:  # how Linux says that the other side has closed
        launched.wait(timeout=120)
    return shown.decode(errors="replace")  # a key that interrupts lets the terminal drop what it has not shown


def test_ctrl_c_on_a_terminal_saves_and_stops(make: Make) -> None:
    """The key, not the signal: the terminal sends it to its foreground group, of which the trainer is no part."""
    run = make(train=TRAIN, evaluate=EVALUATE)

    def press(terminal: int) -> None:
        until(said(run, "step 3"))
        os.write(terminal, b"\x03")

    shown = _on_a_terminal(run, press)
    assert "Ctrl-C: asked the run to save and stop" in shown
    assert state(run).status == "stopped"
    assert len(run.complete_checkpoints()) == 1


def test_closing_the_terminal_saves_and_stops(make: Make) -> None:
    """A window that is closed sends SIGHUP and takes no more output."""
    run = make(train=TRAIN, evaluate=EVALUATE)

    def close(terminal: int) -> None:
        until(said(run, "step 3"))
        os.close(terminal)

    _on_a_terminal(run, close)
    assert state(run).status == "stopped"
    assert len(run.complete_checkpoints()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_stops_and_leaves_nothing_behind(make: Make, number: signal.Signals) -> None:
    """A whole checkpoint, exit 130, the way to go on, and no process."""
    run = make(train=TRAIN, evaluate=EVALUATE)
    launched = begin(run)
    until(said(run, "step 3"))
    launched.send_signal(number)
    output, errors = launched.communicate(timeout=120)
    assert (launched.returncode, errors) == (130, "")
    assert f"finllm resume {run.folder}" in output
    assert (state(run).status, state(run).stage) == ("stopped", "train")
    assert len(run.complete_checkpoints()) == 1
    assert not tether.members(mark(run))


def test_a_run_that_hangs_is_ended_at_once_by_more_ctrl_c(make: Make) -> None:
    """The second sends SIGTERM, the third SIGKILL, also to what left the process group."""
    run = make(train=STUBBORN, evaluate=EVALUATE)
    launched = begin(run)
    until(lambda: run.log.exists() and run.log.read_text().count("will not stop") == 2)
    for _ in range(3):
        launched.send_signal(signal.SIGINT)
        time.sleep(0.7)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 130
    assert "was ended by SIGKILL" in output
    assert state(run).status == "stopped"
    assert not tether.members(mark(run))


def test_one_ctrl_c_that_arrives_twice_counts_once(make: Make) -> None:
    """Wrappers such as `uv run` pass it on although the terminal has sent it already."""
    slow_save = TRAIN.replace("checkpoint.mkdir", "time.sleep(1.5); checkpoint.mkdir")
    run = make(train=slow_save, evaluate=EVALUATE)
    launched = begin(run)
    until(said(run, "step 3"))
    launched.send_signal(signal.SIGINT)
    time.sleep(0.1)
    launched.send_signal(signal.SIGINT)
    output, _ = launched.communicate(timeout=120)
    assert "was ended by" not in output
    assert len(run.complete_checkpoints()) == 1


@pytest.mark.slow
def test_a_run_that_does_not_stop_in_time_is_killed(make: Make) -> None:
    """After $FINLLM_STOP_SECONDS SIGTERM, ten seconds later SIGKILL."""
    run = make(train=STUBBORN, evaluate=EVALUATE)
    launched = begin(run, FINLLM_STOP_SECONDS="1")
    until(lambda: run.log.exists() and run.log.read_text().count("will not stop") == 2)
    launched.send_signal(signal.SIGTERM)
    launched.communicate(timeout=120)
    assert state(run).status == "stopped"
    assert not tether.members(mark(run))


def test_the_worker_of_a_launcher_that_dies_of_a_signal_is_ended_too(make: Make) -> None:
    """`accelerate launch` passes no signal on, and torchrun's workers are in sessions of their own."""
    run = make(train=LAUNCHER, evaluate=EVALUATE)
    launched = begin(run)
    until(said(run, "worker "))
    worker = int(run.log.read_text().split("worker ")[1].split()[0])
    launcher = next(
        pid for pid in tether.members(mark(run)) if "train.py" in _command(pid) and "-I" not in _command(pid)
    )
    os.kill(launcher, signal.SIGTERM)
    _, errors = launched.communicate(timeout=120)
    assert launched.returncode == 1
    assert tether.start_ticks(worker) == 0
    assert "ended by SIGTERM from outside" in errors
    assert (state(run).status, state(run).error) == ("failed", "ended by SIGTERM from outside")


def _command(pid: int) -> list[str]:
    words = Path("/proc", str(pid), "cmdline").read_text().split("\0")
    return [Path(word).name for word in words]


def test_nothing_lives_on_when_the_tether_is_killed(make: Make) -> None:
    """The process between supervisor and command is no weak point."""
    run = make(train=LAUNCHER, evaluate=EVALUATE)
    launched = begin(run)
    until(said(run, "worker "))
    os.kill(state(run).group, signal.SIGKILL)
    launched.communicate(timeout=120)
    assert launched.returncode == 1
    assert state(run).status == "failed"
    assert not tether.members(mark(run))


def test_the_tether_ends_what_a_command_leaves_behind(make: Make) -> None:
    """Without a supervisor's help."""
    run = make()
    leave = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {'import time; time.sleep(600)'!r}])"
    with run.log.open("ab") as log:
        child = tether.start([sys.executable, "-c", leave], mark(run), run.stop_request, 5, log, os.environ)
    assert child.stdin is not None
    with child.stdin:
        assert child.wait(timeout=120) == 0
    assert not tether.members(mark(run))


@pytest.mark.slow
def test_no_worker_of_a_real_accelerate_launch_lives_on(make: Make) -> None:
    """Two workers that hang, under torchrun, each in a session of its own."""
    run = make(train=STUBBORN, evaluate=EVALUATE)
    plan = Plan.of(run).model_copy(update={"processes": 2, "strategy": "ddp"})
    script = plan.commands["train"][1]
    launcher = ("-m", ACCELERATE, "--config_file", str(run.accelerate))
    command = (sys.executable, *launcher, script, str(run.folder))
    plan.model_copy(update={"commands": {"train": command}}).save(run)
    launched = begin(run)
    until(lambda: run.log.exists() and run.log.read_text().count("will not stop") == 4)
    assert len({os.getsid(pid) for pid in tether.members(mark(run))}) > 2
    for _ in range(3):
        launched.send_signal(signal.SIGINT)
        time.sleep(0.7)
    launched.communicate(timeout=120)
    assert state(run).status == "stopped"
    assert not tether.members(mark(run))


def test_a_failure_is_shown_and_kept(make: Make) -> None:
    """Exit 1, the cause and the way on; the next stage is not begun; the cause is not the launcher's complaint."""
    failing = """
        print("Traceback (most recent call last):\\n  File x\\nValueError: the loss is nan")
        print("subprocess.CalledProcessError: Command 'x' returned non-zero exit status 1.")
        sys.exit(1)
    """
    run = make(train=failing, evaluate=EVALUATE)
    answer = finllm("resume", str(run.folder))
    assert answer.returncode == 1
    assert "small failed in train: ValueError: the loss is nan" in answer.stderr
    assert str(run.log) in answer.stderr
    assert not run.report.exists()
    assert (state(run).status, state(run).error) == ("failed", "ValueError: the loss is nan")


def test_the_log_of_a_failed_run_begins_with_its_traceback(make: Make) -> None:
    """Also the table of runs ends with the cause."""
    failing = """
        Progress("training", 7, 9, error="Traceback:\\n  File x\\nOSError: disk full", outcome="failed").save(run)
        sys.exit(1)
    """
    run = make(train=failing, evaluate=EVALUATE)
    assert finllm("resume", str(run.folder)).returncode == 1
    assert finllm("logs", str(run.folder)).stdout.startswith("Traceback:\n  File x\nOSError: disk full\n")
    answer = finllm("status", "--runs", str(run.folder.parent))
    assert "7/9 step" in answer.stdout
    assert "small failed: OSError: disk full" in answer.stdout


def test_a_command_that_cannot_be_started_is_a_failure(make: Make) -> None:
    """Not an endless wait, and not a traceback of ours."""
    run = make(train=QUICK)
    plan = Plan.of(run)
    plan.model_copy(update={"commands": {"train": ("/no/such/program",)}}).save(run)
    answer = finllm("resume", str(run.folder))
    assert answer.returncode == 1
    assert "/no/such/program cannot be started" in answer.stderr
    assert "launch/supervisor.py" not in answer.stderr


def test_a_stopped_run_resumes_where_it_was(make: Make) -> None:
    """Same folder, next attempt; the request to stop is gone, and what was done is done."""
    run = make(train=TRAIN, evaluate=EVALUATE)
    for attempt in (1, 2):
        launched = begin(run)
        until(said(run, f"attempt {attempt}"))
        until(lambda: state(run).status == "running" and not run.stop_request.exists())
        seen = len(run.log.read_text())
        until(lambda seen=seen: len(run.log.read_text()) > seen + 20)  # type: ignore[misc]
        launched.send_signal(signal.SIGINT)
        launched.communicate(timeout=120)
        assert (state(run).status, state(run).attempt) == ("stopped", attempt)
    second = run.log.read_text().split("attempt 2")[1]
    assert "step 11\n" in second
    assert "step 10\n" not in second


def test_training_that_is_complete_is_not_repeated(make: Make) -> None:
    """A failed evaluation does not cost the training."""
    run = make(train=QUICK, evaluate="sys.exit('no data')")
    assert finllm("resume", str(run.folder)).returncode == 1
    assert (state(run).stage, state(run).error) == ("evaluate", "no data")
    (run.folder / "evaluate.py").write_text(textwrap.dedent(PRELUDE + EVALUATE))
    answer = finllm("resume", str(run.folder))
    assert answer.returncode == 0
    assert "the training is complete already" in answer.stdout
    assert run.log.read_text().count("step 3") == 1


def test_a_run_that_is_done_or_alive_is_not_begun_again(make: Make) -> None:
    """Done is no fault; alive is."""
    run = make(train=TRAIN, evaluate=EVALUATE)
    launched = begin(run)
    until(said(run, "step 1"))
    again = finllm("resume", str(run.folder))
    assert again.returncode == 2
    assert "small is alive" in again.stderr
    launched.send_signal(signal.SIGINT)
    launched.communicate(timeout=120)
    state(run).with_(status="done").save(run)
    done = finllm("resume", str(run.folder))
    assert done.returncode == 0
    assert "small is done" in done.stdout


def test_two_supervisors_that_start_together_do_not_share_a_run(make: Make) -> None:
    """One of them is refused, whoever comes first."""
    run = make(train=TRAIN, evaluate=EVALUATE)
    both = [begin(run), begin(run)]
    until(lambda: any(process.poll() is not None for process in both))
    refused, runs = sorted(both, key=lambda process: process.poll() is None)
    _, errors = refused.communicate()
    assert refused.returncode == 2
    assert "small is " in errors
    until(said(run, "step 1"))
    runs.send_signal(signal.SIGINT)
    runs.communicate(timeout=120)
    assert run.log.read_text().count("attempt 1, train") == 1


def test_a_detached_run_is_followed_and_cancelled_from_elsewhere(make: Make) -> None:
    """The terminal is given back at once; status, logs and cancel find the run."""
    run = make(train=TRAIN, evaluate=EVALUATE)
    where = ("--runs", str(run.folder.parent))
    began = time.monotonic()
    answer = finllm("resume", "small", "--detach", *where)
    assert time.monotonic() - began < 20  # about 1 s on an idle machine; the run takes 30
    assert answer.returncode == 0
    assert f"finllm logs {run.folder} -f" in answer.stdout
    assert os.getsid(state(run).pid) == state(run).pid

    until(said(run, "step 2"))
    (standing,) = json.loads(finllm("status", "--json", *where).stdout)
    assert (standing["status"], standing["stage"], standing["total"], standing["attempt"]) == (
        "running",
        "train",
        600,
        1,
    )
    assert standing["seconds_left"] > 0
    assert "training" in finllm("status", "small", *where).stdout

    follower = subprocess.Popen([*FINLLM, "logs", "small", "-f", *where], stdout=subprocess.PIPE, text=True)
    answer = finllm("cancel", "small", *where)
    assert (answer.returncode, answer.stdout.splitlines()[-1]) == (0, "small: cancelled")
    followed, _ = follower.communicate(timeout=120)
    assert "step 1\n" in followed
    assert "[finllm] cancelled" in followed
    assert state(run).status == "cancelled"
    assert len(run.complete_checkpoints()) == 1
    assert tether.start_ticks(state(run).pid) == 0

    again = finllm("cancel", "small", *where)
    assert (again.returncode, again.stdout) == (0, "small has ended already: cancelled\n")


@pytest.mark.slow
def test_cancel_ends_a_run_that_does_not_listen(make: Make) -> None:
    """By force, after the time that it was given."""
    run = make(train=STUBBORN, evaluate=EVALUATE)
    assert finllm("resume", str(run.folder), "--detach").returncode == 0
    until(lambda: run.log.read_text().count("will not stop") == 2)
    answer = finllm("cancel", str(run.folder), "--wait", "0")
    assert answer.stdout.endswith("small: cancelled\n")
    assert not tether.members(mark(run))


def test_a_killed_supervisor_takes_its_run_with_it(make: Make) -> None:
    """The trainer still saves; status says lost, and resume goes on from there."""
    run = make(train=TRAIN, evaluate=EVALUATE)
    launched = begin(run)
    until(said(run, "step 3"))
    launched.kill()
    launched.communicate()
    until(lambda: not tether.members(mark(run)))
    assert len(run.complete_checkpoints()) == 1
    assert local.seen([(run, state(run))])[0].status == "lost"
    answer = finllm("status", "--runs", str(run.folder.parent))
    assert "lost" in answer.stdout
    assert f"`finllm resume {run.folder}` goes on" in answer.stdout
    resumed = begin(run)
    until(said(run, "attempt 2"))
    resumed.send_signal(signal.SIGINT)
    assert resumed.wait(timeout=120) == 130
    resumed.communicate()


def test_another_process_with_the_same_number_is_not_the_run(make: Make) -> None:
    """Process numbers are given again; the time of the start tells them apart."""
    run = make(train=QUICK)
    mine = State("running", host=os.uname().nodename, pid=os.getpid(), pid_started=tether.start_ticks(os.getpid()))
    assert local.supervised(mine)
    assert local.seen([(run, mine)])[0].status == "running"
    other = mine.with_(pid_started=mine.pid_started + 1)
    assert local.seen([(run, other)])[0].status == "lost"
    assert not local.alive(run, other)


def test_what_a_reader_of_the_output_does_is_no_matter_for_the_run(make: Make) -> None:
    """`finllm launch ... | head -1` loses sight of the run, not the run."""
    run = make(train=QUICK, evaluate=EVALUATE)
    launched = begin(run)
    assert launched.stdout is not None
    launched.stdout.close()
    _, errors = launched.communicate(timeout=120)
    assert (launched.returncode, errors) == (0, "")
    assert state(run).status == "done"


def test_processes_get_what_they_need_and_secrets_stay_out_of_the_folder(make: Make) -> None:
    """Output comes at once, cores are shared, the user's own choice stands, and no key is written anywhere."""
    show = "print(*(os.environ.get(n) for n in ('PYTHONUNBUFFERED', 'OMP_NUM_THREADS', 'WANDB_API_KEY')))"
    run = make(train=show.replace("'WANDB_API_KEY'", "'TOKENIZERS_PARALLELISM'"), evaluate="")
    plan = Plan.of(run)
    plan.model_copy(update={"processes": 2}).save(run)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    for own, expected in (({}, str(max(1, len(os.sched_getaffinity(0)) // 2))), ({"OMP_NUM_THREADS": "7"}, "7")):
        subprocess.run(
            [*FINLLM, "resume", str(run.folder)], check=True, capture_output=True,
            env={**environment, "WANDB_API_KEY": "planted-key-1234", **own},
        )  # fmt: skip
        assert f"1 {expected} false\n" in run.log.read_text()
        state(run).with_(status="stopped").save(run)
    for file in run.folder.rglob("*"):
        assert b"planted-key-1234" not in (file.read_bytes() if file.is_file() else b""), file


def test_evaluation_can_be_repeated_but_not_before_training(make: Make) -> None:
    """It needs weights; it makes no new attempt."""
    run = make(train=QUICK, evaluate=EVALUATE)
    refused = finllm("evaluate", str(run.folder))
    assert refused.returncode == 2
    assert "has no trained weights yet" in refused.stderr
    assert finllm("resume", str(run.folder)).returncode == 0
    assert finllm("evaluate", str(run.folder)).returncode == 0
    assert run.log.read_text().count("| system | accuracy |") == 2
    assert (state(run).status, state(run).attempt) == ("done", 1)


def test_a_wrong_time_to_stop_in_is_refused_before_anything_starts(make: Make) -> None:
    """The variable is named, with what it may be."""
    run = make(train=QUICK)
    answer = finllm("resume", str(run.folder), FINLLM_STOP_SECONDS="2m")
    assert answer.returncode == 2
    assert "FINLLM_STOP_SECONDS is '2m'" in answer.stderr
    assert not run.log.exists()
