"""Pretraining in one call: what the command ``nnssl_pretrain`` does."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnssl.distributed import rank, world_size
from nnssl.errors import NnsslError, UsageError
from nnssl.files import write_json
from nnssl.loggers import open_loggers
from nnssl.options import as_function
from nnssl.plans import Plan, resolve_dataset
from nnssl.pretrain.data import CaseSet
from nnssl.pretrain.data.weights import parse_sources, relative
from nnssl.pretrain.engine.devices import pick_device, process_group, restarted, shared_preparation
from nnssl.pretrain.engine.estimate import estimate
from nnssl.pretrain.engine.folder import LOCK, RunFolder
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.engine.logs import add_log_file, choose_loggers, keep_lines, run_settings
from nnssl.pretrain.engine.loop import Engine
from nnssl.pretrain.engine.spec import RunResult, RunSpec
from nnssl.pretrain.engine.state import load_state
from nnssl.pretrain.engine.watch import RobustnessHook
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.omni import FOLDER, prepare_omni, take_omni
from nnssl.pretrain.onwards import Start, finished_before, keep_first_end, next_lines, start_from, started_from
from nnssl.pretrain.options import RunOptions, command_of
from nnssl.pretrain.prepare import prepare_bodies, prepare_sources
from nnssl.pretrain.prepare.planning import planned
from nnssl.pretrain.resolve import Choice, batch_size, identity, method_folder, resolve
from nnssl.pretrain.run_files import continued_record, payload, run_record, save_checkpoint
from nnssl.pretrain.types import CropRequest
from nnssl.results import CONFIG, output_folder
from nnssl.variables import variables
from nnssl.weights import check_loadable
from nnssl.weights.continuing import further
from nnssl.words import counted, size_text

log = logging.getLogger("nnssl")


def pretrain(asked: RunOptions) -> RunResult:
    """Pretrain the network of a dataset's plans on unlabelled images.

    Returns:
        Where the results are and whether the method learnt.

    Raises:
        NnsslError: for everything that the user can mend.
    """
    with keep_lines() as said:
        inputs = _read(asked)
        with process_group(inputs.device), RunFolder(inputs.path, lock=not asked.dry_run and rank() == 0) as folder:
            auto = asked.continue_run == "auto" or (not asked.continue_run and restarted())
            saved = folder.saved_config(whole=True) if asked.continue_run and not auto else None
            if asked.continue_run and not auto and not folder.has_checkpoint():
                log.info("The run was ended before its first checkpoint: it starts from the beginning.")
                inputs = replace(inputs, start=inputs.start or started_from(saved))
            accepted = _accepted(inputs, saved)
            spec = _spec(inputs, folder, saved, accepted)
            if asked.dry_run:
                log.info("%s", estimate(spec))
                return RunResult(inputs.path, None, False, False, "Only estimated.", {})
            record = {
                "accepted": accepted,
                "asked": asked.asked(),
                "command": command_of(asked),
                "environment": variables(),
            }
            return _execute(spec, auto or bool(asked.continue_run), record, said, inputs.loggers)


run = as_function("run", RunOptions, pretrain)


@dataclass(frozen=True)
class _Inputs:
    """What was asked for, resolved as far as that needs no folder of the run."""

    asked: RunOptions
    method: type[Method]
    options: dict[str, Any]
    omni_options: dict[str, Any]
    plan: Plan
    weights: dict[str, float]
    weighted: bool
    start: Start | None
    loggers: tuple[str, ...]
    hooks: list[Hook]
    path: Path
    device: torch.device


def _read(asked: RunOptions) -> _Inputs:
    method = get_method(asked.method)
    if asked.stop not in (None, "robustness"):
        raise NnsslError(f"--stop {asked.stop}: only 'robustness' is known.")
    loggers = choose_loggers(asked.logger)
    watch = RobustnessHook(asked.robustness_every, True if asked.stop else None)
    options, omni_options = take_omni(asked.options)
    target = _labelled_target(asked, omni_options)
    weights, weighted = parse_sources(asked.sources)
    start = start_from(asked.init, asked.adapt, asked.coverage, asked.key, asked.prefix)
    plan = planned(list(weights), replace(asked, target=target), write=not asked.dry_run)
    method.check_network(plan)
    named = method_folder(method) + (FOLDER if asked.labelled is not None else "")
    path, device = output_folder(plan, named, list(weights), asked.name), pick_device(asked.device)
    if asked.continue_run is True and not (path / LOCK).is_file() and not (path / CONFIG).is_file():
        raise NnsslError(f"there is nothing to continue in {path}. Leave out --c to start.")
    hooks = [watch, *asked.hooks]
    return _Inputs(asked, method, options, omni_options, plan, weights, weighted, start, loggers, hooks, path, device)


def _spec(inputs: _Inputs, folder: RunFolder, saved: dict[str, Any] | None, accepted: Mapping[str, Any]) -> RunSpec:
    """Everything that the run is made of; the cases are prepared where they are not yet."""
    asked, plan, old = inputs.asked, inputs.plan, (saved or {}).get("identity") or {}
    given = {k: getattr(asked, k) for k in ("epochs", "iterations", "seed", "crop")}
    choice = resolve(inputs.method, saved, options=inputs.options, **given)
    method, omni = inputs.method, None
    if asked.labelled is not None:
        omni = prepare_omni(plan, inputs.omni_options, saved, cases=asked.labelled_cases, ranks=world_size())
        method = omni.method(method)
    case_set = _cases(inputs, accepted)
    request = _request(inputs, method, case_set, choice)
    if saved is not None and asked.crop is None:
        explanation = request.explanation.replace("as asked for", "as in the run that is continued")
        request = replace(request, explanation=explanation)
    spec = RunSpec(
        method=method,
        config=choice.config,
        plan=plan,
        case_set=case_set,
        sources=list(inputs.weights),
        request=request,
        engine=choice.engine,
        batch_size=batch_size(choice.engine, request, world_size()),
        epochs=choice.epochs,
        iterations=choice.iterations,
        seed=choice.seed,
        device=inputs.device,
        workers=get_allowed_n_proc_DA() if choice.engine.workers is None else choice.engine.workers,
        folder=folder,
        save=save_checkpoint,
        weights=relative(inputs.weights) if inputs.weighted else old.get("weights"),
        hooks=inputs.hooks,
        start=inputs.start,
    )
    if omni is not None:
        spec.auxiliary = omni.auxiliary(case_set, choice.seed, spec.steps, spec.weights)
        spec.hooks.append(omni.hook(spec.auxiliary))
    _introduce(spec)
    if omni is not None:
        omni.introduce(spec.steps)
    spec.identity = identity(spec) | {
        "omni": None if omni is None else omni.identity(),
        "init": old.get("init") if inputs.start is None else inputs.start.identity(),
    }
    return spec


def _labelled_target(asked: RunOptions, options: Mapping[str, Any]) -> int | str | None:
    """``--labelled D`` implies ``-t D``; what belongs to it is refused without it."""
    if asked.labelled is None:
        given = [f"-o omni.{k}" for k in options] + (["--labelled-cases"] if asked.labelled_cases else [])
        if given:
            raise UsageError(f"{', '.join(given)}: only with --labelled DATASET.")
        return asked.target
    if asked.target is not None and resolve_dataset(asked.target) != resolve_dataset(asked.labelled):
        raise NnsslError(
            f"--labelled {asked.labelled} and -t {asked.target}: the network is that of the labelled dataset's plans. Leave "
            "out -t."
        )
    return asked.labelled


def _accepted(inputs: _Inputs, saved: dict[str, Any] | None) -> dict[str, Any]:
    """What the user has accepted and chosen at the first start, which a continued run keeps."""
    before, start = (saved or {}).get("accepted") or {}, inputs.start
    given = {k: getattr(inputs.asked, k) for k in ("allow_mismatch", "skip_bad", "cases", "exclude")}
    now = {k: os.path.abspath(v) if v and not isinstance(v, bool) else v for k, v in given.items()}
    kept = {k: v or before.get(k) or v for k, v in now.items()}
    return kept | {"start": before.get("start") if start is None else start.options()}


def _cases(inputs: _Inputs, accepted: Mapping[str, Any]) -> CaseSet:
    """The prepared cases."""
    asked = inputs.asked
    with shared_preparation():
        return prepare_sources(
            inputs.plan,
            list(inputs.weights),
            cases=Path(accepted["cases"]) if accepted["cases"] else None,
            exclude=Path(accepted["exclude"]) if accepted["exclude"] else None,
            skip_bad=accepted["skip_bad"],
            n_processes=asked.processes or default_num_processes,
            allow_mismatch=accepted["allow_mismatch"],
            preprocess=not asked.dry_run,
        )


def _request(inputs: _Inputs, method: type[Method], case_set: CaseSet, choice: Choice) -> CropRequest:
    """The crops that the method asks for, and the body masks where it looks at them."""
    request = method.crops(inputs.plan, case_set.stats(), choice.config, choice.crop)
    if request.body and not inputs.asked.dry_run:
        with shared_preparation():
            prepare_bodies(inputs.plan, case_set, n_processes=inputs.asked.processes or default_num_processes)
    return request


def _execute(
    spec: RunSpec, continue_run: bool, record: dict[str, Any], said: MemoryHandler, loggers: Sequence[str]
) -> RunResult:
    """Check what may be continued, record, train, judge."""
    folder, path = spec.folder, spec.folder.path
    folder.check_images(spec.case_set, continue_run=continue_run)
    resuming = folder.check_resume(spec.identity, continue_run=continue_run)
    before = finished_before(folder.final, spec.steps) if resuming else None
    if before is not None:
        log.info("This run is finished: %s. More --epochs than its %d lengthen it.", folder.final, spec.epochs)
        learnt, sentence = before.verdict or (True, "The run was finished before.")
        return RunResult(path, folder.final, True, learnt, sentence, {})
    state = load_state(folder, spec.identity) if resuming else None
    handler = add_log_file(path, said) if rank() == 0 else None
    result = None
    try:
        if rank() == 0:
            spec.loggers = open_loggers(loggers, path, path.name, resume=resuming)
            for each in spec.loggers:
                each.settings(run_settings(spec))
        engine = Engine(spec, state)
        if rank() == 0:
            _record(engine, record, resuming)
        result = engine.fit()
        if result.finished:
            if rank() == 0:
                folder.previous.unlink(missing_ok=True)
            _tell(spec, result)
            for each in spec.loggers:
                each.summary({"learnt": float(result.learnt), "verdict": result.sentence})
        return result
    finally:
        for each in spec.loggers:
            each.close(result is not None and result.finished)
        if handler is not None:
            log.removeHandler(handler)
            handler.close()


def _record(engine: Engine, record: dict[str, Any], resuming: bool) -> None:
    """Write what the run is before its first step, and prove that its checkpoints can be loaded."""
    spec, folder = engine.spec, engine.spec.folder
    if resuming and folder.final.exists():
        saved_epochs = (folder.saved_config() or {}).get("identity", {}).get("epochs", spec.epochs)
        if saved_epochs < spec.epochs:
            keep_first_end(folder.final, saved_epochs, spec.epochs)
    if not (resuming and folder.images_file.is_file()):
        folder.write_images(spec.case_set)
    if resuming:
        record = continued_record(spec, record)
    write_json(folder.config_file, {**run_record(spec), **record})
    if engine.start is not None:
        engine.start.save_report(folder.path)
    check_loadable(payload(engine), spec.plan)
    if resuming:
        log.info("Continuing after step %d of %d.", engine.step, spec.steps)


def _introduce(spec: RunSpec) -> None:
    plan, request = spec.plan, spec.request
    log.info(
        "%s: pretraining the network of %s, %s, %s (%s) on images of %s.",
        spec.method.name,
        plan.dataset_name,
        plan.plans_name,
        plan.configuration,
        plan.network_text,
        ", ".join(spec.sources),
    )
    log.info("Cases: %d to learn from, %d held out.", len(spec.case_set.train), len(spec.case_set.held_out))
    log.info("%s Around it %s voxels are read.", request.explanation, size_text(request.read_size))
    log.info(
        "Batch: %d crops a step (plan: %d patches of %s); %s of %s; seed %d; %s, %s.",
        spec.batch_size,
        plan.batch_size,
        size_text(plan.patch_size),
        counted(spec.epochs, "epoch"),
        counted(spec.iterations, "step"),
        spec.seed,
        spec.device,
        counted(world_size(), "process", "processes"),
    )
    log.info("Output: %s", spec.folder.path)


def _tell(spec: RunSpec, result: RunResult) -> None:
    log.info("%s", result.sentence)
    log.info("Weights: %s", spec.folder.final)
    command = (spec.folder.saved_config() or {}).get("command")
    if not result.learnt and command and not spec.identity.get("omni"):
        log.info("Before these are used, train longer, for example:\n  %s", further(command, 2 * spec.epochs))
    for line in next_lines(spec.plan, spec.folder.final, spec.device.type):
        log.info("%s", line)
