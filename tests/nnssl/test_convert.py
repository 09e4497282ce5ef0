"""nnssl_convert and nnssl_info: formats in and out, exact round trips, what is refused, what is told."""

import json
import os
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from safetensors import safe_open

from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict
from nnssl.plans import Plan
from nnssl.weights import FORMATS, apply, build_payload, convert, describe, fingerprint_names, load, save
from nnssl.weights.architecture import architecture_of, build, preset
from nnssl.weights.cli import convert_main, info_main
from nnssl.weights.formats import one_name_each
from nnssl.weights.info import as_text

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2))


@pytest.fixture(params=[("plain", 3), ("resenc", 3), ("resenc", 2)], ids=lambda p: f"{p[0]}{p[1]}d")
def plan(request, tiny_plans, tiny_dataset_json):
    arch, dim = request.param
    return Plan.from_dicts(
        tiny_plans(dim, arch, 2, strides=STRIDES), "2d" if dim == 2 else "3d_fullres", tiny_dataset_json(2)
    )


@pytest.fixture
def network(plan):
    network = build_network(plan)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


@pytest.fixture
def ours(plan, network, tmp_path):
    payload = build_payload(
        network,
        plan,
        method="macl",
        config={"lr": 1e-3, "levels": [0, 1]},
        crop_size=(8,) * plan.dim,
        pretrained_parts={"encoder": True, "decoder_stages": [0]},
        data=fingerprint_names(["secret_case"]),
        citations=["Someone et al. (2024)."],
        training={"step": 3},
    )
    save(tmp_path / "ours.pth", payload)
    return tmp_path / "ours.pth"


@pytest.fixture
def upstream(plan, network, tmp_path, ours):
    """As MIC-DKFZ's nnssl writes it, encoder only, and with a name of its own before the encoder's."""
    content = load(ours).content
    adaptation = json.loads(json.dumps(content["nnssl_adaptation_plan"]))
    adaptation.pop("architecture_kwargs")
    for key in ("key_to_encoder", "key_to_stem"):
        adaptation[key] = f"student.{adaptation[key]}"
    adaptation["keys_to_in_proj"] = [f"student.{k}" for k in adaptation["keys_to_in_proj"]]
    weights = {f"student.{n}": t for n, t in network.state_dict().items() if n.startswith("encoder.")}
    weights["teacher.encoder.x"] = torch.ones(2)
    torch.save(
        {
            "network_weights": weights,
            "nnssl_adaptation_plan": adaptation,
            "citations": content["citations"],
            "trainer_name": "BaseMAETrainer",
        },
        tmp_path / "upstream.pth",
    )
    return tmp_path / "upstream.pth"


@pytest.fixture
def stock(plan, network, tmp_path):
    """As nnU-Net's trainer writes it."""
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {},
        "_best_ema": np.float64(0.5),
        "current_epoch": 7,
        "init_args": {
            "plans": plan.plans,
            "configuration": plan.configuration,
            "fold": 0,
            "dataset_json": plan.dataset_json,
        },
        "trainer_name": "nnUNetTrainer",
    }
    torch.save(content, tmp_path / "stock.pth")
    return tmp_path / "stock.pth"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def text(value):
    return json.loads(json.dumps(value))


