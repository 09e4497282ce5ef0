"""What the same work costs here, in nnU-Net and in MIC-DKFZ's nnssl: one table.

    python benchmarks/peers.py
    python benchmarks/peers.py --peer-checkout ../nnssl-mic --peer-python ../nnssl-mic/.venv/bin/python

Rows: loader and transforms in seconds per million voxels; preprocessing a volume; a training step, and over its own forward, loss
and backward; ``--help``, ``--list``, and a command up to the end of its first step; what a loader process holds for itself. The
others do the same in the ways of their own: nnU-Net trains with labels, the peer is its BaseMAETrainer with its defaults, which
augments less than nnU-Net and interpolates with splines. The network is a ResEnc of 16 to 128 features, the batch 2.

All are CPU seconds of a process and its children, one thread, each side in a process of its own (benchmarks/sides), measured in
turn (A, B, C, A, B, C ...). The peer's package has our name: it needs ``--peer-checkout``, the folder that holds ``src/nnssl``,
and ``--peer-python``, a Python that has what it needs; without them its column says why it is empty.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from common import as_source, make_dataset, parser, plans, ratios, report, workspace
from sides.process import HERE, Failed, Process

OURS, NNUNET, PEER = "ours", "nnunet", "peer"
SMALL = "nnUNetPlansSmall"


ENTRIES = {
    OURS: "from nnssl.pretrain.cli import main; raise SystemExit(main())",
    NNUNET: "from nnunetv2.run.run_training import run_training_entry as main; main()",
    PEER: "from nnssl.run.run_training import run_training_entry as main; main()",
}


def row_of(what: str, unit: str, sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """A row: each side's cost, and how many times ours the others take, with the least and largest of the rounds."""
    row: dict[str, Any] = {"what": what, "unit": unit}
    working, notes = {}, []
    for name, side in sides.items():
        try:
            side()  # what is done only once does not count
            working[name] = side
        except Failed as error:
            notes.append(str(error))
    try:
        found = ratios(working, rounds, OURS if OURS in working else next(iter(working), ""))
    except (Failed, KeyError) as error:
        found, notes = {}, [*notes, str(error)]
    for name in (OURS, NNUNET, PEER):
        if name in found:
            row[name] = found[name]["cost"]
            if name != OURS and OURS in found:
                row[f"{name}/ours"] = f"{found[name]['ratio']:.2f} ({found[name]['low']:.2f}-{found[name]['high']:.2f})"
    if notes:
        row["note"] = " ".join("; ".join(notes).split())[-300:]
        sys.stderr.write(f"{what}: {row['note']}\n")
    return row


def once(value: Callable[[int], float], first: int = 0) -> Callable[[], float]:
    """Calls with 0, 1, 2 ...: each round another volume."""
    counter = iter(range(first, 10_000))
    return lambda: value(next(counter))


ROWS = ("loader", "preprocessing", "step", "commands", "memory")


def rows_of(
    sides: dict[str, Process], edges: list[int], crops: int, rounds: int, only: Sequence[str] = ROWS
) -> list[dict[str, Any]]:
    """All rows, or those of ``only``."""

    def each(
        make: Callable[[Process], Callable[[], float]], names: tuple[str, ...] = ()
    ) -> dict[str, Callable[[], float]]:
        return {name: make(side) for name, side in sides.items() if not names or name in names}

    rows, few = [], min(3, rounds)
    for edge in edges if "loader" in only else ():
        asked = each(lambda s, e=edge: partial(s.ask, "loader", e, crops))
        rows.append(row_of(f"loader, crops of {edge}^3", "s / Mvoxel", asked, rounds))
    if "preprocessing" in only:
        volumes = each(lambda s: once(lambda i: s.ask("preprocess", i)))
        rows.append(row_of("preprocessing a volume", "s", volumes, few))
    if "step" in only:
        step, bare = each(lambda s: lambda: s.ask("step")), each(lambda s: lambda: s.ask("bare"))
        rows.append(row_of("training step", "s", step, rounds))
        rows.append(row_of("forward, loss, backward", "s", bare, rounds))
        over: dict[str, Any] = {"what": "step over forward, loss, backward", "unit": "ratio"}
        for name in sides:
            with suppress(Failed):
                over[name] = ratios({"bare": bare[name], "step": step[name]}, rounds, "bare")["step"]["ratio"]
        rows.append(over)
    if "commands" in only:
        rows.append(row_of("--help", "s", each(lambda s: lambda: s.cpu(ENTRIES[s.side], "--help")), few))
        rows.append(row_of("--list", "s", each(lambda s: lambda: s.cpu(ENTRIES[s.side], "--list"), (OURS,)), few))
        rows.append(row_of("command to the end of its first step", "s", each(lambda s: s.first_step), few))
    if "memory" in only:
        asked = each(lambda s: lambda: s.ask("memory", edges[0], crops))
        rows.append(row_of(f"private memory of a loader process, crops of {edges[0]}^3", "MiB", asked, 1))
    return rows


