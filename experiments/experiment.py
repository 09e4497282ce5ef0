"""The experiment file: what is compared, on which cases, how long. One frozen dataclass for each section.

A file of five lines is enough::

    dataset: 4
    methods: [scratch, mae, macl]
    labels: [4, 16]
    seeds: 3
    training: {epochs: 200}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nnssl.case_lists import read_case_list
from nnssl.config import build, option, unknown_keys
from nnssl.errors import NnsslError, ProblemsError, raise_problems
from nnssl.experiments.reading import read_yaml, resolve_path
from nnssl.fields import mapping, misfit
from nnssl.plans.figures import MEAN_TEACHER, check_options, schedule_name
from nnssl.plans.variants import check_name

SCRATCH = "scratch"
"""The method without pretraining, which all others are compared with: labels only, whatever the schedule."""
TEACHER = "mean-teacher"
"""The method that learns from the pool while it is trained, from random weights. From pretrained weights: any method whose
``training`` has the schedule ``mean-teacher``."""
FROM_RANDOM = (SCRATCH, TEACHER)
THE_FILE = "the experiment"
"""What problems belong to until the file's name is put in its place."""


@dataclass(frozen=True)
class Network:
    """A network other than the plans': ``nnssl_plan`` derives a variant that all methods share."""

    features: tuple[int, ...] = option((), "channels per stage", low=1)
    patch: tuple[int, ...] = option((), "training patch in voxels", low=1)
    batch_size: int | None = option(None, "training batch", low=1)

    @property
    def changes(self) -> dict[str, Any]:
        """What is changed; empty for the plans as they are."""
        return {k: v for k, v in ((f.name, getattr(self, f.name)) for f in fields(self)) if v not in ((), None)}


@dataclass(frozen=True)
class Training:
    """Fine-tuning, the same for all methods but where a method has its own ``training``."""

    schedule: str = option("warmup-poly", "schedule of the learning rate, see nnssl_plan --schedule")
    figures: dict[str, Any] = option({}, "figures of the schedule, for example {peak_lr: 1e-3}")
    epochs: int | None = option(None, "epochs (default: nnU-Net's 1000); 0: the weights as they are", low=0)
    iterations: int | None = option(None, "steps per epoch (default: nnU-Net's 250)", low=1)
    val_iterations: int | None = option(None, "validation batches per epoch (default: nnU-Net's 50)", low=1)
    val_cases: int = option(10, "cases without labels that draw the training curve, where no fold validates", low=1)

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths that are given."""
        given = {k: getattr(self, k) for k in ("epochs", "iterations", "val_iterations")}
        return {k: v for k, v in given.items() if v is not None}


@dataclass(frozen=True)
class Pretraining:
    """What ``nnssl_pretrain`` is asked for, the same for all methods but where a method has its own ``pretraining``."""

    datasets: tuple[str, ...] = option((), "to learn from (default: the dataset itself, without its test cases)")
    epochs: int | None = option(None, "epochs (default: nnssl_pretrain's)", low=1)
    iterations: int | None = option(None, "steps per epoch (default: nnssl_pretrain's)", low=1)
    options: dict[str, Any] = option({}, "-o options of method and loop")
    crop: tuple[int, ...] = option((), "crop in voxels", low=1)
    seed: int = option(0, "of initialisation, sampling and views", low=0)
    per_seed: bool = option(False, "one pretraining for each seed instead of one for all")
    labelled: bool = option(
        False, "learn from each draw's labelled cases too (--labelled), a pretraining for each draw"
    )
    exclude: str | None = option(None, "file of cases to leave out")
    robustness_every: int | None = option(None, "epochs between two measurements of robustness", low=0)
    skip_bad: bool = option(False, "go on without images that cannot be used")
    allow_mismatch: bool = option(False, "accept that channels or modality differ")


@dataclass(frozen=True)
class Arm:
    """One method of the comparison; training and pretraining have this method's own keys filled in."""

    name: str = option("", "in tables and file names")
    method: str = option(
        "",
        "scratch, mean-teacher, an objective of nnssl_pretrain or a file of one, or empty where there is a checkpoint",
    )
    checkpoint: Path | None = option(None, "a file that exists already, in place of a pretraining")
    adapt: dict[str, Any] = option({}, "as for nnssl_plan, where the checkpoint comes from another network")
    coverage: float | None = option(None, "as for nnssl_plan")
    training: Training = option(Training())
    pretraining: Pretraining = option(Pretraining())


