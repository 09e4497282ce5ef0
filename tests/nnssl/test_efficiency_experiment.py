"""The experiment file: defaults, sections, and what is refused with the nearest name."""

import importlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nnssl.errors import NnsslError
from nnssl.experiments.experiment import load_experiment

ROOT = Path(__file__).resolve().parents[2]
SHORT = "dataset: 4\nmethods: [scratch, mae, macl]\nlabels: [4, 16]\nseeds: 3\ntraining: {epochs: 20}\n"


def load(folder: Path, text: str):
    file = folder / "my exp.yaml"
    file.write_text(text)
    return load_experiment(file)


def test_five_lines_are_enough(tmp_path):
    experiment = load(tmp_path, SHORT)
    assert experiment.name == "my-exp" and experiment.pictures
    (setting,) = experiment.settings
    assert [a.name for a in setting.arms] == ["scratch", "mae", "macl"]
    assert setting.dataset == "4" and setting.labels == ("4", "16") and setting.seeds == (0, 1, 2)
    assert setting.configuration == "3d_fullres" and setting.plans == "nnUNetPlans" and not setting.network.changes
    assert all(a.training.lengths == {"epochs": 20} for a in setting.arms)


def test_methods_have_options_checkpoints_and_sections_of_their_own(tmp_path):
    text = """
dataset: Dataset004_Hippocampus
labels: 10%
seeds: [7]
training: {epochs: 20, figures: {peak_lr: 1e-2, warmup: 0.1}}
pretraining: {epochs: 5, options: {batch_size: 8}}
methods:
  - {name: long, method: macl, options: {temperature: 0.2}, pretraining: {epochs: 50}}
  - {name: theirs, checkpoint: weights/theirs.pth, adapt: {depth: match}, training: {figures: {peak_lr: 1e-3}}}
  - {method: scratch, training: {schedule: freeze-unfreeze, figures: {frozen: 0.5}}}
"""
    (setting,) = load(tmp_path, text).settings
    long, theirs, scratch = setting.arms
    assert (long.pretraining.epochs, long.pretraining.options) == (50, {"batch_size": 8, "temperature": 0.2})
    assert theirs.checkpoint == tmp_path / "weights" / "theirs.pth" and theirs.adapt == {"depth": "match"}
    assert theirs.training.figures == {"peak_lr": 1e-3, "warmup": 0.1}
    assert scratch.training.figures == {"frozen": 0.5}, "figures of another schedule are not taken over"
    assert long.training.figures["peak_lr"] == 0.01 and setting.labels == ("10%",) and setting.seeds == (7,)


def test_an_objective_in_a_file_lies_beside_the_experiment(tmp_path, monkeypatch):
    """A relative path is the experiment file's, as all others are, wherever the command is typed and its jobs run."""
    (tmp_path / "there").mkdir()
    shutil.copy(ROOT / "examples" / "own_objective" / "simclr.py", tmp_path / "there" / "mine.py")
    monkeypatch.chdir(tmp_path)
    (setting,) = load(tmp_path / "there", "dataset: 4\nlabels: [1]\nmethods: [scratch, ./mine.py]\n").settings
    assert [(a.name, a.method) for a in setting.arms] == [
        ("scratch", "scratch"),
        ("mine", str(tmp_path / "there" / "mine.py")),
    ]
    with pytest.raises(NnsslError, match=r"method other: -m \S*there/other.py: there is no such Python file"):
        load(tmp_path / "there", "dataset: 4\nlabels: [1]\nmethods: [other.py]\n")


