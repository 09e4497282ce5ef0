"""From dataset names to a set of preprocessed cases: what is there is used, what is missing is preprocessed."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnssl.collector import paused_collector
from nnssl.errors import NnsslError
from nnssl.options import as_function
from nnssl.paths import preprocessed_folder
from nnssl.plans import Plan, dataset_id
from nnssl.plans.unlabelled import prepared_folder
from nnssl.preprocessed import case_names
from nnssl.pretrain.data.case_set import BadCase, CaseRef, CaseSet, make_case_set
from nnssl.pretrain.data.folders import beside
from nnssl.pretrain.prepare.channels import match_channels
from nnssl.pretrain.prepare.index import Entry, Index, write_report
from nnssl.pretrain.prepare.leaks import duplicates, find_leaks, list_test_images, test_hashes, warn_of_leaks
from nnssl.pretrain.prepare.manifest import Manifest
from nnssl.pretrain.prepare.preprocess import done_cases, preprocess_source
from nnssl.pretrain.prepare.raw import RawCase, find_raw, list_raw
from nnssl.pretrain.prepare.request import SourceRequest
from nnssl.pretrain.prepare.selection import select
from nnssl.pretrain.prepare.shapes import fingerprint_shapes, header_shapes
from nnssl.words import counted, first_few

log = logging.getLogger("nnssl")

NAMED = 10

SIZED_CASES = 5000
"""Up to so many files of nnU-Net's are asked for their size at a start, to see whether their content is still the same."""


@dataclass
class _Source:
    """One dataset on its way into the case set."""

    name: str
    folder: Path
    names: set[str]
    raw: dict[str, RawCase] | None = None  # images to preprocess; None where the folder is used as it is
    bad: list[BadCase] = field(default_factory=list)  # files and cases that cannot be used
    entries: dict[str, Entry] = field(default_factory=dict)  # index lines, of the cases that are used
    pending: int = 0  # cases that are not preprocessed, and may not be
    manifest: tuple[Manifest, dict[str, Any]] | None = None  # what is to be remembered, and its state before
    listed: dict[str, RawCase] = field(default_factory=dict)  # all its raw images, where they were looked at
    unsettled: set[str] = field(default_factory=set)  # of cases known from the manifest: those to look at

    @property
    def index(self) -> Index:
        return Index(beside(self.folder, "index.jsonl"))


def _as_it_is(plan: Plan, source: str) -> _Source | None:
    """The plan's own dataset, preprocessed by nnU-Net: a listing, nothing is opened."""
    folder = preprocessed_folder() / plan.dataset_name / plan.data_identifier
    if source != plan.dataset_name or not folder.is_dir():
        return None
    files = set(os.listdir(folder))
    names = set(case_names(files))
    if not names:
        if any(f.endswith(".npz") for f in files):
            log.warning("%s was preprocessed by an older nnU-Net (.npz files), which is not read here.", folder)
        return None
    lacking = sorted(n for n in names if f"{n}.pkl" not in files)
    why = "the file is missing: nnU-Net's preprocessing was interrupted; run it again"
    return _Source(source, folder, names, bad=[BadCase(n, str(folder / f"{n}.pkl"), why) for n in lacking])


def _own(asked: SourceRequest, source: str) -> _Source:
    """A dataset that is to be preprocessed, or has been, into a folder of its own."""
    plan, folder = asked.plan, prepared_folder(asked.plan, source)
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
        log.warning("%s has no raw images here: its %d preprocessed cases are used, unchecked.", source, len(done))
        found = _Source(source, folder, set(done))
        found.entries = {n: e for n, e in found.index.entries.items() if n in done and not e.bad}
        return found
    if same:
        log.info(
            "%s is not preprocessed for %s: its images are preprocessed without labels.", source, plan.configuration
        )
    else:
        order = match_channels(raw, source, plan, allow_mismatch=asked.allow_mismatch)
        if order is not None:
            raw.cases = {n: _reorder(c, order, source) for n, c in raw.cases.items()}
        manifest.order = order
    manifest.raw = replace(raw, cases={}, bad=list(raw.bad))
    names = set(raw.cases) | {b.case for b in raw.bad}
    return _Source(source, folder, names, raw=raw.cases, bad=raw.bad, listed=raw.cases, manifest=(manifest, state))


