"""The command ``nnssl_add_images``: a thin shell over :func:`nnssl.pretrain.images.add_images`."""

from __future__ import annotations

from collections.abc import Sequence

from nnssl.command import run_command
from nnssl.grammar import CommandParser
from nnssl.options import add_options, from_args
from nnssl.pretrain.images.options import AddOptions


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
    add_options(p, AddOptions)
    p.renamed("-n", "--name")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)

    def body() -> None:
        from nnssl.pretrain.images.add import add

        add(from_args(AddOptions, args))

    return run_command(body, args)
