"""Plans without labels: nnU-Net's own planner on a fingerprint that is made from the images alone.

A dataset that has neither labels nor plans gets both files under nnU-Net's names in ``nnUNet_preprocessed/<Dataset>``, so that
everything that follows (preprocessing, pretraining, nnU-Net itself) finds them. Nothing that exists is overwritten.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnssl.distributed import rank
from nnssl.errors import NnsslError
from nnssl.files import read_json, write_json
from nnssl.paths import preprocessed_folder, set_folders
from nnssl.plans import Plan, dataset_id, load_plan, resolve_dataset
from nnssl.pretrain.options import RunOptions
from nnssl.pretrain.prepare.channels import same_name
from nnssl.pretrain.prepare.fingerprint import MOST_IMAGES, FigureWorker, combine, looks_like_ct, measure, sample_cases
from nnssl.pretrain.prepare.integrity import quiet
from nnssl.pretrain.prepare.planner import PLANNERS, plans_name, run_planner
from nnssl.pretrain.prepare.raw import RawCase, RawSource, describe, list_unplanned
from nnssl.pretrain.prepare.request import PrepareOptions
from nnssl.words import counted, first_few, size_text

log = logging.getLogger("nnssl")

ESTIMATE_IMAGES = 32  # images that a dry run looks at
NAMED = 3
NOTES = "nnssl_fingerprint_notes.jsonl"
POLL_SECONDS = 1.0


def is_unlabelled(name: str) -> bool:
    """Whether a dataset has raw images and no label file."""
    raw = set_folders().get("nnUNet_raw")
    if raw is None:
        return False
    named = describe(name).get("dataset")
    if isinstance(named, dict) and named:
        return not any(isinstance(e, dict) and e.get("label") for e in named.values())
    labels = raw / name / "labelsTr"
    return (raw / name / "imagesTr").is_dir() and not (labels.is_dir() and any(labels.iterdir()))


def _is_pool_of(owner: str, names: Sequence[str], path: Path) -> bool:
    """Whether the plans of ``owner`` are, or may be made, those of all these datasets together."""
    try:
        recorded = read_json(preprocessed_folder() / owner / "dataset_fingerprint.json").get("nnssl", {})
    except NnsslError:
        return not path.is_file() and all(is_unlabelled(name) for name in names)
    return isinstance(recorded, dict) and recorded.get("sources") == list(names)


def planned(names: Sequence[str], asked: RunOptions | PrepareOptions, *, write: bool = True) -> Plan:
    """The plans of a run; where the dataset whose plans are wanted has neither labels nor plans, they are made.

    Args:
        names: datasets to learn from, sorted. Without a target their plans are those of the first; several must then all be
            without labels, and the plans are made from the images of all of them.
        asked: target, names of configuration and plans, and how missing ones are made.
        write: False makes missing plans from a few images and writes nothing.

    Raises:
        NnsslError: it is not clear whose plans are wanted; a labelled dataset without plans; no usable image; another planner
            made the existing plans.
    """
    planner, configuration = asked.planner, asked.configuration
    owner = resolve_dataset(asked.target) if asked.target is not None else names[0]
    sources = [owner] if asked.target is not None else list(names)
    wanted = plans_name(planner, asked.plans)
    path = preprocessed_folder() / owner / f"{wanted}.json"
    if len(sources) > 1 and not _is_pool_of(owner, sources, path):
        raise NnsslError(
            f"-d names {len(names)} datasets, so it is not clear whose plans to use: say it with -t. (Datasets that all have "
            "neither labels nor plans are planned together.)"
        )
    if path.is_file():
        _check_same(path, planner, asked.gpu_memory_target)
        return load_plan(owner, configuration, wanted)
    if planner is None:
        planner = next((key for key, (_, _, name) in PLANNERS.items() if name == wanted), None)
    if planner is None or not is_unlabelled(owner):
        return load_plan(owner, configuration, wanted)  # which says what to type
    if write and int(os.environ.get("RANK", rank())) != 0:
        while not path.is_file():  # the launcher ends this process if the one that plans fails
            time.sleep(POLL_SECONDS)
        return load_plan(owner, configuration, wanted)
    log.info("%s has neither labels nor plans: it is planned from its images alone.", " + ".join(sources))
    images = _Images.of(sources)
    n_processes = asked.processes or default_num_processes
    fingerprint, dataset_json = _fingerprint(images, n_processes, write)
    content = run_planner(
        planner,
        wanted,
        asked.gpu_memory_target,
        owner=owner,
        dataset_json={**dataset_json, "numTraining": len(images.cases)},
        fingerprint=fingerprint,
        reader=images.reader,
    )
    if write:
        _write(owner, dataset_json, fingerprint, content, wanted)
    plan = Plan.from_dicts(content, configuration, dataset_json)
    _tell(plan, path if write else None)
    return plan


def _check_same(path: Path, planner: str | None, gpu_memory_target: float | None) -> None:
    used = read_json(path).get("experiment_planner_used")
    if planner is not None and used != PLANNERS[planner][1]:
        raise NnsslError(
            f"{path} was made by {used}, not by --planner {planner}. Leave --planner out, or give -p another name."
        )
    if gpu_memory_target is not None:
        log.warning("%s exists: -gpu_memory_target is not looked at.", path)


@dataclass(frozen=True)
class _Images:
    """The images, by ``"<source>/<case>"``, of datasets that are planned together; the first of these gets the plans.

    ``channels``, ``description`` (dataset.json), ``ending`` and ``reader`` are those of the first, as far as it tells them.
    """

    sources: Sequence[str]
    cases: dict[str, RawCase]
    channels: dict[int, str]
    description: dict[str, Any]
    ending: str
    reader: str

    @classmethod
    def of(cls, sources: Sequence[str]) -> _Images:
        """Raises :class:`NnsslError` where there are none, or their channels differ."""
        found: dict[str, RawSource] = {}
        for source in sources:
            raw = list_unplanned(source)
            if raw is None or not raw.cases:
                raise NnsslError(f"{source} has no usable images in nnUNet_raw/{source}/imagesTr.")
            found[source] = raw
            first = found[sources[0]]
            ours, theirs = list(first.channel_names.values()), list(raw.channel_names.values())
            if raw.n_channels != first.n_channels or (ours and theirs and not _same_channels(ours, theirs)):
                raise NnsslError(
                    f"{sources[0]} and {source} differ in their channels ({', '.join(ours) or first.n_channels} and "
                    f"{', '.join(theirs) or raw.n_channels}), so they cannot be planned together. Name one with -t."
                )
        cases = {f"{source}/{name}": case for source, raw in found.items() for name, case in raw.cases.items()}
        description, file = describe(sources[0]), next(iter(cases.values())).files[0]
        ending = ".nii.gz" if file.lower().endswith(".nii.gz") else Path(file).suffix
        ending = description.get("file_ending") or ending
        reader = _reader(cases, {**description, "file_ending": ending})
        return cls(sources, cases, dict(first.channel_names), description, ending, reader)


def _same_channels(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether names mean the same and are normalised in the same way."""
    schemes = [[get_normalization_scheme(n) for n in names] for names in (ours, theirs)]
    return len(ours) == len(theirs) and all(map(same_name, ours, theirs)) and schemes[0] == schemes[1]


