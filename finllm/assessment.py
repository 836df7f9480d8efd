"""From every system's predictions to scores.

`score` is a pure function, so that a report can be made again, and questioned, without a model. A new metric is a
function in `finllm.metrics` or `finllm.calibration` and a field in `finllm.scores`.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np

from finllm import calibration, metrics, significance
from finllm.errors import RunError
from finllm.example import LABELS, Split
from finllm.predictions import Answers, Prediction
from finllm.scores import (
    Calibration,
    Case,
    Check,
    ClassScore,
    Interval,
    Metrics,
    Missing,
    Paired,
    PartScores,
    ReliabilityBin,
    Scores,
    Slice,
    Softened,
    System,
)  # fmt: skip

SMALLEST_SLICE = 20
"""Rows below which a slice is not reported."""
MISTAKES = 20
LEVELS = {"66": ("100", "75-99", "66-75"), "75": ("100", "75-99")}
"""PhraseBank's nested files; 50Agree is all rows, AllAgree the band 100."""

Rows = dict[str, list[Prediction]]
"""Predictions of each system, by key; the same rows in the same order."""


def score(
    answers: Sequence[Answers],
    draws: int,
    seed: int,
    *,
    parts: Sequence[Split] | None = None,
    missing: Sequence[Missing] = (),
    checks: Sequence[Check] = (),
) -> Scores:
    """Figures of every system on `parts` (None: all), with intervals and comparisons.

    Temperatures are fitted on validation rows, whether these are reported or not. Raises RunError where two systems
    did not answer the same rows.
    """
    _check(answers)
    wanted = [(dataset, part) for dataset, part in answers[0].parts if parts is None or part in parts]
    return Scores(
        systems=tuple(_system(a) for a in answers),
        parts=tuple(_part(answers, dataset, part, draws, seed) for dataset, part in wanted),
        draws=draws,
        seed=seed,
        missing=tuple(missing),
        checks=tuple(checks),
    )


def _check(answers: Sequence[Answers]) -> None:
    keys = [a.key for a in answers]
    if len(set(keys)) < len(keys) or not keys:
        raise RunError(f"systems {', '.join(keys) or '(none)'}: give at least one, and each its own key")
    asked = {p.id: p.gold for p in answers[0].predictions}
    for one in answers:
        rows = {p.id: p.gold for p in one.predictions}
        if len(rows) < len(one.predictions):
            raise RunError(f"{one.key}: has two predictions of one row; predict each row once")
        if rows != asked:
            odd = sorted(set(rows.items()) ^ set(asked.items()))
            raise RunError(
                f"{one.key} and {answers[0].key} did not answer the same rows: {len(odd)} differ, the first is "
                f"{odd[0][0]}; score both on the same parts of the same data"
            )


def _system(one: Answers) -> System:
    texts = len(one.predictions)
    pace = texts / one.seconds if one.seconds > 0 else 0.0
    return System(
        key=one.key,
        name=one.name,
        texts=texts,
        seconds=one.seconds,
        texts_per_second=pace,
        latency_ms=one.latency_ms,
        marks=one.marks,
    )


def rows_of(answers: Sequence[Answers], dataset: str, part: Split) -> Rows:
    """Every system's predictions on one part, in the order of the first system's."""
    asked = [p.id for p in answers[0].predictions if (p.dataset, p.part) == (dataset, part)]
    by_system = {one.key: {p.id: p for p in one.predictions} for one in answers}
    return {key: [by_id[name] for name in asked] for key, by_id in by_system.items()}


