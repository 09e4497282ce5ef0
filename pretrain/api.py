"""Pretraining in one call: what the command ``nnssl_pretrain`` does."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnssl import checkpoint
from nnssl.distributed import rank, world_size
from nnssl.errors import NnsslError
from nnssl.files import write_json
from nnssl.plans import resolve_dataset
from nnssl.plans.unlabelled import case_key_hash
from nnssl.pretrain.data.weights import Sources, parse_sources, relative
from nnssl.pretrain.engine.devices import pick_device, process_group, restarted, shared_preparation
from nnssl.pretrain.engine.estimate import estimate
from nnssl.pretrain.engine.folder import LOCK, RunFolder
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.engine.logs import add_log_file
from nnssl.pretrain.engine.loop import Engine, Outcome, RunSpec, disk_advice
from nnssl.pretrain.engine.resume import load_state
from nnssl.pretrain.engine.watch import RobustnessHook
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.methods.registry import origin
from nnssl.pretrain.omni import FOLDER, prepare_omni, take_omni
from nnssl.pretrain.onwards import finished_before, keep_first_end, next_lines, start_from, started_from
from nnssl.pretrain.prepare import prepare_bodies, prepare_sources
from nnssl.pretrain.prepare.planning import planned
from nnssl.pretrain.resolve import batch_size, identity, method_folder, resolve
from nnssl.results import CONFIG, output_folder
from nnssl.weights import prove_loadable

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
        signal: number of the signal that stopped the run early; 0 where none did.
    """

    folder: Path
    checkpoint: Path | None
    finished: bool
    learnt: bool
    sentence: str
    metrics: dict[str, float]
    signal: int = 0


