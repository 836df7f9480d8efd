"""Pairs of answers to one text, of which one is preferred: what DPO learns from.

    folds      the training rows that models which had not seen them got wrong, or nearly: the label, and what it was
               confused with
    careless   training rows with mixed signals: the label, and what a careless reader answers
    file       your own: a text, the better and the worse answer

An answer is a label, in a file any words, or a label with its explanation.

A text of the validation or the test part, or a near twin of one, is refused wherever it comes from.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from finllm.data import outoffold
from finllm.data.leaks import Leak, find_leaks
from finllm.data.parts import Parts
from finllm.data.spec import AbsolutePath, DatasetSpec
from finllm.errors import DataError
from finllm.example import LABELS, Example, Label, Split
from finllm.yamlfile import Spec

SHOWN = 5
"""Faulty lines named in a message."""
PROPOSED: Split = "train"
"""The part that a pair's text goes to."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to a text."""

    id: str
    """That of the training row, or `NAME:LINE` of a file."""
    source: Literal["folds", "careless", "file"]
    text: str
    target: str | None
    chosen: str
    rejected: str
    agreement: str | None = None
    """Band of annotator agreement in per cent, where it is known."""
    reasons: tuple[str, str] | None = None
    """Explanations of both answers, which then are labels; None for answers without."""

    @property
    def answers(self) -> tuple[str, str]:
        """Both answers, in words."""
        reasons = self.reasons or ("", "")
        chosen, rejected = (
            f"{answer}: {why}" if why else answer
            for answer, why in zip((self.chosen, self.rejected), reasons, strict=True)
        )
        return chosen, rejected


class PairsSpec(Spec):
    """Where pairs come from."""

    bands: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Only texts of these bands of annotator agreement, such as `["100", "75-99"]`; null is all."""

    def wants(self, agreement: str | None) -> bool:
        """Whether texts of this agreement are asked for."""
        return self.bands is None or agreement in self.bands


class Confused(PairsSpec):
    """Pairs of a training row's label over another label."""

    explained: bool = False
    """Only rows that say why: the label with its explanation over the other label with the same, which contradicts it."""

    def pair(self, row: Example, confused: Label, source: Literal["folds", "careless"]) -> Preference | None:
        """The pair of a row; None where an explanation is asked for that it does not have."""
        if self.explained and not row.explanation:
            return None
        reasons = (row.explanation, row.explanation) if self.explained and row.explanation else None
        return Preference(row.id, source, row.text, row.target, row.label, confused, row.agreement, reasons)


class Folds(Confused):
    """Pairs from predictions on training rows by models that had not seen them."""

    name: Literal["folds"]
    sweep: AbsolutePath
    """The runs of all folds: `finllm launch SFT-RECIPE --name NAME --sweep data.0.fold=1/5,2/5,3/5,4/5,5/5`; runs/NAME."""
    margin: float = Field(default=0.2, ge=0, le=1)
    """A right answer makes a pair too, if the label's probability exceeds the next by less."""

    def read(self, parts: Parts, data: Sequence[DatasetSpec]) -> list[Preference]:
        """A pair for each training row that was confused; raises DataError where a row lacks an honest prediction."""
        found = outoffold.probabilities(self.sweep, parts, data)
        pairs = []
        for row in parts.train:
            if row.id not in found or not self.wants(row.agreement):
                continue
            shares: dict[Label, float] = dict(zip(LABELS, found[row.id], strict=True))
            confused = max((label for label in LABELS if label != row.label), key=shares.__getitem__)
            if shares[row.label] - shares[confused] < self.margin:
                pairs.append(self.pair(row, confused, "folds"))
        return [pair for pair in pairs if pair is not None]


class Careless(Confused):
    """Pairs from training rows with mixed signals, which say what a careless reader answers; the sample has some."""

    name: Literal["careless"]

    def read(self, parts: Parts, data: Sequence[DatasetSpec]) -> list[Preference]:
        """A pair for each such row; raises DataError where there is none."""
        pairs = [
            self.pair(row, row.careless, "careless")
            for row in parts.train
            if row.careless is not None and self.wants(row.agreement)
        ]
        if not pairs:
            named = ", ".join(spec.title for spec in data)
            raise DataError(f"{named}: no training row says what a careless reader answers; add the data set `sample`")
        return [pair for pair in pairs if pair is not None]


class Line(Spec):
    """One line of a file of pairs."""

    prompt: str = Field(min_length=1)
    """The text alone: the recipe's instruction is put before it, as in training and prediction."""
    chosen: str = Field(min_length=1)
    rejected: str = Field(min_length=1)
    chosen_explanation: str | None = None
    """Why; `chosen` and `rejected` then are labels, perhaps the same one."""
    rejected_explanation: str | None = None
    target: str | None = None
    agreement: str | None = None

    @property
    def reasons(self) -> tuple[str, str] | None:
        """Both explanations on one line each, or None where there is none."""
        given = (self.chosen_explanation, self.rejected_explanation)
        chosen, rejected = (" ".join((one or "").split()) for one in given)
        return (chosen, rejected) if any(one is not None for one in given) else None


