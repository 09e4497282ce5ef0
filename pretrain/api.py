"""Pretraining in one call: what the command ``nnssl_pretrain`` does."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnssl import checkpoint
from nnssl.distributed import rank, world_size
from nnssl.errors import NnsslError
from nnssl.files import write_json
from nnssl.plans import load_plan, resolve_dataset
from nnssl.pretrain.data import prepare_sources
from nnssl.pretrain.engine.devices import pick_device, process_group, shared_preparation
from nnssl.pretrain.engine.estimate import estimate
from nnssl.pretrain.engine.folder import RunFolder
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.engine.logs import add_log_file
from nnssl.pretrain.engine.loop import Engine, Outcome, RunSpec
from nnssl.pretrain.engine.watch import RobustnessHook
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.resolve import batch_size, identity, method_folder, resolve
from nnssl.results import output_folder
from nnssl.transfer import prove_loadable

__all__ = ["RunResult", "run"]

log = logging.getLogger("nnssl")


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: the output folder.
        checkpoint: ``checkpoint_final.pth``; None where the run was stopped early or only estimated.
        finished: whether it ran to its end.
        learnt: the method's own verdict.
        sentence: the verdict for a person.
        metrics: held-out terms at the end.
    """

    folder: Path
    checkpoint: Path | None
    finished: bool
    learnt: bool
    sentence: str
    metrics: dict[str, float]


def run(
    sources: int | str | Sequence[int | str],
    *,
    method: str = "macl",
    target: int | str | None = None,
    configuration: str = "3d_fullres",
    plans: str = "nnUNetPlans",
    device: str = "cuda",
    epochs: int | None = None,
    iterations: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    crop: Sequence[int] | None = None,
    cases: str | Path | None = None,
    exclude: str | Path | None = None,
    skip_bad: bool = False,
    allow_mismatch: bool = False,
    continue_run: bool = False,
    dry_run: bool = False,
    processes: int | None = None,
    robustness_every: int | None = None,
    stop: str | None = None,
    hooks: Sequence[Hook] = (),
) -> RunResult:
    """Pretrain the network of a dataset's plans on unlabelled images.

    Args:
        sources: dataset ids or names to learn from.
        method: name of the objective, see :func:`nnssl.pretrain.methods.list_methods`.
        target: dataset whose plans are used; the source itself where there is only one.
        configuration, plans: of the target.
        device: ``"cuda"``, ``"cpu"`` or ``"mps"``.
        epochs, iterations: length; iterations are optimiser steps per epoch. 200 x 250 unless given.
        seed: of initialisation, sampling and views; 0 unless given.
        name: distinguishes runs that would share a folder.
        options: ``preset`` and fields of the method's config and of the engine's, as text or typed values.
        crop: voxels per axis, in place of the method's own choice.
        cases, exclude: files that list the cases to use, or to leave out.
        skip_bad: go on without the images that cannot be used.
        allow_mismatch: accept that channels or modality differ between source and target.
        continue_run: resume the run in the output folder with its saved configuration.
        dry_run: only tell crop, batch, memory and time.
        processes: for preprocessing; nnU-Net's default unless given.
        robustness_every: epochs between two measurements of robustness, 0 for none; chosen so that they take at most 3 % of
            the time unless given.
        stop: ``"robustness"`` ends the run once robustness has not improved for five measurements.
        hooks: more watchers of the run.

    Returns:
        Where the results are and whether the method learnt.

    Raises:
        NnsslError: for everything that the user can mend.
    """
    cls = get_method(method)
    if stop not in (None, "robustness"):
        raise NnsslError(f"--stop {stop}: only 'robustness' is known.")
    watch = RobustnessHook(robustness_every, True if stop else None)
    names = _source_names(sources, target)
    plan = load_plan(resolve_dataset(target) if target is not None else names[0], configuration, plans)
    path = output_folder(plan, method_folder(cls), names, name)
    torch_device = pick_device(device)
    with process_group(torch_device), RunFolder(path, lock=not dry_run and rank() == 0) as folder:
        saved = folder.saved_config() if continue_run else None
        if continue_run and saved is None:
            raise NnsslError(f"there is nothing to continue in {path}. Leave out --c to start.")
        choice = resolve(cls, saved, epochs=epochs, iterations=iterations, seed=seed, options=options, crop=crop)
        with shared_preparation():
            pool = prepare_sources(
                plan,
                names,
                cases=Path(cases) if cases else None,
                exclude=Path(exclude) if exclude else None,
                skip_bad=skip_bad,
                n_processes=processes or default_num_processes,
                allow_mismatch=allow_mismatch,
                preprocess=not dry_run,
            )
        request = cls.crops(plan, pool.stats(), choice.config, choice.crop)
        batch = batch_size(choice.engine, request, world_size())
        workers = choice.engine.workers
        spec = RunSpec(
            method=cls,
            config=choice.config,
            plan=plan,
            pool=pool,
            request=request,
            engine=choice.engine,
            batch_size=batch,
            epochs=choice.epochs,
            iterations=choice.iterations,
            seed=choice.seed,
            device=torch_device,
            workers=get_allowed_n_proc_DA() if workers is None else workers,
            folder=folder,
            save=_saver(names),
            hooks=[watch, *hooks],
        )
        _introduce(spec, names)
        if dry_run:
            log.info("%s", estimate(spec))
            return RunResult(path, None, False, False, "Only estimated.", {})
        who = identity(cls, plan, pool, request, names, choice, batch)
        return _execute(spec, who, continue_run)


