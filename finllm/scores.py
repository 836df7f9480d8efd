"""Scores: everything that a report says about systems, as it stands in `scores.json`; `finllm.assessment` makes them."""

from pydantic import ValidationError

from finllm.errors import RunError
from finllm.example import Label, Split
from finllm.files import read_json, write_json
from finllm.run import Run
from finllm.yamlfile import Spec

LEVEL = 0.05
"""A difference is decided where its corrected p-value is below this."""


class Interval(Spec):
    """A figure with its 95 % bootstrap interval; shares from 0 to 1, differences of them, nats."""

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
    mcc: Interval
    """Matthews correlation, -1 to 1."""
    nll: Interval
    """Nats a row."""
    brier: Interval
    """0 to 2."""
    ece: Interval
    per_class: dict[Label, ClassScore]
    confusion: tuple[tuple[int, ...], ...]
    """One line for each gold label, one column for each predicted one, in the order of LABELS."""
    truncated: int
    """Texts that were cut to fit the model."""


class ReliabilityBin(Spec):
    """Answers of like confidence."""

    rows: int
    confidence: float
    accuracy: float


class Softened(Spec):
    """The same system at the temperature that fits validation best."""

    temperature: float
    nll: Interval
    brier: Interval
    ece: Interval
    bins: tuple[ReliabilityBin, ...]


class Calibration(Spec):
    """How far a system's confidence can be believed on one part."""

    bins: tuple[ReliabilityBin, ...]
    softened: Softened | None
    """None without validation rows of the same data set, and on the validation part itself."""
    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    """Share of wrong answers among the most confident ones, at each coverage."""
    aurc: Interval
    """Mean risk over all coverages."""
    selective_accuracy: Interval
    """Accuracy on the 80 % of the texts with the highest confidence."""


class Slice(Spec):
    """Rows of one part that have something in common, and every system on them."""

    by: str
    """What they have in common: `agreement`, `level`, `source`, `target`, `signals`, `unseen`."""
    value: str
    rows: int
    systems: dict[str, Metrics]


class Paired(Spec):
    """First system less second on the same rows, with intervals over the same draws, and McNemar's exact test."""

    first: str
    second: str
    accuracy: Interval
    macro_f1: Interval
    only_first: int
    """Rows that only the first system has right."""
    only_second: int
    p: float
    p_corrected: float
    """After Holm, over all comparisons of the first system of the report, or over all others."""

    @property
    def decided(self) -> bool:
        """Whether interval and corrected test agree that the accuracies differ."""
        return self.accuracy.decided and self.p_corrected < LEVEL


class Case(Spec):
    """One text and what every system says of it."""

    id: str
    text: str
    target: str | None = None
    gold: Label
    predicted: Label
    """By the first system."""
    probabilities: tuple[float, float, float]
    """Of the first system."""
    answers: dict[str, Label]
    """Of the other systems."""


class PartScores(Spec):
    """Every system on one part of one data set."""

    dataset: str
    part: Split
    rows: int
    clusters: int
    """Groups of near twins, and rows that have none: what the intervals draw from."""
    systems: dict[str, Metrics]
    calibration: dict[str, Calibration]
    slices: tuple[Slice, ...]
    paired: tuple[Paired, ...]
    """Every two systems; those with the first system come first."""
    mistakes: tuple[Case, ...]
    """The first system's most confident mistakes."""
    mixed: tuple[Case, ...]
    """Sentences with mixed signals."""


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
    latency_ms: float | None = None
    """Median time for one text alone."""
    marks: tuple[str, ...] = ()
    """What a reader must know, such as that it was trained on rows it is tested on."""


class Missing(Spec):
    """A system that was asked for and could not be scored."""

    key: str
    name: str
    why: str


class Check(Spec):
    """Something that must hold for the figures to mean what they say, and what was found."""

    name: str
    passed: bool
    found: str


class Scores(Spec):
    """Everything that a report says about systems; written to scores.json."""

    systems: tuple[System, ...]
    """The first is the one that the verdict is about."""
    parts: tuple[PartScores, ...]
    draws: int
    """Bootstrap draws behind each interval."""
    seed: int
    missing: tuple[Missing, ...] = ()
    checks: tuple[Check, ...] = ()

    def save(self, run: Run) -> None:
        """Write scores.json."""
        write_json(run.scores, self.model_dump(mode="json"))

    @classmethod
    def of(cls, run: Run) -> "Scores":
        """The scores of a run folder; raises RunError where it has none, or those of another version."""
        try:
            return cls.model_validate(read_json(run.scores))
        except ValidationError as error:
            raise RunError(
                f"{run.scores} is not of this version of FinLLM ({error.error_count()} fault(s)); "
                f"`finllm evaluate {run.folder}` writes it anew"
            ) from error
