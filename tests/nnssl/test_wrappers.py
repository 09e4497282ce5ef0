"""nnU-Net's network in files of others: where it is found, what is told, and what is refused."""

import argparse
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict
from nnssl.plans import Plan
from nnssl.weights import apply, build_payload, convert, describe, load, save
from nnssl.weights.cli import convert_main, info_main


@pytest.fixture(params=["plain", "resenc"])
def plan(request, tiny_plans, tiny_dataset_json):
    return Plan.from_dicts(tiny_plans(3, request.param), "3d_fullres", tiny_dataset_json())


@pytest.fixture
def network(plan):
    return build_network(plan)


@pytest.fixture
def state(network):
    return dict(network.state_dict())


def behind(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def fills(path, plan, network, **where):
    """Whether the file fills a fresh network with the encoder and decoder of the given one."""
    target = build_network(plan)
    report = apply(target, load(path, **where), plan)
    here, there = canonical_state_dict(target), canonical_state_dict(network)
    parts = {p.part: p.percent for p in report.parts if p.part != "seg_layers"}
    same = all(torch.equal(here[n], there[n]) for n in here if "seg_layers" not in n)
    return same and set(parts.values()) == {100.0}


ENTRIES = ("state_dict", "model", "model_state_dict", "net", "network")


@pytest.mark.parametrize("entry", [None, *ENTRIES, "checkpoint.model"])
def test_each_entry_is_found_and_told(entry, plan, network, state, tmp_path):
    content = state
    for key in reversed((entry or "").split(".")) if entry else ():
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    torch.save(content, tmp_path / "w.pth")
    assert fills(tmp_path / "w.pth", plan, network)
    told = load(tmp_path / "w.pth").remarks
    assert told == [f"weights found under '{entry}'" if entry else "the whole file is the weights"]
    assert describe(tmp_path / "w.pth")["read_as"] == told


PREFIXES = ("module.", "model.", "backbone.", "net.", "_orig_mod.")


@pytest.mark.parametrize("pair", list(itertools.permutations(PREFIXES, 2)), ids="".join)
def test_each_two_prefixes_in_any_order(pair, plan, network, state, tmp_path):
    torch.save({"state_dict": behind("".join(pair), state)}, tmp_path / "w.pth")
    assert fills(tmp_path / "w.pth", plan, network)
    told = " ".join(load(tmp_path / "w.pth").remarks)
    for prefix in pair:
        assert "DDP or torch.compile" in told if prefix in ("module.", "_orig_mod.") else prefix in told


def test_wrappers_in_the_middle_of_names(plan, network, state, tmp_path):
    odd = {
        n.replace("encoder.", "encoder._orig_mod.", 1) if n.startswith("encoder.") else n: t for n, t in state.items()
    }
    torch.save({"network_weights": behind("module.", odd)}, tmp_path / "w.pth")
    assert fills(tmp_path / "w.pth", plan, network)


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "author": "someone"}])
def test_safetensors_with_and_without_metadata(metadata, plan, network, tmp_path):
    once = {f"model.{n}": t.contiguous() for n, t in canonical_state_dict(network).items()}
    save_file(once, tmp_path / "w.safetensors", metadata=metadata)
    assert fills(tmp_path / "w.safetensors", plan, network)
    assert load(tmp_path / "w.safetensors").remarks[0] == "the whole file is the weights"
    assert describe(tmp_path / "w.safetensors")["kind"] == "a network in a file of others"
    (tmp_path / "w.safetensors").rename(tmp_path / "renamed.pth")
    assert fills(tmp_path / "renamed.pth", plan, network), "told by its content, not by its name"


@pytest.mark.parametrize("names", ["encoder.", "", "model.encoder.", "model."])
def test_an_encoder_alone(names, plan, network, tmp_path):
    torch.save({"encoder": behind(names, network.encoder.state_dict())}, tmp_path / "w.pth")
    target = build_network(plan)
    report = apply(target, tmp_path / "w.pth", plan)
    assert report.part("encoder").percent == 100 and not report.part("decoder stage 0").loaded
    assert all(torch.equal(a, b) for a, b in zip(target.encoder.parameters(), network.encoder.parameters()))
    assert ("put before its names" in " ".join(report.notes)) == ("encoder" not in names)