def write_peer(folder: Path, names: list[str]) -> None:
    """The peer's folders beside nnU-Net's, with the same images."""
    from sides.peer import describe

    for kind in ("raw", "preprocessed", "results"):
        (folder / f"peer_{kind}").mkdir()
        os.environ[f"nnssl_{kind}"] = str(folder / f"peer_{kind}")
    for name in names:
        images, plan = describe(name, Path(os.environ["nnUNet_raw"]) / name / "imagesTr")
        for kind, file, content in (("raw", "pretrain_data", images), ("preprocessed", "nnsslPlans", plan)):
            target = folder / f"peer_{kind}" / name
            target.mkdir(parents=True)
            (target / f"{file}.json").write_text(json.dumps(content))


def missing(checkout: Path | None, python: str | None) -> str | None:
    """Why there is no column of the peer; None where there is one."""
    if checkout is None or python is None:
        return "no column of MIC-DKFZ's nnssl: --peer-checkout and --peer-python do not name one"
    if not (checkout / "src" / "nnssl" / "run" / "run_training.py").is_file():
        return f"no column of MIC-DKFZ's nnssl: {checkout} has no src/nnssl/run/run_training.py"
    return None


def main() -> int:
    """Print the table."""
    p = parser(__doc__)
    p.add_argument("--peer-checkout", type=Path, help="folder of MIC-DKFZ's nnssl that holds src/nnssl")
    p.add_argument("--peer-python", help="Python that has what it needs")
    p.add_argument("--rounds", type=int, default=6, help="how often the sides are measured in turn (6)")
    p.add_argument("--crops", type=int, default=24, help="crops of each side in each round (24)")
    p.add_argument("--cases", type=int, default=24, help="different volumes of 130 x 150 x 130 (24)")
    p.add_argument(
        "--only", nargs="+", choices=ROWS, default=ROWS, metavar="ROWS", help=f"some rows: {', '.join(ROWS)}"
    )
    args = p.parse_args()
    edges, shape, features, small = [64, 96], (130, 150, 130), [16, 32, 64, 128], 32
    rounds, crops, cases = args.rounds, args.crops, args.cases
    if args.quick:
        edges, shape, features, small, rounds, crops, cases = [16], (40, 40, 40), [4, 8], 16, 1, 2, 6
    reason = missing(args.peer_checkout, args.peer_python)
    with workspace() as folder:
        network = {"features": tuple(features), "arch": "resenc"}
        plan = make_dataset(cases, id=901, shape=shape, patch=(max(edges),) * 3, different=cases, **network)
        few = min(4, rounds) + 1
        unequal = make_dataset(
            few, id=903, shape=shape, patch=(small,) * 3, different=few, preprocessed=False, spacing=0.8
        )
        content = plans((small,) * 3, tuple(features), plan.dataset_name, shape, "resenc") | {"plans_name": SMALL}
        (Path(os.environ["nnUNet_preprocessed"]) / plan.dataset_name / f"{SMALL}.json").write_text(json.dumps(content))
        (Path(os.environ["nnUNet_preprocessed"]) / plan.dataset_name / "dataset_fingerprint.json").write_text("{}")
        settings = {"id": 901, "dataset": plan.dataset_name, "source": as_source(plan), "small": SMALL, "edge": small}
        settings |= {"features": features, "unequal": unequal.dataset_name}
        file = folder / "settings.json"
        file.write_text(json.dumps(settings))
        sides = {OURS: Process(OURS, sys.executable, [HERE.parent], file)}
        sides[NNUNET] = Process(NNUNET, sys.executable, [HERE.parent], file)
        if reason is None:
            write_peer(folder, [plan.dataset_name, unequal.dataset_name])
            sides[PEER] = Process(PEER, args.peer_python, [args.peer_checkout.resolve() / "src"], file)
            try:
                sides[PEER].ask("prepare")
            except Failed as error:
                reason = f"no column of MIC-DKFZ's nnssl: {error}"
                sides.pop(PEER).close()
        try:
            rows = rows_of(sides, edges, crops, rounds, args.only)
        finally:
            for side in sides.values():
                side.close()
    report("the same work here and elsewhere", rows, args.out)
    if reason is not None:
        sys.stdout.write(f"\n{reason}\n")
    return int(any("ours" not in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
