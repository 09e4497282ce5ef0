"""An experiment at work in its output folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnssl.errors import NnsslError, UsageError
from nnssl.experiments.executor import Outcome
from nnssl.experiments.experiment import Experiment, load_experiment
from nnssl.experiments.graph import build_graph
from nnssl.experiments.jobs import Graph, Job
from nnssl.experiments.options import Options
from nnssl.experiments.records import Records
from nnssl.files import write_text


@dataclass(frozen=True)
class Session:
    """An experiment with its jobs, in its output folder; ``command`` is this call's command line, None where it runs nothing."""

    experiment: Experiment
    folder: Path
    device: str
    graph: Graph
    records: Records
    published: Path | None
    command: str | None

    @property
    def pending(self) -> list[Job]:
        """The jobs that are not finished."""
        return [job for job in self.graph.jobs.values() if not self.records.finished(job)]

    def earlier(self) -> Outcome:
        """What is finished, and what failed when it was tried last."""
        pending = {job.id: self.records.read(job.id) for job in self.pending}
        failed = {i: str(r.get("reason", "")) for i, r in pending.items() if r.get("status") == "failed"}
        return Outcome(finished=[i for i in self.graph.jobs if i not in pending], failed=failed)

    def write_inputs(self) -> None:
        """Case lists and folders of links to test images; what is there is left as it is, since its name says what it holds."""
        for path, text in self.graph.texts.items():
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, text)
        for folder, links in self.graph.inputs.items():
            folder.mkdir(parents=True, exist_ok=True)
            _link(folder, links)


def _link(folder: Path, links: Mapping[str, str]) -> None:
    for name, target in links.items():
        link = folder / name
        if link.exists():
            continue
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(os.path.abspath(target))
        except OSError:  # a file system without links
            shutil.copyfile(target, link)


def open_session(options: Options) -> Session:
    """Read an experiment file and look everything up.

    Raises:
        NnsslError: a fault in the file or the options, missing data.
    """
    experiment = load_experiment(options.experiment)
    published = options.compare or experiment.published
    if published is not None and not published.is_file():
        raise NnsslError(f"the published figures {published} do not exist.")
    folder = Path(os.path.abspath(options.output or f"label_efficiency_{experiment.name}"))
    if folder.exists() and not folder.is_dir():
        raise NnsslError(f"--output {folder} is a file; a folder is needed.")
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: at least 1.")
    graph, records = build_graph(experiment, folder, options.device), Records(folder)
    command = None if options.report_only else options.command
    return Session(experiment, folder, options.device, graph, records, published, command)
