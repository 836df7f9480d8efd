"""The part of the page for a CSV file: choose the column, watch, look, download."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from finllm.errors import DataError
from launch import bars, uploads
from launch.served import POLL_SECONDS, Served, submit


@dataclass
class Table:
    """An upload that is being answered."""

    upload: uploads.Upload
    texts: dict[int, str]
    job: Any


def show(model: Served) -> None:
    """All of it."""
    file = st.file_uploader("CSV file with a header, UTF-8", type="csv")
    if file is None:
        _replace_table(None)
        return
    try:
        upload = uploads.read(file.name, file.getvalue())
    except DataError as error:
        st.error(str(error))
        return
    column = st.selectbox(
        "Column with the texts",
        range(len(upload.columns)),
        index=upload.likely_column,
        format_func=lambda index: upload.columns[index] or f"column {index + 1}",
    )
    texts = upload.texts(column)
    empty = len(upload.rows) - len(texts)
    st.caption(f"{len(upload.rows):,} rows" + (f", {empty:,} of them without a text" if empty else ""))
    if not texts:
        st.warning("This column has no texts; choose another.")
    elif st.button("Classify all", type="primary"):
        job = submit(model, "classify", list(texts.values()))
        _replace_table(Table(upload, texts, job) if job is not None else None)
    table: Table | None = st.session_state.get("table")
    if table is not None and table.upload == upload and table.texts == texts:
        _show_table(table)


def _replace_table(table: Table | None) -> None:
    """Let the model forget what nobody looks at any more."""
    before: Table | None = st.session_state.get("table")
    if before is not None:
        before.job.future.cancel()
    st.session_state.table = table


def _show_table(table: Table) -> None:
    future = table.job.future
    if not future.done():
        _progress(table)
        return
    if error := future.exception():
        st.error(f"The model failed: {error}")
        return
    answers = dict(zip(table.texts, future.result(), strict=True))
    st.html(bars.counts([answer["sentiment"] for answer in answers.values()]))
    name = f"{Path(table.upload.name).stem}-answered.csv"
    content = uploads.answered(table.upload, answers)
    st.download_button("Download with probabilities", content, name, "text/csv", type="primary", on_click="ignore")
    first = [
        {"sentiment": answers[index]["sentiment"], "confidence": 100 * answers[index]["confidence"], "text": text}
        for index, text in list(table.texts.items())[:200]
    ]
    style = {
        "confidence": st.column_config.NumberColumn(format="%.1f%%"),
        "text": st.column_config.TextColumn(width="large"),
    }
    st.dataframe(first, hide_index=True, column_config=style)


@st.fragment(run_every=POLL_SECONDS)
def _progress(table: Table) -> None:
    done, total = len(table.job.answers), len(table.texts)
    st.progress(done / total, f"{done:,} of {total:,} texts")
    if table.job.future.done():
        st.rerun()