def run(
    sources: Sources,
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
    continue_run: bool | Literal["auto"] = False,
    dry_run: bool = False,
    processes: int | None = None,
    robustness_every: int | None = None,
    stop: str | None = None,
    labelled: int | str | None = None,
    labelled_cases: str | Path | None = None,
    planner: str | None = None,
    gpu_memory_target: float | None = None,
    init: str | Path | None = None,
    adapt: Mapping[str, Any] | None = None,
    coverage: float | None = None,
    key: str | None = None,
    prefix: str | None = None,
    hooks: Sequence[Hook] = (),
) -> RunResult:
    """Pretrain the network of a dataset's plans on unlabelled images.

    Args:
        sources: dataset ids or names to learn from, with weights as ``["500:8", "501"]`` or ``{500: 8, 501: 1}``: each case of
            500 is then drawn eight times as often as each of 501.
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
        continue_run: resume the run in the output folder with its saved configuration; with more ``epochs`` than it had, a
            finished run is lengthened. ``"auto"``: resume this very run where it
            has a checkpoint, else start it; so it is where torch's elastic launcher has started the processes again.
        dry_run: only tell crop, batch, memory and time.
        processes: for preprocessing; nnU-Net's default unless given.
        robustness_every: epochs between two measurements of robustness, 0 for none; chosen so that they take at most 3 % of
            the time unless given.
        stop: ``"robustness"`` ends the run once robustness has not improved for five measurements.
        labelled: a dataset whose labels are learnt from beside the method's own loss, and later pseudo-labels of the unlabelled
            images (:mod:`nnssl.pretrain.omni`); it is the target. Its options begin with ``omni.``.
        labelled_cases: file of the labelled cases to learn from, with their annotated classes where not all are.
        planner: ``"default"``, ``"resenc_m"``, ``"resenc_l"`` or ``"resenc_xl"``: which of nnU-Net's planners makes the plans of
            a dataset that has neither labels nor plans; see :func:`nnssl.pretrain.prepare.planning.planned`.
        gpu_memory_target: GB that this planner fills.
        init: weights to start from: a checkpoint of this package, of MIC-DKFZ's nnssl, of nnU-Net or of others with its network.
        adapt, coverage: what may be adapted where they come from another network (:class:`nnssl.transfer.Adaptation`).
        key, prefix: where they lie in a file of others (:func:`nnssl.checkpoint.load`).
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
    options, omni_options = take_omni(options)
    target = _labelled_target(labelled, target, omni_options, labelled_cases)
    names, weights = _source_names(sources)
    start = start_from(init, adapt, coverage, key, prefix)
    planning: dict[str, Any] = {"planner": planner, "gpu_memory_target": gpu_memory_target, "n_processes": processes}
    plan = planned(names, target, configuration, plans, write=not dry_run, **planning)
    cls.check_network(plan)
    path = output_folder(plan, method_folder(cls) + (FOLDER if labelled is not None else ""), names, name)
    torch_device = pick_device(device)
    if continue_run is True and not (path / LOCK).is_file() and not (path / CONFIG).is_file():
        raise NnsslError(f"there is nothing to continue in {path}. Leave out --c to start.")
    with process_group(torch_device), RunFolder(path, lock=not dry_run and rank() == 0) as folder:
        auto = continue_run == "auto" or (not continue_run and restarted())
        saved = folder.saved_config(whole=True) if continue_run and not auto else None
        if continue_run and not auto and not folder.has_checkpoint():
            log.info("The run was ended before its first checkpoint: it starts from the beginning.")
            start = start or started_from(saved)
        accepted = _accepted(saved, allow_mismatch=allow_mismatch, skip_bad=skip_bad, cases=cases, exclude=exclude)
        accepted["start"] = start.options() if start is not None else _before(saved).get("start")
        choice = resolve(cls, saved, epochs=epochs, iterations=iterations, seed=seed, options=options, crop=crop)
        omni = None
        if labelled is not None:
            omni = prepare_omni(plan, omni_options, saved, cases=labelled_cases, ranks=world_size())
            cls = omni.method(cls)
        with shared_preparation():
            pool = prepare_sources(
                plan,
                names,
                cases=Path(accepted["cases"]) if accepted["cases"] else None,
                exclude=Path(accepted["exclude"]) if accepted["exclude"] else None,
                skip_bad=accepted["skip_bad"],
                n_processes=processes or default_num_processes,
                allow_mismatch=accepted["allow_mismatch"],
                preprocess=not dry_run,
            )
        request = cls.crops(plan, pool.stats(), choice.config, choice.crop)
        if saved is not None and crop is None:
            explanation = request.explanation.replace("as asked for", "as in the run that is continued")
            request = replace(request, explanation=explanation)
        if request.body and not dry_run:
            with shared_preparation():
                prepare_bodies(plan, pool, n_processes=processes or default_num_processes)
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
            weights=_weights(weights, saved),
            hooks=[watch, *hooks],
            start=start,
        )
        if omni is not None:
            spec.companion = omni.companion(pool, choice.seed, spec.steps, spec.weights)
            spec.hooks.append(omni.hook(spec.companion))
        _introduce(spec, names)
        if omni is not None:
            omni.introduce(spec.steps)
        if dry_run:
            log.info("%s", estimate(spec))
            return RunResult(path, None, False, False, "Only estimated.", {})
        who = identity(cls, plan, pool, request, names, choice, batch, spec.weights)
        who["omni"] = None if omni is None else omni.identity()
        who["init"] = start.identity() if start is not None else ((saved or {}).get("identity") or {}).get("init")
        spec.identity = who
        return _execute(spec, who, auto or bool(continue_run), accepted)


def _labelled_target(
    labelled: int | str | None,
    target: int | str | None,
    options: Mapping[str, Any],
    cases: str | Path | None,
) -> int | str | None:
    """``--labelled D`` implies ``-t D``; what belongs to it is refused without it."""
    if labelled is None:
        given = [f"-o omni.{k}" for k in options] + (["--labelled-cases"] if cases else [])
        if given:
            raise NnsslError(f"{', '.join(given)}: only with --labelled DATASET.")
        return target
    if target is not None and resolve_dataset(target) != resolve_dataset(labelled):
        raise NnsslError(
            f"--labelled {labelled} and -t {target}: the network is that of the labelled dataset's plans. Leave out -t."
        )
    return labelled


def _source_names(sources: Sources) -> tuple[list[str], dict[str, float] | None]:
    """Names, and weights where any were given."""
    weights, given = parse_sources(sources)
    return list(weights), weights if given else None


def _weights(given: dict[str, float] | None, saved: dict[str, Any] | None) -> dict[str, float] | None:
    """What was given now, else what a continued run began with."""
    if given is not None:
        return relative(given)
    return None if saved is None else saved.get("identity", {}).get("weights")


def _accepted(saved: dict[str, Any] | None, **given: Any) -> dict[str, Any]:
    """What the user has accepted and chosen at the first start, which a continued run need not be told again."""
    before = _before(saved)
    now = {k: os.path.abspath(v) if v and not isinstance(v, bool) else v for k, v in given.items()}
    return {k: v or before.get(k) or v for k, v in now.items()}


def _before(saved: dict[str, Any] | None) -> dict[str, Any]:
    return (saved or {}).get("accepted") or {}


def _execute(spec: RunSpec, who: dict[str, Any], continue_run: bool, accepted: dict[str, Any]) -> RunResult:
    """Admit, record, train, judge."""
    folder, path = spec.folder, spec.folder.path
    images = [case.key for case in spec.pool.cases], spec.pool.contents
    folder.check_images(*images, continue_run=continue_run)
    resuming = folder.admit(who, continue_run=continue_run)
    before = finished_before(folder.final, spec.steps) if resuming else None
    if before is not None:
        log.info("This run is finished: %s", folder.final)
        learnt, sentence = before.verdict or (True, "The run was finished before.")
        return RunResult(path, folder.final, True, learnt, sentence, {})
    state = load_state(folder, who) if resuming else None
    handler = add_log_file(path) if rank() == 0 else None
    try:
        engine = Engine(spec, state)
        if rank() == 0:
            if resuming and folder.final.exists():
                saved_epochs = (folder.saved_config() or {}).get("identity", {}).get("epochs", spec.epochs)
                if saved_epochs < spec.epochs:
                    keep_first_end(folder.final, saved_epochs, spec.epochs)
            if not (resuming and folder.images_file.is_file()):
                folder.write_images(*images)
            write_json(folder.config_file, {**_record(spec, who), "accepted": accepted})
            if engine.start is not None:
                engine.start.save_report(path)
            prove_loadable(_payload(engine, who["sources"]), spec.plan)
            if state is not None:
                log.info("Continuing after step %d of %d.", engine.step, spec.steps)
        outcome = engine.fit()
        if rank() == 0 and outcome.finished:
            folder.previous.unlink(missing_ok=True)
        _tell(spec, outcome)
    finally:
        if handler is not None:
            log.removeHandler(handler)
            handler.close()
    final = folder.final if outcome.finished else None
    last, stopped = outcome.last, outcome.signal
    return RunResult(path, final, outcome.finished, outcome.learnt, outcome.sentence, last, stopped)


def _record(spec: RunSpec, who: dict[str, Any]) -> dict[str, Any]:
    """``config.json``: what finds the run again, and everything resolved."""
    keys = ("method", "sources", "dataset", "plans_name", "configuration", "architecture_hash")
    return {
        "schema": 1,
        **{k: who[k] for k in keys},
        "base_plans": spec.plan.base_plans,
        "identity": who,
        "runtime": {"device": str(spec.device), "processes": world_size(), "workers": spec.workers},
        "objective": origin(spec.method),
        "crop_explanation": spec.request.explanation,
        "held_out_cases": len(spec.pool.held_out),
        "versions": checkpoint.package_versions(),
    }


def _payload(engine: Engine, sources: list[str], training: dict[str, Any] | None = None) -> dict[str, Any]:
    spec = engine.spec
    extra: dict[str, Any] = {}
    for hook in spec.hooks:
        extra.update(hook.checkpoint_info())
    if engine.verdict is not None:
        extra["verdict"] = engine.verdict
    if engine.started_from is not None:
        extra["started_from"] = engine.started_from
    return checkpoint.build_payload(
        engine.method.network,
        spec.plan,
        method=spec.method.name,
        config={f.name: getattr(spec.config, f.name) for f in fields(spec.config)},
        crop_size=spec.request.size,
        pretrained_parts=engine.method.pretrained_parts(),
        transfer={"parts": engine.method.default_transfer, "why": engine.method.transfer_reason},
        data={
            "sources": sources,
            "cases": len(spec.pool.cases),
            "fingerprint": spec.pool.fingerprint_hash,
            "case_hashes": sorted(case_key_hash(ref.key) for ref in spec.pool.cases),
        },
        citations=spec.method.citation,
        training=training,
        step=engine.step,
        steps=spec.steps,
        **extra,
    )


def _saver(sources: list[str]) -> Any:
    def save(engine: Engine, path: Path, state: dict[str, Any] | None) -> None:
        folder = engine.spec.folder
        try:
            if path == folder.latest:
                folder.keep_previous()
            checkpoint.save(path, _payload(engine, sources, state))
        except OSError as error:
            whole = (
                "The checkpoint saved before is whole. " if folder.latest.is_file() or folder.previous.is_file() else ""
            )
            raise NnsslError(
                f"cannot save {path}: {error.strerror or error}. {whole}{disk_advice(error)}, then continue with --c."
            ) from error

    return save


def _introduce(spec: RunSpec, sources: list[str]) -> None:
    plan, request = spec.plan, spec.request
    log.info(
        "%s: pretraining the network of %s, %s, %s (%s) on images of %s.",
        spec.method.name,
        plan.dataset_name,
        plan.plans_name,
        plan.configuration,
        plan.network_text,
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
    for line in next_lines(spec.plan, spec.folder.final):
        log.info("%s", line)
