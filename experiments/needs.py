"""What an experiment needs and does not find, all at once, before anything else is looked up."""

from __future__ import annotations

from nnssl.errors import ProblemsError
from nnssl.experiments.experiment import FROM_RANDOM, Experiment
from nnssl.paths import set_folders
from nnssl.plans import dataset_id, list_datasets, resolve_dataset


def need_datasets(experiment: Experiment) -> None:
    """Refuse an experiment of which datasets are missing.

    Raises:
        NnsslError: names all of them, what each is for, and where the file says that it comes from (``datasets:``).
    """
    wanted: dict[str, tuple[list[str], list[str]]] = {}  # settings that a dataset is, and that it is pretrained on for
    for setting in experiment.settings:
        name = setting.name or setting.dataset
        wanted.setdefault(setting.dataset, ([], []))[0].append(name)
        for arm in setting.arms:
            for dataset in arm.pretraining.datasets if arm.method not in ("", *FROM_RANDOM) else ():
                wanted.setdefault(dataset, ([], []))[1].append(name)
    known, problems = list_datasets(), []
    numbers = {str(dataset_id(name)) for name in known}
    for dataset, (itself, before) in wanted.items():
        if dataset in known or (dataset.isdecimal() and str(int(dataset)) in numbers):
            continue
        where = experiment.datasets.get(dataset)
        uses = [f"for {', '.join(dict.fromkeys(itself))}"] if set(itself) - {dataset} else []
        uses += [f"to pretrain on for {', '.join(dict.fromkeys(before))}"] if before else []
        told = f" ({'; '.join(uses)})" if uses else ""
        problems.append(f"{dataset}{': ' + where if where else ''}{told}")
    if not problems:
        return
    if not set_folders():
        resolve_dataset(experiment.settings[0].dataset)  # refuses, and says which variables are not set
    advice = "Bring each in nnU-Net's raw format and plan it (nnUNetv2_plan_and_preprocess -d ...), or leave out what needs it."
    if len(problems) == 1:
        raise ProblemsError(f"{experiment.file}: a dataset is not there: {problems[0]}.\n{advice}", problems)
    lines = "".join(f"\n  {p}" for p in problems)
    raise ProblemsError(f"{experiment.file}: {len(problems)} datasets are not there:{lines}\n{advice}", problems)
