"""SimCLR (Chen et al. 2020, arXiv:2002.05709) on nnU-Net's encoder: two views of a crop attract, all other crops repel.

Differs from the paper: views by small rotations and intensity changes, since crops have no colour; the projector sees features
standardised over the batch, since InstanceNorm makes averages equal for every image.
"""

from dataclasses import dataclass

import torch

from nnssl.distributed import gather_with_grad
from nnssl.heads import ImageHead
from nnssl.losses import supcon
from nnssl.networks import forward_features
from nnssl.pretrain import geometry
from nnssl.pretrain.augment import random_affine, random_jitter
from nnssl.pretrain.methods import CropRequest, Method, option, register


@dataclass(frozen=True)
class SimCLRConfig:
    temperature: float = option(0.1, "of the similarities", low=0.01)
    jitter: float = option(0.4, "largest change of brightness and contrast", low=0.0, high=0.9)
    proj_dim: int = option(128, "width of the projection", low=2)
    lr: float = option(1e-3, "initial learning rate", low=0.0)
    weight_decay: float = option(1e-4, "of AdamW", low=0.0)
    warmup: float = option(0.05, "share of the run", low=0.0, high=1.0)


@register("simclr", config=SimCLRConfig)
class SimCLR(Method):
    title = "SimCLR: instance discrimination between crops"
    citation = (
        "Chen et al. 2020, A simple framework for contrastive learning of visual representations, arXiv:2002.05709",
    )

    def __init__(self, network, plan, request, config):
        super().__init__(network, plan, request, config)
        cells = geometry.cells(request.size, plan.total_stride)
        self.head = ImageHead(plan.features[-1], cells, out=config.proj_dim, batch_standardise=True)

    @classmethod
    def crops(cls, plan, stats, config, size=None):
        median = stats.median_shape[-plan.dim :]
        size, why = geometry.choose_crop(plan.patch_size, median, plan.total_stride, size=size)
        return CropRequest(size, read_size=size, batch_size=16, min_batch=4, explanation=why)

    def views(self, crops, rng):
        change = dict.fromkeys(("brightness", "contrast"), (1 - self.config.jitter, 1 + self.config.jitter))
        turned = [random_affine(crops.data, rng, self.request.size, self.plan.spacing).data for _ in range(2)]
        return {k: random_jitter(x, crops.intensity, rng, **change) for k, x in zip("ab", turned)}

    def project(self, x):
        return gather_with_grad(self.head(forward_features(self.network, x, 0).skips[-1]))

    def loss(self, batch):
        a, b = self.project(batch["a"]), self.project(batch["b"])
        own, tau = torch.eye(len(a), dtype=torch.bool, device=a.device), self.config.temperature
        return {"total": supcon(a, b, own, temperature=tau, base_temperature=tau)}

    def pretrained_parts(self):
        return {"encoder": True, "decoder_stages": []}
