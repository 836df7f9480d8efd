"""What the scores come to, in one sentence a part."""

from collections.abc import Mapping

from finllm.report.words import interval, points, texts
from finllm.scores import Interval, Paired, PartScores, Scores


def verdict(part: PartScores, names: Mapping[str, str]) -> str:
    """How the first system compares in accuracy with every other one on a part, in one sentence."""
    first, figures = next(iter(part.systems.items()))
    said = f"{part.dataset}, {part.part} ({texts(part.rows)}): {names[first]} has {interval(figures.accuracy, ' % accuracy')}"
    pairs = [pair for pair in part.paired if pair.first == first]
    return f"{said}; it {'; '.join(_compared(p, names) for p in pairs)}." if pairs else f"{said}."


def names_of(scores: Scores) -> dict[str, str]:
    """What people call each system; a dagger for those that have seen texts of the test."""
    return {
        system.key: system.name + (" †" if any(mark.startswith("has seen") for mark in system.marks) else "")
        for system in scores.systems
    }


def verdicts(scores: Scores) -> list[str]:
    """A sentence for each part."""
    names = names_of(scores)
    return [verdict(part, names) for part in scores.parts]


def decision(pair: Paired) -> str:
    """In a word, whether the first system is better than the second."""
    if not pair.decided:
        return "not decided"
    return "better" if pair.accuracy.value > 0 else "worse"


def _compared(pair: Paired, names: Mapping[str, str]) -> str:
    other, by = names[pair.second], pair.accuracy
    if not pair.decided:
        return f"is not decided against {other} ({points(by, ' points')})"
    if by.value > 0:
        return f"beats {other} by {interval(by, ' points')}"
    return f"is worse than {other} by {interval(Interval(value=-by.value, low=-by.high, high=-by.low), ' points')}"
