"""What a run says to a person: the line of an epoch, and what to do where it fails."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nnssl.words import size_text

if TYPE_CHECKING:
    from nnssl.pretrain.engine.folder import RunFolder
    from nnssl.pretrain.engine.spec import RunSpec

_DISK_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Make it writable"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "See to the file system"),
    errno.EFBIG: "Lift the limit on the size of files (ulimit -f unlimited)",
}
_DIAGNOSTIC = ("_collapse", "_cos", "_std", "_sd", "_norm")
"""Endings of terms that are watched and are no part of the loss; they are in metrics.jsonl and progress.png."""
SHOWN_TERMS = 4


def epoch_line(
    row: Mapping[str, Any], epochs: int, note: str | None, left: float, spoken: Mapping[str, str] | None = None
) -> str:
    """The line of an epoch: loss in training and held out, each with its own terms, then what the method notes, then speed.

    ``row`` has ``train/*`` and ``held_out/*``; ``left``: seconds; ``spoken``: words for terms whose names are none.
    """
    words = spoken or {}
    text = f"epoch {row['epoch']}/{epochs}: loss in training {_losses(row, 'train/', note, words)}"
    if "held_out/total" in row:
        text += f", held out {_losses(row, 'held_out/', note, words)}"
    text += f"; {note}" if note else ""
    speed = f"{row['step_s']:.2f} s/step ({100 * row['data_wait']:.0f} % of it waiting for data)"
    return f"{text}; learning rate {row['lr']:.2g}, {speed}, {tqdm.format_interval(left)} left"


def _losses(row: Mapping[str, Any], prefix: str, note: str | None, words: Mapping[str, str]) -> str:
    """``0.876 (image 0.5, dense 0.376)``; a single term is the loss itself and is not repeated, nor what the note says."""
    names = [k.removeprefix("train/") for k in row if k.startswith("train/") and k != "train/total"]
    names = [n for n in names if not n.endswith(_DIAGNOSTIC) and not n.startswith("n_")]
    names = [n for n in names if row.get(prefix + n) is not None]
    skipped = [n for n in names if n.endswith("skipped")]  # crops left out, where there are any
    parts = [n for n in names if n not in skipped and n.replace("_", " ") not in (note or "")]
    shown = (parts[:SHOWN_TERMS] if len(parts) > 1 else []) + [n for n in skipped if row[prefix + n]]
    terms = ", ".join(f"{words.get(n, n.replace('_', ' '))} {row[prefix + n]:.3g}" for n in shown)
    return f"{row[prefix + 'total']:.4g}" + (f" ({terms})" if terms else "")


def disk_reason(error: OSError) -> str | None:
    """What to do about a disk that fails, without a full stop; None for other errors."""
    return _DISK_ADVICE.get(error.errno or 0)


def non_finite_advice(folder: RunFolder, step: int, bad: str, cases: Sequence[str]) -> str:
    """What to do about a loss that is not finite."""
    before = f" The last checkpoint in {folder.path} is from before this step." if folder.latest.is_file() else ""
    return (
        f"step {step}: {bad} is not finite. Cases of the batch: {', '.join(dict.fromkeys(cases))}. Look at these images, or "
        f"leave them out with --exclude; or lower -o lr or -o grad_clip.{before}"
    )


_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""What torch says: on a GPU in an error of its own kind, on a CPU in any RuntimeError."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is out, on a GPU or on this machine."""
    return isinstance(error, MemoryError) or _MEMORY.search(str(error)) is not None


def memory_advice(spec: RunSpec) -> str:
    """What to lower where memory is out."""
    b, size = spec.batch_size, size_text(spec.request.size)
    return (
        f"out of memory with {b} crops of {size} voxels a step. Lower -o batch_size (fewest for this method: "
        f"{spec.request.min_batch}), choose a smaller --crop, or spread the batch with -num_gpus."
    )
