"""What is read beside the crops of a step: labelled patches, and after the switch patches for pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nnssl.distributed import rank, world_size
from nnssl.plans import Plan
from nnssl.pretrain.data.case import CaseFormat, CaseReader
from nnssl.pretrain.data.case_set import CaseRef, CaseSet
from nnssl.pretrain.data.crops import CropDataset
from nnssl.pretrain.data.sampling import SampleStream
from nnssl.pretrain.data.weights import case_weights
from nnssl.pretrain.omni.cases import LabelledCase, LabelledSet
from nnssl.pretrain.omni.patches import UNLABELLED, LabelledDataset, Patches, Sizes, stack
from nnssl.pretrain.types import CropRequest, Crops


@dataclass
class OmniCrops:
    """What the loader delivers for one step on one rank.

    Attributes:
        ssl: the method's own crops.
        labelled: labelled patches; None where there are none to evaluate on.
        unlabelled: patches for pseudo-labels; None before the switch.
    """

    ssl: Crops
    labelled: Patches | None
    unlabelled: Patches | None

    @property
    def case(self) -> list[str]:
        """Names of all cases of the step."""
        more = [p.case for p in (self.labelled, self.unlabelled) if p is not None]
        return [*self.ssl.case, *(name for names in more for name in names)]

    def _map(self, how: Any) -> OmniCrops:
        parts = [None if p is None else how(p) for p in (self.labelled, self.unlabelled)]
        return OmniCrops(how(self.ssl), *parts)

    def to(self, device: torch.device, non_blocking: bool = True) -> OmniCrops:
        """Move all tensors to ``device``."""
        return self._map(lambda part: part.to(device, non_blocking))

    def pin_memory(self) -> OmniCrops:
        """Called by torch's DataLoader."""
        return self._map(lambda part: part.pin_memory())

    def __len__(self) -> int:
        return len(self.ssl)


@dataclass(frozen=True)
class StepReader:
    """Reads the patches of a step on one rank; pickles, and is called in the loader's processes.

    Attributes:
        switch: first step that has patches for pseudo-labels.
        augment: whether patches are to be augmented.
    """

    labelled: LabelledDataset | None
    unlabelled: CropDataset | None
    sizes: Sizes
    switch: int
    augment: bool
    rank: int = field(default_factory=rank)
    world_size: int = field(default_factory=world_size)

    def _mine(self, total: int) -> range:
        """Which of a step's patches this rank reads."""
        share = total // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)

    def read(self, step: int) -> tuple[Patches | None, Patches | None]:
        """Labelled patches and, from the switch on, patches for pseudo-labels."""
        labelled = unlabelled = None
        if self.labelled is not None:
            total = self.sizes.labelled
            mine = self._mine(total)
            labelled = stack([self.labelled[step, i] for i in mine], mine.start, total, self.augment)
        if self.unlabelled is not None and step >= self.switch:
            total = self.sizes.unlabelled
            mine = self._mine(total)
            samples = [self.unlabelled[step, i] for i in mine]
            data, names = torch.stack([torch.from_numpy(s.data) for s in samples]), [s.case for s in samples]
            unlabelled = Patches(data, None, [None] * len(mine), names, mine.start, total, self.augment)
        return labelled, unlabelled

    @staticmethod
    def join(crops: Crops, read: tuple[Patches | None, Patches | None]) -> OmniCrops:
        """Put the patches beside the crops."""
        return OmniCrops(crops, *read)


@dataclass(frozen=True)
class OmniLoaders:
    """Makes the auxiliary loaders of a run.

    Attributes:
        case_set: the images without labels.
        switch: first step of the second stage.
        augment: whether training patches are augmented.
        weights: how often the cases of each source are drawn, by its name; None for equally often.
    """

    plan: Plan
    case_set: CaseSet
    cases: LabelledSet
    sizes: Sizes
    seed: int
    switch: int
    augment: bool
    weights: dict[str, float] | None = None

    def reader(self, split: str) -> StepReader:
        """Of ``"train"``, or of ``"held_out"``, which reads held-out labelled cases and never augments."""
        if split == "train":
            data = self.labelled_dataset(self.cases.train)
            return StepReader(data, self._unlabelled(self.case_set.train), self.sizes, self.switch, self.augment)
        held_out = self.cases.held_out
        labelled = self.labelled_dataset(held_out, held_out=True) if held_out else None
        return StepReader(labelled, None, self.sizes, self.switch, augment=False)

    def labelled_dataset(
        self, cases: Sequence[LabelledCase], *, held_out: bool = False, batch: int | None = None
    ) -> LabelledDataset:
        """Patches of labelled cases, ``batch`` (as in a step) at once; of held-out ones without a margin, in a fixed order."""
        sizes = self.sizes if batch is None else replace(self.sizes, labelled=batch)
        return LabelledDataset(cases, self.cases.folder, self.plan, sizes, seed=self.seed, held_out=held_out)

    def _unlabelled(self, refs: Sequence[CaseRef]) -> CropDataset:
        s = self.sizes
        return CropDataset(
            refs,
            CaseReader(CaseFormat.from_plan(self.plan)),
            CropRequest(size=s.size, read_size=s.read_size),
            SampleStream(self.seed, s.unlabelled, UNLABELLED, case_weights(refs, self.weights)),
        )

    def random(self, crops: Crops) -> OmniCrops:
        """Random patches of the second stage beside random crops, for an estimate of time and memory."""
        g, size = torch.Generator().manual_seed(1), self.sizes.read_size

        def patches(total: int, labels: bool) -> Patches:
            data = torch.randn(total, self.plan.n_channels, *size, generator=g)
            label = torch.randint(0, self.plan.n_classes, (total, 1, *size), generator=g, dtype=torch.int16)
            names = [f"case{i}" for i in range(total)]
            return Patches(data, label if labels else None, [None] * total, names, 0, total, self.augment)

        return OmniCrops(crops, patches(self.sizes.labelled, True), patches(self.sizes.unlabelled, False))
