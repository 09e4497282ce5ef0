"""Windows are read as far as their views look, and a case once for its crops; what comes out is what whole windows give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl.pretrain.augment.box import image_bounds, image_box
from nnssl.pretrain.augment.pairs import cut, draw_pairs
from nnssl.pretrain.augment.rng import HELD_OUT_STEP, StepRNG
from nnssl.pretrain.augment.spatial import Affine, AffineRange, apply_affine, is_still, random_affine, reach
from nnssl.pretrain.data import CaseFormat, CropDataset, SampleStream, collate
from nnssl.pretrain.data.case import CaseReader, HeldCase
from nnssl.pretrain.data.reorientation import Orientation
from nnssl.pretrain.data.sampling import HELD_OUT, TRAIN
from nnssl.pretrain.methods import CropRequest

FORM = CaseFormat(1, (0, 1, 2), False)


SEED, BATCH = 5, 6


def crops_of(refs, request, number=TRAIN, orientation=None):
    return CropDataset(refs, CaseReader(FORM), request, SampleStream(SEED, BATCH, number), orientation)


def batch_of(refs, request, step, number=TRAIN, orientation=None):
    data = crops_of(refs, request, number, orientation)
    return collate([data[(step, i)] for i in range(BATCH)])


def moving(size, **options):
    rotation = (30.0,) * (3 if len(size) == 3 else 1)
    return AffineRange(
        size, (1.0, 2.0, 1.5)[-len(size) :], rotation, (0.8, 1.25), mirror_axes=(0, len(size) - 1), **options
    )


# ---- as far as the view looks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [TRAIN, HELD_OUT])
@pytest.mark.parametrize(
    ("size", "window"), [((8, 10, 6), (14, 18, 12)), ((8, 10, 6), (15, 17, 13)), ((8, 10), (14, 19))]
)
def test_views_of_what_is_read_are_those_of_whole_windows(size, window, stream, refs):
    move = moving(size, p=0.5)
    orientation = Orientation((1, 0, 2), (True, False, False), (1.0, 1.0, 1.0))
    smaller, turned = 0, 0
    for step in range(12):
        request = CropRequest(size, window, move=move)
        read = batch_of(refs, request, step, stream, orientation=orientation)
        whole = batch_of(refs, replace(request, move=None), step, stream, orientation=orientation)
        rng = StepRNG(SEED, step + (HELD_OUT_STEP if stream == HELD_OUT else 0), BATCH)
        affine = move.draw(rng)
        assert torch.equal(read.affine, affine.rows) and whole.affine is None
        assert torch.equal(Affine.from_rows(read.affine).matrix, affine.matrix)
        views = [
            apply_affine(crops.data, affine, size, body=crops.body, box=image_box(crops)) for crops in (read, whole)
        ]
        for name in ("data", "body", "inside"):
            assert torch.equal(*[getattr(view, name) for view in views]), name
        assert torch.equal(read.axis_position, whole.axis_position) and read.case == whole.case
        assert torch.equal(read.shape, whole.shape)
        smaller += read.data.numel() < whole.data.numel()
        turned += int((~is_still(affine)).sum())
        if is_still(affine).all():
            assert all(n - s in (0, 1) for n, s in zip(read.data.shape[2:], size))
    assert smaller and 20 < turned < 52


def test_a_view_looks_at_no_more_than_its_reach():
    """What lies outside of it may be anything."""
    size, window = (8, 10, 6), (20, 24, 18)
    data = torch.randn(40, 2, *window)
    affine = moving(size).draw(StepRNG(1, 2, 40))
    affine = Affine(affine.matrix, torch.rand(40, 3) * 2 - 1)
    spoilt = torch.full_like(data, torch.nan)
    needed = reach(affine, size, window)
    for i, n in enumerate(needed.tolist()):
        at = (i, slice(None), *[slice((w - k) // 2, (w + k) // 2) for w, k in zip(window, n)])
        spoilt[at] = data[at]
    assert torch.equal(apply_affine(spoilt, affine, size).data, apply_affine(data, affine, size).data)
    assert (needed >= torch.tensor(size)).all() and (needed <= torch.tensor(window)).all()
    assert ((needed - torch.tensor(window)) % 2 == 0).all() and (needed < torch.tensor(window)).any(0).all()
    tight = spoilt.clone()
    for i, n in enumerate(needed.tolist()):  # two voxels less on one side would be looked at by most views
        tight[i, :, (window[0] - n[0]) // 2 + 2] = torch.nan
    assert apply_affine(tight, affine, size).data.isnan().flatten(1).any(1).float().mean() > 0.5


def test_one_by_one_is_all_at_once():
    """The way of a GPU, which resamples whole windows together, up to rounding."""
    from nnssl.pretrain.augment.spatial import _resample

    size, window = (16, 20, 17), (30, 34, 28)
    data, body = torch.randn(5, 2, *window), torch.rand(5, 1, *window) > 0.3
    start = torch.tensor([[-4, 0, 3], [0, 0, 0], [10, -12, 2], [3, 3, 3], [-2, -2, -2]])
    shape = start + torch.tensor([[30, 30, 40], [99, 99, 99], [25, 20, 28], [20, 24, 22], [99, 22, 99]])
    low, high = image_bounds(data, start, shape)
    from nnssl.pretrain.augment.box import ImageBox

    box = ImageBox(low, high, torch.full((5, 2), -2.0))
    voxel = [torch.arange(n) for n in window]
    for axis, v in enumerate(voxel):  # padding is 0
        inside = (v >= low[:, axis, None]) & (v < high[:, axis, None])
        data *= inside.view(5, 1, *[window[axis] if a == axis else 1 for a in range(3)])
    affine = moving(size).draw(StepRNG(3, 4, 5))
    ours, theirs = apply_affine(data, affine, size, body=body, box=box), _resample(data, affine, size, body, box)
    assert (ours.data - theirs.data).abs().max() < 0.02  # planes are as exact as 0.005 voxels
    assert (ours.inside == theirs.inside).float().mean() > 0.999 and not ours.inside.all()
    assert (ours.body == theirs.body).float().mean() > 0.995


def test_mae_reads_less_and_sees_the_same(refs, tiny_plans, tiny_dataset_json):
    from nnssl.config import make_config
    from nnssl.networks import build_network
    from nnssl.plans import Plan
    from nnssl.pretrain.methods import SourceStats, get_method

    plans = tiny_plans(3, "plain", 1, strides=((1, 1, 1), (2, 2, 2)), patch=(8, 8, 8), features=(4, 6))
    cls, plan = get_method("mae"), Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json(1))
    config = make_config(cls.Config, {"augment_p": 0.5})
    request = cls.crops(plan, SourceStats((20, 24, 20), 6), config, (8, 8, 8))
    assert any(w > 8 for w in request.read_size)
    method = cls(build_network(plan), plan, request, config)
    for step in range(4):
        crops = [batch_of(refs, r, step) for r in (request, replace(request, move=None))]
        views = [method.views(c, StepRNG(SEED, step, BATCH)) for c in crops]
        for name in ("input", "valid", "mask"):
            assert torch.equal(views[0][name], views[1][name])
        other = method.views(crops[0], StepRNG(SEED + 1, step, BATCH))  # whoever draws anew gets what was read
        assert torch.equal(other["input"], views[0]["input"]) and not torch.equal(other["mask"], views[0]["mask"])
        part = method.views(crops[0].part(2, 3), StepRNG(SEED, step, BATCH, 2, 3))
        assert torch.equal(part["input"], views[0]["input"][2:5])


def test_random_affine_is_draw_and_apply():
    data = torch.randn(6, 1, 20, 20, 20)
    move = moving((8, 10, 6), p=0.6)
    view = random_affine(
        data, StepRNG(0, 1, 6), move.size, move.spacing, rotation=move.rotation, scale=move.scale,
        mirror_axes=move.mirror_axes, p=move.p,
    )  # fmt: skip
    assert torch.equal(view.data, apply_affine(data, move.draw(StepRNG(0, 1, 6)), move.size).data)


# ---- the part in the image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 10, 6), (12, 24, 18), (16, 22, 14)])
def test_trimmed_windows_are_the_part_in_the_image(size, refs):
    window = tuple(2 * s - 1 for s in size)
    request = CropRequest(size, window, crops_per_case=2, trim=True)
    for step in range(6):
        trimmed = batch_of(refs, request, step)
        whole = batch_of(refs, replace(request, trim=False), step)
        assert torch.equal(trimmed.axis_position, whole.axis_position) and whole.extent is None
        for i in range(BATCH):
            first, n = trimmed.start[i] - whole.start[i], trimmed.extent[i]
            at = (i, slice(None), *[slice(int(a), int(a + k)) for a, k in zip(first, n)])
            mine = (i, slice(None), *[slice(0, int(k)) for k in n])
            assert torch.equal(trimmed.data[mine], whole.data[at])
            assert torch.equal(trimmed.body[mine], whole.body[at])
            assert trimmed.body[i].sum() == whole.body[i].sum()
            roomy = trimmed.shape[i] >= torch.tensor(size)
            inside = (trimmed.start[i] >= 0) & (trimmed.start[i] + n <= trimmed.shape[i])
            assert (inside | ~roomy).all() and (n >= torch.tensor(size)).all()
        pairs, images = [], []
        for crops in (trimmed, whole):
            low, high = image_bounds(crops.data, crops.start, crops.shape, crops.extent)
            pairs.append(draw_pairs(crops.body, size, StepRNG(1, step, BATCH), n=20, low=low, high=high))
            images.append([cut(crops.data, s, size) for s in pairs[-1].start])
        assert torch.equal(images[0][0], images[1][0]) and torch.equal(images[0][1], images[1][1])
        assert torch.equal(pairs[0].voxels, pairs[1].voxels) and torch.equal(pairs[0].valid, pairs[1].valid)
        assert torch.equal(pairs[0].anchor - pairs[0].start, pairs[1].anchor - pairs[1].start)


def test_only_windows_around_roaming_crops_are_read_in_part(refs):
    for part in ({"trim": True}, {"move": moving((8, 8, 8))}):
        with pytest.raises(ValueError, match="read whole"):
            crops_of(refs, CropRequest((8, 8, 8), (8, 8, 8), sampling="inside", **part))


# ---- a case once -----------------------------------------------------------------------------------------------------------


def test_a_case_is_read_once_for_its_crops(refs, monkeypatch):
    opened, held = [], []
    way, whole = CaseReader.open, HeldCase.of
    monkeypatch.setattr(CaseReader, "open", lambda self, ref: opened.append(ref.name) or way(self, ref))
    monkeypatch.setattr(HeldCase, "of", lambda case: held.append(case.ref.name) or whole(case))
    request = CropRequest((10, 10, 8), (19, 19, 15), crops_per_case=3)
    data = crops_of(refs, request)
    found = [data[(2, i)] for i in range(BATCH)]
    assert opened == held == [found[0].case, found[3].case] and len({s.case for s in found}) == 2
    data.release()
    assert data._held is None
    for sample in found:
        ref = next(r for r in refs if r.name == sample.case)
        image, body = way(CaseReader(FORM), ref).read(sample.start, (19, 19, 15))
        assert np.array_equal(sample.data, image) and np.array_equal(sample.body, body)


def test_a_case_much_larger_than_its_windows_is_not_held(refs, monkeypatch):
    monkeypatch.setattr(HeldCase, "of", lambda case: pytest.fail("it was read whole"))
    data = crops_of(refs, CropRequest((4, 4, 4), (7, 7, 7), crops_per_case=3))
    assert [data[(2, i)].data.shape for i in range(BATCH)] == [(1, 7, 7, 7)] * BATCH
