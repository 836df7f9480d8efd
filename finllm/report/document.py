"""What a report is made of, and its two forms: Markdown, and one HTML page that needs nothing else."""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finllm.report.page import PAGE

LONGEST_FIGURE = 30
"""Characters; what is longer is a sentence that begins with a number."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; level 1 is the title, level 4 stands over a table or figure and cannot be linked to."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `**bold**`, `` `code` `` and `[links](#anchor)` are marked."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list of paragraphs."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Lead:
    """What a reader must take away, if nothing else: a paragraph, or a list of them."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table; its cells are plain text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold short figures only, to be aligned to the right."""
        return [
            bool(self.rows)
            and all(row[i][:1] in "0123456789+-<" and len(row[i]) <= LONGEST_FIGURE for row in self.rows if row[i])
            for i in range(len(self.head))
        ]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to copy."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure."""

    name: str
    """Of its file in `figures/`, without the ending."""
    svg: str
    """Lines and letters are `currentColor`."""
    caption: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """Figures side by side where there is room."""

    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True)
class Details:
    """Blocks that are folded away until somebody asks."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Text | Bullets | Lead | Table | Code | Picture | Gallery | Details


def pictures(blocks: Iterable[Block]) -> list[Picture]:
    """Every figure, also those that are folded away."""
    found: list[Picture] = []
    for block in blocks:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Gallery):
            found += block.pictures
        elif isinstance(block, Details):
            found += pictures(block.blocks)
    return found


def markdown(blocks: Iterable[Block]) -> str:
    """The text of report.md; figures are files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Lead(items):
            return "\n".join(f"{'- ' if len(items) > 1 else ''}**{item}**" for item in items)
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Code(text):
            return f"```\n{text}\n```"
        case Picture(name, _, caption):
            return f"![{caption}](figures/{name}.svg)"
        case Gallery(shown):
            return "\n\n".join(map(_markdown, shown))
        case Details(summary, blocks):
            inner = "\n\n".join(map(_markdown, blocks))
            return f"<details><summary>{html.escape(summary)}</summary>\n\n{inner}\n\n</details>"
        case Table(head, rows):
            body = [[_cell(cell) for cell in row] for row in rows]
            rule = ["---:" if right else "---" for right in block.numeric]
            return "\n".join("| " + " | ".join(line) + " |" for line in [[*map(_cell, head)], rule, *body])


def _cell(text: str) -> str:
    return re.sub(r"([|*`]|<(?=[\w/!]))", r"\\\1", " ".join(text.split()))


def page(title: str, blocks: Sequence[Block]) -> str:
    """The text of report.html: style and figures are in it, nothing is loaded, and no script runs."""
    body = "\n".join(_html(block) for block in blocks)
    sections = [(b.text, _anchor(b.text)) for b in blocks if isinstance(b, Heading) and b.level == 2]
    links = "".join(f'<a href="#{anchor}">{html.escape(text)}</a>' for text, anchor in sections)
    start = body.find("<h2")
    body = f"{body[:start]}<nav>{links}</nav>\n{body[start:]}" if start >= 0 else body
    return PAGE.replace("%TITLE%", html.escape(title)).replace("%BODY%", body)


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            name = f' id="{_anchor(text)}"' if level < 4 else ""
            return f"<h{level}{name}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Lead(items):
            return '<div class="lead">' + "".join(f"<p>{_inline(item)}</p>" for item in items) + "</div>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f'<pre tabindex="0"><code>{html.escape(text)}</code></pre>'
        case Picture(_, svg, caption):
            return f"<figure>{svg}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Gallery(shown):
            return '<div class="figures">' + "\n".join(map(_html, shown)) + "</div>"
        case Details(summary, blocks):
            inner = "\n".join(map(_html, blocks))
            return f"<details><summary>{html.escape(summary)}</summary>\n{inner}\n</details>"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    kinds = [' class="n"' if right else "" for right in table.numeric]
    head = "".join(f'<th scope="col"{k}>{html.escape(c)}</th>' for c, k in zip(table.head, kinds, strict=True))
    rows = (
        "<tr>" + "".join(f"<td{k}>{html.escape(c)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in table.rows
    )
    # A wide table scrolls within its frame, which the keyboard reaches too.
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _inline(text: str) -> str:
    safe = html.escape(text, quote=False)
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    safe = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)
    safe = re.sub(r"(?<!\*)\*([^*\s][^*]*)\*(?!\*)", r"<em>\1</em>", safe)
    return re.sub(r"\[([^\]]+)\]\(([\w#./-]+)\)", r'<a href="\2">\1</a>', safe)


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