@dataclass(frozen=True)
class Setting:
    """One table: a dataset and how it is trained. A file without ``settings`` has one."""

    dataset: str = option("", "number or name of the labelled dataset")
    name: str = option("", "what tables call it (default: the dataset's name)")
    configuration: str = option("3d_fullres", "nnU-Net's configuration")
    plans: str = option("nnUNetPlans", "plans to derive from")
    network: Network = option(Network(), "another network than the plans'")
    arms: tuple[Arm, ...] = option(())
    labels: tuple[str, ...] = option((), "numbers of labelled cases, shares such as 10%, or all")
    seeds: tuple[int, ...] = option((0, 1, 2), "which cases are the labelled ones", low=0)
    splits: Path | None = option(None)
    test: tuple[str, ...] = option((), "test cases: imagesTs (default where it has labels), or names")
    folds: tuple[int, ...] = option((), "evaluate on these folds' validation cases, in place of test cases", low=0)
    max_test_cases: int | None = option(None, "only the first so many of the test cases in a fixed random order", low=1)
    mirroring: bool = option(True, "predict with nnU-Net's test-time augmentation")
    surface_tolerance_mm: float = option(1.0, "tolerance of the surface Dice in mm", low=0)


@dataclass(frozen=True)
class Experiment:
    """What a file asks for, defaults filled in."""

    name: str = option("", "of variants, pretrainings and the output folder")
    title: str = option("", "of the report")
    settings: tuple[Setting, ...] = option((), "one for each table")
    pictures: bool = option(True, "whether the report may show images of cases")
    environment: dict[str, Any] = option({}, "variables exported for the jobs")
    slurm: dict[str, Any] = option({}, "parameters of submitit, for --executor slurm")
    published: Path | None = option(None, "a CSV of published figures to put beside ours")
    notes: tuple[str, ...] = option((), "sentences for the report")
    datasets: dict[str, Any] = option({}, "number or name -> what it is and where to get it, named where it is missing")
    file: Path = option(Path(), "the file itself")


_TOP = {f.name for f in fields(Experiment)} - {"file"}
_OF_SETTING = {f.name for f in fields(Setting)} - {"arms"} | {"methods", "training", "pretraining"}
_OF_ARM = {f.name for f in fields(Arm)} | {"options"}


def load_experiment(path: str | Path) -> Experiment:
    """Read an experiment file.

    Raises:
        NnsslError: lists unknown keys with the nearest known one, wrong types, unknown methods, schedules and figures.
    """
    file = Path(path)
    given = read_yaml(file)
    raise_problems(unknown_keys(given, _TOP | _OF_SETTING), str(file))
    own = {k: v for k, v in given.items() if k in _TOP and k != "settings"}
    if isinstance(given.get("notes"), str):
        own["notes"] = [given["notes"]]  # a comma ends no sentence
    if given.get("published"):
        own["published"] = resolve_path(str(given["published"]), file.parent)
    shared = {k: v for k, v in given.items() if k in _OF_SETTING and k != "name"}
    try:
        settings = _settings(given.get("settings"), shared, file.parent)
        top = build(Experiment, own)
        name = check_name(top.name or re.sub(r"[^A-Za-z0-9]+", "-", file.stem).strip("-"), "name")
    except ProblemsError as error:
        raise_problems(error.problems, str(file))
        raise
    except NnsslError as error:
        raise NnsslError(f"{file}: {error}") from error
    environment, datasets = ({k: str(v) for k, v in texts.items()} for texts in (top.environment, top.datasets))
    return replace(
        top,
        name=name,
        title=top.title or name,
        settings=settings,
        environment=environment,
        datasets=datasets,
        file=file,
    )


