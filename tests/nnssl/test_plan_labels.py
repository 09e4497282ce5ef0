"""--labels: nested, seeded, leak-free subsets of each fold's training cases; and the trainer that keeps to them."""

import json

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.errors import NnsslError
from nnssl.plan_command import main
from nnssl.plans import load_plan
from nnssl.plans.labels import case_order, choose_cases, fold_to_type, folds_of, restrict, small_split
from nnssl.weights import write_variant

CASES = [f"case_{i:03}" for i in range(25)]
FOLDS = {str(k): ([c for c in CASES if c not in CASES[k::5]], CASES[k::5]) for k in range(5)} | {"all": (CASES, CASES)}


@pytest.fixture
def dataset(nnunet_env, tiny_plans, tiny_dataset_json):
    """``dataset(n=25, splits=None)``: a planned dataset whose preprocessed cases are empty files."""

    def make(n=25, splits=None):
        folder = nnunet_env.preprocessed / "Dataset901_Tiny"
        plans = tiny_plans()
        data = folder / plans["configurations"]["3d_fullres"]["data_identifier"]
        data.mkdir(parents=True)
        for case in CASES[:n]:
            (data / f"{case}.b2nd").touch()
            (data / f"{case}_seg.b2nd").touch()
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(tiny_dataset_json(n=n)))
        if splits is not None:
            (folder / "splits_final.json").write_text(json.dumps([{"train": a, "val": b} for a, b in splits]))
        return folder

    return make


# ------------------------------------------------------------------------------------------------- the choice


def test_subsets_are_nested_over_n_and_never_leak():
    for seed in range(4):
        before = {fold: [] for fold in FOLDS}
        for n in (1, 2, 5, 8, 20):
            chosen = choose_cases(FOLDS, n, seed)
            for fold, (train, val) in FOLDS.items():
                assert len(set(chosen[fold])) == n and set(chosen[fold]) <= set(train)
                assert chosen[fold][: len(before[fold])] == before[fold]
                assert fold == "all" or not set(chosen[fold]) & set(val)
            before = chosen
    assert choose_cases(FOLDS, 8, 0) == choose_cases(FOLDS, "8", 0) != choose_cases(FOLDS, 8, 1)


def test_the_order_is_pinned_and_depends_on_names_alone():
    assert case_order(["a", "b", "c", "d"], 0) == case_order(["d", "c", "b", "a", "a"], 0) == ["d", "a", "c", "b"]
    rest = case_order([c for c in CASES if c != CASES[3]], 7)
    assert [c for c in case_order(CASES, 7) if c != CASES[3]] == rest
    first = [case_order(CASES, seed)[0] for seed in range(300)]
    assert len(set(first)) == 25 and max(map(first.count, first)) < 30, "each case may come first"


def test_percentages_are_of_each_folds_training_cases():
    assert {f: len(c) for f, c in choose_cases(FOLDS, "25%").items()} == {**dict.fromkeys("01234", 5), "all": 6}
    assert {len(c) for c in choose_cases(FOLDS, "1%").values()} == {1}
    assert {len(c) for f, c in choose_cases(FOLDS, "100 %").items()} == {20, 25}
    assert set(choose_cases(FOLDS, "10%", 3)["0"]) < set(choose_cases(FOLDS, "50%", 3)["0"])


