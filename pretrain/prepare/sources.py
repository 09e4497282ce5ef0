"""From dataset names to a set of preprocessed cases: what is there is used, what is missing is preprocessed."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes

from nnssl.collector import paused_collector
from nnssl.errors import NnsslError
from nnssl.paths import preprocessed_folder
from nnssl.plans import Plan, dataset_id
from nnssl.preprocessed import case_names
from nnssl.pretrain.data.case_set import BadCase, CaseRef, CaseSet, make_case_set
from nnssl.pretrain.data.folders import beside, own_folder
from nnssl.pretrain.prepare.channels import match_channels
from nnssl.pretrain.prepare.index import Entry, Index, write_report
from nnssl.pretrain.prepare.leaks import duplicates, find_leaks, list_test_images, test_hashes, warn_of_leaks
from nnssl.pretrain.prepare.manifest import Manifest
from nnssl.pretrain.prepare.parts import Part
from nnssl.pretrain.prepare.preprocess import done_cases, preprocess_source
from nnssl.pretrain.prepare.raw import RawCase, RawSource, list_raw
from nnssl.pretrain.prepare.selection import select
from nnssl.pretrain.prepare.shapes import fingerprint_shapes, header_shapes
from nnssl.words import counted

log = logging.getLogger("nnssl")

NAMED = 10

SIZED_CASES = 5000
"""Up to so many files of nnU-Net's are asked for their size at a start, to see whether their content is still the same."""


@dataclass
class _Source:
    """One dataset on its way into the case set.

    Attributes:
        name: of the dataset.
        folder: of its preprocessed cases.
        names: its cases.
        raw: raw images to preprocess; None where the folder is used as it is.
        entries: index lines, of the cases that are used.
        manifest: what is to be remembered of all its cases, with its state before they were looked at.
        listed: all its raw images, where they were looked at.
        unsettled: where its cases are known from the manifest, those that have to be looked at.
    """

    name: str
    folder: Path
    names: set[str]
    raw: dict[str, RawCase] | None = None
    bad: list[BadCase] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    pending: int = 0
    manifest: tuple[Manifest, dict[str, Any]] | None = None
    listed: dict[str, RawCase] = field(default_factory=dict)
    unsettled: set[str] = field(default_factory=set)

    def refs(self) -> list[CaseRef]:
        return [CaseRef(name, self.folder, self.name) for name in self.names]


def _as_it_is(plan: Plan, source: str) -> _Source | None:
    """The plan's own dataset, preprocessed by nnU-Net: a listing, nothing is opened."""
    folder = preprocessed_folder() / plan.dataset_name / plan.data_identifier
    if source != plan.dataset_name or not folder.is_dir():
        return None
    files = {entry.name for entry in os.scandir(folder)}
    names = set(case_names(files))
    if not names:
        if any(f.endswith(".npz") for f in files):
            log.warning("%s was preprocessed by an older nnU-Net (.npz files), which is not read here.", folder)
        return None
    bad = [
        BadCase(
            n, str(folder / f"{n}.pkl"), "the file is missing: nnU-Net's preprocessing was interrupted; run it again"
        )
        for n in sorted(names)
        if f"{n}.pkl" not in files
    ]
    return _Source(source, folder, names, bad=bad)


def _own(plan: Plan, source: str, allow_mismatch: bool) -> _Source:
    """A dataset that is to be preprocessed, or has been, into a folder of its own."""
    folder = own_folder(plan, source)
    manifest = Manifest(source, folder)
    state = manifest.state()
    raw = list_raw(source, plan)
    same = source == plan.dataset_name
    if raw is None:
        done = done_cases(folder)
        if not done:
            number = dataset_id(source)
            advice = f" Or preprocess it: nnUNetv2_preprocess -d {number} -c {plan.configuration}" if same else ""
            raise NnsslError(
                f"{source} is not preprocessed for {plan.plans_name} {plan.configuration}, and its raw images "
                f"(nnUNet_raw/{source}/imagesTr) are not there.{advice}"
            )
        index = Index(beside(folder, "index.jsonl"))
        entries = {n: e for n, e in index.entries.items() if n in done and not e.bad}
        log.warning("%s has no raw images here: its %d preprocessed cases are used, unchecked.", source, len(done))
        return _Source(source, folder, set(done), entries=entries)
    if same:
        log.info(
            "%s is not preprocessed for %s: its images are preprocessed without labels.", source, plan.configuration
        )
    else:
        order = match_channels(raw, source, plan, allow_mismatch=allow_mismatch)
        if order is not None:
            raw.cases = {n: _reorder(c, order, source) for n, c in raw.cases.items()}
        manifest.order = order
    names = set(raw.cases) | {b.case for b in raw.bad}
    manifest.misfits, manifest.n_channels, manifest.channel_names = list(raw.bad), raw.n_channels, raw.channel_names
    found = _Source(source, folder, names, raw=raw.cases, bad=raw.bad, listed=raw.cases)
    found.manifest = manifest, state
    return found


