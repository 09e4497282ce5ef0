"""Lines of text that fit into a picture, measured in its font: letters and digits differ in width."""

from __future__ import annotations

HINTING = 1.04
"""Letters are drawn on whole pixels, which at 72 to 90 pixels an inch makes a line up to 4 % wider than its outlines."""


def wrapped(text: str, width: float, size: float, *, bold: bool = False) -> list[str]:
    """Break a text at blanks, and within a word only where that is wider than a line.

    Args:
        text: what is to be written.
        width: of a line, inches.
        size: of the font, points.
        bold: whether it is written in bold.

    Returns:
        the lines; none for an empty text.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")

    def fits(line: str) -> bool:
        return text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] * HINTING <= 72 * width

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
