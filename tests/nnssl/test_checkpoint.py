import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.weights import Checkpoint, build_payload, fingerprint_names, load, save
from nnssl.weights.save import plain

STEM = "encoder.stem.convs.0.conv.weight"


@pytest.fixture
def plan(tiny_plans, tiny_dataset_json):
    return Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())


@dataclass(frozen=True)
class Config:
    lr: float = 1e-3
    levels: tuple = (0, 1)
    preset: str = "nnunet"


def _payload(plan, network=None, **changes):
    arguments = {
        "method": "macl",
        "config": Config(),
        "crop_size": (8, 16, 8),
        "pretrained_parts": {"encoder": True, "decoder_stages": [1, 0]},
        "data": fingerprint_names(["case_a", "case_b"]),
        "citations": ["Someone et al. (2024)."],
    }
    arguments.update(changes)
    return build_payload(network or build_network(plan), plan, **arguments)


def test_round_trip_with_weights_only(plan, tmp_path):
    network = build_network(plan)
    save(tmp_path / "c.pth", _payload(plan, network, training={"step": 3, "rng": torch.get_rng_state()}, epoch=2))
    raw = torch.load(tmp_path / "c.pth", weights_only=True)
    assert list(raw) == ["network_weights", "nnssl_adaptation_plan", "citations", "nnssl", "nnssl_training"]
    checkpoint = load(tmp_path / "c.pth")
    assert checkpoint.weights.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, checkpoint.weights[name]) for name, tensor in network.state_dict().items())
    assert (checkpoint.origin, checkpoint.method) == ("nnssl", "macl")
    assert checkpoint.pretrained_parts == {"encoder": True, "decoder_stages": [0, 1]}
    assert checkpoint.training["step"] == 3
    assert torch.equal(checkpoint.training["rng"], torch.get_rng_state())
    about = checkpoint.nnssl
    assert about["schema"] == 2
    assert about["config"] == {"lr": 1e-3, "levels": (0, 1), "preset": "nnunet"}
    assert about["plan"]["architecture_hash"] == plan.architecture_hash
    assert (about["patch_size"], about["plan"]["patch_size"]) == ([8, 16, 8], [16, 24, 16])
    assert (about["channels"], about["normalization_schemes"]) == (["MR"], ["ZScoreNormalization"])
    assert about["data"]["cases"] == 2
    assert about["epoch"] == 2
    assert {"nnssl", "nnunetv2", "torch", "python"} <= about["versions"].keys()


def test_aliases_cost_nothing_on_the_disk(plan, tmp_path):
    network = build_network(plan)
    save(tmp_path / "c.pth", {"network_weights": _payload(plan, network)["network_weights"]})
    numbers = sum(p.numel() for p in network.parameters())
    assert (tmp_path / "c.pth").stat().st_size < 1.1 * 4 * numbers + 400 * len(network.state_dict())


def test_no_case_name_leaves(plan, tmp_path):
    save(tmp_path / "c.pth", _payload(plan, data=fingerprint_names(["patient_0815_smith"])))
    assert b"patient_0815" not in (tmp_path / "c.pth").read_bytes()


def test_fingerprint_ignores_order_and_repeats_but_not_content():
    a = fingerprint_names(["x", "y"])
    assert a == fingerprint_names(["y", "x", "y"])
    assert a["cases"] == 2
    assert a["sha256"] != fingerprint_names(["x", "z"])["sha256"]
    assert a["sha256"] != fingerprint_names(["xy"])["sha256"]


def test_plain_values():
    value = {"a": np.float32(0.5), "b": [np.int64(3), (np.bool_(True),)], "c": Path("x/y"), "d": {3, 1}}
    got = plain(value)
    assert got == {"a": 0.5, "b": [3, (True,)], "c": "x/y", "d": [1, 3]}
    assert [type(v) for v in (got["a"], got["b"][0], got["b"][1][0])] == [float, int, bool]