def _settings(several: Any, shared: dict[str, Any], folder: Path) -> tuple[Setting, ...]:
    if several is None:
        return (_setting(shared, folder, ""),)
    if not isinstance(several, list) or not several or not all(isinstance(s, Mapping) for s in several):
        raise NnsslError(
            "settings: a list is wanted, each with its own 'name:' and what differs from the rest of the file."
        )
    out = []
    for i, own in enumerate(several):
        where = f"settings, {own.get('name', f'number {i + 1}')}: "
        raise_problems(unknown_keys(own, _OF_SETTING, where), THE_FILE)
        merged = {**shared, **own}
        for section in ("training", "pretraining", "network"):
            if isinstance(shared.get(section), Mapping) and isinstance(own.get(section), Mapping):
                merged[section] = {**shared[section], **own[section]}
        out.append(_setting(merged, folder, where))
    names = [s.name or s.dataset for s in out]
    raise_problems([f"settings: two are called '{n}'" for n in dict.fromkeys(names) if names.count(n) > 1], THE_FILE)
    return tuple(out)


def _setting(given: dict[str, Any], folder: Path, where: str) -> Setting:
    missing = [k for k in ("dataset", "methods", "labels") if given.get(k) in (None, "", [])]
    raise_problems([f"{where}'{k}' is missing" for k in missing], THE_FILE)
    training = build(Training, given.get("training") or {}, f"{where}training: ")
    pretraining = build(Pretraining, given.get("pretraining") or {}, f"{where}pretraining: ")
    values = {k: v for k, v in given.items() if k not in ("methods", "training", "pretraining", "splits", "test")}
    seeds = values.get("seeds")
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        values["seeds"] = list(range(seeds))
    setting = build(Setting, values, where)
    methods = given["methods"] if isinstance(given["methods"], list) else [given["methods"]]
    arms = tuple(_arm(m, training, pretraining, folder, where) for m in methods)
    names = [arm.name for arm in arms]
    problems = [f"{where}two methods are called '{n}'" for n in dict.fromkeys(names) if names.count(n) > 1]
    problems += [f"{where}seeds: none is given"] if not setting.seeds else []
    for k, values_of in (("labels", setting.labels), ("seeds", setting.seeds), ("folds", setting.folds)):
        problems += [f"{where}{k}: a value is given twice"] if len(set(values_of)) < len(values_of) else []
    problems += [f"{where}labels: '{t}' is neither a number, a share such as 10%, nor all" for t in setting.labels
                 if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?%|all", t)]  # fmt: skip
    if given.get("test") is not None and setting.folds:
        problems.append(
            f"{where}test and folds exclude each other: either fixed test cases, or validation cases of folds"
        )
    if given.get("splits") is not None and setting.folds:
        problems.append(f"{where}splits and folds exclude each other: splits names the test cases")
    raise_problems(problems, THE_FILE)
    splits = resolve_path(str(given["splits"]), folder) if given.get("splits") else None
    return replace(setting, arms=arms, splits=splits, test=_test(given.get("test"), folder))


def _test(given: Any, folder: Path) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, list):
        return tuple(str(g) for g in given)
    if str(given) == "imagesTs":
        return ("imagesTs",)
    return tuple(read_case_list(resolve_path(str(given), folder), "test:"))


