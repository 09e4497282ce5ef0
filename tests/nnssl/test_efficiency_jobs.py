"""The jobs of an experiment: which there are, in which order, what they share, and what is missing for them."""

import json
import math
from pathlib import Path

import pytest

from nnssl.errors import NnsslError
from nnssl.experiments.estimate import estimate_jobs
from nnssl.experiments.executor import full_command
from nnssl.experiments.jobs import PHASES, Job
from nnssl.experiments.options import Options
from nnssl.experiments.records import Records
from nnssl.experiments.run import run_experiment


def test_the_graph_has_each_phase_in_order_and_shares_what_can_be_shared(lab):
    lab.write(labels="[1, 2]", seeds="2")
    graph = lab.graph()
    phases = [j.phase for j in graph.jobs.values()]
    assert [phases.count(p) for p in PHASES] == [1, 1, 8, 8, 8, 8]
    ids = list(graph.jobs)
    assert all(ids.index(need) < ids.index(j.id) for j in graph.jobs.values() for need in j.needs)
    assert [r.arm.name for r in graph.runs[:2]] == ["scratch", "mae"]
    assert graph.runs[0].group == graph.runs[1].group != graph.runs[2].group
    assert ids.index(graph.runs[0].jobs[-1]) < next(i for i, p in enumerate(phases) if p == "pretrain")


def test_names_change_with_what_decides_the_result_and_with_nothing_else(lab):
    def names():
        return {p: {j.id for j in lab.graph().jobs.values() if j.phase == p} for p in ("pretrain", "train", "evaluate")}

    first = names()
    lab.write(environment="{A: 1}", title="other", pictures="false")
    assert names() == first
    lab.write(surface_tolerance_mm="2")
    assert names()["train"] == first["train"] and names()["evaluate"].isdisjoint(first["evaluate"])
    lab.write(training="{epochs: 3}")
    assert names()["pretrain"] == first["pretrain"] and names()["train"].isdisjoint(first["train"])
    lab.write(pretraining="{epochs: 3}")
    scratch = {i for i in first["train"] if "scratch" in i}
    assert names()["pretrain"].isdisjoint(first["pretrain"]) and names()["train"] & first["train"] == scratch
    lab.write(network="{features: [4, 8, 16]}")
    assert all(names()[p].isdisjoint(first[p]) for p in first)


def test_a_pretraining_with_labels_is_made_for_each_draw_with_exactly_its_cases(lab):
    lab.write(labels="[1, 2]", seeds="2", methods="[scratch, {name: omni, method: mae, pretraining: {labelled: true}}]")
    graph = lab.graph()
    made = {j.id: j for j in graph.jobs.values() if j.phase == "pretrain"}
    assert len(made) == 4 and len({j.outputs for j in made.values()}) == 4
    for run in graph.runs:
        if run.arm.name == "omni":
            (job,) = [made[i] for i in run.jobs if i in made]
            command = list(job.command)
            listed = graph.texts[Path(command[command.index("--labelled-cases") + 1])]
            assert listed.split() == list(run.subset.cases) and command[command.index("--labelled") + 1] == "901"
            assert job.outputs[0].parent.name.startswith("nnsslMaeOmni_")
    with pytest.raises(NnsslError, match="'omni.switch' belongs to a pretraining with 'labelled: true'"):
        lab.write(methods="[{name: omni, method: mae, options: {omni.switch: 0.5}}]")
    with pytest.raises(NnsslError, match="omni: .*swich"):
        lab.write(methods="[{name: omni, method: mae, pretraining: {labelled: true, options: {omni.swich: 0.5}}}]")


