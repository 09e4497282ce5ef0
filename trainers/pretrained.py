"""``nnUNetTrainerPretrained``: plain nnU-Net training from self-supervised weights, and its control without them.

What differs from nnU-Net's own trainer: the weights at the start of epoch 0, the learning rate (warm-up to 1e-3, then poly;
nnU-Net starts at 1e-2) and in short trainings the optimiser (Adam), the figures and training cases that ``plans["nnssl"]`` sets,
and checkpoints that are written whole and under the name of nnU-Net's trainer, so that any nnU-Net predicts with them. Other
schedules: :mod:`nnssl.trainers.other_schedules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnssl
from nnssl import checkpoint as checkpoints
from nnssl import transfer
from nnssl.errors import NnsslError
from nnssl.files import write_atomic, write_json
from nnssl.malloc import keep_freed_memory
from nnssl.networks import canonical_state_dict
from nnssl.paths import encode_path
from nnssl.plans import Plan, dataset_id
from nnssl.plans.figures import DEFAULT_SCHEDULE, MEAN_TEACHER, FineTuningConfig, followers, trainer_for
from nnssl.plans.labels import ALL, FOLDS, folds_of, restrict, too_few
from nnssl.plans.parts import parts_for
from nnssl.plans.primus import CLASSES
from nnssl.threads import keep_to_threads
from nnssl.trainers.groups import changed_parts
from nnssl.trainers.inspection import content_of, digests
from nnssl.trainers.loggers import FineTuningLogger, add_loggers
from nnssl.trainers.stepwise import StepwiseTrainer
from nnssl.trainers.weights import find_weights
from nnssl.weights.load import plain_loading, read_file
from nnssl.words import counted

__all__ = ["check_network", "nnUNetTrainerPretrained", "nnUNetTrainerPretrainedScratch"]

PROVENANCE = "nnssl_finetuning"
"""Key of a fine-tuned checkpoint that says what the training started from; ``"nnssl"`` marks pretrained ones."""
RATES = "nnssl_learning_rates"
"""Key of the learning rates that were applied, by epoch and group, where there is more than one group."""


def check_network(cls: type[nnUNetTrainerPretrained], plans: dict[str, Any], configuration: str, primus: bool) -> None:
    """Refuse a Primus for a trainer of U-Nets and the reverse, and name the right one.

    Raises:
        NnsslError: the plans have the other kind of network.
    """
    network = PlansManager(plans).get_configuration(configuration).network_arch_class_name
    if (network.rsplit(".", 1)[-1] in CLASSES.values()) == primus:
        return
    schedule = (plans.get("nnssl") or {}).get("schedule") or DEFAULT_SCHEDULE
    advice = f"use -tr {trainer_for(schedule, not primus, cls.pretrained)}"
    if primus:
        advice += ", or write plans with a Primus: nnssl_plan --network primus-s --name NAME"
    raise NnsslError(
        f"Plans '{plans.get('plans_name', '?')}' ({configuration}) hold {'no' if primus else 'a'} Primus, and {cls.__name__} "
        f"trains {'nothing else' if primus else 'U-Nets'}; {advice}."
    )


class nnUNetTrainerPretrained(StepwiseTrainer):
    """Fine-tunes the plan's network from pretrained weights, found at the start of epoch 0.

    In this order: weights that ``-pretrained_weights`` has put into the network, the file that ``plans["nnssl"]`` names, the
    only finished pretraining made for these plans. It never guesses and never starts from random weights.
    A continued training and a validation need no pretrained file.

    Raises:
        NnsslError: from the constructor where the plan's figures are illegal or meant for another trainer; from
            :meth:`on_train_start`, before any data is loaded, where the weights are missing, ambiguous or do not fit.
    """

    pretrained: ClassVar[bool] = True
    control_note: ClassVar[str] = " (the control without pretraining)"
    primus: ClassVar[bool] = False
    one_output: ClassVar[bool] = False
    """Whether the network has no deep supervision."""
    begun_figures: ClassVar[tuple[str, ...]] = ("optimizer",)
    """Figures of which a continued training keeps what it began with, unless the plan names them."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net reads this very signature
    ) -> None:
        check_network(type(self), plans, configuration, self.primus)
        if device.type == "cpu":
            keep_to_threads()
            keep_freed_memory()
        self.followed_schedule = self.schedule_of(plans)
        self.figures = FineTuningConfig.from_plans(plans, self.followed_schedule, type(self).__name__)
        if self.followed_schedule == MEAN_TEACHER and self.schedule != MEAN_TEACHER:
            self.figures = replace(self.figures, labelled_first=1.0)  # the control: one schedule over as many steps
        plans = self.trained_plans(plans, configuration, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.figures.epochs
        self.num_iterations_per_epoch = self.figures.iterations
        self.num_val_iterations_per_epoch = self.figures.val_iterations
        self.initial_lr = self.figures.peak_lr
        if self.one_output:
            self.enable_deep_supervision = False
        self.provenance: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        self._loggers: list[FineTuningLogger] = []
        self.constructed()

    def trained_plans(self, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> dict[str, Any]:
        """The plans of the network that is trained; those given, if it is the plan's own."""
        return plans

    def constructed(self) -> None:
        """Called at the end of the constructor, whose signature nnU-Net reads: subclasses need none of their own."""

    def plan(self) -> Plan:
        """The plan of the network that is pretrained."""
        return Plan.from_dicts(self.plans_manager.plans, self.configuration_name, self.dataset_json, second_stage=True)

    def pretrained_network(self) -> torch.nn.Module:
        """The network that pretrained weights go into."""
        return self.network

    def stock_name(self) -> str | None:
        """The trainer of nnU-Net's that builds the same network, under whose name checkpoints are saved; None for our own."""
        same = type(self).build_network_architecture is nnUNetTrainer.build_network_architecture
        return nnUNetTrainer.__name__ if same else None

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As nnU-Net, where there are several outputs."""
        if not self.one_output:
            super().set_deep_supervision_enabled(enabled)

    def do_split(self) -> tuple[list[str], list[str]]:
        """As nnU-Net, with only the training cases that the plan chooses; validation cases are never among them."""
        chosen = self.told.get("train_cases")
        if not chosen:
            return super().do_split()
        train, val = folds_of(self.plan()).get(str(self.fold), ([], []))
        train, val = restrict(self.fold, train, val, chosen, self.told.get("val_cases"))
        self.print_to_log_file(f"nnssl: the plan trains this fold on {len(train)}: {', '.join(train)}")
        return train, val

    def initialize(self) -> None:
        """As nnU-Net; also remembers the random weights, to notice ``-pretrained_weights`` later."""
        super().initialize()
        if self.device.type == "cpu" and len(self.configuration_manager.patch_size) == 3:
            # a quarter less time a step with 8 to 64 features, the same with 16 to 128 (docs/performance-changes.md)
            self.network.to(memory_format=torch.channels_last_3d)
        self._digests = digests(self.network)

    def on_train_start(self) -> None:
        """Put the pretrained weights into the network of a new training, then go on as nnU-Net (data loading)."""
        if not self.was_initialized:
            self.initialize()
        try:
            self._refuse_fold_of_too_few()
            if self.current_epoch == 0:
                self._start_weights()
            self.before_loading()
            self._loggers = add_loggers(self, self._settings())
            super().on_train_start()
        except NnsslError as error:
            self.print_to_log_file(f"nnssl: {error}", also_print_to_console=False)
            raise

    def _refuse_fold_of_too_few(self) -> None:
        """nnU-Net's own error for a fold of fewer than five cases is scikit-learn's, and comes after the weights were loaded."""
        cases = 0 if self.fold == ALL else too_few(self.plan())
        if cases:
            raise NnsslError(
                f"{self.plans_manager.dataset_name} has {counted(cases, 'labelled case')}, too few for nnU-Net's {FOLDS} folds. "
                f"Type {ALL} in place of the fold {self.fold}. (With a plan of nnssl_plan --labels a fold works too: each case "
                "is left out once.)"
            )

    def on_train_end(self) -> None:
        """As nnU-Net; loggers hear that the training has come to its end."""
        super().on_train_end()
        for each in self._loggers:
            each.finished = True

    def _settings(self) -> dict[str, Any]:
        """What loggers get of the training."""
        return {
            "trainer": type(self).__name__,
            "dataset": self.plans_manager.dataset_name,
            "plans_name": self.plans_manager.plans_name,
            "configuration": self.configuration_name,
            "fold": str(self.fold),
            "weights": self.provenance.get("weights", ""),
            **{k: v for k, v in self.figures.to_dict().items() if v is not None},
            "schedule": self.followed_schedule,
        }

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """As nnU-Net; the second stage of a cascade is refused where the first has not predicted all of its cases.

        Raises:
            NnsslError: says how many cases, and which command predicts them.
        """
        datasets = super().get_tr_and_val_datasets()
        if not self.is_cascaded:
            return datasets
        folder = Path(self.folder_with_segs_from_previous_stage)
        there = {file.stem for file in folder.glob("*") if file.suffix in (".b2nd", ".npz", ".npy")}
        cases = {case for dataset in datasets for case in dataset.identifiers}
        missing = sorted(cases - there)
        if missing:
            name, first = self.plans_manager.dataset_name, self.configuration_manager.previous_stage_name
            named = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise NnsslError(
                f"{self.configuration_name} is the second stage of a cascade, and {len(missing)} of the fold's {len(cases)} "
                f"cases have no segmentation of the first, {first}, in {folder}: {named}. Train that first, in every fold, with "
                f"the same trainer and plans; its validations write them:\n"
                f"  nnUNetv2_train {dataset_id(name)} {first} FOLD -p {self.plans_manager.plans_name} -tr {type(self).__name__}"
            )
        return datasets

    def before_loading(self) -> None:
        """Called once the weights are there, before any data is loaded."""

    def _start_weights(self) -> None:
        changed = [name for name, digest in digests(self.network).items() if self._digests[name] != digest]
        named = self.told.get("checkpoint")
        self.provenance = {"trainer": type(self).__name__, "version": nnssl.__version__, **self.figures.to_dict()}
        self.provenance["schedule"] = self.followed_schedule
        if not self.pretrained:
            if changed:
                raise NnsslError(
                    f"{type(self).__name__} starts from random weights{self.control_note} and takes no -pretrained_weights; "
                    f"use -tr {trainer_for(self.followed_schedule, self.primus)}."
                )
            self._refuse_untrained(f"{type(self).__name__} starts from random weights")
            self.provenance["weights"] = "random"
            self.set_backbone()
            self.print_to_log_file(f"nnssl: random weights{self.control_note}.")
        elif changed:
            self._report_given(changed, named)
        else:
            self._load_found()

    def _refuse_untrained(self, why: str) -> None:
        """Raise where the plan asks for no training and some of the weights would be random."""
        if self.num_epochs == 0:
            raise NnsslError(
                f"Plans '{self.plans_manager.plans.get('plans_name', '?')}' have 0 epochs, which keeps the weights as they are; "
                f"{why}. Give it epochs (nnssl_plan --epochs), or weights with heads that have learnt these labels (--labelled)."
            )

    def _report_given(self, changed: list[str], named: str | None) -> None:
        """What nnU-Net loaded through ``-pretrained_weights``: it does not tell us the file, but its effect shows."""
        state = canonical_state_dict(self.network)
        if len(changed) < len(state):
            self._refuse_untrained(f"-pretrained_weights has left {len(state) - len(changed)} tensors random")
        share = 100 * sum(state[n].numel() for n in changed) / sum(t.numel() for t in state.values())
        text = f"nnssl: -pretrained_weights has set {len(changed)} of {len(state)} tensors, {share:.1f} % of all parameters"
        text += f"; the plan's own file {named} is not used." if named else "; no pretraining is searched."
        self.provenance["weights"] = "-pretrained_weights"
        self.set_backbone(changed_parts(self.network, changed))
        report = {"loaded_tensors": len(changed), "tensors": len(state), "loaded_percent": share}
        self._write_report(text, {"source": "-pretrained_weights", "not_used": named, "report": report})

    def _load_found(self) -> None:
        plan = self.plan()
        source = find_weights(plan)
        loaded = checkpoints.load(source.path, key=source.place.get("key"), prefix=source.place.get("prefix"))
        if loaded.verdict is not None and not loaded.verdict[0]:
            self.print_to_log_file(f"nnssl: WARNING: {source.path} says of itself: {loaded.verdict[1]}")
        parts = parts_for(plan.nnssl, self.followed_schedule)
        report = transfer.apply(self.pretrained_network(), loaded, plan=plan, parts=parts)
        left = [part.part for part in report.parts if part.random]
        if left:
            self._refuse_untrained(f"{source.path} leaves random: {', '.join(left)}")
        self.check_transfer(report, source.path)
        self.note_source(loaded)
        filled = [part.part for part in report.parts if part.loaded or part.adapted]
        self.set_backbone(part for part in filled if not transfer.is_head(part))
        self.provenance.update(weights="pretrained", sha256=source.sha256, method=loaded.method, parts=parts)
        text = f"nnssl: weights from {source.path}, {source.why}\n{report}"
        learnt = loaded.nnssl.get("omni") and self.fold != ALL
        seen = checkpoints.labels_seen(loaded.nnssl, plan.dataset_name, self.do_split()[1]) if learnt else []
        if seen:
            text += (
                f"\nWARNING: the pretraining has learnt from the labels of {len(seen)} of this fold's validation cases, "
                f"first {seen[0]}: the validation says nothing about new images. Pretrain with -o omni.fold={self.fold}, or "
                "evaluate on other images."
            )
        content = {
            "labels_seen": len(seen),
            "source": encode_path(source.path),
            "sha256": source.sha256,
            "method": loaded.method,
            "report": report.to_dict(),
        }
        self._write_report(text, content)

    def check_transfer(self, report: transfer.TransferReport, path: Path) -> None:
        """Raise where this trainer needs more than was transferred."""

    def note_source(self, loaded: checkpoints.Checkpoint) -> None:
        """Called with the pretrained file once its weights are in the network."""

    def _write_report(self, text: str, content: dict[str, Any]) -> None:
        self.print_to_log_file(text)
        if self.local_rank == 0:
            folder = Path(self.output_folder)
            write_json(folder / "transfer_report.json", content)
            write_atomic(folder / "transfer_report.txt", lambda file: file.write(f"{text}\n".encode()))

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net, but written whole or not at all, under the stock trainer's name, and with the provenance.

        nnU-Net's own code makes the content, so that it stays nnU-Net's. Numpy's numbers become Python's, so that
        ``torch.load(weights_only=True)`` reads the file.
        """
        content = content_of(super().save_checkpoint)
        if content is None:  # another rank, or checkpoints are off
            return
        content["trainer_name"] = self.stock_name() or content["trainer_name"]
        content[PROVENANCE] = self.provenance
        if self.rates:
            content[RATES] = list(self.rates)
        content.update(self.extra_content(final=Path(filename).name == "checkpoint_final.pth"))
        checkpoints.save(filename, content)

    def extra_content(self, final: bool) -> dict[str, Any]:
        """More entries of a checkpoint: tensors and plain values; ``final`` of the last one of a training."""
        return {}

    def take_extra_content(self, content: dict[str, Any]) -> None:
        """Take back :meth:`extra_content` from a loaded checkpoint."""

    def keep_begun(self, begun: Mapping[str, Any]) -> None:
        """Go on with figures that the training began with where the plan names none: defaults change, and go by the length."""
        now = self.figures.to_dict()
        other = {k: begun[k] for k in self.begun_figures if k in begun and begun[k] != now[k]}
        kept = {k: v for k, v in other.items() if self.told.get(k) is None}
        changed = ", ".join(f"{k} {v} -> {now[k]}" for k, v in other.items() if k not in kept)
        if "optimizer" in kept and self.told.get("peak_lr") is None:
            kept["peak_lr"] = begun["peak_lr"]
        self.figures = replace(self.figures, **kept)
        if "optimizer" in kept:
            self.initial_lr = self.figures.peak_lr
            if self.was_initialized:
                self.optimizer, self.lr_scheduler = self.configure_optimizers()
        if kept:
            text = ", ".join(f"{k} {v} (now {now[k]})" for k, v in kept.items())
            self.print_to_log_file(f"nnssl: this training keeps what it began with: {text}")
        if changed:
            self.print_to_log_file(f"nnssl: WARNING: the plan has changed since this training began: {changed}")

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """As nnU-Net; the provenance and the learning rates so far come along."""
        content = filename_or_checkpoint
        if not isinstance(content, dict):  # nnU-Net itself would run whatever the file asks for
            content = read_file(Path(content))
        self.keep_begun(content.get(PROVENANCE, {}))
        with plain_loading():
            super().load_checkpoint(filename_or_checkpoint)
        self.provenance = content.get(PROVENANCE, {})
        self.rates = content.get(RATES, [])
        self.set_backbone(self.provenance.get("backbone"))
        self.take_extra_content(content)


class nnUNetTrainerPretrainedScratch(nnUNetTrainerPretrained):
    """The control without pretraining: random weights, and whatever schedule, figures and cases the plan names."""

    pretrained: ClassVar[bool] = False

    @classmethod
    def schedule_of(cls, plans: dict[str, Any]) -> str:
        """The plan's schedule, so that a pretrained arm and its control share one plan."""
        asked = (plans.get("nnssl") or {}).get("schedule") or cls.schedule
        return asked if cls.__name__ in followers(asked) else cls.schedule
