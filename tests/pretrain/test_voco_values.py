"""Volume contrast by hand values: presets as published, what is watched, teacher, warnings, levels and pictures."""

import logging

import numpy as np
import pytest
import torch

from nnssl.config import make_config
from nnssl.networks import unwrap
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods import SourceStats, get_method
from nnssl.pretrain.methods.voco.levels import chance_levels
from nnssl.pretrain.methods.voco.method import Embeddings
from nnssl.pretrain.methods.voco.picture import CELLS, GUESS, TRUE, overlap_picture

FLAT = ((1, 1, 1), (1, 2, 2), (2, 2, 2))


def views(method, crops, seed=0):
    with torch.no_grad():
        return method.views(crops, StepRNG(seed, 0, len(crops)))


# ---- options ---------------------------------------------------------------------------------------------------------

COMMON = {"standardise": False, "gather": False, "lr": 1e-4, "random_crops": 2, "weight_decay": 1e-2, "mirror": 0.2}
TEACHER = {"teacher": "ema", "momentum": 0.9, "inter_weight": 1.0, "proj_dim": 1024, "proj_norm": "batch"}
ALONE = {"teacher": "none", "inter_weight": 0.0, "proj_dim": 2048, "feature_dropout": 0.0}
PUBLISHED = {  # the tables of docs/methods/voco.md
    "paper": {**COMMON, **TEACHER, "relu": False, "weighting": "all", "reg": "linear", "reg_detach": False},
    "released": {
        **COMMON, **TEACHER, "relu": True, "weighting": "overlap", "negatives": "log", "pool": "volume", "reg": "square",
        "reg_detach": True, "feature_dropout": 0.2, "drop_rows": True, "intensity": 0.0,
    },
    "nnssl": {
        **COMMON, **ALONE, "random_crops": 4, "weighting": "overlap", "negatives": "square", "pool": "batch",
        "reg": "linear", "reg_detach": False, "proj_norm": "row", "intensity": 0.2,
    },
    "voco_v1": {
        **COMMON, **ALONE, "weighting": "binary", "negatives": "square", "pool": "volume", "reg": "square",
        "reg_detach": False, "proj_norm": "batch", "intensity": 0.0,
    },
    "tpami": {
        **COMMON, **TEACHER, "random_crops": 4, "standardise": True, "gather": True, "lr": 3e-4, "relu": True,
        "weighting": "overlap", "negatives": "log", "reg_detach": False, "feature_dropout": 0.2, "drop_rows": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_what_was_published(preset, make_voco):
    cls = get_method("voco")
    config = make_config(cls.Config, {}, cls.presets[preset])
    assert {k: getattr(config, k) for k in PUBLISHED[preset]} == PUBLISHED[preset]
    assert config.intra_weight == config.reg_weight == 1 and cls.grad_clip == 1
    told = cls.crops(make_voco().plan, SourceStats((6, 26, 18), 5), config, (4, 8, 8)).explanation
    assert f"6 cells and {config.random_crops} random crops each" in told


def test_a_batch_is_four_volumes_and_any_term_may_be_left_out(make_voco):
    request = make_voco().request
    assert (request.batch_size, request.min_batch) == (4, 1)
    for weights in ((1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1)):
        make_voco(**dict(zip(("intra_weight", "inter_weight", "reg_weight"), weights)))


# ---- views -----------------------------------------------------------------------------------------------------------


def test_a_volume_counts_from_four_cells_on(make_voco, make_crops):
    method = make_voco()
    crops = make_crops(method, 3)
    crops.body[:] = True
    for i, first in enumerate((0, 1, 2)):  # cells of 8x8, three down and two across: 6, 5 and 4 that show body
        for cell in range(first):
            row, column = divmod(cell, 2)
            crops.body[i, :, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = False
    assert views(method, crops)["base"].sum(1).tolist() == [6, 5, 4]
    crops.body[2, :, :, 8:16, :8] = False
    batch = views(method, crops)
    assert batch["base"].sum(1).tolist() == [6, 5, 0] and not batch["random"][2].any()


def test_windows_made_by_hand_are_whole_images(make_voco, make_crops):
    """Without the image's shape the window is all of it, wherever it starts; the picture gets the first channel."""
    method = make_voco(channels=2)
    crops = make_crops(method, 2, start=5)
    data, inside, finite = method.windows(crops, torch.full((2, 2), -2.0))
    assert torch.equal(data, crops.data) and inside.all() and finite.all()
    assert torch.equal(views(method.eval(), crops)["window"], crops.data[:, :1])


# ---- what is learnt --------------------------------------------------------------------------------------------------


def test_two_volumes_are_each_others(make_voco, make_batch):
    """(25) B = 2 pairs volumes 0 and 1: their term is as of volumes 0, 1 of which each is the other's next."""
    method = make_voco(feature_dropout=0.0)
    for p in method.teacher.parameters():
        p.add_(0.2 * torch.randn_like(p))
    batch = make_batch(method, 2)
    batch["base"][:] = batch["random"][:] = True
    assert [x.tolist() for x in method.partners(batch["base"].any(1), batch["dataset"])] == [[1, 0], [True, True]]
    with torch.no_grad():
        assert float(method(batch)["inter"]) > 1e-3


def test_dropout_keeps_the_mean_of_a_feature(make_voco, make_batch):
    """What is kept of half of the features counts twice; the teacher sees all."""
    method, seen = make_voco(feature_dropout=0.5), {}
    method.projector.register_forward_pre_hook(lambda _, args: seen.update(student=args[0]))
    method.teacher.module.register_forward_pre_hook(lambda _, args: seen.update(teacher=args[0]))
    batch = make_batch(method, 3)
    with torch.no_grad():
        method(batch)
    kept = batch["kept"].flatten(0, 1)
    torch.testing.assert_close(seen["student"][kept], 2 * seen["teacher"][kept])
    assert not seen["student"][~kept].any() and bool((seen["teacher"][~kept] != 0).any())


def test_the_decoder_is_not_run(make_voco, make_batch):
    """Of the network only the encoder is looked at: a pass through a decoder stage would be time lost."""
    method = make_voco()

    def fail(*_):
        pytest.fail("the decoder was run")

    for module in unwrap(method.network).decoder.stages:
        module.register_forward_hook(fail)
    method(make_batch(method, 2))["total"].backward()


def test_each_rank_embeds_its_own_crops(make_voco, make_batch, monkeypatch):
    """Where the batch is not gathered these are all that there are, on any rank; where it is, the rank's part."""
    method = make_voco()
    batch = make_batch(method.eval(), 3)
    whole = method.embed(batch)
    monkeypatch.setattr("nnssl.pretrain.methods.voco.method.rank", lambda: 1)
    assert torch.equal(method.embed(batch), whole)
    z = torch.arange(6.0).view(6, 1, 1).expand(6, 9, 2)  # of two ranks
    method.embeddings = lambda batch, everyone: Embeddings(z, None, None, None)
    assert method.embed(batch)[:, 0].unique().tolist() == [3, 4, 5]


# ---- what a person sees ----------------------------------------------------------------------------------------------


def test_numbers_for_the_log_by_hand(make_voco):
    """Three volumes of four cells; the last one does not count, and in the second one cell."""
    method = make_voco(random_crops=2)
    base = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    random = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    overlap, cosine = torch.zeros(3, 2, 4), torch.full((3, 2, 4), 0.9)
    overlap[0, 0], cosine[0, 0] = torch.tensor([0.5, 0.49995, 0, 0]), torch.tensor([0.3, 0.4, -0.2, 0.1])  # wrong: 1
    overlap[0, 1], cosine[0, 1] = torch.tensor([0.0, 0, 0.5, 0.5]), torch.tensor([0.1, 0.0, -0.5, 0.2])  # right: 3
    overlap[1, 0], cosine[1, 0] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.8, 0.1, 0.3, 0.9])  # right: 0 of 3
    overlap[1, 1, 0] = 1.0
    q = torch.eye(4).repeat(3, 1, 1)
    q[1, 1] = q[1, 0]  # of its three cells two are alike
    valid = random[:, :, None] & base[:, None]
    intra = torch.tensor(0.25 * method.levels.constant)
    told = {k: float(v) for k, v in method._watched(intra, cosine, overlap, valid, q, base).items()}
    off = (0.2 + 0.09995 + 0 + 0.1) + (0.1 + 0 + 0.5 + 0.3) + (0.2 + 0.1 + 0.3)
    expected = {
        "position_learnt": 0.75,
        "top1": 2 / 3,
        "top1_chance": (1 / 4 + 1 / 4 + 1 / 3) / 3,
        "mae": off / 11,
        "base_cosine": (0 + 1 / 3 + 0) / 3,
        "dead": 1 / 5,  # one of the five overlaps has a cosine of at most 0
        "constant": method.levels.constant,
        "skipped": 1 / 3,
    }
    assert told == pytest.approx(expected, abs=1e-6)
    cosine[0, 1, 2] = 0.0
    again = method._watched(intra, cosine, overlap, valid, q, base)
    assert float(again["dead"]) == pytest.approx(1 / 5), "ReLU has no gradient at 0 either"


def test_spread_of_the_features_is_the_mean_over_channels(make_voco, make_batch):
    method = make_voco().eval()
    batch = make_batch(method, 3)
    with torch.no_grad():
        found = method.pooled(batch["crops"].flatten(0, 1)).std(0)
        assert found.max() > 1.5 * found.min()
        assert float(method(batch)["feature_std"]) == pytest.approx(float(found.mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("volumes", "options", "alone", "few"),
    [(1, {}, True, 9), (1, {"inter_weight": 0.0}, False, 9), (2, {}, False, 18), (2, {"random_crops": 4}, False, None)],
)
def test_warnings_of_small_batches(make_voco, make_batch, caplog, volumes, options, alone, few):
    """One volume has none to be compared with; statistics over fewer than 20 crops are told of, each once."""
    method = make_voco(**options)
    with caplog.at_level(logging.WARNING, logger="nnssl"), torch.no_grad():
        for step in range(2):
            method(make_batch(method, volumes, step=step))
    told = [r.getMessage() for r in caplog.records]
    assert sum("inter-volume term is off" in m for m in told) == alone
    assert [m for m in told if "batch statistics" in m] == (
        [] if few is None else [f"The batch statistics rest on {few} crops only; 20 are better."]
    )


def test_curves_are_shares_of_crops_beside_what_knows_nothing(make_voco):
    place, found, apart, between = make_voco().curves()
    assert [(level.term, level.factor) for level in place.levels] == [("constant", 1.0), ("constant", 0.9)]
    assert found.percent and found.levels[0].term == "top1_chance"
    assert not (place.percent or apart.percent or between.percent)
    assert [list(c.lines) for c in (place, found, apart, between)] == [["intra"], ["top1"], ["base_cosine"], ["inter"]]
    assert len(make_voco(inter_weight=0.0).curves()) == 3


@pytest.mark.parametrize(
    ("grid", "constant", "similarity"), [((3, 3, 1), 0.592, 0.19), ((4, 4, 1), 0.591, 0.19), ((2, 2, 1), 0.304, 0.40)]
)
def test_the_best_constant_similarity(grid, constant, similarity):
    """64 voxels, two random crops; measured by sampling. With squares it is another one."""
    levels = chance_levels((64, 64, 64), grid, crops=2)
    assert levels.similarity == pytest.approx(similarity, abs=0.011)
    assert levels.constant == pytest.approx(constant, rel=0.03)
    square = chance_levels((64, 64, 64), grid, crops=2, negatives="square")
    assert square.similarity == pytest.approx(0.31 if grid[0] > 2 else 0.42, abs=0.011)


def test_levels_of_crops_of_one_voxel():
    """Each offset is a cell: the overlap is 1 in one of six cells. At s the loss is -ln(s) - ln(1 - s): best 1/2, 2 ln 2."""
    levels = chance_levels((1, 1), (2, 3))
    assert levels.similarity == pytest.approx(0.5, abs=1e-4) and levels.constant == pytest.approx(
        2 * np.log(2), abs=1e-5
    )
    # with eps = 1e-6 in each logarithm and in the sum of the overlaps
    assert levels.orthogonal == pytest.approx(-np.log(1e-6) / (1 + 1e-6) - 1e-6, rel=1e-8)
    assert levels.collapse == pytest.approx(-np.log(1e-6) - 1e-6, rel=1e-8)
    square = chance_levels((1, 1), (2, 3), negatives="square")  # -ln(s) + s^2: best 1/sqrt(2)
    assert square.similarity == pytest.approx(0.5**0.5, abs=1e-4)
    assert square.constant == pytest.approx(0.5 * np.log(2) + 0.5, abs=1e-5) and square.collapse == pytest.approx(
        1, abs=2e-6
    )
    every = chance_levels((1, 1), (2, 3), weighting="all")  # (-ln(s) - 5 ln(1 - s)) / 6: best 1/6
    assert every.similarity == pytest.approx(1 / 6, abs=1e-4)
    assert every.constant == pytest.approx((np.log(6) + 5 * np.log(1.2)) / 6, abs=1e-5)


@pytest.mark.parametrize(("crops", "some"), [(1, 16 / 25), (2, 1 - (9 / 25) ** 2)])
def test_more_random_crops_leave_a_cell_without_overlap_more_often(crops, some):
    """Two by two cells of 4 voxels: 3 of 5 offsets of an axis touch both cells, so that 9 of 25 crops touch all four."""
    levels = chance_levels((4, 4), (2, 2), crops=crops)
    alone = chance_levels((4, 4), (2, 2), crops=crops, negatives="square")
    assert levels.collapse - alone.collapse == pytest.approx(some * (-np.log(1e-6) - 1), rel=1e-5)


SIZE, GRID = (3, 4, 5), (1, 2, 2)
WINDOW = (3, 8, 10)
BLUE, RED = (0.2, 0.5, 1.0), np.array([1.0, 0.1, 0.1])


def shown(n=5):
    """Windows of three slices of ramps; the middle one is looked at."""
    ramp = torch.linspace(0, 1, 80).view(1, 1, 8, 10)
    window = torch.stack([ramp, 2 * ramp.square(), 1 - ramp], 2).repeat(n, 1, 1, 1, 1)
    overlap = torch.tensor([0.5, 0.25, 0.25, 0.0]).repeat(n, 2, 1)
    overlap[:, 1] = 0.25  # of another random crop, which is not drawn
    predicted = torch.tensor([1.5, -0.5, 0.5, 0.0]).repeat(n, 2, 1)
    predicted[:, 1] = 0.9
    predicted[1, 0] = torch.tensor([0.2, 0.1, 0.9, 0.0])
    predicted[2, 0, 3] = 2.0
    predicted[3, 0] = torch.tensor([0.3, 0.2, 0.1, 0.0])
    base = torch.ones(n, 4, dtype=torch.bool)
    base[2, 3] = False
    offset = torch.tensor([[0, 1, 2], [0, 4, 5]]).repeat(n, 1, 1)
    return {"window": window, "overlap": overlap, "base": base, "offset": offset}, predicted


def test_a_picture_by_hand():
    """Cells of 4x5 voxels with blue lines, a box around the crop, and red where it overlaps or is found alike."""
    batch, predicted = shown()
    picture = overlap_picture(batch, predicted, SIZE, GRID)
    plain, true, guess = (picture.columns[k][0] for k in (CELLS, TRUE, GUESS))
    assert plain.shape == (8, 10, 3) and len(picture.columns[CELLS]) == 4
    for caption in (CELLS, TRUE, GUESS):
        assert picture.boxes[caption].tolist() == [[1, 2, 4, 5]] * 4  # 4x5 voxels from (1, 2) on
    lines = np.zeros((8, 10), bool)
    lines[4], lines[:, 5] = True, True
    values = 2 * np.linspace(0, 1, 80).astype(np.float32) ** 2
    low, high = np.percentile(values, (0.5, 99.5))
    grey = ((values - low) / (high - low)).clip(0, 1).reshape(8, 10)
    for image, heat in ((plain, np.zeros(4)), (true, [0.5, 0.25, 0.25, 0]), (guess, [1, 0, 0.5, 0])):
        weight = 0.7 * np.kron(np.reshape(heat, (2, 2)), np.ones((4, 5)))[..., None]
        assert np.allclose(image[~lines], ((1 - weight) * grey[..., None] + weight * RED)[~lines], atol=1e-5)
        assert np.allclose(image[lines], BLUE)
    right, wrong = ("most similar cell (any depth): " + text for text in ("the right one", "a wrong one"))
    assert picture.tags == {GUESS: [right, wrong, right, right]}, "a cell that does not count is no guess"


def test_a_picture_of_slices_and_of_one_value():
    batch, predicted = ({k: v[:1] for k, v in x.items()} if isinstance(x, dict) else x[:1] for x in shown())
    batch = {**batch, "window": torch.full((1, 1, 8, 10), 7.0), "offset": batch["offset"][..., 1:]}
    picture = overlap_picture(batch, predicted, SIZE[1:], GRID[1:])
    plain = picture.columns[CELLS][0]
    assert not plain[0, 0].any() and np.allclose(plain[4, 2], BLUE) and len(picture.tags[GUESS]) == 1
    assert picture.boxes[CELLS].tolist() == [[1, 2, 4, 5]]
