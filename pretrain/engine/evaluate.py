"""The held-out loss: the same crops and the same views every time, without touching training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl.distributed import gather_with_grad, mean_over_ranks
from nnssl.pretrain.augment.rng import HELD_OUT_STEP
from nnssl.pretrain.engine.place import place_shares
from nnssl.pretrain.engine.stepping import Stepper, views_in_parts
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.types import Batch, Crops


class HeldOut:
    """Evaluates a method on fixed crops.

    Args:
        batches: this rank's crops of each batch; read once and kept in memory.
        seed: the run's seed.
        device: where the method runs.
        place_crops: crops on which the share of the place is measured; 0: none.
    """

    def __init__(self, batches: Iterable[Crops], seed: int, device: torch.device, place_crops: int = 0) -> None:
        self.crops = list(batches)
        self.seed, self.device, self.place_crops = seed, device, place_crops

    def __bool__(self) -> bool:
        return bool(self.crops)

    def batch(self, method: Method, index: int) -> Batch:
        """The views of one batch."""
        crops = self.crops[index].to(self.device)
        return next(views_in_parts(method, crops, 1, self.device, self.seed, HELD_OUT_STEP + index))

    def images(self, method: Method) -> Tensor:
        """The first ``place_crops`` crops as they are."""
        found: list[Tensor] = []
        for crops in self.crops:
            if sum(map(len, found)) >= self.place_crops:
                break
            found.append(method.images(crops).to(self.device, dtype=torch.float32))
        return torch.cat(found)[: self.place_crops] if found else torch.zeros(0)

    @torch.no_grad()
    def evaluate(self, method: Method, stepper: Stepper) -> dict[str, float]:
        """Mean of each term over the batches, the place's shares, and the embedding's SD and effective rank, if there is one."""
        training = method.training
        method.eval()
        sums: dict[str, Tensor] = {}
        embeddings = []
        try:
            for index in range(len(self.crops)):
                batch = self.batch(method, index)
                with stepper.autocast():
                    terms = method(batch)
                    embedded = method.embed(batch)
                for key, value in terms.items():
                    value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
                    sums[key] = sums.get(key, torch.zeros((), device=self.device)) + value / len(self.crops)
                if embedded is not None:
                    embeddings.append(gather_with_grad(embedded.float()))
            shares = place_shares(method, self.images(method), seed=self.seed, autocast=stepper.autocast())
            sums |= {key: torch.tensor(value, device=self.device) for key, value in shares.items()}
        finally:
            method.train(training)
        values = mean_over_ranks(torch.stack(list(sums.values()))).tolist()
        out = dict(zip(sums, values))
        if embeddings:
            z = torch.cat(embeddings)
            out["embedding_sd"] = embedding_sd(z)
            out["effective_rank"] = effective_rank(z)
        return out


def embedding_sd(z: Tensor) -> float:
    """Mean SD of the coordinates of unit vectors ``(N, D)``, times sqrt(D): about 1 where spread evenly, 0 where collapsed."""
    z = F.normalize(z, dim=1)
    return float(z.std(dim=0).mean() * z.shape[1] ** 0.5)


def effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of the centred ``(N, D)`` (Roy & Vetterli 2007).

    Between 1 and min(N - 1, D).
    """
    s = torch.linalg.svdvals((z - z.mean(dim=0)).double())
    p = s / s.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * torch.log(p.clamp_min(1e-12))).sum()))