def test_safetensors_and_back_is_exact(ours, network, tmp_path):
    convert(ours, tmp_path / "w.safetensors", "safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert set(file.keys()) == set(canonical_state_dict(network))
        assert set(file.metadata()) == {"format", "nnssl", "nnssl_adaptation_plan", "citations"}
    convert(tmp_path / "w.safetensors", tmp_path / "back.pth", "nnssl")
    first, back = load(ours), load(tmp_path / "back.pth")
    assert same(back.weights, first.weights)
    assert all(text(back.content[k]) == text(first.content[k]) for k in ("nnssl", "nnssl_adaptation_plan", "citations"))
    assert back.training is None and set(back.content) == set(first.content) - {"nnssl_training"}
    assert b"secret" not in (tmp_path / "w.safetensors").read_bytes()


def test_safetensors_can_be_used_as_they_are(ours, plan, network, tmp_path):
    convert(ours, tmp_path / "w.safetensors", "safetensors")
    target = build_network(plan)
    report = apply(target, tmp_path / "w.safetensors", plan)
    assert report.part("encoder").percent == report.part("decoder stage 0").percent == 100
    assert not report.part("decoder stage 1").loaded, "the promise is kept in the header"
    assert same(target.encoder.state_dict(), network.encoder.state_dict())


def test_through_every_format_and_back(ours, tmp_path):
    convert(ours, tmp_path / "up.pth", "upstream")
    content = torch.load(tmp_path / "up.pth", weights_only=True)
    assert list(content) == ["network_weights", "nnssl_adaptation_plan", "citations"]
    assert load(tmp_path / "up.pth").origin == "nnssl-mic"
    convert(tmp_path / "up.pth", tmp_path / "again.pth", "nnssl")
    convert(tmp_path / "again.pth", tmp_path / "up2.pth", "upstream")
    second = torch.load(tmp_path / "up2.pth", weights_only=True)
    assert same(content["network_weights"], second["network_weights"])
    assert content["nnssl_adaptation_plan"] == second["nnssl_adaptation_plan"]
    assert same(load(tmp_path / "again.pth").weights, load(ours).weights)
    assert load(tmp_path / "again.pth").pretrained_parts == {"encoder": True, "decoder_stages": []}


def test_nnunet_takes_what_is_written_for_it(ours, plan, network, tmp_path):
    convert(ours, tmp_path / "w.safetensors", "safetensors")
    for i, source in enumerate((ours, tmp_path / "w.safetensors")):
        convert(source, tmp_path / f"{i}.pth", "nnunet")
        assert list(torch.load(tmp_path / f"{i}.pth", weights_only=True)) == ["network_weights"]
        target = build_network(plan, n_classes=9)
        with redirect_stdout(StringIO()):
            load_pretrained_weights(target, str(tmp_path / f"{i}.pth"))
        assert same(target.encoder.state_dict(), network.encoder.state_dict())


def test_upstreams_file_comes_in(upstream, plan, network, tmp_path):
    convert(upstream, tmp_path / "in.pth", "nnssl")
    checkpoint = load(tmp_path / "in.pth")
    assert (checkpoint.origin, checkpoint.method) == ("nnssl", "BaseMAETrainer")
    assert checkpoint.pretrained_parts == {"encoder": True, "decoder_stages": []}
    assert checkpoint.nnssl["converted_from"] == "nnssl-mic"
    assert checkpoint.adaptation_plan["key_to_encoder"] == "encoder.stages"
    assert not [n for n in checkpoint.weights if "student" in n or "teacher" in n]
    for source in (upstream, tmp_path / "in.pth"):
        target = build_network(plan)
        assert apply(target, source, plan).part("encoder").percent == 100
        assert same(target.encoder.state_dict(), network.encoder.state_dict())
    with pytest.raises(NnsslError, match="has no decoder stage 0, decoder stage 1, and -pretrained_weights asks for"):
        convert(upstream, tmp_path / "x.pth", "nnunet")
    convert(tmp_path / "in.pth", tmp_path / "out.pth", "upstream")
    assert load(tmp_path / "out.pth").origin == "nnssl-mic"


def test_nnunets_file_comes_in(stock, plan, network, tmp_path):
    convert(stock, tmp_path / "in.pth", "nnssl")
    checkpoint = load(tmp_path / "in.pth")
    assert checkpoint.pretrained_parts == {"encoder": True, "decoder_stages": [0, 1]}
    assert checkpoint.nnssl["plan"]["architecture_hash"] == plan.architecture_hash
    assert checkpoint.nnssl["channels"] == ["MR", "MR1"]
    assert same(checkpoint.weights, network.state_dict())
    assert [p.percent for p in apply(build_network(plan), checkpoint, plan).parts] == [100, 100, 100, 0]
    convert(stock, tmp_path / "enc.pth", "nnssl", parts="encoder")
    assert load(tmp_path / "enc.pth").pretrained_parts == {"encoder": True, "decoder_stages": []}
    convert(stock, tmp_path / "up.pth", "upstream")
    adaptation = load(tmp_path / "up.pth").adaptation_plan
    assert adaptation["pretrain_num_input_channels"] == 2 and adaptation["key_to_encoder"] == "encoder.stages"
    assert b"Dataset901" not in (tmp_path / "up.pth").read_bytes() or adaptation["pretrain_plan"]["dataset_name"]


def test_the_preset_that_upstream_names_without_arguments(tmp_path):
    """OpenMind's ResEnc-L, whose files name no arguments, has 956 names (448 of them the encoder's) in 409.6 MB."""
    name, arguments = preset("ResEncL")
    network = build(name, arguments, 1, 1)
    assert network.encoder.output_channels == [32, 64, 128, 256, 320, 320]
    assert len(network.state_dict()) == 956 and preset("PrimusM") is None
    assert sum(name.startswith("encoder.") for name in network.state_dict()) == 448
    assert 4 * sum(p.numel() for p in network.parameters()) == pytest.approx(409_579_442, rel=1e-3)
    # a file with its names and its encoder's first tensors is enough to see that they are found
    weights = {n: torch.zeros(1).expand(t.shape) for n, t in network.state_dict().items()}
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None},
        "key_to_encoder": "encoder.stages",
    }
    from nnssl.weights import Checkpoint
    from nnssl.weights.architecture import complete_aliases

    checkpoint = Checkpoint(tmp_path / "x.pth", {"network_weights": weights, "nnssl_adaptation_plan": plan})
    architecture = architecture_of(checkpoint)
    once = {n: t for n, t in weights.items() if n.startswith("encoder.") and ".all_modules." not in n}
    complete = complete_aliases(once, architecture, "x")
    assert {n for n in weights if "encoder" in n} == set(complete)