def test_a_file_names_cases_and_each_fold_leaves_its_validation_cases_out(tmp_path):
    file = tmp_path / "cases.txt"
    file.write_text("case_006\n\ncase_001 \ncase_011\ncase_006\n")
    chosen = choose_cases(FOLDS, str(file))
    assert chosen["0"] == chosen["all"] == ["case_006", "case_001", "case_011"]
    assert "1" not in chosen, "all three validate there"
    file.write_text("case_006\ncase_0l1\n")
    with pytest.raises(NnsslError, match=r"names 'case_0l1', which is no preprocessed case\. Did you mean 'case_0"):
        choose_cases(FOLDS, file)
    file.write_text("\n")
    with pytest.raises(NnsslError, match=r"--labels .*cases.txt names no case\."):
        choose_cases(FOLDS, file)
    for text in ("# two of them\ncase_006\ncase_001\n", '["case_006", "case_001"]'):  # as every list of cases
        for encoding in ("utf-8-sig", "utf-16"):
            file.write_text(text, encoding=encoding)
            assert choose_cases(FOLDS, str(file))["0"] == ["case_006", "case_001"]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (21, r"--labels 21: there are fewer training cases \(fold 0: 20, fold 1: 20"),
        (0, "--labels 0: at least 1"),
        ("-3", "--labels -3: at least 1"),
        ("0%", "above 0 %"),
        ("101%", "at most at 100 %"),
        ("x%", "neither a number, a percentage"),
        ("eight", "--labels eight: neither a number, a percentage such as 25%, nor a file"),
    ],
)
def test_illegal_labels(labels, text):
    with pytest.raises(NnsslError, match=text):
        choose_cases(FOLDS, labels)


# --------------------------------------------------------------------------------------------------- the folds


def test_folds_are_those_that_nnunet_will_have(dataset):
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    folder = dataset()
    folds = folds_of(load_plan(901))
    theirs = generate_crossval_split(CASES, seed=12345, n_splits=5)
    assert [folds[str(i)] for i in range(5)] == [(list(s["train"]), list(s["val"])) for s in theirs]
    assert folds["all"] == (CASES, CASES)
    assert not (folder / "splits_final.json").exists()


def test_the_fold_to_type_is_one_that_nnunet_can_train(dataset):
    folder = dataset(4)
    assert fold_to_type(load_plan(901)) == "all"
    few = write_variant(load_plan(901), "few", labels=2).stem
    assert fold_to_type(load_plan(901, plans_name=few)) == "0", "the trainer leaves each case out once"
    own = folder / "splits_final.json"
    own.write_text("[]")
    assert fold_to_type(load_plan(901)) == "0", "the user's own folds"
    own.unlink()
    data = folder / load_plan(901).data_identifier
    (data / "case_9.b2nd").touch()
    assert fold_to_type(load_plan(901)) == "0", "nnU-Net splits five"
    data.rename(data.with_name("elsewhere"))
    assert fold_to_type(load_plan(901)) == "0", "not preprocessed yet"


def test_the_fold_to_type_of_a_plan_for_all_cases(dataset, tmp_path):
    dataset(1)
    one = write_variant(load_plan(901), "one", labels=1).stem
    assert fold_to_type(load_plan(901, plans_name=one)) == "all", "a single case has no folds"


def test_folds_of_the_users_own_split(dataset):
    folder = dataset(6, [(CASES[:4], CASES[4:6]), (CASES[2:6], CASES[:2])])
    assert folds_of(load_plan(901)) == {
        "0": (CASES[:4], CASES[4:6]),
        "1": (CASES[2:6], CASES[:2]),
        "all": (CASES[:6], CASES[:6]),
    }
    (folder / "splits_final.json").write_text('[{"train": []}]')
    with pytest.raises(NnsslError, match="splits_final.json cannot be read"):
        folds_of(load_plan(901))


def test_fewer_cases_than_nnunet_can_split(dataset):
    dataset(3)
    folds = folds_of(load_plan(901))
    assert folds["1"] == (["case_000", "case_002"], ["case_001"]) and len(folds) == 4
    assert small_split(["a"]) == []
    assert choose_cases({"all": (["a"], ["a"])}, 1) == {"all": ["a"]}


def test_without_preprocessed_cases_it_says_what_to_type(dataset):
    folder = dataset(0)
    with pytest.raises(NnsslError, match="holds no preprocessed cases"):
        folds_of(load_plan(901))
    (folder / "nnUNetPlans_3d_fullres").rmdir()
    with pytest.raises(NnsslError, match="Type: nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans -c 3d_fullres"):
        folds_of(load_plan(901))


