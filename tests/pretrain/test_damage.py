"""Files that were damaged after they were made, images that do not fit into memory, and pickles that want to run something."""

import json
import os
import pickle
import re
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnssl.errors import NnsslError
from nnssl.pretrain import preprocess, run
from nnssl.pretrain.prepare import processes
from nnssl.pretrain.prepare.index import Entry
from nnssl.pretrain.prepare.preprocess import in_memory
from nnssl.pretrain.prepare.raw import RawCase
from nnssl.pretrain.prepare.worker import CaseWorker, Result, Task
from nnssl.properties import UnsafePickleError, read_properties

SMALL = {"shape": (12, 16, 12), "plan_options": {"patch": (8, 8, 8)}}


@pytest.fixture
def free(tiny_preprocessed, tiny_raw_dataset):
    """A labelled target 901 and four unlabelled cases of 902; the folder of the preprocessed ones."""
    tiny_preprocessed(901, "Tiny", 5, **SMALL)
    tiny_raw_dataset(902, "Free", 4, labelled=False, seed=1, shape=(12, 16, 12))
    return prepare().folders[0]


def prepare(**options):
    return preprocess(902, target=901, processes=1, **options)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def garbage(file):
    file.write_bytes(b"\x80\x04garbage" * 9)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("ending", [".pkl", ".b2nd", "_seg.b2nd"])
@pytest.mark.parametrize("damage", [os.unlink, empty, cut, garbage], ids=["gone", "empty", "cut", "garbage"])
def test_what_is_not_whole_is_made_anew(free, ending, damage):
    before = content(free)
    damage(free / f"case_001{ending}")
    made = prepare()
    assert made.cases == 4 and not made.bad
    after = content(free)
    assert before.keys() == after.keys()
    for case in ("case_000", "case_002", "case_003"):
        assert all(after[n] == before[n] for n in before if n.startswith(case))
    for end in ("", "_seg"):
        assert len(blosc2.open(str(free / f"case_001{end}.b2nd"), mode="r").shape) == 4
    assert read_properties(free / "case_001.pkl")["shape_before_cropping"] == (12, 16, 12)


@pytest.mark.parametrize("ending", [".pkl", ".b2nd"])
def test_a_start_that_meets_damage_says_so_and_the_next_mends_it(free, ending):
    """Content that changes in place is not seen by a start, which only lists files: the run meets it, and it is set aside."""
    options = {"method": "mae", "device": "cpu", "epochs": 1, "iterations": 4, "robustness_every": 0, "processes": 1}
    options["options"] = {"workers": 0, "held_out_batches": 0, "picture_every": 0}
    for case in range(4):
        garbage(free / f"case_00{case}{ending}")
    told = []
    for _ in range(6):
        try:
            assert run(902, target=901, **options, continue_run="auto").finished
            break
        except NnsslError as error:
            assert "Start again, and it is made anew" in str(error)
            told.append(str(error))
    assert 1 <= len(told) <= 4 and len(list(free.parent.glob("*_damaged/*"))) == len(told)


def test_memory_that_runs_out_for_one_image(free, monkeypatch):
    for file in free.iterdir():
        file.unlink()
    run_case = CaseWorker._run
    monkeypatch.setattr(
        CaseWorker, "_run", lambda self, case, state: big() if case.name == "case_002" else run_case(self, case, state)
    )

    def big():
        raise MemoryError

    with pytest.raises(
        NnsslError, match=r"1 of 4 images.*\n.*case_002.*does not fit into this machine's memory"
    ) as told:
        prepare()
    assert "-np" not in str(told.value) and "--skip-bad" in str(told.value)
    made = prepare(skip_bad=True)
    assert made.cases == 3 and len(made.bad) == 1


class Short:
    """A worker for which memory runs out: for "alone" in other processes than the first, for "never" everywhere."""

    def __init__(self):
        self.main = os.getpid()

    def __call__(self, task):
        short = task.case.name == "never" or (task.case.name == "alone" and os.getpid() != self.main)
        return Result(Entry(task.case.name, (), (1, 1, 1)), "memory" if short else "")


