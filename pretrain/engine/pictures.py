"""Write a method's :class:`~nnssl.pretrain.types.Picture` as a PNG, with lines of text that fit: letters differ in width."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.pictures import new_figure, write_png
from nnssl.pretrain.types import Picture

DPI = 90
WIDTH = 2.2
"""Inches of a column."""
_MARK, _FRAME = "#00e5ff", "#ffd500"


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


def save_picture(picture: Picture, path: Path, *, heading: str = "", aspect: float = 1.0) -> None:
    """Draw one row per crop and one captioned column per kind of image, with the title above and the note below.

    ``heading``: what run and epoch it is from; ``aspect``: height of a pixel by its width, in mm / mm.
    """
    columns = {caption: np.asarray(images, dtype=np.float32) for caption, images in picture.columns.items()}
    rows = min(len(c) for c in columns.values())
    shape = next(iter(columns.values())).shape[1:3]
    tall = WIDTH * min(2.0, max(0.5, aspect * shape[0] / shape[1]))
    width = max(WIDTH * len(columns) + 0.3, 5.0)
    room = width - 0.3
    small = wrapped(heading, room, 10, dpi=DPI)
    top = [*small, *wrapped(picture.title, room, 12, dpi=DPI, bold=True)]
    bottom = wrapped(picture.note, room, 9.5, dpi=DPI)
    captions = max(len(_caption(c).splitlines()) for c in columns)
    above = 0.2 * len(top) + 0.17 * captions + 0.25
    tagged = max((_tag(t).count("\n") + 1 for texts in picture.tags.values() for t in texts), default=0)
    lower = 0.05 + 0.15 * tagged if tagged else 0.0
    below = 0.18 * len(bottom) + lower + (0.55 if picture.scales else 0.0) + 0.2
    space = 0.1 + lower
    height = above + below + rows * (tall + space)
    figure = new_figure(width, height, facecolor="white")
    grid = {"left": 0.15 / width, "right": 1 - 0.15 / width, "top": 1 - above / height, "bottom": below / height}
    spaces = {"wspace": 0.05, "hspace": space / tall}
    axes = figure.subplots(rows, len(columns), squeeze=False, gridspec_kw={**grid, **spaces})
    for j, (caption, images) in enumerate(columns.items()):
        shown = _column([row[j] for row in axes], images, caption in picture.scales, aspect)
        axes[0][j].set_title(_caption(caption), fontsize=9.5)
        for i in range(rows):
            _marks(axes[i][j], picture, caption, i)
        if caption in picture.scales:
            _bar(figure, axes[-1][j], shown, picture.scales[caption], height, lower if caption in picture.tags else 0.0)
    for k, line in enumerate(top):
        bold = {"fontsize": 12, "fontweight": "bold"} if k >= len(small) else {"color": "0.35"}
        figure.text(0.5, 1 - (0.17 + 0.2 * k) / height, line, ha="center", va="center", **bold)
    figure.text(0.15 / width, 0.08 / height, "\n".join(bottom), ha="left", va="bottom", fontsize=9.5)
    write_png(path, figure, DPI)


def _caption(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 29))


def _tag(text: str) -> str:
    """What stands below one image, in lines as wide as it."""
    return "\n".join(textwrap.wrap(text, 33))


def _column(axes: list[Any], images: np.ndarray, scaled: bool, aspect: float) -> Any:
    inside = float(images.min()) >= 0 and float(images.max()) <= 1
    low, high = (0.0, 1.0) if inside else np.percentile(images, (0.5, 99.5))
    if scaled:
        low, high = min(0.0, float(images.min())), float(images.max())
    shown = None
    for ax, image in zip(axes, images):
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_anchor("N")
        kind: dict[str, Any] = {"interpolation": "nearest", "aspect": aspect}
        if images.ndim == 3:
            colours = "inferno" if scaled else "gray"
            shown = ax.imshow(image, cmap=colours, vmin=low, vmax=max(high, low + 1e-6), **kind)
        else:
            ax.imshow(np.clip(image, 0, 1), **kind)
    return shown


def _marks(ax: Any, picture: Picture, caption: str, row: int) -> None:
    if caption in picture.boxes:
        from matplotlib.patches import Rectangle

        top, left, tall, wide = (float(v) for v in picture.boxes[caption][row])
        ax.add_patch(Rectangle((left - 0.5, top - 0.5), wide, tall, fill=False, edgecolor=_FRAME, linewidth=2))
    if caption in picture.points and np.isfinite(picture.points[caption][row]).all():
        y, x = picture.points[caption][row]
        limits = ax.get_xlim(), ax.get_ylim()
        ax.plot(x, y, marker="+", markersize=13, markeredgewidth=3.5, color="black")
        ax.plot(x, y, marker="+", markersize=12, markeredgewidth=2, color=_MARK)
        ax.set(xlim=limits[0], ylim=limits[1])
    if caption in picture.tags:
        ax.set_xlabel(_tag(picture.tags[caption][row]), fontsize=8.5, labelpad=3)


def _bar(figure: Any, ax: Any, shown: Any, label: str, height: float, lower: float) -> None:
    """A colour scale below a column."""
    place = ax.get_position()
    under = figure.add_axes(
        (place.x0 + 0.05 * place.width, place.y0 - (0.2 + lower) / height, 0.9 * place.width, 0.09 / height)
    )
    bar = figure.colorbar(shown, cax=under, orientation="horizontal")
    bar.ax.tick_params(labelsize=7.5, length=2, pad=1)
    bar.ax.locator_params(nbins=3)
    bar.set_label(label, fontsize=8, labelpad=1)
