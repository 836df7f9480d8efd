"""The page of `finllm demo`: Streamlit runs this file from top to bottom at every click.

The model lives in one thread for all sessions, which reads together what they ask; a session only looks, a few times
a second, whether its answers have come, so that nothing on the page ever waits for the model.
"""

import sys
from pathlib import Path

import streamlit as st

from finllm import embedded
from finllm.errors import FinllmError
from finllm.run import Run
from launch import bars, page_table, page_text
from launch.served import served

UNTRAINED = (
    "Zero-shot: this model has not been trained for sentiment. It answers by what it knows of language, and is often "
    "wrong; train a run (`finllm launch demo`) to see the difference."
)


def main() -> None:
    """The whole page."""
    st.set_page_config(page_title="FinLLM", page_icon="📈", layout="centered")
    st.html(bars.STYLE)
    source = st.session_state.get("source") or _trained(sys.argv[1])
    if not source:
        _offer(sys.argv[1], Path(sys.argv[2]))
        return
    try:
        model = served(source)
    except FinllmError as error:
        st.error(str(error))
        return
    st.html(bars.head("FinLLM", f"Sentiment of financial text, as {model.reader.name} reads it"))
    if source == embedded.NAME:
        st.warning(UNTRAINED)
    if words := model.tested.of_all():
        st.html(bars.note(words))
    one, table = st.tabs(["One text", "A CSV file"])
    with one:
        page_text.show(model)
    with table:
        page_table.show(model)
    st.html(bars.note("A model's reading, no advice. Texts stay on the machine that runs this page, and are not kept."))


def _trained(source: str) -> str:
    """The source as it was given, unless it is a run without trained weights."""
    is_untrained = (Path(source) / "plan.json").is_file() and not Run(Path(source)).adapter.is_dir()
    return "" if not source or is_untrained else source


def _offer(given: str, runs: Path) -> None:
    """What there is instead of a trained run."""
    st.html(bars.head("FinLLM", "Sentiment of financial text"))
    st.info(f"{Path(given).name} has no trained weights yet." if given else "No run was named.")
    known = sorted(path.parent.name for path in runs.glob("*/adapter") if path.is_dir())
    if known:
        chosen = st.selectbox("Trained runs", known)
        if st.button("Use this run", type="primary"):
            st.session_state.source = str(runs / chosen)
            st.rerun()
    else:
        st.write(f"There is no trained run in `{runs}`; `finllm launch demo` trains one in minutes.")
    st.write("The embedded SmolLM2-135M also works as it comes, zero-shot: it was not trained for this.")
    if st.button("Use the untrained model"):
        st.session_state.source = embedded.NAME
        st.rerun()


if __name__ == "__main__":
    main()
