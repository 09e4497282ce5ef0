"""From folders of images to a raw dataset: find, check, convert or link, and account for every file."""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunetv2.configuration import default_num_processes

from nnssl.errors import NnsslError
from nnssl.files import write_csv
from nnssl.plans import dataset_id
from nnssl.pretrain.images.choice import Channels, choose_channels
from nnssl.pretrain.images.convert import LEAST_SPACING, LINKS, Converter, Result
from nnssl.pretrain.images.dataset import Dataset, Line, find_dataset
from nnssl.pretrain.images.dicom import volumes_of
from nnssl.pretrain.images.headers import Header, read_headers, require_dicom
from nnssl.pretrain.images.items import FOUR_D, Item, Rejected, Task, group_channels, single_channels
from nnssl.pretrain.images.kinds import KEEP
from nnssl.pretrain.images.scan import scan
from nnssl.pretrain.prepare.preprocess import temporary_folder
from nnssl.pretrain.prepare.processes import run_tasks
from nnssl.words import counted

log = logging.getLogger("nnssl")

HEADERS_PER_JOB = 64
LEAST_SLICES = 8


@dataclass
class Summary:
    """What a call did.

    Attributes:
        dataset: full name.
        added: names of the new cases.
        linked: of their files, those that are links.
        known: cases that were there before.
        rejected: every file or series that is not used.
        files: that the cases, new and known, are made of.
        report: the table of what is not used; None where all is.
    """

    dataset: str
    added: list[str] = field(default_factory=list)
    linked: int = 0
    known: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    files: int = 0
    report: Path | None = None


