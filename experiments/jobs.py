"""The jobs of an experiment: what is run, in which order, what each needs, and what shows that it is finished.

Names of plan variants, pretrainings and jobs end in a hash of everything that decides their result. So a file that is there is
the right one: nothing finished is repeated, and a changed experiment file never mixes with what an older one left.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl.case_lists import read_case_list
from nnssl.errors import NnsslError
from nnssl.experiments.cases import LabelSubset, Resolved, digest, forbidden_cases, resolve_setting
from nnssl.experiments.experiment import FROM_RANDOM, SCRATCH, TEACHER, Arm, Experiment
from nnssl.experiments.launch import EVALUATE, typed
from nnssl.experiments.needs import need_datasets
from nnssl.files import sha256_of
from nnssl.paths import preprocessed_folder, results_folder
from nnssl.plans import dataset_id, resolve_dataset
from nnssl.plans.figures import PRIMUS, FineTuningConfig, schedule_name, spelt, trainer_for
from nnssl.plans.figures import SCRATCH as SCRATCH_TRAINER
from nnssl.plans.figures import TEACHER as TEACHER_TRAINER

PHASES = ("network", "pretrain", "plan", "train", "predict", "evaluate")


@dataclass(frozen=True)
class Job:
    """One command in a process of its own.

    Attributes:
        id: also the stem of its record and log.
        phase: one of :data:`PHASES`.
        command: as a user would type it.
        needs: ids of jobs that come before.
        outputs: the job is finished once all are there.
        recorded: it is finished only where its record says so too (what it writes is not written atomically).
        resume: where one of these is there, the command gets ``--c``.
        gpu: whether it uses the device.
        about: method, labels, setting, seed, fold; of what it belongs to.
        amount: steps or cases, for the estimate of the time.
    """

    id: str
    phase: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    recorded: bool = False
    resume: tuple[Path, ...] = ()
    gpu: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    amount: float = 1.0

    @property
    def shown(self) -> str:
        """The command line as it can be typed."""
        return shlex.join(typed(self.command))


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its evaluation: a method, a draw of labelled cases."""

    arm: Arm
    draw: LabelSubset
    resolved: Resolved
    name: str
    result: Path
    predictions: Path
    jobs: tuple[str, ...]
    steps: int

    @property
    def about(self) -> dict[str, Any]:
        """The columns that tell runs apart in tables."""
        d = self.draw
        return {
            "method": self.arm.name,
            "labels": d.count,
            "setting": self.resolved.name,
            "seed": d.seed,
            "fold": d.fold,
        }

    @property
    def group(self) -> tuple[Any, ...]:
        """Runs that are compared with each other."""
        return (self.resolved.name, self.draw.count, self.draw.seed, self.draw.fold)


