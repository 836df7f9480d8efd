"""Published systems that were trained on data we test on, as their makers say."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Seen:
    """What is known of a published system's training data."""

    datasets: tuple[str, ...]
    """Data sets of ours of which it has seen rows."""
    what: str
    column: str | None = None
    """The split table's name for it, where the rows are known."""


SEEN = {
    "prosusai/finbert": Seen(
        ("phrasebank",),
        "trained on 80 % of PhraseBank 50Agree; which rows is rebuilt from its training script",
        "prosus",
    ),
    "yiyanghkust/finbert-tone": Seen((), "trained on 10,000 sentences of analyst reports, not on PhraseBank"),
    "fingpt/": Seen(("phrasebank", "fiqa", "tfns"), "trained on PhraseBank, FiQA and TFNS", "fingpt"),
    "thefinai/finma": Seen(("phrasebank", "fiqa", "tfns"), "trained on PhraseBank, FiQA and TFNS"),
}
"""By the beginning of the hub id, in lower case."""
UNKNOWN = "what it was trained on is not known here: it may have seen these texts"


def seen(model: str) -> Seen | None:
    """What is known of a model of the hub; None for others."""
    return next((known for start, known in SEEN.items() if model.lower().startswith(start)), None)


def marks(model: str, datasets: Iterable[str]) -> tuple[str, ...]:
    """What a reader must know of a classifier that is tested on these data sets (their names, not aliases)."""
    known = seen(model)
    if known is None:
        return (UNKNOWN,)
    shared = [name for name in known.datasets if name in set(datasets)]
    return (f"has seen {', '.join(shared)}: {known.what}",) if shared else (known.what,)
