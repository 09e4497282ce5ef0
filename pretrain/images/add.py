"""From folders of images to a raw dataset: find, check, convert or link, and account for every file."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunetv2.configuration import default_num_processes

from nnssl.errors import NnsslError
from nnssl.files import write_atomic
from nnssl.pretrain.images.convert import LINKS, Converter, Reply
from nnssl.pretrain.images.dataset import Dataset, Line, find_dataset
from nnssl.pretrain.images.dicom import Header, read_headers, volumes_of
from nnssl.pretrain.images.items import FOUR_D, Item, Job, Rejected, group_channels, single_channels
from nnssl.pretrain.images.scan import scan
from nnssl.pretrain.prepare.preprocess import temporary_folder
from nnssl.pretrain.prepare.processes import run_jobs

__all__ = ["Summary", "add_images"]

log = logging.getLogger("nnssl")

HEADERS_PER_JOB = 64
LEAST_SLICES = 8
NAMES = {"CT": "CT", "MR": "MR", "PT": "PET"}
"""DICOM's modality -> channel name."""

KNOWN = {"ct": "CT", "mr": "MR", "mri": "MR", "pet": "PT", "pt": "PT"}
"""Channel name -> DICOM's modality; others are not compared."""


@dataclass
class Summary:
    """What a call did.

    Attributes:
        dataset: full name.
        added: names of the new cases.
        linked: of their files, those that are links.
        known: cases that were there before.
        rejected: every file or series that is not used.
        report: the table of these.
    """

    dataset: str
    added: list[str] = field(default_factory=list)
    linked: int = 0
    known: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    report: Path | None = None


def add_images(
    dataset: int | str,
    folders: Sequence[str | os.PathLike[str]],
    *,
    name: str | None = None,
    modality: str | None = None,
    channels: Mapping[str, str] | None = None,
    four_d: str = "reject",
    least_slices: int = LEAST_SLICES,
    link: str = "auto",
    report: str | os.PathLike[str] | None = None,
    mapping: str | os.PathLike[str] | None = None,
    n_processes: int | None = None,
) -> Summary:
    """Add images to a raw dataset without labels, which is made where it does not exist.

    Cases get neutral names, ``<Name>_0001`` and so on, in an order that tells nothing. Files of NIfTI (``.nii.gz``) whose
    headers hold no text are hard links to the originals; all else is written anew with voxels and geometry only. What was
    added before is not added again; an interrupted call is continued by the next.

    Args:
        dataset: id or full name.
        folders: looked through recursively, for NIfTI, NRRD, MetaImage and DICOM.
        name: of a new dataset.
        modality: name of the only channel, such as ``"CT"`` or ``"MR"``; DICOM's own where all agree.
        channels: channel name -> regular expression, for cases of several images, see
            :func:`nnssl.pretrain.images.items.group_channels`.
        four_d: ``"reject"``, ``"split"`` (a case of each volume) or ``"first"``.
        least_slices: fewer voxels along any axis are no volume.
        link: ``"auto"``, ``"symbolic"`` (to the files as they are, whatever their headers and paths tell) or ``"never"``.
        report: CSV of everything that is not used and why; ``<Dataset>_not_added.csv`` in the current folder unless given.
        mapping: CSV of the cases and the files that they come from; none unless given.
        n_processes: nnU-Net's default unless given; 0 and 1 work in this process.

    Raises:
        NnsslError: wrong options, a dataset with labels, unclear modality, no space.
    """
    if four_d not in FOUR_D or link not in LINKS or least_slices < 2:
        raise NnsslError(
            f"--four-d is one of {', '.join(FOUR_D)}; --link one of {', '.join(LINKS)}; --least-slices 2 or more."
        )
    if channels and modality:
        raise NnsslError("--channels names the channels; leave out --modality.")
    n_processes = default_num_processes if n_processes is None else n_processes
    target = Dataset(find_dataset(dataset, name))
    target.open()
    items, rejected = _find(folders, four_d, least_slices, n_processes)
    if channels:
        names: tuple[str, ...] = tuple(channels)
        jobs, odd = group_channels(items, channels)
    else:
        names, items, odd = _one_modality(
            items, modality or (target.channels[0] if len(target.channels) == 1 else None)
        )
        jobs = single_channels(items)
    rejected += odd
    if target.channels and names != target.channels:
        raise NnsslError(f"{target.name} has the channel(s) {', '.join(target.channels)}, not {', '.join(names)}.")
    if not jobs and not target.images.is_dir():
        target_report = _write_report(report, target.name, rejected)
        raise NnsslError(
            f"Nothing that can be added was found; {len(rejected)} file(s) or series are told in {target_report}."
        )
    target.channels = names
    summary = Summary(target.name, rejected=rejected)
    sources = _add(target, jobs, summary, Converter(Path(), four_d, least_slices, link), n_processes)
    summary.report = _write_report(report, target.name, summary.rejected)
    if mapping is not None:
        _write_mapping(Path(mapping), sources, names)
    _tell(summary)
    return summary


def _find(
    folders: Sequence[str | os.PathLike[str]], four_d: str, least: int, n_processes: int
) -> tuple[list[Item], list[Rejected]]:
    found = scan(folders)
    parts = [found.dicom[i : i + HEADERS_PER_JOB] for i in range(0, len(found.dicom), HEADERS_PER_JOB)]
    headers: list[Header] = []
    rejected = found.rejected
    with contextlib.closing(run_jobs(read_headers, parts, n_processes, "Reading DICOM headers")) as replies:  # type: ignore[type-var]
        for part in replies:
            headers += [h for h in part if isinstance(h, Header)]
            rejected += [h for h in part if isinstance(h, Rejected)]
    headers.sort(key=lambda h: h.file)
    volumes, bad = volumes_of(headers, four_d=four_d, least=least)
    return [*found.images, *volumes], [*rejected, *bad]


