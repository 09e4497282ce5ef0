"""Volume contrast on any plan: crops, views, terms, gradients, teacher, degenerate volumes (spec 12)."""

import logging
from dataclasses import fields

import numpy as np
import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.losses.overlap import overlap_labels
from nnssl.losses.position import PositionLoss, orthogonality, similarity
from nnssl.networks import unwrap
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods import Crops, Progress, get_method
from nnssl.pretrain.methods.voco.picture import CELLS, GUESS, TRUE


def test_request(make_voco):
    method = make_voco()
    assert method.request.size == (4, 8, 8) and method.request.read_size == (4, 24, 16) and method.grid == (1, 3, 2)
    assert method.request.sampling == "inside" and method.request.reorient
    assert make_voco(window="volume", reorient=False).request.sampling == "whole"
    assert "6 cells and 3 random crops" in method.request.explanation
    with pytest.raises(NnsslError, match="axis 1"):
        make_voco(grid=(1, 5, 1))
    with pytest.raises(NnsslError, match="needs a teacher"):
        make_voco(teacher="none")
    with pytest.raises(NnsslError, match="nothing would be learnt"):
        make_voco(intra_weight=0, inter_weight=0, reg_weight=0)


@pytest.mark.parametrize("arch", ["plain", "resenc"])
def test_pooled_width(make_voco, arch):
    """(26)"""
    method = make_voco(arch)
    encoder = unwrap(method.network).encoder
    assert method.width == sum(encoder.output_channels)
    x = torch.randn(5, 1, 4, 8, 8)
    pooled = method.pooled(x)
    assert pooled.shape == (5, method.width)
    torch.testing.assert_close(pooled, torch.cat([s.mean((2, 3, 4)) for s in encoder(x)], 1))


def test_views_cut_what_the_labels_say(make_voco, voco_crops):
    """Base crops tile the window, random crops lie where their overlaps say; held-out views are unaltered."""
    method = make_voco().eval()
    crops = voco_crops(method)
    batch = method.views(crops, StepRNG(0, 1, 3))
    assert batch["crops"].shape == (3, 9, 1, 4, 8, 8) and "kept" not in batch
    assert torch.equal(batch["crops"][:, 1], crops.data[:, :, :, :8, 8:])
    assert torch.equal(batch["crops"][:, 4], crops.data[:, :, :, 16:, :8])
    for i in range(3):
        for j in range(3):
            z, y, x = batch["offset"][i, j].tolist()
            assert torch.equal(batch["crops"][i, 6 + j], crops.data[i, :, z : z + 4, y : y + 8, x : x + 8])
    expected = overlap_labels(batch["offset"], (4, 8, 8), (1, 3, 2))
    torch.testing.assert_close(batch["overlap"], expected, atol=1e-7, rtol=0)


def test_offsets_reach_both_ends(make_voco, voco_batch):
    """(4)"""
    method = make_voco(random_crops=200)
    offset = voco_batch(method, 4)["offset"].flatten(0, 1)
    assert offset.amin(0).tolist() == [0, 0, 0] and offset.amax(0).tolist() == [0, 16, 8]
    assert set(offset[:, 1].tolist()) == set(range(17)) and set(offset[:, 2].tolist()) == set(range(9))


@pytest.mark.parametrize("kind", ["mirror", "rot90", "intensity"])
def test_alterations_are_each_crops_own(make_voco, kind, voco_crops):
    """(9) Every crop is altered by itself, also in one volume; where it lies, and its shape, stay."""
    method = make_voco(**{"mirror": 0.0, "rot90": 0.0, "intensity": 0.0, kind: 0.5})
    crops = voco_crops(method, 3)
    crops.data[:] = crops.data[:1, :, :, :8, :8].repeat(1, 1, 1, 3, 2)  # every base crop the same
    batch, plain = method.views(crops, StepRNG(0, 2, 3)), method.eval().views(crops, StepRNG(0, 2, 3))
    for volume in batch["crops"][:, :6].flatten(2):
        assert len(volume.unique(dim=0)) > 1
    assert batch["crops"].shape == plain["crops"].shape and bool(batch["crops"].isfinite().all())
    for key in ("overlap", "offset", "base", "random"):
        assert torch.equal(batch[key], plain[key])


