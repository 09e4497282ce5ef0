"""What objectives share that reconstruct hidden blocks: options, masks, network, error, optimiser, learning check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nnssl import masking
from nnssl.config import option
from nnssl.errors import NnsslError
from nnssl.heads.dino import pool_stages
from nnssl.heads.restoration import enlarge, restoration_head
from nnssl.heads.tokens import TokenDecoder
from nnssl.losses.masked import block_statistics, masked_error
from nnssl.masking.picture import MaskedPanel, masked_panel
from nnssl.networks import PrimusEncoder, encoder_channels, encoder_module, forward_features, partial_decode
from nnssl.networks.sparse import Densify, check_sparse, sparse_encoder
from nnssl.plans import Plan
from nnssl.pretrain import geometry
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods.base import Method, encoder_only, whole_network
from nnssl.pretrain.methods.panels import NOTE
from nnssl.pretrain.types import CropRequest, Curve, Level

PRIMUS_CLIP = 1.0
PRIMUS_BETAS = (0.9, 0.98)

PICTURE_NOTE = NOTE + (
    "Nothing learnt: the painted blocks are no better than the smooth filling-in from the visible ones. Learnt: edges and "
    "shapes continue through the blocks, and the mean error is lower."
)


@dataclass(frozen=True)
class MaskedConfig:
    """Options of masked reconstruction that mae and glmae share."""

    mask_ratio: float = option(0.75, "share of the blocks that is hidden", low=0.01, high=0.99)
    mask_spread: float = option(0.0, "each crop's share is drawn within mask_ratio +- this", low=0.0, high=0.5)
    block: tuple[int, ...] | None = option(None, "voxels of a block, z,y,x; auto: from the plan's strides", low=1)
    masking: str = option("dense", "hidden voxels are filled, or never computed on", choices=("dense", "sparse"))
    fill: str = option("zero", "what dense masking puts there: 0, or a learned value", choices=("zero", "learned"))
    per_channel: bool = option(False, "a mask for each channel, so that channels help each other")
    target: str = option("intensity", "what is reconstructed", choices=("intensity", "block_norm"))
    error: str = option("mse", "of the reconstruction", choices=("mse", "l1"))
    region: str = option("image", "where the error counts", choices=("image", "body"))
    mirror: bool = option(True, "mirror crops on every axis")
    optimiser: str = option(
        "auto",
        "sgd: nesterov, polynomial decay; adamw: warm-up, cosine; auto: sgd, for Primus adamw",
        choices=("auto", "sgd", "adamw"),
    )
    lr: float | None = option(
        None, "initial learning rate; auto: 0.01 (sgd), 0.0005 (adamw), 0.0003 (Primus)", low=0.0, high=10.0
    )
    weight_decay: float | None = option(None, "auto: 3e-5 (sgd), 0.05 (adamw; not on norms, biases)", low=0.0, high=1.0)
    momentum: float = option(0.99, "momentum of sgd", low=0.0, high=1.0)
    warmup: float = option(0.05, "share of the run in which adamw's learning rate rises", low=0.0, high=0.5)


M = TypeVar("M", bound=MaskedConfig)


class MaskedReconstruction(Method[M]):
    """The finest decoder output goes through a 1x1(x1) convolution to as many channels as the image has.

    The block is chosen for crops of ``request.size``.
    """

    takes_primus = True
    default_transfer = "encoder"
    transfer_reason = "a decoder trained to paint hidden blocks starts segmentation worse than a random one"

    head: nn.Module
    fill: nn.Parameter
    densify: Densify

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: M) -> None:
        super().__init__(network, plan, request, config)
        self.block = masking.choose_block(request.size, plan.cumulative_strides, block=config.block)
        if plan.is_primus:
            grid = geometry.cells(request.size, plan.total_stride)
            self.head = TokenDecoder(plan.features[0], plan.n_channels, plan.total_stride, grid, heads=plan.heads)
            self.grad_clip = PRIMUS_CLIP
            return
        self.head = restoration_head(plan.features[0], plan.n_channels, dim=plan.dim)
        if config.fill == "learned":
            self.fill = nn.Parameter(torch.zeros(1, plan.n_channels, *[1] * plan.dim))
        if config.masking == "sparse":
            check_sparse(encoder_module(network))
            self.densify = Densify(encoder_channels(plan))

    def draw_mask(self, valid: Tensor, rng: StepRNG) -> Tensor:
        """Hidden voxels ``(B, 1 or C, *size)`` bool of crops whose valid voxels are ``(B, 1, *size)`` bool."""
        c, channels = self.config, self.plan.n_channels if self.config.per_channel else 1
        eligible = masking.mostly(valid, self.block).repeat_interleave(channels, 1)
        scores = rng.uniform(0, 1, *eligible.shape[1:])
        ratio = rng.uniform(c.mask_ratio - c.mask_spread, c.mask_ratio + c.mask_spread).clamp(0.01, 0.99)
        share = ratio.repeat_interleave(channels) if c.mask_spread > 0 else c.mask_ratio
        blocks = masking.mask_blocks(scores.flatten(0, 1), share, eligible.flatten(0, 1))
        return masking.to_voxels(blocks.view_as(eligible), self.block)

    def encode(self, image: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        """Skips of the image without what ``mask`` hides; in sparse mode, and of Primus, also the places ``(B, 1, *size_s)`` of
        each that were computed. The one skip of a Primus is its map of tokens."""
        if self.plan.is_primus:
            first = (slice(None), slice(0, 1), *(slice(None, None, n) for n in self.plan.total_stride))
            visible = ~mask[first]
            return PrimusEncoder(self.network)(torch.where(mask, 0.0, image), visible), [visible]
        if self.config.masking == "sparse":
            return self._encode_sparse(image, mask)
        fill = self.fill.to(image.dtype) if self.config.fill == "learned" else 0.0
        return forward_features(self.network, torch.where(mask, fill, image), 0).skips, None

    @torch.compiler.disable
    def _encode_sparse(self, image: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with sparse_encoder(encoder_module(self.network), ~mask) as active:
            skips = forward_features(self.network, torch.where(mask, 0.0, image), 0).skips
        places = [active.at(s.shape[2:]) for s in skips]
        return self.densify(skips, active), places

    def reconstruct(self, image: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor] | None]:
        """Skips, the whole predicted image ``(B, C, *size)``, and active places as in :meth:`encode`."""
        skips, active = self.encode(image, mask)
        if self.plan.is_primus and active is not None:
            return skips, self.head(skips[0], active[0]), active
        return skips, enlarge(self.head(partial_decode(self.network, skips)[-1]), image.shape[2:]), active

    def summarise(self, skips: list[Tensor], active: list[Tensor] | None = None, stages: int = 1) -> Tensor:
        """One vector ``(B, D)`` for each image from its last skips: mean and maximum, of a Primus the mean over its tokens."""
        places = None if active is None else active[-stages:]
        return pool_stages(skips[-stages:], places, maximum=not self.plan.is_primus)

    def errors(self, prediction: Tensor, target: Tensor, mask: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """``reconstruction``; ``skipped``, the crops in which nothing is hidden; in eval also the errors of guesses.

        ``surround``: mean of the surrounding visible voxels; ``inpainting``: linear interpolation from them; ``oracle``: each
        block's true mean, in units of the target.
        """
        c, region, kind = self.config, mask & valid, self.config.error
        mean: Tensor | float = 0.0
        sd: Tensor | float = 1.0
        if c.target == "block_norm":
            mean, sd = block_statistics(target, valid, self.block)
        goal = (target - mean) / sd
        terms = {"reconstruction": masked_error(prediction, goal, region, kind=kind)}
        terms["skipped"] = (~region.flatten(1).any(1)).sum().float()
        if not self.training:
            visible = valid & ~mask
            guesses = {
                "surround": masking.surrounding_means(target, visible, self.block),
                "inpainting": masking.inpaint(target, visible),
                "oracle": masking.block_means(target, region, self.block),
            }
            terms |= {k: masked_error((v - mean) / sd, goal, region, kind=kind) for k, v in guesses.items()}
        return terms

    def pretrained_parts(self) -> dict[str, Any]:
        """Everything but the segmentation heads; of a Primus embedding and transformer."""
        return encoder_only() if self.plan.is_primus else whole_network(self.plan)

    def optimiser(self) -> torch.optim.Optimizer:
        """SGD as nnU-Net's, or AdamW without decay of norms, biases, tokens and positions.

        Learning rate and decay that are not given are those of the papers on such a network.
        """
        c, primus = self.config, self.plan.is_primus
        if not self._uses_adamw():
            lr, decay = 1e-2 if c.lr is None else c.lr, 3e-5 if c.weight_decay is None else c.weight_decay
            params, momentum = self.trained_parameters(), c.momentum
            return torch.optim.SGD(params, lr, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)
        usual = 3e-4 if primus else 5e-4
        lr, decay = usual if c.lr is None else c.lr, 0.05 if c.weight_decay is None else c.weight_decay
        trained = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        still = {n for n, p in trained if p.squeeze().ndim <= 1 or n.endswith("pos_embed")}
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in trained if n not in still]},
            {"params": [p for n, p in trained if n in still], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr, weight_decay=decay, betas=PRIMUS_BETAS if primus else (0.9, 0.999))

    def _uses_adamw(self) -> bool:
        asked = self.config.optimiser
        return self.plan.is_primus if asked == "auto" else asked == "adamw"

    def lr_factor(self, step: int, steps: int) -> float:
        """``(1 - t/T)^0.9`` for SGD; warm-up, then for U-Nets a cosine and for Primus that polynomial, for AdamW."""
        adamw = self._uses_adamw()
        warm = round(self.config.warmup * steps) if adamw else 0
        if step < warm or (adamw and not self.plan.is_primus):
            return super().lr_factor(step, steps)
        return max(0.0, 1.0 - (step - warm) / max(1, steps - warm)) ** 0.9

    def panel(self, image: Tensor, target: Tensor, mask: Tensor, valid: Tensor) -> MaskedPanel:
        """The columns of a picture for crops ``(B, C, *size)``."""
        prediction = self.reconstruct(image, mask)[1].float()
        if self.config.target == "block_norm":
            mean, sd = block_statistics(target, valid, self.block)
            prediction = prediction * sd + mean
        return masked_panel(target, prediction, mask, valid)

    def reconstruction_curve(self, prefix: str, title: str) -> Curve:
        """The panel of one reconstruction error, whose terms start with ``prefix``, beside what can be guessed unlearnt."""
        kind = {"mse": "mean squared error", "l1": "mean absolute error"}[self.config.error]
        unit = "SD of the image" if self.config.target == "intensity" else "SD of each block"
        return Curve(
            title,
            f"{kind} of the hidden voxels\n(1 = {'square of the ' if self.config.error == 'mse' else ''}{unit})",
            {f"{prefix}reconstruction": "error"},
            levels=(
                Level(f"{prefix}inpainting", "smooth filling-in, nothing learnt"),
                Level(f"{prefix}surround", "mean of what is visible around"),
                Level(f"{prefix}oracle", "true mean of each block (hard to reach)"),
            ),
            hint="learnt once the held-out line is below the upper two grey lines",
        )

    def compare(self, what: str, last: dict[str, float], prefix: str = "") -> tuple[bool, str]:
        """Verdict on one reconstruction error against its guesses, whose terms start with ``prefix``."""
        value, interpolated, around = (last[f"{prefix}{k}"] for k in ("reconstruction", "inpainting", "surround"))
        learnt = value < min(interpolated, around)
        return self.judged(
            learnt,
            f": on held-out crops the error of {what} is {value:.3g}, {'below' if learnt else 'not below both'} linear "
            f"interpolation from the visible ones ({interpolated:.3g}) and the mean around ({around:.3g}); one number per block "
            f"could reach {last[f'{prefix}oracle']:.3g}.",
        )


def check_options(config: MaskedConfig, plan: Plan) -> None:
    """Refuse options of masking that do not fit together, or the network."""
    if config.masking == "sparse" and (config.fill == "learned" or config.per_channel):
        raise NnsslError(
            "masking=sparse computes nothing where voxels are hidden: fill=learned and per_channel need dense."
        )
    if not plan.is_primus:
        return
    given = {"masking=sparse": config.masking == "sparse", "fill=learned": config.fill == "learned"}
    wrong = [text for text, asked in {**given, "per_channel=true": config.per_channel}.items() if asked]
    if wrong:
        raise NnsslError(
            f"{', '.join(wrong)}: of a {plan.network_class} hidden blocks are tokens of all channels that are left out, so that "
            "there is nothing to fill or to compute sparsely. Leave it out."
        )
    token = plan.total_stride
    if config.block is not None and any(b % t for b, t in zip(config.block, token)):
        raise NnsslError(
            f"block={','.join(map(str, config.block))}: a {plan.network_class} hides whole tokens of {geometry.size_text(token)} "
            "voxels, so that a block must be a multiple of that on each axis."
        )
