"""The whole probe: random weights and checkpoints side by side on a dataset's labelled cases."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nnssl.networks import build_network
from nnssl.options import as_function, check_seed
from nnssl.options import asked as asked_of
from nnssl.parts import ENCODER
from nnssl.plans import Plan, load_plan, resolve_dataset
from nnssl.probe.cases import Classes, check_foreground, choose_folds, read_case
from nnssl.probe.options import ProbeOptions
from nnssl.probe.report import write_all
from nnssl.probe.result import Probe
from nnssl.probe.scores import Setup, measure
from nnssl.probe.sources import Source, discover, examine, name_checkpoints, open_checkpoint
from nnssl.probe.verdict import RANDOM, Row, choose_sentence, compare, mean_dice, nanmean, sentence
from nnssl.weights import Adaptation, apply

log = logging.getLogger("nnssl")


def run_probe(asked: ProbeOptions) -> Probe:
    """Fit linear layers on the frozen features of random weights and of checkpoints, and score them.

    Returns:
        The table, a sentence on each checkpoint, and what was written.

    Raises:
        NnsslError: for everything that the user can mend.
    """
    began = time.monotonic()
    check_seed(asked.seed)
    plan = load_plan(resolve_dataset(asked.dataset), asked.configuration, asked.plans)
    classes = Classes.of(plan)
    folds = choose_folds(plan, labels=asked.labels, fold=asked.fold, evaluate=asked.evaluate, seed=asked.seed)
    how = None
    if asked.adapt or asked.coverage is not None:
        how = Adaptation.from_metadata({"adapt": asked.adapt, "coverage": asked.coverage})
    checkpoints = [str(checkpoint) for checkpoint in asked.checkpoints]
    named = name_checkpoints(checkpoints) if checkpoints else discover(plan)
    sources = examine(named, plan, how, {name for fold in folds for name in fold.score})
    names = sorted({name for fold in folds for name in (*fold.fit, *fold.score)})
    cases = {name: read_case(plan, classes, name) for name in names}
    for fold in folds:
        check_foreground(cases, classes, fold.fit)
    setup = Setup(plan, classes, cases, folds, torch.device(asked.device), asked.step, asked.seed)
    rows, slices = _measure_all(setup, sources, how, asked.random_inits)
    seconds = time.monotonic() - began
    found = Probe(setup, sources, rows, _sentences(rows), _warnings(setup, sources), slices, seconds, asked_of(asked))
    if asked.output is not None:
        found.files.extend(write_all(Path(asked.output), found))
    return found


probe = as_function("probe", ProbeOptions, run_probe)


def _measure_all(
    setup: Setup, sources: Sequence[Source], how: Adaptation | None, random_inits: int
) -> tuple[list[Row], dict[str, dict[str, np.ndarray]]]:
    """The rows of random weights, then of each checkpoint; and pictures by the name of a row, of layers on encoder stages."""
    rows, slices = _random_rows(setup, random_inits, sorted({0, *(s.n_decoder for s in sources)}))
    random = {row.n_decoder: row for row in rows}
    for source in sources:
        network = build_network(setup.plan)
        apply(network, open_checkpoint(source.path, setup.plan), setup.plan, adapt=how, parts="all")
        for scores in measure(network, setup, sorted({0, source.n_decoder})):
            (cases, classes), stages = mean_dice(scores.dice), scores.stages
            difference = compare(cases, random[stages.n_decoder].cases)
            rows.append(Row(source.name, stages.text, stages.n_decoder, cases, classes, difference=difference))
            if stages.n_decoder == 0:
                slices[source.name] = scores.slices
                log.info("%s: %.1f", source.name, rows[-1].mean)
    return rows, slices


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
        cases, classes = (np.stack(dice) for dice in zip(*(mean_dice(scores.dice) for scores in same)))
        means, stages = tuple(map(nanmean, cases)), same[0].stages
        rows.append(Row(RANDOM, stages.text, stages.n_decoder, cases.mean(0), classes.mean(0), means))
    log.info("%s (%d): %.1f", RANDOM, inits, rows[0].mean)
    return rows, {RANDOM: found[0][0].slices}


def _sentences(rows: Sequence[Row]) -> list[str]:
    """One for each checkpoint and kind of stages, and which checkpoint is ahead."""
    random = {row.n_decoder: row for row in rows if row.difference is None}
    checkpoints = [row for row in rows if row.difference is not None]
    lead = choose_sentence([row for row in checkpoints if row.n_decoder == 0])
    return [sentence(row, random[row.n_decoder]) for row in checkpoints] + ([lead] if lead else [])


def _warnings(setup: Setup, sources: Sequence[Source]) -> list[str]:
    found = []
    if len(setup.scored) < 4:
        found.append(f"{len(setup.scored)} scored cases: intervals are wide, and say little.")
    for source in sources:
        percent = source.report.part(ENCODER).percent
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