@pytest.mark.parametrize("inside", [False, True], ids=["entries", "names"])
def test_student_and_teacher_are_chosen_by_the_user(inside, plan, network, state, tmp_path, capsys):
    other = dict(build_network(plan).state_dict())
    if inside:
        content = {"state_dict": {**behind("student.", state), **behind("teacher.", other)}}
    else:
        content = {"student": state, "teacher": other}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(NnsslError, match="student.*teacher.*Choose one, for example --(key|prefix) student"):
        load(tmp_path / "w.pth")
    assert fills(tmp_path / "w.pth", plan, network, key="student")
    assert not fills(tmp_path / "w.pth", plan, network, key="teacher")
    if inside:
        assert fills(tmp_path / "w.pth", plan, network, prefix="student")
    with pytest.raises(NnsslError, match="no such entry|more than once"):
        load(tmp_path / "w.pth", key="pupil")
    file, out = str(tmp_path / "w.pth"), str(tmp_path / "o.pth")
    assert convert_main([file, out, "--to", "nnunet"]) == 1
    assert "Choose one" in capsys.readouterr().err
    assert convert_main([file, out, "--to", "nnunet", "--key", "student"]) == 0
    assert "student" in capsys.readouterr().out
    assert all(torch.equal(torch.load(out)["network_weights"][n], t) for n, t in state.items())


def test_ema_beside_nnunets_own_entry(plan, network, state, tmp_path):
    ema = dict(build_network(plan).state_dict())
    torch.save({"network_weights": state, "ema": ema}, tmp_path / "w.pth")
    assert fills(tmp_path / "w.pth", plan, network), "where nnU-Net itself would look"
    assert not fills(tmp_path / "w.pth", plan, network, key="ema")


def test_what_else_a_module_holds_is_left_out_and_told(plan, network, state, tmp_path):
    torch.save({"state_dict": {**behind("net.", state), "projector.0.weight": torch.ones(3, 3)}}, tmp_path / "w.pth")
    assert fills(tmp_path / "w.pth", plan, network)
    assert load(tmp_path / "w.pth").remarks[-1] == "1 other names left out, for example 'projector.0.weight'"


