"""Leaks: texts that stand in an earlier part and, the same or nearly so, in a later one."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from finllm.data.parts import Parts
from finllm.data.twins import THRESHOLD, comparable, twin_pairs
from finllm.errors import DataError
from finllm.example import Example


@dataclass(frozen=True)
class Leak:
    """One text of an earlier part that gives away one of a later part."""

    early: Example
    """A training row, or a validation row where `late` is a test row."""
    late: Example
    how: str
    """`same text`, `same group`, or the cosine."""

    @property
    def within(self) -> bool:
        """Whether both rows are of one data set."""
        return self.early.dataset == self.late.dataset


def check_leaks(parts: Parts) -> None:
    """Raise DataError where a text of an earlier part equals, or is a near twin of, one of a later part."""
    _refuse(find_leaks(parts))


def drop_twins(parts: Parts) -> tuple[Parts, list[Example]]:
    """The parts without training and validation rows that give away held-out rows of *another* set, and those rows."""
    return _drop(parts, find_leaks(parts))


def without_leaks(parts: Parts) -> tuple[Parts, tuple[str, ...]]:
    """The parts after `drop_twins`, and in words what was dropped; raises DataError on a leak within one set."""
    leaks = find_leaks(parts)
    _refuse([leak for leak in leaks if leak.within])
    kept, dropped = _drop(parts, leaks)
    lost = {e.dataset for e in parts.train} - {e.dataset for e in kept.train}
    if lost:
        raise DataError(
            f"{', '.join(sorted(lost))}: every training row is the same as, or nearly so, a held-out row of another "
            "data set of the recipe; take one of them out, or use `parts: [test]` for it"
        )
    return kept, tuple(_notes(dropped, leaks))


def find_leaks(parts: Parts) -> list[Leak]:
    """Every pair of an earlier and a later part that is the same text, the same group or a near twin."""
    leaks = {(leak.early.id, leak.late.id): leak for leak in _near(parts)}
    leaks |= {(leak.early.id, leak.late.id): leak for leak in _same(parts)}
    return list(leaks.values())


def _steps(parts: Parts) -> Iterator[tuple[Sequence[Example], Sequence[Example]]]:
    yield parts.train, (*parts.validation, *parts.test)
    yield parts.validation, parts.test


def _same(parts: Parts) -> Iterator[Leak]:
    """Pairs with the same text or the same group, found by looking them up."""
    for early, late in _steps(parts):
        keys: dict[tuple[str, str], list[Example]] = defaultdict(list)
        for example in late:
            for key in _keys(example):
                keys[key].append(example)
        for example in early:
            for key in _keys(example):
                for other in keys.get(key, ()):
                    if key[0] == "text" or other.dataset == example.dataset:
                        yield Leak(example, other, f"same {key[0]}")


def _keys(example: Example) -> Iterator[tuple[str, str]]:
    if example.group is not None:
        yield "group", example.group
    yield "text", comparable(example.text)


def _near(parts: Parts) -> Iterator[Leak]:
    """Near twins, but within a set of which all near twins share a group: `_same` has found those.

    The cosine depends on the texts that TF-IDF is fitted on, so that a pair just below the threshold among all
    rows of a set may be above it among some; the group, made once over all rows, decides.
    """
    for early, late in _steps(parts):
        if _one_grouped_set(parts, (*early, *late)):
            continue
        for i, j, cosine in twin_pairs([e.text for e in early], [e.text for e in late]):
            leak = Leak(early[i], late[j], f"cosine {cosine:.2f}")
            if not (leak.within and leak.early.dataset in parts.twins_grouped):
                yield leak


def _one_grouped_set(parts: Parts, examples: Iterable[Example]) -> bool:
    titles = {example.dataset for example in examples}
    return len(titles) == 1 and titles <= parts.twins_grouped


def _drop(parts: Parts, leaks: Iterable[Leak]) -> tuple[Parts, list[Example]]:
    gone = {leak.early.id for leak in leaks if not leak.within}
    train = tuple(example for example in parts.train if example.id not in gone)
    validation = tuple(example for example in parts.validation if example.id not in gone)
    return replace(parts, train=train, validation=validation), [e for e in parts.rows if e.id in gone]


def _notes(dropped: Sequence[Example], leaks: Iterable[Leak]) -> Iterator[str]:
    """One sentence per set and part that lost rows."""
    late = {leak.early.id: leak.late for leak in leaks if not leak.within}
    rows: dict[tuple[str, str, str], list[Example]] = defaultdict(list)
    for example in dropped:
        rows[example.dataset, example.split, late[example.id].dataset].append(example)
    for (dataset, split, other), examples in rows.items():
        names = ", ".join(example.id for example in examples[:3]) + (", ..." if len(examples) > 3 else "")
        yield (
            f"{dataset}: {len(examples)} {split} row(s) left out, the same as or near twins of "
            f"held-out rows of {other} ({names})"
        )


def _refuse(leaks: Sequence[Leak]) -> None:
    if not leaks:
        return
    kinds: dict[tuple[str, str, str, str], list[Leak]] = defaultdict(list)
    for leak in leaks:
        kinds[leak.early.dataset, leak.early.split, leak.late.dataset, leak.late.split].append(leak)
    lines = [f"{len(leaks)} pair(s) of texts stand in two parts, the same or nearly so (cosine >= {THRESHOLD}):"]
    for (early_set, early_part, late_set, late_part), found in kinds.items():
        lines.append(f"  {early_set} {early_part} and {late_set} {late_part}: {len(found)}")
        lines += [f"    {_shown(leak.early)}\n    {_shown(leak.late)} ({leak.how})" for leak in found[:3]]
    lines.append(
        "Scores on such rows measure memory. Take them out of the earlier part; or, with a table or a hub set, "
        "leave the split to FinLLM (no `split`, no `splits`), which keeps twins together"
    )
    raise DataError("\n".join(lines))


def _shown(example: Example) -> str:
    text = " ".join(example.text.split())
    return f"{example.id}: {text if len(text) <= 90 else text[:87] + '...'}"
