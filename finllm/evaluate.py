"""`python -m finllm.evaluate RUN`: score every system of a run on the same rows, and write the report."""

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from finllm import baselines, data, library, models, predictions, report, scoring, tracking
from finllm.data import Parts
from finllm.errors import DataError, FinllmError, RecipeError, RunError
from finllm.example import LABELS, SPLITS, Example
from finllm.exhaustion import cause_of
from finllm.journal import history
from finllm.plan import Plan, Rows
from finllm.predictions import Answers
from finllm.progress import steps
from finllm.prompts import Prompter, Rendered
from finllm.report import Facts
from finllm.run import Progress, Run, write_text
from finllm.scores import Scores, score

BOOTSTRAP_SEED = 0


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 1 failed, 2 the input is wrong."""
    if len(arguments) != 1:
        print("usage: python -m finllm.evaluate RUN", file=sys.stderr)
        return 2
    models.quiet_libraries()
    run = Run(Path(arguments[0]).absolute())
    run.progress.unlink(missing_ok=True)  # of the stage or the attempt before
    try:
        evaluate(run)
    except FinllmError as error:
        _failed(run, str(error))
        print(error, file=sys.stderr, flush=True)
        return 2 if isinstance(error, RecipeError | DataError) else 1
    except BaseException as error:  # the process boundary: the run folder must say why
        _failed(run, traceback.format_exc(), cause_of(error))
        raise
    return 0


def evaluate(run: Run) -> Scores:
    """Scores of every system that the run's recipe names; leaves predictions, scores and report in the run folder."""
    plan = Plan.of(run)
    parts, notes = data.training_parts(plan.recipe.data)
    rows = {"validation": parts.validation, "test": parts.test}
    examples = [example for part in plan.recipe.evaluation.parts for example in rows[part]]
    if not examples:
        wanted = " and ".join(plan.recipe.evaluation.parts)
        raise RunError(f"{', '.join(s.title for s in plan.recipe.data)}: no rows in {wanted}; `parts` must name it")
    tracker = tracking.start(run, plan, "evaluate")
    answers = [*_of_models(run, plan, examples), *_of_baselines(plan, parts, examples)]
    for one in answers:
        predictions.write(run, one)
    scores = score(answers, plan.recipe.evaluation.bootstrap_draws, BOOTSTRAP_SEED)
    scores.save(run)
    write_text(run.report, report.markdown(scores, plan, _facts(run, plan, parts, notes)))
    Console(width=100).print(report.table(scores))
    tracker.summary(**_figures(scores))
    tracker.finish()
    _done(run)
    return scores


def _of_models(run: Run, plan: Plan, examples: Sequence[Example]) -> list[Answers]:
    """Answers of the tuned model, and of its base with the adapter off."""
    device = models.device_of(plan.device)
    loaded = models.load(plan.recipe.model, dtype=plan.dtype, device=device, dequantize=plan.dequantize)
    prompter = Prompter(loaded.tokenizer, plan.recipe.prompt)
    prompts = prompter.render([e.text for e in examples], [e.target for e in examples])
    name = plan.recipe.model.name

    def ask(key: str, title: str, model: Any) -> Answers:
        return _answers(key, title, model, examples, prompts, prompter, plan, run)

    if plan.recipe.train is None:
        return [ask("base", f"{name}, zero-shot", loaded.model)]
    if not (run.adapter / models.CARD).is_file():
        raise RunError(f"{run.folder} has no trained weights; `finllm resume {run.name}` trains to the end")
    base = [ask("base", f"{name}, zero-shot", loaded.model)] if plan.recipe.evaluation.base else []
    if models.is_adapter(run.adapter):
        tuned = models.attach(loaded.model, run.adapter)
    else:  # all weights were trained: the base must go before they come
        del loaded
        own = plan.recipe.model.model_copy(update={"name": str(run.adapter), "revision": None})
        tuned = models.load(own, dtype=plan.dtype, device=device).model
    return [ask("tuned", f"{name}, tuned", tuned), *base]


def _answers(
    key: str,
    name: str,
    model: Any,
    examples: Sequence[Example],
    prompts: Sequence[Rendered],
    prompter: Prompter,
    plan: Plan,
    run: Run,
) -> Answers:
    answers = [prompter.answers[label] for label in LABELS]
    began = time.monotonic()
    with steps(f"scoring with the {key} model", len(examples), "text", run) as counter:
        rows = scoring.score(model, [p.ids for p in prompts], answers, batch_tokens=plan.batch_tokens, steps=counter)
    seconds = time.monotonic() - began
    shares = scoring.probabilities(rows)
    return Answers(key, name, seconds, predictions.of(examples, shares, [p.truncated for p in prompts]))


def _of_baselines(plan: Plan, parts: Parts, examples: Sequence[Example]) -> list[Answers]:
    """Answers of what needs no language model; each is fitted on the training part, as the tuned model was."""
    if not parts.train:
        return []
    answers = []
    for key in plan.recipe.evaluation.baselines:
        fitted = baselines.BASELINES[key](parts.train, parts.validation)
        began = time.monotonic()
        rows = fitted.probabilities(examples)
        answers.append(Answers(key, baselines.NAMES[key], time.monotonic() - began, predictions.of(examples, rows)))
    return answers


def _facts(run: Run, plan: Plan, parts: Parts, notes: Sequence[str]) -> Facts:
    """What the report says of data and training."""
    rows = {
        spec.title: Rows(
            **{split: sum(e.split == split and e.dataset == spec.title for e in parts.rows) for split in SPLITS}
        )
        for spec in plan.recipe.data
    }
    lines = [row for row in history(run) if row.stage == "train"]
    numbers = {name: value for row in lines for name, value in row.numbers.items()}
    told = {
        "steps": f"{max((row.step or 0 for row in lines), default=0):,}",
        "time": f"{numbers.get('train/seconds', 0):,.0f} s, evaluation during training included",
        "peak memory": f"{numbers.get('train/memory_gib', 0):.1f} GiB",
    }
    if "validation/best_loss" in numbers:
        told["best validation loss"] = f"{numbers['validation/best_loss']:.4f} nats a label"
    return Facts(rows=rows, training=told if lines else {}, notes=notes)


def _figures(scores: Scores) -> dict[str, float]:
    """Every figure of every system, by a path: `test/fiqa/tuned/accuracy`."""
    return {
        f"{part.part}/{part.dataset}/{key}/{name}": figure.value
        for part in scores.parts
        for key, system in part.systems.items()
        for name, figure in (("accuracy", system.accuracy), ("macro_f1", system.macro_f1))
    }


def _failed(run: Run, why: str, cause: Literal["", "out of memory"] = "") -> None:
    if run.folder.is_dir():
        replace(Progress.of(run) or Progress("evaluating"), error=why, outcome="failed", cause=cause).save(run)


def _done(run: Run) -> None:
    replace(Progress.of(run) or Progress("evaluating"), outcome="done").save(run)


sys.modules[__name__].__class__ = library.Evaluate

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
