"""The command `finllm`."""

import argparse
import difflib
import sys
from pathlib import Path

from finllm.errors import FinllmError
from launch import commands, reporting, serving, shipped, starting
from launch import completion as completing
from launch import doctor as examining
from launch import export as exporting
from launch import schema as describing
from launch.endings import DONE, INTERRUPTED, WRONG
from launch.help import Screen, Verbs
from launch.show import forget_output, usual_runs

DESCRIPTION = "Fine-tune open language models to read the sentiment of financial text."
EXAMPLES = """\
examples
  finllm launch demo                               the shipped example
  finllm launch my.yaml train.epochs=1 --dry-run   the plan, in a second
  finllm launch my.yaml --name first --detach      without this terminal
  finllm launch my.yaml --cluster slurm/a100.yaml  as a SLURM job
  finllm status                                    all runs
  finllm logs first -f                             watch one
  finllm resume first                              after a stop or a failure
  finllm predict first "Revenue beat estimates"    use it
  cat news.txt | finllm predict first --json       one text a line
  finllm explain first "Revenue beat estimates"    with a reason for the label
  finllm serve first                               over HTTP; `demo` is a page

exit status: 0 done, 1 the run failed, 2 the input is wrong, 130 stopped
runs are in ./runs, in $FINLLM_RUNS, or where --runs says
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 the input is wrong, 130 stopped by Ctrl-C."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    chosen = vars(options)
    command: commands.Command | None = chosen.pop("command", None)
    chosen.pop("verb", None)
    if command is None:
        parser.print_help()
        return WRONG
    _place(parser, rest, chosen)
    try:
        return command(**chosen)
    except FinllmError as error:
        print(f"finllm: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("\nfinllm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        forget_output()
        return DONE


def _place(parser: argparse.ArgumentParser, rest: list[str], chosen: dict[str, object]) -> None:
    """Overrides, texts or runs that stand after an option, where argparse takes no more of them; refuses all else."""
    several = next((value for name, value in chosen.items() if isinstance(value, list) and name != "sweep"), None)
    verbatim = False
    for argument in rest:
        if several is not None and (verbatim or not argument.startswith("-")):
            several.append(argument)
            continue
        if several is not None and argument == "--":
            verbatim = True
            continue
        known = ["--help", *(f"--{name.removeprefix('as_').replace('_', '-')}" for name in chosen)]
        near = difflib.get_close_matches(argument.split("=")[0], known, n=1)
        parser.error(f"{argument}: not known here{f'; did you mean {near[0]}?' if near else '; see --help'}")


def build_parser() -> Screen:
    """Every verb with its options."""
    parser = Screen(prog="finllm", description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False)
    verbs = parser.verbs_as(dest="verb", metavar="COMMAND")
    _add_running(verbs)
    _add_measuring(verbs)
    _add_using(verbs)
    _add_recipes(verbs)
    _add_machine(verbs)
    return parser


def _add_running(verbs: Verbs) -> None:
    launch = _verb(verbs, "launch", starting.launch, "train and evaluate as a recipe says")
    _recipe(launch)
    launch.add_argument("--name", help="of the run; else that of the recipe")
    launch.add_argument("--dry-run", action="store_true", help="only show the plan")
    _cluster(launch)
    launch.add_argument(
        "--evaluate-on", type=Path, metavar="PROFILE", help="evaluate in a second job, on another cluster profile"
    )
    launch.add_argument(
        "--sweep", action="append", default=[], metavar="key=a,b",
        help="a run for each value; given again, for each combination",
    )  # fmt: skip
    _detach(launch)
    _runs(launch)

    status = _verb(verbs, "status", commands.status, "how runs stand")
    status.add_argument("names", nargs="*", metavar="RUN", help="else all")
    status.add_argument("--json", dest="as_json", action="store_true", help="for programs")
    _runs(status)

    logs = _verb(verbs, "logs", commands.logs, "what a run has said")
    _run(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")

    cancel = _verb(verbs, "cancel", commands.cancel, "end a run")
    _run(cancel)
    cancel.add_argument(
        "--wait", type=_seconds, default=30.0, metavar="SECONDS", help="to save a checkpoint, before force (30)"
    )

    resume = _verb(verbs, "resume", starting.resume, "go on with a run that was stopped, failed or lost")
    _run(resume)
    resume.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="other GPUs, or another way to share them, such as resources.gpus=1",
    )  # fmt: skip
    _cluster(resume)
    _detach(resume)


def _add_measuring(verbs: Verbs) -> None:
    _run(_verb(verbs, "evaluate", starting.evaluate, "score a trained run again"))

    report = _verb(verbs, "report", reporting.report, "compare runs, rank a sweep, or write one run's report again")
    report.add_argument("names", nargs="*", metavar="RUN", help="evaluated runs; they answered the same test texts")
    report.add_argument("--sweep", metavar="SWEEP", help="rank its cells by validation")
    report.add_argument("--out", type=Path, metavar="DIR", help="for a comparison; else a folder beside the runs")
    _runs(report)


def _add_using(verbs: Verbs) -> None:
    _texts(_verb(verbs, "predict", commands.predict, "sentiment of texts: arguments, a file, or standard input"))
    explain = _verb(verbs, "explain", commands.explain, "sentiment of texts, and the model's reason for it")
    _texts(explain)
    explain.add_argument(
        "--max-tokens", type=_count, default=96, metavar="TOKENS", help="of an explanation; a longer one is cut (96)"
    )

    export = _verb(verbs, "export", exporting.export, "write a run for other programs, checked, with a model card")
    _run(export)
    export.add_argument(
        "--format", dest="form", choices=["merged", "adapter", "gguf"], default="merged",
        help="whole weights in safetensors (the default), the adapter alone, or a file for llama.cpp",
    )  # fmt: skip
    export.add_argument("--to", type=Path, metavar="FOLDER", help="a new folder; else RUN/export/FORMAT")
    export.add_argument("--push", metavar="REPO", help="upload to the Hugging Face hub after asking")
    export.add_argument("--yes", action="store_true", help="do not ask")
    export.add_argument("--converter", type=Path, metavar="PATH", help="folder of llama.cpp ($LLAMA_CPP, or the PATH)")

    serve = _verb(verbs, "serve", serving.serve, "answer over HTTP, reading together what comes together")
    serving.add_serve_options(serve)
    _runs(serve)

    demo = _verb(verbs, "demo", serving.demo, "a page to try a model in the browser")
    serving.add_demo_options(demo)
    _runs(demo)


def _add_machine(verbs: Verbs) -> None:
    doctor = _verb(verbs, "doctor", examining.doctor, "what is wrong with this machine or a cluster, and its cure")
    doctor.add_argument(
        "--cluster", dest="cluster_profile", type=Path, metavar="PROFILE",
        help="check a job's nodes: a file such as slurm/a100.yaml",
    )  # fmt: skip
    doctor.add_argument("--model", help="of the hub, which must be open to you")
    doctor.add_argument("--json", dest="as_json", action="store_true", help="for programs")
    _runs(doctor)

    completion = _verb(verbs, "completion", completing.completion, "script that completes these words in a shell")
    completion.add_argument("shell", choices=completing.SHELLS)


def _add_recipes(verbs: Verbs) -> None:
    recipes = _verb(verbs, "recipes", commands.recipes, "recipes and what they are for")
    recipes.add_argument(
        "folder", nargs="?", type=Path, default=shipped.FOLDER, metavar="DIR", help="else the shipped ones"
    )

    _recipe(_verb(verbs, "check", commands.check, "all faults of a recipe and its data, or their counts"))
    schema = _verb(verbs, "schema", describing.schema, "JSON schema of recipes, for editors; or keys in tables")
    schema.add_argument("--markdown", dest="as_markdown", action="store_true", help="the keys in tables, with defaults")


def _verb(verbs: Verbs, name: str, command: commands.Command, about: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False)
    verb.set_defaults(command=command)
    return verb


def _recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, such as train.epochs=1")


def _run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN", help="name or folder of a run")
    _runs(verb)


def _texts(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN", help="a run, an adapter's folder, or a model of the hub")
    verb.add_argument("texts", nargs="*", metavar="TEXT")
    verb.add_argument("--file", type=Path, help="one text a line, UTF-8")
    verb.add_argument("--json", dest="as_json", action="store_true", help="one JSON object a line")
    _runs(verb)


def _runs(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--runs", type=Path, default=usual_runs(), metavar="DIR", help="folder of all runs ($FINLLM_RUNS, or runs)"
    )


def _cluster(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--cluster",
        dest="cluster_profile",
        type=Path,
        metavar="PROFILE",
        help="submit to SLURM: a file such as slurm/a100.yaml",
    )


def _detach(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--detach", action="store_true", help="give the terminal back at once")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no waiting time; write seconds from 0")
    return seconds


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of tokens; write 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
