"""From folders of images to a raw dataset: find, check, convert or link, and account for every file."""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.files import write_csv
from nnssl.options import as_function
from nnssl.plans import dataset_id
from nnssl.pretrain.images.choice import Channels, choose_channels
from nnssl.pretrain.images.convert import Converter, Result
from nnssl.pretrain.images.dataset import Dataset, Line, find_dataset
from nnssl.pretrain.images.dicom import volumes_of
from nnssl.pretrain.images.headers import Header, read_headers, require_dicom
from nnssl.pretrain.images.items import Item, Rejected, Task, group_channels
from nnssl.pretrain.images.options import AddOptions
from nnssl.pretrain.images.scan import scan
from nnssl.pretrain.prepare.preprocess import temporary_folder
from nnssl.pretrain.prepare.processes import run_tasks
from nnssl.words import counted

log = logging.getLogger("nnssl")

HEADERS_PER_JOB = 64


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


def add(asked: AddOptions) -> Summary:
    """Add images to a raw dataset without labels, which is made where it does not exist.

    Cases get neutral names, ``<Name>_0001`` and so on, in an order that tells nothing. Files of NIfTI (``.nii.gz``) whose
    headers hold no text are hard links to the originals; all else is written anew with voxels and geometry only. What was
    added before is not added again; an interrupted call is continued by the next.

    Returns:
        What the call did.

    Raises:
        NnsslError: wrong options, a dataset with labels, unclear modality, DICOM without dcm2niix, no space.
    """
    dataset = Dataset(find_dataset(asked.dataset, asked.name))
    dataset.open()
    items, rejected = _find(asked)
    chosen = choose_channels(items, dataset, asked)
    tasks, odd = _tasks(chosen)
    summary = Summary(dataset.name, rejected=[*rejected, *chosen.rejected, *odd])
    dataset.channels = chosen.names
    adding, new = _Adding(asked, dataset, summary), not dataset.folder.exists()
    try:
        if tasks or not new:
            adding.run(tasks)
    finally:
        summary.report = _write_report(asked.report, summary)
    if new and not adding.sources:
        if tasks:
            shutil.rmtree(dataset.folder)
        why = "the folders hold no file" if summary.report is None else f"why stands in {summary.report}"
        raise NnsslError(f"Nothing that can be added was found; {why}. {_counts(summary.rejected)}".strip())
    summary.files = len({f for task in adding.sources.values() for item in task.items for f in item.files})
    if asked.mapping is not None:
        _write_mapping(Path(asked.mapping), adding.sources, chosen.names)
    _tell(summary, asked.target)
    return summary


add_images = as_function("add_images", AddOptions, add)


def _find(asked: AddOptions) -> tuple[list[Item], list[Rejected]]:
    found, dicom = scan(asked.folders, asked.keep)
    if dicom:
        require_dicom(len(dicom))
    parts = [dicom[i : i + HEADERS_PER_JOB] for i in range(0, len(dicom), HEADERS_PER_JOB)]
    with contextlib.closing(run_tasks(read_headers, parts, asked.n_processes, "Reading DICOM headers")) as results:
        read = [header for part in results for header in part]
    found += [h for h in read if isinstance(h, Rejected)]
    found += volumes_of(sorted((h for h in read if isinstance(h, Header)), key=lambda h: h.file), asked)
    return [f for f in found if isinstance(f, Item)], [f for f in found if isinstance(f, Rejected)]


def _tasks(chosen: Channels) -> tuple[list[Task], list[Rejected]]:
    """The cases to be. An image that went away meanwhile is one line of the table."""
    items, gone = [], []
    for item in chosen.items:
        if all(map(os.path.exists, item.files)):
            items.append(item)
        else:
            gone.append(item.rejected("it is gone"))
    if chosen.patterns is None:
        return [Task.of([item]) for item in items], gone
    tasks, odd = group_channels(items, chosen.patterns)
    return tasks, [*gone, *odd]


