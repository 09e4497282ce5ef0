"""Reads parts of one preprocessed case: a crop, and what is known of the whole, never the whole itself."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.errors import NnsslError
from nnssl.paths import set_folders
from nnssl.plans import Plan
from nnssl.preprocessed import CaseRef, cause_of, open_array, read_box
from nnssl.pretrain.data.folders import beside
from nnssl.pretrain.data.intensity import air_threshold, body_mask, intensity_range, stored_range
from nnssl.pretrain.data.orientation import Geometry
from nnssl.properties import read_properties
from nnssl.words import counted

__all__ = ["CaseFormat", "CaseInfo", "CaseReader", "HeldCase", "OpenCase", "damaged"]

CACHED_CASES = 2048
"""Cases of which geometry and intensity range are remembered, about 1 kB each."""


@dataclass(frozen=True)
class CaseFormat:
    """What a plan says of its preprocessed cases.

    Attributes:
        n_channels: image channels.
        transpose_forward: order of the file's axes (z, y, x) in the array.
        masked: whether voxels outside the non-zero mask were set to 0 in all channels.
    """

    n_channels: int
    transpose_forward: tuple[int, ...]
    masked: bool

    @classmethod
    def from_plan(cls, plan: Plan) -> CaseFormat:
        """Of a plan's configuration."""
        return cls(plan.n_channels, plan.transpose_forward, all(plan.config.use_mask_for_norm))


@dataclass(frozen=True)
class CaseInfo:
    """What is remembered of a case; ``intensity``: ``(C, 2)`` float32, estimates of the 0.5th and 99.5th percentile."""

    geometry: Geometry
    intensity: np.ndarray

    @property
    def threshold(self) -> np.ndarray:
        """``(C,)`` float32: what is above is not air."""
        return air_threshold(self.intensity)