def test_the_network_of_a_labelled_pretraining_is_an_arm_without_steps(lab):
    """No step, and nothing in the estimate or the training curves that needs one."""
    own = "{name: own, method: mae, pretraining: {labelled: true}, training: {epochs: 0}}"
    lab.write(labels="[1]", seeds="1", methods=f"[scratch, {own}]")
    graph = lab.graph()
    run = next(r for r in graph.runs if r.arm.name == "own")
    train = graph.jobs[next(j for j in run.jobs if j.startswith("train-"))]
    plan = graph.jobs[next(j for j in run.jobs if j.startswith("plan-"))]
    assert train.amount == 0
    assert plan.command[plan.command.index("--epochs") + 1] == "0"
    records = Records(lab.out)
    records.write(train.id, status="done", seconds=40.0)
    times = estimate_jobs(graph, records, [train], "cpu", timed=False)
    assert math.isnan(times.seconds[train.id])  # unknown: a job without steps tells nothing of a step
    with pytest.raises(NnsslError, match="0 epochs keep the weights as they are"):
        lab.write(methods="[scratch, {name: own, method: mae, training: {schedule: mean-teacher, epochs: 0}}]")
        lab.graph()


def test_settings_share_what_is_the_same(lab):
    first = set(lab.graph().jobs)
    lab.write(
        settings="[{name: one}, {name: two, methods: [scratch, {name: other, method: mae}]}, {name: three, labels: [2]}]"
    )
    graph = lab.graph()
    phases = [j.phase for j in graph.jobs.values()]
    assert first < set(graph.jobs) and phases.count("pretrain") == phases.count("network") == 1
    assert phases.count("train") == 5, "scratch of one and two is one training"
    assert [r.about["setting"] for r in graph.runs] == ["one"] * 2 + ["two"] * 2 + ["three"] * 2
    assert not lab.run().failed
    rows = lab.rows("cases.csv")
    there = {(r["setting"], r["method"]) for r in rows}
    assert there == {(r.resolved.name, r.arm.name) for r in graph.runs} and len(there) == 6
    about = json.loads((lab.out / "experiment.json").read_text())
    assert (
        [s["labels"] for s in about["settings"]] == [[1], [1], [2]] and "labels" not in about and about["seeds"] == [0]
    )


def test_networks_of_two_datasets_are_told_apart(lab, tiny_preprocessed):
    tiny_preprocessed(902, "Twin", 5, n_test=2)
    lab.write(settings="[{name: one}, {name: two, dataset: 902}]")
    networks = [j for j in lab.graph().jobs.values() if j.phase == "network"]
    assert len({j.id for j in networks}) == len({j.outputs[0] for j in networks}) == 2


def test_all_missing_datasets_are_named_at_once_with_where_they_come_from(lab, tmp_path):
    file = tmp_path / "paper.yaml"
    file.write_text(
        "methods: [scratch, mae]\nlabels: [1]\ndatasets: {27: 'ACDC, from its organisers'}\npretraining: {datasets: [301]}\n"
        "settings: [{name: ACDC, dataset: 27}, {name: Spleen, dataset: 9}, {name: here, dataset: 901}]\n"
    )
    with pytest.raises(NnsslError, match="3 datasets are not there") as error:
        run_experiment(Options(file, device="cpu", output=tmp_path / "out", dry_run=True))
    text = str(error.value)
    assert "\n  27: ACDC, from its organisers (for ACDC)" in text and "\n  9 (for Spleen)" in text
    assert "\n  301 (to pretrain on for ACDC, Spleen, here)" in text and text.endswith("or leave out what needs it.")
    file.write_text("dataset: 27\nmethods: [scratch]\nlabels: [1]\n")  # a setting without a name of its own
    with pytest.raises(NnsslError, match=r"a dataset is not there: 27\.\n"):
        run_experiment(Options(file, device="cpu", output=tmp_path / "out", dry_run=True))


def test_resume_is_asked_for_where_something_was_begun(tmp_path):
    job = Job("a", "train", ("nnUNetv2_train", "4"), resume=(tmp_path / "x",))
    assert full_command(job) == ("nnUNetv2_train", "4")
    (tmp_path / "x").touch()
    assert full_command(job)[-1] == "--c"