def _arm(given: Any, training: Training, pretraining: Pretraining, folder: Path, where: str) -> Arm:
    if isinstance(given, str):
        given = {"method": given}
    if not isinstance(given, Mapping):
        raise NnsslError(
            f"{where}methods: a name or a mapping with 'method:' or 'checkpoint:' is wanted, not {given!r}."
        )
    method, file = str(given.get("method") or ""), given.get("checkpoint")
    title = str(given.get("name") or Path(method).name.removesuffix(".py"))
    at = f"{where}method {title or '?'}: "
    problems = unknown_keys(given, _OF_ARM, at)
    if method.endswith(".py"):
        method = str(resolve_path(method, folder))
    if bool(method) == bool(file):
        problems.append(f"{at}either 'method' or 'checkpoint' is needed")
    if not title:
        problems.append(f"{where}methods: a method with a checkpoint needs a 'name'")
    if file is None and (given.get("adapt") or given.get("coverage") is not None):
        problems.append(f"{at}adapt and coverage belong to a checkpoint")
    if method in FROM_RANDOM and (given.get("options") or given.get("pretraining")):
        problems.append(f"{at}there is no pretraining, so it has no options")
    raise_problems(problems, THE_FILE)
    own, fitted, chosen = (_section(given, key, at) for key in ("pretraining", "training", "options"))
    if method == TEACHER:
        fitted.setdefault("schedule", MEAN_TEACHER)
    options = {**pretraining.options, **_section(own, "options", f"{at}pretraining: "), **chosen}
    learnt = replace(_merged(pretraining, own, f"{at}pretraining: "), options=options)
    if learnt.exclude:
        learnt = replace(learnt, exclude=str(resolve_path(learnt.exclude, folder)))
    keys = {"name": check_name(title, f"{where}method"), "method": method, "checkpoint": _checkpoint(file, folder),
            **{k: given[k] for k in ("adapt", "coverage") if k in given}}  # fmt: skip
    arm = replace(build(Arm, keys, at), training=_merged(training, fitted, f"{at}training: "), pretraining=learnt)
    _check_arm(arm, at)
    return arm


def _section(given: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The mapping under a key; empty where there is none."""
    value = given.get(key) or {}
    raise_problems([] if isinstance(value, Mapping) else [f"{where}{misfit(key, mapping(), value)}"], THE_FILE)
    return dict(value)


def _merged(base: Any, own: Any, where: str) -> Any:
    """The shared section with a method's own keys; its figures are added to the shared ones of the same schedule."""
    if not own:
        return base
    values = {f.name: getattr(base, f.name) for f in fields(base)}
    if isinstance(base, Training):
        same = schedule_name(str(own.get("schedule", base.schedule))) == schedule_name(base.schedule)
        values["figures"] = {**(base.figures if same else {}), **_section(own, "figures", where)}
        own = {k: v for k, v in own.items() if k != "figures"}
    return build(type(base), {**values, **own}, where)


def _checkpoint(text: Any, folder: Path) -> Path | None:
    if not text:
        return None
    from nnssl.paths import FOLDERS, decode_path

    return decode_path(str(text)) if str(text).partition(":")[0] in FOLDERS else resolve_path(str(text), folder)


def _check_arm(arm: Arm, where: str) -> None:
    """Refuse schedules, figures, objectives and options that do not exist, before anything runs."""
    schedule = schedule_name(arm.training.schedule)
    try:
        check_options(arm.training.figures, schedule)
        if arm.method == SCRATCH and schedule == "linear_probe":
            raise NnsslError("a linear probe has no control without pretraining; give scratch a 'training' of its own.")
        if arm.method == TEACHER and schedule != MEAN_TEACHER:
            raise NnsslError(
                f"it has the schedule mean-teacher; give scratch and the others '{arm.training.schedule}'."
            )
        if arm.method not in ("", *FROM_RANDOM):
            from nnssl.pretrain.methods import get_method
            from nnssl.pretrain.omni.config import resolve_omni, take_omni
            from nnssl.pretrain.resolve import resolve

            options, omni = take_omni(arm.pretraining.options)
            if omni and not arm.pretraining.labelled:
                raise NnsslError(f"'omni.{next(iter(omni))}' belongs to a pretraining with 'labelled: true'.")
            resolve_omni(omni)
            resolve(get_method(arm.method), None, epochs=None, iterations=None, seed=None, options=options, crop=None)
    except NnsslError as error:
        raise NnsslError(f"{where}{error}") from error
