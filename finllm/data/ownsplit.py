"""A fixed split of a data set that has none: 70/10/20, near twins together, the labels evenly spread."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

from finllm.data.twins import comparable, components, groups
from finllm.example import Label, Split

SHARES: dict[Split, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}


def split(
    texts: Sequence[str], labels: Sequence[Label], together: Sequence[Hashable | None], seed: int
) -> tuple[list[Split], list[int]]:
    """The part and the group of each text, the same whatever the order of the rows.

    Near twins, and texts with the same `together` (where that is not None), share a group and so a part.
    """
    group = _joined(groups(texts), together)
    members: dict[int, list[int]] = defaultdict(list)
    for i, number in enumerate(group):
        members[number].append(i)
    order = []
    for rows in members.values():
        name = min(comparable(texts[i]) for i in rows)
        draw = hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
        order.append((_commonest(labels[i] for i in rows), draw, rows))
    parts = _dealt([rows for _, _, rows in sorted(order)])
    return [parts[i] for i in range(len(texts))], group


def _joined(twins: Sequence[int], together: Sequence[Hashable | None]) -> list[int]:
    first: dict[Hashable, int] = {}
    same = [(first.setdefault(name, i), i) for i, name in enumerate(together) if name is not None]
    return components(len(twins), [*enumerate(twins), *same])


def _commonest(labels: Iterable[Label]) -> Label:
    count = Counter(labels)
    return max(sorted(count), key=lambda label: count[label])


def _dealt(deck: Sequence[Sequence[int]]) -> dict[int, Split]:
    """Each group in turn goes to the part that is furthest behind its share.

    One label comes after the other, so that each is dealt out in these shares.
    """
    count: Counter[Split] = Counter()
    parts: dict[int, Split] = {}
    total = 0
    for rows in deck:
        total += len(rows)
        behind = {part: share * total - count[part] for part, share in SHARES.items()}
        part = max(behind, key=lambda name: behind[name])
        count[part] += len(rows)
        parts |= dict.fromkeys(rows, part)
    return parts
