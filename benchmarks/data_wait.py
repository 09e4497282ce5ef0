"""Share of its time that a run waits for data, by number of loader processes.

    python benchmarks/data_wait.py

A short run of mae with all that belongs to it but pictures and robustness; the share is ``data_wait`` of metrics.jsonl, of the
last epoch.
On a machine whose cores also compute the steps, loader processes take time from them.
"""

from __future__ import annotations

import json
import logging

import torch
from common import arguments, make_dataset, report, workspace


def main() -> None:
    """Print the table."""
    args = arguments(__doc__, iterations=(20, "steps per epoch"), method=("mae", "objective"))
    torch.set_num_threads(1)
    from nnssl.pretrain import run

    logging.getLogger("nnssl").setLevel(logging.ERROR)
    big = {"shape": (64, 80, 64), "patch": (32, 32, 32), "features": (16, 32, 64, 128)}
    small = {"shape": (24, 32, 24), "patch": (16, 16, 16), "features": (4, 8)}
    rows = []
    with workspace():
        make_dataset(16, **(small if args.quick else big))
        for workers in (0, 1) if args.quick else (0, 1, 2):
            options = {"workers": workers, "picture_every": 0, "held_out_batches": 1, "log_every": 0}
            result = run(
                901,
                method=args.method,
                device="cpu",
                epochs=2,
                iterations=3 if args.quick else args.iterations,
                name=f"w{workers}",
                options=options,
                robustness_every=0,
            )
            lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
            last = [line for line in lines if line["event"] == "epoch"][-1]
            rows.append({"workers": workers, "wall_s_per_step": last["step_s"], "share_waiting": last["data_wait"]})
    report("waiting for data", rows, args.out)


if __name__ == "__main__":
    main()
