"""From an experiment file to its jobs: everything is looked up and laid out, nothing is run or written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnssl.case_lists import read_case_list
from nnssl.errors import NnsslError
from nnssl.experiments.cases import LabelSubset, Resolved, digest, forbidden_cases, resolve_setting
from nnssl.experiments.experiment import FROM_RANDOM, SCRATCH, TEACHER, Arm, Experiment
from nnssl.experiments.jobs import Graph, Job, Run
from nnssl.experiments.launch import EVALUATE
from nnssl.experiments.needs import need_datasets
from nnssl.files import sha256_of
from nnssl.paths import preprocessed_folder, results_folder
from nnssl.plans import Plan, dataset_id, resolve_dataset
from nnssl.plans.figures import MEAN_TEACHER, PRIMUS, FineTuningConfig, schedule_name, spelt, trainer_for
from nnssl.plans.figures import SCRATCH as SCRATCH_TRAINER
from nnssl.plans.figures import TEACHER as TEACHER_TRAINER
from nnssl.plans.labels import ALL, folds_of


def build_graph(experiment: Experiment, folder: Path, device: str = "cuda") -> Graph:
    """Look everything up and lay out the jobs; nothing is written.

    Raises:
        NnsslError: whatever would make a job fail that can be known before: plans, cases, checkpoints, leaks.
    """
    need_datasets(experiment)
    graph = Graph()
    for setting in experiment.settings:
        resolved = resolve_setting(setting, experiment.name)
        graph.settings.append(resolved)
        builder = _Builder(graph, resolved, folder, device, experiment.name)
        for subset in sorted(resolved.subsets, key=lambda d: (setting.seeds.index(d.seed), d.fold, d.count)):
            for arm in setting.arms:
                builder.run(arm, subset)
    return graph


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "x"


def _flags(options: Mapping[str, Any]) -> list[str]:
    """The options of a command that are given: ``True`` is a flag, a mapping gives ``key=value`` words."""
    words = []
    for name, value in options.items():
        if value is None or value is False or value in ((), {}):
            continue
        words.append(name)
        if isinstance(value, Mapping):
            words += [f"{k}={_option(v)}" for k, v in sorted(value.items())]
        elif value is not True:
            words.append(_option(value))
    return words


def _option(value: Any) -> str:
    """A value as ``-o key=value`` takes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_option, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


