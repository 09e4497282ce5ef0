"""The segmentation loss beside nnU-Net's own, with partial labels, ignored voxels and regions."""

import pytest
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.omni.loss import SegmentationLoss, deep_weights, ignore_value, restrict_logits, segment, to_regions
from nnssl.teacher.pseudo_labels import confidence, labels_of, pseudo_label

SIZE = (8, 12, 16)
STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 2))
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "edge": 3}


def make_plan(tiny_plans, tiny_dataset_json, *, regions=False, ignore=False, dim=3, batch_dice=None):
    info = tiny_dataset_json(labels=("liver", "spleen", "kidney"))
    if regions:
        info["labels"], info["regions_class_order"] = dict(REGIONS), [1, 2, 3]
    if ignore:
        info["labels"]["ignore"] = 4
    plans = tiny_plans(dim, strides=STRIDES, features=(4, 4, 4, 4), patch=SIZE)
    name = "3d_fullres" if dim == 3 else "2d"
    if batch_dice is not None:
        plans["configurations"][name]["batch_dice"] = batch_dice
    return Plan.from_dicts(plans, name, info)


def label_map(top=4, dim=3, batch=2):
    return torch.randint(0, top, (batch, 1, *SIZE[-dim:]), generator=torch.Generator().manual_seed(2))


def logits(loss, k, batch=2, dim=3):
    g = torch.Generator().manual_seed(3)
    sizes = [[round(n * s) for n, s in zip(SIZE[-dim:], scale)] for scale in loss.scales]
    return [torch.randn(batch, k, *s, generator=g).requires_grad_() for s in sizes]


