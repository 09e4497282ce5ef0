"""Figures that need no display, as PNG; matplotlib is imported with the first."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from nnssl.files import write_atomic


def new_figure(width: float, height: float, **how: Any) -> Any:
    """A figure of so many inches that is drawn by Agg and that pyplot knows nothing of; `how` goes to matplotlib's ``Figure``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **how)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any, dpi: float, **how: Any) -> bytes:
    """The figure as PNG; `how` goes to ``savefig``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, **how)
    return buffer.getvalue()


def write_png(path: Path, figure: Any, dpi: float, **how: Any) -> None:
    """Write the figure whole or not at all; `how` goes to ``savefig``."""
    write_atomic(path, lambda file: file.write(png(figure, dpi, **how)))