def test_only_whole_voxel_alterations_keep_the_voxels(make_voco, voco_crops, voco_batch):
    """Flips and quarter turns move voxels; turns only in the plane whose axes are alike."""
    method = make_voco(mirror=0.5, rot90=1.0, intensity=0.0)
    crops = voco_crops(method, 2)
    batch, plain = method.views(crops, StepRNG(0, 2, 2))["crops"], method.eval().views(crops, StepRNG(0, 2, 2))["crops"]
    assert torch.equal(batch.flatten(2).sort(2).values, plain.flatten(2).sort(2).values)
    planes = [x.flatten(4).sort(4).values for x in (batch, plain)]  # of each slice along the first axis
    matches = [(planes[0] == other).flatten(2).all(2) for other in (planes[1], planes[1].flip(3))]
    assert bool((matches[0] | matches[1]).all()) and not torch.equal(batch, plain)
    thick = make_voco(mirror=0.0, rot90=1.0, intensity=0.0, plan={"spacing": (1.0, 1.0, 2.0)})
    trained, held_out = voco_batch(thick), voco_batch(thick.eval())
    assert torch.equal(trained["crops"], held_out["crops"])


@pytest.mark.parametrize("arch", ["plain", "resenc"])
def test_gradients(make_voco, arch, voco_batch):
    """(28) Each encoder parameter and the projector learn; decoder and teacher do not."""
    method = make_voco(arch)
    terms = method(voco_batch(method))
    terms["total"].backward()
    encoder = {id(p) for p in unwrap(method.network).encoder.parameters()}
    for name, p in method.named_parameters():
        if id(p) in encoder or name.startswith("projector"):
            assert p.requires_grad and p.grad is not None and bool(p.grad.isfinite().all()), name
        else:
            assert not p.requires_grad and p.grad is None, name
    optimised = {id(p) for g in method.optimiser().param_groups for p in g["params"]}
    assert not optimised & {id(p) for p in method.teacher.parameters()}
    assert method.pretrained_parts() == {"encoder": True, "decoder_stages": []}


def terms_by_hand(method, batch):
    """The terms from the embeddings, volume by volume."""
    z, t, _, _ = method.embeddings(batch, everyone=False)
    n, loss = int(np.prod(method.grid)), PositionLoss()
    intra = [loss(batch["overlap"][i : i + 1], similarity(z[i, n:], t[i, :n])[None]) for i in range(len(z))]
    inter = []
    for i in range(len(z)):
        j = (i + 1) % len(z)
        inter.append(loss(similarity(t[i, n:], t[j, :n])[None], similarity(z[i, n:], z[j, :n])[None]))
    return sum(intra) / len(z), sum(inter) / len(z), orthogonality(z[:, :n])


def test_terms(make_voco, voco_batch):
    """Total = intra + inter + reg with the published weights; volume i is compared with i + 1."""
    method = make_voco()
    for p in method.teacher.parameters():  # so that it differs from the student
        p.add_(0.1 * torch.randn_like(p))
    batch = voco_batch(method)
    terms = method(batch)
    for value, key in zip(terms_by_hand(method, batch), ("intra", "inter", "reg")):
        torch.testing.assert_close(terms[key], value)
    torch.testing.assert_close(terms["total"], terms["intra"] + terms["inter"] + terms["reg"])
    weighted = make_voco(intra_weight=2.0, inter_weight=0.5, reg_weight=0.25)
    weighted.load_state_dict(method.state_dict())
    again = weighted(batch)
    torch.testing.assert_close(again["total"], 2 * terms["intra"] + 0.5 * terms["inter"] + 0.25 * terms["reg"])
    assert list(terms)[:5] == ["total", "intra", "inter", "reg", "position_learnt"]
    assert float(terms["position_learnt"]) == pytest.approx(
        1 - float(terms["intra"]) / method.levels.constant, abs=1e-6
    )
    assert float(terms["top1_chance"]) == pytest.approx(1 / 6) and float(terms["skipped"]) == 0


def test_gradients_of_the_terms(make_voco, voco_batch):
    """(20, 21) Intra reaches random crops' vectors only; inter both of the student's, none of the teacher's."""
    method = make_voco(feature_dropout=0.0)
    batch = voco_batch(method)
    seen = {}

    def embeddings(batch, *, everyone):
        z, t, pooled, kept = type(method).embeddings(method, batch, everyone=everyone)
        seen.update(z=z.detach().requires_grad_(), t=t.detach().requires_grad_())
        return seen["z"], seen["t"].detach(), pooled, kept

    method.embeddings = embeddings
    n = 6
    method(batch)["intra"].backward()
    assert seen["t"].grad is None and bool((seen["z"].grad[:, :n] == 0).all()) and bool(seen["z"].grad[:, n:].any())
    for p in method.teacher.parameters():
        p.mul_(-1)
    method(batch)["inter"].backward()
    assert bool(seen["z"].grad[:, :n].any()) and bool(seen["z"].grad[:, n:].any())


def test_inter_of_equal_networks_is_nothing(make_voco, voco_batch):
    """(25) Student equal to teacher, without feature dropout: nothing to learn from each other, whatever the positions."""
    method = make_voco(feature_dropout=0.0)
    terms = method(voco_batch(method))
    assert abs(float(terms["inter"])) < 1e-4 and float(terms["intra"]) > 0.1
    for p in method.teacher.parameters():
        p.add_(0.2 * torch.randn_like(p))
    assert float(method(voco_batch(method))["inter"]) > 1e-3


