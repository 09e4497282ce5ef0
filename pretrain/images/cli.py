"""The command ``nnssl_add_images``: a thin shell over :func:`nnssl.pretrain.images.add_images`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnssl.command import run_command
from nnssl.grammar import CommandParser, pair


def parser() -> CommandParser:
    """The command's arguments."""
    p = CommandParser(
        "nnssl_add_images",
        "FOLDER [FOLDER ...] -d DATASET [--name NAME] [options]",
        "Make an nnU-Net raw dataset without labels from folders of DICOM, NIfTI, NRRD, MetaImage, GIPL, MGH and "
        "TIFF files, or add to one. Cases get neutral names; what is not used is listed with the reason. The same command again "
        "adds what is new. DICOM needs dcm2niix and pydicom: pip install 'nnssl[dicom]' (or dcm2niix pydicom).",
        "nnssl_add_images /data/export -d 500 --name PelvisScans, then: nnssl_pretrain -d 500 -t 501 -m macl",
    )
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="folder to search, with all its subfolders")
    made = p.group("the dataset")
    p.share(made, "dataset", required=True, help="number of the dataset, such as 500; or name of one that exists")
    p.share(made, "name", help="name of a new dataset: Dataset500_NAME with the cases NAME_0001, ...")
    p.share(made, "target", help="dataset that will be fine-tuned: its channel names are taken")
    made.add_argument(
        "--modality",
        metavar="NAME",
        help="CT, MR or another name of the channel (default: what -t, the dataset, DICOM or the files' names say)",
    )
    made.add_argument(
        "--channels",
        nargs="+",
        type=pair("T1=_t1", "NAME=PATTERN"),
        metavar="NAME=PATTERN",
        help="cases of several images: a name and a regular expression for each channel, for example T1=_t1 T1CE=_t1ce; the "
        "longest match counts",
    )
    used = p.group("which images")
    used.add_argument(
        "--four-d",
        choices=("reject", "split", "first"),
        default="reject",
        help="images of several volumes: leave out (default), make a case of each, or take the first",
    )
    used.add_argument(
        "--least-slices", type=int, default=8, metavar="N", help="images of fewer slices are left out (default: 8)"
    )
    used.add_argument(
        "--least-spacing",
        type=float,
        default=0.04,
        metavar="MM",
        help="images of smaller voxels are left out, as of a damaged header (default: 0.04; micro-CT: 0.001)",
    )
    used.add_argument(
        "--keep",
        action="append",
        choices=("label-maps", "test-images"),
        default=[],
        help="do not leave out what looks like a label map, or test images (imagesTs) of nnU-Net datasets; may be given twice",
    )
    written = p.group("what is written")
    written.add_argument(
        "--link",
        choices=("auto", "symbolic", "never"),
        default="auto",
        help="NIfTI files: a second name for the same file (hard link) where its header holds no text, else written anew "
        "(default); symbolic links to the files as they are; or never, all written anew",
    )
    written.add_argument(
        "--report", metavar="FILE", help="CSV of what is not used (default: ./<Dataset>_not_added.csv)"
    )
    written.add_argument(
        "--mapping", metavar="FILE", help="CSV of cases and the files they come from (default: none is written)"
    )
    p.share(written, "processes")
    p.renamed("-n", "--name")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: _body(args), args)


def _body(args: argparse.Namespace) -> None:
    from nnssl.pretrain.images.add import add_images

    add_images(
        args.dataset,
        args.folders,
        name=args.name,
        target=args.target,
        modality=args.modality,
        channels=dict(args.channels) if args.channels else None,
        four_d=args.four_d,
        least_slices=args.least_slices,
        least_spacing=args.least_spacing,
        keep=args.keep,
        link=args.link,
        report=args.report,
        mapping=args.mapping,
        n_processes=args.processes,
    )
