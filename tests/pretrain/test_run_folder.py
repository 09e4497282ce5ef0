import subprocess
import sys

import pytest

from nnssl.errors import NnsslError
from nnssl.files import write_json
from nnssl.pretrain.engine.folder import RunFolder, differences

WHO = {"method": "macl", "options": {"lr": 0.1, "k": 2}, "seed": 0}


def test_differences_name_the_nested_key():
    assert differences(WHO, {"method": "macl", "options": {"lr": 0.2, "k": 2}, "seed": 0}) == [
        "options.lr: 0.1 in the folder, 0.2 now"
    ]


def start(folder, **files):
    write_json(folder.config_file, {"identity": WHO})
    for name in files:
        (folder.path / f"checkpoint_{name}.pth").write_bytes(b"x")


def test_a_new_folder_is_admitted_and_made(tmp_path):
    with RunFolder(tmp_path / "a" / "b") as folder:
        assert folder.check_resume(WHO, continue_run=False) is False
        start(folder)
        assert (
            folder.check_resume(WHO, continue_run=False) is False
        )  # nothing was saved yet: starting anew loses nothing
        other = {**WHO, "options": {"lr": 0.1, "k": 1}}
        assert folder.check_resume(other, continue_run=False) is False
        with pytest.raises(NnsslError, match="options.k: 2 in the folder, 1 now"):
            folder.check_resume(other, continue_run=True)


def test_unfinished_finished_and_other_runs(tmp_path):
    with RunFolder(tmp_path) as folder:
        start(folder, latest=1)
        with pytest.raises(NnsslError, match="unfinished. Continue it with --c"):
            folder.check_resume(WHO, continue_run=False)
        assert folder.check_resume(WHO, continue_run=True) is True
        with pytest.raises(NnsslError, match="seed: 0 in the folder, 1 now"):
            folder.check_resume({**WHO, "seed": 1}, continue_run=True)
        with pytest.raises(NnsslError, match="--name"):
            folder.check_resume({**WHO, "seed": 1}, continue_run=False)
        start(folder, final=1)
        with pytest.raises(NnsslError, match="finished"):
            folder.check_resume(WHO, continue_run=False)
        assert folder.check_resume(WHO, continue_run=True) is True


def test_a_checkpoint_without_config_or_a_broken_config_is_refused(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.latest.write_bytes(b"x")
        with pytest.raises(NnsslError, match="no config.json"):
            folder.check_resume(WHO, continue_run=False)
        folder.config_file.write_text("{")
        with pytest.raises(NnsslError, match="cannot be read"):
            folder.check_resume(WHO, continue_run=False)


def test_a_second_process_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from nnssl.pretrain.engine.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])):\n    print('in', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline().strip() == b"in"
        with pytest.raises(NnsslError, match=f"in use by another process .process {child.pid}"):
            RunFolder(tmp_path).__enter__()
    finally:
        child.kill()
        child.wait()
    with RunFolder(tmp_path):
        pass


def test_a_dry_run_makes_nothing(tmp_path):
    with RunFolder(tmp_path / "x", lock=False) as folder:
        assert folder.saved_config() is None
    assert not (tmp_path / "x").exists()