def test_settings_share_the_rest_of_the_file(tmp_path):
    text = SHORT + (
        "settings:\n  - {name: few, labels: [1, 2], training: {iterations: 9}}\n"
        "  - {name: other, dataset: 5, methods: [scratch]}\n"
    )
    few, other = load(tmp_path, text).settings
    assert few.labels == ("1", "2") and few.arms[0].training.lengths == {"epochs": 20, "iterations": 9}
    assert (other.dataset, few.dataset) == ("5", "4") and [a.name for a in other.arms] == ["scratch"]
    with pytest.raises(NnsslError, match="two are called 'few'"):
        load(tmp_path, text.replace("name: other", "name: few"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sedes: 2", r"unknown key 'sedes'. Did you mean 'seeds'\?"),
        ("pretraining: {epoch: 3}", r"pretraining: unknown key 'epoch'. Did you mean 'epochs'\?"),
        (
            "methods: [scratch, {method: mae, optoins: {}}]",
            r"method mae: unknown key 'optoins'. Did you mean 'options'\?",
        ),
        ("methods: [scratch, mea]", r"method mea: unknown method 'mea'. Did you mean 'mae'\?"),
        (
            "methods: [{method: mae, options: {mask_rato: 0.5}}]",
            r"unknown option 'mask_rato'. Did you mean 'mask_ratio'\?",
        ),
        ("training: {schedule: warmup-pol}", "no schedule 'warmup-pol'. Did you mean 'warmup-poly'"),
        ("training: {figures: {peak: 1}}", "'peak' is no option of the schedule"),
        ("training: {epochs: few}", "training: 'epochs' must be a whole number of at least 0, or auto, not 'few'"),
        ("training: {epochs: -1}", "training: 'epochs' must be a whole number of at least 0, or auto, not -1"),
        ("training: 20", "training: keys such as 'schedule: ...' are wanted, not 20"),
        ("mirroring: maybe", "'mirroring' must be true or false, not 'maybe'"),
        ("labels: [some]", "labels: 'some' is neither a number, a share such as 10%, nor all"),
        ("labels: [4, 4]", "labels: a value is given twice"),
        ("seeds: []", "seeds: none is given"),
        ("methods: [mae, mae]", "two methods are called 'mae'"),
        ("methods: [{name: a, method: mae, checkpoint: b}]", "method a: either 'method' or 'checkpoint' is needed"),
        ("methods: [{checkpoint: b}]", "needs a 'name'"),
        ("methods: [{name: a__b, method: mae}]", "since nnU-Net splits folder names"),
        ("methods: [{method: scratch, options: {a: 1}}]", "there is no pretraining"),
        ("methods: [{method: mae, coverage: 0.5}]", "adapt and coverage belong to a checkpoint"),
        ("test: [a]\nfolds: [0]", "test and folds exclude each other"),
        ("splits: a.json\nfolds: [0]", "splits and folds exclude each other"),
        ("splits: $NOT_SET_ANYWHERE/a.json", "names a variable that is not set"),
        ("dataset:", "'dataset' is missing"),
        ("settings: 3", "settings: a list is wanted"),
        (
            "network: {features: 8,16,32}",
            r"network: 16, 32: between braces a list has brackets, such as {features: \[8, 16, 32\]}",
        ),
        ("settings: [{titel: 3}]", "settings, number 1: unknown key 'titel'"),
    ],
)
def test_faults_are_named(tmp_path, change, message):
    name = change.partition(":")[0]
    kept = [line for line in SHORT.splitlines() if not line.startswith(f"{name}:")]
    with pytest.raises(NnsslError, match=message):
        load(tmp_path, "\n".join([*kept, change]) + "\n")


def test_all_faults_of_a_section_are_told_at_once(tmp_path):
    with pytest.raises(NnsslError) as error:
        load(tmp_path, SHORT.replace("{epochs: 20}", "{epochs: -1, iteration: 3, val_cases: x}"))
    assert all(word in str(error.value) for word in ("found 3 problems", "epochs", "iteration", "val_cases"))


