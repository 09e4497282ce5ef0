"""The transfer itself: which tensors go where."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.errors import NnsslError
from nnssl.networks import alias_map, canonical_state_dict, unwrap
from nnssl.plans import Plan
from nnssl.plans.parts import parts_for, select_parts
from nnssl.weights.adapt import Adaptation, adapt_channels
from nnssl.weights.compare import differences, image_channels, second_stage
from nnssl.weights.label_set import keep_heads
from nnssl.weights.layout import (
    describe,
    is_transformer,
    n_stages,
    shift_parts,
    shift_stages,
    stem_channels,
    stem_name,
)
from nnssl.weights.load import Checkpoint, load, read_content
from nnssl.weights.matching import count, match
from nnssl.weights.parts import HEADS, decoder_stages, part_names, part_of, wanted_parts
from nnssl.weights.refusals import check_bridgeable, check_coverage, check_promise
from nnssl.weights.report import TransferReport

_ORDER = (
    "the file does not tell which version of dynamic-network-architectures it is from; before 0.4.3 Primus counted its tokens in "
    "another order, and such weights load but mean something else"
)


def _held_parts(checkpoint: Checkpoint, names: list[str]) -> dict[str, Any]:
    """What can be taken from a file: the promise of ours, all but the heads of nnU-Net's, the encoder of MIC-DKFZ nnssl's."""
    if checkpoint.pretrained_parts is not None:
        return checkpoint.pretrained_parts
    if checkpoint.origin in ("nnU-Net", "others"):
        stages = decoder_stages(names)
        return {"encoder": True, "decoder_stages": stages}
    return {"encoder": True, "decoder_stages": []}


def _left_out(checkpoint: Checkpoint, held: dict[str, Any], taken: dict[str, Any], choice: Any) -> dict[str, str]:
    """Why each part that the file holds and that is not taken is left out."""
    why = str(checkpoint.transfer.get("why") or "")
    if isinstance(choice, str):
        reason = (
            f"{checkpoint.method}'s default{f': {why}' if why else ''}" if choice == "default" else f"parts={choice}"
        )
    else:
        reason = "not among the parts that are asked for"
    return dict.fromkeys([p for p in wanted_parts(held) if p not in wanted_parts(taken)], reason)


def _check_channels(
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    how: Adaptation,
    checkpoint: Checkpoint,
    plan: Plan | None,
    where: str,
) -> None:
    here, there = stem_channels(target), stem_channels(source)
    if here is None or there is None or here == there or describe(target).split()[0] != describe(source).split()[0]:
        return
    if second_stage(checkpoint) and how.channels in (None, "repeat"):
        n = image_channels(checkpoint)
        of = f"{n} of its {there} input channels are" if n else f"its {there} input channels are partly"
        raise NnsslError(
            f"{where} is the second stage of a cascade: {of} the image's, the others a segmentation's, which must not be mixed "
            "with them. To take the image's weights type nnssl_plan --checkpoint FILE --adapt channels=first --name NAME"
        )
    if plan is not None and plan.segmentation_channels and how.channels in (None, "repeat"):
        raise NnsslError(
            f"{where} was trained on {there} input channel{'s' * (there > 1)}; {plan.configuration}, second stage of a cascade, "
            f"takes {here - plan.segmentation_channels} of the image and {plan.segmentation_channels} of a segmentation, which "
            "must not be mixed. To take channel by channel type nnssl_plan --checkpoint FILE --adapt channels=first --name NAME"
        )
    if how.channels is None and describe(target) == describe(source):
        raise NnsslError(
            f"{where} was trained on images with {there} channel{'s' * (there > 1)}, this network takes {here}. Weights are not "
            "adapted to another number of channels unasked: pretrain on images with the channels of the target dataset, or type "
            "nnssl_plan --checkpoint FILE --adapt channels=repeat --name NAME"
        )


def _image_alone(source: dict[str, Tensor], checkpoint: Checkpoint) -> str | None:
    """Cut a second stage's first convolution to the image's channels, in place; what was done, or None where nothing was."""
    there, n = stem_channels(source), image_channels(checkpoint)
    if there is None or n is None or n >= there or not second_stage(checkpoint):
        return None
    stem = source[str(stem_name(source))]
    for name, tensor in source.items():
        if tensor.shape == stem.shape and (tensor is stem or torch.equal(tensor, stem)):
            source[name] = tensor[:, :n]
    return f"second stage of a cascade: the image's {n} of {there} input channels taken, the segmentation's left out"


def _with_segmentation(source: dict[str, Tensor], target: Mapping[str, Tensor], plan: Plan | None) -> str | None:
    """Widen the first convolution for the second stage of a cascade, in place: the image's weights, 0 for the segmentation."""
    here, there = stem_channels(target), stem_channels(source)
    if plan is None or not plan.segmentation_channels or here is None or there != here - plan.segmentation_channels:
        return None
    stem = source[str(stem_name(source))]
    for name, tensor in source.items():
        if tensor.shape == stem.shape and (tensor is stem or torch.equal(tensor, stem)):
            source[name] = adapt_channels(tensor, here, "first")[0]
    return f"second stage of a cascade: the image's {there} input channels taken, the segmentation's {here - there} begin at 0"