def test_another_network_than_described_is_refused(ours, tmp_path):
    content = dict(load(ours).content)
    content["network_weights"] = {
        n: t[:1]
        if n.endswith("stages.1.0.convs.0.conv.weight") or n.endswith("stages.1.blocks.0.conv1.conv.weight")
        else t
        for n, t in content["network_weights"].items()
    }
    save(tmp_path / "odd.pth", content)
    with pytest.raises(NnsslError, match=r"describes a \w+UNet in which 'encoder.stages.1"):
        convert(tmp_path / "odd.pth", tmp_path / "x.pth", "nnunet")
    assert not (tmp_path / "x.pth").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Harmless:
    pass


def test_unsafe_pickles_are_refused_and_trusted_on_request(ours, tmp_path, capsys):
    content = load(ours).content
    torch.save({**content, "x": Evil(tmp_path / "pwned")}, tmp_path / "evil.pth")
    out = str(tmp_path / "out.pth")
    assert convert_main([str(tmp_path / "evil.pth"), out, "--to", "nnssl"]) == 1
    error = capsys.readouterr().err
    assert (
        "mkdir' while it is being read" in error
        and f"nnssl_convert {tmp_path / 'evil.pth'} COPY.pth --to nnssl --trust" in error
    )
    assert info_main([str(tmp_path / "evil.pth")]) == 1
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out.pth").exists()
    torch.save({**content, "x": Harmless()}, tmp_path / "class.pth")
    assert convert_main([str(tmp_path / "class.pth"), out, "--to", "nnssl", "--trust"]) == 0
    assert same(load(out).weights, load(ours).weights)


