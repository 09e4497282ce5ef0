"""From what the user gave, and what a folder holds, to the configuration of a run and the record of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnssl.config import config_dict, make_config, split_options
from nnssl.errors import NnsslError, did_you_mean
from nnssl.options import check_seed
from nnssl.pretrain.engine.config import OLD_NAMES, RUNTIME_OPTIONS, EngineConfig
from nnssl.pretrain.engine.spec import RunSpec
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.types import CropRequest
from nnssl.words import counted

EPOCHS, ITERATIONS, SEED = 200, 250, 0


@dataclass(frozen=True)
class Choice:
    """What was chosen for a run, defaults filled in."""

    config: Any
    engine: EngineConfig
    epochs: int
    iterations: int
    seed: int
    crop: tuple[int, ...] | None


def resolve(
    method: type[Method],
    saved: Mapping[str, Any] | None,
    *,
    epochs: int | None,
    iterations: int | None,
    seed: int | None,
    options: Mapping[str, Any] | None,
    crop: Sequence[int] | None,
) -> Choice:
    """Fill in defaults; a continued run's saved identity comes before them, and what the user gave before both."""
    given = {OLD_NAMES.get(key, key): value for key, value in (options or {}).items()}
    preset = given.pop("preset", None)
    old = (saved or {}).get("identity", {})
    if preset is not None and preset not in method.presets:
        known = ", ".join(method.presets) or "none"
        raise NnsslError(f"-o preset={preset}: {method.name} has {known}.{did_you_mean(str(preset), method.presets)}")
    base = {**(method.presets[preset] if preset else {})} if preset or not old else dict(old["options"])
    of_method, of_engine = split_options(given, [method.Config, EngineConfig])
    for key, value in {"epochs": epochs, "iterations": iterations}.items():
        if value is not None and value < 1:
            raise NnsslError(f"--{key} {value}: at least 1 is needed.")
    if seed is not None:
        check_seed(seed)
    if crop is None and old:
        crop = old["crop"]["size"]
    return Choice(
        config=make_config(method.Config, of_method, base),
        engine=make_config(EngineConfig, of_engine, old.get("engine", {})),
        epochs=old.get("epochs", EPOCHS) if epochs is None else epochs,
        iterations=old.get("iterations", ITERATIONS) if iterations is None else iterations,
        seed=old.get("seed", SEED) if seed is None else seed,
        crop=tuple(int(c) for c in crop) if crop is not None else None,
    )


def batch_size(engine: EngineConfig, request: CropRequest, ranks: int) -> int:
    """Crops per step over all ranks."""
    size, parts = engine.batch_size or request.batch_size, engine.accumulate or 1
    if size < request.min_batch:
        raise NnsslError(f"-o batch_size={size}: this method needs at least {request.min_batch} crops a step.")
    if size // parts < request.min_batch:
        raise NnsslError(
            f"-o batch_size={size} accumulate={parts}: this method needs at least {request.min_batch} crops in each "
            f"micro-batch. Give -o batch_size={parts * request.min_batch} or more."
        )
    unit = ranks * request.crops_per_case * parts
    if size % unit:
        low, high = size // unit * unit, (size // unit + 1) * unit
        micro = f" in {parts} micro-batches" if parts > 1 else ""
        shared = f" shared by {counted(ranks, 'process', 'processes')}" if ranks > 1 else ""
        cases = f" with {counted(request.crops_per_case, 'crop')} of each case" if request.crops_per_case > 1 else ""
        raise NnsslError(
            f"-o batch_size={size}: a step{shared}{micro}{cases} takes a multiple of {unit}, "
            f"for example {f'{low} or {high}' if low else high}."
        )
    return size


def method_folder(method: type[Method]) -> str:
    """The method's name in the output folder: ``macl`` -> ``Macl``."""
    return method.name[:1].upper() + method.name[1:]


def identity(spec: RunSpec) -> dict[str, Any]:
    """What makes a run what it is: a folder takes only a run with the same."""
    plan, request, case_set = spec.plan, spec.request, spec.case_set
    return {
        "method": spec.method.name,
        "options": config_dict(spec.config),
        "engine": {k: v for k, v in config_dict(spec.engine).items() if k not in RUNTIME_OPTIONS},
        "epochs": spec.epochs,
        "iterations": spec.iterations,
        "batch_size": spec.batch_size,
        "seed": spec.seed,
        "crop": {"size": list(request.size), "window": list(request.read_size)},
        "sources": spec.sources,
        "weights": spec.weights,
        "dataset": plan.dataset_name,
        "plans_name": plan.plans_name,
        "configuration": plan.configuration,
        "architecture_hash": plan.architecture_hash,
        "data_hash": plan.data_hash,
        "cases": {"number": len(case_set.cases), "fingerprint": case_set.fingerprint_hash},
    }
