"""Scores: the figures that follow from every system's predictions, written to `scores.json`.

`score` is a pure function, so that a report can be made again, and questioned, without a model. A new metric is a
function in `finllm.metrics` and a field here.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from finllm import metrics
from finllm.errors import RunError
from finllm.example import LABELS, Label, Split
from finllm.predictions import Answers, Prediction
from finllm.run import Run, read_json, write_json
from finllm.yamlfile import Spec

SMALLEST_SLICE = 20
"""Rows below which a slice is not reported."""


class Interval(Spec):
    """A figure with its 95 % bootstrap interval; shares from 0 to 1, or differences of them."""

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether 0 is outside the interval: for a difference, that one system is better."""
        return not self.low <= 0 <= self.high


class ClassScore(Spec):
    """One class against all others."""

    precision: float
    recall: float
    f1: float
    support: int


class Metrics(Spec):
    """One system on one set of rows."""

    accuracy: Interval
    macro_f1: Interval
    weighted_f1: Interval
    per_class: dict[Label, ClassScore]
    confusion: tuple[tuple[int, ...], ...]
    """One line for each gold label, one column for each predicted one, in the order of LABELS."""
    truncated: int
    """Texts that were cut to fit the model."""


class Slice(Spec):
    """Rows of one part that have something in common, and every system on them."""

    by: str
    """What they have in common: `agreement`, `source`, `signals`."""
    value: str
    rows: int
    systems: dict[str, Metrics]


class Paired(Spec):
    """First system less second on the same rows, with intervals over the same draws."""

    first: str
    second: str
    accuracy: Interval
    macro_f1: Interval


class PartScores(Spec):
    """Every system on one part of one data set."""

    dataset: str
    part: Split
    rows: int
    clusters: int
    """Groups of near twins, and rows that have none: what the intervals draw from."""
    systems: dict[str, Metrics]
    slices: tuple[Slice, ...]
    paired: tuple[Paired, ...]
    """The first system less each of the others."""


class System(Spec):
    """One system that was scored."""

    key: str
    """Name in files and tables: `tuned`, `base`, `majority`, `tfidf`, ..."""
    name: str
    """Name for people."""
    texts: int
    seconds: float
    """For answering all texts; loading and fitting are not in it."""
    texts_per_second: float


class Scores(Spec):
    """Everything that a report says about systems; written to scores.json."""

    systems: tuple[System, ...]
    """The first is the one that the others are compared with."""
    parts: tuple[PartScores, ...]
    draws: int
    """Bootstrap draws behind each interval."""
    seed: int

    def save(self, run: Run) -> None:
        """Write scores.json."""
        write_json(run.scores, self.model_dump(mode="json"))

    @classmethod
    def of(cls, run: Run) -> "Scores":
        """The scores of a run folder; raises RunError where it has none."""
        return cls.model_validate(read_json(run.scores))


def score(answers: Sequence[Answers], draws: int, seed: int) -> Scores:
    """Figures of every system on every part, with intervals; the first system is compared with each other one.

    Raises RunError where two systems did not answer the same rows.
    """
    _check(answers)
    return Scores(
        systems=tuple(_system(a) for a in answers),
        parts=tuple(_part(answers, dataset, part, draws, seed) for dataset, part in answers[0].parts),
        draws=draws,
        seed=seed,
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
    return System(key=one.key, name=one.name, texts=texts, seconds=one.seconds, texts_per_second=pace)


Rows = dict[str, list[Prediction]]
"""Predictions of each system, by key; the same rows in the same order."""


def _part(answers: Sequence[Answers], dataset: str, part: Split, draws: int, seed: int) -> PartScores:
    asked = [p.id for p in answers[0].predictions if (p.dataset, p.part) == (dataset, part)]
    rows: Rows = {}
    for one in answers:
        by_id = {p.id: p for p in one.predictions}
        rows[one.key] = [by_id[name] for name in asked]
    first = rows[answers[0].key]
    return PartScores(
        dataset=dataset,
        part=part,
        rows=len(first),
        clusters=len({p.id if p.group is None else (p.group,) for p in first}),
        systems=_systems(rows, draws, seed),
        slices=tuple(_slices(rows, first, draws, seed)),
        paired=tuple(_paired(rows, answers[0].key, other.key, draws, seed) for other in answers[1:]),
    )


def _systems(rows: Rows, draws: int, seed: int) -> dict[str, Metrics]:
    return {key: _metrics(answered, draws, seed) for key, answered in rows.items()}


def _metrics(answered: Sequence[Prediction], draws: int, seed: int) -> Metrics:
    gold, predicted = _gold(answered), _predicted(answered)
    intervals = metrics.bootstrap(gold, predicted, [p.group for p in answered], draws, seed)
    classes = metrics.per_class(gold, predicted)
    return Metrics(
        accuracy=_interval(metrics.accuracy(gold, predicted), intervals["accuracy"]),
        macro_f1=_interval(metrics.macro_f1(gold, predicted), intervals["macro_f1"]),
        weighted_f1=_interval(metrics.weighted_f1(gold, predicted), intervals["weighted_f1"]),
        per_class={
            label: ClassScore(precision=c.precision, recall=c.recall, f1=c.f1, support=c.support)
            for label, c in zip(LABELS, classes, strict=True)
        },
        confusion=tuple(tuple(line) for line in metrics.confusion(gold, predicted).tolist()),
        truncated=sum(p.truncated for p in answered),
    )


def _slices(rows: Rows, first: Sequence[Prediction], draws: int, seed: int) -> Iterable[Slice]:
    """Slices by agreement, source and mixed signals that are neither all rows nor too few."""
    mixed = any(p.careless for p in first)
    kinds: dict[str, list[str | None]] = {
        "agreement": [p.agreement for p in first],
        "source": [p.source for p in first],
        "signals": [("mixed" if p.careless else "plain") if mixed else None for p in first],
    }
    for by, values in kinds.items():
        for value in sorted({v for v in values if v is not None}, key=_order):
            chosen = [i for i, v in enumerate(values) if v == value]
            if SMALLEST_SLICE <= len(chosen) < len(first):
                part = {key: [answered[i] for i in chosen] for key, answered in rows.items()}
                yield Slice(by=by, value=value, rows=len(chosen), systems=_systems(part, draws, seed))


def _order(value: str) -> tuple[int, str]:
    """Bands of agreement from the highest down, everything else by name."""
    start = value.partition("-")[0]
    return (-int(start) if start.isdigit() else 0, value)


def _paired(rows: Rows, first: str, second: str, draws: int, seed: int) -> Paired:
    answered = rows[first]
    found = metrics.paired_bootstrap(
        _gold(answered), _predicted(answered), _predicted(rows[second]), [p.group for p in answered], draws, seed
    )
    intervals = {name: Interval(value=d.value, low=d.low, high=d.high) for name, d in found.items()}
    return Paired(first=first, second=second, accuracy=intervals["accuracy"], macro_f1=intervals["macro_f1"])


def _interval(value: float, ends: tuple[float, float]) -> Interval:
    return Interval(value=value, low=ends[0], high=ends[1])


def _gold(answered: Sequence[Prediction]) -> metrics.Indices:
    return np.array([LABELS.index(p.gold) for p in answered], dtype=np.intp)


def _predicted(answered: Sequence[Prediction]) -> metrics.Indices:
    return np.array([LABELS.index(p.predicted) for p in answered], dtype=np.intp)
