"""Few labels and many images without: nnU-Net's training in two stages, the second with an averaged teacher's pseudo-labels.

Stage 1 learns from the labelled cases to convergence, with a warm-up and a decay of its own. Stage 2 starts a teacher as a copy
of the network and a new schedule. Half of each batch are labelled patches, half patches of the pool: the teacher labels a patch
that has been turned, scaled, shifted and mirrored; the student learns that label on the same patch after its intensities have
changed. Loss, deep supervision and what moves voxels are nnU-Net's own, but for a shift; intensities change more than there, with
very few labels those of labelled patches too. The teacher follows the student after each step; the student is kept.

Sources: :mod:`nnssl.teacher`. Labels are hard, without a threshold: nearly all voxels would pass one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor

from nnssl.ema import EMA
from nnssl.errors import NnsslError
from nnssl.plans.figures import MEAN_TEACHER
from nnssl.plans.labels import ALL, case_order, folds_of
from nnssl.plans.unlabelled import UnlabelledPool, find_unlabelled
from nnssl.teacher.averaging import averaging_momentum
from nnssl.teacher.components import class_names, foreground_classes, keep_largest, one_piece_of_cases
from nnssl.teacher.pseudo_labels import labels_of
from nnssl.trainers.learning_rates import draw_below
from nnssl.trainers.pool import Halves, UnlabelledDataset, shifted, split_transforms, with_strong_changes
from nnssl.trainers.pretrained import nnUNetTrainerPretrained
from nnssl.trainers.pseudo_label_trace import draw_trace, overlap_sums, trace_lines, trace_row
from nnssl.weights import Checkpoint
from nnssl.words import counted

TEACHER = "nnssl_mean_teacher"
"""Key of a fine-tuned checkpoint: the teacher, the steps that it has followed, and what was measured after each epoch."""
BEFORE = {"intensities": "nnunet", "shift": 0.0, "weight": 0.5}
"""What versions did that did not know these figures."""
BY_LABELS = ("weight", "labelled_intensities", "strength")
"""The figures that go by the number of labelled cases where the plan names none."""


class nnUNetTrainerPretrainedMeanTeacher(nnUNetTrainerPretrained):
    """Two stages: the labels, then the labels and the images without labels, from pretrained weights.

    The images are those that the plan names (``nnssl_plan --unlabelled``), else those whose labels a few-label variant leaves out
    and those that the weights were pretrained on; see :func:`nnssl.plans.unlabelled.find_unlabelled`. Figures:
    :class:`nnssl.plans.figures.FineTuningConfig`.

    Raises:
        NnsslError: as the parent; also where there is no image without labels, or the configuration is a cascade's second stage.
    """

    schedule: ClassVar[str] = MEAN_TEACHER
    begun_figures: ClassVar[tuple[str, ...]] = (
        "optimizer", "weight", "intensities", "labelled_intensities", "strength", "shift", "momentum", "largest",
    )  # fmt: skip
    dataloader_train: Any

    def constructed(self) -> None:
        """Nothing of the second stage is there yet."""
        if self.is_cascaded:
            raise NnsslError(
                f"{type(self).__name__} cannot train {self.configuration_name}, which takes segmentations of "
                f"{self.configuration_manager.previous_stage_name}: images without labels have none. Train that stage with it."
            )
        self.teacher: EMA | None = None
        self.pool: UnlabelledPool | None = None
        self.trace: list[dict[str, Any]] = []
        self._followed = 0
        self._largest: list[Any] = []
        self._pretrained_on: dict[str, Any] = {}
        self._transforms: Any = None
        self._targets: Any = None
        self._labelled_loader: Any = None
        self.dataloader_unlabelled: Any = None
        self._sums: Tensor | None = None

    # ---- schedule -------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One; the rate rises and falls once in each stage."""
        return [{"name": "network", "params": list(self.network.parameters())}]

    @property
    def first_epochs(self) -> int:
        """Epochs of the first stage."""
        return replace(self.figures, epochs=self.num_epochs).stages.first

    # ---- the pool -------------------------------------------------------------------------------------------------

    def before_loading(self) -> None:
        """Find the images without labels, so that nothing is missing when the second stage begins."""
        train, val = self.do_split()
        if self.fold == ALL:  # validates on what it does not train on: only cases that the plan names are held back
            val = list((self.told.get("val_cases") or {}).get(ALL, ()))
        self.figures = self.figures.with_labels(len(train))
        self.provenance.update({key: getattr(self.figures, key) for key in BY_LABELS}, labelled_cases=len(train))
        if self.first_epochs == self.num_epochs:
            why = "labelled_first" if self.figures.labelled_first >= 1 else "a single epoch"
            self.print_to_log_file(
                f"nnssl: mean teacher: {counted(len(train), 'labelled case')}, no second stage ({why}): all "
                "epochs learn from the labels"
            )
            return
        rest: list[str] = []
        if self.told.get("train_cases"):
            rest = sorted(set(folds_of(self.plan())[str(self.fold)][0]) - {*train, *val})
        self.pool = find_unlabelled(self.plan(), train, val, rest=rest, pretrained_on=self._pretrained_on)
        self._largest = self._one_piece_classes(train)
        self.print_to_log_file(f"nnssl: mean teacher: {self._introduction(len(train))}")

    def _introduction(self, labelled: int) -> str:
        one = ", ".join(class_names(self.label_manager, self._largest)) or "none"
        why = "all labelled cases show it as one piece" if self.figures.largest == "auto" else "as the plan asks"
        return (
            f"{counted(labelled, 'labelled case')}, {self.pool}\n"
            f"  epochs 0 to {self.first_epochs - 1} learn from the labels, {self.first_epochs} to {self.num_epochs - 1} from the "
            "pool too\n"
            f"  largest component kept of: {one}{f' ({why})' if self._largest else ''}\n"
            f"  intensities without labels: {self.figures.intensities} changes, strength {self.figures.strength:g}; of labelled "
            f"patches: {self.figures.labelled_intensities}\n"
            f"  weight of patches without labels in the loss: {self.figures.weight:g}"
        )

    def _one_piece_classes(self, train: Iterable[str]) -> list[Any]:
        """The classes of which pseudo-labels keep the largest component."""
        classes = foreground_classes(self.label_manager)
        if self.figures.largest != "auto":
            return classes if self.figures.largest == "always" else []
        dataset = self.dataset_class(self.preprocessed_dataset_folder, list(train))
        return one_piece_of_cases(
            case_order(dataset.identifiers, 0),
            lambda case: np.asarray(dataset.load_case(case)[1][0]),
            classes,
            self.configuration_manager.patch_size,
        )

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's augmentation with a shift (figure ``shift``) and with the changes of intensity that labelled patches have."""
        transforms = shifted(super().get_training_transforms(*args, **kwargs), self.figures.shift)
        self._transforms = deepcopy(transforms)
        return with_strong_changes(transforms) if self.figures.labelled_intensities == "strong" else transforms

    # ---- the second stage -----------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """As the parent; the first epoch of the second stage starts the teacher, the pool's loader and a new optimiser state."""
        if self.current_epoch >= self.first_epochs and self.dataloader_unlabelled is None:
            self._start_second_stage()
        self._sums = None
        super().on_train_epoch_start()

    def _start_second_stage(self) -> None:
        if self.teacher is None:
            self._make_teacher()
            if self.current_epoch == self.first_epochs:
                self.optimizer.state = defaultdict(dict)
                self.print_to_log_file("nnssl: stage 2 begins: teacher, schedule and optimiser start anew")
            else:
                self.print_to_log_file("nnssl: WARNING: the checkpoint held no teacher; it starts again as the network")
        self._labelled_loader = self.dataloader_train
        self.dataloader_unlabelled = self._load_pool()
        self.dataloader_train = Halves(self._labelled_loader, self.dataloader_unlabelled, self.labelled_share)

    def _make_teacher(self) -> EMA:
        self.teacher = EMA(self.network).to(self.device)
        decoder: Any = self.teacher.module.get_submodule("decoder")
        decoder.deep_supervision = False
        self._followed = 0
        return self.teacher

    @property
    def labelled_share(self) -> int:
        """Labelled patches of a batch of the second stage on this rank."""
        return max(1, (self.batch_size + 1) // 2)

    @property
    def unlabelled_share(self) -> int:
        """Patches without labels of such a batch; at least one, also where a rank has a batch of one."""
        return max(1, self.batch_size // 2)

    def _load_pool(self) -> Any:
        """Processes that read and augment patches of the pool, as many as nnU-Net has for its validation."""
        if self.pool is None or self.figures.strength is None:
            raise RuntimeError("the second stage starts after on_train_start")
        views, self._targets = split_transforms(self._transforms, self.figures.strength, self.figures.intensities)
        _, _, initial_patch, _ = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        loader = nnUNetDataLoader(
            UnlabelledDataset(self.pool.cases),
            self.unlabelled_share,
            initial_patch,
            self.configuration_manager.patch_size,
            self.label_manager,
            oversample_foreground_percent=0.0,
            transforms=views,
        )
        loader.has_ignore = False  # nnU-Net would look for annotated voxels
        processes = get_allowed_n_proc_DA()
        if processes == 0:
            return SingleThreadedAugmenter(loader, None)
        processes = max(1, processes // 2)
        # without seeds torch's are equal in all of them
        seeds = [int(seed) for seed in np.random.randint(0, 2**31 - 1, processes)]
        return NonDetMultiThreadedAugmenter(
            loader,
            None,
            processes,
            num_cached=max(3, processes // 2),
            seeds=seeds,
            pin_memory=self.device.type == "cuda",
            wait_time=0.002,
        )

    def own_loss(self, batch: dict) -> bool:
        """Batches of the second stage."""
        return "views" in batch

    def batch_loss(self, batch: dict) -> Tensor:
        """nnU-Net's loss on labels and the same loss against the teacher's labels, which has the share ``weight``."""
        if "views" not in batch:
            return super().batch_loss(batch)
        data, target = self.moved(batch["data"]), self.moved(batch["target"])
        seen, changed = self.moved(batch["views"]).chunk(2, dim=1)
        made = self.pseudo_labels(seen, self.moved(batch["outside"]))
        outputs = self.outputs(torch.cat([data, changed]))
        n, levels = len(data), isinstance(outputs, (list, tuple))
        labelled = [o[:n] for o in outputs] if levels else outputs[:n]
        other = [o[n:] for o in outputs] if levels else outputs[n:]
        finest: Any = other[0] if levels else other
        self._measure(made, finest.detach(), target[0] if levels else target)
        weight: Any = self.figures.weight  # before_loading has set it
        return (1 - weight) * self.loss(labelled, target) + weight * self.loss(other, self.targets_of(made))

    @torch.no_grad()
    def pseudo_labels(self, seen: Tensor, outside: Tensor) -> Tensor:
        """The teacher's label map ``(B, 1, *size)`` int16 of patches as it sees them.

        ``outside`` is below 0 where there is no image; there it is background, as nnU-Net's labels are.
        """
        teacher = self.teacher or self._make_teacher()
        # on one thread torch leaves oneDNN for a batch of one, which takes more than twice as long as a batch of two
        twice = len(seen) == 1 and seen.device.type == "cpu" and torch.get_num_threads() == 1
        logits = teacher(torch.cat([seen, seen]))[:1] if twice else teacher(seen)
        made = labels_of(logits.float(), self._order())
        made = torch.where(outside < 0, 0, made).to(torch.int16)
        return keep_largest(made, self._largest)

    def _order(self) -> list[int] | None:
        manager = self.label_manager
        return [int(c) for c in manager.regions_class_order] if manager.has_regions else None

    def targets_of(self, made: Tensor) -> Any:
        """Label maps -> what nnU-Net's loss takes: regions, and one target a level where there is deep supervision."""
        each = [self._targets(segmentation=one)["segmentation"] for one in made]
        if isinstance(each[0], list):
            return [torch.stack(level) for level in zip(*each)]
        return torch.stack(each)

    def after_step(self) -> None:
        """The teacher follows the student."""
        super().after_step()
        if self.teacher is not None:
            self.teacher.update(self.network, averaging_momentum(self._followed, self.figures.momentum))
            self._followed += 1

    # ---- what a person should see ---------------------------------------------------------------------------------

    def _measure(self, made: Tensor, logits: Tensor, target: Tensor) -> None:
        """Add to this epoch's sums: overlap and sizes of teacher's and student's foreground, and voxels of both halves."""
        own = labels_of(logits.float(), self._order())
        ignore = self.label_manager.ignore_label
        if self.label_manager.has_regions:
            known = target[:, : len(self.label_manager.foreground_regions)]
            truth = known.bool().any(1)
        else:
            truth = (target > 0) if ignore is None else (target > 0) & (target != ignore)
        sums = overlap_sums(made, own, truth)
        self._sums = sums if self._sums is None else self._sums + sums

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As nnU-Net; then what teacher and student make of the pool."""
        super().on_train_epoch_end(train_outputs)
        if self._sums is None:
            return
        sums = self._sums
        if self.is_ddp:
            dist.all_reduce(sums)
        row = trace_row(self.current_epoch, sums)
        self.trace = [*(r for r in self.trace if r["epoch"] < self.current_epoch), row]
        for line in trace_lines(row):
            self.print_to_log_file(f"nnssl: {line}")

    def on_epoch_end(self) -> None:
        """As the parent; ``progress.png`` gets a panel on the pseudo-labels."""
        super().on_epoch_end()
        if self.local_rank == 0 and self.trace:
            draw_below(Path(self.output_folder) / "progress.png", lambda ax: draw_trace(self.trace, ax))

    # ---- files ----------------------------------------------------------------------------------------------------

    def note_source(self, loaded: Checkpoint) -> None:
        """Remember which images the weights were pretrained on."""
        data = loaded.nnssl.get("data") or {}
        self._pretrained_on = {k: data[k] for k in ("sources", "case_hashes") if k in data}

    def extra_content(self, final: bool) -> dict[str, Any]:
        """The teacher, which a finished training no longer needs, and what was measured."""
        own: dict[str, Any] = {"followed": self._followed, "trace": self.trace, "pretrained_on": self._pretrained_on}
        if self.teacher is not None and not final:
            own["teacher"] = self.teacher.module.state_dict()
        return {**super().extra_content(final), TEACHER: own}

    def take_extra_content(self, content: dict[str, Any]) -> None:
        """The teacher, its step, and what was measured come back with ``--c``."""
        super().take_extra_content(content)
        own = content.get(TEACHER) or {}
        self.trace, self._pretrained_on = list(own.get("trace", [])), dict(own.get("pretrained_on", {}))
        if "teacher" in own:
            self._make_teacher().module.load_state_dict(own["teacher"])
            self._followed = int(own["followed"])

    def keep_begun(self, begun: Mapping[str, Any]) -> None:
        """As the parent, with what versions did that did not know all figures."""
        if "momentum" in begun:  # any version that wrote figures
            begun = {**BEFORE, "labelled_intensities": begun.get("intensities", BEFORE["intensities"]), **begun}
            self.figures = self.figures.with_labels(begun.get("labelled_cases") or len(self.do_split()[0]))
        super().keep_begun(begun)

    def on_train_end(self) -> None:
        """As nnU-Net; the pool's processes end too."""
        if self._labelled_loader is not None:
            self.dataloader_train = self._labelled_loader
        super().on_train_end()
        if isinstance(self.dataloader_unlabelled, NonDetMultiThreadedAugmenter):
            self.dataloader_unlabelled._finish()
        self.dataloader_unlabelled = self.teacher = None


class nnUNetTrainerMeanTeacher(nnUNetTrainerPretrainedMeanTeacher):
    """The same two stages from random weights."""

    pretrained: ClassVar[bool] = False
    control_note: ClassVar[str] = ""