def _part(answers: Sequence[Answers], dataset: str, part: Split, draws: int, seed: int) -> PartScores:
    rows = rows_of(answers, dataset, part)
    fitted_on = rows_of(answers, dataset, "validation") if part != "validation" else {key: [] for key in rows}
    first = rows[answers[0].key]
    saw = {one.saw for one in answers if one.saw is not None}
    return PartScores(
        dataset=dataset,
        part=part,
        rows=len(first),
        clusters=len(set(metrics.clusters_of(groups(first)).tolist())),
        systems=_systems(rows, draws, seed),
        calibration={key: _calibration(answered, fitted_on[key], draws, seed) for key, answered in rows.items()},
        slices=tuple(_slices(rows, first, saw, draws, seed)),
        paired=tuple(_every_pair(rows, draws, seed)),
        mistakes=tuple(_cases(rows, lambda p: p.predicted != p.gold))[:MISTAKES],
        mixed=tuple(_cases(rows, lambda p: p.careless is not None)),
    )


def _systems(rows: Rows, draws: int, seed: int) -> dict[str, Metrics]:
    return {key: _metrics(answered, draws, seed) for key, answered in rows.items()}


def _metrics(answered: Sequence[Prediction], draws: int, seed: int) -> Metrics:
    gold, predicted = gold_of(answered), predicted_of(answered)
    intervals = metrics.bootstrap(gold, predicted, groups(answered), draws, seed)
    tables = metrics.confusion(gold, predicted)
    shares = {name: _interval(float(figure(tables)), intervals[name]) for name, figure in metrics.FIGURES.items()}
    return Metrics(
        **shares,
        **_fit(probabilities_of(answered), answered, draws, seed),
        per_class={
            label: ClassScore(precision=c.precision, recall=c.recall, f1=c.f1, support=c.support)
            for label, c in zip(LABELS, metrics.per_class(gold, predicted), strict=True)
        },
        confusion=tuple(tuple(line) for line in tables.tolist()),
        truncated=sum(p.truncated for p in answered),
    )


def _fit(probabilities: metrics.Shares, answered: Sequence[Prediction], draws: int, seed: int) -> dict[str, Interval]:
    found = calibration.fit(probabilities, gold_of(answered), groups(answered), draws, seed)
    return {name: _estimate(one) for name, one in found.items()}


def _calibration(answered: Sequence[Prediction], fitted_on: Sequence[Prediction], draws: int, seed: int) -> Calibration:
    shares, gold = probabilities_of(answered), gold_of(answered)
    selective = calibration.selective(shares, gold, groups(answered), draws, seed)
    softened = None
    if fitted_on:
        heat = calibration.temperature(probabilities_of(fitted_on), gold_of(fitted_on))
        after = calibration.softened(shares, heat)
        softened = Softened(temperature=heat, **_fit(after, answered, draws, seed), bins=_bins(after, gold))
    return Calibration(
        bins=_bins(shares, gold),
        softened=softened,
        coverage=selective.coverage,
        risk=selective.risk,
        aurc=_estimate(selective.area),
        selective_accuracy=_estimate(selective.accuracy),
    )


def _bins(shares: metrics.Shares, gold: metrics.Indices) -> tuple[ReliabilityBin, ...]:
    found = calibration.bins(shares, gold)
    return tuple(ReliabilityBin(rows=b.rows, confidence=b.confidence, accuracy=b.accuracy) for b in found)


def _slices(rows: Rows, first: Sequence[Prediction], saw: set[str], draws: int, seed: int) -> Iterable[Slice]:
    """What rows have in common, where that is neither all rows nor too few."""
    for (by, value), chosen in _kinds(first, saw).items():
        if SMALLEST_SLICE <= len(chosen) < len(first):
            part = {key: [answered[i] for i in chosen] for key, answered in rows.items()}
            yield Slice(by=by, value=value, rows=len(chosen), systems=_systems(part, draws, seed))


