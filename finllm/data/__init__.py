"""Data sets: one module each, and their parts put together without leaks."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from finllm.data import sample
from finllm.example import Example, Split

DataSpec = Annotated[
    sample.Sample,
    Field(discriminator="name"),
]
"""Every data set a recipe can name; a new one is a module beside this file and a line here."""
