"""``nnssl_label_efficiency``: from an experiment file to tables with error bars."""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from nnssl.command import run_command
from nnssl.errors import NnsslError, UsageError
from nnssl.experiments.collect import collect
from nnssl.experiments.estimate import estimate_jobs
from nnssl.experiments.evaluate import need_surface_library
from nnssl.experiments.executor import Backend, LocalBackend, Outcome, run_jobs, settle_lost
from nnssl.experiments.experiment import Experiment, load_experiment
from nnssl.experiments.jobs import PHASES, Graph, Job, build_graph
from nnssl.experiments.records import Records, try_lock
from nnssl.files import remove_temporary, write_atomic
from nnssl.grammar import CommandParser
from nnssl.words import aligned, counted, spoken

log = logging.getLogger("nnssl")


def parser() -> CommandParser:
    """The command's arguments."""
    p = CommandParser(
        "nnssl_label_efficiency",
        "EXPERIMENT.yaml [options]",
        "Compare pretrainings and scratch with few labels: runs what is missing of an experiment and writes its "
        "tables, curves and report. The same command continues where it was.",
        "nnssl_label_efficiency prostate.yaml --dry-run",
    )
    p.add_argument(
        "experiment",
        metavar="EXPERIMENT.yaml",
        type=Path,
        help="the experiment: dataset, methods, label counts, seeds; examples/label_efficiency has some",
    )
    where = p.group("where jobs run")
    p.share(where, "device", help="for training and prediction: cuda (default), cpu or mps")
    where.add_argument(
        "--executor", choices=("local", "slurm"), default="local", help="where jobs run (default: local)"
    )
    where.add_argument(
        "--jobs", type=int, metavar="N", help="jobs at a time (default: one per GPU, or one; slurm: 100)"
    )
    what = p.group("what is done")
    p.share(what, "dry_run", help="only show the jobs, what exists already, and the estimated time")
    what.add_argument(
        "--report-only", action="store_true", help="run nothing; write tables and report from what is there"
    )
    what.add_argument(
        "--compare", type=Path, metavar="FILE", help="CSV of published figures to put beside ours in the table"
    )
    p.share(what, "output", type=Path, help="folder of the experiment (default: label_efficiency_<name> here)")
    p.renamed("--device", "-device")
    p.renamed("-n", "--jobs")
    p.renamed("-o", "--output")
    return p