def test_what_fails_beside_others_is_done_again_alone(monkeypatch):
    context = processes.multiprocessing.get_context("fork")
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda method: context)
    tasks = [Task(RawCase(name, (f"{name}.nii",), ())) for name in ("a", "alone", "b", "never")]
    results = {r.entry.name: r for r in in_memory(Short(), tasks, 2, "")}
    assert {n for n, r in results.items() if r.entry.bad} == {"never"} and len(results) == 4
    assert not any(r.fatal for r in results.values())


# ---- pickles ---------------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_properties_of_nnunet_are_read_and_nothing_is_run(free, tmp_path):
    own = read_properties(free / "case_000.pkl")
    assert own == pickle.loads((free / "case_000.pkl").read_bytes())
    odd = {
        "array": np.arange(6).reshape(2, 3),
        "number": np.float32(2.5),
        "empty": np.zeros((0, 4), np.int64),
        "text": np.array(["a"]),
        "set": {1, 2},
        "complex": 1j,
    }
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "odd.pkl").write_bytes(pickle.dumps(odd, protocol))
        read = read_properties(tmp_path / "odd.pkl")
        assert read.keys() == odd.keys() and np.array_equal(read["array"], odd["array"]) and read["number"] == 2.5
    for bomb in (Bomb(tmp_path / "made"), {"a": Bomb(tmp_path / "made")}):
        (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(bomb))
        with pytest.raises(UnsafePickleError, match="asks to run posix.mkdir|asks to run nt.mkdir"):
            read_properties(tmp_path / "bomb.pkl")
    assert not (tmp_path / "made").exists()
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="holds a list"):
        read_properties(tmp_path / "list.pkl")


@pytest.mark.parametrize(
    "code",
    [
        b"cnumpy.f2py.diagnose\nrun\n(tR.",
        b"cnumpy.testing._private.utils\nruncode\n(tR.",
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"cbuiltins\ngetattr\n(tR.",
        b"cnumpy\nload\n(tR.",
        b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
    ],
)
def test_what_a_pickle_may_not_name(tmp_path, code):
    (tmp_path / "a.pkl").write_bytes(code)
    with pytest.raises(UnsafePickleError, match="is not read"):
        read_properties(tmp_path / "a.pkl")


def test_no_module_of_ours_unpickles_by_itself():
    """``pickle.load`` and ``weights_only=False`` stand where a user has asked for it, and nowhere else."""
    root = Path(__file__).parents[2]
    allowed = {"nnssl/properties.py", "nnssl/weights/unpickle.py", "nnssl/weights/load.py"}
    allowed |= {"trainers/inspection.py"}  # bytes in memory that nnU-Net has written at this very moment
    found = set()
    for folder in ("nnssl", "pretrain", "trainers", "experiments"):
        for file in (root / folder).rglob("*.py"):
            if re.search(r"pickle\.loads?\(|weights_only=False|np\.load\(.*allow_pickle=True", file.read_text("utf-8")):
                found.add(str(file.resolve().relative_to(root)))
    assert found <= allowed, found - allowed


# ---- plans -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization_schemes", ["NoSuchNormalization"]),
        ("resampling_fn_data", "no_such_function"),
        ("resampling_fn_data_kwargs", {"order": 3, "nonsense": 1}),
        ("preprocessor_name", "NoSuchPreprocessor"),
        ("image_reader_writer", "NoSuchReader"),
    ],
)
def test_plans_that_can_preprocess_nothing_are_blamed_themselves(free, field, value):
    for file in free.iterdir():
        file.unlink()
    file = free.parents[1] / "Dataset901_Tiny" / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    (plans if field in plans else plans["configurations"]["3d_fullres"])[field] = value
    file.write_text(json.dumps(plans))
    with pytest.raises(NnsslError, match="Plans 'nnUNetPlans' of Dataset901_Tiny.*cannot preprocess any image") as told:
        prepare()
    assert "\n" not in str(told.value) and "case_0" not in str(told.value)
