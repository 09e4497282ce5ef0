"""Before and after a run: the weights that it starts from, how a finished one is lengthened, and what to type next."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from nnssl import checkpoint
from nnssl.checkpoint import Checkpoint
from nnssl.errors import NnsslError, UsageError
from nnssl.files import sha256_of, write_atomic, write_json
from nnssl.paths import encode_path, preprocessed_folder
from nnssl.plans import Plan, dataset_id
from nnssl.plans.figures import MEAN_TEACHER, trainer_for
from nnssl.plans.labels import fold_to_type
from nnssl.results import find_pretrainings
from nnssl.transfer import Adaptation, TransferReport, apply

log = logging.getLogger("nnssl")

_OF_PLANS = re.compile(r"(?:type )?nnssl_plan --checkpoint FILE (--adapt [\w= ]+?) --name NAME")


@dataclass(frozen=True)
class Start:
    """Weights that a run starts from; ``place``: the ``key`` and ``prefix`` asked for, ``report``: what :meth:`fill` did."""

    loaded: Checkpoint
    sha256: str
    adaptation: Adaptation
    place: dict[str, str]
    report: TransferReport | None = None

    def fill(self, network: nn.Module, plan: Plan) -> Start:
        """Put the weights into the network, every part that the file holds, and return this with the report."""
        try:
            report = apply(network, self.loaded, plan, adapt=self.adaptation, parts="all")
        except NnsslError as error:
            text = _OF_PLANS.sub(r"add \1", str(error))
            raise NnsslError(f"--init: {text}") from error
        log.info("The run starts from these weights.\n%s", report)
        return replace(self, report=report)

    def identity(self) -> dict[str, Any]:
        """What makes a run from these weights another one than a run from others."""
        how = {k: v for k, v in vars(self.adaptation).items() if v is not None} if self.adaptation.active else {}
        return {"sha256": self.sha256, "adapt": how, "place": self.place}

    def options(self) -> dict[str, Any]:
        """What was asked for, for a start of the same run from the beginning; :func:`started_from` reads it."""
        how = {k: v for k, v in vars(self.adaptation).items() if v is not None}
        coverage = how.pop("coverage", None)
        return {"init": str(Path(self.loaded.path).absolute()), "adapt": how, "coverage": coverage, **self.place}

    def metadata(self) -> dict[str, Any]:
        """What the run's own checkpoints say about it."""
        return {"sha256": self.sha256, "method": self.loaded.method, "origin": self.loaded.origin}

    def save_report(self, folder: Path) -> None:
        """``transfer_report.txt`` and ``.json``, as the trainers write them."""
        if self.report is not None:
            source = {"source": encode_path(self.loaded.path), "sha256": self.sha256, "method": self.loaded.method}
            write_json(folder / "transfer_report.json", {**source, "report": self.report.to_dict()})
            write_atomic(folder / "transfer_report.txt", lambda file: file.write(f"{self.report}\n".encode()))


def start_from(
    init: str | Path | None,
    adapt: Mapping[str, Any] | None = None,
    coverage: float | None = None,
    key: str | None = None,
    prefix: str | None = None,
) -> Start | None:
    """Read what ``--init`` names; None without it."""
    place = {k: v for k, v in (("key", key), ("prefix", prefix)) if v is not None}
    if init is None:
        given = [f"--{name}" for name in place] + ["--adapt"] * bool(adapt) + ["--coverage"] * (coverage is not None)
        if given:
            raise UsageError(f"{', '.join(given)}: only with --init FILE.")
        return None
    loaded = checkpoint.load(init, key=key, prefix=prefix)
    adaptation = Adaptation.from_metadata({"adapt": adapt, "coverage": coverage})
    if loaded.verdict is not None and not loaded.verdict[0]:
        log.warning("Warning: the own verdict of --init %s: %s", init, loaded.verdict[1])
    return Start(loaded, sha256_of(init), adaptation, place)