def _remembered(plan: Plan, source: str, allow_mismatch: bool, retry_bad: bool) -> _Source | None:
    """A source that an earlier start has looked at (see ``manifest.py``); None where it must be looked at."""
    folder = own_folder(plan, source)
    known = Manifest.read(source, folder)
    if known is None:
        return None
    if source != plan.dataset_name:
        raw = RawSource(n_channels=known.n_channels, channel_names=known.channel_names)
        if match_channels(raw, source, plan, allow_mismatch=allow_mismatch) != known.order:
            return None
    bad = [*known.misfits, *(BadCase(e.name, e.bad_file, e.bad) for e in known.entries.values() if e.bad)]
    names = {*known.entries, *known.waiting, *(b.case for b in known.misfits)}
    good = {n: e for n, e in known.entries.items() if not e.bad}
    unsettled = {*known.waiting, *((n for n, e in known.entries.items() if e.bad) if retry_bad else ())}
    return _Source(source, folder, names, bad=bad, entries=good, unsettled=unsettled)


def _remember(source: _Source) -> None:
    """Write down what is done of all cases of a source, so that the next start need not look at each."""
    if source.manifest is None:
        return
    manifest, before = source.manifest
    state = manifest.state()
    raw = {path: time for path, time in state["times"].items() if path != str(source.folder)}
    if any(before["times"].get(path) != time for path, time in raw.items()):
        return  # images came or went while others were preprocessed
    entries, done = Index(beside(source.folder, "index.jsonl")).entries, done_cases(source.folder)
    for name, case in source.listed.items():
        entry = entries.get(name)
        if entry is not None and entry.files == case.stamps and (entry.bad or name in done):
            manifest.entries[name] = entry
        else:
            manifest.waiting.append(name)
    manifest.write(state)


def _reorder(case: RawCase, order: Sequence[int], source: str) -> RawCase:
    if len(case.files) == 1 and len(order) > 1:
        raise NnsslError(f"{source} holds all channels in one file per case; they cannot be put into another order.")
    return replace(case, files=tuple(case.files[i] for i in order), stamps=tuple(case.stamps[i] for i in order))


def _shapes(source: _Source, plan: Plan) -> list[Sequence[int]]:
    if source.entries:
        return [e.shape for e in source.entries.values()]
    if source.raw is not None:
        return list(header_shapes(source.raw, plan))
    return list(fingerprint_shapes(plan))


def _use(
    source: _Source,
    plan: Plan,
    chosen: set[str],
    preprocess: bool,
    n_processes: int,
    skip_bad: bool,
    part: Part | None = None,
    thorough: bool = False,
) -> None:
    """Reduce a source to the chosen cases and preprocess what is missing of them."""
    source.bad = [b for b in source.bad if b.case in chosen]
    source.names = chosen - {b.case for b in source.bad}
    if source.raw is None:
        source.entries = {n: e for n, e in source.entries.items() if n in source.names}
        return
    source.raw = {n: c for n, c in source.raw.items() if n in source.names}
    if not preprocess:
        index, done = Index(beside(source.folder, "index.jsonl")), done_cases(source.folder)
        source.entries = {
            n: e for n, e in index.entries.items() if n in done and n in source.raw and e.files == source.raw[n].stamps
        }
        source.pending = len(source.raw) - len(source.entries)
        return
    source.entries, bad = preprocess_source(
        plan,
        source.name,
        source.raw,
        n_processes=n_processes,
        retry_bad=not skip_bad,
        part=part.label if part is not None else "",
        thorough=thorough,
    )
    source.bad += bad
    source.names = set(source.entries)


def _settle_bad(
    sources: Sequence[_Source], skip_bad: bool, write: bool, part: Part | None = None
) -> tuple[list[BadCase], list[Path]]:
    """Write the reports; raise one error that names all bad images unless they are to be skipped."""
    bad, reports = [], []
    name = "report.csv" if part is None else f"report_{part.label}.csv"
    for source in sources:
        source.bad.sort(key=lambda b: (b.case, b.file))
        bad += [replace(b, case=f"{source.name}/{b.case}") if len(sources) > 1 else b for b in source.bad]
        if write and (source.raw is not None or source.bad):
            report = write_report(beside(source.folder, name), source.bad)
            reports += [report] if report else []
    if not bad:
        return bad, reports
    lines = [f"  - {b}" for b in bad[:NAMED]] + ([f"  and {len(bad) - NAMED} more"] if len(bad) > NAMED else [])
    listed = f" All of them: {', '.join(map(str, reports))}." if reports else ""
    text = f"{len(bad)} of {sum(len(s.names) + len(s.bad) for s in sources)} images cannot be used:\n" + "\n".join(
        lines
    )
    if not skip_bad:
        raise NnsslError(f"{text}\n{listed.strip()} Repair or remove them, or go on without them: --skip-bad")
    log.warning("%s\nGoing on without them, as asked by --skip-bad.%s", text, listed)
    return bad, reports


