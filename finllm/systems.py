"""The systems of an evaluation: tuned model, base, baselines, classifiers of the hub, earlier runs; all on the same rows."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finllm import baselines, calibration, classifiers, contamination, models, predictions, scoring, selfchecks, spread
from finllm.assessment import probabilities_of
from finllm.data import Parts
from finllm.errors import RunError
from finllm.example import LABELS, Example
from finllm.models import Card
from finllm.plan import Plan
from finllm.predictions import Answers
from finllm.progress import steps
from finllm.prompts import Prompter
from finllm.run import Run, find
from finllm.scores import Check, Missing

TIMED = 5
"""Texts that are answered alone to measure the latency."""
STARTED = 64
"""Texts of each process that are answered before the clock starts."""


@dataclass
class Answered:
    """What an evaluation has so far."""

    answers: list[Answers] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)


def answered(run: Run, plan: Plan, parts: Parts, examples: Sequence[Example], notes: Sequence[str]) -> Answered:
    """Every system's answers, the systems that could not be asked, and the checks; the first system is the run's own.

    Of several processes, all answer with the language models, and the first does the rest.
    """
    found = Answered()
    _language_models(found, run, plan, parts, examples)
    if spread.world()[0]:
        return found
    if plan.recipe.evaluation.batch_calibration:
        _without_prior(found)
    with steps("fitting the baselines", run=run):
        _baselines(found, plan, parts, examples)
    for name in plan.recipe.evaluation.classifiers:
        _classifier(found, name, plan, examples, run)
    for name in plan.recipe.evaluation.runs:
        found.answers.append(earlier(name, run, examples))
    found.checks += [
        selfchecks.truncation(found.answers),
        selfchecks.leaks(len(parts.rows), notes),
        selfchecks.contamination(found.answers),
    ]
    return found


@dataclass(frozen=True)
class _Asker:
    """Asks language models for the labels of the same prompts."""

    run: Run
    plan: Plan
    examples: Sequence[Example]
    prompter: Prompter

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [rendered.ids for rendered in self._rendered]

    @cached_property
    def _rendered(self) -> Any:
        return self.prompter.render([e.text for e in self.examples], [e.target for e in self.examples])

    def score(self, model: Any, prompts: Sequence[list[int]], **more: Any) -> NDArray[np.float64]:
        """Log-probabilities (prompts, labels)."""
        labels = [self.prompter.answers[label] for label in LABELS]
        return scoring.score(model, prompts, labels, **{"batch_tokens": self.plan.batch_tokens, **more})

    def ask(self, key: str, name: str, model: Any) -> tuple[Answers, NDArray[np.float64]]:
        """The system's answers to all prompts, and their log-probabilities; several processes share the work."""
        prompts = self.prompts
        rank, processes = spread.world()
        labels = [self.prompter.answers[label] for label in LABELS]
        engine = scoring.engine_of(model)
        score = partial(spread.score, model, answers=labels, batch_tokens=self.plan.batch_tokens, engine=engine)
        if engine is not None:  # what a GPU and its links do at first is not the model's pace
            score(prompts=prompts[: STARTED * processes])
        began = time.monotonic()
        with steps(f"scoring with the {key} model", len(prompts), "text", None if rank else self.run) as counter:
            rows = score(prompts=prompts, steps=counter)
        seconds = time.monotonic() - began
        timed = [] if rank else prompts[:TIMED]
        latency = _latency([partial(self.score, model, [p], engine=engine) for p in timed])
        cut = [rendered.truncated for rendered in self._rendered]
        made = predictions.of(self.examples, scoring.probabilities(rows), cut)
        return Answers(key, name, seconds, made, latency_ms=latency), rows


def _language_models(found: Answered, run: Run, plan: Plan, parts: Parts, examples: Sequence[Example]) -> None:
    """Answers of the tuned model, and of its base with the adapter off."""
    recipe, device = plan.recipe, models.device_of(plan.device, spread.local_rank())
    is_main = not spread.world()[0]
    if recipe.train is not None and not (run.adapter / models.CARD).is_file():
        raise RunError(f"{run.folder} has no trained weights; `finllm resume {run.name}` trains to the end")
    loaded = models.load(
        recipe.model, dtype=plan.dtype, device=device, dequantize=plan.dequantize, run=run if is_main else None
    )
    asker = _Asker(run, plan, examples, Prompter(loaded.tokenizer, recipe.prompt))
    name = recipe.model.name
    base = None
    if recipe.train is None or recipe.evaluation.base:
        base, base_rows = asker.ask("base", f"{name}, zero-shot", loaded.model)
    if recipe.train is None:
        assert base is not None, "a run without training scores its base"
        found.answers.append(base)
        if is_main:
            found.checks.append(_alone(asker, loaded.model, base_rows))
        return
    adapted = models.is_adapter(run.adapter)
    if adapted:
        model = models.attach(loaded.model, run.adapter)
    else:  # all weights were trained: the base must go before they come
        del loaded
        own = recipe.model.model_copy(update={"name": str(run.adapter), "revision": None})
        model = models.load(own, dtype=plan.dtype, device=device).model
    tuned, rows = asker.ask("tuned", f"{name}, tuned", model)
    found.answers += [tuned, *([base] if base else [])]
    if not is_main:
        return
    found.checks.append(_alone(asker, model, rows))
    if adapted and base:
        with model.disable_adapter():
            off = partial(asker.score, model)
            found.checks.append(selfchecks.adapter_off(off, asker.prompts, base_rows, plan.dtype))
    found.checks += selfchecks.prompts_agree(parts.train, asker.prompter, _saved(run))