def started_from(saved: Mapping[str, Any] | None) -> Start | None:
    """From its ``config.json``: the weights that a run starts from again which ended before its first checkpoint."""
    saved_start = ((saved or {}).get("accepted") or {}).get("start")
    if saved_start is None:
        return None
    try:
        return start_from(**saved_start)
    except NnsslError as error:
        raise NnsslError(
            f"this run starts from the weights of {saved_start['init']}: {error} Add --init FILE where it lies now."
        ) from error


def finished_before(final: Path, steps: int) -> Checkpoint | None:
    """The checkpoint that ended a run of this length; None where there is none, or where the run is to be longer."""
    if not final.exists():
        return None
    loaded = checkpoint.load(final)
    return loaded if int(loaded.nnssl.get("steps", steps)) >= steps else None


def keep_first_end(final: Path, saved_epochs: int, epochs: int) -> None:
    """Before a finished run is lengthened: keep its end under a name of its own, and tell the rule of the schedule."""
    kept = final.with_name(f"checkpoint_final_{saved_epochs}epochs.pth")
    if not kept.exists():
        with open(final, "rb") as source:
            write_atomic(kept, lambda target: shutil.copyfileobj(source, target))
    log.info(
        "This run is lengthened from %d to %d epochs. From here on learning rate, averages and whatever else depends on the "
        "length are what a run of %d epochs has at this step, so the learning rate rises again to where that schedule is; data "
        "and views go on. The weights of %d epochs stay in %s.",
        saved_epochs,
        epochs,
        epochs,
        saved_epochs,
        kept.name,
    )


def next_lines(plan: Plan, final: Path, device: str = "cuda") -> list[str]:
    """What to type to fine-tune from a finished run: the trainer alone where it finds the run, else a plan that names it.

    ``device``: where the run was, cuda, cpu or mps; nnU-Net trains on cuda where it is not told another.
    """
    number, p = dataset_id(plan.dataset_name), plan.plans_name
    option = "" if p == "nnUNetPlans" else f" -p {p}"
    where = "" if device == "cuda" else f" -device {device}"
    trainer = plan.trainer()
    train = f"nnUNetv2_train {{}} {{}} {fold_to_type(plan)} -tr {{}}"
    few = f"With few labels take -tr {trainer_for(MEAN_TEACHER)}: it goes on learning from the images without labels."
    hint = [] if plan.is_primus or plan.nnssl.get("schedule") else [few]
    if len(plan.dataset_json.get("labels") or {}) <= 1:
        return [
            f"{plan.dataset_name} has no labels to fine-tune on. Next, for a labelled dataset N that is planned:",
            f"  nnssl_plan -d N -c {plan.configuration} --checkpoint {final} --name {_free_name(None, final)}",
        ]
    others = [run for run in find_pretrainings(plan) if run.finished and run.folder != final.parent]
    if not others and not plan.nnssl.get("checkpoint"):
        return [f"Next: {train.format(number, plan.configuration, trainer)}{option}{where}", *hint]
    why = f"{len(others) + 1} finished pretrainings fit {p}"
    why = f"{p} names another checkpoint" if plan.nnssl.get("checkpoint") else why
    name = _free_name(plan, final)
    return [
        f"{why}, so this one is named in a plan of its own. Next:",
        f"  nnssl_plan -d {number} -c {plan.configuration}{option} --checkpoint {final} --name {name}",
        f"  {train.format(number, plan.configuration, trainer)} -p {p}_{name}{where}",
        *hint,
    ]


def _free_name(plan: Plan | None, final: Path) -> str:
    """A name for a plan variant, after the run's folder, that no variant has."""
    name = final.parent.name.split("__")[0].removeprefix("nnssl").lower()
    if plan is None:
        return name
    folder = preprocessed_folder() / plan.dataset_name
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    return next(n for n in names if not (folder / f"{plan.plans_name}_{n}.json").exists())
