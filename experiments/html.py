"""Pieces of a page that needs nothing but itself: style, tables, pictures as data. No script, no font, no address is fetched."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from nnssl.experiments.tables import Table

STYLE = """
:root { --text: #1b1f24; --muted: #59616b; --line: #d9dee4; --soft: #f4f6f8; --accent: #0b5cad; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue",
  Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.25rem; margin: 44px 0 10px; padding-bottom: 6px; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.02rem; margin: 26px 0 8px; }
p, li { max-width: 78ch; }
p { margin: 8px 0; }
ul { margin: 8px 0; padding-left: 22px; }
.muted { color: var(--muted); font-size: .92rem; }
.lead { font-size: 1.06rem; background: var(--soft); border-left: 4px solid var(--accent); padding: 12px 16px;
  margin: 18px 0; max-width: none; }
.lead p { margin: 4px 0; max-width: 88ch; }
.warn { border-left-color: #b45309; }
nav { margin: 14px 0 0; font-size: .95rem; }
nav a { margin-right: 16px; display: inline-block; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; max-width: 100%; margin: 10px 0 6px; }
.scroll th.left:first-child, .scroll td.left:first-child { position: sticky; left: 0; background: #fff; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom: 2px solid #b8c0ca; }
th.wrap { white-space: normal; min-width: 5.2em; }
td.left, th.left { text-align: left; }
td.long { white-space: normal; min-width: 16em; text-align: left; }
tr.rule td { border-top: 2px solid #b8c0ca; }
tbody tr:hover { background: #fafbfc; }
td.up { color: #0a6b3d; font-weight: 600; } td.down { color: #a3341f; font-weight: 600; }
.tables { display: flex; flex-wrap: wrap; gap: 0 48px; } .tables > div { min-width: 0; max-width: 100%; }
  .tables table { min-width: 0; }
figure { margin: 12px 0; }
figure svg, figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: 4px; max-width: 78ch; }
.cases { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 18px; }
.cases figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: 10px; }
.key { display: inline-block; width: 1.1em; height: .32em; vertical-align: middle; margin: 0 5px 2px 12px;
  border: 1px solid #00000022; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: 12px; font-size: .84rem;
  line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); }
@media (max-width: 600px) { body { font-size: 15px; } main { padding: 18px 14px 48px; } th, td { padding: 6px 8px; }
  h1 { font-size: 1.35rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } }
@media print { @page { margin: 14mm; } body { font-size: 10pt; } main { max-width: none; padding: 0; }
  nav { display: none; } h2 { margin-top: 22px; }
  h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; } .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: 3px 4px; } details > *:not(summary) { display: block; } }
"""


@dataclass(frozen=True)
class Picture:
    """A file with what is written below it, and for those who cannot see it."""

    file: Path
    caption: str
    alternative: str


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; backticks become code."""
    return f"<p{_class(kind)}>{rich(text)}</p>"


def rich(text: str) -> str:
    """Plain text, escaped; ``**bold**`` and backticks are understood."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False)))


def _class(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""


def listing(items: Iterable[str]) -> str:
    """A bullet list of plain text; nothing for no items."""
    lines = "".join(f"<li>{rich(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def table(content: Table) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    head = "".join(
        f'<th scope="col" class="{_kind(i, content.left)}">{escape(h)}</th>' for i, h in enumerate(content.head)
    )
    body = []
    for line, row in enumerate(content.rows):
        rule = content.left > 1 and line > 0 and row[0] != content.rows[line - 1][0]
        cells = "".join(f"<td{_class(_cell_kind(content, line, i))}>{escape(c)}</td>" for i, c in enumerate(row))
        body.append(f"<tr{_class('rule' if rule else '')}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _kind(column: int, left: int) -> str:
    return "left" if column < left else "wrap"


def _cell_kind(content: Table, line: int, column: int) -> str:
    if len(content.rows[line][column]) > 60:
        return "long"
    return "left" if column < content.left else content.tones.get((line, column), "")


def figure(file: Path, caption: str, alternative: str) -> str:
    """A picture inside the page: an SVG as it is, a PNG as data."""
    if file.suffix == ".svg":
        text = file.read_text(encoding="utf-8")
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = _unique(re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text), file.stem)
        picture = text.replace("<svg", f'<svg role="img" aria-label="{escape(alternative)}"', 1)
    else:
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        picture = f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{rich(caption)}</figcaption></figure>"


def _unique(svg: str, stem: str) -> str:
    """Two pictures in one page must not share identifiers: the second would use the first one's shapes."""
    prefix = re.sub(r"\W", "_", stem)
    svg = re.sub(r'\bid="', f'id="{prefix}_', svg)
    return re.sub(r'(href="#|url\(#)', rf"\1{prefix}_", svg)


def details(title: str, body: str) -> str:
    """Something that is folded until it is clicked."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def section(title: str, body: str, anchor: str) -> str:
    """A section with its heading; nothing where there is no body."""
    return f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>{body}</section>' if body else ""


def page(title: str, body: str, links: Sequence[tuple[str, str]] = ()) -> str:
    """The whole document.

    Args:
        title: of window and page.
        body: HTML.
        links: anchor and text of each section.
    """
    menu = "".join(f'<a href="#{escape(a)}">{escape(t)}</a>' for a, t in links)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1><nav>{menu}</nav>\n{body}\n</main></body></html>\n"
    )
