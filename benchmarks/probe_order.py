"""Does a probe order checkpoints as fine-tuning does? Spearman's rho with fine-tuned Dice, for the probe and for robustness.

    nnssl_probe -d 501 --output probe_501 RUN1 RUN2 FILE ...
    nnssl_transferability -d 501 --output robust_501 RUN1/checkpoint_final.pth FILE ...
    python benchmarks/probe_order.py results.csv --probe probe_501/probe.json --robustness robust_501/robustness.csv

``results.csv`` has a line per fine-tuning, as ``nnssl_transferability --dice`` takes it:
``checkpoint,dice[,setup,seed]`` with a path, or the name of the probe's column, or ``scratch`` for random weights.
Several seeds are averaged; setups stand apart. Robustness is made for checkpoints of one run: a rho over several
runs is told, and says nothing for it. With few checkpoints rho is mostly noise: of four none is significant at 5 %,
of five only 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from common import report
from scipy.stats import spearmanr

from nnssl.errors import NnsslError
from nnssl.paths import decode_path
from nnssl.transferability import read_dice

RANDOM = ("scratch", "none", "no pretraining", "random", "random weights")


def probe_dice(file: Path) -> dict[str, dict[str, float]]:
    """Column -> {stages: Dice} of a probe, and each checkpoint's path -> the same."""
    found = json.loads(file.read_text(encoding="utf-8"))
    names: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        if row["dice"] is not None:
            stages = "encoder" if row["decoder_stages"] == 0 else "with decoder"
            names.setdefault(row["name"], {})[stages] = row["dice"]
    paths = {
        str(decode_path(c["path"]).resolve()): names[c["name"]] for c in found["checkpoints"] if c["name"] in names
    }
    return {**names, **paths}


def robustness(file: Path) -> dict[str, float]:
    """Path of a checkpoint -> robustness score (higher: more robust); ``random weights`` -> the mean of these."""
    with file.open(newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    found = {str(Path(r["checkpoint"]).resolve()): -float(r["loss"]) for r in rows if r["method"]}
    random = [-float(r["loss"]) for r in rows if r["run"] == "random initialisation"]
    return found | ({RANDOM[-1]: statistics.fmean(random)} if random else {})


def rho(values: list[tuple[float | None, float]]) -> tuple[float, int]:
    """Spearman's rho over the pairs that are whole, and their number; NaN with fewer than three or where one side is constant."""
    pairs = [(a, b) for a, b in values if a is not None and math.isfinite(a)]
    if len(pairs) < 3 or any(len({p[i] for p in pairs}) == 1 for i in (0, 1)):
        return math.nan, len(pairs)
    return float(spearmanr(*zip(*pairs)).statistic), len(pairs)


def tables(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A line per checkpoint and setup, and a line per setup with the rank correlations."""
    probed = probe_dice(args.probe)
    robust = robustness(args.robustness) if args.robustness else {}
    dice: dict[tuple[str, str], list[float]] = {}
    for name, setup, value in read_dice(args.results):
        dice.setdefault((setup, RANDOM[-1] if name.lower() in RANDOM else name), []).append(value)
    rows = []
    for (setup, name), values in dice.items():
        key = name if name in probed else str(Path(name).resolve())
        if key not in probed:
            raise NnsslError(f"{args.results} names '{name}', which {args.probe} has not probed.")
        paths = [p for p, row in probed.items() if row is probed[key] and p in robust] or [key]
        row = {"setup": setup, "checkpoint": name, "fine-tuned": statistics.fmean(values)}
        row |= {f"probe, {s}": probed[key].get(s) for s in ("encoder", "with decoder")}
        rows.append(row | {"robustness": robust.get(paths[0])})
    summary = []
    for setup in dict.fromkeys(row["setup"] for row in rows):
        own = [row for row in rows if row["setup"] == setup]
        for what in ("probe, encoder", "probe, with decoder", "robustness"):
            value, n = rho([(row[what], row["fine-tuned"]) for row in own])
            summary.append({"setup": setup, "what": what, "Spearman": value, "checkpoints": n})
    return rows, summary


def main() -> int:
    """Print both tables; ``--out`` keeps them as JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", type=Path, help="CSV: checkpoint, dice[, setup, seed]")
    p.add_argument("--probe", type=Path, required=True, help="probe.json of nnssl_probe")
    p.add_argument("--robustness", type=Path, help="robustness.csv of nnssl_transferability")
    p.add_argument("--out", type=Path, help="JSON file of the correlations")
    args = p.parse_args()
    try:
        rows, summary = tables(args)
    except NnsslError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    report("fine-tuned and probed", rows, None)
    report("rank correlation with fine-tuned Dice", summary, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