def nnunets(plan, ignore):
    """What ``nnUNetTrainer._build_loss`` builds."""
    soft = {"batch_dice": plan.config.batch_dice, "smooth": 1e-5, "ddp": False}
    if plan.manager.get_label_manager(plan.dataset_json).has_regions:
        inner = DC_and_BCE_loss(
            {}, {**soft, "do_bg": True}, use_ignore_label=ignore is not None, dice_class=MemoryEfficientSoftDiceLoss
        )
    else:
        inner = DC_and_CE_loss(
            {**soft, "do_bg": False},
            {},
            weight_ce=1,
            weight_dice=1,
            ignore_label=ignore,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    return DeepSupervisionWrapper(inner, deep_weights(3))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_dice_and_cross_entropy_add_up_to_nnunets_loss(tiny_plans, tiny_dataset_json, regions, ignore, dim):
    """With nnU-Net's own target transforms on one side and ours on the other; values and gradients."""
    plan = make_plan(tiny_plans, tiny_dataset_json, regions=regions, ignore=ignore, dim=dim)
    value = 4 if ignore else None
    loss = SegmentationLoss(plan, value)
    label = label_map(5 if ignore else 4, dim)
    k = 3 if regions else 4
    outputs = logits(loss, k, dim=dim)
    dice, ce = loss(outputs, loss.targets(label))
    (dice + ce).backward()
    copies = [o.detach().clone().requires_grad_() for o in outputs]
    shrink = DownsampleSegForDSTransform(loss.scales)
    theirs = []
    for sample in label:
        if regions:
            channels = [(1, 2, 3), (2, 3), 3, *([4] if ignore else [])]
            sample = ConvertSegmentationToRegionsTransform(channels)._apply_to_segmentation(sample)
        theirs.append(shrink._apply_to_segmentation(sample))
    targets = [torch.stack(scale) for scale in zip(*theirs)]
    for mine, their in zip(loss.targets(label), targets):
        assert torch.equal(mine.long(), their.long())
    expected = nnunets(plan, value)(copies, targets)
    expected.backward()
    torch.testing.assert_close(dice + ce, expected)
    for mine, their in zip(outputs[:-1], copies[:-1]):
        torch.testing.assert_close(mine.grad, their.grad)
    assert outputs[-1].grad is None  # nnU-Net gives the lowest resolution no weight


def test_cross_entropy_by_hand(tiny_plans, tiny_dataset_json):
    loss = SegmentationLoss(make_plan(tiny_plans, tiny_dataset_json), None)
    outputs = [o.detach() for o in logits(loss, 4)]
    targets = loss.targets(label_map())
    _, ce = loss(outputs, targets)
    expected = sum(w * F.cross_entropy(o, t[:, 0]) for w, o, t in zip((2 / 3, 1 / 3), outputs, targets))
    torch.testing.assert_close(ce, expected)


@pytest.mark.parametrize("regions", [False, True])
def test_ignored_voxels_contribute_nothing(tiny_plans, tiny_dataset_json, regions):
    """Test 35: neither value nor gradient depends on what is predicted where the label is ignored."""
    plan = make_plan(tiny_plans, tiny_dataset_json, regions=regions)
    assert ignore_value(plan) == 4
    loss = SegmentationLoss(plan, 4)
    label = label_map()
    label[:, :, :4, :8] = 4
    outputs, targets = logits(loss, 3 if regions else 4), loss.targets(label)
    changed = []
    for o, t in zip(outputs, targets):
        ignored = (t[:, -1:] if regions else t == 4).expand_as(o)
        changed.append(torch.where(ignored, o + 5 * torch.rand_like(o), o).detach())
    first, second = loss(outputs, targets), loss(changed, targets)
    torch.testing.assert_close(first, second)
    sum(first).backward()
    for o, t in zip(outputs[:-1], targets):
        ignored = (t[:, -1:] if regions else t == 4).expand_as(o)
        assert float(o.grad[ignored].abs().max()) == 0
        assert float(o.grad[~ignored].abs().max()) > 0


def test_everything_ignored_gives_no_gradient(tiny_plans, tiny_dataset_json):
    loss = SegmentationLoss(make_plan(tiny_plans, tiny_dataset_json), 4)
    outputs = logits(loss, 4)
    dice, ce = loss(outputs, loss.targets(torch.full((2, 1, *SIZE), 4)))
    assert float(ce) == 0
    dice.backward()
    assert all(float(o.grad.abs().max()) == 0 for o in outputs[:-1])


def test_restricted_logits_are_marginal_probabilities():
    z = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    p, q = z.softmax(1), restrict_logits(z, (2, 4)).softmax(1)
    torch.testing.assert_close(q[:, 0], p[:, [0, 1, 3]].sum(1))
    torch.testing.assert_close(q[:, 1:], p[:, [2, 4]])


def test_partial_labels_by_hand(tiny_plans, tiny_dataset_json):
    """Only spleen (2) is annotated in sample 1: the loss is that of 'spleen or not', and other labels in it do not count."""
    loss = SegmentationLoss(make_plan(tiny_plans, tiny_dataset_json), None, varied=True)
    outputs = [o.detach() for o in logits(loss, 4)]
    label = label_map()
    dice, ce = loss(outputs, loss.targets(label), [None, (2,)])
    one = SegmentationLoss(make_plan(tiny_plans, tiny_dataset_json), None)
    whole = one([o[:1] for o in outputs], one.targets(label[:1]))
    part_dice = part_ce = 0.0
    for w, o, t in zip((2 / 3, 1 / 3), outputs, one.targets(label[1:])):
        p = o[1:].softmax(1)[:, 2]
        y = (t[:, 0] == 2).float()
        part_dice -= w * float((2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5))
        part_ce -= w * float((y * p.log() + (1 - y) * (1 - p).log()).mean())
    assert float(dice) == pytest.approx((float(whole[0]) + part_dice) / 2, abs=1e-5)
    assert float(ce) == pytest.approx((float(whole[1]) + part_ce) / 2, abs=1e-5)


def test_classes_that_are_not_annotated_may_be_called_what_they_are(tiny_plans, tiny_dataset_json):
    """A voxel that is surely kidney costs nothing where kidney is not annotated and the label says background."""
    loss = SegmentationLoss(make_plan(tiny_plans, tiny_dataset_json), None)
    label = torch.zeros(1, 1, *SIZE, dtype=torch.long)
    outputs = [torch.zeros(1, 4, *t.shape[2:]) for t in loss.targets(label)]
    for o in outputs:
        o[:, 3] = 20.0
    assert float(loss(outputs, loss.targets(label), [(1, 2)])[1]) < 1e-6
    assert float(loss(outputs, loss.targets(label))[1]) > 10


def test_partial_regions_select_heads(tiny_plans, tiny_dataset_json):
    plan = make_plan(tiny_plans, tiny_dataset_json, regions=True)
    loss = SegmentationLoss(plan, 4)
    label = label_map()
    label[:, :, :2] = 4
    outputs = logits(loss, 3)
    sum(loss(outputs, loss.targets(label), [(0, 2), (0, 2)])).backward()
    for o in outputs[:-1]:
        assert float(o.grad[:, 1].abs().max()) == 0
        assert float(o.grad[:, 0].abs().max()) > 0
        assert float(o.grad[:, 2].abs().max()) > 0


def test_ignored_and_partial_together(tiny_plans, tiny_dataset_json):
    """Cross-entropy is one mean over all voxels that count, whatever sample they are in."""
    loss = SegmentationLoss(make_plan(tiny_plans, tiny_dataset_json), 4, varied=True)
    label = label_map()
    label[0, :, :6] = 4
    outputs = [o.detach() for o in logits(loss, 4)]
    _, ce = loss(outputs, loss.targets(label), [None, (1,)])
    expected = 0.0
    for w, o, t in zip((2 / 3, 1 / 3), outputs, loss.targets(label)):
        valid = t[:1, 0] != 4
        first = F.cross_entropy(o[:1], t[:1, 0].clamp_max(3), reduction="none")[valid]
        second = F.cross_entropy(restrict_logits(o[1:], (1,)), (t[1:, 0] == 1).long(), reduction="none").flatten()
        expected += w * float(torch.cat([first, second]).mean())
    assert float(ce) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("arch", ["plain", "resenc"])
@pytest.mark.parametrize("dim", [2, 3])
def test_segment_equals_the_stock_forward(tiny_plans, tiny_dataset_json, arch, dim):
    name = "3d_fullres" if dim == 3 else "2d"
    plan = Plan.from_dicts(tiny_plans(dim, arch), name, tiny_dataset_json())
    network = build_network(plan, deep_supervision=True).eval()
    x = torch.randn(2, 1, *plan.patch_size)
    mine, theirs = segment(network, network.encoder(x)), network(x)
    assert len(mine) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    network.decoder.deep_supervision = False
    assert torch.equal(segment(network, network.encoder(x), deep=False)[0], network(x))


def test_batch_dice_is_over_all_ranks_only_where_they_have_the_same_annotations(
    tiny_plans, tiny_dataset_json, monkeypatch
):
    from nnssl.pretrain.omni import loss as module

    plan = make_plan(tiny_plans, tiny_dataset_json, batch_dice=True)
    loss = SegmentationLoss(plan, None)
    assert loss.scales[0] == [1.0, 1.0, 1.0] and len(loss.scales) == len(plan.config.pool_op_kernel_sizes) - 1
    monkeypatch.setattr(module, "is_distributed", lambda: True)

    def over_ranks(**options):
        parts = SegmentationLoss(plan, None, **options).modules()
        return {m.ddp for m in parts if isinstance(m, MemoryEfficientSoftDiceLoss)}

    assert over_ranks() == {True} and over_ranks(varied=True) == {False}


def test_weights_are_nnunets():
    assert deep_weights(4) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    assert deep_weights(1) == [1.0]


def test_pseudo_labels_and_confidence():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]]).T.reshape(1, 3, 1, 3)
    z = p.log()
    torch.testing.assert_close(confidence(z), torch.tensor([0.7, 0.9, 0.4]).view(1, 1, 1, 3))
    assert pseudo_label(z, 0.6, 9).flatten().tolist() == [0, 1, 9]
    assert pseudo_label(z, 0.0, 9).flatten().tolist() == [0, 1, 2]


def test_pseudo_labels_of_regions_are_as_nnunet_writes_them(tiny_plans, tiny_dataset_json):
    plan = make_plan(tiny_plans, tiny_dataset_json, regions=True)
    manager = plan.manager.get_label_manager(plan.dataset_json)
    z = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(1))
    expected = manager.convert_logits_to_segmentation(z.clone())
    mine = labels_of(z[None], manager.regions_class_order)
    assert torch.equal(mine[0, 0], torch.as_tensor(expected).long())
    sure = confidence(z[None], regions=True)
    assert float(sure.min()) >= 0.5
    assert bool((pseudo_label(z[None], 0.7, 4, manager.regions_class_order)[sure < 0.7] == 4).all())
    regions = to_regions(mine, manager.foreground_regions, None)
    assert bool((regions[0, 0] == (mine[0, 0] > 0)).all())