def test_existing_files_and_wrong_names_are_refused(ours, tmp_path, capsys):
    taken = tmp_path / "taken.pth"
    taken.write_bytes(b"mine")
    for arguments, message in [
        ([str(ours), str(taken), "--to", "nnssl"], "exists already"),
        ([str(ours), str(ours), "--to", "nnssl", "--overwrite"], "exists already"),
        ([str(ours), str(tmp_path / "a.pth")], "--to is missing: nnssl, upstream"),
        ([str(ours), str(tmp_path / "a.pth"), "--to", "safetensors"], "ends in .safetensors"),
        ([str(ours), str(tmp_path / "a.safetensors"), "--to", "nnunet"], "ends in .safetensors"),
        ([str(tmp_path / "no.pth"), str(tmp_path / "a.pth"), "--to", "nnssl"], "There is no checkpoint"),
    ]:
        assert convert_main(arguments) == (2 if "is missing" in message else 1)
        captured = capsys.readouterr().err
        assert message in captured and "Traceback" not in captured
    assert taken.read_bytes() == b"mine"
    assert convert_main([str(ours), str(taken), "--to", "nnunet", "--overwrite"]) == 0
    assert convert_main([str(ours), str(tmp_path / "a.safetensors")]) == 0
    with pytest.raises(NnsslError, match="no format 'safetensor'. Did you mean 'safetensors'"):
        convert(ours, tmp_path / "b.pth", "safetensor")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:100])
    with pytest.raises(NnsslError, match="damaged or no safetensors file"):
        load(tmp_path / "cut.safetensors")


