"""Which images without labels a mean teacher learns from: named, left out, seen in the pretraining, held back."""

import json
import shutil

import pytest

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.plans import load_plan
from nnssl.plans.unlabelled import case_key_hash, find_unlabelled, prepared_folder
from nnssl.trainers import (
    nnUNetTrainerMeanTeacher,
    nnUNetTrainerPretrainedMeanTeacher,
)
from nnssl.trainers.mean_teacher import TEACHER
from nnssl.trainers.pool import UnlabelledDataset
from nnssl.weights import write_variant

OWN = "Dataset901_Tiny"


def cases_of(dataset):
    return sorted(p.stem for p in (dataset / "nnUNetPlans_3d_fullres").glob("*.pkl"))


def test_the_pool_of_a_few_label_variant_is_what_it_leaves_out(dataset):
    plan, cases = load_plan(901), cases_of(dataset)
    pool = find_unlabelled(plan, cases[:1], cases[4:], rest=cases[1:4])
    assert [c.name for c in pool.cases] == cases[1:4]
    assert "3 images without labels" in str(pool) and "whose labels the plans leave out" in str(pool)


def test_validation_cases_labelled_cases_and_test_images_are_held_back(dataset):
    plan, cases = load_plan(901), cases_of(dataset)
    seen = {"sources": [OWN]}
    pool = find_unlabelled(plan, cases[:1], cases[4:], pretrained_on=seen)
    assert [c.name for c in pool.cases] == cases[1:4]
    assert pool.held_back == {
        "labelled training cases": 1,
        "excluded by the plans": 0,
        "validation cases": 1,
        "test images of the dataset": 0,
    }
    (dataset / "nnssl_leaks_d901.txt").write_text(f"{OWN}/{cases[2]}\n")
    assert [c.name for c in find_unlabelled(plan, cases[:1], cases[4:], pretrained_on=seen).cases] == [
        cases[1],
        cases[3],
    ]
    plan.plans["nnssl"]["transductive"] = True
    assert [c.name for c in find_unlabelled(plan, cases[:1], cases[4:], pretrained_on=seen).cases] == cases[1:]


def test_of_a_pretraining_only_the_cases_it_saw(dataset):
    plan, cases = load_plan(901), cases_of(dataset)
    seen = {"sources": [OWN], "case_hashes": [case_key_hash(f"{OWN}/{cases[3]}")]}
    assert [c.name for c in find_unlabelled(plan, cases[:1], [], pretrained_on=seen).cases] == [cases[3]]


def test_named_datasets_come_before_everything_else(dataset):
    plan, cases = load_plan(901), cases_of(dataset)
    plan.plans["nnssl"]["unlabelled"] = ["Dataset900_Pool"]
    with pytest.raises(NnsslError, match="Dataset900_Pool.*is not preprocessed.*nnssl_pretrain -d 900 -t 901"):
        find_unlabelled(plan, cases[:1], [], rest=cases[1:])
    folder = prepared_folder(plan, "Dataset900_Pool")
    folder.mkdir(parents=True)
    shutil.copy(dataset / "nnUNetPlans_3d_fullres" / f"{cases[0]}.b2nd", folder / "x.b2nd")
    pool = find_unlabelled(plan, cases[:1], [], rest=cases[1:])
    assert [c.key for c in pool.cases] == ["Dataset900_Pool/x"]
    data, seg, previous, properties = UnlabelledDataset(pool.cases).load_case("Dataset900_Pool/x")
    assert (
        seg.shape == (1, *data.shape[1:]) and not seg.any() and previous is None and properties["class_locations"] == {}
    )


def test_no_image_is_an_error_that_says_what_to_type(dataset, build, start):
    with pytest.raises(NnsslError, match="no images without labels.*nnssl_plan -d 901.*--unlabelled DATASET"):
        start(build(nnUNetTrainerMeanTeacher))


