"""The whole probe: random weights and checkpoints side by side on a dataset's labelled cases."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.plans import Plan, load_plan, resolve_dataset
from nnssl.probe.cases import Classes, check_foreground, choose_folds, read_case
from nnssl.probe.measure import Scores, Setup, measure
from nnssl.probe.report import write_all
from nnssl.probe.result import Probe
from nnssl.probe.sources import Source, discover, examine, name_checkpoints
from nnssl.probe.verdict import RANDOM, Row, choose_sentence, compare, mean_dice, sentence
from nnssl.weights import Adaptation, apply, load

log = logging.getLogger("nnssl")

RANDOM_INITS = 3


def probe(
    dataset: int | str,
    checkpoints: Sequence[str | Path] = (),
    *,
    configuration: str = "3d_fullres",
    plans: str = "nnUNetPlans",
    labels: str | int | None = None,
    fold: int | str = "all",
    evaluate: str = "loo",
    random_inits: int = RANDOM_INITS,
    seed: int = 0,
    step: float = 0.75,
    adapt: Mapping[str, str] | None = None,
    coverage: float | None = None,
    device: str = "cpu",
    output: str | Path | None = None,
) -> Probe:
    """Fit linear layers on the frozen features of random weights and of checkpoints, and score them.

    Args:
        dataset: number or name; preprocessed by nnU-Net, with labels.
        checkpoints: files, folders of runs, or ``NAME=FILE``; by default those made for the plans.
        configuration, plans: of the dataset.
        labels, fold, evaluate: which cases, see :func:`nnssl.probe.cases.choose_folds`.
        random_inits: how many random initialisations to compare with.
        seed: of labelled cases, voxels and random weights.
        step: distance of the pieces that a case is computed in, as a share of their size, in (0, 1].
        adapt, coverage: what may be adapted to a network that differs, as in ``nnssl_plan``; by default what the plan says.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        output: folder for ``probe.json``, ``probe.csv`` and ``probe.png``; nothing is written without it.

    Raises:
        NnsslError: for everything that the user can mend.
    """
    began = time.monotonic()
    if random_inits < 1:
        raise NnsslError(f"--random-inits must be at least 1, got {random_inits}.")
    if not 0 < step <= 1:
        raise NnsslError(f"--step must lie in (0, 1], got {step}.")
    plan = load_plan(resolve_dataset(dataset), configuration, plans)
    classes = Classes.of(plan)
    folds = choose_folds(plan, labels=labels, fold=fold, evaluate=evaluate, seed=seed)
    asked = {"adapt": dict(adapt or {}), "coverage": coverage}
    how = Adaptation.from_metadata(asked) if adapt or coverage is not None else None
    named = name_checkpoints([str(c) for c in checkpoints]) if checkpoints else discover(plan)
    scored = sorted({name for f in folds for name in f.score})
    sources = examine(named, plan, how, scored)
    names = sorted({name for f in folds for name in (*f.fit, *f.score)})
    cases = {name: read_case(plan, classes, name) for name in names}
    for each in folds:
        check_foreground(cases, classes, each.fit)
    setup = Setup(plan, classes, cases, folds, torch.device(device), step, seed)
    rows, slices = _random_rows(setup, random_inits, sorted({0, *(s.n_decoder for s in sources)}))
    base = {row.n_decoder: row for row in rows}
    for source in sources:
        for scores in measure(_loaded(source, plan, how), setup, sorted({0, source.n_decoder})):
            rows.append(_row(source.name, scores, base[scores.stages.n_decoder]))
            if scores.stages.n_decoder == 0:
                slices[source.name] = scores.slices
                log.info("%s: %.1f", source.name, rows[-1].mean)
    sentences = [sentence(row, base[row.n_decoder]) for row in rows if row.difference is not None]
    lead = choose_sentence([r for r in rows if r.difference is not None and r.n_decoder == 0])
    found = Probe(
        setup,
        sources,
        rows,
        [*sentences, *([lead] if lead else [])],
        _warnings(setup, sources),
        slices,
        time.monotonic() - began,
    )
    if output is not None:
        found.files.extend(write_all(Path(output), found))
    return found


def _loaded(source: Source, plan: Plan, how: Adaptation | None) -> torch.nn.Module:
    network = build_network(plan)
    apply(network, load(source.path), plan, adapt=how, parts="all")
    return network


def _random_network(plan: Plan, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(plan)


def _random_rows(
    setup: Setup, inits: int, decoders: Sequence[int]
) -> tuple[list[Row], dict[str, dict[str, np.ndarray]]]:
    """Random weights by stages: Dice is the mean over initialisations; pictures are the first one's."""
    found = [measure(_random_network(setup.plan, setup.seed + i), setup, decoders) for i in range(inits)]
    rows = []
    for same in zip(*found):
        each = [mean_dice(scores.dice) for scores in same]
        whole = Row("", "", 0, np.stack([e[0] for e in each]).mean(0), np.stack([e[1] for e in each]).mean(0))
        means = tuple(Row("", "", 0, e[0], e[1]).mean for e in each)
        stages = same[0].stages
        rows.append(Row(RANDOM, stages.text, stages.n_decoder, whole.cases, whole.classes, means))
    log.info("%s (%d): %.1f", RANDOM, inits, rows[0].mean)
    return rows, {RANDOM: found[0][0].slices}


def _row(name: str, scores: Scores, random: Row) -> Row:
    cases, classes = mean_dice(scores.dice)
    stages = scores.stages
    return Row(name, stages.text, stages.n_decoder, cases, classes, difference=compare(cases, random.cases))


def _warnings(setup: Setup, sources: Sequence[Source]) -> list[str]:
    found = []
    if len(setup.scored) < 4:
        found.append(f"{len(setup.scored)} scored cases: intervals are wide, and say little.")
    for source in sources:
        percent = source.report.part("encoder").percent
        if percent < 99.95:
            found.append(f"{source.name} fills only {percent:.0f} % of the encoder; the rest is random.")
        if source.report.adaptations:
            found.append(f"{source.name} was adapted: {'; '.join(source.report.adaptations)}.")
        if source.seen:
            found.append(
                f"{source.name} has learnt from the labels of {len(source.seen)} scored cases, first {source.seen[0]}: its "
                "figure says nothing about new images."
            )
    return found