def _remembered(asked: SourceRequest, source: str) -> _Source | None:
    """A source that an earlier start has looked at (see ``manifest.py``); None where it must be looked at."""
    folder = prepared_folder(asked.plan, source)
    known = None if asked.thorough else Manifest.read(source, folder)
    if known is None:
        return None
    foreign = source != asked.plan.dataset_name
    if foreign and match_channels(known.raw, source, asked.plan, allow_mismatch=asked.allow_mismatch) != known.order:
        return None
    refused = [e for e in known.entries.values() if e.bad]
    return _Source(
        source,
        folder,
        {*known.entries, *known.waiting, *(b.case for b in known.raw.bad)},
        bad=[*known.raw.bad, *(e.refusal for e in refused)],
        entries={n: e for n, e in known.entries.items() if not e.bad},
        unsettled={*known.waiting, *(() if asked.skip_bad else (e.name for e in refused))},
    )


def _remember(source: _Source) -> None:
    """Write down what is done of all cases of a source, so that the next start need not look at each."""
    if source.manifest is None:
        return
    manifest, before = source.manifest
    state = manifest.state()
    raw = {path: time for path, time in state["times"].items() if path != str(source.folder)}
    if any(before["times"].get(path) != time for path, time in raw.items()):
        return  # images came or went while others were preprocessed
    entries, done = source.index.entries, done_cases(source.folder)
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
    return list(fingerprint_shapes(plan) if source.raw is None else header_shapes(source.raw, plan))


def _use(asked: SourceRequest, source: _Source, chosen: set[str]) -> None:
    """Reduce a source to the chosen cases and preprocess what is missing of them."""
    source.bad = [b for b in source.bad if b.case in chosen]
    source.names = chosen - {b.case for b in source.bad}
    if source.raw is None:
        source.entries = {n: e for n, e in source.entries.items() if n in source.names}
        return
    raw = source.raw = {n: c for n, c in source.raw.items() if n in source.names}
    if asked.preprocess:
        source.entries, bad = preprocess_source(asked, source.name, raw)
        source.bad += bad
        source.names = set(source.entries)
        return
    done = done_cases(source.folder)
    known = {n: e for n, e in source.index.entries.items() if n in done and n in raw}
    source.entries = {n: e for n, e in known.items() if e.files == raw[n].stamps}
    source.pending = len(raw) - len(source.entries)


def _settle_bad(asked: SourceRequest, sources: Sequence[_Source]) -> tuple[list[BadCase], list[Path]]:
    """Write the reports; raise one error that names all bad images unless they are to be skipped."""
    bad, reports = [], []
    file = "report.csv" if asked.part is None else f"report_{asked.part.label}.csv"
    for source in sources:
        source.bad.sort(key=lambda b: (b.case, b.file))
        bad += [replace(b, case=f"{source.name}/{b.case}") if len(sources) > 1 else b for b in source.bad]
        if asked.preprocess and (source.raw is not None or source.bad):
            report = write_report(beside(source.folder, file), source.bad)
            reports += [report] if report else []
    if not bad:
        return bad, reports
    lines = [f"  - {b}" for b in bad[:NAMED]] + ([f"  and {len(bad) - NAMED} more"] if len(bad) > NAMED else [])
    listed = f" All of them: {', '.join(map(str, reports))}." if reports else ""
    count = sum(len(s.names) + len(s.bad) for s in sources)
    text = "\n".join([f"{len(bad)} of {count} images cannot be used:", *lines])
    if not asked.skip_bad:
        raise NnsslError(f"{text}\n{listed.strip()} Repair or remove them, or go on without them: --skip-bad")
    log.warning("%s\nGoing on without them, as asked by --skip-bad.%s", text, listed)
    return bad, reports