def test_plans_name_the_pool(dataset):
    path = write_variant(load_plan(901), "pool", schedule="mean-teacher", unlabelled=[901], transductive=True)
    told = json.loads(path.read_text())["nnssl"]
    assert (told["schedule"], told["unlabelled"], told["transductive"]) == ("mean_teacher", [OWN], True)
    with pytest.raises(NnsslError, match="for the schedule mean-teacher, not sawtooth"):
        write_variant(load_plan(901), "other", schedule="sawtooth", unlabelled=[901])


def test_excluded_cases_are_not_in_the_pool_even_where_test_images_are(dataset, tmp_path):
    cases, listed = cases_of(dataset), tmp_path / "test.txt"
    listed.write_text(f"{cases[1]}\n{OWN}/{cases[3]}\n")
    write_variant(load_plan(901), "out", labels=1, exclude=listed, transductive=True)
    plan = load_plan(901, plans_name="nnUNetPlans_out")
    assert plan.nnssl["excluded"] == [f"{OWN}/{cases[1]}", f"{OWN}/{cases[3]}"]
    pool = find_unlabelled(plan, cases[:1], [], rest=cases[1:])
    assert [c.name for c in pool.cases] == [cases[2], cases[4]]
    assert "left out: 2 that are excluded by the plans" in str(pool)


def test_a_case_to_exclude_that_is_none_is_named(dataset, tmp_path):
    listed = tmp_path / "test.txt"
    for name in ("nobody", "Dataset999_Gone/nobody"):
        listed.write_text(name)
        with pytest.raises(NnsslError, match=f"--exclude .*test.txt: 1 name that no case of {OWN}.* has: {name}"):
            write_variant(load_plan(901), "out", exclude=listed)


@pytest.mark.parametrize("asked", [{"unlabelled": [901]}, {"transductive": True}])
def test_a_plan_that_names_the_pool_has_the_schedule_that_learns_from_it(dataset, asked):
    """Otherwise it would be trained by a trainer without a pool, and its control would follow another schedule."""
    path = write_variant(load_plan(901), "pool", **asked)
    assert json.loads(path.read_text())["nnssl"]["schedule"] == "mean_teacher"
    write_variant(load_plan(901), "saw", schedule="sawtooth")
    with pytest.raises(NnsslError, match="for the schedule mean-teacher, not sawtooth"):
        write_variant(load_plan(901, plans_name="nnUNetPlans_saw"), "pool", **asked)


def test_from_pretrained_weights_the_pool_is_what_they_saw(dataset, pretraining, started):
    file = pretraining()
    payload = checkpoint.load(file).content
    seen = [case_key_hash(f"{OWN}/{c}") for c in cases_of(dataset)]
    payload["nnssl"]["data"] = {"sources": [OWN], "case_hashes": seen}
    checkpoint.save(file, payload)
    with pytest.raises(
        NnsslError, match="no images without labels.*labelled training cases"
    ):  # fold 0 trains on all the others
        started("nnUNetPlans", nnUNetTrainerPretrainedMeanTeacher)
    write_variant(load_plan(901), "mt", labels=2, schedule="mean-teacher", epochs=2, iterations=1)
    trainer = started("nnUNetPlans_mt", nnUNetTrainerPretrainedMeanTeacher)
    assert len(trainer.pool.cases) == 2 and trainer.provenance["weights"] == "pretrained"
    assert trainer.extra_content(final=False)[TEACHER]["pretrained_on"]["sources"] == [OWN]


def test_with_all_cases_only_those_that_the_plan_names_validate_and_are_kept_out_of_the_pool(
    few, build, dataset, tmp_path
):
    """Of five cases one is labelled and one validates; without such a list the four others are the pool."""
    cases = cases_of(dataset)
    for named, left in (([], 4), (cases[-1:], 3)):
        listed = tmp_path / "validate.txt"
        listed.write_text("\n".join(named))
        plans = few(f"few{left}", labels=1, schedule="mean-teacher", **({"validate": listed} if named else {}))
        trainer = build(nnUNetTrainerMeanTeacher, plans)
        trainer.fold = "all"
        trainer.initialize()
        trainer.before_loading()
        (labelled,) = trainer.do_split()[0]
        pool = {case.name for case in trainer.pool.cases}
        assert pool == {*cases} - {labelled, *named} and len(pool) == left
