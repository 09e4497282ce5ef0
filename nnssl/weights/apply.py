"""The transfer itself: which tensors go where."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.errors import NnsslError
from nnssl.networks import alias_map, canonical_state_dict, unwrap
from nnssl.parts import DECODER, ENCODER, HEADS, Part, part_names, promised_parts
from nnssl.plans import Plan
from nnssl.plans.parts import parts_for, select_parts
from nnssl.weights.adapt import Adaptation
from nnssl.weights.channels import fit_channels
from nnssl.weights.compare import notes, trained_on
from nnssl.weights.label_set import keep_heads
from nnssl.weights.layout import Layout, shift_parts, shift_stages
from nnssl.weights.load import Checkpoint, load, read_content
from nnssl.weights.matching import Rules, count, match
from nnssl.weights.refusals import check_bridgeable, check_coverage, check_promise
from nnssl.weights.report import TransferReport

_ORDER = (
    "the file does not tell which version of dynamic-network-architectures it is from; before 0.4.3 Primus counted its tokens in "
    "another order, and such weights load but mean something else"
)


def apply(
    network: nn.Module,
    checkpoint: Checkpoint | Mapping[str, Any] | str | os.PathLike[str],
    plan: Plan | None = None,
    minimum: Mapping[str, Any] | None = None,
    adapt: Adaptation | None = None,
    parts: str | Mapping[str, Any] | None = None,
) -> TransferReport:
    """Copy a checkpoint's pretrained parts into a network, in place.

    Each tensor is known by one name (``encoder...conv``), so that no stale alias can win. Segmentation heads are copied where
    the checkpoint has learnt the plan's very label set (:mod:`nnssl.weights.label_set`); other heads and decoder stages that were
    not pretrained keep the network's own initialisation, as do pretrained parts that are left out on purpose
    (``parts``): the report names them and why. Nothing is copied where an error is raised.

    Args:
        network: a network of nnU-Net's, also wrapped by DDP or torch.compile, on any device.
        checkpoint: a loaded checkpoint, its path, or a payload.
        plan: the network's plan, for notes about weights made for another one.
        minimum: parts that must be complete, as ``{"encoder": bool, "decoder_stages": [indices]}``; by default those of
            the checkpoint's promise that are taken, and the encoder for files of others; where something is adapted, the coverage
            counts instead.
        adapt: what may be adapted to a network that differs; by default what the plan says, and nothing without one.
        parts: which of the pretrained parts are taken: ``"default"`` (what the method found best for segmentation, as the
            checkpoint tells it), ``"encoder"``, ``"encoder+bottom"``, ``"all"``, or ``{"encoder": bool, "decoder_stages":
            [indices]}``; by default what the plan says (:func:`nnssl.plans.parts.parts_for`).

    Raises:
        NnsslError: nothing fits, parts that are not there, less than the minimum or the coverage, another number of channels,
            another width, or weights that are not finite.
    """
    checkpoint = _opened(checkpoint)
    metadata = {} if plan is None else plan.nnssl
    how = Adaptation.from_metadata(metadata) if adapt is None else adapt
    source, target, aliases = dict(checkpoint.weights), canonical_state_dict(network), alias_map(network)
    done = fit_channels(source, target, checkpoint, plan, how)
    chosen = _choose(checkpoint, parts_for(metadata) if parts is None else parts)
    if how.active:
        check_bridgeable(target, source, how, checkpoint.title)
        source, chosen, lines = _pair_depths(source, target, chosen)
        done += lines
    heads, remarks = keep_heads(checkpoint, plan, _whole_decoder(source, target, chosen.taken))
    taken = [*chosen.taken, HEADS] if heads else chosen.taken
    grids = _given_grid(checkpoint, source), _own_grid(network)
    matched = match(target, aliases, source, Rules(taken, chosen.left_out, how, grids))
    report = count(checkpoint.title, target, matched)
    report.left_out = {row.part: chosen.left_out[row.part] for row in report.parts if row.part in chosen.left_out}
    report.adaptations[:0] = done
    report.notes = remarks + notes(checkpoint, plan, network, matched.stale)
    foreign = checkpoint.pretrained_parts is None
    foreign_tokens = foreign and Layout.of(target).is_transformer
    if foreign_tokens:
        report.notes.append(_ORDER)
    by_coverage = minimum is None and (how.active or foreign_tokens)
    if minimum is not None:
        needed = promised_parts(minimum)
    elif by_coverage:
        needed = []
    else:
        needed = [ENCODER] if foreign else chosen.taken
    check_promise(report, needed, target, aliases, source)
    if by_coverage:
        check_coverage(report, how)
    _check_finite(matched.found, checkpoint.title)
    with torch.no_grad():
        for name, tensor in matched.found.items():
            target[name].copy_(tensor)
    return report


def _opened(checkpoint: Checkpoint | Mapping[str, Any] | str | os.PathLike[str]) -> Checkpoint:
    if isinstance(checkpoint, (str, os.PathLike)):
        return load(checkpoint)
    return checkpoint if isinstance(checkpoint, Checkpoint) else read_content(checkpoint, Path("<memory>"))


@dataclass(frozen=True)
class _Chosen:
    """The pretrained parts that are taken, and why the others that the file holds are not."""

    taken: list[Part]
    left_out: dict[Part, str]


def _choose(checkpoint: Checkpoint, choice: str | Mapping[str, Any]) -> _Chosen:
    """What is taken: of ours among what the file promises, of nnU-Net's all but the heads, of MIC-DKFZ nnssl's the encoder."""
    if checkpoint.pretrained_parts is not None:
        held = promised_parts(checkpoint.pretrained_parts)
    elif checkpoint.origin in ("nnU-Net", "others"):
        held = [ENCODER, *_decoder(checkpoint.weights)]
    else:
        held = [ENCODER]
    taken = select_parts(held, choice, str(checkpoint.transfer.get("parts") or "all"))
    why = str(checkpoint.transfer.get("why") or "")
    if not isinstance(choice, str):
        reason = "not among the parts that are asked for"
    elif choice == "default":
        reason = f"{checkpoint.method}'s default{f': {why}' if why else ''}"
    else:
        reason = f"parts={choice}"
    return _Chosen(taken, {part: reason for part in held if part not in taken})


def _decoder(names: Iterable[str]) -> list[Part]:
    return [part for part in part_names(names) if part.kind == DECODER]


def _pair_depths(
    source: dict[str, Tensor], target: Mapping[str, Tensor], chosen: _Chosen
) -> tuple[dict[str, Tensor], _Chosen, list[str]]:
    """Weights and parts renamed so that stages of equal resolution have the same names, and a line where that was needed."""
    there, here = Layout.of(source).stages, Layout.of(target).stages
    if here == there:
        return source, chosen, []
    left_out = {p: why for part, why in chosen.left_out.items() for p in shift_parts([part], here - there)}
    shifted = _Chosen(shift_parts(chosen.taken, here - there), left_out)
    line = f"depth: {there} -> {here} encoder stages, those of equal resolution paired"
    return shift_stages(source, here - there), shifted, [line]


def _whole_decoder(source: Mapping[str, Tensor], target: Mapping[str, Tensor], taken: list[Part]) -> bool:
    """Whether the network's whole decoder is taken."""
    return set(_decoder(target)) <= set(taken) and Layout.of(source).stages == Layout.of(target).stages


def _own_grid(network: nn.Module) -> tuple[int, ...] | None:
    """Tokens per axis of a transformer; None of a U-Net."""
    shape = getattr(getattr(getattr(unwrap(network), "eva", None), "rope", None), "feat_shape", None)
    return None if shape is None else tuple(int(n) for n in shape)


def _given_grid(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Tokens per axis in pretraining, from the patch and the size of a token; None where the file does not tell."""
    if not Layout.of(weights).is_transformer:
        return None
    crop = checkpoint.nnssl.get("patch_size") or (checkpoint.adaptation_plan or {}).get("pretrain_patch_size")
    patch = crop or trained_on(checkpoint).get("patch_size")
    if patch is None:
        return None
    proj = weights.get("down_projection.proj.weight")
    token = (8, 8, 8) if proj is None else tuple(proj.shape[2:])
    return tuple(int(p) // int(t) for p, t in zip(patch, token))


def _check_finite(found: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NnsslError(f"{where} holds weights that are not finite numbers, first in '{name}'; it is not used.")