@pytest.mark.parametrize("bad", [np.zeros(3), object(), lambda: 0, torch.nn.ReLU()])
def test_what_could_not_be_read_back_is_refused_before_writing(bad, tmp_path):
    save(tmp_path / "c.pth", {"network_weights": {STEM: torch.ones(1)}})
    before = (tmp_path / "c.pth").read_bytes()
    with pytest.raises(TypeError, match=r"checkpoint\['nnssl'\]\['deep'\]\[1\] holds a "):
        save(tmp_path / "c.pth", {"nnssl": {"deep": [0, bad]}})
    assert (tmp_path / "c.pth").read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pth"]


def test_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    save(tmp_path / "c.pth", {"network_weights": {STEM: torch.ones(1)}})
    real = torch.save

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 2000

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    monkeypatch.setattr(torch, "save", lambda content, file: real(content, Full(file)))
    with pytest.raises((OSError, RuntimeError)) as caught:
        save(tmp_path / "c.pth", {"network_weights": {STEM: torch.zeros(100_000)}})
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert any(isinstance(e, OSError) and e.errno == 28 for e in chain)
    monkeypatch.undo()
    assert load(tmp_path / "c.pth").weights[STEM].item() == 1
    assert os.listdir(tmp_path) == ["c.pth"]


def test_sync_failing_with_a_full_disk_is_an_error_too(tmp_path, monkeypatch):
    save(tmp_path / "c.pth", {"network_weights": {STEM: torch.ones(1)}})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "c.pth", {"network_weights": {STEM: torch.zeros(1)}})
    assert load(tmp_path / "c.pth").weights[STEM].item() == 1
    assert os.listdir(tmp_path) == ["c.pth"]