def test_a_key_given_twice_and_a_file_that_is_no_yaml_are_refused(tmp_path):
    with pytest.raises(NnsslError, match="'dataset' is given twice"):
        load(tmp_path, SHORT + "dataset: 5\n")
    with pytest.raises(NnsslError, match="is no YAML"):
        load(tmp_path, "dataset: [4\n")
    with pytest.raises(NnsslError, match="holds no settings"):
        load(tmp_path, "- 4\n")
    with pytest.raises(NnsslError, match="cannot be read"):
        load_experiment(tmp_path / "missing.yaml")


def test_examples_can_be_read(monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/data/nnUNet_raw")
    monkeypatch.setenv("nnUNet_results", "/data/nnUNet_results")
    files = sorted((ROOT / "examples" / "label_efficiency").glob("*.yaml"))
    assert {"hippocampus.yaml", "hippocampus_cpu.yaml", "left_atrium.yaml", "smoke.yaml"} <= {f.name for f in files}
    experiments = {f.name: load_experiment(f) for f in files}
    assert not experiments["left_atrium.yaml"].pictures, "no picture of it may be published"


def test_features_are_written_as_in_yaml_or_as_the_commands_take_them(tmp_path):
    found = []
    for features in ("[8, 16, 32]", '"8,16,32"', "8,16,32"):
        file = tmp_path / "x.yaml"
        file.write_text(f"dataset: 4\nmethods: [scratch]\nlabels: [4]\nnetwork: {{features: {features}}}\n".replace(
            "{features: 8,16,32}", "\n  features: 8,16,32"))  # fmt: skip
        found.append(load_experiment(file).settings[0].network.features)
    assert found == [(8, 16, 32)] * 3


def test_problems_are_told_once_with_the_file_and_counted(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "dataset: 4\nmethods: [scratch]\nlabels: [4]\nnetwork: {features: [a], pach: [1]}\ntraining: {epochs: 0}\n"
    )
    with pytest.raises(NnsslError) as error:
        load_experiment(file)
    assert str(error.value).startswith(f"{file}: ") and "the experiment" not in str(error.value)
    file.write_text("dataset: 4\nmethods: [scratch]\nlabels: [4]\nnetwork: {features: [a], pach: [1]}\n")
    with pytest.raises(NnsslError, match="found 2 problems") as error:
        load_experiment(file)
    assert str(error.value).count("network: ") == 2


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("options: true", "method mae: 'options' must be keys and values, not True"),
        ("pretraining: {options: [1]}", r"method mae: pretraining: 'options' must be keys and values, not \[1\]"),
        ("training: {figures: 3}", "method mae: training: 'figures' must be keys and values, not 3"),
        ("training: long", "method mae: 'training' must be keys and values, not 'long'"),
    ],
)
def test_sections_of_a_method_that_are_no_mappings_are_refused(tmp_path, entry, told):
    with pytest.raises(NnsslError, match=told):
        load(tmp_path, SHORT.replace("mae", f"{{method: mae, {entry}}}"))


def test_the_old_schema_module_works_and_tells_its_new_names(tmp_path):
    sys.modules.pop("nnssl.experiments.schema", None)
    with pytest.warns(FutureWarning, match=r"now nnssl\.experiments\.reading .* and nnssl\.config") as told:
        old = importlib.import_module("nnssl.experiments.schema")
    assert len(told) == 1

    @dataclass(frozen=True)
    class Made:
        seeds: int = old.key(3, "how many", low=1)

    assert old.build(Made, {"seeds": "4"}) == Made(4) and old.number("1e-2") == 0.01
    with pytest.raises(NnsslError, match="'seeds' must be a whole number of at least 1, not 0"):
        old.build(Made, {"seeds": 0})
    (problem,) = old.check_keys({"seed": 1}, ["seeds"], "training: ")
    assert problem.startswith("training: unknown key 'seed'. Did you mean 'seeds'?")
    (tmp_path / "a.yaml").write_text("seeds: 2")
    assert old.read_yaml(tmp_path / "a.yaml") == {"seeds": 2}
    with pytest.raises(ImportError):
        from nnssl.experiments.schema import nothing_of_that_name  # noqa: F401