def _leaks(sources: Sequence[_Source], plan: Plan, n_processes: int) -> list[str]:
    """Pretraining images that are test images of the target, as ``"<source>/<case>"``."""
    images = list_test_images(plan)
    if not images:
        return []
    leaks = []
    own = [s for s in sources if s.entries]
    if own:
        hashes = test_hashes(plan, images, n_processes)
        leaks += [f"{s.name}/{n}" for s in own for n, e in s.entries.items() if e.sha256 in hashes]
    for source in sources:
        if source.raw is None and not source.entries:
            try:
                raw = list_raw(source.name, plan)
            except NnsslError:
                raw = None
            candidates = {n: c for n, c in raw.cases.items() if n in source.names} if raw else {}
            leaks += [f"{source.name}/{n}" for n in find_leaks(images, candidates)]
    return sorted(leaks)


def prepare_sources(
    plan: Plan,
    sources: Sequence[str],
    *,
    cases: Path | None = None,
    exclude: Path | None = None,
    skip_bad: bool = False,
    n_processes: int | None = None,
    held_out: float = 0.05,
    allow_mismatch: bool = False,
    preprocess: bool = True,
    thorough: bool = False,
    part: Part | None = None,
) -> CaseSet:
    """Find the pretraining images, preprocess those that are not, and check them. Labels are never opened.

    The plan's own dataset is used as nnU-Net preprocessed it; the folder is listed and no file of it is opened. Everything
    else is preprocessed with the plan by nnU-Net's own preprocessor into
    ``nnUNet_preprocessed/<source>/nnssl_<target>_<data identifier>_<data hash>``, once: an interrupted start is continued by
    the next, and several machines may work on it together.

    Args:
        plan: of the target.
        sources: dataset names.
        cases: file that lists the cases to use; all where None.
        exclude: file that lists cases to leave out.
        skip_bad: go on without images that cannot be used.
        n_processes: for preprocessing; 0 and 1 work in this process. nnU-Net's default where None.
        held_out: share of the cases that only the held-out loss sees.
        allow_mismatch: accept other channel names, order or modality than the target's.
        preprocess: False writes nothing; cases that are not preprocessed are in it, counted in ``CaseSet.pending``.
        thorough: look at every raw and preprocessed file, also where an earlier start did and folders have not changed since.
        part: take only this part of the cases, for preprocessing by many machines; test images and duplicates are not looked for.

    Returns:
        The case set. It is the same for the same files, on every rank and machine.

    Raises:
        NnsslError: no images, unknown case names, other channels, bad images (all of them named in a report), no space.
    """
    n_processes = default_num_processes if n_processes is None else n_processes
    found = []
    with paused_collector():
        for name in dict.fromkeys(sources):
            known = _as_it_is(plan, name)
            if known is None and not thorough:
                known = _remembered(plan, name, allow_mismatch, retry_bad=not skip_bad)
            found.append(known or _own(plan, name, allow_mismatch))
    chosen = select({s.name: s.names for s in found}, cases, exclude)
    if part is not None:
        chosen = {name: part.take(names) for name, names in chosen.items()}
    for i, source in enumerate(found):
        if source.unsettled & chosen[source.name]:
            found[i] = source = _own(plan, source.name, allow_mismatch)
        _use(source, plan, chosen[source.name], preprocess, n_processes, skip_bad, part, thorough)
        if preprocess and part is None:
            _remember(source)
    bad, reports = _settle_bad(found, skip_bad, preprocess, part)
    leaks = _leaks(found, plan, n_processes) if preprocess and part is None else []
    if preprocess and part is None:
        report = warn_of_leaks(leaks, plan, preprocessed_folder() / plan.dataset_name / _leak_file(found))
        reports += [report] if report else []
    pairs = duplicates((f"{s.name}/{n}", e.sha256) for s in found for n, e in s.entries.items())
    if pairs:
        shown = ", ".join(f"{a} = {b}" for a, b in pairs[:NAMED])
        log.warning("There twice: %s: %s%s", counted(len(pairs), "image"), shown, " ..." if len(pairs) > NAMED else "")
    with paused_collector():
        shapes = [shape for source in found if source.names for shape in _shapes(source, plan)]
        return make_case_set(
            [ref for source in found for ref in source.refs()],
            np.asarray(shapes or [plan.median_shape]),
            data_hash=plan.data_hash,
            held_out=held_out,
            leaks=leaks,
            bad=bad,
            reports=reports,
            pending=sum(s.pending for s in found),
            contents={f"{s.name}/{n}": text for s in found for n, text in _contents(s).items()},
            may_be_empty=part is not None,
        )


def _contents(source: _Source) -> dict[str, str]:
    """What tells another content of each case: the hash of its raw voxels, or the size of the file that nnU-Net preprocessed."""
    if source.entries:
        return {name: entry.sha256[:16] for name, entry in source.entries.items() if entry.sha256}
    if source.raw is not None or len(source.names) > SIZED_CASES:
        return {}
    return {name: f"{size} bytes" for name, (size, _) in done_cases(source.folder).items() if name in source.names}


def _leak_file(sources: Sequence[_Source]) -> str:
    """One file per set of sources, beside the target's preprocessed cases."""
    return "_".join(["nnssl_leaks", *sorted(f"d{dataset_id(s.name)}" for s in sources)]) + ".txt"