def test_partners(make_voco):
    """(25) Round the batch, past volumes that do not count; of the same dataset where asked for; none where alone."""
    method = make_voco()
    name = torch.tensor([1, 2, 1, 2])

    def partners(counts):
        return [x.tolist() for x in method.partners(torch.tensor(counts, dtype=torch.bool), name)]

    assert partners([1, 1, 1, 1]) == [[1, 2, 3, 0], [True] * 4]
    found, paired = partners([1, 0, 1, 1])
    assert [found[0], found[2], found[3]] == [2, 3, 0] and paired == [True, False, True, True]
    assert partners([0, 0, 1, 0])[1] == [False] * 4
    method = make_voco(pairing="dataset")
    assert partners([1, 1, 1, 1]) == [[2, 3, 0, 1], [True] * 4]
    assert partners([1, 1, 1, 0])[1] == [True, False, True, False]


def test_one_volume_has_nothing_to_compare(make_voco, caplog, voco_batch):
    """(25) B = 1: the term is off, with one warning."""
    method = make_voco()
    with caplog.at_level(logging.WARNING, logger="nnssl"):
        for step in range(2):
            terms = method(voco_batch(method, 1, step=step))
    assert float(terms["inter"]) == 0 and float(terms["intra"]) > 0
    assert sum("inter-volume" in r.message for r in caplog.records) == 1


def test_feature_dropout_never_drops_a_crop(make_voco, voco_batch):
    """(25, B1) Entries are dropped, never whole rows, unless asked for as in the released code; none in evaluation."""
    method = make_voco(feature_dropout=0.5)
    kept = voco_batch(method, 8)["kept"]
    assert kept.shape == (8, 9, method.width) and 0.4 < float(kept.float().mean()) < 0.6
    assert bool(kept.any(2).all()) and not bool(kept.all(2).any())
    rows = voco_batch(make_voco(feature_dropout=0.5, drop_rows=True), 8)["kept"]
    assert rows.shape == (8, 9, 1) and 0.2 < float(rows.float().mean()) < 0.8
    batch = voco_batch(method)
    z = method.embeddings(batch, everyone=False)[0]
    torch.testing.assert_close(z, method.embeddings({**batch, "kept": batch["kept"]}, everyone=False)[0])
    clean = method.embeddings({k: v for k, v in batch.items() if k != "kept"}, everyone=False)[0]
    assert not torch.allclose(z, clean)


def alike(x):
    return float(similarity(x, x, relu=False).mean())


def test_pooled_features_are_standardised(make_voco, voco_batch):
    """(27) InstanceNorm makes pooled features nearly equal; standardised over the batch they are not."""
    method = make_voco()
    seen = {}
    method.projector.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    batch = voco_batch(method.eval())
    pooled = method.embeddings(batch, everyone=False)[2].flatten(0, 1)
    assert alike(pooled) > 0.97
    torch.testing.assert_close(seen["x"].mean(0), torch.zeros(method.width), atol=1e-4, rtol=0)
    spread = seen["x"].std(0, unbiased=False)
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=0.2, rtol=0)
    assert alike(seen["x"]) < 0.2
    raw = make_voco(standardise=False)
    raw.projector.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    raw.embeddings(voco_batch(raw.eval()), everyone=False)
    assert alike(seen["x"]) > 0.97


def test_teacher(make_voco, voco_batch):
    """(23, 24) It changes by after_step alone, once per optimiser step; forwards and evaluation leave it as it is."""
    method = make_voco()
    start = [p.clone() for p in method.teacher.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(start, method.projector.parameters()))
    method(voco_batch(method))["total"].backward()
    method.eval()(voco_batch(method))
    method.optimiser().step()
    assert all(torch.equal(a, b) for a, b in zip(start, method.teacher.parameters()))
    method.after_step(Progress(1, 2, 0, 1))
    for t, t0, s in zip(method.teacher.parameters(), start, method.projector.parameters()):
        torch.testing.assert_close(t, 0.9 * t0 + 0.1 * s, rtol=1e-6, atol=1e-8)
    assert not any(p.requires_grad for p in method.teacher.parameters())
    make_voco(teacher="none", inter_weight=0.0).after_step(Progress(1, 2, 0, 1))


