import os
import stat

import pytest

from nnssl.errors import NnsslError
from nnssl.files import read_json, sha256_of, write_atomic, write_json
from nnssl.paths import decode_path, encode_path, preprocessed_folder, raw_folder, results_folder


@pytest.mark.parametrize(
    ("variable", "function"),
    [
        ("nnUNet_raw", raw_folder),
        ("nnUNet_preprocessed", preprocessed_folder),
        ("nnUNet_results", results_folder),
    ],
)
def test_unset_variable_is_named(variable, function, nnunet_env, monkeypatch):
    assert str(function()) == os.environ[variable]
    monkeypatch.delenv(variable)
    with pytest.raises(NnsslError, match=f"export {variable}="):
        function()


def test_encoded_path_moves_with_the_folders(nnunet_env, monkeypatch, tmp_path):
    text = encode_path(nnunet_env.results / "Dataset501_X" / "run" / "checkpoint_final.pth")
    assert text == "nnUNet_results:Dataset501_X/run/checkpoint_final.pth"
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    assert decode_path(text) == tmp_path / "elsewhere" / "Dataset501_X" / "run" / "checkpoint_final.pth"


def test_encode_through_a_symlink_and_from_a_relative_path(nnunet_env, monkeypatch, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(nnunet_env.results)
    assert encode_path(link / "a.pth") == "nnUNet_results:a.pth"
    monkeypatch.chdir(nnunet_env.raw)
    assert encode_path("b.nii.gz") == "nnUNet_raw:b.nii.gz"


def test_the_innermost_folder_wins(nnunet_env, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(nnunet_env.raw / "inner"))
    assert encode_path(nnunet_env.raw / "inner" / "x") == "nnUNet_preprocessed:x"
    assert encode_path(nnunet_env.raw / "x") == "nnUNet_raw:x"


def test_paths_outside_stay_absolute(nnunet_env, tmp_path):
    outside = tmp_path / "weights" / "x.pth"
    assert encode_path(outside) == str(outside)
    assert decode_path(str(outside)) == outside


@pytest.mark.parametrize("text", ["nnUNet_results:../../secret", "nnUNet_results:/etc/x", "nnUNet_raw:a/../../b"])
def test_stored_paths_cannot_leave_the_folder(text, nnunet_env):
    with pytest.raises(NnsslError, match="outside"):
        decode_path(text)


def test_atomic_write_replaces_and_keeps_permissions(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    os.chmod(path, 0o640)
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_atomic_write_after_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_without_overwrite_an_existing_file_is_refused_also_one_that_appears_meanwhile(tmp_path):
    path = tmp_path / "a.bin"

    def meanwhile(file):
        file.write(b"mine")
        path.write_bytes(b"theirs")

    with pytest.raises(FileExistsError):
        write_atomic(path, meanwhile, overwrite=False)
    assert path.read_bytes() == b"theirs"
    with pytest.raises(FileExistsError):
        write_atomic(path, lambda file: file.write(b"x"), overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_rubbish_of_a_killed_writer_is_removed_later_and_a_live_one_is_left(tmp_path):
    dead, alive, other = (tmp_path / n for n in (".a.bin.dead.tmp", ".a.bin.alive.tmp", ".b.bin.dead.tmp"))
    for file in (dead, alive, other):
        file.write_bytes(b"x")
    for file in (dead, other):
        os.utime(file, (0, 0))
    write_atomic(tmp_path / "a.bin", lambda file: file.write(b"new"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.bin", alive.name, other.name])


def test_read_json_names_the_file(tmp_path):
    for name, content in {"list.json": "[1]", "cut.json": '{"a": '}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(NnsslError, match=name):
            read_json(tmp_path / name)
    with pytest.raises(NnsslError, match="absent.json does not exist"):
        read_json(tmp_path / "absent.json")


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
