"""Refuses weights that do not fit a network, and says what would make them fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from nnssl.errors import NnsslError, raise_problems
from nnssl.parts import ENCODER, Part, part_of
from nnssl.weights.adapt import Adaptation
from nnssl.weights.layout import Layout
from nnssl.weights.report import TransferReport


def _listed(widths: Iterable[int]) -> str:
    return ", ".join(map(str, widths))


def check_bridgeable(target: Mapping[str, Tensor], source: Mapping[str, Tensor], how: Adaptation, where: str) -> None:
    """Refuse what no adaptation can bridge, or none that was asked for, before anything is adapted."""
    here, there = Layout.of(target), Layout.of(source)
    problem = ""
    if here.kind != there.kind:
        problem = f"the checkpoint holds a {there}, the plan asks for a {here}"
    elif here.dim != there.dim:
        problem = f"the weights are {there.dim}d, the network is {here.dim}d"
    elif not here.same_widths(there):
        problem = (
            f"features per stage are {_listed(there.widths)} in the checkpoint and {_listed(here.widths)} here; widths are not "
            "adapted, since a part of the channels would feed on inputs that are not there"
        )
    elif here.blocks != there.blocks:
        problem = (
            f"it has {there.blocks} transformer blocks, the network {here.blocks}; blocks have no resolution to be "
            "paired by"
        )
    elif here.stages != there.stages and how.depth is None:
        problem = (
            f"it has {there.stages} encoder stages, the network {here.stages}; to pair them add --adapt depth=match"
        )
    raise_problems([problem] if problem else [], f"{where} cannot be adapted to this network")


def check_coverage(report: TransferReport, how: Adaptation) -> None:
    """Refuse an adapted transfer that fills less of the encoder than was asked for."""
    row = next((row for row in report.parts if row.part == ENCODER), report.total)
    if row.percent / 100 < how.coverage:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in row.reasons.most_common(3))
        raise NnsslError(
            f"{report.source} fills {row.percent:.1f} % of the parameters of the {row.part}, less than the coverage of "
            f"{100 * how.coverage:g} % that is asked for ({reasons}). If that is what you want, lower it: --coverage"
        )


def agreement(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> str:
    """How many of a file's names a network has, and how many of its shapes, under whatever names.

    ``target`` has every name of the network's tensors, as ``source`` may.
    """
    names = sum(n in target for n in source)
    shapes = [Counter(tuple(t.shape) for t in tensors.values()) for tensors in (source, target)]
    same = (shapes[0] & shapes[1]).total()
    return f"{names} of {len(source)} names and {same} of {len(source)} shapes agree"


def _mending(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> str:
    """The ``--adapt`` options that would bridge what differs; empty where none would."""
    here, there = Layout.of(target), Layout.of(source)
    if here.kind != there.kind or there.is_transformer or here.dim != there.dim:
        return ""
    if not here.widths or not there.widths or not here.same_widths(there):
        return ""
    options = []
    if there.stem is None:
        options.append("channels=skip")
    pairs = [(source[n].shape, t.shape) for n, t in target.items() if n in source and ".transpconvs." not in n]
    if any(a[:2] == b[:2] and a[2:] != b[2:] for a, b in pairs if len(a) == len(b) > 2):
        options.append("kernels=centre")
    if here.stages != there.stages:
        options.append("depth=match")
    if not options:
        return ""
    return f"What differs can be adapted: nnssl_plan --checkpoint FILE --adapt {' '.join(options)} --name NAME. "


def _other_network(here: Layout, there: Layout) -> str:
    """How the networks differ; where one class has other features per stage, how to plan a network of the file's."""
    text = f" The checkpoint holds a {there}, the plan asks for a {here}." if str(there) != str(here) else ""
    if there.is_transformer or here.kind != there.kind or here.same_widths(there):
        return text
    deeper = " --adapt depth=match" if len(there.widths) > len(here.widths) else ""
    given = ",".join(map(str, there.widths[: len(here.widths)]))
    return (
        f"{text} Features per stage are {_listed(there.widths)} in the checkpoint and {_listed(here.widths)} here; a plan "
        f"with the checkpoint's: nnssl_plan --features {given} --checkpoint FILE{deeper} --name NAME."
    )


def check_promise(
    report: TransferReport,
    promised: Iterable[Part],
    target: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    source: Mapping[str, Tensor],
) -> None:
    """Refuse a transfer that brings nothing, or less than was promised; tensors as in :func:`nnssl.weights.matching.match`."""
    homeless = Counter(part_of(name) for name in source if name not in aliases)
    rows = {row.part: row for row in report.parts}
    problems = []
    for part in promised:
        row = rows.get(part)
        if row is None:
            problems.append(f"{part}: the network has no such part")
        elif row.random:
            reason, count = row.reasons.most_common(1)[0]
            problems.append(f"{part}: {row.loaded} of {row.tensors} tensors fit ({count} x {reason})")
        elif homeless[part]:
            problems.append(f"{part}: {homeless[part]} names of the checkpoint have no place in the network")
    nothing = report.total.loaded + report.total.adapted == 0
    if not nothing and not problems:
        return
    agree = agreement({alias: target[name] for alias, name in aliases.items()}, source)
    what = (
        f"Nothing of {report.source} fits this network ({agree})."
        if nothing
        else f"{report.source} promises more than fits this network: {'; '.join(problems)}."
    )
    raise NnsslError(
        f"{what}{_other_network(Layout.of(target), Layout.of(source))} {_mending(target, source)}Pretrain with this plan, or "
        "fine-tune with the plans that it was pretrained with (-p)."
    )
