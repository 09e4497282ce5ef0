"""Which cases an experiment trains, pretrains and tests on. Decided once, before anything runs, and checked for leaks."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.errors import NnsslError, did_you_mean, raise_problems
from nnssl.experiments.experiment import Setting
from nnssl.paths import raw_folder
from nnssl.plans import Plan, load_plan
from nnssl.plans.labels import ALL, case_order, choose_cases, folds_of
from nnssl.plans.variants import derive

ORDER_SEED = 0
"""Of the fixed random orders: which test cases ``max_test_cases`` keeps, which cases draw the training curve."""


@dataclass(frozen=True)
class TestCase:
    """One case with images (one per channel) and its reference segmentation."""

    name: str
    images: tuple[str, ...]
    reference: str

    __test__ = False  # no test class, whatever its name


@dataclass(frozen=True)
class LabelSubset:
    """The labelled cases of one table row: ``text`` as in the file, a seed, and the fold that nnU-Net trains."""

    text: str
    seed: int
    fold: str
    cases: tuple[str, ...]
    validating: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of labelled cases."""
        return len(self.cases)


@dataclass(frozen=True)
class Resolved:
    """A setting with everything looked up.

    Attributes:
        name: of the table.
        plan: that the file names; on disk.
        network: the plan of the network that is trained, in memory only where ``setting.network`` changes it.
        pool: cases that labels are drawn from, and that may be pretrained on.
        test: the test cases; empty where folds validate.
        subsets: by row of the file, seed and fold.
    """

    setting: Setting
    name: str
    plan: Plan
    network: Plan
    pool: tuple[str, ...]
    test: tuple[TestCase, ...]
    subsets: tuple[LabelSubset, ...]

    @property
    def by_folds(self) -> bool:
        """Whether the validation cases of folds are evaluated, in place of test cases."""
        return not self.test


