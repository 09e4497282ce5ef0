"""The linear layer: logistic regression on standardised features, fitted to its minimum.

It is fitted on as many voxels of each label as of any other, which a rare class needs. That says nothing on how frequent the
classes are, so the bias is then moved towards their true frequencies as far as gives the highest Dice on the labelled cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nnssl.probe.cases import Classes

DECAY = 0.3
"""Weight of half the squared weights (of standardised features) beside the mean cross entropy."""
STEPS = 100
MOVES = 11


@dataclass(frozen=True, eq=False)
class Samples:
    """Voxels of one case.

    Attributes:
        features: ``(N, F)`` float32.
        labels: ``(N,)`` label values.
        stands: ``(N,)`` voxels of the case that each stands for.
    """

    features: Tensor
    labels: np.ndarray
    stands: Tensor


@dataclass(frozen=True, eq=False)
class Linear:
    """``logits = weight @ features + bias``.

    Attributes:
        weight: ``(K, F)``. bias: ``(K,)``.
    """

    weight: Tensor
    bias: Tensor

    def block(self, first: int, end: int) -> Tensor:
        """Weights ``(K, end - first)`` of some columns; 0 for columns that the layer does not see."""
        found = self.weight[:, first:end]
        return functional.pad(found, (0, end - first - found.shape[1]))

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, F)``."""
        return features @ self.weight.T + self.bias


def fit(samples: Sequence[Samples], classes: Classes, columns: int, device: torch.device) -> Linear:
    """Fit the layer.

    Args:
        samples: of each labelled case.
        classes: what is segmented.
        columns: features that it sees, the first ones.
        device: where it is fitted.
    """
    features = torch.cat([s.features[:, :columns] for s in samples]).to(device)
    labels = np.concatenate([s.labels for s in samples])
    stands = torch.cat([s.stands for s in samples]).to(device)
    found = torch.from_numpy(classes.targets(labels)).to(device)
    targets = found.T.float() if classes.regions else functional.one_hot(found, classes.n_outputs).float()
    weights = _balanced(labels).to(device)
    mean = (weights[:, None] * features).sum(0)
    scale = (weights[:, None] * (features - mean) ** 2).sum(0).sqrt()
    scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)  # a feature that never changes tells nothing
    weight, bias = _minimise((features - mean) / scale, targets, weights, classes)
    weight = weight / scale
    layer = Linear(weight.cpu(), (bias - weight @ mean).cpu())
    move = _towards(targets, weights, stands / stands.sum(), classes).cpu()
    logits, targets, stands = layer(features.cpu()), targets.cpu(), stands.cpu()
    moves = [i / (MOVES - 1) for i in range(MOVES)]
    dice = [_dice(logits + m * move, targets, stands, classes) for m in moves]
    return Linear(layer.weight, layer.bias + moves[int(np.argmax(dice))] * move)


def _balanced(labels: np.ndarray) -> Tensor:
    """Weights that sum to 1, the same sum for each label value."""
    values, place, count = np.unique(labels, return_inverse=True, return_counts=True)
    return torch.from_numpy(1.0 / (len(values) * count[place])).float()


def _minimise(x: Tensor, targets: Tensor, weights: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
    weight = x.new_zeros(targets.shape[1], x.shape[1]).requires_grad_()
    bias = x.new_zeros(targets.shape[1]).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        logits = x @ weight.T + bias
        if classes.regions:
            each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        else:
            each = -(targets * logits.log_softmax(1)).sum(1)
        loss = (weights * each).sum() + 0.5 * DECAY * (weight**2).sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach(), bias.detach()


def _towards(targets: Tensor, balanced: Tensor, true: Tensor, classes: Classes) -> Tensor:
    """What to add to the bias to go from balanced classes to their true frequencies."""
    tiny = 1e-6
    shown, real = ((w[:, None] * targets).sum(0).clamp(tiny, 1 - tiny) for w in (balanced, true))
    return real.logit() - shown.logit() if classes.regions else real.log() - shown.log()


def _dice(logits: Tensor, targets: Tensor, stands: Tensor, classes: Classes) -> float:
    """Mean Dice of the foreground classes over the voxels that the samples stand for."""
    if classes.regions:
        said, true = logits > 0, targets > 0
    else:
        winner = functional.one_hot(logits.argmax(1), classes.n_outputs)
        said, true = winner[:, 1:] > 0, targets[:, 1:] > 0
    there = true.any(0)
    w = stands[:, None]
    both = (w * (said & true)).sum(0)
    dice = 2 * both / ((w * said).sum(0) + (w * true).sum(0)).clamp_min(1e-9)
    return float(dice[there].mean()) if bool(there.any()) else 0.0