@dataclass(frozen=True)
class OpenCase:
    """An open case.

    Attributes:
        ref: which one.
        array: the lazy array, ``(C, Z, Y, X)``.
        info: what is known of it.
        masked: see :class:`CaseFormat`.
        mask: the lazy body mask, ``(1, Z, Y, X)``; None where a threshold on the intensities has to do.
    """

    ref: CaseRef
    array: Any
    info: CaseInfo
    masked: bool
    mask: Any = None

    def read(
        self, start: Sequence[int] | np.ndarray, size: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read a box; only the compressed blocks that it touches are unpacked.

        Body is what the mask says; without one, what lies in the image and is no air, see
        :func:`nnssl.pretrain.data.intensity.body_mask`.

        Args:
            start: first voxel, (z, y, x); negative outside the image.
            size: voxels per axis.

        Returns:
            ``(C, *size)`` float32, 0 outside the image, and ``(1, *size)`` bool, True where there is body.

        Raises:
            NnsslError: the file is damaged.
        """
        try:
            data = read_box(self.array, start, size)
        except (OSError, ValueError) as error:
            raise damaged(self.ref, error) from error
        if self.mask is not None:
            try:
                return data, read_box(self.mask, start, size, bool)
            except (OSError, ValueError) as error:
                raise _damaged_mask(self.ref, Path(self.mask.urlpath), error) from error
        body = np.zeros((1, *data.shape[1:]), dtype=bool)
        image = zip(start, self.array.shape[1:])
        inside = (slice(None), *[slice(max(0, -int(low)), max(0, n - int(low))) for low, n in image])
        body[inside] = body_mask(data[inside], self.info.threshold, self.masked)
        return data, body


@dataclass(frozen=True)
class HeldCase(OpenCase):
    """A case in memory, for several crops of it; ``body``: ``(1, Z, Y, X)`` bool, of the whole case."""

    body: Any = None

    @classmethod
    def of(cls, case: OpenCase) -> HeldCase:
        """Read all of it."""
        data, body = case.read((0, 0, 0), case.array.shape[1:])
        return cls(case.ref, data, case.info, case.masked, case.mask, body)

    def read(
        self, start: Sequence[int] | np.ndarray, size: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As of :class:`OpenCase`; boxes within the image share its memory."""
        return read_box(self.array, start, size), read_box(self.body, start, size, bool)


def damaged(ref: CaseRef, error: Exception) -> Exception:
    """The error for the user of an image that cannot be read; a MemoryError where that is at fault."""
    file = ref.image
    if isinstance(error, RuntimeError):
        error = cause_of(error, file)
    return _not_the_files_fault(ref, file, error) or NnsslError(
        f"Case {ref.name} of {ref.source} cannot be read: {file} is damaged ({error}). {_advice(ref, _set_aside(ref, file))}"
    )


def _damaged_mask(ref: CaseRef, file: Path, error: Exception) -> Exception:
    other = _not_the_files_fault(ref, file, error)
    return other or _bad_mask(ref, file, f"is damaged ({error})", _set_aside(ref, file))


def _bad_mask(ref: CaseRef, file: Path, why: str, aside: Path | None = None) -> NnsslError:
    what = "Start" if aside else "Delete the file and start"
    case = f"The body mask of case {ref.name} of {ref.source}"
    return NnsslError(f"{case} cannot be read: {file} {why}. {what} again, and it is made anew.")


def _bad_properties(ref: CaseRef, error: Exception) -> Exception:
    file, case = ref.properties, f"Case {ref.name} of {ref.source}"
    if isinstance(error, FileNotFoundError):
        return NnsslError(f"{case}: {file} does not exist. {_advice(ref, gone=True)}")
    return _not_the_files_fault(ref, file, error) or NnsslError(
        f"{case}: {file} cannot be read ({error!r}). {_advice(ref, _set_aside(ref, file))}"
    )


def _not_the_files_fault(ref: CaseRef, file: Path, error: Exception) -> Exception | None:
    """What to raise where memory or the system is at fault; None where it is the file."""
    if isinstance(error, MemoryError):
        return error
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in (errno.EMFILE, errno.ENFILE):
        advice = "Lower -o workers, or raise the limit of open files (ulimit -n 65536)."
    elif error.errno in (errno.EACCES, errno.EPERM):
        advice = "Make it readable."
    else:
        advice = "See to the file system, or leave the case out with --exclude."
    return NnsslError(f"Case {ref.name} of {ref.source} cannot be read: {file}: {error.strerror}. {advice}")


def _set_aside(ref: CaseRef, file: Path) -> Path | None:
    """Move a damaged file that was made here out of the way, so that the next start makes it anew; nothing is lost.

    Returns its new place; None where it stays: it is nnU-Net's, or its raw images are not there.
    """
    raw = set_folders().get("nnUNet_raw")
    if not file.parent.name.startswith("nnssl_") or raw is None or not (raw / ref.source / "imagesTr").is_dir():
        return None
    folder = beside(file.parent, "damaged")
    try:
        folder.mkdir(exist_ok=True)
        os.replace(file, folder / file.name)
    except OSError:
        return None
    return folder / file.name


def _advice(ref: CaseRef, aside: Path | None = None, *, gone: bool = False) -> str:
    if not ref.folder.name.startswith("nnssl_"):
        return "Preprocess the dataset again (nnUNetv2_preprocess), or leave the case out with --exclude."
    again = (
        "Start again, and it is made anew" if aside or gone else "Delete the file and start again, and it is made anew"
    )
    where = f" (what was damaged is now {aside})" if aside else ""
    return f"{again}{where}; or leave the case out with --exclude."


class CaseReader:
    """Opens cases and remembers what it learnt of the last :data:`CACHED_CASES` of them.

    Args:
        form: what the plan says of the cases.
        cached: cases to remember.
        bodies: source -> folder of its body masks; a case that has none there is read without.
    """

    def __init__(self, form: CaseFormat, cached: int = CACHED_CASES, bodies: Mapping[str, Path] | None = None) -> None:
        self.form = form
        self.cached = cached
        self.bodies = dict(bodies or {})
        self._known: OrderedDict[tuple[Path, str], CaseInfo] = OrderedDict()

    def open(self, ref: CaseRef) -> OpenCase:
        """Open a case; nothing but its header, and the first time its geometry and a few blocks, is read.

        Raises:
            NnsslError: a file is missing or damaged, or the case was not made with this plan.
        """
        file = ref.image
        try:
            array = open_array(file)
        except FileNotFoundError as error:
            raise NnsslError(
                f"Case {ref.name} of {ref.source} is gone: {file} does not exist. {_advice(ref, gone=True)}"
            ) from error
        except (OSError, ValueError) as error:
            raise damaged(ref, error) from error
        if len(array.shape) != 4 or array.shape[0] != self.form.n_channels:
            raise NnsslError(
                f"Case {ref.name} of {ref.source}: {file} has shape {tuple(array.shape)}, the plan has "
                f"{counted(self.form.n_channels, 'channel')} and three spatial axes. {_advice(ref)}"
            )
        return OpenCase(ref, array, self._info(ref, array), self.form.masked, self._mask(ref, array.shape[1:]))

    def _mask(self, ref: CaseRef, shape: Sequence[int]) -> Any:
        if ref.source not in self.bodies:
            return None
        file = self.bodies[ref.source] / f"{ref.name}.b2nd"
        try:
            mask = open_array(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _damaged_mask(ref, file, error) from error
        if tuple(mask.shape) != (1, *shape):
            why = f"is damaged (it has shape {tuple(mask.shape)}, the image {tuple(shape)})"
            raise _bad_mask(ref, file, why)
        return mask

    def _info(self, ref: CaseRef, array: Any) -> CaseInfo:
        key = (ref.folder, ref.name)
        info = self._known.get(key)
        if info is None or info.geometry.shape != tuple(array.shape[1:]):
            geometry, properties = self._described(ref, array.shape[1:])
            intensity = stored_range(properties, self.form.n_channels)
            try:
                intensity = intensity_range(array, masked=self.form.masked) if intensity is None else intensity
            except (RuntimeError, OSError, ValueError) as error:
                raise damaged(ref, error) from error
            info = CaseInfo(geometry, intensity)
            self._known[key] = info
            while len(self._known) > self.cached:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return info

    def geometry(self, ref: CaseRef, shape: Sequence[int]) -> Geometry:
        """Read where a case's array of ``shape`` lies; the image itself is not opened."""
        return self._described(ref, shape)[0]

    def _described(self, ref: CaseRef, shape: Sequence[int]) -> tuple[Geometry, dict[str, Any]]:
        try:
            properties = read_properties(ref.properties)
            return Geometry.from_properties(properties, shape, self.form.transpose_forward, ref.source), properties
        except Exception as error:  # unpickling raises anything, as does what is missing in a file of another origin
            raise _bad_properties(ref, error) from error