def test_a_bare_file_cannot_become_what_it_does_not_say(network, tmp_path):
    torch.save({"network_weights": network.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(NnsslError, match="no adaptation plan and no plans"):
        convert(tmp_path / "bare.pth", tmp_path / "x.pth", "upstream")
    convert(tmp_path / "bare.pth", tmp_path / "x.pth", "nnunet")  # the tensors themselves tell enough for every name
    assert same(load(tmp_path / "x.pth").weights, network.state_dict())
    convert(tmp_path / "bare.pth", tmp_path / "w.safetensors", "safetensors")
    assert load(tmp_path / "w.safetensors").weights.keys() == canonical_state_dict(network).keys()


def test_one_name_each_keeps_values_that_differ(network):
    state = network.state_dict()
    assert one_name_each(state).keys() == canonical_state_dict(network).keys()
    stale = {n: t.clone() for n, t in state.items()}
    name = next(n for n in stale if n.startswith("decoder.encoder.") and n.endswith("conv.weight"))
    stale[name] += 1
    assert name in one_name_each(stale)


# ------------------------------------------------------------------------------------------------------- info


def test_info_of_ours(ours, plan, network, capsys):
    assert info_main([str(ours), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["method"]) == ("pretraining of nnssl", "macl")
    told = found["network"]
    assert told["parameters"] == sum(p.numel() for p in network.parameters())
    assert (told["kind"], told["dimensions"], told["input_channels"]) == (plan.network_class, plan.dim, 2)
    assert told["features"] == list(plan.features) and told["finite"] is True
    assert told["tensors"] == len(canonical_state_dict(network)) and told["names"] == len(network.state_dict())
    assert found["pretrained_parts"] == {"encoder": True, "decoder_stages": [0]}
    assert found["patch_size"] == [8] * plan.dim and found["channels"] == ["MR", "MR1"]
    assert found["can_be_continued"] and found["upstream_can_read_it"]
    assert found["citations"][0] == "Someone et al. (2024)." and len(found["sha256"]) == 64
    assert info_main([str(ours)]) == 0
    out = capsys.readouterr().out
    for words in ("pretraining of nnssl", plan.network_class, "4, 8, 16", "Someone et al.", "decoder stages"):
        assert words in out


def test_info_of_others(stock, upstream, ours, plan, tmp_path):
    found = describe(stock)
    assert found["kind"] == "training of nnU-Net" and found["epoch"] == 7
    assert found["plan"]["configuration"] == plan.configuration and found["spacing"] == list(plan.spacing)
    found = describe(upstream)
    assert found["kind"] == "pretraining of MIC-DKFZ's nnssl" and found["method"] == "BaseMAETrainer"
    assert found["network"]["features"] == list(plan.features) and found["patch_size"] == [8] * plan.dim
    convert(ours, tmp_path / "w.safetensors", "safetensors")
    found = describe(tmp_path / "w.safetensors")
    assert found["method"] == "macl" and not found["can_be_continued"]
    content = {**torch.load(stock, weights_only=False), "nnssl_finetuning": {"trainer": "nnUNetTrainerPretrained"}}
    torch.save(content, tmp_path / "tuned.pth")
    found = describe(tmp_path / "tuned.pth")
    assert found["kind"] == "fine-tuning with a trainer of nnssl"
    torch.save({"network_weights": {"w": torch.ones(3, 2)}}, tmp_path / "small.pth")
    assert describe(tmp_path / "small.pth")["network"]["parameters"] == 6


@pytest.mark.parametrize("command", [convert_main, info_main])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0 and "--trust" in capsys.readouterr().out
    assert set(FORMATS) == {"nnssl", "upstream", "nnunet", "safetensors"}


def run_of(folder, steps=20, of=20, epochs=2, **identity):
    """The folder of a run that ended (or was stopped) at a step: both checkpoints and what it wrote down of itself."""
    folder.mkdir(exist_ok=True)
    content = torch.load(identity.pop("start"), weights_only=True)
    content["nnssl"] |= {"step": steps, "steps": of}
    torch.save(content | {"nnssl_training": {"step": steps}}, folder / "checkpoint_latest.pth")
    content.pop("nnssl_training", None)
    torch.save(content, folder / "checkpoint_final.pth")
    command = "nnssl_pretrain -d 500 -m macl -t 501 --epochs 2 -device cpu"
    told = {"method": content["nnssl"]["method"], "command": command, "identity": {"epochs": epochs, **identity}}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_info_of_a_run_says_how_it_goes_on(ours, tmp_path, capsys):
    run = run_of(tmp_path / "run", start=ours)
    longer = "nnssl_pretrain -d 500 -m macl -t 501 -device cpu --c --epochs 4"
    final, latest = (describe(run / f"checkpoint_{name}.pth") for name in ("final", "latest"))
    assert not final["can_be_continued"] and "holds the weights alone" in final["how_to_continue"]
    assert "checkpoint_latest.pth beside it holds both" in final["how_to_continue"]
    assert latest["can_be_continued"] and "reached its end after 2 epochs" in latest["how_to_continue"]
    assert [found["how_to_continue"].splitlines()[-1] for found in (final, latest)] == [longer, longer]
    assert info_main([str(run)]) == 0, "the folder of a run is its end"
    out = capsys.readouterr().out
    assert (
        "can be continued           no: this file" in out and f"\n  {longer}\n" in out and "how to continue" not in out
    )

    from nnssl.pretrain.cli import parser

    parser().parse_args(longer.split()[1:])  # what is told can be typed


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"steps": 10}, "to go on:\nnnssl_pretrain -d 500 -m macl -t 501 -device cpu --c"),
        ({"omni": {"switch": 0.3}}, "and one with --labelled cannot be lengthened"),
    ],
)
def test_info_of_runs_that_cannot_be_lengthened(ours, tmp_path, made, told):
    run = run_of(tmp_path / "run", start=ours, **made)
    assert describe(run / "checkpoint_latest.pth")["how_to_continue"].endswith(told)


def test_info_of_weights_that_lie_alone(ours, tmp_path):
    run = run_of(tmp_path / "run", start=ours)
    (run / "checkpoint_latest.pth").unlink()
    assert describe(run)["how_to_continue"].endswith(f"nnssl_pretrain ... --init {run / 'checkpoint_final.pth'}")
    (run / "checkpoint_final.pth").unlink()
    with pytest.raises(
        NnsslError, match=r"folder without checkpoint_final.pth, checkpoint_latest.*. Name the file itself\."
    ):
        describe(run)
    (run / "fold_2").mkdir()  # the folder of a fine-tuning
    (run / "fold_2" / "checkpoint_latest.pth").touch()
    (run / "fold_0").mkdir()
    with pytest.raises(NnsslError, match=f"Name a fold of this training: {run / 'fold_2'}"):
        describe(run)


def test_info_for_a_person_is_short():
    hashes = [f"{i:016x}" for i in range(40)]
    text = as_text({"bytes": 1234567, "config": {"mask_ratio": 0.75, "lr": None}, "data": {"case_hashes": hashes}})
    assert "1,234,567 bytes" in text and "  mask_ratio " in text and "auto" in text and "None" not in text
    assert "40 (--json lists them)" in text and hashes[3] not in text