def test_commands_tell_what_was_stripped(state, tmp_path, capsys):
    torch.save(
        {"state_dict": behind("model.", state), "epoch": 99, "global_step": np.int64(25000)}, tmp_path / "w.ckpt"
    )
    assert info_main([str(tmp_path / "w.ckpt")]) == 0
    out = capsys.readouterr().out
    assert f"'model.' stripped from {len(state)} names" in out and "99 epochs, 25000 steps" in out
    assert info_main([str(tmp_path / "w.ckpt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["read_as"][0] == "weights found under 'state_dict'"
    assert convert_main([str(tmp_path / "w.ckpt"), str(tmp_path / "w.safetensors")]) == 0
    assert f"'model.' stripped from {len(state)} names" in capsys.readouterr().out


# ---- nnU-Net v1 --------------------------------------------------------------------------------------------------


class V1Block(nn.Module):
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, 3, stride, 1)
        self.instnorm = nn.InstanceNorm3d(c_out, eps=1e-5, affine=True)
        self.lrelu = nn.LeakyReLU(1e-2)

    def forward(self, x):
        return self.lrelu(self.instnorm(self.conv(x)))


class V1Stack(nn.Module):
    def __init__(self, c_in, c_out, n, stride=1):
        super().__init__()
        self.blocks = nn.Sequential(
            *(V1Block(c_in if i == 0 else c_out, c_out, stride if i == 0 else 1) for i in range(n))
        )

    def forward(self, x):
        return self.blocks(x)


class V1Net(nn.Module):
    """``Generic_UNet`` of nnU-Net v1, written from its description: strided convolutions down, transposed ones up."""

    def __init__(self, features=(4, 8, 16), classes=3):
        super().__init__()
        down = [V1Stack(1, features[0], 2), V1Stack(features[0], features[1], 2, 2)]
        bottom = nn.Sequential(V1Stack(features[1], features[2], 1, 2), V1Stack(features[2], features[2], 1))
        self.conv_blocks_context = nn.ModuleList([*down, bottom])
        wide = list(zip(features[::-1], features[::-1][1:]))
        self.tu = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, 2, bias=False) for a, b in wide)
        self.conv_blocks_localization = nn.ModuleList(
            nn.Sequential(V1Stack(2 * b, b, 1), V1Stack(b, b, 1)) for _, b in wide
        )
        self.seg_outputs = nn.ModuleList(nn.Conv3d(b, classes, 1, bias=False) for _, b in wide)

    def forward(self, x):
        skips = []
        for stage in self.conv_blocks_context:
            x = stage(x)
            skips.append(x)
        for up, stage, skip in zip(self.tu, self.conv_blocks_localization, skips[-2::-1]):
            x = stage(torch.cat((up(x), skip), 1))
        return self.seg_outputs[-1](x)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_files_of_version_1_compute_the_same(prefix, tiny_plans, tiny_dataset_json, tmp_path):
    plan = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    old, x = V1Net().eval(), torch.randn(1, 1, 8, 16, 12)
    content = {"epoch": 1000, "state_dict": behind(prefix, old.state_dict()), "optimizer_state_dict": None}
    content |= {"plot_stuff": ([np.float32(1)], [np.float64(2)]), "best_stuff": (np.zeros(3), None, 4)}
    torch.save(content, tmp_path / "model_final.model")
    loaded = load(tmp_path / "model_final.model")
    assert loaded.remarks[-1] == "names of nnU-Net v1 translated"
    new = build_network(plan).eval()
    new.decoder.deep_supervision = False
    report = apply(new, loaded, plan)
    assert {p.percent for p in report.parts if p.part != "seg_layers"} == {100.0}
    with torch.no_grad():
        new.decoder.seg_layers[-1].weight.copy_(loaded.weights["decoder.seg_layers.1.weight"])
        new.decoder.seg_layers[-1].bias.zero_()
        torch.testing.assert_close(new(x), old(x))
    convert(tmp_path / "model_final.model", tmp_path / "v2.pth", "nnunet")
    assert torch.load(tmp_path / "v2.pth")["network_weights"].keys() == new.state_dict().keys()


# ---- other networks ----------------------------------------------------------------------------------------------

