"""Write a method's :class:`~nnssl.pretrain.types.Picture` as a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnssl.files import write_atomic
from nnssl.pretrain.types import Picture

__all__ = ["middle_slice", "save_picture"]


def middle_slice(x: np.ndarray) -> np.ndarray:
    """``(B, H, W)`` or ``(B, D, H, W)`` -> ``(B, H, W)``: the middle slice along the first spatial axis of a volume."""
    return x if x.ndim == 3 else x[:, x.shape[1] // 2]


def save_picture(picture: Picture, path: Path) -> None:
    """Draw one row per crop and one captioned column per kind of image.

    Args:
        picture: columns ``caption -> (rows, H, W)`` or ``(rows, H, W, 3)``.
        path: the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = min(len(c) for c in picture.columns.values())
    columns = len(picture.columns)
    figure = Figure(figsize=(1.9 * columns, 1.9 * rows + 0.8))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for j, (caption, images) in enumerate(picture.columns.items()):
        images = np.asarray(images, dtype=np.float32)
        grey = images.ndim == 3
        inside = float(images.min()) >= 0 and float(images.max()) <= 1
        low, high = (0.0, 1.0) if inside else np.percentile(images, (0.5, 99.5))
        for i in range(rows):
            ax = axes[i][j]
            ax.set_xticks([])
            ax.set_yticks([])
            if grey:
                ax.imshow(images[i], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
            else:
                ax.imshow(np.clip(images[i], 0, 1), interpolation="nearest")
        axes[0][j].set_title(caption, fontsize=8)
    if picture.title:
        figure.suptitle(picture.title, fontsize=9)
    figure.tight_layout()
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=90))