def test_restrict():
    chosen = {"0": ["b", "a"], "all": ["c"]}
    assert restrict(0, ["a", "b", "c"], ["d"], chosen) == (["b", "a"], ["d"])
    assert restrict("all", ["a", "b", "c"], ["a", "b", "c"], chosen) == (["c"], ["a", "b"])
    assert restrict("all", ["c"], ["c"], chosen) == (["c"], ["c"])
    with pytest.raises(NnsslError, match="for fold 0, all, not for fold 1"):
        restrict(1, ["a"], ["b"], chosen)
    for train, val in ((["a"], ["d"]), (["a", "b"], ["b"])):
        with pytest.raises(NnsslError, match="trains fold 0 on 'b'.*splits_final.json has changed"):
            restrict(0, train, val, chosen)


# ------------------------------------------------------------------------------------------------- the variant


def test_restrict_to_named_validation_cases_of_fold_all():
    chosen, named = {"0": ["a"], "all": ["a"]}, {"all": ["a", "c"]}
    assert restrict("all", ["a", "b", "c"], ["a", "b", "c"], chosen, named) == (["a"], ["c"])
    assert restrict("all", ["a"], ["a"], chosen, {"all": ["a"]}) == (["a"], ["a"]), "where all cases are trained on"
    assert restrict(0, ["a", "b"], ["c", "d"], chosen, named) == (["a"], ["c", "d"]), "a fold has its own"
    with pytest.raises(NnsslError, match="validates on 'gone'"):
        restrict("all", ["a", "b"], ["a", "b"], chosen, {"all": ["gone"]})


