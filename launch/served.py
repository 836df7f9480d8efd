"""A loaded model for all sessions of the page, and the thread that asks it."""

from dataclasses import dataclass
from typing import Any

import streamlit as st

from launch import uploads
from launch.reliability import Reliability, reliability

POLL_SECONDS = 0.25
"""Between two looks for an answer."""


@dataclass(frozen=True)
class Served:
    """A model, the thread that asks it, and what its run's test says of it."""

    reader: Any
    batcher: Any
    tested: Reliability


@st.cache_resource(show_spinner="Loading the model (the first time takes a minute)")
def served(source: str) -> Served:
    """The model, loaded once for all sessions."""
    from finllm.service.batching import Batcher, Work
    from finllm.service.reader import Reader

    reader = Reader(source)
    at_once = 64 if reader.on_gpu else 8  # a CPU gains little by more, and progress shall be seen
    works = {"classify": Work(reader.classify, at_once), "explain": Work(reader.explain, 4)}
    if reader.has_base:
        works["base"] = Work(reader.classify_with_base, at_once)
    return Served(reader, Batcher(works, queue_texts=2 * uploads.MAX_ROWS), reliability(source))


def submit(model: Served, verb: str, texts: list[str]) -> Any:
    """The job that answers them; None, with a word on the page, where too many texts wait already."""
    from finllm.service.batching import QueueFullError

    try:
        return model.batcher.submit(verb, texts)
    except QueueFullError as error:
        st.toast(f"Too much to do: {error}")
        return None
