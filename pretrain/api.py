"""Pretraining in one call: what the command ``nnssl_pretrain`` does."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

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
from nnssl.pretrain.engine.logs import add_log_file, choose_loggers, keep_lines, run_settings
from nnssl.pretrain.engine.loop import Engine
from nnssl.pretrain.engine.resume import load_state
from nnssl.pretrain.engine.spec import Outcome, RunSpec
from nnssl.pretrain.engine.watch import RobustnessHook
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.omni import FOLDER, prepare_omni, take_omni
from nnssl.pretrain.onwards import finished_before, keep_first_end, next_lines, start_from, started_from
from nnssl.pretrain.options import RunOptions, Sources, command_of
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


def pretrain(asked: RunOptions) -> RunResult:
    """Pretrain the network of a dataset's plans on unlabelled images.

    Returns:
        Where the results are and whether the method learnt.

    Raises:
        NnsslError: for everything that the user can mend.
    """
    with keep_lines() as said:
        return _pretrain(asked, said)


run = as_function("run", RunOptions, pretrain)


def _pretrain(asked: RunOptions, said: MemoryHandler) -> RunResult:
    cls = get_method(asked.method)
    if asked.stop not in (None, "robustness"):
        raise NnsslError(f"--stop {asked.stop}: only 'robustness' is known.")
    loggers = choose_loggers(asked.logger)
    watch = RobustnessHook(asked.robustness_every, True if asked.stop else None)
    options, omni_options = take_omni(asked.options)
    target = _labelled_target(asked, omni_options)
    names, weights = _source_names(asked.sources)
    start = start_from(asked.init, asked.adapt, asked.coverage, asked.key, asked.prefix)
    planning: dict[str, Any] = {"planner": asked.planner, "gpu_memory_target": asked.gpu_memory_target}
    planning |= {"n_processes": asked.processes, "write": not asked.dry_run}
    plan = planned(names, target, asked.configuration, asked.plans, **planning)
    cls.check_network(plan)
    named = method_folder(cls) + (FOLDER if asked.labelled is not None else "")
    path = output_folder(plan, named, names, asked.name)
    device, go_on = pick_device(asked.device), asked.continue_run
    if go_on is True and not (path / LOCK).is_file() and not (path / CONFIG).is_file():
        raise NnsslError(f"there is nothing to continue in {path}. Leave out --c to start.")
    with process_group(device), RunFolder(path, lock=not asked.dry_run and rank() == 0) as folder:
        auto = go_on == "auto" or (not go_on and restarted())
        saved = folder.saved_config(whole=True) if go_on and not auto else None
        if go_on and not auto and not folder.has_checkpoint():
            log.info("The run was ended before its first checkpoint: it starts from the beginning.")
            start = start or started_from(saved)
        accepted = _accepted(saved, asked)
        accepted["start"] = start.options() if start is not None else _before(saved).get("start")
        given = {k: getattr(asked, k) for k in ("epochs", "iterations", "seed", "crop")}
        choice = resolve(cls, saved, options=options, **given)
        omni = None
        if asked.labelled is not None:
            omni = prepare_omni(plan, omni_options, saved, cases=asked.labelled_cases, ranks=world_size())
            cls = omni.method(cls)
        case_set, request = _data(asked, cls, plan, names, accepted, choice)
        if saved is not None and asked.crop is None:
            explanation = request.explanation.replace("as asked for", "as in the run that is continued")
            request = replace(request, explanation=explanation)
        batch = batch_size(choice.engine, request, world_size())
        workers = choice.engine.workers
        spec = RunSpec(
            method=cls,
            config=choice.config,
            plan=plan,
            case_set=case_set,
            request=request,
            engine=choice.engine,
            batch_size=batch,
            epochs=choice.epochs,
            iterations=choice.iterations,
            seed=choice.seed,
            device=device,
            workers=get_allowed_n_proc_DA() if workers is None else workers,
            folder=folder,
            save=save_checkpoint,
            weights=_weights(weights, saved),
            hooks=[watch, *asked.hooks],
            start=start,
        )
        if omni is not None:
            spec.auxiliary = omni.auxiliary(case_set, choice.seed, spec.steps, spec.weights)
            spec.hooks.append(omni.hook(spec.auxiliary))
        _introduce(spec, names)
        if omni is not None:
            omni.introduce(spec.steps)
        if asked.dry_run:
            log.info("%s", estimate(spec))
            return RunResult(path, None, False, False, "Only estimated.", {})
        spec.identity = identity(cls, plan, case_set, request, names, choice, batch, spec.weights) | {
            "omni": None if omni is None else omni.identity(),
            "init": start.identity() if start is not None else ((saved or {}).get("identity") or {}).get("init"),
        }
        record = {
            "accepted": accepted,
            "asked": asked.asked(),
            "command": command_of(asked),
            "environment": variables(),
        }
        return _execute(spec, auto or bool(go_on), record, said, loggers)


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


def _source_names(sources: Sources) -> tuple[list[str], dict[str, float] | None]:
    """Names, and weights where any were given."""
    weights, given = parse_sources(sources)
    return list(weights), weights if given else None


def _data(
    asked: RunOptions, cls: type[Method], plan: Plan, names: list[str], accepted: Mapping[str, Any], choice: Choice
) -> tuple[CaseSet, CropRequest]:
    """The prepared cases, and the crops of them that the method asks for."""
    n_processes = asked.processes or default_num_processes
    with shared_preparation():
        case_set = prepare_sources(
            plan,
            names,
            cases=Path(accepted["cases"]) if accepted["cases"] else None,
            exclude=Path(accepted["exclude"]) if accepted["exclude"] else None,
            skip_bad=accepted["skip_bad"],
            n_processes=n_processes,
            allow_mismatch=accepted["allow_mismatch"],
            preprocess=not asked.dry_run,
        )
    request = cls.crops(plan, case_set.stats(), choice.config, choice.crop)
    if request.body and not asked.dry_run:
        with shared_preparation():
            prepare_bodies(plan, case_set, n_processes=n_processes)
    return case_set, request


def _weights(given: dict[str, float] | None, saved: dict[str, Any] | None) -> dict[str, float] | None:
    """What was given now, else what a continued run began with."""
    if given is not None:
        return relative(given)
    return None if saved is None else saved.get("identity", {}).get("weights")


def _accepted(saved: dict[str, Any] | None, asked: RunOptions) -> dict[str, Any]:
    """What the user has accepted and chosen at the first start, which a continued run keeps."""
    given = {k: getattr(asked, k) for k in ("allow_mismatch", "skip_bad", "cases", "exclude")}
    before = _before(saved)
    now = {k: os.path.abspath(v) if v and not isinstance(v, bool) else v for k, v in given.items()}
    return {k: v or before.get(k) or v for k, v in now.items()}


def _before(saved: dict[str, Any] | None) -> dict[str, Any]:
    return (saved or {}).get("accepted") or {}


def _execute(
    spec: RunSpec,
    continue_run: bool,
    record: dict[str, Any],
    said: MemoryHandler,
    loggers: Sequence[str],
) -> RunResult:
    """Check what may be continued, record, train, judge."""
    folder, path = spec.folder, spec.folder.path
    images = [case.key for case in spec.case_set.cases], spec.case_set.contents
    folder.check_images(*images, continue_run=continue_run)
    resuming = folder.check_resume(spec.identity, continue_run=continue_run)
    before = finished_before(folder.final, spec.steps) if resuming else None
    if before is not None:
        log.info("This run is finished: %s. More --epochs than its %d lengthen it.", folder.final, spec.epochs)
        learnt, sentence = before.verdict or (True, "The run was finished before.")
        return RunResult(path, folder.final, True, learnt, sentence, {})
    state = load_state(folder, spec.identity) if resuming else None
    handler = add_log_file(path, said) if rank() == 0 else None
    outcome = None
    try:
        if rank() == 0:
            spec.loggers = open_loggers(loggers, path, path.name, resume=resuming)
            for each in spec.loggers:
                each.settings(run_settings(spec))
        engine = Engine(spec, state)
        if rank() == 0:
            if resuming and folder.final.exists():
                saved_epochs = (folder.saved_config() or {}).get("identity", {}).get("epochs", spec.epochs)
                if saved_epochs < spec.epochs:
                    keep_first_end(folder.final, saved_epochs, spec.epochs)
            if not (resuming and folder.images_file.is_file()):
                folder.write_images(*images)
            if resuming:
                record = continued_record(folder, record)
            write_json(folder.config_file, {**run_record(spec), **record})
            if engine.start is not None:
                engine.start.save_report(path)
            check_loadable(payload(engine), spec.plan)
            if state is not None:
                log.info("Continuing after step %d of %d.", engine.step, spec.steps)
        outcome = engine.fit()
        if rank() == 0 and outcome.finished:
            folder.previous.unlink(missing_ok=True)
        _tell(spec, outcome)
        for each in spec.loggers if outcome.finished else ():
            each.summary({"learnt": float(outcome.learnt), "verdict": outcome.sentence})
        final = folder.final if outcome.finished else None
        judged = (outcome.finished, outcome.learnt, outcome.sentence)
        return RunResult(path, final, *judged, outcome.last, outcome.signal)
    finally:
        for each in spec.loggers:
            each.close(outcome is not None and outcome.finished)
        if handler is not None:
            log.removeHandler(handler)
            handler.close()


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
    log.info("Cases: %d to learn from, %d held out.", len(spec.case_set.train), len(spec.case_set.held_out))
    log.info("%s It is read in windows of %s.", request.explanation, size_text(request.read_size))
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


def _tell(spec: RunSpec, outcome: Outcome) -> None:
    if not outcome.finished:
        return
    log.info("%s", outcome.sentence)
    log.info("Weights: %s", spec.folder.final)
    command = (spec.folder.saved_config() or {}).get("command")
    if not outcome.learnt and command and not spec.identity.get("omni"):
        log.info("Before these are used, train longer, for example:\n  %s", further(command, 2 * spec.epochs))
    for line in next_lines(spec.plan, spec.folder.final):
        log.info("%s", line)