def add_images(
    dataset: int | str,
    folders: Sequence[str | os.PathLike[str]],
    *,
    name: str | None = None,
    target: int | str | None = None,
    modality: str | None = None,
    channels: Mapping[str, str] | None = None,
    four_d: str = "reject",
    least_slices: int = LEAST_SLICES,
    least_spacing: float = LEAST_SPACING,
    keep: Sequence[str] = (),
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
        folders: looked through recursively, for DICOM, NIfTI, NRRD, MetaImage, GIPL, MGH and TIFF stacks.
        name: of a new dataset.
        target: dataset that will be fine-tuned: its channel names are taken.
        modality: name of the only channel, such as ``"CT"`` or ``"MR"``; unless given, what the target, the dataset itself or the
            files tell.
        channels: channel name -> regular expression, for cases of several images, see
            :func:`nnssl.pretrain.images.items.group_channels`.
        four_d: ``"reject"``, ``"split"`` (a case of each volume) or ``"first"``.
        least_slices: fewer voxels along any axis are no volume.
        least_spacing: mm; smaller voxel sizes are taken for a damaged header.
        keep: what is not left out, of :data:`nnssl.pretrain.images.kinds.KEEP`.
        link: ``"auto"``, ``"symbolic"`` (to the files as they are, whatever their headers and paths tell) or ``"never"``.
        report: CSV of everything that is not used and why; ``<Dataset>_not_added.csv`` in the current folder unless given. None
            is left where everything is used.
        mapping: CSV of the cases and the files that they come from; none unless given.
        n_processes: nnU-Net's default unless given; 0 and 1 work in this process.

    Raises:
        NnsslError: wrong options, a dataset with labels, unclear modality, DICOM without dcm2niix, no space.
    """
    _check_options(four_d, link, least_slices, least_spacing, keep)
    n_processes = default_num_processes if n_processes is None else n_processes
    own = Dataset(find_dataset(dataset, name))
    own.open()
    items, rejected = _find(folders, keep, four_d, least_slices, n_processes)
    chosen = choose_channels(items, own.name, own.channels, target=target, modality=modality, patterns=channels)
    tasks, odd = _tasks(chosen)
    rejected += [*chosen.rejected, *odd]
    new = not own.folder.exists()
    if not tasks and new:
        raise NnsslError(_nothing(_write_report(report, own.name, rejected), rejected))
    own.channels = chosen.names
    summary = Summary(own.name, rejected=rejected)
    options = Converter(Path(), four_d, least_slices, link, least_spacing, "label-maps" in keep)
    try:
        sources = _add(own, tasks, summary, options, n_processes)
    finally:
        summary.report = _write_report(report, own.name, summary.rejected)
    if new and not sources:
        shutil.rmtree(own.folder)
        raise NnsslError(_nothing(summary.report, summary.rejected))
    summary.files = len({f for task in sources.values() for item in task.items for f in item.files})
    if mapping is not None:
        _write_mapping(Path(mapping), sources, chosen.names)
    _tell(summary, target)
    return summary


def _check_options(four_d: str, link: str, least_slices: int, least_spacing: float, keep: Sequence[str]) -> None:
    if four_d not in FOUR_D or link not in LINKS or least_slices < 2:
        raise NnsslError(
            f"--four-d is one of {', '.join(FOUR_D)}; --link one of {', '.join(LINKS)}; --least-slices 2 or more."
        )
    if not 0 < least_spacing < 1 or not set(keep) <= set(KEEP):
        raise NnsslError(f"--least-spacing is in mm, above 0 and below 1; --keep takes {' and '.join(KEEP)}.")


def _find(
    folders: Sequence[str | os.PathLike[str]], keep: Sequence[str], four_d: str, least: int, n_processes: int
) -> tuple[list[Item], list[Rejected]]:
    found = scan(folders, keep)
    if found.dicom:
        require_dicom(len(found.dicom))
    parts = [found.dicom[i : i + HEADERS_PER_JOB] for i in range(0, len(found.dicom), HEADERS_PER_JOB)]
    headers: list[Header] = []
    rejected = found.rejected
    with contextlib.closing(run_tasks(read_headers, parts, n_processes, "Reading DICOM headers")) as results:
        for part in results:
            headers += [h for h in part if isinstance(h, Header)]
            rejected += [h for h in part if isinstance(h, Rejected)]
    headers.sort(key=lambda h: h.file)
    volumes, bad = volumes_of(headers, four_d=four_d, least=least)
    return [*found.images, *volumes], [*rejected, *bad]


def _tasks(chosen: Channels) -> tuple[list[Task], list[Rejected]]:
    """The cases to be. An image that went away meanwhile is one line of the table."""
    items: list[Item] = []
    gone: list[Item] = []
    for item in chosen.items:
        there = all(map(os.path.exists, item.files))
        (items if there else gone).append(item)
    rejected = [Rejected(i.files[0], "it is gone", "", len(i.files)) for i in gone]
    if chosen.patterns is None:
        return single_channels(items), rejected
    tasks, odd = group_channels(items, chosen.patterns)
    return tasks, [*rejected, *odd]


def _add(target: Dataset, tasks: list[Task], summary: Summary, options: Converter, n_processes: int) -> dict[str, Task]:
    """Convert and place what is new; returns the task of every case that these images are."""
    options_key = options.options
    sources: dict[str, Task] = {}
    todo = []
    for task in sorted(tasks, key=lambda j: j.key):
        line = target.lines.get(task.key)
        if line is not None and line.cases:
            summary.known += len(line.cases)
            sources.update(dict.fromkeys(line.cases, task))
        elif line is not None and line.reason and line.options == options_key and line.reason != "duplicate":
            summary.rejected.append(Rejected(task.items[0].files[0], line.reason, "as before", _count(task)))
        else:
            todo.append(task)
    with temporary_folder(target.images, "nnUNet_raw") as temporary:
        worker = replace(options, temporary=temporary)
        try:
            with contextlib.closing(run_tasks(worker, todo, n_processes, f"Adding to {target.name}")) as results:
                for result in results:
                    if result.fatal:
                        raise NnsslError(_fatal(result, target))
                    _settle(result, target, summary, sources, options_key)
        finally:
            target.describe()
    return sources


def _settle(result: Result, target: Dataset, summary: Summary, sources: dict[str, Task], options_key: str) -> None:
    cases: list[str] = []
    hashes: list[str] = []
    file = result.task.items[0].files[0]
    for made in result.made:
        if made.sha256 in target.hashes:
            detail = f"of {target.hashes[made.sha256]}"
            summary.rejected.append(Rejected(file, "duplicate", detail, 0 if cases else _count(result.task)))
            for draft in made.drafts:
                os.unlink(draft)
            continue
        line = Line(result.task.key, sha256=(*hashes, made.sha256), options=options_key)
        case = target.place(made.drafts, lambda name, line=line: target.append(replace(line, cases=(*cases, name))))  # type: ignore[misc]
        target.hashes[made.sha256] = case
        cases.append(case)
        hashes.append(made.sha256)
        summary.linked += made.linked
    if result.reason:
        summary.rejected.append(Rejected(file, result.reason, result.detail, _count(result.task)))
    if not cases:
        target.append(Line(result.task.key, reason=result.reason or "duplicate", options=options_key))
    summary.added += cases
    sources.update(dict.fromkeys(cases, result.task))


def _count(task: Task) -> int:
    return sum(len(item.files) for item in task.items)


def _fatal(result: Result, target: Dataset) -> str:
    kept = "What is added is kept: start the same command again, and it goes on from there"
    if result.fatal == "memory":
        return f"Memory ran out. {kept}; take fewer processes (-np)."
    if result.fatal == "disk":
        return f"No space left in {target.folder}. {kept}."
    return f"An image could not be written into {target.folder}: {result.fatal}. {kept}."


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    try:
        write_csv(path, rows, errors="backslashreplace")
    except OSError as error:
        raise NnsslError(f"{path} cannot be written: {error.strerror}.") from error


def _write_report(path: str | os.PathLike[str] | None, dataset: str, rejected: Sequence[Rejected]) -> Path | None:
    """The table of what is not used; where all is, none is left, also not that of an earlier call."""
    file = Path(path if path is not None else f"{dataset}_not_added.csv").absolute()
    if not rejected:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        return None
    rows = sorted((os.path.abspath(r.file), r.reason, r.detail, str(r.count)) for r in rejected)
    _write_csv(file, [("file", "reason", "detail", "files"), *rows])
    return file


def _write_mapping(path: Path, sources: Mapping[str, Task], channels: Sequence[str]) -> None:
    """One row per case and channel; rows of cases that these images are not are kept."""
    head = ("case", "channel", "file", "files")
    kept: list[Sequence[str]] = []
    if path.is_file():
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            kept = [row for row in list(csv.reader(file))[1:] if row and row[0] not in sources]
    new = [
        (case, channel, item.files[0], str(len(item.files)))
        for case, task in sources.items()
        for channel, item in zip(channels, task.items)
    ]
    _write_csv(path.absolute(), [head, *sorted([*map(tuple, kept), *new])])


def _counts(rejected: Sequence[Rejected]) -> str:
    """Files that are not used, by reason; which is which stands in the table only."""
    counts: Counter[str] = Counter()
    for one in rejected:
        counts[one.reason] += one.count
    lines = "".join(f"\n  {n:6d}  {reason}" for reason, n in counts.most_common())
    return f"{counted(sum(counts.values()), 'file is', 'files are')} not used:{lines}" if counts else ""


def _nothing(report: Path | None, rejected: Sequence[Rejected]) -> str:
    reason = "the folders hold no file" if report is None else f"why stands in {report}"
    return f"Nothing that can be added was found; {reason}. {_counts(rejected)}".strip()


def _tell(summary: Summary, target: int | str | None) -> None:
    """What the call did, in numbers, and what is next; it names no file of the user's."""
    names = f" ({summary.added[0]} to {summary.added[-1]})" if len(summary.added) > 1 else ""
    names = f" ({summary.added[0]})" if len(summary.added) == 1 else names
    links = (
        f"; {summary.linked} of their images are links to your files (other names of the same files, no copies)"
        if summary.linked
        else ""
    )
    log.info("%s: %s added%s%s.", summary.dataset, counted(len(summary.added), "case"), names, links)
    if summary.known:
        log.info("%s added before, left as before.", counted(summary.known, "case was", "cases were"))
    log.info("%s in these cases.", counted(summary.files, "file is", "files are"))
    if summary.rejected:
        log.info("%s\nOne by one: %s", _counts(summary.rejected), summary.report)
    plans = "" if target is None else f" -t {target}"
    log.info(
        "Next, which trains nothing yet: nnssl_pretrain -d %d%s -m mae --dry-run", dataset_id(summary.dataset), plans
    )
