"""Which of the pretrained parts a segmentation network gets: defaults of methods, plans and users, and what the report says."""

import copy as copy_module
import json
import pickle

import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict
from nnssl.parts import Part, decoder_stage, encoder_stage, promised_parts
from nnssl.plans import Plan, derive
from nnssl.plans.parts import CHOICES, parts_for, select_parts
from nnssl.pretrain.methods import list_methods
from nnssl.weights import apply, build_payload, check_loadable, label_set, part_of, save

HELD = {"encoder": True, "decoder_stages": [1, 0]}
WHY = "its decoder harms"


@pytest.fixture
def plan(tiny_plans, tiny_dataset_json):
    plans = tiny_plans(strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 1)), features=(4, 6, 8, 8))
    return Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())


def payload(plan, network, parts=HELD, transfer=None, **more):
    told = {} if transfer is None else {"transfer": {"parts": transfer, "why": WHY}}
    return build_payload(
        network,
        plan,
        method="mae",
        config={},
        crop_size=plan.patch_size,
        pretrained_parts=parts,
        data={},
        **told,
        **more,
    )


def loaded_parts(plan, transfer=None, heads=None, held=HELD, **options):
    """The report, and the parts whose tensors all became the file's, the others having stayed as they were."""
    source, target = build_network(plan), build_network(plan)
    before = {name: tensor.clone() for name, tensor in canonical_state_dict(target).items()}
    given = canonical_state_dict(source)
    for tensor in given.values():
        tensor.data.uniform_(1, 2)  # biases and norms differ too
    more = {} if heads is None else {"heads": heads}
    report = apply(target, payload(plan, source, held, transfer, **more), plan, **options)
    taken = set()
    for name, tensor in canonical_state_dict(target).items():
        new = torch.equal(tensor, given[name])
        assert new or torch.equal(tensor, before[name])
        taken |= {part_of(name)} if new else set()
    for name, tensor in canonical_state_dict(target).items():
        assert torch.equal(tensor, given[name]) == (part_of(name) in taken), name
    return report, taken


def test_select_parts():
    held = promised_parts(HELD)
    assert select_parts(held, "all") == ["encoder", "decoder stage 0", "decoder stage 1"]
    assert select_parts(held, "default") == ["encoder", "decoder stage 0", "decoder stage 1"]
    assert select_parts(held, "default", "encoder") == ["encoder"]
    assert select_parts(held, "encoder+bottom", "encoder") == ["encoder", "decoder stage 0"]
    assert select_parts(held, {"decoder_stages": [1]}) == ["decoder stage 1"]
    with pytest.raises(NnsslError, match="'encoder[+]bottom' ask for decoder stage 0.*It holds: encoder"):
        select_parts([Part("encoder")], "encoder+bottom")
    with pytest.raises(NnsslError, match="decoder stage 7"):
        select_parts(held, {"encoder": True, "decoder_stages": [7]})
    with pytest.raises(NnsslError, match="ask for encoder, which.*It holds: decoder stage 0"):
        select_parts([decoder_stage(0)], "encoder")
    with pytest.raises(NnsslError, match="parts 'encodr'.*encoder"):
        select_parts(held, "encodr")


def test_a_part_is_its_text_and_knows_what_it_says():
    """The text is what reports, plans and checkpoints hold; it is read back in one place, and copies keep what it means."""
    bottom = Part("decoder stage 10")
    assert bottom == decoder_stage(10) == "decoder stage 10" and (bottom.kind, bottom.stage) == ("decoder", 10)
    assert (encoder_stage(3).kind, encoder_stage(3).stage, Part("encoder").stage) == ("encoder", 3, None)
    assert Part("encoder norm").kind == "encoder" and Part("encoder norm").stage is None
    assert [Part(text).is_head for text in ("seg_layers", "up_projection", "encoder", "other")] == [
        True,
        True,
        False,
        False,
    ]
    for copy in (copy_module.deepcopy(bottom), pickle.loads(pickle.dumps(bottom))):
        assert copy == bottom and (copy.kind, copy.stage) == ("decoder", 10)
    assert type(str(bottom)) is str and json.loads(json.dumps({bottom: bottom})) == {
        "decoder stage 10": "decoder stage 10"
    }


def test_a_checkpoint_holds_the_text_of_a_part_alone(tmp_path):
    save(
        tmp_path / "x.pth",
        {"network_weights": {"encoder.a": torch.ones(1)}, "parts": {Part("encoder"): [decoder_stage(1)]}},
    )
    assert torch.load(tmp_path / "x.pth", weights_only=True)["parts"] == {"encoder": ["decoder stage 1"]}


def test_a_plan_overrules_the_default_and_heads_alone_need_all():
    assert parts_for({}) == "default"
    assert parts_for({"schedule": "head_only"}) == parts_for({}, "linear_probe") == "all"
    assert parts_for({"schedule": "warmup_poly"}, "head_only") == "all"
    assert parts_for({"schedule": "head_only", "parts": "encoder"}) == "encoder"
    with pytest.raises(NnsslError, match="parts 'decoder'"):
        parts_for({"parts": "decoder"})