def _axes(value: Any, dim: int) -> list[int]:
    return [int(value)] * dim if isinstance(value, int) else [int(i) for i in value]


def _stride_notes(checkpoint: Checkpoint, network: nn.Module) -> list[str]:
    """One line for each encoder stage whose stride was another in pretraining: it is in no tensor's shape."""
    architecture = (checkpoint.adaptation_plan or {}).get("architecture_plans") or {}
    there = (architecture.get("arch_kwargs") or {}).get("strides")
    here = getattr(getattr(unwrap(network), "encoder", None), "strides", None)
    if there is None or here is None:
        return []
    pairs = [(_axes(a, len(b)), [int(i) for i in b]) for a, b in zip(there, here)]
    return [
        f"encoder stage {i}: stride {'x'.join(map(str, a))} in pretraining, {'x'.join(map(str, b))} here; weights as they are"
        for i, (a, b) in enumerate(pairs)
        if a != b
    ]


def _own_grid(network: nn.Module) -> tuple[int, ...] | None:
    """Tokens per axis of a transformer; None of a U-Net."""
    shape = getattr(getattr(getattr(unwrap(network), "eva", None), "rope", None), "feat_shape", None)
    return None if shape is None else tuple(int(n) for n in shape)


def _given_grid(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Tokens per axis in pretraining, from the patch and the size of a token; None where the file does not tell."""
    adaptation = checkpoint.adaptation_plan or {}
    configurations = list(((adaptation.get("pretrain_plan") or {}).get("configurations") or {}).values())
    nested = configurations[0].get("patch_size") if configurations and isinstance(configurations[0], Mapping) else None
    patch = checkpoint.nnssl.get("patch_size") or adaptation.get("pretrain_patch_size") or nested
    if patch is None or not is_transformer(weights):
        return None
    proj = weights.get("down_projection.proj.weight")
    token = (8, 8, 8) if proj is None else tuple(proj.shape[2:])
    return tuple(int(p) // int(t) for p, t in zip(patch, token))


def _notes(checkpoint: Checkpoint, plan: Plan | None, stale: int) -> list[str]:
    notes = list(checkpoint.remarks)
    verdict = checkpoint.verdict
    if verdict is not None and not verdict[0]:
        notes.append(f"WARNING, the pretraining's own verdict: {verdict[1]}")
    if plan is not None:
        notes += differences(checkpoint, plan)
    if stem_name(checkpoint.weights) is None and not is_transformer(checkpoint.weights):
        notes.append("the file holds no first convolution (stem); the network's stays random")
    if stale:
        notes.append(
            f"{stale} tensors have several names in the file with different values; those under 'encoder.' and 'conv'/'norm' "
            "were taken, stock nnU-Net would take the others"
        )
    made_for = checkpoint.nnssl.get("plan", {})
    if plan is not None and made_for.get("architecture_hash") not in (None, plan.architecture_hash):
        notes.append(
            f"the weights were made for another network ({made_for.get('dataset_name')}, {made_for.get('plans_name')}, "
            f"{made_for.get('configuration')}) whose shapes agree; strides or kernels may differ"
        )
    return notes


def _opened(checkpoint: Checkpoint | Mapping[str, Any] | str | os.PathLike[str]) -> Checkpoint:
    if isinstance(checkpoint, (str, os.PathLike)):
        return load(checkpoint)
    return checkpoint if isinstance(checkpoint, Checkpoint) else read_content(checkpoint, Path("<memory>"))


def _aliases_of(aliases: Mapping[str, str], names: Iterable[str]) -> dict[str, list[str]]:
    """The other names of each tensor."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for alias, name in aliases.items():
        if alias != name:
            found[name].append(alias)
    return found


def _check_finite(found: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NnsslError(f"{where} holds weights that are not finite numbers, first in '{name}'; it is not used.")


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
    where = checkpoint.title
    how = adapt if adapt is not None else Adaptation.from_metadata(plan.nnssl if plan is not None else {})
    source = dict(checkpoint.weights)
    target = canonical_state_dict(network)
    aliases = alias_map(network)
    names = _aliases_of(aliases, target)
    cut = _with_segmentation(source, target, plan)
    if cut is None and how.channels == "first":
        cut = _image_alone(source, checkpoint)
    _check_channels(target, source, how, checkpoint, plan, where)
    choice = parts_for(plan.nnssl if plan is not None else {}) if parts is None else parts
    held, lines = _held_parts(checkpoint, list(source)), [cut] if cut else []
    taken = select_parts(held, choice, str(checkpoint.transfer.get("parts") or "all"))
    if how.active:
        check_bridgeable(target, source, how, where)
        deeper = n_stages(target) - n_stages(source)
        if deeper:
            lines.append(
                f"depth: {n_stages(source)} -> {n_stages(target)} encoder stages, those of equal resolution paired"
            )
            source = shift_stages(source, deeper)
            held, taken = shift_parts(held, deeper), shift_parts(taken, deeper)
    grids, left = (_given_grid(checkpoint, source), _own_grid(network)), _left_out(checkpoint, held, taken, choice)
    decoder = {name for name in part_names(target) if name.startswith("decoder stage ")}
    whole = decoder <= set(wanted_parts(taken)) and n_stages(target) == n_stages(source)
    heads, said = keep_heads(checkpoint, plan, whole)
    matched = match(target, names, source, wanted_parts(taken) + [HEADS] * heads, how, grids, left)
    report = count(where, target, matched)
    report.left_out = {part: why for part, why in left.items() if any(row.part == part for row in report.parts)}
    report.adaptations[:0] = lines
    report.notes += [said] if said else []
    report.notes += _notes(checkpoint, plan, matched.stale) + _stride_notes(checkpoint, network)
    foreign_tokens = checkpoint.pretrained_parts is None and is_transformer(target)
    by_coverage = minimum is None and (how.active or foreign_tokens)
    if foreign_tokens:
        report.notes.append(_ORDER)
    if minimum is None:
        minimum = taken if checkpoint.pretrained_parts is not None else {"encoder": True}
    homeless = Counter(part_of(name) for name in source if name not in aliases)
    check_promise(report, [] if by_coverage else wanted_parts(minimum), network, source, homeless)
    if by_coverage:
        check_coverage(report, how)
    _check_finite(matched.found, where)
    with torch.no_grad():
        for name, tensor in matched.found.items():
            target[name].copy_(tensor)
    return report
