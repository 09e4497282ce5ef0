"""TIS, the transferability indicator score: how good is the checkpoint that an indicator would have chosen?

For a setup with downstream quality ``Q(e)`` (mean Dice over seeds) of checkpoints ``e``, and the checkpoint ``e*`` that an
indicator selects::

    TIS = Q(e*) / max over e of Q(e)

It needs a fine-tuning of *every* checkpoint: it judges an indicator and cannot be computed in production. It is also
compressive (a random pick scores 0.97 on the public figures): never report it without :func:`baselines`.
Hidy, Bakos, Lukács 2024, arXiv:2410.18677.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnssl.errors import NnsslError
from nnssl.transferability.stopper import Stopper

Curve = Mapping[int, float]


@dataclass(frozen=True)
class TISSummary:
    """TIS over several setups.

    Attributes:
        mean, minimum: over the setups where TIS is defined; NaN without any.
        n: setups that count.
        undefined: setups left out, because no checkpoint has a positive quality or none could be selected.
    """

    mean: float
    minimum: float
    n: int
    undefined: int


@dataclass(frozen=True)
class OnlineChoice:
    """What the stopper would have done on a recorded trace.

    Attributes:
        selected: epoch of the best candidate, None without one.
        stopped: last epoch that would have been trained.
    """

    selected: int | None
    stopped: int


def select_robust(losses: Curve) -> int | None:
    """The epoch with the lowest finite robustness loss, the earliest of equals; None where none is finite."""
    finite = {e: v for e, v in losses.items() if math.isfinite(v)}
    return min(finite, key=lambda e: (finite[e], e)) if finite else None


def select_best(quality: Curve) -> int | None:
    """The epoch with the highest finite quality, the earliest of equals: the oracle. None where none is finite."""
    return select_robust({e: -v for e, v in quality.items()})


def select_online(losses: Curve, *, patience: int, start: int = 1) -> OnlineChoice:
    """Run the :class:`Stopper` over a recorded trace, as if training had stopped where it asks to.

    ``start`` is the first epoch that is a candidate; 0 lets the untrained network win.
    """
    if not losses:
        raise NnsslError("an empty robustness trace has nothing to select from.")
    stopper = Stopper(patience=patience, warmup=start, allow_epoch0=start == 0)
    epoch = 0
    for epoch in sorted(losses):
        stopper.update(epoch, losses[epoch])
        if stopper.stop:
            break
    return OnlineChoice(stopper.best_epoch, epoch)


def tis(quality: Curve, selected: int | None) -> float:
    """TIS of one setup: in (0, 1], 1 where the selected epoch ties the best; NaN where no quality is positive or none selected.

    Args:
        quality: epoch -> downstream quality, mean over seeds, higher is better.
        selected: the epoch that the indicator chose, None where it chose none.

    Raises:
        NnsslError: where the selected epoch has no quality.
    """
    if selected is None:
        return math.nan
    if selected not in quality:
        known = ", ".join(map(str, sorted(quality)))
        raise NnsslError(f"epoch {selected} was selected but has no downstream result; results exist for {known}.")
    best = max((v for v in quality.values() if math.isfinite(v)), default=0.0)
    return quality[selected] / best if best > 0 else math.nan


def summarise(values: Sequence[float]) -> TISSummary:
    """Mean and minimum of the defined values, with a count of the others."""
    kept = [v for v in values if math.isfinite(v)]
    mean = sum(kept) / len(kept) if kept else math.nan
    return TISSummary(mean, min(kept, default=math.nan), len(kept), len(values) - len(kept))


def baselines(quality: Curve) -> dict[str, float]:
    """What TIS must be compared with, each a TIS of the same setup.

    ``no pretraining``: epoch 0, NaN where it was not fine-tuned; ``last``: the longest pretraining; ``random pick``: the
    expectation over all epochs; ``random pick, trained``: without epoch 0.
    """

    def expected(epochs: Sequence[int]) -> float:
        values = [tis(quality, e) for e in epochs]
        return sum(values) / len(values) if values else math.nan

    return {
        "no pretraining": tis(quality, 0) if 0 in quality else math.nan,
        "last": tis(quality, max(quality, default=None)),
        "random pick": expected(list(quality)),
        "random pick, trained": expected([e for e in quality if e > 0]),
    }


def rank_correlation(losses: Curve, quality: Curve) -> float:
    """Spearman's rho of the robustness *score* (minus the loss) and the quality over the epochs that have both.

    Positive where more robust is better; NaN with fewer than three epochs or a constant curve.
    """
    epochs = sorted(e for e in losses if e in quality and math.isfinite(losses[e]) and math.isfinite(quality[e]))
    x, y = [-losses[e] for e in epochs], [quality[e] for e in epochs]
    if len(epochs) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan
    from scipy.stats import spearmanr  # takes a second to import

    return float(spearmanr(x, y)[0])