@pytest.mark.parametrize(
    ("transfer", "options", "expected"),
    [
        (None, {}, {"encoder", "decoder stage 0", "decoder stage 1"}),
        ("encoder", {}, {"encoder"}),
        ("encoder+bottom", {}, {"encoder", "decoder stage 0"}),
        ("encoder", {"parts": "all"}, {"encoder", "decoder stage 0", "decoder stage 1"}),
        ("all", {"parts": "encoder"}, {"encoder"}),
        ("encoder", {"parts": {"encoder": False, "decoder_stages": [1]}}, {"decoder stage 1"}),
    ],
)
def test_apply_takes_what_is_chosen_and_names_what_it_leaves_out(plan, transfer, options, expected):
    report, taken = loaded_parts(plan, transfer, **options)
    assert taken == expected
    held = {"encoder", "decoder stage 0", "decoder stage 1"}
    assert set(report.left_out) == held - expected and set(report.to_dict()["left_out"]) == held - expected
    text = str(report)
    assert ("left out on purpose" in text) == (expected != held)
    assert ("mae's default: its decoder harms" in text) == (expected != held and not options)
    assert "decoder stage 2: 10 left random: not pretrained" in text


def test_the_plan_of_the_network_chooses(plan):
    variant = derive(plan, "x", parts="encoder+bottom")
    assert variant.nnssl["parts"] == "encoder+bottom"
    assert loaded_parts(variant, "encoder")[1] == {"encoder", "decoder stage 0"}
    assert loaded_parts(derive(plan, "x", schedule="head-only"), "encoder")[1] >= {"decoder stage 1"}
    other = derive(variant, "y", checkpoint="somewhere", sha256="0")
    assert "parts" not in other.nnssl, "said of the file named before"
    with pytest.raises(NnsslError, match="parts 'encoder[+]botom'.*encoder[+]bottom"):
        derive(plan, "x", parts="encoder+botom")


def test_what_is_left_out_is_no_shortfall_and_what_is_taken_still_is(plan, tiny_plans, tiny_dataset_json):
    source = payload(plan, build_network(plan), transfer="encoder")
    gone = {k: v for k, v in source["network_weights"].items() if not k.startswith("decoder.stages.1")}
    assert apply(build_network(plan), {**source, "network_weights": gone}, plan).part("encoder").percent == 100
    with pytest.raises(NnsslError, match="promises more than fits.*decoder stage 1"):
        apply(build_network(plan), {**source, "network_weights": gone}, plan, parts="all")


def test_the_proof_looks_at_everything_that_was_pretrained(plan):
    report = check_loadable(payload(plan, build_network(plan), transfer="encoder"), plan)
    assert report.part("decoder stage 1").percent == 100 and not report.left_out


def test_each_method_names_a_known_default_and_a_reason():
    for name, cls in list_methods().items():
        assert cls.default_transfer in CHOICES[1:], name
        assert cls.default_transfer == "all" or cls.transfer_reason, name
    assert list_methods()["mae"].default_transfer == "encoder"


# --------------------------------------------------------------------------------------------- heads

ALL = {"encoder": True, "decoder_stages": [0, 1, 2]}
NAMED = {
    "labels": {"background": 0, "liver": 1, "spleen": 2},
    "regions_class_order": None,
    "learnt": ["liver", "spleen"],
}


def test_a_label_set_is_what_decides_the_meaning_of_heads():
    info = {"labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    assert label_set(info) == NAMED, "an ignore label has no head, and an order without regions means nothing"
    assert label_set(info, {"spleen"})["learnt"] == ["spleen"]
    regions = {"labels": {"background": 0, "whole": (1, 2), "core": 2}, "regions_class_order": [1, 2]}
    assert label_set(regions)["labels"] == {"background": 0, "whole": [1, 2], "core": 2}
    assert label_set(regions)["regions_class_order"] == [1, 2]


def test_heads_are_kept_for_the_very_label_set_only(plan):
    assert label_set(plan.dataset_json) == NAMED
    report, taken = loaded_parts(plan, heads=NAMED, held=ALL)
    assert taken == {"encoder", *(f"decoder stage {i}" for i in range(3)), "seg_layers"} and report.total.percent == 100
    assert "heads kept: the checkpoint has learnt this very label set" in str(report)
    for change, words in [
        ({"labels": {"background": 0, "liver": 2, "spleen": 1}}, "for another label set (background 0, liver 2"),
        ({"labels": {"background": 0, "liver": 1}}, "the target has background 0, liver 1, spleen 2"),
        ({"regions_class_order": [2, 1]}, "in another order"),
        ({"learnt": ["liver"]}, "no case of the pretraining was annotated with spleen"),
    ]:
        report, taken = loaded_parts(plan, heads=NAMED | change, held=ALL)
        assert "seg_layers" not in taken and report.part("seg_layers").random > 0
        assert words in str(report) and "new heads" in str(report), change
    for how in ({"held": ALL, "parts": "encoder"}, {"held": HELD}):
        report, taken = loaded_parts(plan, heads=NAMED, **how)
        assert "seg_layers" not in taken and "made for its whole decoder, which is not taken" in str(report)
    report, taken = loaded_parts(plan)
    assert "seg_layers" not in taken and "new heads for this dataset's classes" in str(report)
    assert loaded_parts(plan, heads={"labels": None})[1] == taken, "a record that is spoilt promises nothing"
