"""How far pseudo-labels agree with labels that were held out, and pseudo-labels as volumes: a watcher of the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnssl.config import config_dict
from nnssl.distributed import rank, world_size
from nnssl.plans.labels import case_order
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.omni.cases import class_locations, head_names
from nnssl.pretrain.omni.dice import Counts, class_masks, mean_dice
from nnssl.pretrain.omni.method import omni_of
from nnssl.pretrain.omni.patches import LabelledDataset
from nnssl.pretrain.omni.volumes import write_volumes
from nnssl.weights import case_hash, label_set
from nnssl.words import counted

if TYPE_CHECKING:
    from nnssl.pretrain.engine.loop import Engine
    from nnssl.pretrain.omni.auxiliary import OmniLoaders
    from nnssl.pretrain.omni.config import OmniConfig

log = logging.getLogger("nnssl")

CASES = 64
"""Held-out labelled cases that are compared on at most."""


class PseudoMetricsHook(Hook):
    """Measures pseudo-labels of held-out labelled cases before the first step and after each epoch, and writes volumes."""

    name = "omni"

    def __init__(self, config: OmniConfig, auxiliary: OmniLoaders) -> None:
        self.config, self.auxiliary = config, auxiliary
        self.trace: list[dict[str, Any]] = []
        self._data: LabelledDataset | None = None
        self._written = -1

    def start(self, engine: Engine) -> None:
        """Choose the patches; measure the untrained network."""
        seed, cases = engine.spec.seed, self.auxiliary.cases
        wanted = set(case_order([c.name for c in cases.held_out], seed)[:CASES]) if self.config.compared else set()
        found = [
            c
            for c in cases.held_out
            if c.name in wanted and any(map(len, class_locations(cases.folder, c.name).values()))
        ]
        if found:
            self._data = self.auxiliary.labelled_dataset(found, held_out=True, batch=self.config.compared)
            log.info("Pseudo-labels are compared with the labels of %d held-out cases.", len(found))
        else:
            log.info("Pseudo-labels are compared with no labels: no labelled case is held out.")
        if engine.step == 0 and self._data is not None:
            numbers = self._measure(engine, 0)
            engine.log.event("pseudo", epoch=0, step=0, **numbers)

    def after_epoch(self, engine: Engine, row: dict[str, Any]) -> None:
        """Add ``pseudo/*`` to the epoch's row; write volumes where they are due."""
        epoch = int(row["epoch"])
        if self._data is not None:
            numbers = self._measure(engine, epoch)
            row.update({f"pseudo/{k}": v for k, v in numbers.items()})
            text = f"pseudo-labels: Dice {numbers['dice']:.3f} with held-out labels"
            text += f" (network itself {numbers['student_dice']:.3f})"
            if self.config.threshold > 0:
                text += f", {100 * numbers['confident']:.0f} % of the voxels above the threshold"
            log.info("%s", text)
        every = self.config.volumes_every
        if every and epoch % every == 0:
            self._write(engine, epoch)

    def finish(self, engine: Engine) -> str | None:
        """Write volumes; tell how the Dice went."""
        self._write(engine, engine.step // engine.spec.iterations)
        if not self.trace:
            return None
        first, last = self.trace[0], self.trace[-1]
        best = max(self.trace, key=lambda r: r["dice"])
        return (
            f"Pseudo-labels agree with held-out labels by Dice {last['dice']:.3f} ({first['dice']:.3f} at epoch "
            f"{first['epoch']}, most {best['dice']:.3f} at epoch {best['epoch']})."
        )

    @torch.no_grad()
    def _measure(self, engine: Engine, epoch: int) -> dict[str, float]:
        """Dice of the teacher's labels and of the network's own over all patches of all ranks."""
        method = omni_of(engine.method)
        data, device, training = self._data, engine.spec.device, method.training
        if data is None:
            raise ValueError("nothing to measure on")
        plan = self.auxiliary.plan
        names = head_names(plan)
        teacher, student = Counts(list(names), device), Counts(list(names), device)
        method.eval()
        for sample in range(rank(), data.batch, world_size()):
            patch = data[0, sample]
            x = torch.from_numpy(patch.data)[None].to(device)
            label = torch.from_numpy(patch.label)[None].to(device).long()
            known = label != method.omni_ignore
            with engine.stepper.autocast():
                logits = method.omni_logits(x)
                same = method.omni_network() is method.network
                own = logits if same else method.omni_logits(x, method.network)
            heads = _counted(patch.case.annotated, names, device, x.ndim)
            for counts, z in ((teacher, logits), (student, own)):
                counts.add(class_masks(plan, method.omni_labels(z)), class_masks(plan, label), known & heads)
            sure = method.omni_confidence(logits) >= self.config.threshold
            teacher.add_share(sure.sum(), sure.numel())
        method.train(training)
        teacher.reduce()
        student.reduce()
        dice, own_dice = teacher.dice(), student.dice()
        numbers = {"dice": mean_dice(dice), "student_dice": mean_dice(own_dice), "confident": teacher.share()}
        numbers.update({f"dice_{name}": value for name, value in dice.items()})
        self.trace.append({"epoch": epoch, **numbers})
        return numbers

    def _write(self, engine: Engine, epoch: int) -> None:
        """Rank 0 writes volumes once an epoch."""
        if rank() != 0 or not self.config.volumes or self._written == epoch:
            return
        self._written = epoch
        folder = engine.spec.folder.path / "pseudo_labels" / f"epoch_{epoch:04d}"
        rows = write_volumes(engine, self.auxiliary, self.config.volumes, folder)
        for row in rows:
            engine.log.event("volume", epoch=epoch, **row)  # no step: TensorBoard is closed by now
        log.info("Pseudo-labels of %s as volumes: %s", counted(len(rows), "case"), folder)

    def panel(self) -> Callable[[Any], None] | None:
        """Draws the Dice over epochs."""
        return self._draw if self._data is not None else None

    def _draw(self, axis: Any) -> None:
        epochs = [r["epoch"] for r in self.trace]
        axis.plot(epochs, [r["dice"] for r in self.trace], label="averaged network, mean", color="black")
        axis.plot(epochs, [r["student_dice"] for r in self.trace], label="network itself, mean", color="grey", ls="--")
        names = [k for k in (self.trace[-1] if self.trace else {}) if k.startswith("dice_")]
        for name in names[:8]:
            axis.plot(epochs, [r.get(name) for r in self.trace], label=name.removeprefix("dice_"), lw=0.8)
        axis.set_ylim(0, 1)
        axis.set_title("Are its own labels right?", fontsize=11.5, fontweight="bold", pad=20)
        hint = "on labelled cases that are held out; higher is better"
        axis.text(0.5, 1.02, hint, transform=axis.transAxes, ha="center", va="bottom", fontsize=9, color="0.3")
        axis.set_ylabel("Dice with the expert's labels", fontsize=9)

    def checkpoint_info(self) -> dict[str, Any]:
        """``omni``: options, trace, and hashes of the cases whose labels were learnt from; ``heads``: their label set."""
        cases, plan = self.auxiliary.cases, self.auxiliary.plan
        heads = head_names(plan)
        learnt = {n for n, i in heads.items() if any(c.annotated is None or i in c.annotated for c in cases.train)}
        return {
            **({"heads": label_set(plan.dataset_json, learnt)} if self.config.seg_weight > 0 else {}),
            "omni": {
                "labelled": cases.dataset,
                "choice": cases.why,
                "case_hashes": sorted(case_hash(c.name) for c in cases.train),
                "options": config_dict(self.config),
                "trace": [dict(r) for r in self.trace],
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """The trace."""
        return {"trace": [dict(r) for r in self.trace]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the trace."""
        self.trace = [dict(r) for r in state.get("trace", [])]


def _counted(annotated: tuple[int, ...] | None, names: dict[str, int], device: torch.device, ndim: int) -> Tensor:
    """Which classes are annotated, ``(1, R, 1, ...)`` bool."""
    mask = [annotated is None or head in annotated for head in names.values()]
    return torch.tensor(mask, device=device).view(1, -1, *[1] * (ndim - 2))