def test_kill_during_a_save_leaves_the_old_file_whole(tmp_path):
    save(tmp_path / "c.pth", {"network_weights": {STEM: torch.ones(1)}})
    script = """
        import os, sys, torch
        from nnssl.weights import save
        real = os.fsync
        def fsync(handle):  # everything is written, nothing renamed: the worst moment
            real(handle)
            print("now", flush=True)
            sys.stdin.read()
        os.fsync = fsync
        save(sys.argv[1], {"network_weights": {"encoder.stem.convs.0.conv.weight": torch.zeros(100_000)}})
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "c.pth")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "now\n"
    assert len(os.listdir(tmp_path)) == 2
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert load(tmp_path / "c.pth").weights[STEM].item() == 1
    leftover = next(p for p in tmp_path.iterdir() if p.name != "c.pth")
    assert leftover.name.startswith(".c.pth.")
    os.utime(leftover, (0, 0))
    save(tmp_path / "c.pth", {"network_weights": {STEM: torch.full((1,), 2.0)}})
    assert os.listdir(tmp_path) == ["c.pth"]
    assert load(tmp_path / "c.pth").weights[STEM].item() == 2


def test_schemas_up_to_ours_are_read(tmp_path):
    path = tmp_path / "schema.pth"
    for schema in (1, 2):
        save(path, {"network_weights": {STEM: torch.ones(1)}, "nnssl": {"schema": schema}})
        assert load(path).nnssl["schema"] == schema
    save(path, {"network_weights": {STEM: torch.ones(1)}, "nnssl": {"schema": 3}})
    with pytest.raises(NnsslError, match=r"of a newer nnssl \(schema 3\); this version reads up to 2: update"):
        load(path)


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.pth"
    save(path, {"network_weights": {STEM: torch.randn(1000)}, "nnssl": {"schema": 1}})
    return path.read_bytes()


def test_cut_off_file(whole, tmp_path):
    cut = tmp_path / "cut.pth"
    for length in {*range(1, len(whole), 97), *range(len(whole) - 60, len(whole))}:
        cut.write_bytes(whole[:length])
        with pytest.raises(NnsslError, match=r"cut.pth is (damaged or was cut off|not a checkpoint .*) \("):
            load(cut)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pth", b"", "empty.pth is empty: its writing was interrupted"),
        ("text.pth", b"hello world\n", "text.pth is not a checkpoint"),
        ("image.pth", b"\x1f\x8b" + bytes(500), "image.pth is not a checkpoint"),
    ],
)
def test_other_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NnsslError, match=message):
        load(tmp_path / name)


def test_missing_file_folder_and_foreign_content(tmp_path):
    with pytest.raises(NnsslError, match="There is no checkpoint"):
        load(tmp_path / "absent.pth")
    with pytest.raises(NnsslError, match="There is no checkpoint"):
        load(tmp_path)
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(NnsslError, match="holds no weights.*It holds: state_dict, epoch"):
        load(tmp_path / "a.pth")
    torch.save([1], tmp_path / "b.pth")
    with pytest.raises(NnsslError, match="holds no weights but a list"):
        load(tmp_path / "b.pth")
    torch.save({"network_weights": {STEM: 3}}, tmp_path / "c.pth")
    with pytest.raises(NnsslError, match="not a dict of tensors"):
        load(tmp_path / "c.pth")


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Harmless:
    pass


def test_unsafe_pickle_is_not_run_and_the_global_is_named(tmp_path):
    torch.save({"network_weights": {STEM: torch.ones(1)}, "x": _Evil(tmp_path / "pwned")}, tmp_path / "evil.pth")
    with pytest.raises(NnsslError, match=r"asks to run '\w+\.mkdir'.*weights_only"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()
    torch.save({"network_weights": {STEM: torch.ones(1)}, "x": Harmless()}, tmp_path / "class.pth")
    with pytest.raises(NnsslError, match=r"'[\w.]*Harmless'"):
        load(tmp_path / "class.pth")


def test_numpy_scalars_as_in_nnunets_own_files_are_read(tmp_path):
    content = {
        "network_weights": {STEM: torch.ones(1)},
        "_best_ema": np.float64(0.5),
        "logging": {"losses": [np.float32(1.0), np.float16(2.0)], "epoch": np.int64(3)},
        "trainer_name": "nnUNetTrainer",
    }
    torch.save(content, tmp_path / "c.pth")
    checkpoint = load(tmp_path / "c.pth")
    assert checkpoint.content["_best_ema"] == 0.5
    assert (checkpoint.origin, checkpoint.method) == ("nnU-Net", "nnUNetTrainer")
    assert checkpoint.pretrained_parts is None
    with pytest.raises(Exception, match="scalar|Weights only"):
        torch.load(tmp_path / "c.pth", weights_only=True)  # the permission ends with our call


def test_scalars_of_the_other_numpy_generation_are_read(tmp_path):
    torch.save({"network_weights": {STEM: torch.ones(1)}, "_best_ema": np.float64(0.5)}, tmp_path / "c.pth")
    data = (tmp_path / "c.pth").read_bytes()
    here, there = b"numpy._core.multiarray", b"numpy.core.multiarray"
    if here not in data:
        pytest.skip("written by numpy 1")
    import zipfile

    with zipfile.ZipFile(tmp_path / "c.pth") as source, zipfile.ZipFile(tmp_path / "old.pth", "w") as target:
        for item in source.infolist():
            target.writestr(item.filename, source.read(item).replace(here, there))
    assert load(tmp_path / "old.pth").content["_best_ema"] == 0.5


def test_checkpoint_of_the_stock_trainer_is_read(tiny_preprocessed, tmp_path):
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    folder = tiny_preprocessed()
    plans = {**load_json(str(folder / "nnUNetPlans.json")), "continue_training": False}
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, load_json(str(folder / "dataset.json")), torch.device("cpu"))
    trainer.initialize()
    trainer._best_ema = np.float64(0.3)
    trainer.logger.log("train_losses", np.float32(0.1), 0)
    trainer.save_checkpoint(str(tmp_path / "stock.pth"))
    checkpoint = load(tmp_path / "stock.pth")
    assert checkpoint.origin == "nnU-Net"
    assert checkpoint.weights.keys() == trainer.network.state_dict().keys()


@pytest.mark.parametrize("arch", ["plain", "resenc"])
@pytest.mark.parametrize("dim", [2, 3])
def test_adaptation_plan_lets_upstreams_reader_rebuild_and_load(arch, dim, tiny_plans, tiny_dataset_json, tmp_path):
    """The steps of nnU-Net's development branch (like_nnssl, PretrainedTrainer), done by hand."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    configuration = "2d" if dim == 2 else "3d_fullres"
    plan = Plan.from_dicts(tiny_plans(dim, arch), configuration, tiny_dataset_json())
    network = build_network(plan)
    save(tmp_path / "c.pth", _payload(plan, network, crop_size=(8, 16, 8)[:dim]))
    content = torch.load(tmp_path / "c.pth", weights_only=True, map_location="cpu")
    adaptation, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    architecture = adaptation["architecture_plans"]
    rebuilt = get_network_from_plans(
        f"dynamic_network_architectures.architectures.unet.{architecture['arch_class_name']}",
        architecture["arch_kwargs"],
        architecture["arch_kwargs_requiring_import"],
        adaptation["pretrain_num_input_channels"],
        5,
        deep_supervision=False,
    )
    for key in (adaptation["key_to_encoder"], adaptation["key_to_stem"]):
        part = {k[len(key) + 1 :]: v for k, v in weights.items() if k.startswith(key + ".")}
        rebuilt.get_submodule(key).load_state_dict(part)
    assert all(f"{key}.weight" in weights for key in adaptation["keys_to_in_proj"])
    assert adaptation["key_to_stem"] == rebuilt.key_to_stem
    assert adaptation["key_to_encoder"] == rebuilt.key_to_encoder
    x = torch.randn(1, 1, *(8, 16, 12)[:dim])
    assert all(torch.equal(a, b) for a, b in zip(rebuilt.encoder(x), network.encoder(x)))
    config = adaptation["pretrain_plan"]["configurations"][configuration]
    assert config["patch_size"] == [8, 16, 8][:dim]
    assert adaptation["recommended_downstream_patchsize"] == list(plan.patch_size)
    assert adaptation["key_to_lpe"] is None
    assert sorted(content["citations"], key=lambda c: c.get("type", ""))[0]["type"] == "Architecture"
    assert content["citations"][0] == {
        "type": "Pretraining Method",
        "name": "macl",
        "apa_citations": ["Someone et al. (2024)."],
    }