def test_validation_cases_of_fold_all_from_a_file(dataset, tmp_path, capsys):
    folder = dataset()
    file = tmp_path / "validate.txt"
    file.write_text("case_003\ncase_004\n\ncase_000\n")
    arguments = ["-d", "901", "--validate", str(file), "--name", "few"]
    assert main([*arguments, "--labels", "2"]) == 0
    told = json.loads((folder / "nnUNetPlans_few.json").read_text())["nnssl"]
    assert told["val_cases"] == {"all": ["case_003", "case_004", "case_000"]}
    assert "validates" not in capsys.readouterr().out and len(told["train_cases"]["all"]) == 2
    arguments[-1] = "other"
    assert (
        main(arguments) == 2 and "--validate names validation cases beside those of --labels" in capsys.readouterr().err
    )
    file.write_text("case_0003\n")
    assert main([*arguments, "--labels", "2"]) == 1 and "Did you mean 'case_003'" in capsys.readouterr().err
    file.write_text("\n")
    assert main([*arguments, "--labels", "2"]) == 1 and "names no case" in capsys.readouterr().err
    assert main([*arguments[:3], "gone.txt", *arguments[4:], "--labels", "2"]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_the_plan_says_exactly_which_cases_train(dataset, capsys):
    folder = dataset()
    before = sorted(p.name for p in folder.rglob("*"))
    assert main(["-d", "901", "--labels", "8", "--seed", "3", "--epochs", "100", "--name", "few8s3"]) == 0
    out = capsys.readouterr().out
    told = json.loads((folder / "nnUNetPlans_few8s3.json").read_text())["nnssl"]
    assert told["train_cases"] == choose_cases(folds_of(load_plan(901)), 8, 3)
    assert (told["labels"], told["seed"], told["epochs"]) == ("8", 3, 100)
    assert f"fold 0    trains on 8: {', '.join(told['train_cases']['0'])}" in out
    assert sorted(p.name for p in folder.rglob("*")) == sorted([*before, "nnUNetPlans_few8s3.json"])
    assert main(["-d", "901", "--list"]) == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("nnUNetPlans_few8s3"))
    assert line.split()[7:10] == ["-", "8", "3"]
    assert main(["-d", "901", "--labels", "8", "--name", "few8s3"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["-d", "901", "--seed", "3", "--epochs", "3", "--name", "x"]) == 2
    assert "--seed chooses the cases of --labels" in capsys.readouterr().err


def test_a_variant_of_a_variant_keeps_its_cases(dataset):
    dataset()
    write_variant(load_plan(901), "few", labels=2, seed=1)
    write_variant(load_plan(901, plans_name="nnUNetPlans_few"), "long", epochs=9)
    a, b = (load_plan(901, plans_name=f"nnUNetPlans_{n}").nnssl for n in ("few", "few_long"))
    assert a["train_cases"] == b["train_cases"] and b["epochs"] == 9


# ------------------------------------------------------------------------------------------------- the trainer


def _trainer(folder, plans, fold=0):
    from nnssl.trainers import nnUNetTrainerPretrainedScratch

    content = {**json.loads((folder / f"{plans}.json").read_text()), "continue_training": False}
    info = json.loads((folder / "dataset.json").read_text())
    return nnUNetTrainerPretrainedScratch(content, "3d_fullres", fold, info, torch.device("cpu"))


def test_the_trainer_trains_on_those_and_validates_as_before(dataset):
    folder = dataset()
    path = write_variant(load_plan(901), "few", labels=4, seed=0)
    chosen = load_plan(901, plans_name=path.stem).nnssl["train_cases"]
    for fold in (0, 4):
        train, val = _trainer(folder, path.stem, fold).do_split()
        assert train == chosen[str(fold)] and val == folds_of(load_plan(901))[str(fold)][1]
    assert not (folder / "splits_final.json").exists()
    train, val = _trainer(folder, path.stem, "all").do_split()
    assert train == chosen["all"] and sorted(train + val) == CASES
    stock = nnUNetTrainer(
        {**json.loads((folder / "nnUNetPlans.json").read_text()), "continue_training": False},
        "3d_fullres", 0, json.loads((folder / "dataset.json").read_text()), torch.device("cpu"),
    )  # fmt: skip
    assert stock.do_split()[1] == folds_of(load_plan(901))["0"][1], "nnU-Net's own, written now"
    assert _trainer(folder, path.stem).do_split()[0] == chosen["0"]
    splits = json.loads((folder / "splits_final.json").read_text())
    splits[0]["train"].remove(chosen["0"][0])
    (folder / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(NnsslError, match="splits_final.json has changed"):
        _trainer(folder, path.stem).do_split()


def test_the_trainer_validates_fold_all_on_the_named_cases(dataset, tmp_path):
    folder = dataset()
    (tmp_path / "validate.txt").write_text("case_001\ncase_002\n")
    path = write_variant(load_plan(901), "few", labels=4, seed=0, validate=tmp_path / "validate.txt")
    train, val = _trainer(folder, path.stem, "all").do_split()
    assert len(train) == 4 and val == [c for c in ("case_001", "case_002") if c not in train] and val
    train, val = _trainer(folder, path.stem, 0).do_split()
    assert val == folds_of(load_plan(901))["0"][1]


def test_a_dataset_that_nnunet_cannot_split(dataset):
    folder = dataset(2)
    path = write_variant(load_plan(901), "one", labels=1)
    assert _trainer(folder, path.stem, 1).do_split() == (["case_000"], ["case_001"])
    assert not (folder / "splits_final.json").exists()


@pytest.mark.slow
def test_training_on_one_case(tiny_preprocessed):
    folder = tiny_preprocessed(plan_options={"features": (4, 8, 8), "patch": (16, 16, 16)})
    path = write_variant(load_plan(901), "one", labels=1, epochs=1, iterations=2, val_iterations=1)
    trainer = _trainer(folder, path.stem)
    trainer.run_training()
    trainer.perform_actual_validation()
    plans = json.loads((folder.parent.parent / "nnUNet_results" / folder.name / trainer.output_folder_base.split("/")[-1]
                        / "plans.json").read_text())  # fmt: skip
    assert len(plans["nnssl"]["train_cases"]["0"]) == 1