OTHERS = {
    "SwinUNETR": ["swinViT.patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight"],
    "UNETR": ["vit.patch_embedding.cls_token", "encoder1.layer.conv1.conv.weight"],
    "MedNeXt": ["stem.weight", "enc_block_0.0.conv1.weight", "dec_block_3.0.conv1.weight"],
    "STU-Net": ["conv_blocks_context.0.0.conv1.weight", "seg_outputs.0.weight"],
    "SuPreM": ["module.backbone.down_tr64.ops.0.conv1.weight"],
    "vision transformer": ["blocks.0.attn.qkv.weight", "patch_embed.proj.weight"],
    "ConvNeXt": ["stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.norm.weight", "stem.0.weight"],
    "Swin transformer": ["backbone.stages.0.blocks.0.attn.w_msa.qkv.weight", "backbone.stages.0.blocks.0.norm1.weight"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_network_is_refused_as_that(name, tmp_path, capsys):
    torch.save({"state_dict": {n: torch.ones(2, 2) for n in OTHERS[name]}}, tmp_path / "w.pth")
    with pytest.raises(NnsslError, match=f"another network .*0 of {len(OTHERS[name])} names .*look like .*{name}"):
        load(tmp_path / "w.pth")
    assert convert_main([str(tmp_path / "w.pth"), str(tmp_path / "o.pth"), "--to", "nnssl"]) == 1
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "o.pth").exists()
    assert info_main([str(tmp_path / "w.pth")]) == 0 and name in capsys.readouterr().out


def test_a_mask_token_alone_makes_no_network_of_nnunets(tmp_path):
    torch.save({n: torch.ones(2) for n in (*OTHERS["vision transformer"], "mask_token")}, tmp_path / "w.pth")
    with pytest.raises(NnsslError, match="another network: 1 of 3 names .*look like a vision transformer"):
        load(tmp_path / "w.pth")


def test_a_key_that_contradicts_the_names_is_refused_with_the_way_out(plan, network, tmp_path, capsys):
    payload = build_payload(
        network, plan, method="mae", config={}, crop_size=(8, 8, 8), pretrained_parts={"encoder": True}, data={}
    )
    adaptation = {**payload["nnssl_adaptation_plan"], "key_to_encoder": "backbone.encoder.stages"}
    weights = {f"model.{n}": t for n, t in payload["network_weights"].items() if n.startswith("encoder.")}
    save(tmp_path / "w.pth", {"network_weights": weights, "nnssl_adaptation_plan": adaptation, "citations": []})
    for form in ("nnssl", "upstream", "nnunet"):
        assert convert_main([str(tmp_path / "w.pth"), str(tmp_path / "o.pth"), "--to", form]) == 1
        error = capsys.readouterr().err
        assert "under 'backbone.encoder'" in error and "--prefix model." in error and not (tmp_path / "o.pth").exists()
    convert(tmp_path / "w.pth", tmp_path / "o.pth", "nnssl", prefix="model.")
    assert apply(build_network(plan), tmp_path / "o.pth", plan).part("encoder").percent == 100


def test_nothing_is_written_where_a_promised_part_is_empty(plan, network, tmp_path, capsys):
    payload = build_payload(
        network, plan, method="mae", config={}, crop_size=(8, 8, 8), data={},
        pretrained_parts={"encoder": True, "decoder_stages": [0, 1]},
    )  # fmt: skip
    kept = {
        n: t
        for n, t in payload["network_weights"].items()
        if not n.startswith(("decoder.stages.1", "decoder.transpconvs.1"))
    }
    save(tmp_path / "w.pth", {**payload, "network_weights": kept})
    for target in ("o.pth", "o.safetensors"):
        arguments = [str(tmp_path / "w.pth"), str(tmp_path / target)]
        assert convert_main([*arguments, *(["--to", "nnssl"] if target == "o.pth" else [])]) == 1
        assert "promises decoder stage 1 and holds no tensor of it" in capsys.readouterr().err
        assert not (tmp_path / target).exists()


# ---- --trust leads somewhere, or is not given --------------------------------------------------------------------


def test_trust_is_advised_only_where_it_leads_somewhere(state, tmp_path, capsys):
    options = argparse.Namespace(lr=0.1)
    torch.save({"state_dict": behind("model.", state), "hyper_parameters": options}, tmp_path / "good.ckpt")
    torch.save({"state_dict": {"swinViT.x.weight": torch.ones(2)}, "args": options}, tmp_path / "other.pth")
    torch.save({"args": options}, tmp_path / "none.pth")
    assert info_main([str(tmp_path / "good.ckpt")]) == 1
    advice = capsys.readouterr().err
    assert "argparse.Namespace" in advice
    command = advice.split("nnssl_convert ")[1].split()
    command[1] = str(tmp_path / "safe.pth")
    assert convert_main(command) == 0 and (tmp_path / "safe.pth").exists()
    assert load(tmp_path / "safe.pth").weights.keys() == state.keys()
    capsys.readouterr()
    assert info_main([str(tmp_path / "other.pth")]) == 1
    error = capsys.readouterr().err
    assert "--trust" not in error and "SwinUNETR" in error
    assert info_main([str(tmp_path / "none.pth")]) == 1
    error = capsys.readouterr().err
    assert "--trust" not in error and "holds no weights" in error


def test_classes_of_missing_packages_do_not_stop_a_trusted_file(state, tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("gone_package")
    module.Config = type("Config", (), {"__module__": "gone_package"})
    monkeypatch.setitem(sys.modules, "gone_package", module)
    torch.save({"model": state, "cfg": module.Config()}, tmp_path / "w.pth")
    monkeypatch.delitem(sys.modules, "gone_package")
    with pytest.raises(NnsslError, match=r"gone_package.Config.*--trust"):
        load(tmp_path / "w.pth")
    assert load(tmp_path / "w.pth", trusted=True).weights.keys() == state.keys()


def test_looking_into_an_unsafe_file_runs_nothing(state, tmp_path):
    class Evil:
        def __reduce__(self):
            import os

            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"model": state, "x": Evil(), "y": [Evil()]}, tmp_path / "evil.pth")
    with pytest.raises(NnsslError, match="mkdir"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()
