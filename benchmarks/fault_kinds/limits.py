"""Full disks, too little memory, numbers that are not finite."""

# ruff: noqa: D101, D102, D103
from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fault_kinds.lab import LAB, RUN, Failed, continues, expect, go, here, program, same

import torch  # isort: skip


@LAB.add("the disk is full at the second checkpoint")
def _full() -> None:
    from nnssl import checkpoint

    save, calls = checkpoint.save, []

    def fail(path: Path, payload: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, payload)

    checkpoint.save = fail
    try:
        expect(go("full"), 1, "cannot save.*checkpoint saved before is whole. Free space, then continue with --c")
    finally:
        checkpoint.save = save
    continues("full")


@LAB.add("the disk is full at the first checkpoint")
def _full_first() -> None:
    from nnssl import checkpoint

    def fail(path: Path, payload: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save, checkpoint.save = checkpoint.save, fail
    try:
        told = go("full1")
    finally:
        checkpoint.save = save
    expect(told, 1, "cannot save.*Free space, then continue with --c")
    if "is whole" in told.text:
        raise Failed("misadvised", told.text)
    continues("full1", words="Weights:")


@LAB.add("a limit on the size of files that the checkpoint exceeds")
def _file_size() -> None:
    told = program("filesize", before=["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"])
    expect(told, 1, "Error: cannot save.*File too large. Lift the limit on the size of files .*continue with --c")
    continues("filesize", words="Weights:")


if shutil.which("unshare") and hasattr(os, "geteuid") and os.geteuid() == 0:

    @LAB.add("a results folder on a disk that is really full")
    def _really_full() -> None:
        place = Path(os.environ["nnUNet_results"]) / "small"
        place.mkdir()
        script = f'mount -t tmpfs -o size=400k tmpfs {place} && nnUNet_results={place} exec "$@"'
        told = program("small", before=["unshare", "-m", "sh", "-c", script, "sh"])
        expect(told, 1, "Error: (cannot save|No space left).*Free space, then continue with --c")

    @LAB.add("a results folder that is mounted read-only")
    def _read_only() -> None:
        place = Path(os.environ["nnUNet_results"]) / "mounted"
        place.mkdir()
        script = f"mount --bind {place} {place} && mount -o remount,bind,ro {place} && nnUNet_results={place} "
        told = program("mounted", before=["unshare", "-m", "sh", "-c", script + 'exec "$@"', "sh"])
        expect(told, 1, "Error: cannot write into .*Read-only file system. nnUNet_results must be writable")


@LAB.add("images of nnU-Net's folder that hold NaN, or nothing")
def _spoilt() -> None:
    import blosc2

    cases = Path(os.environ["nnUNet_preprocessed"]) / "Dataset901_Phantom" / "nnUNetPlans_3d_fullres"
    file = sorted(f for f in cases.glob("*.b2nd") if "_seg" not in f.name)[1]
    content, voxels = file.read_bytes(), blosc2.open(str(file))[:]
    voxels[:] = float("nan")
    try:
        file.unlink()
        blosc2.asarray(voxels, urlpath=str(file))
        expect(go("spoilt"), 1, f"Error: Case {file.stem} .*NaN or infinite voxels.*--exclude")
        for spoilt in (b"", content[: len(content) // 2]):
            file.write_bytes(spoilt)
            expect(go("spoilt"), 1, f"Error: Case .*{file.name} is damaged.*nnUNetv2_preprocess.*--exclude")
    finally:
        file.unlink()
        file.write_bytes(content)
    expect(go("spoilt"), 0, "Weights:")  # nothing was saved, so the same command starts
    same("spoilt")


@LAB.add("pictures cannot be written")
def _pictures() -> None:
    from nnssl.pretrain.engine import drawing

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    before = drawing.save_picture, drawing.plot_progress
    drawing.save_picture, drawing.plot_progress = fail, fail
    try:
        told = here(*RUN, "--name", "pictures", "-o", "workers=0", "picture_every=1", "held_out_batches=1")
    finally:
        drawing.save_picture, drawing.plot_progress = before
    expect(told, 0, "progress.png could not be written.*Weights:")
    same("pictures")


@LAB.add("weights that are not finite after the last step")
def _nan() -> None:
    from nnssl.pretrain.engine.stepping import Stepper

    step = Stepper.step

    def spoil(self: Stepper, batch: Any, number: int, *more: Any, **options: Any) -> Any:
        out = step(self, batch, number, *more, **options)
        if number == 17:
            with torch.no_grad():
                next(iter(self.method.network.parameters())).fill_(float("nan"))
        return out

    with patch.object(Stepper, "step", spoil):
        expect(go("nan"), 1, "Error: step 17: a weight after it is not finite. Cases of the batch:")
    continues("nan")


for size in ("64k", "8k"):

    def shared(size: str = size) -> None:
        script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
        before = ["unshare", "-m", "sh", "-c", script, "sh"]
        told = program(f"shm{size}", before=before, options=["-o", "workers=2", "picture_every=0"])
        expect(told, 1, "Error: Shared memory ran out.*--shm-size.*workers=0")

    if shutil.which("unshare") and hasattr(os, "geteuid") and os.geteuid() == 0:
        LAB.add(f"/dev/shm of {size}")(shared)
