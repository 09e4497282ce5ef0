"""The omni-supervised layer over methods: what each stage trains, and who teaches."""

import pytest
import torch

from nnssl.networks import build_network, canonical_state_dict
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.engine.stepping import Stepper
from nnssl.pretrain.methods import Crops, Progress, SourceStats, get_method, list_methods
from nnssl.pretrain.omni import OmniConfig, make_omni
from nnssl.pretrain.omni.auxiliary import OmniCrops
from nnssl.pretrain.omni.method import running_momentum
from nnssl.pretrain.omni.patches import Patches
from nnssl.pretrain.omni.pictures import LABELS, PSEUDO

METHODS = sorted(n for n in list_methods() if n != "toy")


def build(tiny_plans, tiny_dataset_json, name="robust", info=None, arch="plain", varied=False, **options):
    plans = tiny_plans(3, arch, features=(4, 6, 8), patch=(8, 16, 12), median_shape=(48, 56, 40))
    plan = Plan.from_dicts(plans, "3d_fullres", info or tiny_dataset_json())
    cls = make_omni(get_method(name), OmniConfig(**options), varied)
    config = cls.Config()
    request = cls.crops(plan, SourceStats((48, 56, 40), 9), config)
    torch.manual_seed(0)
    return cls(build_network(plan), plan, request, config)