def _one_modality(items: Sequence[Item], asked: str | None) -> tuple[tuple[str, ...], list[Item], list[Rejected]]:
    """The channel's name, the images of that kind, and the others."""
    counts = Counter(i.modality for i in items if i.modality)
    if asked is None:
        if len(counts) > 1:
            shown = ", ".join(f"{n} {m}" for m, n in counts.most_common())
            raise NnsslError(
                f"The images are of several kinds ({shown} series): choose one with --modality; others are left out."
            )
        if not counts:
            if not items:
                return ("MR",), [], []
            raise NnsslError(
                "The files do not tell what kind of images they are: say it, for example --modality CT or --modality MR."
            )
        found = next(iter(counts))
        return (NAMES.get(found, found),), list(items), []
    wanted = KNOWN.get(asked.strip().lower())
    kept, rejected = [], []
    for item in items:
        if wanted and item.modality and item.modality != wanted:
            rejected.append(Rejected(item.files[0], "another modality", item.modality))
        else:
            kept.append(item)
    return (asked,), kept, rejected


def _add(target: Dataset, jobs: list[Job], summary: Summary, options: Converter, n_processes: int) -> dict[str, Job]:
    """Convert and place what is new; returns the job of every case that these images are."""
    told = f"{options.four_d} {options.least}"
    sources: dict[str, Job] = {}
    todo = []
    for job in sorted(jobs, key=lambda j: j.key):
        line = target.lines.get(job.key)
        if line is not None and line.cases:
            summary.known += len(line.cases)
            sources.update(dict.fromkeys(line.cases, job))
        elif line is not None and line.reason and line.options == told and line.reason != "duplicate":
            summary.rejected.append(Rejected(job.items[0].files[0], line.reason, "as before"))
        else:
            todo.append(job)
    with temporary_folder(target.images, "nnUNet_raw") as temporary:
        worker = Converter(temporary, options.four_d, options.least, options.link)
        try:
            with contextlib.closing(run_jobs(worker, todo, n_processes, f"Adding to {target.name}")) as replies:
                for reply in replies:
                    if reply.fatal:
                        raise NnsslError(_fatal(reply, target))
                    _settle(reply, target, summary, sources, told)
        finally:
            target.describe()
    return sources


def _settle(reply: Reply, target: Dataset, summary: Summary, sources: dict[str, Job], told: str) -> None:
    cases: list[str] = []
    hashes: list[str] = []
    file = reply.job.items[0].files[0]
    for made in reply.made:
        if made.sha256 in target.hashes:
            summary.rejected.append(Rejected(file, "duplicate", f"of {target.hashes[made.sha256]}"))
            for draft in made.drafts:
                os.unlink(draft)
            continue
        line = Line(reply.job.key, sha256=(*hashes, made.sha256), options=told)
        case = target.place(made.drafts, lambda name, line=line: target.append(replace(line, cases=(*cases, name))))  # type: ignore[misc]
        target.hashes[made.sha256] = case
        cases.append(case)
        hashes.append(made.sha256)
        summary.linked += made.linked
    if reply.reason:
        summary.rejected.append(Rejected(file, reply.reason, reply.detail))
    if not cases:
        target.append(Line(reply.job.key, reason=reply.reason or "duplicate", options=told))
    summary.added += cases
    sources.update(dict.fromkeys(cases, reply.job))


def _fatal(reply: Reply, target: Dataset) -> str:
    kept = "What is added is kept: start the same command again, and it goes on from there"
    if reply.fatal == "memory":
        return f"Memory ran out. {kept}; take fewer processes (-np)."
    if reply.fatal == "disk":
        return f"No space left in {target.folder}. {kept}."
    return f"An image could not be written into {target.folder}: {reply.fatal}. {kept}."


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    try:
        write_atomic(path, lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape")))
    except OSError as error:
        raise NnsslError(f"{path} cannot be written: {error.strerror}.") from error


def _write_report(path: str | os.PathLike[str] | None, dataset: str, rejected: Sequence[Rejected]) -> Path:
    file = Path(path if path is not None else f"{dataset}_not_added.csv").absolute()
    ordered = sorted(rejected, key=lambda r: (r.file, r.reason))
    _write_csv(file, [("file", "reason", "detail"), *((r.file, r.reason, r.detail) for r in ordered)])
    return file


def _write_mapping(path: Path, sources: Mapping[str, Job], channels: Sequence[str]) -> None:
    """One row per case and channel; rows of cases that these images are not are kept."""
    head = ("case", "channel", "file", "files")
    kept: list[Sequence[str]] = []
    if path.is_file():
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            kept = [row for row in list(csv.reader(file))[1:] if row and row[0] not in sources]
    new = [
        (case, channel, item.files[0], str(len(item.files)))
        for case, job in sources.items()
        for channel, item in zip(channels, job.items)
    ]
    _write_csv(path.absolute(), [head, *sorted([*map(tuple, kept), *new])])


def _tell(summary: Summary) -> None:
    """Counts and reasons; which file is which stands in the report only."""
    new = f"{summary.added[0]} to {summary.added[-1]}" if len(summary.added) > 1 else "".join(summary.added) or "none"
    log.info(
        "%s: %d case(s) added (%s), %d file(s) of them linked.",
        summary.dataset,
        len(summary.added),
        new,
        summary.linked,
    )
    if summary.known:
        log.info("%d case(s) were there before.", summary.known)
    if summary.rejected:
        counts = Counter(r.reason for r in summary.rejected).most_common()
        lines = "".join(f"\n  {n:6d}  {reason}" for reason, n in counts)
        log.info("%d file(s) or series are not used:%s\nOne by one: %s", len(summary.rejected), lines, summary.report)
