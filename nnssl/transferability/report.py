"""Tables and the picture of the offline comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nnssl.files import write_csv
from nnssl.pictures import new_figure, write_png
from nnssl.transferability.checkpoints import Run
from nnssl.transferability.downstream import TISRow
from nnssl.transferability.indicator import summarise
from nnssl.transferability.verdict import Baseline
from nnssl.words import aligned

TIE = 1e-3


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def robustness_table(runs: Sequence[Run], baseline: Baseline) -> str:
    """One block per run, its checkpoints in the order of training; the lowest loss of a run is marked."""
    out = [
        f"Random initialisations ({len(baseline.losses)}): loss {_number(baseline.mean)}, SD {_number(baseline.sd)}. "
        "Loss: lower is better, and comparable within a run only."
    ]
    for run in runs:
        rows: list[Sequence[str]] = [
            ("checkpoint", "trained", "loss", "score", "same case", "other cases", "bottleneck", "vs random (SD)", "")
        ]
        best = run.best
        for m in run.rows:
            r = m.result
            z = (baseline.mean - r.loss) / baseline.sd if baseline.sd > 0 else math.nan
            mark = "lowest" if best is not None and m.path == best.path else ""
            if m.encoder_percent < 99.95:
                mark += f" (only {m.encoder_percent:.0f} % of the encoder is from this file)"
            cells = [_number(v) for v in (r.loss, r.score, r.positive, r.negative, r.bottleneck)]
            rows.append((m.path.name, m.trained, *cells, f"{z:+.1f}" if math.isfinite(z) else "-", mark.strip()))
        out.append(f"\nRun {run.name} ({run.method})\n{aligned(rows)}")
        if best is not None and math.isfinite(run.lead) and run.lead < TIE:
            out.append(f"The runner-up is within {run.lead:.1e} of the lowest: take them as equal.")
    return "\n".join(out)


def tis_table(rows: Sequence[TISRow]) -> str:
    """TIS per run and setup beside its baselines, and the means."""
    selectors = list(rows[0].scores)
    table = [("run", "setup", "chosen", "best", *selectors, "Spearman", "checkpoints")]
    for r in rows:
        chosen = "-" if r.selected is None else str(r.selected)
        scores = [_number(r.scores[s]) for s in selectors]
        table.append((r.run, r.setup, chosen, str(r.best), *scores, _number(r.spearman, 2), str(r.checkpoints)))
    means = [summarise([r.scores[s] for r in rows]) for s in selectors]
    rho = summarise([r.spearman for r in rows])
    table.append(("mean", f"n={len(rows)}", "", "", *(_number(m.mean) for m in means), _number(rho.mean, 2), ""))
    left_out = max(m.undefined for m in means)
    note = f"\nUndefined in up to {left_out} of {len(rows)} setups, which a mean leaves out." if left_out else ""
    head = (
        "TIS: Dice of the chosen checkpoint over that of the best one. It is compressive: read it beside its baselines."
    )
    return f"{head}\n{aligned(table)}{note}"


def write_robustness_csv(path: Path, runs: Sequence[Run], baseline: Baseline) -> None:
    """One line per checkpoint and per random initialisation, with the losses at all margins."""
    head = ["run", "method", "checkpoint", "epoch", "step", "loss", "score", "distance_positive", "distance_negative"]
    head += ["loss_bottleneck", "crops", "clipped", "encoder_percent"]
    rows: list[list[object]] = [[*head, *(f"loss_margin_{m:g}" for m in runs[0].rows[0].result.margins)]]
    for run in runs:
        for m in run.rows:
            r = m.result
            values = [r.loss, r.score, r.positive, r.negative, r.bottleneck, r.n, r.clipped, m.encoder_percent]
            epoch, step = (m.epoch, "") if m.unit == "epochs" else ("", m.epoch if m.unit == "steps" else "")
            rows.append([run.name, run.method, str(m.path), epoch, step, *values, *r.margins.values()])
    blank = [""] * (len(rows[0]) - 6)
    rows += [["random initialisation", "", str(i), 0, 0, loss, *blank] for i, loss in enumerate(baseline.losses)]
    write_csv(path, rows)


def write_tis_csv(path: Path, rows: Sequence[TISRow]) -> None:
    """One line per run and setup."""
    scores = [f"tis_{s.replace(' ', '_')}" for s in rows[0].scores]
    head = ["run", "setup", "selected_epoch", "best_epoch", *scores, "spearman", "checkpoints"]
    lines = [[r.run, r.setup, r.selected, r.best, *r.scores.values(), r.spearman, r.checkpoints] for r in rows]
    write_csv(path, [head, *lines])


def plot_runs(path: Path, runs: Sequence[Run], baseline: Baseline) -> None:
    """One panel per run: loss over epochs, with the band of random initialisations (mean +- 2 SD). No shared axes, on purpose."""
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure = new_figure(5.2 * columns, 3.6 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, run in zip(axes, runs):
        baseline.plot(ax, "random initialisations")
        points = [(e, v) for e, v in run.losses.items() if math.isfinite(v)]
        if points:
            ax.plot(*zip(*points), marker="o", markersize=4, color="C2", label="checkpoints")
        best = run.best
        if best is not None:
            ax.plot(best.epoch, best.result.loss, marker="*", markersize=12, color="C3", label="lowest")
        ax.set(title=f"{run.name}", xlabel="trained (epochs or steps)", ylabel="robustness loss (lower is better)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    for ax in axes[len(runs) :]:
        ax.axis("off")
    figure.tight_layout()
    write_png(path, figure, 110)
