"""Plain sentences for what the tables say: the answer of each comparison, and how to read each column."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from nnssl.experiments.summary import verdict
from nnssl.experiments.tables import NOTHING, baseline_of, labels_text, means, plus_minus

EXPLANATIONS = (
    "**Dice** is nnU-Net's: per label the mean over all test cases, then the mean over labels, then the mean over "
    "seeds. **±** is the standard deviation over seeds (n − 1); a seed draws other labelled cases and "
    "trains anew. It says how far one training may lie from another, not how sure the mean is.",
    "**Gain over scratch** is paired by seed: scratch has seen the same labelled cases. Its ± is the deviation of "
    "the seeds' gains. Where an experiment has no scratch, its first method takes that place.",
    "**95 % interval**: percentile bootstrap over the test cases (10,000 samples; the same cases are drawn for "
    "all seeds and both methods). It says what other test cases of this kind would have given **for these "
    "trainings**; it knows nothing of other seeds or other pretrainings. With few test cases it is too short: "
    "with 10 it holds the truth about 90 times in 100.",
    "**p**: Wilcoxon's signed-rank test over test cases, one difference per case (mean over seeds and labels). "
    "**p (Holm)** is adjusted for all comparisons of this report. With 5 cases or fewer p cannot fall below 0.05, "
    "whatever the difference.",
    "**Label factor**: scratch needs this many times the labels for the same Dice, read from the line through "
    "scratch's points on a log axis; in brackets its 95 % interval over test cases. **>** and **<**: beyond what "
    "was measured.",
    "**Epochs / scratch**: after how many epochs of fine-tuning the training curve of the method, and of scratch "
    "itself, reaches what scratch ends with (a running mean of the pseudo Dice, averaged over runs). The pseudo "
    "Dice is measured on patches during training; it is no test result.",
    "A method is called better only where all three agree: the interval, the adjusted p, and every seed. One "
    "pretraining per method is one sample: other seeds of the pretraining are not in any of these numbers, unless "
    "the experiment says so.",
)


_SAID = {
    "better": "better than {base}",
    "worse": "worse than {base}",
    "unclear": "no clear difference from {base}",
    "one seed": "different on these cases, but one seed cannot tell a method from luck",
}


def answers(rows: pd.DataFrame) -> list[str]:
    """One sentence per number of labels of a setting: the baseline's Dice, and the methods' gains with their intervals, by
    verdict."""
    out, base = [], baseline_of(rows)
    for labels, of in means(rows).groupby("labels", sort=False):
        scratch = of[(of["method"] == base) & of["measured"]]["dice"]
        compared = of[of["cases"].notna()].sort_values("dice", ascending=False, kind="stable")
        said: dict[str, list[str]] = {}
        for r in compared.itertuples():
            said.setdefault(verdict(r), []).append(f"`{r.method}` {_gain(r)}")
        parts = [f"{text.format(base=base)}: {', '.join(said[kind])}" for kind, text in _SAID.items() if kind in said]
        head = f"**{labels_text(labels)}**" + (
            f", {base} {plus_minus(scratch.iloc[0])} % Dice: " if len(scratch) else ": "
        )
        if parts or len(scratch):
            out.append(head + ("; ".join(parts) or "nothing to compare yet") + ".")
    return out


def _gain(row: Any) -> str:
    if math.isnan(row.gain):
        return NOTHING
    return f"{row.gain:+.1f} ({row.gain_low:+.1f} to {row.gain_high:+.1f})"