@dataclass
class _Adding:
    """The part of a call that writes. ``sources``: the task of every case, new or known, that its images are."""

    asked: AddOptions
    dataset: Dataset
    summary: Summary
    sources: dict[str, Task] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task]) -> None:
        """Convert what is new and put it into place."""
        dataset = self.dataset
        todo = [task for task in sorted(tasks, key=lambda t: t.key) if not self._known(task)]
        with temporary_folder(dataset.images, "nnUNet_raw") as temporary:
            worker = Converter(self.asked, temporary)
            try:
                with contextlib.closing(
                    run_tasks(worker, todo, self.asked.n_processes, f"Adding to {dataset.name}")
                ) as results:
                    for result in results:
                        if result.fatal:
                            raise NnsslError(_fatal(result, dataset))
                        self._settle(result)
            finally:
                dataset.describe()

    def _known(self, task: Task) -> bool:
        """Whether an earlier call has made its cases, or has refused it under the same options."""
        line, summary = self.dataset.lines.get(task.key), self.summary
        if line is not None and line.cases:
            summary.known += len(line.cases)
            self.sources.update(dict.fromkeys(line.cases, task))
            return True
        if line is not None and line.reason not in ("", "duplicate") and line.options == self.asked.key:
            summary.rejected.append(task.rejected(line.reason, "as before"))
            return True
        return False

    def _settle(self, result: Result) -> None:
        """Put the cases of a task into place, and write down what became of it."""
        task, dataset, summary = result.task, self.dataset, self.summary
        line = Line(task.key, options=self.asked.key)
        for made in result.made:
            if made.sha256 in dataset.hashes:
                twin = task.rejected("duplicate", f"of {dataset.hashes[made.sha256]}")
                summary.rejected.append(replace(twin, count=0) if line.cases else twin)
                for draft in made.drafts:
                    os.unlink(draft)
            else:
                line = dataset.place(made.drafts, made.sha256, line)
                summary.linked += made.linked
        if result.reason:
            summary.rejected.append(task.rejected(result.reason, result.detail))
        if not line.cases:
            dataset.append(replace(line, reason=result.reason or "duplicate"))
        summary.added += line.cases
        self.sources.update(dict.fromkeys(line.cases, task))


def _fatal(result: Result, dataset: Dataset) -> str:
    kept = "What is added is kept: start the same command again, and it goes on from there"
    if result.fatal == "memory":
        return f"Memory ran out. {kept}; take fewer processes (-np)."
    if result.fatal == "disk":
        return f"No space left in {dataset.folder}. {kept}."
    return f"An image could not be written into {dataset.folder}: {result.fatal}. {kept}."


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    try:
        write_csv(path, rows, errors="backslashreplace")
    except OSError as error:
        raise NnsslError(f"{path} cannot be written: {error.strerror}.") from error


def _write_report(path: str | os.PathLike[str] | None, summary: Summary) -> Path | None:
    """The table of what is not used; where all is, none is left, also not that of an earlier call."""
    file = Path(path if path is not None else f"{summary.dataset}_not_added.csv").absolute()
    if not summary.rejected:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        return None
    rows = sorted((os.path.abspath(r.file), r.reason, r.detail, str(r.count)) for r in summary.rejected)
    _write_csv(file, [("file", "reason", "detail", "files"), *rows])
    return file


def _write_mapping(path: Path, sources: dict[str, Task], channels: Sequence[str]) -> None:
    """One row per case and channel; rows of cases that these images are not are kept."""
    rows: list[tuple[str, ...]] = [
        (case, channel, item.files[0], str(len(item.files)))
        for case, task in sources.items()
        for channel, item in zip(channels, task.items)
    ]
    if path.is_file():
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows += [tuple(row) for row in list(csv.reader(file))[1:] if row and row[0] not in sources]
    _write_csv(path.absolute(), [("case", "channel", "file", "files"), *sorted(rows)])


def _counts(rejected: Sequence[Rejected]) -> str:
    """Files that are not used, by reason; which is which stands in the table only."""
    counts: Counter[str] = Counter()
    for one in rejected:
        counts[one.reason] += one.count
    lines = "".join(f"\n  {n:6d}  {reason}" for reason, n in counts.most_common())
    return f"{counted(sum(counts.values()), 'file is', 'files are')} not used:{lines}" if counts else ""


def _tell(summary: Summary, target: int | str | None) -> None:
    """What the call did, in numbers, and what is next; it names no file of the user's."""
    added = summary.added
    names = f" ({' to '.join(dict.fromkeys((added[0], added[-1])))})" if added else ""
    links = f"; {summary.linked} of their images are links to your files (other names of the same files, no copies)"
    text = f"{summary.dataset}: {counted(len(added), 'case')} added{names}{links if summary.linked else ''}."
    log.info("%s", text)
    if summary.known:
        log.info("%s added before, left as before.", counted(summary.known, "case was", "cases were"))
    log.info("%s in these cases.", counted(summary.files, "file is", "files are"))
    if summary.rejected:
        log.info("%s\nOne by one: %s", _counts(summary.rejected), summary.report)
    plans = "" if target is None else f" -t {target}"
    number = dataset_id(summary.dataset)
    log.info("Next, which trains nothing yet: nnssl_pretrain -d %d%s -m mae --dry-run", number, plans)