def _reader(cases: Mapping[str, RawCase], description: dict[str, Any]) -> str:
    """The reader that nnU-Net would take, tried on one of the first images that any takes."""
    first = [case.files[0] for case in list(cases.values())[:NAMED]]
    for file in first:
        with quiet(), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(RuntimeError):
            return determine_reader_writer_from_dataset_json(description, file, verbose=False).__name__
    raise NnsslError(f"None of nnU-Net's readers reads {first[0]}, nor the images after it.")


def _fingerprint(images: _Images, n_processes: int, write: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fingerprint, and dataset.json with all that nnU-Net asks for."""
    owner, cases, names = images.sources[0], images.cases, images.channels
    folder = preprocessed_folder() / owner
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    made = folder / "dataset_fingerprint.json"
    if made.is_file() and names:
        return read_json(made), _complete(images, names)
    chosen = sample_cases(cases, MOST_IMAGES if write else ESTIMATE_IMAGES)
    if len(chosen) < len(cases):
        log.info("%d of its %d images are looked at.", len(chosen), len(cases))
    is_ct = tuple(get_normalization_scheme(n).__name__ == "CTNormalization" for n in names.values()) or None
    worker = FigureWorker(images.reader, is_ct)
    notes = folder / NOTES if write else None
    found = measure(chosen, worker, n_processes=n_processes, notes=notes)
    bad, good = [f for f in found if f.bad], [f for f in found if not f.bad]
    if bad:
        shown = first_few([f"{f.name}: {f.bad}" for f in bad], NAMED, "; ")
        log.warning("Left out of the planning, since they cannot be used: %s: %s", counted(len(bad), "image"), shown)
    if not good:
        raise NnsslError(f"No image of {', '.join(images.sources)} can be used: nothing to plan from.")
    if not names:
        names = {c: "CT" if looks_like_ct(good, c) else "MR" for c in range(len(good[0].low))}
        log.warning(
            "%s has no dataset.json: its channels are taken for %s by their intensities. If that is wrong, write "
            "dataset.json yourself and delete %s.",
            *(owner, ", ".join(names.values()), folder),
        )
    origin = {"foreground": "body", "sources": list(images.sources), "images": len(good)}
    return {**combine(good), "nnssl": origin}, _complete(images, names)


def _complete(images: _Images, names: Mapping[int, str]) -> dict[str, Any]:
    """dataset.json with all that nnU-Net asks for; what the user wrote stays."""
    content = images.description
    if not (content.get("channel_names") or content.get("modality")):
        content = {"channel_names": {str(c): name for c, name in names.items()}, **content}
    rest = {"labels": {"background": 0}, "numTraining": len(images.cases), "file_ending": images.ending}
    return {**content, **{k: v for k, v in rest.items() if not content.get(k)}}


def _write(
    owner: str, dataset_json: dict[str, Any], fingerprint: dict[str, Any], content: dict[str, Any], wanted: str
) -> None:
    """Write what is missing; the plans last, they say that all is there."""
    folder = preprocessed_folder() / owner
    with contextlib.suppress(OSError):  # FileExistsError: the user's own stays; a read-only raw folder has none
        write_json(set_folders()["nnUNet_raw"] / owner / "dataset.json", dataset_json, overwrite=False)
    files = {"dataset": dataset_json, "dataset_fingerprint": fingerprint, wanted: content}
    for name, what in files.items():
        with contextlib.suppress(FileExistsError):
            write_json(folder / f"{name}.json", what, overwrite=False)
    (folder / NOTES).unlink(missing_ok=True)


def _tell(plan: Plan, path: Path | None) -> None:
    """What the planner chose."""
    spacing, median, patch = map(size_text, ([round(s, 3) for s in plan.spacing], plan.median_shape, plan.patch_size))
    log.info(
        "nnU-Net's %s chose for %s: spacing %s mm, median image %s, patch %s, batch %d, %s with %d stages, %s.",
        *(plan.plans["experiment_planner_used"], plan.configuration, spacing, median, patch, plan.batch_size),
        *(plan.network_class, plan.n_stages, ", ".join(plan.normalization_schemes)),
    )
    if path is None:
        log.info("From a few images, for an estimate only: nothing was written.")
        return
    log.info(
        "Plans: %s\nShould labels come later: keep these plans (nnUNetv2_preprocess -d %d), nnUNetv2_plan_and_preprocess would "
        "make others.",
        *(path, dataset_id(plan.dataset_name)),
    )
