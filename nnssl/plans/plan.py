"""One configuration of one plans file, with everything that pretraining asks of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnssl.errors import NnsslError, did_you_mean, raise_problems
from nnssl.files import read_json
from nnssl.paths import preprocessed_folder, set_folders
from nnssl.plans.check import check_arguments, check_configuration, check_part, check_plans
from nnssl.plans.datasets import dataset_id, resolve_dataset
from nnssl.plans.description import check_description
from nnssl.plans.figures import DEFAULT_SCHEDULE, trainer_for
from nnssl.plans.hashes import architecture_hash, canonical_arch_kwargs, data_hash
from nnssl.plans.primus import CLASSES, check_patch, problems_of, stock_trainer
from nnssl.words import size_text

NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", *CLASSES.values())
_UNREADABLE = (KeyError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, IndexError)
_NEEDED = ("dataset_name", "plans_name", "configurations", "transpose_forward")


@dataclass(frozen=True, eq=False)
class Plan:
    """One configuration of a plans file. Make it with :func:`load_plan` or :meth:`from_dicts`.

    Sizes are voxels and axes are nnU-Net's (z, y, x after transpose; 2d: y, x) unless said otherwise.

    Attributes:
        plans: the plans file as it is.
        configuration: name of the configuration, for example ``"3d_fullres"``.
        dataset_json: the dataset's ``dataset.json``.
    """

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]

    @classmethod
    def from_dicts(
        cls, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], *, second_stage: bool = False
    ) -> Plan:
        """Check the dicts and make a plan of them; they are kept, not copied.

        Args:
            second_stage: accept the second stage of a cascade: it can be fine-tuned, not pretrained.

        Raises:
            NnsslError: no nnU-Net plans, an unknown configuration, a cascade stage, or a network that is neither a U-Net of
                nnU-Net's nor a Primus that its patch fits.
        """
        missing = [key for key in _NEEDED if key not in plans]
        if missing:
            raise NnsslError(f"These are not plans of nnU-Net v2: {', '.join(missing)} is missing.")
        what = f"Plans '{plans['plans_name']}' of {plans['dataset_name']}"
        where = f"Configuration '{configuration}' of plans '{plans['plans_name']}'"
        check_plans(plans, what)
        check_description(dataset_json, f"dataset.json of {plans['dataset_name']}", labels=True)
        known = list(plans["configurations"])
        if configuration not in known:
            raise NnsslError(
                f"{what} have no configuration '{configuration}'.{did_you_mean(configuration, known)} They have: "
                f"{', '.join(known)}. Choose one with -c."
            )
        plan = cls(plans, configuration, dataset_json)
        try:
            previous = plan.config.previous_stage_name
        except _UNREADABLE as error:
            raise NnsslError(f"{where} cannot be read: {error!r}") from error
        check_configuration(plan.config.configuration, what, configuration)
        if previous is not None and not second_stage:
            raise NnsslError(
                f"{where} is the second stage of a cascade: its network takes a segmentation as an extra input, which "
                f"pretraining does not have. Use '{previous}' or 3d_fullres (-c)."
            )
        if plan.network_class not in NETWORKS:
            raise NnsslError(f"{where} uses the network {plan.network_class}; supported are {', '.join(NETWORKS)}.")
        kwargs = plan.config.network_arch_init_kwargs
        if plan.is_primus:
            raise_problems(problems_of(kwargs), where)
            check_patch(plan.patch_size, kwargs["patch_embed_size"], where)
        else:
            check_arguments(kwargs, what, configuration, plan.dim)
        named = dataset_json.get("channel_names") or dataset_json.get("modality")
        if named and len(plan.normalization_schemes) != len(named):
            raise NnsslError(
                f"{what} normalise {len(plan.normalization_schemes)} channels ('configurations.{configuration}."
                f"normalization_schemes'), and dataset.json names {len(named)}."
            )
        return plan

    @cached_property
    def manager(self) -> PlansManager:
        """nnU-Net's manager of the whole plans file."""
        return PlansManager(self.plans)

    @cached_property
    def config(self) -> ConfigurationManager:
        """nnU-Net's manager of this configuration: inheritance resolved, old formats converted."""
        return self.manager.get_configuration(self.configuration)

    @cached_property
    def _arch(self) -> dict[str, Any]:
        return canonical_arch_kwargs(self.config.network_arch_init_kwargs, self.dim)

    @property
    def dataset_name(self) -> str:
        """For example ``"Dataset004_Hippocampus"``."""
        return str(self.plans["dataset_name"])

    @property
    def plans_name(self) -> str:
        """For example ``"nnUNetPlans"``; the file's name without its ending."""
        return str(self.plans["plans_name"])

    @property
    def nnssl(self) -> dict[str, Any]:
        """What a plan variant tells the trainer; empty for plain plans."""
        return dict(self.plans.get("nnssl", {}))

    @property
    def base_plans(self) -> str:
        """The plans that a variant was derived from; :attr:`plans_name` for plain plans."""
        return str(self.nnssl.get("base_plans") or self.plans_name)

    @property
    def dim(self) -> int:
        """Number of spatial axes of the network: 2 or 3."""
        return len(self.config.patch_size)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """nnU-Net's training patch, one number per axis."""
        return tuple(int(i) for i in self.config.patch_size)

    @property
    def batch_size(self) -> int:
        """nnU-Net's training batch."""
        return int(self.config.batch_size)

    @property
    def network_class(self) -> str:
        """``"PlainConvUNet"``, ``"ResidualEncoderUNet"``, ``"Primus"``, ``"PrimusV2"`` or ``"PrimusV3"``."""
        return str(self.config.network_arch_class_name).rsplit(".", 1)[-1]

    @property
    def is_primus(self) -> bool:
        """Whether the network is a transformer on tokens: its map of tokens then counts as the one encoder stage."""
        return self.network_class in CLASSES.values()

    @property
    def schedule(self) -> str:
        """The schedule of its fine-tuning: the one that a variant names, else the default."""
        return str(self.nnssl.get("schedule") or DEFAULT_SCHEDULE)

    def trainer(self, pretrained: bool = True) -> str:
        """The trainer to type for its fine-tuning, from pretrained weights or from random ones."""
        return trainer_for(self.schedule, self.is_primus, pretrained)

    @property
    def stock_trainer(self) -> str | None:
        """The trainer of nnU-Net's that builds this network: of a Primus the one of its size; None where there is none."""
        if not self.is_primus:
            return "nnUNetTrainer"
        return stock_trainer(self.network_class, self.config.network_arch_init_kwargs)

    @property
    def network_text(self) -> str:
        """The network in a few words, for a person."""
        if not self.is_primus:
            return f"{self.network_class}, {self.n_stages} stages, features {', '.join(map(str, self.features))}"
        depth, heads, token = (self._arch[k] for k in ("eva_depth", "eva_numheads", "patch_embed_size"))
        grid, size = (size_text(n) for n in ([p // t for p, t in zip(self.patch_size, token)], token))
        return (
            f"{self.network_class}, width {self.features[0]}, {depth} blocks of {heads} heads, {grid} tokens of {size}"
        )

    @property
    def heads(self) -> int:
        """Attention heads of a Primus; 0 for a U-Net."""
        return int(self._arch.get("eva_numheads", 0))

    @property
    def n_stages(self) -> int:
        """Number of encoder stages, the bottleneck included."""
        return len(self.strides)

    @property
    def features(self) -> tuple[int, ...]:
        """Channels after each encoder stage, highest resolution first."""
        return tuple(self._arch["features_per_stage"])

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Stride of each encoder stage per axis, stage 0 (usually all ones) first."""
        return tuple(tuple(s) for s in self._arch["strides"])

    @property
    def kernel_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Kernel of each encoder stage per axis, stage 0 first."""
        return tuple(tuple(k) for k in self._arch["kernel_sizes"])

    @property
    def cumulative_strides(self) -> tuple[tuple[int, ...], ...]:
        """Input voxels per voxel of each encoder stage's output, per axis, stage 0 first."""
        return tuple(accumulate(self.strides, lambda total, stride: tuple(a * b for a, b in zip(total, stride))))

    @property
    def total_stride(self) -> tuple[int, ...]:
        """Input voxels per bottleneck voxel, per axis: what a crop must be divisible by."""
        return self.cumulative_strides[-1]

    @property
    def channel_names(self) -> dict[int, str]:
        """Names of the image channels by index, for example ``{0: "CT"}``."""
        names = self.dataset_json.get("channel_names", self.dataset_json.get("modality"))
        if not names:
            raise NnsslError(f"dataset.json of {self.dataset_name} has no 'channel_names'.")
        return {int(k): str(v) for k, v in sorted(names.items(), key=lambda item: int(item[0]))}

    @property
    def is_second_stage(self) -> bool:
        """Whether it is the second stage of a cascade, whose network also sees the segmentation of the first."""
        return self.config.previous_stage_name is not None

    @property
    def segmentation_channels(self) -> int:
        """Input channels after the image's that hold the first stage's segmentation, one-hot; 0 outside of cascades."""
        if not self.is_second_stage:
            return 0
        return len(self.manager.get_label_manager(self.dataset_json).foreground_labels)

    @property
    def n_channels(self) -> int:
        """The network's number of input channels: the image's, and in the second stage of a cascade the segmentation's."""
        return len(self.channel_names) + self.segmentation_channels

    @property
    def n_classes(self) -> int:
        """Segmentation heads as nnU-Net counts them (regions included); 2 where the dataset has no labels."""
        labels = self.dataset_json.get("labels")
        if not labels:
            return 2
        try:
            return int(self.manager.get_label_manager(self.dataset_json).num_segmentation_heads)
        except _UNREADABLE as error:
            raise NnsslError(
                f"'labels' of dataset.json of {self.dataset_name} cannot be used: {' '.join(str(error).split()) or error!r}"
            ) from error

    @property
    def spacing(self) -> tuple[float, ...]:
        """Target spacing in mm per axis; two numbers for 2d plans."""
        return tuple(float(s) for s in self.config.spacing)

    @property
    def transpose_forward(self) -> tuple[int, ...]:
        """Order of the file's axes (z, y, x) after nnU-Net's transpose."""
        return tuple(int(i) for i in self.plans["transpose_forward"])

    @property
    def median_shape(self) -> tuple[int, int, int]:
        """Median case shape after preprocessing: three axes, also for 2d plans."""
        shape = list(self.config.median_image_size_in_voxels)
        if len(shape) == 2:
            shape = [self.plans["original_median_shape_after_transp"][0], *shape]
        z, y, x = (int(round(float(i))) for i in shape)
        return z, y, x

    @property
    def normalization_schemes(self) -> tuple[str, ...]:
        """nnU-Net's normalisation of each channel, for example ``("ZScoreNormalization",)``."""
        return tuple(self.config.normalization_schemes)

    @property
    def data_identifier(self) -> str:
        """Name of the folder that holds the preprocessed cases."""
        return str(self.config.data_identifier)

    @cached_property
    def architecture_hash(self) -> str:
        """sha256 (hex) of network class, its arguments in one form, and input channels; classes do not enter.

        The patch enters for Primus alone, which has a learned code for each place in it.
        """
        patch = {"patch_size": list(self.patch_size)} if self.is_primus else {}
        return architecture_hash(self.network_class, {**self._arch, **patch}, self.n_channels)

    @cached_property
    def data_hash(self) -> str:
        """First 8 hex digits of the sha256 of all that decides preprocessed voxels (see nnssl/plans/hashes.py)."""
        return data_hash(self.config.configuration, self.plans)


def plans_in(folder: Path) -> list[str]:
    """Names of the plans files in a dataset's preprocessed folder, told by their content."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name in ("dataset.json", "dataset_fingerprint.json", "splits_final.json"):
            continue
        try:
            if "configurations" in json.loads(path.read_text(encoding="utf-8")):
                found.append(path.stem)
        except (OSError, ValueError, TypeError):
            continue
    return found


def load_plan(
    dataset: int | str,
    configuration: str = "3d_fullres",
    plans_name: str = "nnUNetPlans",
    *,
    second_stage: bool = False,
) -> Plan:
    """Read a plan from ``nnUNet_preprocessed/<Dataset>/<plans_name>.json``.

    Args:
        dataset: number or name of the dataset.
        configuration: nnU-Net's configuration.
        plans_name: the plans identifier, also that of a variant.
        second_stage: accept the second stage of a cascade.

    Raises:
        NnsslError: dataset, plans or configuration missing or unreadable; says what to type.
    """
    name = resolve_dataset(dataset)
    check_part(plans_name, "-p")
    folder, raw = preprocessed_folder() / name, set_folders().get("nnUNet_raw")
    path = folder / f"{plans_name}.json"
    if not path.is_file():
        number, others = dataset_id(name), plans_in(folder) if folder.is_dir() else []
        if others:
            raise NnsslError(
                f"{name} has no plans '{plans_name}'.{did_you_mean(plans_name, others)} It has: {', '.join(others)}. "
                f"Choose one with -p, or plan anew: nnUNetv2_plan_and_preprocess -d {number}"
            )
        advice = f"Type: nnUNetv2_plan_and_preprocess -d {number}"
        if raw is not None and (raw / name / "imagesTr").is_dir() and not (raw / name / "labelsTr").is_dir():
            plans_it = f"nnssl_pretrain -d {number} -m mae plans it from its images, or takes a target's plans with -t"
            advice = f"It has no labels: {plans_it}"
        raise NnsslError(f"{name} has not been planned: {path} does not exist. {advice}")
    description = folder / "dataset.json"
    if not description.is_file() and raw is not None:
        description = raw / name / "dataset.json"
    dataset_json = read_json(description)
    check_description(dataset_json, description)
    plan = Plan.from_dicts(read_json(path), configuration, dataset_json, second_stage=second_stage)
    if min(plan.patch_size) < 1:
        raise NnsslError(
            f"{path}: 'configurations.{configuration}.patch_size' must be of at least 1, not {plan.patch_size}"
        )
    return plan
