"""The sections of a report that say how systems did on one part of one data set."""

from collections.abc import Callable, Iterable, Sequence

from finllm.example import LABELS
from finllm.report import charts
from finllm.report.document import Block, Bullets, Details, Gallery, Heading, Picture, Table, Text
from finllm.report.verdict import decision, names_of
from finllm.report.words import interval, p_value, percent, plain, points, texts
from finllm.scores import Case, Interval, Metrics, Paired, PartScores, Scores, Slice

SHOWN_TEXT = 400
"""Characters of a text in a table."""


def part(one: PartScores, scores: Scores) -> Iterable[Block]:
    """Everything about one part."""
    groups = "" if one.clusters == one.rows else f" in {one.clusters:,} independent groups"
    yield Heading(f"{one.dataset}, {one.part}: {texts(one.rows)}{groups}", 3)
    yield _systems(one, scores)
    yield from _notes(scores)
    if one.paired:
        yield Heading("Differences on the same texts", 4)
        yield from _pairs(one)
    yield Gallery([Picture(c.name, c.svg, c.caption) for c in charts.of_part(one)])
    yield Heading("Can the probabilities be believed?", 4)
    yield Text("NLL in nats, Brier score 0 to 2, ECE over 15 bins in per cent; less is better.")
    yield _probabilities(one)
    yield Heading("What leaving out doubtful answers gains", 4)
    yield _selective(one)
    cut = {key: m.truncated for key, m in one.systems.items() if m.truncated}
    if cut:
        yield Text("Texts cut to fit the model: " + ", ".join(f"{name} {count}" for name, count in cut.items()) + ".")
    if one.slices:
        yield from _slices(one.slices)
    yield Heading("Per class, F1 (precision / recall)", 4)
    yield Table(("class", "texts", *one.systems), list(_classes(one)))
    yield Details("Confusion, texts by gold label and answer", [_confusion(one)])
    yield from _cases(one)


def _systems(one: PartScores, scores: Scores) -> Table:
    names = names_of(scores)
    rows = [
        (f"{key}: {names[key]}", interval(m.accuracy), interval(m.macro_f1), interval(m.weighted_f1), plain(m.mcc))
        for key, m in one.systems.items()
    ]
    missing = [(f"{m.key}: {m.name} (not available)", "", "", "", "") for m in scores.missing]
    return Table(("system", "accuracy", "macro-F1", "weighted F1", "MCC"), [*rows, *missing])


def _notes(scores: Scores) -> Iterable[Block]:
    """What a reader must know of single systems."""
    marks = [f"{s.key}{_dagger(mark)}: {mark}." for s in scores.systems for mark in s.marks]
    gone = [f"{m.key}: not available. {' '.join(m.why.split())}" for m in scores.missing]
    if marks or gone:
        yield Bullets([*marks, *gone])


def _dagger(mark: str) -> str:
    return " †" if mark.startswith("has seen") else ""


def _pairs(one: PartScores) -> Iterable[Block]:
    first = next(iter(one.systems))
    own = [pair for pair in one.paired if pair.first == first]
    head = ("accuracy, points", "verdict", "p, corrected", f"right: only {first} / only the other", "macro-F1, points")
    yield Table((f"{first} minus ...", *head), [(pair.second, *_difference(pair)) for pair in own])
    rest = [pair for pair in one.paired if pair.first != first]
    if rest:
        rows = [(f"{pair.first} minus {pair.second}", *_difference(pair)) for pair in rest]
        names = ("first minus second", *head[:3], "right: only the first / only the second", head[4])
        yield Details("All other pairs of systems", [Table(names, rows)])


def _difference(pair: Paired) -> tuple[str, ...]:
    right = f"{pair.only_first} / {pair.only_second}"
    return points(pair.accuracy), decision(pair), p_value(pair.p_corrected), right, points(pair.macro_f1)


def _probabilities(one: PartScores) -> Table:
    """Every system as it is, and at the temperature that fits validation."""
    rows = []
    for key, m in one.systems.items():
        rows.append((key, plain(m.nll), plain(m.brier), interval(m.ece)))
        after = one.calibration[key].softened
        if after is not None:
            name = f"{key}, temperature {after.temperature:.2f}"
            rows.append((name, plain(after.nll), plain(after.brier), interval(after.ece)))
    return Table(("system", "NLL", "Brier", "ECE"), rows)


