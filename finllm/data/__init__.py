"""Data sets: one module each, and their parts put together without leaks."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from finllm.data import fiqa, hub, phrasebank, sample, table, tfns
from finllm.data.leaks import check_leaks, drop_twins, without_leaks
from finllm.data.parts import Parts, read_parts
from finllm.data.spec import DatasetSpec

__all__ = ["DataSpec", "DatasetSpec", "Parts", "check_leaks", "drop_twins", "read_parts", "training_parts"]

DataSpec = Annotated[
    sample.Sample | phrasebank.PhraseBank | fiqa.Fiqa | tfns.Tfns | table.Table | hub.Hub,
    Field(discriminator="name"),
]
"""Every data set a recipe can name; a new one is a module beside this file and a line here."""


def training_parts(specs: Sequence[DatasetSpec]) -> tuple[Parts, tuple[str, ...]]:
    """The parts to train and evaluate on, and in words which rows were left out.

    Training and validation rows that are near twins of another data set's held-out rows are left out;
    raises DataError where a data set is missing or gives away its own held-out rows.
    """
    return without_leaks(read_parts(specs))