def digest(content: Any) -> str:
    """Six hex digits of the sha256 of JSON-able content: the same for the same content on every machine."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:6]


def resolve_setting(setting: Setting, prefix: str) -> Resolved:
    """Look up plan and cases of a setting.

    Args:
        setting: from the file.
        prefix: begins the name of the variant that ``setting.network`` makes.

    Raises:
        NnsslError: no plans, no preprocessed data, unknown cases, a test case that would be trained on, too few cases.
    """
    plan = load_plan(setting.dataset, setting.configuration, setting.plans)
    network, changes = plan, setting.network.changes
    if changes:
        made_of = [plan.dataset_name, plan.architecture_hash, plan.data_hash, plan.patch_size, plan.batch_size]
        made_of.append(sorted(changes.items()))
        network = derive(plan, f"{prefix}-{digest(made_of)}", **changes)
    folds = folds_of(plan)
    pool: Sequence[str] = folds[ALL][0]
    splits = _read_splits(setting.splits, plan.dataset_name) if setting.splits else {}
    test = [] if setting.folds else _test_cases(setting, plan, splits)
    name = setting.name or plan.dataset_name.split("_", 1)[1]
    if setting.max_test_cases and not test:
        raise NnsslError(f"{name}: max_test_cases needs test cases; of folds nnU-Net predicts all validation cases.")
    if test:
        names = {t.name for t in test}
        listed = [c for c in splits.get("pool", pool) if c not in names]
        _check_pool(listed, splits, pool, names, setting)
        _check_copies(names, listed, plan)
        pool = listed
        kept = set(case_order(names, ORDER_SEED)[: setting.max_test_cases])
        test = [t for t in test if t.name in kept]
        subsets = _subsets_of_pool(setting, listed, splits.get("few_label"))
    else:
        subsets = _subsets_of_folds(setting, folds)
    same: dict[tuple[int, int, str], str] = {}
    for subset in subsets:
        first = same.setdefault((subset.count, subset.seed, subset.fold), subset.text)
        if first != subset.text:
            raise NnsslError(
                f"{name}: labels '{first}' and '{subset.text}' are both {subset.count} cases; leave one out."
            )
    return Resolved(setting, name, plan, network, tuple(pool), tuple(test), tuple(subsets))


def _read_splits(file: Path, dataset: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NnsslError(f"splits: {file} cannot be read: {error}") from error
    content = content if isinstance(content, dict) else {}
    own = content.get(dataset, content)
    if not isinstance(own, dict) or not isinstance(own.get("test"), list):
        known = ", ".join(k for k in content if isinstance(content[k], dict))
        raise NnsslError(
            f"splits: {file} holds no 'test' list for {dataset}{known and '; it has ' + known}. Wanted: "
            '{"<dataset>": {"test": [...], "pool": [...], "few_label": {"<seed>": {"<n>": [...]}}}}'
        )
    return own


def _test_cases(setting: Setting, plan: Plan, splits: Mapping[str, Any]) -> list[TestCase]:
    """The test cases with their files; none where the dataset has none, and none are asked for."""
    extra = cases_in(plan, "Ts")
    wanted: Sequence[str] = splits.get("test") or setting.test
    if not wanted or tuple(wanted) == ("imagesTs",):
        labelled = [t for t in extra.values() if Path(t.reference).is_file()]
        if not labelled and wanted:
            raise NnsslError(
                f"test: {raw_folder() / plan.dataset_name} has no imagesTs with segmentations in labelsTs."
            )
        return labelled
    both = {**cases_in(plan, "Tr"), **extra}
    name, known = plan.dataset_name, [c for c in wanted if c in both]
    problems = [
        f"'{c}' is in neither imagesTs nor imagesTr of {name}.{did_you_mean(c, both)}" for c in wanted if c not in both
    ]
    bare = [c for c in known if not Path(both[c].reference).is_file()]
    raise_problems(problems[:5] + [f"'{c}' has no segmentation {both[c].reference}" for c in bare[:5]], "test cases")
    return [both[c] for c in known]


def cases_in(plan: Plan, part: str) -> dict[str, TestCase]:
    """The raw cases of ``part`` (``Tr`` or ``Ts``) with their reference segmentations, by name."""
    folder, ending = raw_folder() / plan.dataset_name / f"labels{part}", plan.dataset_json["file_ending"]
    cases = _raw_cases(plan.dataset_name, plan, f"images{part}")
    return {n: TestCase(n, c.files, str(folder / f"{n}{ending}")) for n, c in sorted(cases.items())}


def _check_pool(
    pool: Sequence[str], splits: Mapping[str, Any], every: Sequence[str], test: set[str], setting: Setting
) -> None:
    """Nothing that is trained on may be a test case, and everything must be there."""
    few = {c for seeds in (splits.get("few_label") or {}).values() for cases in seeds.values() for c in cases}
    both, missing = (few | set(splits.get("pool", ()))) & test, (set(pool) | few) - set(every)
    outside = few - set(pool) - test if "pool" in splits else set()
    among = f"among the labelled cases{{}} of {setting.splits}"
    problems = [f"'{c}' is a test case and in the pool or {among.format('')}" for c in sorted(both)[:5]]
    problems += [f"'{c}' is not among the preprocessed cases.{did_you_mean(c, every)}" for c in sorted(missing)[:5]]
    problems += [f"'{c}' is {among.format(' and not in the pool')}" for c in sorted(outside)[:5]]
    raise_problems(problems, f"cases of dataset {setting.dataset}")


def _check_copies(test: set[str], pool: Sequence[str], plan: Plan) -> None:
    """No case that labels are drawn from may be a copy of a test case."""
    from nnssl.pretrain.prepare.leaks import find_leaks

    own = _raw_cases(plan.dataset_name, plan)
    images = {**own, **_raw_cases(plan.dataset_name, plan, "imagesTs")}
    copies = find_leaks({t: images[t] for t in test}, {c: own[c] for c in pool if c in own})
    advice = "leave it out of the pool (splits) or of the test cases"
    raise_problems([f"'{c}' is a copy of a test image; {advice}" for c in copies[:10]], f"cases of {plan.dataset_name}")


def _subsets_of_pool(setting: Setting, pool: list[str], few: Mapping[str, Any] | None) -> list[LabelSubset]:
    subsets, problems = [], []
    val_cases = max(arm.training.val_cases for arm in setting.arms)  # they draw the training curve
    for text, seed in itertools.product(setting.labels, setting.seeds):
        try:
            cases = _drawn(text, seed, pool, few)
        except NnsslError as error:
            problems.append(str(error))
            continue
        left = [c for c in case_order(pool, ORDER_SEED) if c not in set(cases)] or list(cases)
        subsets.append(LabelSubset(text, seed, ALL, tuple(cases), tuple(left[:val_cases])))
    raise_problems(problems, "labels")
    return subsets


def _drawn(text: str, seed: int, pool: list[str], few: Mapping[str, Any] | None) -> list[str]:
    if text in ("all", "100%"):
        return sorted(pool)
    if few is None:
        return choose_cases({ALL: (pool, [])}, text, seed)[ALL]
    n = max(1, int(float(text[:-1]) / 100 * len(pool) + 0.5)) if text.endswith("%") else int(text)
    of_seed = few.get(str(seed))
    if of_seed is None:
        raise NnsslError(f"the splits file has no few_label for seed {seed}; it has {', '.join(few)}")
    if str(n) not in of_seed:
        known = ", ".join(of_seed)
        raise NnsslError(f"the splits file has no {n} labelled cases for seed {seed} (labels: {text}); it has {known}")
    cases = [str(c) for c in of_seed[str(n)]]
    if len(set(cases)) != n:
        raise NnsslError(f"few_label[{seed}][{n}] of the splits file names {len(set(cases))} cases")
    return cases


def _subsets_of_folds(setting: Setting, folds: Mapping[str, tuple[list[str], list[str]]]) -> list[LabelSubset]:
    subsets = []
    for fold in map(str, setting.folds or (0,)):
        if fold not in folds:
            known = ", ".join(f for f in folds if f != ALL)
            raise NnsslError(f"fold {fold}: dataset {setting.dataset} has the folds {known}.")
        train, val = folds[fold]
        for text, seed in itertools.product(setting.labels, setting.seeds):
            cases = sorted(train) if text == "all" else choose_cases({fold: (train, val)}, text, seed)[fold]
            subsets.append(LabelSubset(text, seed, fold, tuple(cases), tuple(val)))
    return subsets


def forbidden_cases(resolved: Resolved, fold: str, sources: Sequence[str]) -> list[str]:
    """Cases that a pretraining must not see, as ``<dataset>/<case>``: tested by the fold, outside of the pool, and copies of test
    images.

    Raises:
        NnsslError: nothing is left of the dataset's own cases.
    """
    from nnssl.pretrain.prepare.leaks import find_leaks, list_test_images

    own, found = resolved.plan.dataset_name, []
    if own in sources:
        folds = folds_of(resolved.plan)
        barred = set(folds[fold][1]) if resolved.by_folds else set(folds[ALL][0]) - set(resolved.pool)
        found += [f"{own}/{c}" for c in sorted(barred)]
        if len(barred) == len(folds[ALL][0]):
            raise NnsslError(f"{resolved.name}: no case of {own} is left to pretrain on.")
    tested = {t.name for t in resolved.test}
    images = {n: c for n, c in _raw_cases(own, resolved.plan).items() if n in tested} | list_test_images(resolved.plan)
    for source in sources:
        if images:
            found += [f"{source}/{c}" for c in find_leaks(images, _raw_cases(source, resolved.plan))]
    return list(dict.fromkeys(found))


def _raw_cases(dataset: str, plan: Plan, folder: str = "imagesTr") -> dict[str, Any]:
    from nnssl.pretrain.prepare.raw import list_raw

    place = raw_folder() / dataset / folder
    if not place.is_dir() or (folder != "imagesTr" and not any(place.iterdir())):  # many have an empty imagesTs
        return {}
    raw = list_raw(dataset, plan, folder)
    return dict(raw.cases) if raw else {}