def _source_names(sources: int | str | Sequence[int | str], target: int | str | None) -> list[str]:
    given = [sources] if isinstance(sources, (int, str)) else list(sources)
    names = sorted({resolve_dataset(s) for s in given})
    if not names:
        raise NnsslError("no dataset to learn from: name at least one with -d.")
    if target is None and len(names) > 1:
        raise NnsslError(f"-d names {len(names)} datasets, so it is not clear whose plans to use: say it with -t.")
    return names


def _execute(spec: RunSpec, who: dict[str, Any], continue_run: bool) -> RunResult:
    """Admit, record, train, judge."""
    folder, path = spec.folder, spec.folder.path
    resuming = folder.admit(who, continue_run=continue_run)
    if resuming and folder.final.exists():
        log.info("This run is finished: %s", folder.final)
        return RunResult(path, folder.final, True, True, "The run was finished before.", {})
    state = None
    if resuming:
        loaded = checkpoint.load(folder.latest)
        if loaded.training is None:
            raise NnsslError(
                f"{folder.latest} holds no training state. Move the folder away, or give this run a --name."
            )
        state = {**loaded.training, "network_weights": loaded.weights}
    handler = add_log_file(path) if rank() == 0 else None
    try:
        engine = Engine(spec, state)
        if rank() == 0:
            write_json(folder.config_file, _record(spec, who))
            prove_loadable(_payload(engine, who["sources"]), spec.plan)
            if state is not None:
                log.info("Continuing after step %d of %d.", engine.step, spec.steps)
        outcome = engine.fit()
        _tell(spec, outcome)
    finally:
        if handler is not None:
            log.removeHandler(handler)
            handler.close()
    final = folder.final if outcome.finished else None
    return RunResult(path, final, outcome.finished, outcome.learnt, outcome.sentence, outcome.last)


def _record(spec: RunSpec, who: dict[str, Any]) -> dict[str, Any]:
    """``config.json``: what finds the run again, and everything resolved."""
    keys = ("method", "sources", "dataset", "plans_name", "configuration", "architecture_hash")
    return {
        "schema": 1,
        **{k: who[k] for k in keys},
        "base_plans": spec.plan.base_plans,
        "identity": who,
        "runtime": {"device": str(spec.device), "processes": world_size(), "workers": spec.workers},
        "crop_explanation": spec.request.explanation,
        "held_out_cases": len(spec.pool.held_out),
        "versions": checkpoint.package_versions(),
    }


def _payload(engine: Engine, sources: list[str], training: dict[str, Any] | None = None) -> dict[str, Any]:
    spec = engine.spec
    extra: dict[str, Any] = {}
    for hook in spec.hooks:
        extra.update(hook.checkpoint_info())
    return checkpoint.build_payload(
        engine.method.network,
        spec.plan,
        method=spec.method.name,
        config={f.name: getattr(spec.config, f.name) for f in fields(spec.config)},
        crop_size=spec.request.size,
        pretrained_parts=engine.method.pretrained_parts(),
        data={"sources": sources, "cases": len(spec.pool.cases), "fingerprint": spec.pool.fingerprint_hash},
        citations=spec.method.citation,
        training=training,
        step=engine.step,
        steps=spec.steps,
        **extra,
    )


def _saver(sources: list[str]) -> Any:
    def save(engine: Engine, path: Path, state: dict[str, Any] | None) -> None:
        try:
            checkpoint.save(path, _payload(engine, sources, state))
        except OSError as error:
            raise NnsslError(
                f"cannot save {path}: {error.strerror or error}. The checkpoint saved before is whole. Free space, then "
                "continue with --c."
            ) from error

    return save


def _introduce(spec: RunSpec, sources: list[str]) -> None:
    plan, request = spec.plan, spec.request
    log.info(
        "%s: pretraining the network of %s, %s, %s (%s, %d stages) on images of %s.",
        spec.method.name,
        plan.dataset_name,
        plan.plans_name,
        plan.configuration,
        plan.network_class,
        plan.n_stages,
        ", ".join(sources),
    )
    log.info("Cases: %d to learn from, %d held out.", len(spec.pool.train), len(spec.pool.held_out))
    log.info("%s It is read in windows of %s.", request.explanation, "x".join(map(str, request.window)))
    log.info(
        "Batch: %d crops a step (plan: %d patches of %s); %d epochs of %d steps; seed %d; %s, %d process(es).",
        spec.batch_size,
        plan.batch_size,
        "x".join(map(str, plan.patch_size)),
        spec.epochs,
        spec.iterations,
        spec.seed,
        spec.device,
        world_size(),
    )
    log.info("Output: %s", spec.folder.path)


def _tell(spec: RunSpec, outcome: Outcome) -> None:
    if not outcome.finished:
        return
    log.info("%s", outcome.sentence)
    log.info("Weights: %s", spec.folder.final)
    plan = spec.plan
    number = int(plan.dataset_name[7:10])
    option = "" if plan.plans_name == "nnUNetPlans" else f" -p {plan.plans_name}"
    log.info("Next: nnUNetv2_train %d %s 0 -tr nnUNetTrainerPretrained%s", number, plan.configuration, option)
