"""Time, memory and disk of preprocessing one case, against the size of its image.

    python benchmarks/preprocessing.py

nnU-Net's own preprocessor, as ``nnssl_pretrain --preprocess-only`` runs it: read, crop, normalise, resample, compress, write,
read back, sync. Images are phantoms with noise (which compresses badly, as CT does) at 0.8 mm, resampled to 1 mm, stored as
.nii.gz. Each is done in a process of its own, whose peak memory is told.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import arguments, make_dataset, phantom, report, workspace


def child() -> None:
    """In a process of its own: preprocess dataset 902 for 901, print the numbers as JSON."""
    from nnssl.plans import load_plan
    from nnssl.pretrain.prepare import prepare_sources

    plan = load_plan(901)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    pool = prepare_sources(plan, ["Dataset902_Big"], n_processes=1, held_out=0.0)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (ref,) = pool.cases
    nbytes = sum(f.stat().st_size for f in ref.folder.iterdir())
    voxels = int(np.prod(pool.median_shape))
    sys.stdout.write(
        json.dumps({"cpu_s": cpu, "wall_s": wall, "more_MiB": (peak - before) / 1024, "out": voxels, "bytes": nbytes})
    )


def main() -> None:
    """Print the table."""
    args = arguments(__doc__, child=(0, "used by the script itself"))
    if args.child:
        child()
        return
    import SimpleITK as sitk

    rows = []
    shapes = [(40, 48, 40)] if args.quick else [(64, 128, 128), (128, 256, 256), (160, 400, 400)]
    for shape in shapes:
        with workspace():
            make_dataset(1, shape=(24, 24, 24), patch=(16, 16, 16), features=(4, 8))
            folder = Path(os.environ["nnUNet_raw"]) / "Dataset902_Big"
            (folder / "imagesTr").mkdir(parents=True)
            description = Path(os.environ["nnUNet_raw"]) / "Dataset901_Phantom" / "dataset.json"
            (folder / "dataset.json").write_text(description.read_text())
            image = sitk.GetImageFromArray(np.round(phantom(shape, 0)[0][0]).astype(np.int16))
            image.SetSpacing((0.8, 0.8, 0.8))
            file = folder / "imagesTr" / "case_000000_0000.nii.gz"
            sitk.WriteImage(image, str(file))
            out = subprocess.run(
                [sys.executable, __file__, "--child", "1"], check=True, capture_output=True, text=True
            ).stdout
            found = json.loads(out.splitlines()[-1])
            raw_mb, voxels = file.stat().st_size / 1e6, int(np.prod(shape))
            row = {"image": "x".join(map(str, shape)), "Mvoxel_in": voxels / 1e6, "Mvoxel_out": found["out"] / 1e6}
            row |= {
                "cpu_s": found["cpu_s"],
                "cpu_s_per_Mvoxel_in": found["cpu_s"] / voxels * 1e6,
                "wall_s": found["wall_s"],
            }
            row |= {"more_memory_MiB": found["more_MiB"], "bytes_per_voxel_in": found["more_MiB"] * 2**20 / voxels}
            rows.append(
                row
                | {
                    "raw_MB": raw_mb,
                    "disk_MB": found["bytes"] / 1e6,
                    "disk_bytes_per_voxel_out": found["bytes"] / found["out"],
                }
            )
    report("preprocessing one case", rows, args.out)


if __name__ == "__main__":
    main()
