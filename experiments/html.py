"""``report.html`` from its template: text and pictures as pieces of HTML, escaped."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from nnssl.experiments.tables import labels_text

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Picture:
    """A file with what is written below it, and for those who cannot see it."""

    file: Path
    caption: str
    alternative: str


def rich(text: str) -> Markup:
    """Plain text, escaped; ``**bold**`` and backticks are understood."""
    text = str(escape(text)).replace("&#34;", '"').replace("&#39;", "'")
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", re.sub(r"`([^`]+)`", r"<code>\1</code>", text)))


def inline(file: Path, alternative: str) -> Markup:
    """A picture inside the page: an SVG as it is, a PNG as data; ``alternative`` is for those who cannot see it."""
    alternative = escape(alternative)
    if file.suffix != ".svg":
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        return Markup(f'<img alt="{alternative}" src="data:image/png;base64,{data}">')
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = _unique(re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text), file.stem)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{alternative}"', 1))


def _unique(svg: str, stem: str) -> str:
    """Two pictures in one page must not share identifiers: the second would use the first one's shapes."""
    prefix = re.sub(r"\W", "_", stem)
    svg = re.sub(r'\bid="', f'id="{prefix}_', svg)
    return re.sub(r'(href="#|url\(#)', rf"\1{prefix}_", svg)


def template() -> Any:
    """The page's template; what it is given is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(rich=rich, inline=inline, labels=labels_text, percent=lambda share: f"{100 * share:.1f}")
    return environment.get_template(TEMPLATE)