def _alone(asker: _Asker, model: Any, rows: NDArray[np.float64]) -> Check:
    score = partial(asker.score, model, batch_tokens=1)
    return selfchecks.batch_invariance(score, asker.prompts, rows, asker.plan.dtype)


def _saved(run: Run) -> Prompter:
    """The prompts of the trained model as whoever uses it will make them."""
    from transformers import AutoTokenizer

    return Prompter(AutoTokenizer.from_pretrained(str(run.adapter)), Card.of(run.adapter).prompt)


def _without_prior(found: Answered) -> None:
    """The base once more, its preference for a label taken out with the help of validation texts without labels."""
    base = next((one for one in found.answers if one.key == "base"), None)
    if base is None:
        return
    key, name = "base-calibrated", f"{base.name}, batch-calibrated"
    made = []
    for dataset in dict.fromkeys(p.dataset for p in base.predictions):
        rows = [p for p in base.predictions if p.dataset == dataset]
        unlabelled = [p for p in rows if p.part == "validation"]
        if not unlabelled:
            why = f"{dataset} has no validation texts to estimate its prior on"
            found.missing.append(Missing(key=key, name=name, why=why))
            return
        shares = calibration.batch_calibrated(probabilities_of(rows), probabilities_of(unlabelled))
        made += [predictions.changed(p, row) for p, row in zip(rows, shares.tolist(), strict=True)]
    found.answers.append(replace(base, key=key, name=name, predictions=made))


def _baselines(found: Answered, plan: Plan, parts: Parts, examples: Sequence[Example]) -> None:
    """Answers of what needs no language model; each is fitted on the training part, as the tuned model was."""
    if not parts.train:
        return
    for key in plan.recipe.evaluation.baselines:
        fitted = baselines.BASELINES[key](parts.train, parts.validation)
        began = time.monotonic()
        rows = fitted.probabilities(examples)
        seconds = time.monotonic() - began
        latency = _latency([partial(fitted.probabilities, [e]) for e in examples[:TIMED]])
        made = predictions.of(examples, rows)
        found.answers.append(Answers(key, baselines.NAMES[key], seconds, made, latency_ms=latency))


def _classifier(found: Answered, name: str, plan: Plan, examples: Sequence[Example], run: Run) -> None:
    """Answers of a classifier of the hub; one that cannot be had is noted."""
    key = Path(name).name.lower()
    try:
        one = classifiers.load(name, models.device_of(plan.device))
    except RunError as error:
        found.missing.append(Missing(key=key, name=name, why=str(error)))
        return
    began = time.monotonic()
    with steps(f"scoring with {name}", len(examples), "text", run):
        rows, cut = one.probabilities(examples)
    seconds = time.monotonic() - began
    known = contamination.seen(name)
    found.answers.append(
        Answers(
            key,
            name,
            seconds,
            predictions.of(examples, rows, cut),
            latency_ms=_latency([partial(one.probabilities, [e]) for e in examples[:TIMED]]),
            marks=contamination.marks(name, [spec.name for spec in plan.recipe.data]),
            saw=known.column if known else None,
        )
    )


def earlier(name: str, run: Run, examples: Sequence[Example]) -> Answers:
    """What an earlier run's own system answered on these rows; raises RunError where it did not answer them all."""
    other = find(name, run.folder.parent)
    answers = predictions.of_run(other)
    by_id = {p.id: p for p in answers.predictions}
    lost = [e.id for e in examples if e.id not in by_id or by_id[e.id].gold != e.label]
    if lost:
        raise RunError(
            f"evaluation.runs: {other.name} did not answer {len(lost)} of {len(examples)} rows of this run, the first "
            f"is {lost[0]}; name runs on the same data and parts"
        )
    return replace(answers, key=other.name, predictions=[by_id[e.id] for e in examples])


def _latency(calls: Sequence[Callable[[], object]]) -> float | None:
    """Median milliseconds of a call."""
    times = []
    for call in calls:
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times) if times else None