@dataclass
class Graph:
    """Everything that an experiment consists of.

    Attributes:
        jobs: by id, in the order in which they are started.
        runs: in the order of the tables.
        texts: small files that jobs read: path -> content.
        inputs: folders of links to test images: folder -> (link name -> file).
        settings: looked up.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    texts: dict[Path, str] = field(default_factory=dict)
    inputs: dict[Path, dict[str, str]] = field(default_factory=dict)
    settings: list[Resolved] = field(default_factory=list)

    def add(self, job: Job) -> str:
        """Add a job unless it is there; returns its id."""
        self.jobs.setdefault(job.id, job)
        return job.id


def build_graph(experiment: Experiment, folder: Path, device: str = "cuda") -> Graph:
    """Look everything up and lay out the jobs; nothing is written.

    Args:
        experiment: from the file.
        folder: the output folder.
        device: for pretraining, training and prediction.

    Raises:
        NnsslError: whatever would make a job fail that can be known before: plans, cases, checkpoints, leaks.
    """
    need_datasets(experiment)
    graph = Graph()
    for setting in experiment.settings:
        resolved = resolve_setting(setting, experiment.name)
        graph.settings.append(resolved)
        builder = _Builder(graph, resolved, folder, device, experiment.name)
        for draw in sorted(resolved.draws, key=lambda d: (setting.seeds.index(d.seed), d.fold, d.count)):
            for arm in setting.arms:
                builder.run(arm, draw)
    return graph


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "x"


class _Builder:
    """Adds the jobs of one setting to the graph; what another setting needs too is there once."""

    def __init__(self, graph: Graph, resolved: Resolved, folder: Path, device: str, prefix: str) -> None:
        self.graph, self.resolved, self.folder, self.device, self.prefix = graph, resolved, folder, device, prefix
        self.plan, self.number = resolved.network, str(dataset_id(resolved.plan.dataset_name))
        p = self.plan
        self.key = digest([p.architecture_hash, p.data_hash, p.patch_size, p.batch_size, p.dataset_name, p.plans_name])
        self.files = preprocessed_folder() / p.dataset_name
        self._forbidden: dict[tuple, list[str]] = {}

    def run(self, arm: Arm, draw: LabelSubset) -> None:
        """Add one fine-tuning with all that it needs."""
        needs = [self._network()] if self.resolved.setting.network.changes else []
        checkpoint, source = self._checkpoint(arm, draw, needs)
        schedule, figures = _schedule(arm)
        content = [
            self.key,
            source,
            arm.adapt,
            arm.coverage,
            schedule,
            figures,
            arm.training.lengths,
            draw.cases,
            draw.fold,
        ]
        if not self.resolved.by_folds:
            content.append(draw.validating)
        fold = "" if draw.fold == "all" else f"-f{draw.fold}"
        name = f"{self.prefix}-{arm.name}-n{draw.count}-s{draw.seed}{fold}-{digest(content)}"
        plans = f"{self.plan.plans_name}_{name}"
        primus = self.plan.is_primus
        trainer = trainer_for(schedule, primus)
        if arm.method == TEACHER:
            trainer = TEACHER_TRAINER
        elif arm.method == SCRATCH:
            trainer = PRIMUS[1] if primus else SCRATCH_TRAINER
        model = results_folder() / self.plan.dataset_name / f"{trainer}__{plans}__{self.plan.configuration}"
        steps = FineTuningConfig.from_plans(
            {"nnssl": {"schedule": schedule, **figures, **arm.training.lengths}}, schedule, trainer
        ).steps
        about = {
            "method": arm.name,
            "labels": draw.count,
            "setting": self.resolved.name,
            "seed": draw.seed,
            "fold": draw.fold,
        }
        plan = self.graph.add(self._plan_job(arm, draw, name, schedule, figures, checkpoint, needs, about))
        train = self.graph.add(self._train_job(draw, name, plans, trainer, model, steps, plan, about))
        predictions, last = model / f"fold_{draw.fold}" / "validation", train
        if not self.resolved.by_folds:
            predictions = self.folder / "predictions" / (name if self.resolved.setting.mirroring else f"{name}-plain")
            last = self.graph.add(self._predict_job(draw, name, plans, trainer, predictions, train, about))
        evaluate, result = self._evaluate_job(draw, name, model, predictions, last, about)
        self.graph.add(evaluate)
        jobs = (*needs, plan, train, *((last,) if last != train else ()), evaluate.id)
        self.graph.runs.append(Run(arm, draw, self.resolved, name, result, predictions, jobs, steps))

    def _network(self) -> str:
        """The variant with another network, which all methods share."""
        base, changes = self.resolved.plan, self.resolved.setting.network.changes
        name = self.plan.plans_name[len(base.plans_name) + 1 :]
        command = ["nnssl_plan", "-d", self.number, "-c", base.configuration, "-p", base.plans_name, "--name", name]
        for option in ("features", "patch"):
            if option in changes:
                command += [f"--{option}", ",".join(map(str, changes[option]))]
        if "batch_size" in changes:
            command += ["--batch-size", str(changes["batch_size"])]
        output = self.files / f"{self.plan.plans_name}.json"
        about = {"setting": self.resolved.name}
        return self.graph.add(Job(f"network-{name}", "network", tuple(command), outputs=(output,), about=about))

    def _checkpoint(self, arm: Arm, draw: LabelSubset, needs: list[str]) -> tuple[str | None, Any]:
        """The file that the fine-tuning starts from, and what identifies it."""
        if arm.method in FROM_RANDOM:
            return None, arm.method
        if arm.checkpoint is not None:
            if not arm.checkpoint.is_file():
                raise NnsslError(f"method {arm.name}: the checkpoint {arm.checkpoint} does not exist.")
            return str(arm.checkpoint), sha256_of(arm.checkpoint)
        job, key = self._pretrain_job(arm, draw, list(needs))
        needs.append(self.graph.add(job))
        return str(job.outputs[0]), key

    def _pretrain_job(self, arm: Arm, draw: LabelSubset, needs: list[str]) -> tuple[Job, str]:
        from nnssl.pretrain.methods import get_method
        from nnssl.pretrain.omni.setup import FOLDER
        from nnssl.pretrain.resolve import EPOCHS, ITERATIONS, method_folder
        from nnssl.results import output_folder

        pretraining, own = arm.pretraining, self.plan.dataset_name
        sources = sorted({resolve_dataset(d) for d in pretraining.datasets} or {own})
        barred = self._barred(arm, draw, sources)
        seed = draw.seed if pretraining.per_seed else pretraining.seed
        lengths = (pretraining.epochs, pretraining.iterations)
        rest = (pretraining.options, pretraining.crop, seed, barred, pretraining.skip_bad, pretraining.allow_mismatch)
        content = [self.key, arm.method, sources, *lengths, *rest]
        if pretraining.labelled:
            content.append(list(draw.cases))
        key = digest(content)
        name = f"{self.prefix}-{key}"
        cls = get_method(arm.method)
        target = output_folder(self.plan, method_folder(cls) + (FOLDER if pretraining.labelled else ""), sources, name)
        command = ["nnssl_pretrain", "-d", *(str(dataset_id(s)) for s in sources), "-t", self.number, "-m", arm.method]
        command += ["-c", self.plan.configuration, "-p", self.plan.plans_name, "-device", self.device, "--name", name]
        command += ["--seed", str(seed)]
        if pretraining.labelled:
            listed = self._text(f"labelled-{name}.txt", draw.cases)
            command += ["--labelled", self.number, "--labelled-cases", listed]
        for option in ("epochs", "iterations", "robustness_every"):
            value = getattr(pretraining, option)
            command += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
        command += ["--crop", ",".join(map(str, pretraining.crop))] if pretraining.crop else []
        command += ["--skip-bad"] if pretraining.skip_bad else []
        command += ["--allow-mismatch"] if pretraining.allow_mismatch else []
        if barred:
            command += ["--exclude", self._text(f"exclude-{name}.txt", barred)]
        if pretraining.options:
            command += ["-o", *(f"{k}={_option(v)}" for k, v in sorted(pretraining.options.items()))]
        steps = (pretraining.epochs or EPOCHS) * (pretraining.iterations or ITERATIONS)
        about = {"method": arm.name, "setting": self.resolved.name, **({"seed": seed} if pretraining.per_seed else {})}
        if pretraining.labelled:
            about |= {"labels": draw.count, "seed": draw.seed, "fold": draw.fold}
        job = Job(f"pretrain-{arm.method}-{name}", "pretrain", tuple(command), tuple(needs), (target / "checkpoint_final.pth",),
                  resume=(target / "checkpoint_latest.pth",), gpu=True, about=about, amount=steps)  # fmt: skip
        return job, key

    def _barred(self, arm: Arm, draw: LabelSubset, sources: Sequence[str]) -> list[str]:
        """Cases that the pretraining leaves out: what is tested, and the user's own."""
        fold = draw.fold if self.resolved.by_folds else "all"
        key = (fold, arm.pretraining.exclude, *sources)
        if key not in self._forbidden:
            barred = forbidden_cases(self.resolved, arm, fold, sources)
            if arm.pretraining.exclude:
                barred += read_case_list(Path(arm.pretraining.exclude), "exclude:")
            self._forbidden[key] = list(dict.fromkeys(barred))
        return self._forbidden[key]

    def _text(self, name: str, lines: Sequence[str]) -> str:
        path = self.folder / "lists" / name
        self.graph.texts[path] = "".join(f"{line}\n" for line in lines)
        return str(path)

    def _plan_job(self, arm: Arm, draw: LabelSubset, name: str, schedule: str, figures: dict[str, Any], checkpoint: str | None,
                  needs: list[str], about: dict[str, Any]) -> Job:  # fmt: skip
        command = [
            "nnssl_plan",
            "-d",
            self.number,
            "-c",
            self.plan.configuration,
            "-p",
            self.plan.plans_name,
            "--name",
            name,
        ]
        command += ["--schedule", spelt(schedule), "--labels", self._text(f"labels-{name}.txt", draw.cases)]
        command += ["--seed", str(draw.seed)]
        if not self.resolved.by_folds:
            command += ["--validate", self._text(f"validate-{name}.txt", draw.validating)]
        for option, value in arm.training.lengths.items():
            command += [f"--{option.replace('_', '-')}", str(value)]
        if figures:
            command += ["-o", *(f"{k}={_option(v)}" for k, v in sorted(figures.items()))]
        if checkpoint is not None:
            command += ["--checkpoint", checkpoint]
            command += ["--adapt", *(f"{k}={v}" for k, v in sorted(arm.adapt.items()))] if arm.adapt else []
            command += ["--coverage", str(arm.coverage)] if arm.coverage is not None else []
        output = self.files / f"{self.plan.plans_name}_{name}.json"
        return Job(f"plan-{name}", "plan", tuple(command), tuple(needs), (output,), about=about)

    def _train_job(self, draw: LabelSubset, name: str, plans: str, trainer: str, model: Path, steps: int, plan: str,
                   about: dict[str, Any]) -> Job:  # fmt: skip
        command = ["nnUNetv2_train", self.number, self.plan.configuration, draw.fold, "-p", plans, "-tr", trainer]
        command += ["-device", self.device]
        fold = model / f"fold_{draw.fold}"
        outputs = (
            fold / "checkpoint_final.pth",
            *((fold / "validation" / "summary.json",) if self.resolved.by_folds else ()),
        )
        resume = tuple(fold / f"checkpoint_{kind}.pth" for kind in ("final", "latest", "best"))
        return Job(
            f"train-{name}",
            "train",
            tuple(command),
            (plan,),
            outputs,
            resume=resume,
            gpu=True,
            about=about,
            amount=steps,
        )

    def _predict_job(self, draw: LabelSubset, name: str, plans: str, trainer: str, predictions: Path, train: str,
                     about: dict[str, Any]) -> Job:  # fmt: skip
        test, ending = self.resolved.test, self.plan.dataset_json["file_ending"]
        links = {Path(f).name: f for case in test for f in case.images}
        images = self.folder / "test" / f"{_slug(self.resolved.name)}-{digest(sorted(links.items()))}"
        self.graph.inputs[images] = links
        command = ["nnUNetv2_predict", "-i", str(images), "-o", str(predictions), "-d", self.number]
        command += ["-c", self.plan.configuration, "-f", draw.fold, "-p", plans, "-tr", trainer, "-device", self.device]
        command += ["-npp", "1", "-nps", "1", "--continue_prediction"]
        command += [] if self.resolved.setting.mirroring else ["--disable_tta"]
        outputs = tuple(predictions / f"{case.name}{ending}" for case in test)
        return Job(f"predict-{predictions.name}", "predict", tuple(command), (train,), outputs, recorded=True, gpu=True,
                   about=about, amount=len(test))  # fmt: skip

    def _evaluate_job(self, draw: LabelSubset, name: str, model: Path, predictions: Path, last: str,
                      about: dict[str, Any]) -> tuple[Job, Path]:  # fmt: skip
        ending, folder = self.plan.dataset_json["file_ending"], self.files / "gt_segmentations"
        references = {t.name: t.reference for t in self.resolved.test}
        if self.resolved.by_folds:
            references = {c: str(folder / f"{c}{ending}") for c in draw.validating}
        cases = [
            {"case": c, "reference": r, "prediction": str(predictions / f"{c}{ending}")} for c, r in references.items()
        ]
        spec: dict[str, Any] = {
            "dataset_json": str(model / "dataset.json"),
            "plans": str(model / "plans.json"),
            "checkpoint": str(model / f"fold_{draw.fold}" / "checkpoint_final.pth"),
            "tolerance_mm": self.resolved.setting.surface_tolerance_mm,
            "cases": cases,
        }
        key = f"{name}-{digest([spec['tolerance_mm'], cases])}"
        result = self.folder / "runs" / f"{key}.json"
        path = self.folder / "lists" / f"evaluate-{key}.json"
        self.graph.texts[path] = json.dumps({**spec, "result": str(result)}, indent=1) + "\n"
        command = (EVALUATE, str(path))
        return Job(f"evaluate-{key}", "evaluate", command, (last,), (result,), about=about, amount=len(cases)), result


def _schedule(arm: Arm) -> tuple[str, dict[str, Any]]:
    """Schedule and figures. Scratch has no pretrained backbone, so freeze-unfreeze freezes nothing unless asked to."""
    schedule, figures = schedule_name(arm.training.schedule), dict(arm.training.figures)
    if arm.method == SCRATCH and schedule == "freeze_unfreeze":
        figures.setdefault("frozen", 0.0)
    return schedule, figures


def _option(value: Any) -> str:
    """A value as ``-o key=value`` takes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_option, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
