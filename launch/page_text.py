"""The part of the page for one text: question, answer, explanation, and what was asked before."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import streamlit as st

from launch import bars
from launch.served import POLL_SECONDS, Served, submit

EXAMPLES = (
    "Revenue missed expectations, but guidance was raised.",
    "Royalty income rose 4% to $29.7 million; our last patent expires November 12.",
    "Losses at electric-scooter group Zippra shrank to 14 million euros from 52 million.",
    "Bad debt expense increased $6 million and is fully recoverable through the approved rate rider.",
)
"""With mixed signals; the last three are of the sample's test part."""
WRITTEN = "Written by the model to fit its label; not a record of how it came to it."
WRITTEN_BY_BASE = (
    "Written by the base to fit the label, as this model learnt labels alone; not a record of how it came to it."
)
MAX_CHARACTERS = 10_000
MAX_HISTORY = 50


@dataclass
class Entry:
    """A text of this session, and the jobs that answer it."""

    text: str
    tuned: Any
    base: Any = None
    why: Any = None

    @property
    def pending(self) -> bool:
        """Whether an answer is still to come."""
        return any(job is not None and not job.future.done() for job in (self.tuned, self.base, self.why))


def show(model: Served) -> None:
    """All of it."""
    with st.form("question", border=False):
        text = st.text_area(
            "Text", key="text", height=110, max_chars=MAX_CHARACTERS, placeholder="A headline or a few sentences"
        )
        if st.form_submit_button("Classify", type="primary"):
            _ask(model, text)
    if st.session_state.get("empty"):
        st.warning("There is no text to classify; write or paste some.")
    entries = _history()
    pending = [entry for entry in entries if entry.pending]  # an answer may come while all this is drawn
    if entries:
        _show_answer(model, entries[0])
    with st.expander("Examples with mixed signals", expanded=not entries):
        for example in EXAMPLES:
            # Streamlit reads two dollar signs on a line as a formula.
            st.button(example.replace("$", "\\$"), on_click=_ask_example, args=(model, example), width="stretch")
    _show_past(entries[1:])
    if pending:
        _look_again(pending)


def _ask_example(model: Served, example: str) -> None:
    st.session_state.text = example
    _ask(model, example)


def _ask(model: Served, text: str) -> None:
    st.session_state.empty = not text.strip()
    if text.strip() and (job := submit(model, "classify", [text])) is not None:
        base = submit(model, "base", [text]) if model.reader.has_base else None
        st.session_state.history = [Entry(text, job, base), *_history()][:MAX_HISTORY]


def _history() -> list[Entry]:
    """The texts of this session, the newest first."""
    entries: list[Entry] = st.session_state.get("history", [])
    return entries


def _show_answer(model: Served, entry: Entry) -> None:
    answer = _answer(entry.tuned.future)
    if answer is None:
        return
    named = [(model.reader.name, answer)]
    if entry.base is not None and (base := _answer(entry.base.future)) is not None:
        named.append(("its base, before training", base))
    st.html(bars.answers(entry.text, named))
    if words := model.tested.of_like(answer["confidence"]):
        st.html(bars.note(words))
    if entry.why is None:
        st.button("Explain", on_click=_explain, args=(model, entry), help="Takes longer: the model writes a reason.")
    elif (why := _answer(entry.why.future)) is not None:
        st.html(bars.why(why["explanation"]))
        st.html(bars.note(WRITTEN_BY_BASE if model.reader.base_explains else WRITTEN))


def _explain(model: Served, entry: Entry) -> None:
    entry.why = submit(model, "explain", [entry.text])


def _answer(future: "Future[list[Any]]") -> Any:
    """The answer to a single text; None, with a word on the page, while there is none."""
    if not future.done():
        st.caption("The model is reading …")
        return None
    if error := future.exception():
        st.error(f"The model failed: {error}")
        return None
    return future.result()[0]


def _show_past(entries: list[Entry]) -> None:
    done = [
        (e.text, e.tuned.future.result()[0])
        for e in entries
        if e.tuned.future.done() and not e.tuned.future.exception()
    ]
    if done:
        st.html(bars.past(done))
        st.button("Clear", on_click=lambda: st.session_state.update(history=_history()[:1]))


@st.fragment(run_every=POLL_SECONDS)
def _look_again(pending: list[Entry]) -> None:
    """Draw the page again once an answer has come that was not there when it was drawn."""
    if not all(entry.pending for entry in pending):
        st.rerun()
