"""Answers as HTML: a label, three bars, in the colours of the page. Everything that people wrote is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from finllm.example import LABELS

STYLE = """<style>
.block-container {max-width: 46rem; padding-top: 2.5rem; padding-bottom: 4rem;}
.fl {--positive: #1b8a5a; --neutral: #78808c; --negative: #c8453b; --edge: rgba(128, 128, 128, .28);}
.fl-head h1 {font-size: 1.7rem; margin: 0; padding: 0; letter-spacing: -.01em;}
.fl-part {font-size: 1.05rem; font-weight: 650; margin: 1.2rem 0 .2rem;}
.fl-head p {margin: .3rem 0 0; opacity: .75; overflow-wrap: anywhere;}
.fl-answers {display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem;}
.fl-card {border: 1px solid var(--edge); border-radius: .6rem; padding: .9rem 1rem;}
.fl-who {font-size: .8rem; opacity: .7; margin-bottom: .15rem;}
.fl-label {font-size: 1.3rem; font-weight: 650; margin-bottom: .6rem;}
.fl-row {display: grid; grid-template-columns: 4.6rem 1fr 3.6rem; gap: .6rem; align-items: center;
  font-size: .88rem; line-height: 1.7;}
.fl-track {height: .55rem; border-radius: .3rem; background: var(--edge); overflow: hidden;}
.fl-fill {height: 100%; border-radius: .3rem;}
.fl-share {text-align: right; font-variant-numeric: tabular-nums;}
.fl-counts {display: grid; grid-template-columns: repeat(3, 1fr); gap: .8rem;}
.fl-counts .fl-label {margin: 0;}
.fl-text {overflow-wrap: anywhere; white-space: pre-wrap; border-left: 3px solid var(--edge); padding-left: .8rem;
  margin: 0 0 .9rem; max-height: 9rem; overflow-y: auto;}
.fl-note {font-size: .88rem; opacity: .8; margin: .7rem 0 0;}
.fl-why {margin: .9rem 0 0; padding: .8rem 1rem; border-radius: .6rem; background: rgba(128, 128, 128, .1);
  overflow-wrap: anywhere;}
.fl-past {display: grid; grid-template-columns: 4.8rem 3rem 1fr; gap: .6rem; padding: .35rem 0; font-size: .9rem;
  border-bottom: 1px solid var(--edge);}
.fl-past span:last-child {overflow: hidden; text-overflow: ellipsis; white-space: nowrap;}
.fl .positive {color: var(--positive);} .fl .neutral {color: var(--neutral);} .fl .negative {color: var(--negative);}
.fl-fill.positive {background: var(--positive);} .fl-fill.neutral {background: var(--neutral);}
.fl-fill.negative {background: var(--negative);}
</style>"""

Answer = Mapping[str, Any]


def head(title: str, words: str) -> str:
    """The page's title and what it is about."""
    return f'<div class="fl fl-head"><h1>{escape(title)}</h1><p>{escape(words)}</p></div>'


def answers(text: str, named: Sequence[tuple[str, Answer]]) -> str:
    """The text, and a card for each system's answer, side by side where there is room."""
    cards = "".join(_card(who, answer) for who, answer in named)
    return f'<div class="fl"><div class="fl-text">{escape(text)}</div><div class="fl-answers">{cards}</div></div>'


def _card(who: str, answer: Answer) -> str:
    label = answer["sentiment"]
    rows = "".join(_row(name, answer["probabilities"][name]) for name in reversed(LABELS))
    title = f'<div class="fl-label {label}">{label.capitalize()} {answer["confidence"]:.0%}</div>'
    return f'<div class="fl-card"><div class="fl-who">{escape(who)}</div>{title}{rows}</div>'


def _row(label: str, share: float) -> str:
    bar = f'<div class="fl-track"><div class="fl-fill {label}" style="width: {share:.2%}"></div></div>'
    return f'<div class="fl-row"><span>{label}</span>{bar}<span class="fl-share">{share:.1%}</span></div>'


def counts(labels: Sequence[str]) -> str:
    """How often each label occurs."""
    cells = "".join(
        f'<div class="fl-card"><div class="fl-who">{name}</div><div class="fl-label {name}">{labels.count(name):,}</div></div>'
        for name in reversed(LABELS)
    )
    return f'<div class="fl fl-counts">{cells}</div>'


def note(words: str) -> str:
    """Something small below an answer."""
    return f'<div class="fl"><p class="fl-note">{escape(words)}</p></div>'


def why(words: str) -> str:
    """An explanation."""
    return f'<div class="fl"><div class="fl-why">{escape(words)}</div></div>'


def past(entries: Sequence[tuple[str, Answer]]) -> str:
    """One line for each earlier answer: label, confidence, text."""
    lines = (
        f'<div class="fl-past"><span class="{answer["sentiment"]}">{answer["sentiment"]}</span>'
        f'<span>{answer["confidence"]:.0%}</span><span title="{escape(text)}">{escape(text)}</span></div>'
        for text, answer in entries
    )
    return f'<div class="fl"><div class="fl-part">Earlier</div>{"".join(lines)}</div>'