class _Builder:
    """Adds the jobs of one setting to the graph; what another setting needs too is there once."""

    def __init__(self, graph: Graph, resolved: Resolved, folder: Path, device: str, prefix: str) -> None:
        self.graph, self.resolved, self.folder, self.device, self.prefix = graph, resolved, folder, device, prefix
        self.plan, self.number = resolved.network, str(dataset_id(resolved.plan.dataset_name))
        p = self.plan
        self.key = digest([p.architecture_hash, p.data_hash, p.patch_size, p.batch_size, p.dataset_name, p.plans_name])
        self.files = preprocessed_folder() / p.dataset_name
        self.ending = p.dataset_json["file_ending"]
        self._forbidden: dict[tuple, list[str]] = {}

    def run(self, arm: Arm, subset: LabelSubset) -> None:
        """Add one fine-tuning with all that it needs."""
        needs = [self._network()] if self.resolved.setting.network.changes else []
        checkpoint, source = self._checkpoint(arm, subset, needs)
        schedule, figures = _schedule(arm)
        unseen = self._unseen(arm, subset)
        content = [
            self.key,
            source,
            arm.adapt,
            arm.coverage,
            schedule,
            figures,
            arm.training.lengths,
            subset.cases,
            subset.fold,
        ]
        if not self.resolved.by_folds:
            content.append(subset.validating)
        if unseen:
            content.append(tuple(unseen))
        fold = "" if subset.fold == ALL else f"-f{subset.fold}"
        run = self._run(arm, subset, f"{self.prefix}-{arm.name}-n{subset.count}-s{subset.seed}{fold}-{digest(content)}")
        lengths = {"schedule": schedule, **figures, **arm.training.lengths}
        steps = FineTuningConfig.from_plans({"nnssl": lengths}, schedule, run.trainer).steps
        plan = self._plan_job(run, checkpoint, needs)
        jobs = [plan, self._train_job(run, plan.id, steps)]
        if not self.resolved.by_folds:
            jobs.append(self._predict_job(run, jobs[-1].id))
        jobs.append(self._evaluate_job(run, jobs[-1].id))
        ids = [self.graph.add(job) for job in jobs]
        self.graph.runs.append(replace(run, result=jobs[-1].outputs[0], jobs=(*needs, *ids)))

    def _run(self, arm: Arm, subset: LabelSubset, name: str) -> Run:
        """Where nnU-Net puts a fine-tuning, and which trainer it has."""
        plans, primus = f"{self.plan.plans_name}_{name}", self.plan.is_primus
        trainer = trainer_for(_schedule(arm)[0], primus)
        if arm.method == TEACHER:
            trainer = TEACHER_TRAINER
        elif arm.method == SCRATCH:
            trainer = PRIMUS[1] if primus else SCRATCH_TRAINER
        model = results_folder() / self.plan.dataset_name / f"{trainer}__{plans}__{self.plan.configuration}"
        predictions = model / f"fold_{subset.fold}" / "validation"
        if not self.resolved.by_folds:
            predictions = self.folder / "predictions" / (name if self.resolved.setting.mirroring else f"{name}-plain")
        return Run(arm, subset, self.resolved, name, plans, trainer, model, predictions)

    def _plan_command(self, base: Plan, name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
        common = {"-d": self.number, "-c": base.configuration, "-p": base.plans_name, "--name": name}
        return ("nnssl_plan", *_flags({**common, **options}))

    def _network(self) -> str:
        """The variant with another network, which all methods share."""
        base, changes = self.resolved.plan, self.resolved.setting.network
        name = self.plan.plans_name[len(base.plans_name) + 1 :]
        options = {"--features": changes.features, "--patch": changes.patch, "--batch-size": changes.batch_size}
        output = self.files / f"{self.plan.plans_name}.json"
        return self.graph.add(
            Job(f"network-{name}", "network", self._plan_command(base, name, options), outputs=(output,),
                about={"setting": self.resolved.name})
        )  # fmt: skip

    def _checkpoint(self, arm: Arm, subset: LabelSubset, needs: list[str]) -> tuple[str | None, str]:
        """The file that the fine-tuning starts from, and what identifies it; a pretraining is added to ``needs``."""
        if arm.method in FROM_RANDOM:
            return None, arm.method
        if arm.checkpoint is not None:
            if not arm.checkpoint.is_file():
                raise NnsslError(f"method {arm.name}: the checkpoint {arm.checkpoint} does not exist.")
            return str(arm.checkpoint), sha256_of(arm.checkpoint)
        job, key = self._pretrain_job(arm, subset, tuple(needs))
        needs.append(self.graph.add(job))
        return str(job.outputs[0]), key

    def _pretrain_job(self, arm: Arm, subset: LabelSubset, needs: tuple[str, ...]) -> tuple[Job, str]:
        from nnssl.pretrain.methods import get_method
        from nnssl.pretrain.omni.setup import FOLDER
        from nnssl.pretrain.resolve import EPOCHS, ITERATIONS, method_folder
        from nnssl.results import output_folder

        asked, labelled = arm.pretraining, arm.pretraining.labelled
        sources = sorted({resolve_dataset(d) for d in asked.datasets} or {self.plan.dataset_name})
        barred = self._barred(arm, subset, sources)
        seed = subset.seed if asked.per_seed else asked.seed
        content = [self.key, arm.method, sources, asked.epochs, asked.iterations, asked.options, asked.crop, seed, barred,
                   asked.skip_bad, asked.allow_mismatch, *([list(subset.cases)] if labelled else [])]  # fmt: skip
        key = digest(content)
        name = f"{self.prefix}-{key}"
        folder = method_folder(get_method(arm.method)) + (FOLDER if labelled else "")
        target = output_folder(self.plan, folder, sources, name)
        options = {
            "-t": self.number,
            "-m": arm.method,
            "-c": self.plan.configuration,
            "-p": self.plan.plans_name,
            "-device": self.device,
            "--name": name,
            "--seed": seed,
            "--labelled": self.number if labelled else None,
            "--labelled-cases": self._text(f"labelled-{name}.txt", subset.cases) if labelled else None,
            "--epochs": asked.epochs,
            "--iterations": asked.iterations,
            "--robustness-every": asked.robustness_every,
            "--crop": asked.crop,
            "--skip-bad": asked.skip_bad,
            "--allow-mismatch": asked.allow_mismatch,
            "--exclude": self._text(f"exclude-{name}.txt", barred) if barred else None,
            "-o": asked.options,
        }
        command = ("nnssl_pretrain", "-d", *(str(dataset_id(s)) for s in sources), *_flags(options))
        about = {"method": arm.name, "setting": self.resolved.name, **({"seed": seed} if asked.per_seed else {})}
        if labelled:
            about |= {"labels": subset.count, "seed": subset.seed, "fold": subset.fold}
        steps = (asked.epochs or EPOCHS) * (asked.iterations or ITERATIONS)
        job = Job(f"pretrain-{Path(arm.method).stem}-{name}", "pretrain", command, needs, (target / "checkpoint_final.pth",),
                  resume=(target / "checkpoint_latest.pth",), gpu=True, about=about, amount=steps)  # fmt: skip
        return job, key

    def _barred(self, arm: Arm, subset: LabelSubset, sources: Sequence[str]) -> list[str]:
        """Cases that the pretraining leaves out: what is tested, and the user's own."""
        fold = subset.fold if self.resolved.by_folds else ALL
        key = (fold, arm.pretraining.exclude, *sources)
        if key not in self._forbidden:
            barred = forbidden_cases(self.resolved, fold, sources)
            if arm.pretraining.exclude:
                barred += read_case_list(Path(arm.pretraining.exclude), "exclude:")
            self._forbidden[key] = list(dict.fromkeys(barred))
        return self._forbidden[key]

    def _unseen(self, arm: Arm, subset: LabelSubset) -> list[str]:
        """Cases that an arm must not learn from without labels either; none where it learns from labels alone."""
        if _schedule(arm)[0] != MEAN_TEACHER:
            return []
        own = self.plan.dataset_name  # of others it sees what the pretraining saw
        barred = {case.removeprefix(f"{own}/") for case in self._barred(arm, subset, [own])}
        left = set(folds_of(self.plan)[ALL][0]) - (set(subset.validating) if self.resolved.by_folds else set())
        return [f"{own}/{case}" for case in sorted(barred & left)]

    def _text(self, name: str, lines: Sequence[str]) -> str:
        path = self.folder / "lists" / name
        self.graph.texts[path] = "".join(f"{line}\n" for line in lines)
        return str(path)

    def _plan_job(self, run: Run, checkpoint: str | None, needs: Sequence[str]) -> Job:
        arm, subset = run.arm, run.subset
        schedule, figures = _schedule(arm)
        validating = None if self.resolved.by_folds else self._text(f"validate-{run.name}.txt", subset.validating)
        unseen = self._unseen(arm, subset)
        options = {
            "--schedule": spelt(schedule),
            "--labels": self._text(f"labels-{run.name}.txt", subset.cases),
            "--seed": subset.seed,
            "--validate": validating,
            "--exclude": self._text(f"unseen-{run.name}.txt", unseen) if unseen else None,
            **{f"--{option.replace('_', '-')}": value for option, value in arm.training.lengths.items()},
            "-o": figures,
            "--checkpoint": checkpoint,
            "--adapt": arm.adapt,
            "--coverage": arm.coverage,
        }
        command = self._plan_command(self.plan, run.name, options)
        output = self.files / f"{run.plans}.json"
        return Job(f"plan-{run.name}", "plan", command, tuple(needs), (output,), about=run.about)

    def _train_job(self, run: Run, plan: str, steps: int) -> Job:
        command = ("nnUNetv2_train", self.number, self.plan.configuration, run.subset.fold, "-p", run.plans, "-tr", run.trainer,
                   "-device", self.device)  # fmt: skip
        outputs = [run.fold / "checkpoint_final.pth"]
        if self.resolved.by_folds:
            outputs.append(run.predictions / "summary.json")
        resume = tuple(run.fold / f"checkpoint_{kind}.pth" for kind in ("final", "latest", "best"))
        return Job(f"train-{run.name}", "train", command, (plan,), tuple(outputs), resume=resume, gpu=True, about=run.about,
                   amount=steps)  # fmt: skip

    def _predict_job(self, run: Run, train: str) -> Job:
        test = self.resolved.test
        links = {Path(f).name: f for case in test for f in case.images}
        images = self.folder / "test" / f"{_slug(self.resolved.name)}-{digest(sorted(links.items()))}"
        self.graph.inputs[images] = links
        options = {
            "-i": images, "-o": run.predictions, "-d": self.number, "-c": self.plan.configuration, "-f": run.subset.fold,
            "-p": run.plans, "-tr": run.trainer, "-device": self.device, "-npp": 1, "-nps": 1, "--continue_prediction": True,
            "--disable_tta": not self.resolved.setting.mirroring,
        }  # fmt: skip
        outputs = tuple(run.predictions / f"{case.name}{self.ending}" for case in test)
        return Job(f"predict-{run.predictions.name}", "predict", ("nnUNetv2_predict", *_flags(options)), (train,), outputs,
                   recorded=True, gpu=True, about=run.about, amount=len(test))  # fmt: skip

    def _evaluate_job(self, run: Run, last: str) -> Job:
        references = {t.name: t.reference for t in self.resolved.test}
        if self.resolved.by_folds:
            folder = self.files / "gt_segmentations"
            references = {c: str(folder / f"{c}{self.ending}") for c in run.subset.validating}
        cases = [
            {"case": c, "reference": r, "prediction": str(run.predictions / f"{c}{self.ending}")}
            for c, r in references.items()
        ]
        tolerance = self.resolved.setting.surface_tolerance_mm
        key = f"{run.name}-{digest([tolerance, cases])}"
        result = self.folder / "runs" / f"{key}.json"
        spec = {
            "dataset_json": str(run.model / "dataset.json"),
            "plans": str(run.model / "plans.json"),
            "checkpoint": str(run.fold / "checkpoint_final.pth"),
            "tolerance_mm": tolerance,
            "cases": cases,
            "result": str(result),
        }
        listed = self._text(f"evaluate-{key}.json", [json.dumps(spec, indent=1)])
        return Job(
            f"evaluate-{key}", "evaluate", (EVALUATE, listed), (last,), (result,), about=run.about, amount=len(cases)
        )


def _schedule(arm: Arm) -> tuple[str, dict[str, Any]]:
    """Schedule and figures. Scratch has no pretrained backbone, so freeze-unfreeze freezes nothing unless asked to."""
    schedule, figures = schedule_name(arm.training.schedule), dict(arm.training.figures)
    if arm.method == SCRATCH and schedule == "freeze_unfreeze":
        figures.setdefault("frozen", 0.0)
    return schedule, figures