class File(PairsSpec):
    """Your own pairs: JSON lines with `prompt` (the text), `chosen`, `rejected`; perhaps `target`, `agreement`, and both of
    `chosen_explanation` and `rejected_explanation`.
    """

    name: Literal["file"]
    path: AbsolutePath
    """A file of JSON lines, each with `prompt`, `chosen` and `rejected`."""

    def read(self, parts: Parts, _data: Sequence[DatasetSpec]) -> list[Preference]:
        """A pair for each line; raises one DataError for all lines that are wrong or give away held-out texts."""
        found = list(_lines(self.path))
        pairs = [
            Preference(f"{self.path.name}:{number}", "file", " ".join(line.prompt.split()), line.target,
                       line.chosen.strip(), line.rejected.strip(), line.agreement, line.reasons)
            for number, line in found if self.wants(line.agreement)
        ]  # fmt: skip
        if not pairs:
            raise DataError(f"{self.path}: holds no pairs{' of these bands' if found else ''}")
        _refuse_leaks(self.path, pairs, parts)
        return pairs


PairSource = Annotated[Folds | Careless | File, Field(discriminator="name")]
"""Every source of pairs a recipe can name."""


def read(sources: Sequence[Folds | Careless | File], parts: Parts, data: Sequence[DatasetSpec]) -> list[Preference]:
    """The pairs of all sources, in their order, each once; raises DataError where one cannot be had or is dishonest.

    `parts` are those of the recipe's `data`, after the check for leaks.
    """
    pairs = [pair for source in sources for pair in source.read(parts, data)]
    once = {(pair.text, pair.target, *pair.answers): pair for pair in reversed(pairs)}
    if not pairs:
        raise DataError(
            "no training row makes a pair: none is confused so far; raise `margin`, name more `bands`, or take out "
            "`explained` where rows have no explanation"
        )
    opposite = [pair for key, pair in once.items() if (*key[:2], key[3], key[2]) in once]
    if opposite:
        names = ", ".join(pair.id for pair in opposite[:SHOWN])
        raise DataError(
            f"{len(opposite)} pair(s) contradict others: the same two answers, preferred both ways ({names})"
        )
    _refuse_held_out(pairs, parts)
    return list(reversed(once.values()))


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    """The lines of a file with their numbers; raises one DataError for all that are wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a file of JSON lines in UTF-8") from error
    faults = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            read = Line.model_validate(json.loads(line))
        except ValidationError as error:
            told = (f"{'.'.join(map(str, e['loc'])) or 'the line'}: {e['msg']}" for e in error.errors())
            faults.append(f"line {number}: {'; '.join(told)}")
            continue
        except json.JSONDecodeError as error:
            faults.append(f"line {number}: is not JSON ({error})")
            continue
        if why := _unusable(read):
            faults.append(f"line {number}: {why}")
        yield number, read
    if faults:
        more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        listed = "\n  ".join(faults[:SHOWN])
        raise DataError(
            f"{path}: {len(faults)} line(s) are wrong; each is {{prompt, chosen, rejected}}:\n  {listed}{more}"
        )


def _unusable(line: Line) -> str | None:
    if not (line.prompt.strip() and line.chosen.strip() and line.rejected.strip()):
        return "prompt, chosen or rejected holds only white space"
    chosen, rejected = line.chosen.split(), line.rejected.split()
    if line.reasons is None:
        return f"chosen and rejected are the same, {line.chosen[:40]!r}" if chosen == rejected else None
    if not all(line.reasons):
        return "has one explanation; give both chosen_explanation and rejected_explanation, or neither"
    if odd := [answer for answer in (line.chosen.strip(), line.rejected.strip()) if answer not in LABELS]:
        return f"{odd[0][:40]!r} has an explanation, so it must be one of {', '.join(LABELS)}"
    if chosen == rejected and line.reasons[0] == line.reasons[1]:
        return f"both answers and explanations are the same, {line.chosen[:40]!r}"
    return None


def _refuse_leaks(path: Path, pairs: Sequence[Preference], parts: Parts) -> None:
    """Refuse a text that is, or is a near twin of, a validation or test text."""
    rows = {
        pair.id: Example(pair.id, f"pairs of {path.name}", pair.text, LABELS[0], PROPOSED, target=pair.target)
        for pair in pairs
    }
    held_out = (*parts.validation, *parts.test)
    leaks = find_leaks(Parts(train=tuple(rows.values()), validation=(), test=held_out))
    if leaks:
        shown = "\n  ".join(map(_told, leaks[:SHOWN]))
        raise DataError(
            f"{path}: {len({leak.early.id for leak in leaks})} line(s) hold texts of the validation or test part, or near "
            f"twins of them; scores would measure memory. Take them out:\n  {shown}"
        )


def _told(leak: Leak) -> str:
    return f"line {leak.early.id.rpartition(':')[2]} and {leak.late.split} row {leak.late.id} ({leak.how})"


def _refuse_held_out(pairs: Sequence[Preference], parts: Parts) -> None:
    """The last check before anything is learnt, whatever the source: no text of a held-out row."""
    held_out = {row.text: row for row in (*parts.validation, *parts.test)}
    leaked = [pair for pair in pairs if pair.text in held_out]
    if leaked:
        row = held_out[leaked[0].text]
        raise DataError(f"{len(leaked)} pair(s) hold held-out texts, such as {leaked[0].id}, {row.split} row {row.id}")
