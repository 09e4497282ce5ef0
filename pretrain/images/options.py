"""What ``nnssl_add_images`` can be asked for, stated once: parser, docs and the signature of ``add_images``.

Imports nothing heavy, so that ``--help`` is there at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

from nnssl.errors import NnsslError
from nnssl.grammar import pair
from nnssl.options import given

FOUR_D = ("reject", "split", "first")
LINKS = ("auto", "symbolic", "never")
KEEP = ("label-maps", "test-images")
DATASET, USED, WRITTEN = "the dataset", "which images", "what is written"


@dataclass(frozen=True)
class AddOptions:
    """What :func:`nnssl.pretrain.images.add_images` takes, and ``nnssl_add_images`` with it."""

    dataset: int | str = given(
        ..., DATASET, required=True, help="number of the dataset, such as 500; or name of one that exists"
    )
    folders: Sequence[str | os.PathLike[str]] = given(
        ..., None, nargs="+", metavar="FOLDER", help="folder to search, with all its subfolders"
    )
    _: KW_ONLY
    name: str | None = given(None, DATASET, help="name of a new dataset: Dataset500_NAME with the cases NAME_0001, ...")
    target: int | str | None = given(None, DATASET, help="dataset that will be fine-tuned: its channel names are taken")
    modality: str | None = given(
        None,
        DATASET,
        "--modality",
        metavar="NAME",
        help="CT, MR or another name of the channel (default: what -t, the dataset, DICOM or the files' names say)",
    )
    channels: Mapping[str, str] | None = given(
        None,
        DATASET,
        "--channels",
        nargs="+",
        type=pair("T1=_t1", "NAME=PATTERN"),
        read=dict,
        metavar="NAME=PATTERN",
        help="cases of several images: a name and a regular expression for each channel, for example T1=_t1 T1CE=_t1ce; the "
        "longest match counts",
    )
    four_d: str = given(
        "reject",
        USED,
        "--four-d",
        choices=FOUR_D,
        help="images of several volumes: leave out (default), make a case of each, or take the first",
    )
    least_slices: int = given(
        8, USED, "--least-slices", type=int, metavar="N", help="images of fewer slices are left out (default: 8)"
    )
    least_spacing: float = given(
        0.04,
        USED,
        "--least-spacing",
        type=float,
        metavar="MM",
        help="images of smaller voxels are left out, as of a damaged header (default: 0.04; micro-CT: 0.001)",
    )
    keep: Sequence[str] = given(
        (),
        USED,
        "--keep",
        action="append",
        default=[],
        choices=KEEP,
        help="do not leave out what looks like a label map, or test images (imagesTs) of nnU-Net datasets; may be given twice",
    )
    link: str = given(
        "auto",
        WRITTEN,
        "--link",
        choices=LINKS,
        help="NIfTI files: a second name for the same file (hard link) where its header holds no text, else written anew "
        "(default); symbolic links to the files as they are; or never, all written anew",
    )
    report: str | os.PathLike[str] | None = given(
        None, WRITTEN, "--report", metavar="FILE", help="CSV of what is not used (default: ./<Dataset>_not_added.csv)"
    )
    mapping: str | os.PathLike[str] | None = given(
        None,
        WRITTEN,
        "--mapping",
        metavar="FILE",
        help="CSV of cases and the files they come from (default: none is written)",
    )
    n_processes: int | None = given(None, WRITTEN, dest="processes")

    def __post_init__(self) -> None:
        if self.four_d not in FOUR_D or self.link not in LINKS or self.least_slices < 2:
            raise NnsslError(
                f"--four-d is one of {', '.join(FOUR_D)}; --link one of {', '.join(LINKS)}; --least-slices 2 or more."
            )
        if not 0 < self.least_spacing < 1 or not set(self.keep) <= set(KEEP):
            raise NnsslError(f"--least-spacing is in mm, above 0 and below 1; --keep takes {' and '.join(KEEP)}.")

    @property
    def key(self) -> str:
        """What decides whether an image is used: one that was not is looked at again only under another key."""
        return f"2 {self.four_d} {self.least_slices} {self.least_spacing:g} {'label-maps' in self.keep}"