def _leaks(asked: SourceRequest, sources: Sequence[_Source]) -> list[str]:
    """Pretraining images that are test images of the target, as ``"<source>/<case>"``."""
    images = list_test_images(asked.plan)
    if not images:
        return []
    leaks = []
    if any(s.entries for s in sources):
        hashes = test_hashes(asked.plan, images, asked.processes)
        leaks += [f"{s.name}/{n}" for s in sources for n, e in s.entries.items() if e.sha256 in hashes]
    for source in sources:
        if source.raw is None and not source.entries:
            raw = find_raw(source.name, asked.plan)
            candidates = {n: c for n, c in raw.cases.items() if n in source.names} if raw else {}
            leaks += [f"{source.name}/{n}" for n in find_leaks(images, candidates)]
    return sorted(leaks)


def _contents(source: _Source) -> dict[str, str]:
    """What tells another content of each case: the hash of its raw voxels, or the size of the file that nnU-Net preprocessed."""
    if source.entries:
        return {name: entry.sha256[:16] for name, entry in source.entries.items() if entry.sha256}
    if source.raw is not None or len(source.names) > SIZED_CASES:
        return {}
    return {name: f"{size} bytes" for name, (size, _) in done_cases(source.folder).items() if name in source.names}


def _find(asked: SourceRequest) -> list[_Source]:
    """The chosen cases of each dataset, preprocessed unless nothing may be written."""
    plan = asked.plan
    with paused_collector():
        found = [
            _as_it_is(plan, name) or _remembered(asked, name) or _own(asked, name)
            for name in dict.fromkeys(asked.sources)
        ]
    chosen = select({s.name: s.names for s in found}, asked.cases, asked.exclude)
    for i, source in enumerate(found):
        names = chosen[source.name] if asked.part is None else asked.part.take(chosen[source.name])
        if source.unsettled & names:
            found[i] = source = _own(asked, source.name)
        _use(asked, source, names)
        if asked.whole:
            _remember(source)
    return found


def _prepare(asked: SourceRequest) -> CaseSet:
    """Find the pretraining images, preprocess those that are not, and check them. Labels are never opened.

    The plan's own dataset is used as nnU-Net preprocessed it; the folder is listed and no file of it is opened. Everything
    else is preprocessed with the plan by nnU-Net's own preprocessor into
    ``nnUNet_preprocessed/<source>/nnssl_<target>_<data identifier>_<data hash>``, once: an interrupted start is continued by
    the next, and several machines may work on it together.

    Returns:
        The case set. It is the same for the same files, on every rank and machine.

    Raises:
        NnsslError: no images, unknown case names, other channels, bad images (all of them named in a report), no space.
    """
    plan, found = asked.plan, _find(asked)
    bad, reports = _settle_bad(asked, found)
    leaks = []
    if asked.whole:
        leaks = _leaks(asked, found)
        numbers = sorted(f"d{dataset_id(s.name)}" for s in found)  # one file per set of sources
        file = preprocessed_folder() / plan.dataset_name / f"{'_'.join(['nnssl_leaks', *numbers])}.txt"
        report = warn_of_leaks(leaks, plan, file)
        reports += [report] if report else []
    twice = duplicates((f"{s.name}/{n}", e.sha256) for s in found for n, e in s.entries.items())
    if twice:
        shown = first_few([f"{a} = {b}" for a, b in twice], NAMED)
        log.warning("There twice: %s: %s", counted(len(twice), "image"), shown)
    with paused_collector():
        shapes = [shape for source in found if source.names for shape in _shapes(source, plan)]
        refs = [CaseRef(name, source.folder, source.name) for source in found for name in source.names]
        if not refs and asked.part is None:
            raise NnsslError("No image is left to pretrain on. Check -d, --cases and --exclude.")
        case_set = make_case_set(refs, shapes or [plan.median_shape], data_hash=plan.data_hash, held_out=asked.held_out)
        pending = sum(s.pending for s in found)
        contents = {f"{s.name}/{n}": text for s in found for n, text in _contents(s).items()}
        return replace(case_set, leaks=leaks, bad=bad, reports=reports, pending=pending, contents=contents)


prepare_sources = as_function("prepare_sources", SourceRequest, _prepare)
