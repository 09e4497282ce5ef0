"""Shapes of cases after preprocessing, without opening them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

from nnssl.errors import NnsslError
from nnssl.files import read_json
from nnssl.paths import preprocessed_folder
from nnssl.plans import Plan
from nnssl.pretrain.prepare.integrity import itk_header
from nnssl.pretrain.prepare.raw import RawCase

HEADERS_READ = 32  # raw files whose headers are read for the median shape where nothing may be preprocessed


def preprocessed_shape(shape: Sequence[int], spacing: Sequence[float], plan: Plan) -> list[int]:
    """Shape after preprocessing of an image given before transpose; the slices of 2d plans keep their distance."""
    order = plan.transpose_forward
    shape, spacing = [shape[i] for i in order], [float(spacing[i]) for i in order]
    target = [spacing[0], *plan.spacing] if len(plan.spacing) == 2 else list(plan.spacing)
    return [max(1, int(round(n * a / b))) for n, a, b in zip(shape, spacing, target)]


def fingerprint_shapes(plan: Plan) -> list[list[int]]:
    """Shapes after preprocessing from nnU-Net's fingerprint; the plan's median where there is none."""
    try:
        content = read_json(preprocessed_folder() / plan.dataset_name / "dataset_fingerprint.json")
        shapes = [preprocessed_shape(n, s, plan) for n, s in zip(content["shapes_after_crop"], content["spacings"])]
    except (NnsslError, KeyError, TypeError, IndexError, ValueError):
        shapes = []
    return shapes or [list(plan.median_shape)]


def header_shapes(cases: dict[str, RawCase], plan: Plan) -> list[list[int]]:
    """Estimates from the headers of some raw images, uncropped, for a run that may not preprocess."""
    names = random.Random(0).sample(sorted(cases), min(HEADERS_READ, len(cases)))
    shapes = []
    for name in names:
        with contextlib.suppress(RuntimeError):
            header = itk_header(cases[name].files[0])
            if header.GetDimension() > 2:
                shapes.append(preprocessed_shape(header.GetSize()[2::-1], header.GetSpacing()[2::-1], plan))
    return shapes or [list(plan.median_shape)]
