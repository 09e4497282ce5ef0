"""Refuses weights that do not fit a network, and says what would make them fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from nnssl.errors import NnsslError, raise_problems
from nnssl.networks import canonical_state_dict
from nnssl.weights.adapt import Adaptation
from nnssl.weights.layout import describe, dimensions, is_transformer, n_blocks, stem_name, widths
from nnssl.weights.report import TransferReport


def check_bridgeable(target: Mapping[str, Tensor], source: Mapping[str, Tensor], how: Adaptation, where: str) -> None:
    """Refuse what no adaptation can bridge, or none that was asked for, before anything is adapted."""
    here, there = widths(target), widths(source)
    common = min(len(here), len(there))
    problems = []
    if describe(target).split()[0] != describe(source).split()[0]:
        problems.append(f"the checkpoint holds a {describe(source)}, the plan asks for a {describe(target)}")
    elif dimensions(target) != dimensions(source):
        problems.append(f"the weights are {dimensions(source)}d, the network is {dimensions(target)}d")
    elif here[:common] != there[:common]:
        problems.append(
            f"features per stage are {', '.join(map(str, there))} in the checkpoint and {', '.join(map(str, here))} here; widths "
            "are not adapted, since a part of the channels would feed on inputs that are not there"
        )
    elif n_blocks(target) != n_blocks(source):
        problems.append(
            f"it has {n_blocks(source)} transformer blocks, the network {n_blocks(target)}; blocks have no resolution to be "
            "paired by"
        )
    elif len(here) != len(there) and how.depth is None:
        problems.append(
            f"it has {len(there)} encoder stages, the network {len(here)}; to pair them add --adapt depth=match"
        )
    raise_problems(problems, f"{where} cannot be adapted to this network")


def check_coverage(report: TransferReport, how: Adaptation) -> None:
    """Refuse an adapted transfer that fills less of the encoder than was asked for."""
    part = next((p for p in report.parts if p.part == "encoder"), report.total)
    if part.percent / 100 < how.coverage:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in part.reasons.most_common(3))
        raise NnsslError(
            f"{report.source} fills {part.percent:.1f} % of the parameters of the {part.part}, less than the coverage of "
            f"{100 * how.coverage:g} % that is asked for ({reasons}). If that is what you want, lower it: --coverage"
        )


def agreement(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> str:
    """How many of a file's names a network has, and how many of its shapes, under whatever names.

    ``target`` has every name of the network's tensors, as ``source`` may.
    """
    names = sum(n in target for n in source)
    shapes = (
        Counter(tuple(t.shape) for t in source.values()) & Counter(tuple(t.shape) for t in target.values())
    ).total()
    return f"{names} of {len(source)} names and {shapes} of {len(source)} shapes agree"


def _mending(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> str:
    """The ``--adapt`` options that would bridge what differs; empty where none would."""
    here, there = widths(target), widths(source)
    common = min(len(here), len(there))
    if describe(target).split()[0] != describe(source).split()[0] or here[:common] != there[:common] or not common:
        return ""
    if is_transformer(source) or dimensions(target) != dimensions(source):
        return ""
    options = []
    if stem_name(source) is None:
        options.append("channels=skip")
    pairs = [(source[n].shape, t.shape) for n, t in target.items() if n in source and ".transpconvs." not in n]
    if any(a[:2] == b[:2] and a[2:] != b[2:] for a, b in pairs if len(a) == len(b) > 2):
        options.append("kernels=centre")
    if len(here) != len(there):
        options.append("depth=match")
    return (
        f"What differs can be adapted: nnssl_plan --checkpoint FILE --adapt {' '.join(options)} --name NAME. "
        if options
        else ""
    )


def _other_widths(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> str:
    """Features per stage of both networks, where one class has others, and how to plan a network of the file's."""
    here, there = widths(target), widths(source)
    if not here or not there or is_transformer(source) or describe(target).split()[0] != describe(source).split()[0]:
        return ""
    common = min(len(here), len(there))
    if here[:common] == there[:common]:
        return ""
    deeper = " --adapt depth=match" if len(there) > len(here) else ""
    given = ",".join(map(str, there[: len(here)]))
    return (
        f" Features per stage are {', '.join(map(str, there))} in the checkpoint and {', '.join(map(str, here))} here; a plan "
        f"with the checkpoint's: nnssl_plan --features {given} --checkpoint FILE{deeper} --name NAME."
    )


def check_promise(
    report: TransferReport,
    promised: list[str],
    network: nn.Module,
    source: Mapping[str, Tensor],
    homeless: Mapping[str, int],
) -> None:
    """Refuse a transfer that brings nothing, or less than was promised."""
    target = canonical_state_dict(network)
    there, here = describe(source), describe(target)
    kinds = f" The checkpoint holds a {there}, the plan asks for a {here}." if there != here else ""
    kinds += _other_widths(target, source)
    problems = []
    for name in promised:
        part = next((p for p in report.parts if p.part == name), None)
        if part is None:
            problems.append(f"{name}: the network has no such part")
        elif part.random:
            reason, count = Counter(part.reasons).most_common(1)[0]
            problems.append(f"{name}: {part.loaded} of {part.tensors} tensors fit ({count} x {reason})")
        elif homeless.get(name):
            problems.append(f"{name}: {homeless[name]} names of the checkpoint have no place in the network")
    advice = f"{_mending(target, source)}Pretrain with this plan, or fine-tune with the plans that it was pretrained with (-p)."
    if report.total.loaded + report.total.adapted == 0:
        agree = agreement(network.state_dict(), source)
        raise NnsslError(f"Nothing of {report.source} fits this network ({agree}).{kinds} {advice}")
    if problems:
        raise NnsslError(
            f"{report.source} promises more than fits this network: {'; '.join(problems)}.{kinds} {advice}"
        )
