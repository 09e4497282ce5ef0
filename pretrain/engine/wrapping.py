"""Lines of text that fit into a picture, measured in its font: letters and digits differ in width."""

from __future__ import annotations


def wrapped(text: str, width: float, size: float, *, dpi: float, bold: bool = False) -> list[str]:
    """Break a text at blanks, and within a word only where that is wider than a line; no lines for an empty text.

    ``width``: of a line in inches; ``size``: of the font in points; ``dpi``: of the picture, whose letters lie on whole pixels.
    """
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer = RendererAgg(16, 16, dpi)
    font = FontProperties(size=size, weight="bold" if bold else "normal")

    def fits(line: str) -> bool:
        return renderer.get_text_width_height_descent(line, font, False)[0] <= dpi * width

    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
            continue
        while len(word) > 1 and not fits(word):
            most = max((n for n in range(1, len(word)) if fits(word[:n])), default=1)
            lines.append(word[:most])
            word = word[most:]
        lines.append(word)
    return lines
