"""Formats that ITK does not read: NIfTI-2 and FreeSurfer's through nibabel, and TIFF stacks as nnU-Net takes them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile

from nnssl.pretrain.prepare.integrity import check_axes

MM = {"mm": 1.0, "cm": 10.0, "micron": 1e-3, "um": 1e-3, "\u00b5m": 1e-3, "\\u00B5m": 1e-3, "nm": 1e-6, "inch": 25.4}


def read_nibabel(path: str) -> sitk.Image:
    """An image that nibabel reads; raises many kinds where it cannot be an image or is damaged."""
    loaded = nibabel.load(path)
    if not isinstance(loaded, nibabel.spatialimages.SpatialImage):
        raise ValueError("it holds no volume")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ loaded.affine
    check_axes(affine[:3, :3])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    voxels = np.asanyarray(loaded.dataobj)
    if voxels.dtype.fields or voxels.dtype.kind not in "iufb":
        raise ValueError(f"its voxels are colour or complex numbers ({voxels.dtype})")
    if voxels.ndim == 2:
        voxels = voxels[..., None]
    voxels = voxels.reshape(*voxels.shape[:3], -1).astype(voxels.dtype.newbyteorder("="), copy=False)
    volumes = []
    for i in range(voxels.shape[3]):
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels[..., i].T))
        image.SetSpacing([float(s) for s in spacing])
        image.SetOrigin([float(o) for o in affine[:3, 3]])
        image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
        volumes.append(image)
    return volumes[0] if len(volumes) == 1 else sitk.JoinSeries(volumes)


def read_tiff(path: str) -> sitk.Image:
    """A TIFF of several pages; its voxel size is in ``<name>.json`` as nnU-Net wants it, or ImageJ's own.

    Raises ``ValueError`` where it tells no voxel size, or is no stack of pictures; other kinds for damaged files.
    """
    with tifffile.TiffFile(path) as file:
        series, spacing = file.series[0], _imagej(file)
        if series.axes.endswith("S"):
            raise ValueError(f"colour (RGB): {series.shape[-1]} values a voxel")
        voxels = series.asarray()
    if voxels.ndim == 2:
        voxels = voxels[None]
    beside = Path(path).with_suffix(".json")
    if beside.is_file():
        try:
            spacing = tuple(float(s) for s in json.loads(beside.read_text(encoding="utf-8"))["spacing"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"a TIFF tells no voxel size by itself, and {beside.name} has no 'spacing': [z, y, x] in mm"
            ) from None
    if spacing is None or len(spacing) != 3:
        raise ValueError(f'a TIFF tells no voxel size: write it into {beside.name}, {{"spacing": [z, y, x]}} in mm')
    if voxels.ndim != 3:
        raise ValueError(f"a TIFF with the axes {series.axes} is no single volume")
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing[::-1])
    return image


def _imagej(file: tifffile.TiffFile) -> tuple[float, ...] | None:
    """Voxel size (z, y, x) in mm that ImageJ has written."""
    metadata, tags = file.imagej_metadata or {}, file.pages.first.tags
    scale = MM.get(str(metadata.get("unit", "")).strip())
    try:
        x, y = (tags[name].value for name in ("XResolution", "YResolution"))
        found = (float(metadata["spacing"]) * scale, scale * y[1] / y[0], scale * x[1] / x[0]) if scale else None
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    return found if found and all(math.isfinite(s) and s > 0 for s in found) else None
