"""Which checkpoints a probe compares, under which names, and what each of them fills."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl.errors import NnsslError, raise_problems
from nnssl.files import sha256_of
from nnssl.networks import build_network
from nnssl.parts import DECODER
from nnssl.paths import decode_path
from nnssl.plans import Plan, dataset_id
from nnssl.results import CHECKPOINTS, FINAL, checkpoint_in, find_pretrainings, find_pretrainings_elsewhere
from nnssl.weights import Adaptation, Checkpoint, TransferReport, apply, labels_seen, load


@dataclass(frozen=True, eq=False)
class Source:
    """One checkpoint.

    Attributes:
        name: its column. path: the file. sha256: of its content.
        method: objective, or the trainer's name in files of others.
        report: what of it the plan's network takes.
        n_decoder: decoder stages that it fills completely, counted from the bottleneck up.
        seen: scored cases whose labels it has learnt from.
    """

    name: str
    path: Path
    sha256: str
    method: str
    report: TransferReport
    n_decoder: int
    seen: tuple[str, ...] = ()


def discover(plan: Plan) -> list[tuple[str, Path]]:
    """The checkpoint that the plan names, and all finished pretrainings for its plans and network.

    A trainer takes the first, or the only one of the others; a probe compares them.

    Raises:
        NnsslError: there is none, or the named file is missing or another than it was.
    """
    found = []
    named = plan.nnssl.get("checkpoint")
    if named:
        path, expected = decode_path(str(named)), plan.nnssl.get("sha256")
        if not path.is_file():
            raise NnsslError(f"Plans '{plan.plans_name}' name the pretrained file {named}, which is not here ({path}).")
        if expected and sha256_of(path) != expected:
            raise NnsslError(
                f"Plans '{plan.plans_name}' name {path}, whose content has changed since. Restore it, or name it yourself: "
                f"nnssl_probe -d {dataset_id(plan.dataset_name)} {path}"
            )
        found.append(path)
    found += [run.checkpoint for run in find_pretrainings(plan) if run.finished and run.checkpoint is not None]
    paths = list({path.resolve(): path for path in found}.values())
    if paths:
        return name_checkpoints([str(path) for path in paths])
    number, options = dataset_id(plan.dataset_name), f"-c {plan.configuration} -p {plan.plans_name}"
    others = [f"\n  - {run.method}: {run.checkpoint}" for run in find_pretrainings_elsewhere(plan) if run.finished]
    if others:
        others.insert(0, "\nThose made for other datasets' plans can be named where their network is the same:")
    raise NnsslError(
        f"No finished pretraining fits plans '{plan.plans_name}' ({plan.configuration}) of {plan.dataset_name}. Name files: "
        f"nnssl_probe -d {number} {options} FILE ..., or make one: nnssl_pretrain -d {number} {options} -m mae{''.join(others)}"
    )


def name_checkpoints(texts: Sequence[str]) -> list[tuple[str, Path]]:
    """``FILE``, a run's folder, or ``NAME=FILE`` each -> distinct names and files."""
    used: Counter[str] = Counter()
    named = []
    for text in texts:
        given, _, rest = text.partition("=")
        has_name = given and rest and not Path(text).exists()
        path = checkpoint_in(Path(rest if has_name else text))
        name = given if has_name else _short(path)
        used[name] += 1
        named.append((name if used[name] == 1 else f"{name} ({used[name]})", path))
    return named


def _short(path: Path) -> str:
    """``nnsslMae_a`` of ``.../nnsslMae_a__nnUNetPlans__3d_fullres/checkpoint_final.pth``; of other files their own name."""
    if path.name not in CHECKPOINTS:
        return path.stem
    folder = path.resolve().parent
    if folder.name.startswith("fold_"):
        folder = folder.parent
    name = folder.name.split("__")[0]
    return name if path.name == FINAL else f"{name} {path.stem.removeprefix('checkpoint_')}"


def open_checkpoint(path: Path, plan: Plan) -> Checkpoint:
    """Read a file; from the one that the plan names, the weights that it says."""
    named, place = plan.nnssl.get("checkpoint"), plan.nnssl.get("place") or {}
    if not named or decode_path(str(named)).resolve() != path.resolve():
        place = {}
    return load(path, key=place.get("key"), prefix=place.get("prefix"))


def examine(
    named: Sequence[tuple[str, Path]], plan: Plan, adapt: Adaptation | None, scored: Iterable[str]
) -> list[Source]:
    """Load each file into the plan's network once, to know what it fills before anything is measured.

    Raises:
        NnsslError: lists every file that cannot be read or does not fit.
    """
    sources, problems = [], []
    for name, path in named:
        try:
            checkpoint = open_checkpoint(path, plan)
            report = apply(build_network(plan), checkpoint, plan, adapt=adapt, parts="all")
        except NnsslError as error:
            problems.append(str(error))
            continue
        stages = [row for row in report.parts if row.part.kind == DECODER]
        whole = [row.random == 0 and row.loaded + row.adapted > 0 for row in stages]
        n_decoder = whole.index(False) if False in whole else len(whole)
        seen = tuple(labels_seen(checkpoint.nnssl, plan.dataset_name, scored))
        sources.append(Source(name, path, sha256_of(path), checkpoint.method, report, n_decoder, seen))
    raise_problems(problems, "Checkpoints")
    return sources
