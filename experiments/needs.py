"""What an experiment needs and does not find, all at once, before anything else is looked up."""

from __future__ import annotations

from nnssl.errors import raise_problems
from nnssl.experiments.experiment import FROM_RANDOM, Experiment
from nnssl.paths import set_folders
from nnssl.plans import dataset_id, list_datasets, resolve_dataset


def need_datasets(experiment: Experiment) -> None:
    """Refuse an experiment of which datasets are missing.

    Raises:
        NnsslError: names all of them, what each is for, and where the file says that it comes from (``datasets:``).
    """
    wanted: dict[str, list[str]] = {}
    for setting in experiment.settings:
        name = setting.name or setting.dataset
        wanted.setdefault(setting.dataset, []).append(name)
        for arm in setting.arms:
            for dataset in arm.pretraining.datasets if arm.method not in ("", *FROM_RANDOM) else ():
                wanted.setdefault(dataset, []).append(f"the pretraining for {name}")
    known, problems = list_datasets(), []
    numbers = {str(dataset_id(name)) for name in known}
    for dataset, where in wanted.items():
        if dataset in known or (dataset.isdecimal() and str(int(dataset)) in numbers):
            continue
        told = experiment.datasets.get(dataset)
        uses = ", ".join(dict.fromkeys(where))
        problems.append(f"dataset {dataset}, for {uses}" + (f": {told}" if told else ""))
    if not problems:
        return
    if not set_folders():
        resolve_dataset(experiment.settings[0].dataset)  # refuses, and says which variables are not set
    advice = "Bring each in nnU-Net's raw format and plan it (nnUNetv2_plan_and_preprocess -d ...), or leave out what needs it."
    raise_problems(problems, f"{experiment.file}: datasets that are not there", advice=advice)
