"""Global-local masked autoencoding, reconstructed: masked wide and narrow views, and a teacher that sees wide ones whole.

Zhuang et al., GL-MAE (arXiv:2306.08913; IEEE TMI 2025, doi:10.1109/TMI.2025.3569782). The authors have published no
pretraining code, and the form of the consistency, its temperatures and weights are not public: they are DINO's here
(arXiv:2104.14294), as the authors' checkpoints suggest. **This is in the style of GL-MAE, not a reproduction of it.**
``L = L_rec^g + L_rec^l + w_gg L_gg + w_lg L_lg``: reconstruction of hidden voxels as in :mod:`.mae`, for global and local
views, and cross-entropy between what a teacher (the encoder's moving average) says of the whole global view and what the
student says of the masked global and local views of the same volume.

What is known of the paper, and what is ours, is in docs/methods/glmae.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnssl import masking
from nnssl.config import option
from nnssl.errors import NnsslError
from nnssl.losses.consistency import diagnose
from nnssl.masking.picture import ERROR
from nnssl.networks import encoder_channels, encoder_module, forward_features
from nnssl.plans import Plan
from nnssl.pretrain import geometry
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.augment.box import image_box
from nnssl.pretrain.methods.base import Size, numbers_of, require_weight, weighted_sum
from nnssl.pretrain.methods.glmae.resized_crop import box_share, copy_box, resized_crop, sample_boxes
from nnssl.pretrain.methods.glmae.self_distillation import STAGES, SelfDistillation
from nnssl.pretrain.methods.mae.masked import PICTURE_NOTE, MaskedConfig, MaskedReconstruction, check_options
from nnssl.pretrain.methods.panels import found_curve
from nnssl.pretrain.methods.registry import register
from nnssl.pretrain.types import Batch, CropRequest, Crops, Curve, Picture, Progress, SourceStats
from nnssl.words import per_cent

WIDER = 1.2  # a global view that is not this much wider than a local one on any axis is no wider
LOCAL_SHARE = 0.6  # local by global view in mode B, as the paper's 96 by 160
CHECK_EVERY = 50
ALWAYS = 0.99  # where chance finds the volume this often, as with a single held-out one, nothing is said of finding it


@dataclass(frozen=True)
class GLMAEConfig(MaskedConfig):
    """Options of glmae: masking as in mae, views and consistency."""

    mirror: bool = option(False, "mirror each view on its own (left and right become alike)")
    optimiser: str = option("adamw", "adamw: warm-up, cosine; sgd: nesterov, polynomial", choices=("sgd", "adamw"))
    views: str = option(
        "auto", "A: both of one size; B: local ones 0.6 of it; auto: A where that is wider", choices=("auto", "A", "B")
    )
    global_views: int = option(1, "p, wide views of a volume; 0: none, and no teacher", low=0, high=16)
    local_views: int = option(2, "q, narrow views of a volume", low=0, high=16)
    min_zoom: float = option(1.5, "least width of a global view by the crop, if the volume has it", low=1.0, high=2.5)
    max_zoom: float = option(2.5, "largest width of a global view by the crop", low=1.0, high=2.5)
    body_share: float = option(0.25, "share of body that a view should show", low=0.0, high=1.0)
    global_weight: float = option(1.0, "weight of the global reconstruction L_rec^g", low=0.0)
    local_weight: float = option(1.0, "weight of the local reconstruction L_rec^l", low=0.0)
    gg_weight: float = option(0.1, "weight of the global-to-global consistency L_gg", low=0.0)
    lg_weight: float = option(0.1, "weight of the local-to-global consistency L_lg", low=0.0)
    ramp: float = option(0.1, "share of the run in which both consistency weights rise from 0", low=0.0, high=1.0)
    consistency: str = option(
        "ce",
        "ce: cross-entropy over prototypes; cosine, mse: of embeddings, with a predictor and a variance term",
        choices=("ce", "cosine", "mse"),
    )
    variance_weight: float = option(0.1, "weight of the variance term of cosine and mse", low=0.0)
    koleo_weight: float = option(0.02, "weight of the term that keeps embeddings of volumes apart (ce)", low=0.0)
    prototypes: int = option(4096, "K, outputs of the projectors (ce)", low=2, high=65536)
    hidden: int = option(1024, "width of the projectors' hidden layers", low=8, high=8192)
    bottleneck: int = option(256, "width of the embedding", low=2, high=4096)
    student_temperature: float = option(0.1, "tau_s", low=0.01, high=10.0)
    teacher_temperature: float = option(0.04, "tau_t", low=0.005, high=10.0)
    centre_momentum: float = option(0.99, "of the teacher's centre; 0.9 from 32 global views on", low=0.0, high=1.0)
    teacher_momentum: float = option(0.996, "mu of the teacher, rising to 1 over the run", low=0.0, high=1.0)
    standardise: bool = option(True, "standardise features and embeddings over the batch (else images hardly differ)")
    moments_momentum: float = option(0.9, "of the running moments, for use outside of training", low=0.0, high=1.0)


@register("glmae", config=GLMAEConfig)
class GLMAE(MaskedReconstruction[GLMAEConfig]):
    """See the module. Views are batched view by view: row ``j * B + i`` is view j of volume i.

    Attributes:
        weight: of the consistency, which rises over the ramp.
        balance: gradient norm of the encoder by the consistency, as a multiple of that by the reconstruction.
    """

    agreement: SelfDistillation
    weight: Tensor
    balance: Tensor

    spoken = {"gg": "agreement of large views", "lg": "of small with large views"}
    title = "global-local masked autoencoder with a teacher, reconstructed (encoder + decoder)"
    citation = (
        "Zhuang et al., Advancing Volumetric Medical Image Segmentation via Global-Local Masked Autoencoder, "
        "arXiv:2306.08913, doi:10.1109/TMI.2025.3569782",
    )
    grad_clip = 1.0
    presets = {
        "arm_a": {"global_views": 0, "gg_weight": 0.0, "lg_weight": 0.0},  # local reconstruction only
        "arm_b": {"gg_weight": 0.0, "lg_weight": 0.0},  # and global reconstruction
        "arm_c": {"lg_weight": 0.0},  # and global-to-global consistency
        "arm_d": {},  # and local-to-global consistency: everything
        "sparse": {"masking": "sparse"},
        "more_views": {"global_views": 2, "local_views": 4},
        "short": {  # hundreds to thousands of steps on hundreds of images
            **{"prototypes": 256, "hidden": 256, "bottleneck": 64, "teacher_momentum": 0.99, "centre_momentum": 0.9},
            **{"gg_weight": 0.3, "lg_weight": 0.3, "koleo_weight": 0.06, "lr": 1e-3},
        },
    }

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: GLMAEConfig) -> None:
        self.local_size = _local_size(request, plan, config)
        super().__init__(network, plan, replace(request, size=self.local_size), config)
        self.request = request
        self.consistent = config.global_views > 0 and config.gg_weight + config.lg_weight > 0
        self.register_buffer("weight", torch.tensor(0.0 if config.ramp > 0 else 1.0))
        self._measure = True
        if self.consistent:
            width = plan.features[0] if plan.is_primus else 2 * sum(encoder_channels(plan)[-STAGES:])
            self.agreement = SelfDistillation(encoder_module(network), width, config, maximum=not plan.is_primus)
            self.register_buffer("balance", torch.zeros(()))

    # ---- views ---------------------------------------------------------------------------------------------------

    @classmethod
    def crops(cls, plan: Plan, stats: SourceStats, config: GLMAEConfig, size: Size | None = None) -> CropRequest:
        """Crops of about two thirds of the image within the patch, in windows that hold a view up to ``max_zoom`` wider."""
        require_weight(config, "global_views", "local_views")
        if config.min_zoom > config.max_zoom:
            raise NnsslError(f"min_zoom={config.min_zoom} exceeds max_zoom={config.max_zoom}.")
        check_options(config, plan)
        if config.consistency != "ce" and config.gg_weight + config.lg_weight > 0 and not config.variance_weight:
            raise NnsslError(
                f"consistency={config.consistency} without a variance term puts all images at one place: set variance_weight."
            )
        if not (config.global_views and config.global_weight) and not (config.local_views and config.local_weight):
            raise NnsslError(
                "no reconstruction has a weight: the decoder would not learn. Set global_weight or local_weight."
            )
        median = stats.median_shape[-plan.dim :]
        if plan.is_primus:
            if config.views == "B":
                raise NnsslError(
                    f"views=B cuts local views smaller than the patch, which a {plan.network_class} has no positions for. Use A."
                )
            chosen, why = geometry.whole_patch(plan, size)
        else:
            chosen, why = _choose(plan, median, config, size)
        window = _window(chosen, median, config.max_zoom)
        wider = [w / s for w, s in zip(window, chosen)]
        request = CropRequest(size=chosen, read_size=window)
        local = _local_size(request, plan, config)
        why += f" Global views are up to {geometry.size_text([round(f, 2) for f in wider])} times as wide"
        why += f"; local views have {geometry.size_text(local)} voxels."
        if config.global_views and not _wider(chosen, window) and local == chosen:
            why += " The images hold nothing wider than a crop: global and local views differ in place only."
        block = masking.choose_block(local, plan.cumulative_strides, block=config.block)
        masking.choose_block(chosen, plan.cumulative_strides, block=block)
        views = config.global_views + config.local_views
        why += f" {per_cent(config.mask_ratio)} of the blocks of {geometry.size_text(block)} voxels are hidden in {views} views."
        batch = max(4, plan.batch_size)
        body = config.region == "body" or config.body_share > 0
        return CropRequest(size=chosen, read_size=window, batch_size=batch, min_batch=2, explanation=why, body=body)

    def views(self, crops: Crops, rng: StepRNG) -> Batch:
        """Global and local views of each window and their masks; see :meth:`loss` for shapes."""
        c, dim = self.config, self.plan.dim
        data, box, batch = crops.data, image_box(crops), {}
        image, body = (box.high - box.low).float(), crops.body.to(data.dtype)
        volume = numbers_of(crops.case, data.device)
        for kind, count, size in (
            ("global", c.global_views, self.request.size),
            ("local", c.local_views, self.local_size),
        ):
            made: dict[str, list[Tensor]] = {"target": [], "valid": [], "mask": [], "zoom": []}
            plain = torch.tensor([float(n) for n in size], device=data.device).expand(len(data), dim)
            for _ in range(count):
                extent, cutter = plain, copy_box
                if kind == "global":
                    factor = rng.uniform(c.min_zoom, c.max_zoom)[:, None]
                    extent, cutter = torch.maximum(torch.minimum(plain * factor, image), plain), resized_crop
                start = sample_boxes(body, box, extent, rng, least=c.body_share)
                flip = rng.chance(0.5, dim) if c.mirror else None
                seen = box_share(box, start, extent, size, flip)
                region = cutter(body, start, extent, size, flip) if c.region == "body" else seen
                # the window's padding is 0: what it adds is the lowest intensity
                made["target"].append(cutter(data, start, extent, size, flip) + box.dark * (1 - seen))
                made["valid"].append(region >= 0.5)
                made["mask"].append(self.draw_mask(made["valid"][-1], rng))
                made["zoom"].append((extent / plain).mean(1))
            if count:
                view = {k: torch.cat(v) for k, v in made.items()}
                batch[kind] = {"input": view["target"], "volume": volume.repeat(count), **view}
        return batch

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruction of both kinds of views, and consistency.

        Args:
            batch: ``global`` and ``local``, where there are such views, each with ``input`` and ``target`` ``(n B, C,
                *size)``, ``mask`` ``(n B, 1 or C, *size)`` bool, hidden, ``valid`` ``(n B, 1, *size)`` bool, ``zoom`` ``(n B,)``,
                ``volume`` ``(n B,)`` int64, equal for crops of one case.
        """
        c = self.config
        terms: dict[str, Tensor] = {}
        features: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(iter(batch.values()))["input"].device)
        for kind, weight in (("global", c.global_weight), ("local", c.local_weight)):
            if kind not in batch:
                continue
            view = batch[kind]
            skips, prediction, active = self.reconstruct(view["input"], view["mask"])
            errors = self.errors(prediction, view["target"], view["mask"], view["valid"])
            terms |= {f"{kind}_{k}": v for k, v in errors.items()}
            total = total + weight * errors["reconstruction"]
            features[kind] = self.summarise(skips, active, STAGES)
        if self.consistent:
            agreed = self.agreement(features, batch["global"]["input"])
            if not self.training and "local" in batch:
                volume = batch["local"]["volume"][: len(features["local"]) // c.local_views]
                first = batch["global"]["input"][: len(volume)]
                agreed |= self.agreement.retrieval(features["local"], first, volume)
            weights = {"gg": c.gg_weight, "lg": c.lg_weight, "variance": c.variance_weight, "koleo": c.koleo_weight}
            weighted = weighted_sum(agreed, weights)
            if self._measure and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._balance(total, weighted)
            total = total + (self.weight if self.training else 1.0) * weighted
            terms |= {**agreed, "gradient_ratio": self.balance.clone()}
        if "global" in batch:
            terms["zoom"] = batch["global"]["zoom"].mean()
        return {"total": total, **terms}

    def _balance(self, reconstruction: Tensor, agreement: Tensor) -> None:
        """Gradient norm of the encoder by the (unramped) consistency, as a multiple of that by the reconstruction."""
        params = [p for p in encoder_module(self.network).parameters() if p.requires_grad]
        norms = []
        for term in (agreement, reconstruction):
            found = torch.autograd.grad(term, params, retain_graph=True, allow_unused=True)
            norms.append(torch.stack([g.float().square().sum() for g in found if g is not None]).sum().sqrt())
        self.balance.copy_(norms[0] / norms[1].clamp_min(1e-12))
        self._measure = False

    def after_step(self, progress: Progress) -> None:
        """Teacher, centre and ramp, and every now and then a look at the teacher's health."""
        c = self.config
        self.weight.fill_(min(1.0, progress.step / max(1.0, c.ramp * progress.steps)))
        if not self.consistent:
            return
        self.agreement.follow(encoder_module(self.network), progress.step, progress.steps)
        if progress.step % CHECK_EVERY == 0:
            self._measure = True
            if progress.step >= 0.05 * progress.steps:
                problem = self.agreement.problem()
                if problem is not None:
                    self.warn_once(problem.split(":")[0], "glmae, step %d: %s", progress.step, problem)

    # ---- what a person sees --------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> Tensor:
        """The teacher's embedding of the whole global views, ``(p B, bottleneck)``; without a teacher, as mae's."""
        view = batch["global"] if "global" in batch else batch["local"]
        if self.consistent:
            return self.agreement.embed(view["input"])
        return self.summarise(forward_features(self.network, view["input"], 0).skips)

    def pictures(self, batch: Batch) -> Picture:
        """As mae's, for the first global and the first local view of each volume."""
        columns: dict[str, Any] = {}
        tags: dict[str, list[str]] = {}
        words = {"global": "large", "local": "small"}
        for kind in words:
            if kind in batch:
                view = batch[kind]
                n = min(3, len(view["input"]) // getattr(self.config, f"{kind}_views"))
                panel = self.panel(*(view[k][:n] for k in ("input", "target", "mask", "valid")))
                columns |= {f"{words[kind]} view: {k}": v for k, v in panel.columns.items() if k != ERROR}
                tags |= {f"{words[kind]} view: {k}": v for k, v in panel.tags.items()}
        note = f"{PICTURE_NOTE} A large view shows more of an image than a small one, at a coarser scale."
        title = "Most of the image is hidden; the network paints it anew, from afar and from near"
        return Picture(columns, title, note, tags=tags)

    def curves(self) -> list[Curve]:
        """Reconstruction of both kinds of views, and whether a local view is recognised as a part of its volume."""
        kinds = {"global": "large views", "local": "small views"}
        views = {"global": self.config.global_views, "local": self.config.local_views}
        made = {k: f"How well are {words} painted?" for k, words in kinds.items() if views[k]}
        shown = [self.reconstruction_curve(f"{k}_", title) for k, title in made.items()]
        unit = "small views whose most similar\nlarge view is of the same image (%)"
        return [
            *shown,
            found_curve("Is a part recognised as of its image?", unit, "retrieval", "retrieval_chance"),
        ]

    def note(self, terms: dict[str, float]) -> str:
        """How often a local view finds the global one of its volume, and by chance."""
        if "retrieval" not in terms or terms["retrieval_chance"] > ALWAYS:
            return ""
        return f"local views found {per_cent(terms['retrieval'])} ({per_cent(terms['retrieval_chance'])} by chance)"

    def verdict(self, first: dict[str, float], last: dict[str, float]) -> tuple[bool, str]:
        """Learnt: hidden voxels better than guessed, in both kinds of views. Consistency must not have collapsed."""
        kinds = [k for k in ("local", "global") if f"{k}_inpainting" in last]
        if not kinds:
            return super().verdict(first, last)
        checks = [self.compare(f"hidden voxels in {k} views", last, f"{k}_") for k in kinds]
        learnt, sentences = all(t[0] for t in checks), [t[1] for t in checks]
        if "embedding_spread" in last:
            single, mean = (last.get(f"{k}_entropy", 0.0) for k in ("teacher", "mean"))
            prototypes = self.config.prototypes if "teacher_entropy" in last else 0
            problem = diagnose(single, mean, last["embedding_spread"], prototypes)
            learnt = learnt and problem is None
            sentences.append(f"Consistency: {problem}" if problem else "The teacher tells images apart.")
        if "retrieval" in last and last["retrieval_chance"] <= ALWAYS:
            before = f", {per_cent(first['retrieval'])} before training" if "retrieval" in first else ""
            sentences.append(
                f"A local view finds the global view of its volume in {per_cent(last['retrieval'])} of the cases "
                f"({per_cent(last['retrieval_chance'])} by chance{before})."
            )
        return learnt, " ".join(sentences)


def _window(size: Sequence[int], median: Sequence[int], zoom_most: float) -> tuple[int, ...]:
    """Voxels to read: as wide as the widest view, but not wider than the median image."""
    return tuple(max(s, min(math.ceil(zoom_most * s), m)) for s, m in zip(size, median))


def _wider(size: Sequence[int], window: Sequence[int]) -> bool:
    return any(w >= WIDER * s for w, s in zip(window, size))


def _choose(plan: Plan, median: Size, config: GLMAEConfig, size: Size | None) -> tuple[Size, str]:
    """The crop of a U-Net: small enough that wider views exist, or, where none do, the patch."""
    choose = partial(geometry.choose_crop, plan.patch_size, median, plan.total_stride, size=size)
    chosen, why = choose(compare=config.views != "B")
    if config.views == "auto" and not _wider(chosen, _window(chosen, median, config.max_zoom)):
        return choose(compare=False)
    return chosen, why


def _local_size(request: CropRequest, plan: Plan, config: GLMAEConfig) -> tuple[int, ...]:
    """Voxels of a local view: the crop's (mode A), or 0.6 of them in whole bottleneck voxels, two or more in all (mode B)."""
    size, stride = request.size, plan.total_stride
    if plan.is_primus or config.views == "A" or (config.views == "auto" and _wider(size, request.read_size)):
        return tuple(size)
    # An axis of two or more cells keeps two, and a legal crop has such an axis.
    return tuple(min(n, math.ceil(LOCAL_SHARE * n / s) * s) for n, s in zip(size, stride))
