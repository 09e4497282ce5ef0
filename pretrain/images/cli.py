"""The command ``nnssl_add_images``: a thin shell over :func:`nnssl.pretrain.images.add_images`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnssl.command import run_command

__all__ = ["main", "parser"]


def _channel(text: str) -> tuple[str, str]:
    name, equals, pattern = text.partition("=")
    if not (name and equals and pattern):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form NAME=PATTERN, such as T1=_t1")
    return name, pattern


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="nnssl_add_images",
        allow_abbrev=False,
        description="Make an nnU-Net raw dataset without labels from folders of DICOM, NIfTI, NRRD, MetaImage, GIPL, MGH and "
        "TIFF files, or add to one. Cases get neutral names; what is not used is listed with the reason. The same command again "
        "adds what is new. DICOM needs dcm2niix and pydicom: pip install 'nnssl[dicom]' (or dcm2niix pydicom).",
        epilog="Example: nnssl_add_images -d 500 -n PelvisScans /data/export, then: nnssl_pretrain -d 500 -t 501 -m macl",
    )
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="looked through recursively")
    p.add_argument("-d", required=True, metavar="DATASET", help="id of the dataset, such as 500")
    p.add_argument("-n", metavar="NAME", help="name of a new dataset: Dataset500_NAME with the cases NAME_0001, ...")
    p.add_argument("-t", metavar="DATASET", help="dataset that will be fine-tuned: its channel names are taken")
    p.add_argument(
        "--modality",
        metavar="NAME",
        help="CT, MR or another name of the channel (default: what -t, the dataset, DICOM or the files' names tell)",
    )
    p.add_argument(
        "--channels",
        nargs="+",
        type=_channel,
        metavar="NAME=PATTERN",
        help="cases of several images: a name and a regular expression for each channel, for example T1=_t1 T1CE=_t1ce; the "
        "longest match counts",
    )
    p.add_argument(
        "--four-d",
        choices=("reject", "split", "first"),
        default="reject",
        help="images of several volumes: leave out (default), make a case of each, or take the first",
    )
    p.add_argument("--least-slices", type=int, default=8, metavar="N", help="fewer are no volume (default: 8)")
    p.add_argument(
        "--least-spacing",
        type=float,
        default=0.04,
        metavar="MM",
        help="smaller voxel sizes are taken for a damaged header (default: 0.04; micro-CT: 0.001)",
    )
    p.add_argument(
        "--keep",
        action="append",
        choices=("label-maps", "test-images"),
        default=[],
        help="do not leave out what looks like a label map, or test images (imagesTs) of nnU-Net datasets; may be given twice",
    )
    p.add_argument(
        "--link",
        choices=("auto", "symbolic", "never"),
        default="auto",
        help="NIfTI files: hard links where their headers hold no text (default), symbolic links as they are, or written anew",
    )
    p.add_argument("--report", metavar="FILE", help="CSV of what is not used (default: ./<Dataset>_not_added.csv)")
    p.add_argument(
        "--mapping", metavar="FILE", help="CSV of cases and the files they come from (default: none is written)"
    )
    p.add_argument("-np", type=int, metavar="N", help="processes (default: nnU-Net's)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    return run_command(lambda: _body(args))


def _body(args: argparse.Namespace) -> None:
    from nnssl.pretrain.images.add import add_images

    add_images(
        args.d,
        args.folders,
        name=args.n,
        target=args.t,
        modality=args.modality,
        channels=dict(args.channels) if args.channels else None,
        four_d=args.four_d,
        least_slices=args.least_slices,
        least_spacing=args.least_spacing,
        keep=args.keep,
        link=args.link,
        report=args.report,
        mapping=args.mapping,
        n_processes=args.np,
    )