def _selective(one: PartScores) -> Table:
    rows = [
        (key, interval(one.systems[key].accuracy), interval(c.selective_accuracy), interval(c.aurc))
        for key, c in one.calibration.items()
    ]
    return Table(("system", "accuracy, all texts", "accuracy, the surest 80 %", "mean risk (AURC)"), rows)


def _slices(slices: Sequence[Slice]) -> Iterable[Block]:
    """Accuracy and macro-F1 of every system on every slice; the other figures are folded away."""
    figures: dict[str, Callable[[Metrics], str]] = {
        "Accuracy": lambda m: interval(m.accuracy),
        "Macro-F1": lambda m: interval(m.macro_f1),
    }
    more: dict[str, Callable[[Metrics], str]] = {
        "Weighted F1": lambda m: interval(m.weighted_f1),
        "MCC": lambda m: plain(m.mcc),
        "NLL": lambda m: plain(m.nll),
        "Brier": lambda m: plain(m.brier),
        "ECE": lambda m: interval(m.ece),
    }
    for title, figure in figures.items():
        yield Heading(f"{title} by kind of text", 4)
        yield _by_slice(slices, figure)
    folded: list[Block] = []
    for title, figure in more.items():
        folded += [Text(f"{title}:"), _by_slice(slices, figure)]
    yield Details("Other figures by kind of text", folded)


def _by_slice(slices: Sequence[Slice], figure: Callable[[Metrics], str]) -> Table:
    lines = [(_slice_name(s), f"{s.rows:,}", *(figure(m) for m in s.systems.values())) for s in slices]
    return Table(("kind", "texts", *slices[0].systems), lines)


def _slice_name(one: Slice) -> str:
    named = {
        "agreement": f"agreement {one.value} %" + (" (AllAgree)" if one.value == "100" else ""),
        "level": f"{one.value}Agree",
        "signals": f"{one.value} signals",
        "target": f"target {one.value}",
        "unseen": f"not in the training of {one.value}",
    }
    return named.get(one.by, f"{one.by} {one.value}")


def _classes(one: PartScores) -> Iterable[tuple[str, ...]]:
    some = next(iter(one.systems.values()))
    for label in LABELS:
        each = [m.per_class[label] for m in one.systems.values()]
        cells = (f"{percent(c.f1)} ({percent(c.precision)} / {percent(c.recall)})" for c in each)
        yield (label, f"{some.per_class[label].support:,}", *cells)


def _confusion(one: PartScores) -> Table:
    rows = [
        (key if number == 0 else "", label, *map(str, line))
        for key, metrics in one.systems.items()
        for number, (label, line) in enumerate(zip(LABELS, metrics.confusion, strict=True))
    ]
    return Table(("system", "gold", *LABELS), rows)


def _cases(one: PartScores) -> Iterable[Block]:
    first = next(iter(one.systems))
    if one.mistakes:
        title = f"The {len(one.mistakes)} most confident mistakes of {first}"
        yield Details(title, [_texts(one.mistakes, first)])
    if one.mixed:
        right = sum(case.predicted == case.gold for case in one.mixed)
        title = f"The {len(one.mixed)} sentences with mixed signals ({right} right), by confidence of {first}"
        yield Details(title, [_texts(one.mixed, first)])


def _texts(cases: Sequence[Case], first: str) -> Table:
    others = list(cases[0].answers)
    rows = [
        (
            _shown(case),
            case.gold,
            case.predicted + ("" if case.predicted == case.gold else " ✗"),
            " / ".join(f"{100 * p:.0f}" for p in case.probabilities),
            *(case.answers[key] for key in others),
            case.id,
        )
        for case in cases
    ]
    return Table(("text", "gold", first, "% " + " / ".join(w[:3] for w in LABELS), *others, "row"), rows)


def _shown(case: Case) -> str:
    text = case.text if len(case.text) <= SHOWN_TEXT else f"{case.text[:SHOWN_TEXT]} ..."
    return f"{text} [{case.target}]" if case.target else text


def without_width(figures: Iterable[Interval]) -> bool:
    """Whether an interval has no width."""
    return any(figure.low == figure.high for figure in figures)