def test_adaptation_plan_has_exactly_the_fields_that_upstreams_dataclasses_take(tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(tiny_plans(3, "resenc"), "3d_fullres", tiny_dataset_json())
    adaptation = _payload(plan)["nnssl_adaptation_plan"]
    assert set(adaptation["architecture_plans"]["arch_kwargs"]) == {
        *("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "n_blocks_per_stage"),
        *("n_conv_per_stage_decoder", "conv_bias", "norm_op", "norm_op_kwargs", "dropout_op", "dropout_op_kwargs"),
        *("nonlin", "nonlin_kwargs"),
    }
    pretrain = adaptation["pretrain_plan"]
    assert set(pretrain) == {
        *("dataset_name", "plans_name", "original_median_spacing_after_transp", "image_reader_writer"),
        *("transpose_forward", "transpose_backward", "configurations", "experiment_planner_used"),
    }
    assert set(pretrain["configurations"]["3d_fullres"]) == {
        *("data_identifier", "preprocessor_name", "spacing_style", "normalization_schemes", "use_mask_for_norm"),
        *("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_mask", "resampling_fn_mask_kwargs"),
        *("spacing", "patch_size"),
    }


def test_a_payload_in_memory_is_a_checkpoint(plan):
    checkpoint = Checkpoint(Path("x"), _payload(plan))
    assert checkpoint.method == "macl"
    assert checkpoint.adaptation_plan["key_to_encoder"] == "encoder.stages"