def crops_of(method, stage=2, batch=None, augment=True, annotated=None):
    g = torch.Generator().manual_seed(5)
    n = method.request.crops_per_case * -(-max(4, method.request.min_batch) // method.request.crops_per_case)
    n, window = batch or n, method.request.read_size
    position = torch.rand(n, 3, generator=g, dtype=torch.float64)
    ssl = Crops(
        data=torch.randn(n, 1, *window, generator=g),
        body=torch.ones(n, 1, *window, dtype=torch.bool),
        position=position,
        axis_position=position.flip(1),
        intensity=torch.tensor([-2.5, 2.5]).repeat(n, 1, 1),
        start=torch.zeros(n, 3, dtype=torch.int64),
        case=[f"case{i // method.request.crops_per_case}" for i in range(n)],
    )
    size = method.omni_augmentation.read_size if augment else method.omni_augmentation.size

    def patches(label):
        data = torch.randn(2, 1, *size, generator=g)
        labels = torch.randint(0, 3, (2, 1, *size), generator=g, dtype=torch.int16) if label else None
        return Patches(data, labels, annotated or [None, None], ["a", "b"], 0, 2, augment)

    return OmniCrops(ssl, patches(True), patches(False) if stage == 2 else None)


def batch_of(method, step=0, **how):
    crops = crops_of(method, **how)
    with torch.no_grad():
        return method.views(crops, StepRNG(0, step, len(crops)))


def gradients(method, total):
    method.zero_grad(set_to_none=True)
    total.backward()
    return {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_labels(tiny_plans, tiny_dataset_json, name):
    """One step of the second stage: finite, and exactly what is trained gets a gradient and is in the optimiser, once."""
    method = build(tiny_plans, tiny_dataset_json, name)
    terms = method(batch_of(method))
    grads = gradients(method, terms["total"])
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert set(grads) == trained
    assert all(bool(g.isfinite().all()) for g in grads.values())
    assert {n for n in trained if n.startswith("network.")} == {
        f"network.{n}"
        for n, _ in method.network.named_parameters()
        if not n.startswith("decoder.seg_layers.0.")  # nnU-Net gives the lowest output no weight
    }
    groups = [p for g in method.optimiser().param_groups for p in g["params"]]
    assert len(groups) == len({id(p) for p in groups}) == len(trained)
    assert method.pretrained_parts() == {"encoder": True, "decoder_stages": [0, 1]}
    assert method.name == f"{name}Omni"
    expected = float((terms["ssl"] + terms["seg"] + terms["semi"]).detach())
    assert float(terms["total"].detach()) == pytest.approx(expected, rel=1e-5)
    assert get_method(name).name == name


def test_first_stage_is_ssl_plus_segmentation_exactly(tiny_plans, tiny_dataset_json, monkeypatch):
    """Test 32: the method's own loss on its own batch, plus nnU-Net's; no pseudo-label is made."""
    method = build(tiny_plans, tiny_dataset_json, seg_weight=0.5, ssl_weight=2.0)
    monkeypatch.setattr(method, "omni_logits", lambda *a: pytest.fail("a pseudo-label before the switch"))
    crops = crops_of(method, stage=1)
    with torch.no_grad():
        batch = method.views(crops, StepRNG(0, 0, len(crops)))
        alone = get_method("robust").views(method, crops.ssl, StepRNG(0, 0, len(crops)))
        assert all(torch.equal(batch["ssl"][k], alone[k]) for k in alone)
        terms = method(batch)
        ssl = get_method("robust").loss(method, alone)["total"]
        outputs = [
            head(level)
            for head, level in zip(
                method.network.decoder.seg_layers, _levels(method.network, batch["labelled"]["data"])
            )
        ]
        dice, ce = method.omni_loss(outputs[::-1], method.omni_loss.targets(batch["labelled"]["label"]))
    assert torch.equal(terms["total"], 2.0 * ssl + 0.5 * (dice + ce))
    assert float(terms["stage"]) == 1
    assert float(terms["semi"]) == 0


def test_what_is_only_logged_holds_no_graph(tiny_plans, tiny_dataset_json):
    method = build(tiny_plans, tiny_dataset_json)
    terms = method(batch_of(method))
    assert terms["total"].requires_grad
    own = ("ssl", "seg", "seg_dice", "seg_ce", "semi", "semi_dice", "semi_ce", "confident", "foreground", "stage")
    assert not any(terms[name].requires_grad for name in own)


def test_labels_are_of_all_classes_unless_said_otherwise():
    cls = make_omni(get_method("robust"), OmniConfig())
    assert cls.omni_varied is False and cls.omni_largest == ()


def _levels(network, x):
    from nnssl.networks import forward_features

    return forward_features(network, x).levels[1:]


def test_snapshot_is_taken_at_the_switch_and_stays(tiny_plans, tiny_dataset_json):
    method = build(tiny_plans, tiny_dataset_json, teacher="snapshot")
    optimiser = method.optimiser()

    def step(i, stage):
        terms = method(batch_of(method, i, stage=stage))
        gradients(method, terms["total"])
        optimiser.step()
        method.after_step(Progress(i + 1, 6, 0, 1))

    assert method.omni_network() is method.network
    step(0, 1)
    step(1, 1)
    student = {k: v.clone() for k, v in canonical_state_dict(method.network).items()}
    step(2, 2)
    taken = {k: v.clone() for k, v in canonical_state_dict(method.omni_teacher.module).items()}
    assert all(torch.equal(student[k], taken[k]) for k in student)
    step(3, 2)
    assert all(torch.equal(v, taken[k]) for k, v in canonical_state_dict(method.omni_teacher.module).items())
    assert method.omni_network() is method.omni_teacher.module
    assert any(not torch.equal(v, taken[k]) for k, v in canonical_state_dict(method.network).items())


def test_moving_average_follows_by_its_formula(tiny_plans, tiny_dataset_json):
    method = build(tiny_plans, tiny_dataset_json, momentum=0.5, teacher="running")
    before = [p.clone() for p in method.omni_teacher.module.parameters()]
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(1.0)
    method.after_step(Progress(4, 9, 0, 1))
    mu = running_momentum(4, 0.5)
    assert mu == pytest.approx(5 / 14)
    assert running_momentum(10**6, 0.99) == 0.99
    for mine, old, new in zip(method.omni_teacher.module.parameters(), before, method.network.parameters()):
        torch.testing.assert_close(mine, mu * old + (1 - mu) * new)
        assert not mine.requires_grad
    assert not {id(p) for p in method.omni_teacher.parameters()} & {
        id(p) for g in method.optimiser().param_groups for p in g["params"]
    }


def test_a_teacher_begins_at_the_switch_and_follows_by_hand_values(tiny_plans, tiny_dataset_json):
    """A copy of the network, then 1/2, 2/3, 3/4 of itself; nothing is followed in the first stage."""
    method = build(tiny_plans, tiny_dataset_json)
    student, teacher = (
        next(iter(n.parameters())).detach() for n in (method.network, method.omni_teacher.module)
    )  # shares memory
    student.fill_(8.0)
    method.after_step(Progress(1, 9, 0, 1))
    assert method.omni_network() is method.network and not bool((teacher == 8).any())
    batch_of(method, stage=2)
    assert method.omni_network() is method.omni_teacher.module and bool((teacher == 8).all())
    student.fill_(2.0)
    for step, value in enumerate((5.0, 4.0, 3.5)):
        method.after_step(Progress(2 + step, 9, 0, 1))
        torch.testing.assert_close(teacher, torch.full_like(teacher, value))
    other = build(tiny_plans, tiny_dataset_json)
    other.load_state_dict(method.state_dict())
    assert (other.omni_begun, other.omni_followed) == (True, 3)
    batch_of(other, stage=2)
    assert torch.equal(next(iter(other.omni_teacher.module.parameters())), teacher), "no second copy after a resume"


def test_each_stage_has_its_schedule_and_the_optimiser_starts_anew(tiny_plans, tiny_dataset_json):
    """Nine steps, a third in the first stage, without warm-up: 1, 3/4, 1/4; then 1 again, and 1/2 in the middle."""
    method = build(tiny_plans, tiny_dataset_json, warmup=0.0)
    found = [method.lr_factor(step, 9) for step in (0, 1, 2, 3, 6)]
    assert found == pytest.approx([1, 0.75, 0.25, 1, 0.5])
    assert [step for step in range(9) if method.restarts(step, 9)] == [3]
    assert build(tiny_plans, tiny_dataset_json, warmup=0.5).lr_factor(3, 9) == pytest.approx(1 / 3)
    one = build(tiny_plans, tiny_dataset_json, schedule="method")
    assert not any(one.restarts(step, 9) for step in range(9))
    assert one.lr_factor(4, 9) == get_method("robust").lr_factor(one, 4, 9)
    for switch in (0.0, 1.0):
        whole = build(tiny_plans, tiny_dataset_json, warmup=0.0, switch=switch)
        assert not any(whole.restarts(step, 8) for step in range(8)) and whole.lr_factor(4, 8) == pytest.approx(0.5)
    stepper = Stepper(method, method, torch.device("cpu"), 3, 0.0, False)
    for step, count in enumerate((1, 1, 2)):  # of three steps the first is the first stage
        stepper.step(batch_of(method, step, stage=1 + (step > 0)), step, [], False)
        assert {int(s["step"]) for s in stepper.optimiser.state.values()} == {count}


def test_pseudo_labels_keep_the_largest_component(tiny_plans, tiny_dataset_json):
    """Components of 5 and 3 voxels of a class: the 3 become background, the other class keeps both of its own."""
    plans = tiny_plans(3, "plain", features=(4, 6, 8), patch=(8, 16, 12), median_shape=(48, 56, 40))
    plan = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())
    cls = make_omni(get_method("robust"), OmniConfig(), largest=[1])
    method = cls(build_network(plan), plan, cls.crops(plan, SourceStats((48, 56, 40), 9), cls.Config()), cls.Config())
    painted = torch.zeros(2, 1, 8, 16, 12, dtype=torch.int64)
    for label, row in ((1, 2), (2, 8)):
        painted[0, 0, 4, row, 0:5] = painted[0, 0, 4, row, 8:11] = label
    method.omni_logits = lambda x, network=None: torch.cat([(painted == k).float() * 9 for k in range(3)], 1)
    made = method._pseudo({"moved": painted.float(), "grid": None})
    assert [int((made == k).sum()) for k in (1, 2)] == [5, 8] and not bool(made[1].any())
    assert torch.equal(made[painted == 2], painted[painted == 2])


@pytest.mark.parametrize("through", [False, True])
def test_pseudo_labels_train_the_encoder_only_where_asked(tiny_plans, tiny_dataset_json, through):
    """Test 33: without it the encoder's gradient from the second stage's loss is exactly none."""
    method = build(
        tiny_plans, tiny_dataset_json, semi_through_encoder=through, ssl_weight=0.0, seg_weight=0.0, threshold=0.0
    )
    grads = gradients(method, method(batch_of(method))["total"])
    largest = dict.fromkeys(("encoder", "decoder"), 0.0)
    for name, grad in grads.items():
        if name.startswith(("network.encoder", "network.decoder")):
            part = "encoder" if "encoder" in name else "decoder"
            largest[part] = max(largest[part], float(grad.abs().max()))
    assert largest["decoder"] > 0
    assert (largest["encoder"] > 0) is through


def test_pseudo_labels_come_from_the_clean_patch_and_move_with_the_view(tiny_plans, tiny_dataset_json):
    """The label of each voxel of the student's view is that of the clean voxel it shows, or it is ignored."""
    method = build(tiny_plans, tiny_dataset_json, pseudo_from="clean")
    size = method.omni_augmentation.size
    shown = []

    def logits(x, network=None):
        """A teacher that paints one stripe per axis-2 index."""
        shown.append(x)
        index = torch.arange(x.shape[3]).view(1, 1, 1, -1, 1).expand(len(x), 1, *x.shape[2:])
        return torch.cat([(index % 3 == k).float() * 9 for k in range(3)], 1)

    method.omni_logits = logits
    patches = crops_of(method).unlabelled
    ramp = torch.arange(patches.data.shape[3]).float().view(1, 1, 1, -1, 1)
    patches.data = ramp.expand_as(patches.data).contiguous()
    for seed in range(6):
        with torch.no_grad():
            part = method._semi(patches, StepRNG(seed, 0, 2))
            made = method._pseudo(part)
        assert torch.equal(shown[-1], part["clean"])
        assert made.shape == (2, 1, *size)
        from nnssl.pretrain.augment.spatial import warp

        at = warp(patches.data, part["grid"], "nearest")
        first = (patches.data.shape[3] - size[1]) // 2
        known = made != method.omni_ignore
        assert bool(known.any())
        assert torch.equal(made[known], ((at[known] - first) % 3).long())
        outside = (at < first) | (at >= first + size[1])
        assert bool((made[outside] == method.omni_ignore).all())


def test_doubtful_voxels_are_ignored(tiny_plans, tiny_dataset_json):
    method = build(tiny_plans, tiny_dataset_json, threshold=0.999999)
    terms = method(batch_of(method))
    assert float(terms["confident"]) == 0
    assert float(terms["semi_ce"]) == 0
    sure = build(tiny_plans, tiny_dataset_json, threshold=0.0)
    assert float(sure(batch_of(sure, augment=False))["confident"]) == 1


@pytest.mark.parametrize("source", ["moved", "clean", "augmented"])
def test_teacher_sees_what_is_asked_for(tiny_plans, tiny_dataset_json, source):
    method = build(tiny_plans, tiny_dataset_json, pseudo_from=source)
    seen, original = [], method.omni_logits
    method.omni_logits = lambda x, network=None: (seen.append(x), original(x, network))[1]
    batch = batch_of(method)
    method(batch)
    part = batch["semi"]
    assert torch.equal(seen[0], part["data" if source == "augmented" else source])
    assert not any(torch.equal(part[a], part[b]) for a, b in (("moved", "clean"), ("moved", "data")))


def test_what_is_moved_needs_no_moved_labels(tiny_plans, tiny_dataset_json):
    """Each voxel of the student's view has the teacher's label of this very view: none is ignored."""
    method = build(tiny_plans, tiny_dataset_json)
    part = batch_of(method)["semi"]
    made = method._pseudo(part)
    assert torch.equal(made, method.omni_labels(method.omni_logits(part["moved"], method.omni_teacher.module)))
    assert float(method._semi_loss(part)[2]["confident"]) == 1
    assert float(method._semi_loss(part)[2]["foreground"]) == pytest.approx(float((made > 0).float().mean()))


def test_regions_and_partial_labels_train(tiny_plans, tiny_dataset_json):
    info = tiny_dataset_json()
    info["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
    info["regions_class_order"] = [1, 2]
    method = build(tiny_plans, tiny_dataset_json, info=info, varied=True)
    terms = method(batch_of(method, annotated=[(0,), None]))
    assert all(bool(torch.as_tensor(v).isfinite()) for v in terms.values())
    gradients(method, terms["total"])
    partly = build(tiny_plans, tiny_dataset_json, varied=True)
    whole = float(partly(batch_of(partly))["seg"])
    assert float(partly(batch_of(partly, annotated=[(1,), None]))["seg"]) != whole


def test_evaluation_does_not_augment_and_has_no_second_stage(tiny_plans, tiny_dataset_json):
    method = build(tiny_plans, tiny_dataset_json).eval()
    crops = crops_of(method, stage=1, augment=False)
    with torch.no_grad():
        batch = method.views(crops, StepRNG(0, 0, len(crops)))
        assert torch.equal(batch["labelled"]["data"], crops.labelled.data)
        assert torch.equal(batch["labelled"]["label"], crops.labelled.label.long())
        terms = method(batch)
        picture = method.pictures(batch)
        assert method.embed(batch) is not None
    assert "semi" not in terms
    assert {"a held-out crop", LABELS, PSEUDO} <= set(picture.columns)
    only = method.views(OmniCrops(crops.ssl, None, None), StepRNG(0, 0, len(crops)))
    assert set(only) == {"ssl"}
    assert float(method(only)["total"]) == float(method(only)["ssl"])


def test_verdict_is_on_the_methods_own_loss(tiny_plans, tiny_dataset_json, monkeypatch):
    """Segmentation that fell does not make an objective learnt whose own loss did not."""
    method = build(tiny_plans, tiny_dataset_json, "mae")
    seen = []

    def verdict(self, first, last):
        seen.append((first["total"], last["total"]))
        return False, "no"

    monkeypatch.setattr(get_method("mae"), "verdict", verdict)
    assert method.verdict({"total": 2.0, "ssl": 3.0}, {"total": 1.0, "ssl": 4.0}) == (False, "no")
    assert seen == [(3.0, 4.0)]
