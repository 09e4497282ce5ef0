"""One volume's DICOM files -> an image, by dcm2niix (Li et al. 2016, doi:10.1016/j.jneumeth.2016.03.001), and checked.

dcm2niix knows the vendors' scalings, mosaics, compressed and multi-frame forms. Its own choice of what is a volume is switched
off: it sees links to the files of one volume under neutral names, and must make one image of them, of the size that their
headers tell. Where it makes more, since headers contradict each other, it gets copies that do not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from nnssl.pretrain.images.headers import dcm2niix_program
from nnssl.pretrain.images.items import Item
from nnssl.words import size_text

OPTIONS = ("-g", "i", "-b", "n", "-z", "n", "-m", "1", "-x", "i", "-f", "v", "-w", "2")
"""No user's defaults, no sidecar, not compressed, one stack whatever headers say, not cropped, not turned, neutral names."""

BESIDE = re.compile(r"_(Eq|Tilt)(_\d+)?\.nii$")
"""Resampled versions that dcm2niix writes beside an image whose slices are not quite even; sorting sets the limits for that."""

SAME_STEP = 0.02
SECONDS = 3600

SAME = (
    "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "AcquisitionNumber", "StudyDate", "StudyTime", "SeriesDate",
    "SeriesTime", "AcquisitionDate", "AcquisitionTime", "ContentDate", "ContentTime", "ImageOrientationPatient", "EchoTime",
    "PixelSpacing", "TriggerTime", "TemporalPositionIdentifier", "ImageType", "SeriesDescription", "ProtocolName",
)  # fmt: skip
"""What dcm2niix tells stacks apart by, and some anonymisers and scanners write anew into each slice."""


class Unconverted(ValueError):
    """dcm2niix does not make of the files what it should; the text says what it said or made."""


def _present(file: str, link: Path) -> None:
    """Show a file under a neutral name; a copy where it lacks the preamble that dcm2niix looks for."""
    with open(file, "rb") as stream:
        start = stream.read(132)
        if start[128:] != b"DICM" and start[:2] == b"\x02\x00":
            with open(link, "wb") as copy:
                copy.write(b"\0" * 128 + b"DICM" + start)
                shutil.copyfileobj(stream, copy, 1 << 20)
            return
    try:
        os.symlink(file, link)
    except OSError:  # where links need a privilege
        shutil.copyfile(file, link)


def _nameless(data: Any) -> None:
    """Take out what identifies the patient."""
    for tag in [t for t in data.keys() if t.group == 0x0010]:  # noqa: SIM118
        del data[tag]


def _copies(files: Sequence[str], folder: Path) -> Path:
    """Copies of the files of one volume in order, whose headers agree with that of the first."""
    import pydicom

    folder.mkdir()
    first: Any = None
    for i, file in enumerate(files):
        data = pydicom.dcmread(file, force=True)
        first = first or data
        for name in SAME:
            if name in first:
                setattr(data, name, getattr(first, name))
            elif name in data:
                delattr(data, name)
        data.InstanceNumber = i + 1
        _nameless(data)
        data.save_as(folder / f"{i:06d}.dcm", enforce_file_format="TransferSyntaxUID" in data.file_meta)
    return folder


def _split(file: str, volumes: Sequence[Sequence[int]], folder: Path) -> list[Path]:
    """Files with the frames of one volume each: which frames those are follows from their places, not from a vendor's indices."""
    import pydicom
    from pydicom.encaps import encapsulate, generate_frames

    whole = pydicom.dcmread(file, force=True)
    _nameless(whole)
    groups, total = list(whole.PerFrameFunctionalGroupsSequence), int(whole.NumberOfFrames)
    packed = whole.file_meta.TransferSyntaxUID.is_encapsulated
    if packed:
        pixels = list(generate_frames(whole.PixelData, number_of_frames=total))
    else:
        size = len(whole.PixelData) // total
        pixels = [whole.PixelData[i * size : (i + 1) * size] for i in range(total)]
    made = []
    for number, frames in enumerate(volumes):
        whole.NumberOfFrames = len(frames)
        whole.PerFrameFunctionalGroupsSequence = pydicom.Sequence([groups[i] for i in frames])
        content = [pixels[i] for i in frames]
        whole.PixelData = encapsulate(content) if packed else b"".join(content)
        made.append(folder / f"volume{number:05d}" / "000000.dcm")
        made[-1].parent.mkdir()
        whole.save_as(made[-1], enforce_file_format=True)
    return [file.parent for file in made]


def _run(folder: Path, out: Path) -> sitk.Image:
    """The one image that dcm2niix makes of a folder."""
    program = dcm2niix_program()
    if program is None:
        raise Unconverted("dcm2niix is not installed: pip install dcm2niix")
    try:
        done = subprocess.run(
            [program, *OPTIONS, "-o", str(out), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unconverted("dcm2niix did not end within an hour") from None
    said = done.stdout.decode("utf-8", "replace").replace(str(folder), "").splitlines()
    reason = next((s.strip() for s in reversed(said) if re.match(r"\s*(Error|Warning|Unsupported|Unable)", s)), "")
    made = sorted(f for f in out.glob("*.nii") if not BESIDE.search(f.name))
    if done.returncode or not made:
        last = reason or (said[-1].strip() if said else "nothing")
        raise Unconverted(f"dcm2niix ended with status {done.returncode} and said: {last}")
    if len(made) > 1:
        raise Unconverted(f"dcm2niix makes {len(made)} images of it")
    return sitk.ReadImage(str(made[0]))


def _checked(image: sitk.Image, item: Item) -> sitk.Image:
    if not item.size:  # a mosaic: only dcm2niix knows
        return image
    size, step = image.GetSize(), image.GetSpacing()[2] if image.GetDimension() > 2 else 0.0
    if tuple(size) != item.size:
        raise Unconverted(f"dcm2niix makes {size_text(size)} voxels of it, the headers tell {size_text(item.size)}")
    if item.step and abs(step - item.step) > SAME_STEP * item.step:
        raise Unconverted(f"dcm2niix finds slices {step:.4g} mm apart, their positions tell {item.step:.4g} mm")
    return image


def convert(item: Item, temporary: Path) -> sitk.Image:
    """The image of DICOM files, of four axes where they hold several volumes; raises ``Unconverted`` or ``OSError`` (no space).

    Voxels on their way go to ``temporary``; links and rewritten files, which hold what headers and paths tell, to the system's
    own folder.
    """
    images = []
    with tempfile.TemporaryDirectory(prefix="nnssl_") as name, tempfile.TemporaryDirectory(dir=temporary) as out:
        links = Path(name)
        if item.volumes:
            folders = _split(item.files[0], item.volumes, links)
        else:
            folders = [links / "volume"]
            folders[0].mkdir()
            for i, file in enumerate(item.files):
                _present(file, folders[0] / f"{i:06d}.dcm")
        for i, folder in enumerate(folders):
            target = Path(out, str(i))
            target.mkdir()
            try:
                images.append(_checked(_run(folder, target), item))
            except Unconverted:
                if len(item.files) == 1:
                    raise
                for made in target.iterdir():
                    made.unlink()
                images.append(_checked(_run(_copies(item.files, links / "copies"), target), item))
            shutil.rmtree(target)
    if len({image.GetPixelID() for image in images}) > 1:
        images = [sitk.Cast(image, sitk.sitkFloat32) for image in images]
    return images[0] if len(images) == 1 else sitk.JoinSeries(images)
