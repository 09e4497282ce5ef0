#!/usr/bin/env python
"""A coarser copy of a raw nnU-Net dataset: blocks of K voxels per axis are averaged, for trainings of minutes on a CPU.

    python coarse_dataset.py -d 5 --to 6 --name LeftAtrium25 --factor 2

Reads nnUNet_raw/Dataset005_*, writes nnUNet_raw/Dataset006_LeftAtrium25 (imagesTr, labelsTr, imagesTs, labelsTs). A voxel of a
label map gets the label that most of its block has; a block that is cut off at the border is dropped.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def blocks(array: np.ndarray, k: int) -> np.ndarray:
    """``(z, y, x)`` -> ``(z // k, y // k, x // k, k ** 3)``."""
    n = [s // k for s in array.shape]
    cut = array[tuple(slice(0, m * k) for m in n)].reshape(n[0], k, n[1], k, n[2], k)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(*n, k**3)


def coarse(image: sitk.Image, k: int, label: bool) -> sitk.Image:
    """The averaged image (float32), or the label of most voxels of a block."""
    array = blocks(sitk.GetArrayFromImage(image), k)
    if label:
        values = np.unique(array)
        out = values[np.argmax([(array == v).sum(-1) for v in values], axis=0)].astype(np.uint8)
    else:
        out = array.astype(np.float64).mean(-1).astype(np.float32)
    made = sitk.GetImageFromArray(out)
    made.SetSpacing([s * k for s in image.GetSpacing()])
    made.SetDirection(image.GetDirection())
    made.SetOrigin(image.TransformContinuousIndexToPhysicalPoint([(k - 1) / 2] * 3))
    return made


def main() -> None:
    """Write the dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", type=int, required=True, help="number of the dataset")
    parser.add_argument("--to", type=int, required=True, help="number of the copy")
    parser.add_argument("--name", required=True, help="its name")
    parser.add_argument("--factor", type=int, default=2, help="voxels per axis of a block (default: %(default)s)")
    args = parser.parse_args()
    raw = Path(os.environ["nnUNet_raw"])
    (source,) = raw.glob(f"Dataset{args.d:03d}_*")
    target = raw / f"Dataset{args.to:03d}_{args.name}"
    target.mkdir()
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (target / folder).mkdir()
        for file in sorted((source / folder).glob("*")):
            made = coarse(sitk.ReadImage(str(file)), args.factor, label=folder.startswith("labels"))
            sitk.WriteImage(made, str(target / folder / file.name), True)
    about = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