@pytest.mark.parametrize("preset", ["tpami", "paper", "released", "nnssl", "voco_v1"])
def test_presets_take_a_step(make_voco, preset, voco_batch):
    cls = get_method("voco")
    options = cls.presets[preset]
    assert set(options) <= {f.name for f in fields(cls.Config)}
    method = make_voco(**{**options, "proj_dim": 24, "random_crops": 3})
    terms = method(voco_batch(method))
    assert bool(terms["total"].isfinite())
    terms["total"].backward()
    assert ("teacher" in dict(method.named_children())) == (method.config.teacher == "ema")
    if preset == "nnssl":
        assert float(terms["inter"]) == 0 and method.projector.norm == "row"
    if preset == "tpami":
        assert method.config.standardise and not method.config.reg_detach


# ---- what a person sees ----------------------------------------------------------------------------------------------


def test_pictures(make_voco, voco_batch):
    method = make_voco().eval()
    picture = method.pictures(voco_batch(method, 5))
    assert list(picture.columns) == [CELLS, TRUE, GUESS]
    for column in picture.columns.values():
        assert column.shape == (4, 24, 16, 3) and column.min() >= 0 and column.max() <= 1
    true = picture.columns[TRUE]
    redness = true[..., 0] - true[..., 1:].mean(-1)
    batch = voco_batch(method, 5)
    cell = int(batch["overlap"][0, 0].argmax())
    y, x = 8 * (cell // 2) + 3, 8 * (cell % 2) + 3
    assert redness[0, y, x] > 0.05


def test_embedding_and_verdict(make_voco, voco_batch):
    method = make_voco().eval()
    batch = voco_batch(method)
    assert method.embed(batch).shape == (27, 24)
    level = method.levels.constant
    terms = {"intra": 0.5 * level, "constant": level, "position_learnt": 0.5, "top1": 0.7, "top1_chance": 1 / 6}
    before = {**terms, "intra": 0.9 * level, "top1": 0.3}
    learnt, sentence = method.verdict(before, terms)
    assert learnt and "(30 % before, 17 % by chance)" in sentence
    assert learnt and "position learnt: 50 %" in sentence and "70 %" in sentence
    learnt, sentence = method.verdict(before, {**terms, "intra": 0.95 * level})
    assert not learnt and "did not learn" in sentence and "not clearly below" in sentence


def test_random_features_below_the_best_constant_have_not_learnt(make_voco):
    """Overlapping crops share content: what counts is also the change since before training."""
    method = make_voco().eval()
    level = method.levels.constant
    before = {"intra": 0.85 * level, "constant": level, "position_learnt": 0.15, "top1": 0.34, "top1_chance": 1 / 6}
    assert not method.verdict(before, before)[0]
    learnt, sentence = method.verdict(before, {**before, "intra": 0.8 * level, "top1": 0.5})
    assert not learnt and f"not clearly below the {0.85 * level:.3g} before training" in sentence
    assert not method.verdict(before, {**before, "intra": 0.5 * level})[0]  # vectors apart, no more cells found
    assert method.verdict(before, {**before, "intra": 0.5 * level, "top1": 0.5})[0]
    assert method.verdict({**before, "top1": 1.0}, {**before, "intra": 0.5 * level, "top1": 1.0})[0]


def test_views_are_a_function_of_the_sample(make_voco, voco_crops):
    """The second half of a batch is made alike on a rank of its own."""
    method = make_voco()
    crops = voco_crops(method, 4)
    whole = method.views(crops, StepRNG(0, 5, 4))
    half = Crops(**{k: v[2:] for k, v in vars(crops).items() if v is not None})
    part = method.views(half, StepRNG(0, 5, 4, 2, 2))
    for key, value in part.items():
        torch.testing.assert_close(value, whole[key][2:], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"weighting": "binary"}, {"weighting": "all"}, {"pool": "batch"}], ids=str)
def test_what_has_no_place_does_not_count(make_voco, options, voco_batch):
    """A random crop that found no place and a base crop of air may show anything: no term notices."""
    method = make_voco(**options)
    batch = voco_batch(method, 3)
    n = batch["base"].shape[1]
    batch = {**batch, "random": torch.ones_like(batch["random"]), "base": torch.ones_like(batch["base"])}
    batch["random"][1, 2] = batch["base"][0, 4] = False
    other = {**batch, "crops": batch["crops"].clone(), "overlap": batch["overlap"].clone()}
    for sample, crop in ((1, n + 2), (0, 4)):
        other["crops"][sample, crop] = 3 * torch.randn(other["crops"].shape[2:])
    other["overlap"][1, 2] = torch.rand(n)
    other["overlap"][0, :, 4] = torch.rand(other["overlap"].shape[1])
    with torch.no_grad():
        before, after = method(batch), method(other)
        counted = method({**other, "random": torch.ones_like(batch["random"]), "base": torch.ones_like(batch["base"])})
    for name in ("total", "intra", "inter", "reg", "mae", "base_cosine", "dead", "position_learnt"):
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-4, msg=name)
        assert name in ("dead",) or abs(float(counted[name] - before[name])) > 1e-4, name