def _gpus(device: str, graph_needs: bool) -> list[str]:
    """The GPUs that jobs are spread over, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if device != "cuda" or not graph_needs:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [n.strip() for n in named.split(",") if n.strip()]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise NnsslError(
            "no CUDA device is available. On a machine without a GPU add -device cpu, with a small network (see network:)."
        )
    return [str(i) for i in range(count)]


def _write_text(text: str, file: BinaryIO) -> None:
    file.write(text.encode("utf-8"))


def _write_inputs(graph: Graph) -> None:
    """Case lists and folders of links to test images; what is there is left as it is, since its name says what it holds."""
    for path, text in graph.texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, partial(_write_text, text))
    for folder, links in graph.inputs.items():
        folder.mkdir(parents=True, exist_ok=True)
        for name, target in links.items():
            link = folder / name
            if link.exists():
                continue
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(os.path.abspath(target))
            except OSError:  # a file system without links
                shutil.copyfile(target, link)


def _show(
    graph: Graph, records: Records, folder: Path, device: str, slots: int | None, environment: Mapping[str, str]
) -> None:
    """What ``--dry-run`` prints."""
    pending = [job for job in graph.jobs.values() if not records.finished(job)]
    times = estimate_jobs(graph, records, pending, device)
    for setting in graph.settings:
        p = setting.network
        counts = sorted({d.count for d in setting.draws})
        where = f"{len(setting.test)} test cases" if setting.test else "the validation cases of each fold"
        log.info(
            f"{setting.name}: {p.dataset_name}, {p.configuration}, {p.plans_name}; {', '.join(map(str, counts))} labelled of "
            f"{len(setting.pool)} cases; evaluated on {where}."
        )
    log.info("%s", overview(graph, {job.id for job in pending}, times.seconds))
    for job in graph.jobs.values():
        seconds = times.seconds.get(job.id)
        record = records.read(job.id)
        begun = any(path.is_file() for path in job.resume) or record.get("status") in ("stopped", "running")
        state = "failed before" if record.get("status") == "failed" else "begun" if begun else "to do"
        if state == "to do" and job.recorded and all(path.is_file() for path in job.outputs):
            state = "to check"  # made by hand, or by a job that was killed: maybe not whole
        state = "exists" if seconds is None else state
        about = "" if seconds is None else "  ?" if math.isnan(seconds) else f"  {spoken(seconds)}"
        log.info(f"{state:13} {job.id}{about}\n              $ {job.shown}")
    log.info(f"\n{len(graph.jobs)} jobs, {len(graph.jobs) - len(pending)} of them finished. Output: {folder}")
    exports = "".join(f"\n              $ export {k}={shlex.quote(v)}" for k, v in environment.items())
    log.info(
        "Each line with $ can be typed, in this order%s; the lists of cases that they name are in %s.%s",
        ", after what the experiment file sets" if exports else "",
        folder / "lists",
        exports,
    )
    if not pending:
        return
    known = [s for s in times.seconds.values() if not math.isnan(s)]
    if len(known) < len(pending):
        log.info(f"Time: unknown without the device '{device}'; it is estimated from the first jobs that finish.")
        return
    rough = [phase for phase in PHASES if phase not in times.measured and any(j.phase == phase for j in pending)]
    note = (
        f" (rough for {', '.join(rough)}: a few steps were timed)" if rough else " (from the jobs that have finished)"
    )
    log.info(f"Time: about {spoken(times.total(slots or 1))} with {counted(slots or 1, 'job')} at a time{note}.")


def overview(graph: Graph, pending: set[str], seconds: Mapping[str, float]) -> str:
    """Methods by numbers of labels: draws that are evaluated and to do, and how long; pretrainings have lines of their own."""
    lines = [("", "labels", "done", "to do", "time")]
    for setting in graph.settings:
        before = [j for j in graph.jobs.values() if j.about.get("setting") == setting.name and "labels" not in j.about]
        for job in before:
            what = job.about.get("method") or "network"
            word = "pretraining" if job.phase == "pretrain" else "plan"
            lines.append(_line(f"{what}, {word}", "", [job.id], [job.id], pending, seconds))
        runs = [run for run in graph.runs if run.resolved.name == setting.name]
        for arm, count in dict.fromkeys((run.arm.name, run.draw.count) for run in runs):
            mine = [run for run in runs if (run.arm.name, run.draw.count) == (arm, count)]
            jobs = [i for run in mine for i in run.jobs if "labels" in graph.jobs[i].about]
            lines.append(_line(arm, str(count), [run.jobs[-1] for run in mine], jobs, pending, seconds))
    return aligned(lines)


def _line(what: str, labels: str, ends: Sequence[str], jobs: Sequence[str], pending: set[str],
          seconds: Mapping[str, float]) -> tuple[str, str, str, str, str]:  # fmt: skip
    todo = sum(i in pending for i in ends)
    known = [seconds[i] for i in dict.fromkeys(jobs) if i in pending]
    time = "" if not known else "?" if any(math.isnan(s) for s in known) else spoken(sum(known))
    return what, labels, str(len(ends) - todo), str(todo), time


def _report(folder: Path, experiment: Experiment, published: Path | None, *, last: bool) -> None:
    """Write the report; while jobs run, a fault in it gives a warning and does not stop them."""
    from nnssl.experiments import report

    try:
        report.write(folder, experiment, published)
    except Exception as error:  # noqa: BLE001  a fault of the report must not end days of training
        if last:
            raise
        log.warning("The report could not be written now (%s: %s); the jobs go on.", type(error).__name__, error)


def run_experiment(
    file: Path,
    *,
    out: Path | None = None,
    device: str = "cuda",
    executor: str = "local",
    slots: int | None = None,
    published: Path | None = None,
    dry_run: bool = False,
    report_only: bool = False,
    backend: Backend | None = None,
) -> Outcome:
    """What the command does.

    Args:
        file: the experiment file.
        out: output folder.
        device: of pretraining, training and prediction.
        executor: ``"local"`` or ``"slurm"``.
        slots: jobs at a time.
        published: CSV of published figures; the file's own where None.
        dry_run: only show.
        report_only: run nothing.
        backend: where jobs run, in place of ``executor``.

    Raises:
        NnsslError: a fault in the file, missing data, another process at work in the output folder.
    """
    experiment = load_experiment(file)
    published = published or experiment.published
    if published is not None and not published.is_file():
        raise NnsslError(f"the published figures {published} do not exist.")
    folder = Path(os.path.abspath(out or f"label_efficiency_{experiment.name}"))
    if folder.exists() and not folder.is_dir():
        raise NnsslError(f"--output {folder} is a file; a folder is needed.")
    if slots is not None and slots < 1:
        raise UsageError(f"--jobs {slots}: at least 1.")
    graph, records = build_graph(experiment, folder, device), Records(folder)
    if dry_run:
        _write_inputs(graph)
        _show(graph, records, folder, device, slots, experiment.environment)
        return Outcome(finished=[j.id for j in graph.jobs.values() if records.finished(j)])
    need_surface_library()
    lock = try_lock(folder / ".lock")
    if lock is None and report_only:
        outcome = _waiting(graph, records)
        done = collect(folder, experiment, graph, records, outcome, device)
        _report(folder, experiment, published, last=True)
        log.info("Another process is at work in this folder; this report shows what is there by now.")
        _tell(outcome, graph, records, folder, done)
        return outcome
    if lock is None:
        raise NnsslError(
            f"another process is at work in {folder}. Wait for it, or choose another folder with --output."
        )
    with lock:
        for place in (folder, *(p for p in folder.glob("*") if p.is_dir())):  # whoever wrote them is dead
            remove_temporary(place)
        settle_lost(graph.jobs.values(), records)
        _write_inputs(graph)
        pending = [job for job in graph.jobs.values() if not records.finished(job)]
        outcome = _waiting(graph, records)
        command = None if report_only else _typed(file, out, device, executor, slots, published, experiment)
        if not report_only:
            outcome.failed = {}
        if pending and not report_only:
            gpus = _gpus(device, executor == "local" and backend is None and any(job.gpu for job in pending))
            if backend is None:
                backend = _backend(executor, records, experiment, gpus)
            number = slots or (100 if executor == "slurm" else max(1, len(gpus)))
            log.info(
                "%d of %d jobs to do, %d at a time. Logs: %s", len(pending), len(graph.jobs), number, folder / "logs"
            )
            watch = _Watch(folder, experiment, graph, records, published, device, command, number)
            outcome = run_jobs(graph.jobs.values(), records, backend, number, watch)
        done = collect(folder, experiment, graph, records, outcome, device, command)
        _report(folder, experiment, published, last=True)
    _tell(outcome, graph, records, folder, done)
    return outcome


def _waiting(graph: Graph, records: Records) -> Outcome:
    """What is finished, and what failed when it was tried last."""
    outcome = Outcome(finished=[j.id for j in graph.jobs.values() if records.finished(j)])
    found = {i: records.read(i) for i in graph.jobs if i not in set(outcome.finished)}
    outcome.failed = {i: str(r.get("reason", "")) for i, r in found.items() if r.get("status") == "failed"}
    return outcome


def _typed(file: Path, out: Path | None, device: str, executor: str, slots: int | None, published: Path | None,
           experiment: Experiment) -> str:  # fmt: skip
    """The command line of this call, with every option that is not the default."""
    words = ["nnssl_label_efficiency", str(file), *(["-device", device] if device != "cuda" else [])]
    words += ["--executor", executor] if executor != "local" else []
    words += ["--jobs", str(slots)] if slots is not None else []
    words += ["--compare", str(published)] if published not in (None, experiment.published) else []
    words += ["--output", str(out)] if out is not None else []
    return shlex.join(words)


def _backend(executor: str, records: Records, experiment: Experiment, gpus: Sequence[str]) -> Backend:
    if executor == "slurm":
        from nnssl.experiments.slurm import SlurmBackend

        return SlurmBackend(records, experiment.slurm, experiment.environment)
    return LocalBackend(records, experiment.environment, gpus)


class _Watch:
    """Tells each end of a job with what is left, and writes the tables anew whenever all methods of one draw are through."""

    def __init__(self, folder: Path, experiment: Experiment, graph: Graph, records: Records, published: Path | None,
                 device: str, command: str | None, slots: int) -> None:  # fmt: skip
        self.folder, self.experiment, self.graph, self.records = folder, experiment, graph, records
        self.published, self.device, self.command, self.slots = published, device, command, slots
        self.through: set[tuple] = set()

    def __call__(self, job: Job, outcome: Outcome) -> None:
        """Look at the jobs and groups after a job has ended."""
        self._tell(job, outcome)
        ended = {*outcome.finished, *outcome.done, *outcome.failed, *outcome.blocked}
        groups = {run.group for run in self.graph.runs}
        waiting = {run.group for run in self.graph.runs if run.jobs[-1] not in ended}
        new = groups - waiting - self.through
        if not new or job.phase != "evaluate":
            return
        self.through |= new
        collect(self.folder, self.experiment, self.graph, self.records, outcome, self.device, self.command)
        _report(self.folder, self.experiment, self.published, last=False)
        through = counted(len(self.through), "draw is", "draws are")
        log.info("%s of %d evaluated for all methods; tables: %s", through, len(groups), self.folder / "table.md")

    def _tell(self, job: Job, outcome: Outcome) -> None:
        """``train-... done in 3 min: 23 of 34, about 40 min left``."""
        over = {*outcome.finished, *outcome.done}
        gone = {*outcome.failed, *outcome.blocked}
        left = [j for j in self.graph.jobs.values() if j.id not in over | gone]
        seconds = estimate_jobs(self.graph, self.records, left, self.device, timed=False).seconds.values()
        known = [s for s in seconds if not math.isnan(s)]
        word = "about" if len(known) == len(left) else "more than"
        time = f", {word} {spoken(sum(known) / max(1, self.slots))} left" if known else ""
        time = time or (", time unknown yet" if left else "")
        how = "done" if job.id in over else "FAILED"
        took = float(self.records.read(job.id).get("seconds") or 0.0)
        bad = f", {len(gone)} failed or not run" if gone else ""
        log.info("%s %s in %s: %d of %d%s%s", job.id, how, spoken(took), len(over), len(self.graph.jobs), bad, time)


def _tell(outcome: Outcome, graph: Graph, records: Records, folder: Path, done: int) -> None:
    log.info("%d of %d fine-tunings are evaluated. Report: %s", done, len(graph.runs), folder / "report.html")
    if outcome.failed:
        lines = [f"  {i}: {reason}\n    log: {records.log(i)}" for i, reason in outcome.failed.items()]
        text = (
            f"{counted(len(outcome.failed), 'job')} failed, {len(outcome.blocked)} that need them were not run:\n"
            + "\n".join(lines)
        )
        log.warning("%s\nThe same command tries them again.", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry point; returns the exit status: 1 where a job failed."""
    args = parser().parse_args(argv)

    def body() -> int:
        outcome = run_experiment(
            args.experiment, out=args.output, device=args.device, executor=args.executor, slots=args.jobs,
            published=args.compare, dry_run=args.dry_run, report_only=args.report_only,
        )  # fmt: skip
        return 1 if outcome.failed else 0

    return run_command(body, args)