def _kinds(first: Sequence[Prediction], saw: set[str]) -> dict[tuple[str, str], list[int]]:
    """Row numbers of each kind of text, by what it is and its value."""
    mixed = any(p.careless for p in first)
    found: dict[tuple[str, str], list[int]] = {}
    for band in sorted({p.agreement for p in first if p.agreement}, key=_order):
        found["agreement", band] = [i for i, p in enumerate(first) if p.agreement == band]
    for level, bands in LEVELS.items():
        found["level", level] = [i for i, p in enumerate(first) if p.agreement in bands]
    for source in sorted({p.source for p in first if p.source}):
        found["source", source] = [i for i, p in enumerate(first) if p.source == source]
    for i, p in enumerate(first):
        if p.target is not None:
            value = "named in the text" if p.target.casefold() in p.text.casefold() else "not named in the text"
            found.setdefault(("target", value), []).append(i)
        if mixed:
            found.setdefault(("signals", "mixed" if p.careless else "plain"), []).append(i)
    for model in sorted(saw):
        found["unseen", model] = [i for i, p in enumerate(first) if model not in (p.seen_by or ())]
    return found


def _order(band: str) -> int:
    """Bands of agreement from the highest down."""
    start = band.partition("-")[0]
    return -int(start) if start.isdigit() else 0


def _every_pair(rows: Rows, draws: int, seed: int) -> Iterable[Paired]:
    """Every two systems; p-values are corrected among those with the first system, and among all others."""
    first = next(iter(rows))
    pairs = list(combinations(rows, 2))
    for family in ([p for p in pairs if first in p], [p for p in pairs if first not in p]):
        found = [_paired(rows, one, other, draws, seed) for one, other in family]
        corrected = significance.holm([pair.p for pair in found])
        yield from (pair.model_copy(update={"p_corrected": p}) for pair, p in zip(found, corrected, strict=True))


def _paired(rows: Rows, first: str, second: str, draws: int, seed: int) -> Paired:
    gold, one, other = gold_of(rows[first]), predicted_of(rows[first]), predicted_of(rows[second])
    found = metrics.paired_bootstrap(gold, one, other, groups(rows[first]), draws, seed)
    test = significance.mcnemar(gold, one, other)
    return Paired(
        first=first,
        second=second,
        **{name: Interval(value=d.value, low=d.low, high=d.high) for name, d in found.items()},
        only_first=test.only_first,
        only_second=test.only_second,
        p=test.p,
        p_corrected=test.p,
    )


def _cases(rows: Rows, wanted: Callable[[Prediction], bool]) -> Iterable[Case]:
    """Rows that are wanted, by falling confidence of the first system."""
    first, *others = rows
    numbers = [i for i, p in enumerate(rows[first]) if wanted(p)]
    for i in sorted(numbers, key=lambda i: -max(rows[first][i].probabilities)):
        one = rows[first][i]
        yield Case(
            id=one.id,
            text=one.text,
            target=one.target,
            gold=one.gold,
            predicted=one.predicted,
            probabilities=one.probabilities,
            answers={other: rows[other][i].predicted for other in others},
        )


def _interval(value: float, ends: tuple[float, float]) -> Interval:
    return Interval(value=value, low=ends[0], high=ends[1])


def _estimate(one: calibration.Estimate) -> Interval:
    return Interval(value=one.value, low=one.low, high=one.high)


def gold_of(answered: Sequence[Prediction]) -> metrics.Indices:
    """Indices of the right labels."""
    return np.array([LABELS.index(p.gold) for p in answered], dtype=np.intp)


def predicted_of(answered: Sequence[Prediction]) -> metrics.Indices:
    """Indices of the labels that were answered."""
    return np.array([LABELS.index(p.predicted) for p in answered], dtype=np.intp)


def probabilities_of(answered: Sequence[Prediction]) -> metrics.Shares:
    """Probabilities (rows, labels), made to sum to 1 exactly: on disk they are rounded."""
    rows = np.array([p.probabilities for p in answered], dtype=np.float64)
    normalised: metrics.Shares = rows / rows.sum(axis=1, keepdims=True)
    return normalised


def groups(answered: Sequence[Prediction]) -> list[str | None]:
    """The group of near twins of each row."""
    return [p.group for p in answered]
