"""Linear probes: pieces of a case, features at voxels, the fitted layer, Dice, folds, sentences, and the whole command."""

import csv
import inspect
import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional

from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.plans import Plan, derive, load_plan
from nnssl.preprocessed import read_box
from nnssl.probe import Case, Classes, Difference, Extractor, Fold, Linear, Row, Samples, choose_folds, fit, probe
from nnssl.probe import linear as linear_module
from nnssl.probe.cli import main, parser
from nnssl.probe.features import draw_voxels, stages_of
from nnssl.probe.scores import dice_of
from nnssl.probe.sources import name_checkpoints
from nnssl.probe.verdict import choose_sentence, compare, sentence
from nnssl.probe.windows import tile
from nnssl.weights import build_payload, save, write_variant

CPU = torch.device("cpu")
ONE = Classes(("organ",), ((1,),), False, None)
TWO = Classes(("liver", "spleen"), ((1,), (2,)), False, None)
REGIONS = Classes(("whole", "core"), ((1, 2), (2,)), True, None)


@pytest.fixture
def dataset(tiny_preprocessed):
    tiny_preprocessed(901, n=5)
    return load_plan(901)


def case_of(shape, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(channels, *shape)).astype(np.float32)
    return Case("c", image, rng.integers(0, 3, shape).astype(np.int16))


def store(path, network, plan, stages=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"encoder": True, "decoder_stages": list(stages)}
    options = {"config": {}, "crop_size": plan.patch_size, "pretrained_parts": parts, "data": {"fingerprint": "x"}}
    save(path, build_payload(network, plan, method="mae", **options))
    return path


def random_network(plan, seed):
    torch.manual_seed(seed)
    return build_network(plan)


@pytest.mark.parametrize("shape", [(20, 28, 20), (7, 60, 33), (16, 24, 16), (3, 5, 90)])
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize("step", [0.5, 1.0])
def test_each_voxel_belongs_to_one_piece(plan_of, shape, configuration, step):
    plan = plan_of(configuration, both=True)
    count, windows = np.zeros(shape, int), tile(plan, shape, step)
    image = np.arange(math.prod(shape), dtype=np.float32).reshape(1, *shape)
    for window in windows:
        count[window.box] += 1
        piece = read_box(image, window.start, window.size)
        assert piece.shape == (1, *window.size)
        assert np.array_equal(piece[(slice(None), *window.inner)], image[(slice(None), *window.box)])
        inside = window.size[-plan.dim :]
        assert all(n % s == 0 and n <= p for n, s, p in zip(inside, plan.total_stride, plan.patch_size))
        assert math.prod(n // s for n, s in zip(inside, plan.total_stride)) > 1
    assert (count == 1).all()
    for a in windows:  # of all pieces that hold a voxel, the one whose middle is nearest
        middle = [s + (n - 1) / 2 for s, n in zip(a.start, a.size)][-plan.dim :]
        for axis, (low, high) in enumerate(a.own[-plan.dim :]):
            for b in windows:
                other = (b.start[-plan.dim :][axis]) + (b.size[-plan.dim :][axis] - 1) / 2
                assert all(abs(v - middle[axis]) <= abs(v - other) + 1 for v in (low, high - 1))


@pytest.mark.parametrize(
    ("configuration", "arch", "channels"), [("3d_fullres", "plain", 2), ("2d", "plain", 1), ("3d_fullres", "resenc", 1)]
)
def test_features_and_predictions_agree_with_interpolated_maps(plan_of, configuration, arch, channels):
    plan = plan_of(configuration, arch=arch, channels=channels, dim=2 if configuration == "2d" else 3)
    case = case_of((18, 30, 21), channels)
    extractor = Extractor(random_network(plan, 1), plan, 2, CPU, 0.75)
    voxels = np.random.default_rng(1).integers(0, case.labels.shape, (40, 3))
    found = extractor.sample(case, voxels)
    assert found.shape == (40, stages_of(plan, 2).columns)
    whole = np.zeros((found.shape[1], *case.labels.shape), np.float32)
    for window in extractor.windows(case):
        maps = extractor.maps(read_box(case.image, window.start, window.size))
        if plan.dim == 3:
            up = [functional.interpolate(m[None], size=window.size, mode="trilinear")[0] for m in maps]
        else:  # slice by slice
            slices = [functional.interpolate(m.transpose(0, 1), size=window.size[1:], mode="bilinear") for m in maps]
            up = [s.transpose(0, 1) for s in slices]
        whole[(slice(None), *window.box)] = torch.cat(up)[(slice(None), *window.inner)].numpy()
    assert np.allclose(found.numpy(), whole[(slice(None), *voxels.T)].T, atol=1e-4)
    layers = [Linear(torch.randn(3, stages_of(plan, n).columns), torch.randn(3)) for n in (0, 2)]
    for layer, masks in zip(layers, extractor.predict(case, layers, TWO)):
        logits = layer(torch.from_numpy(whole[: layer.weight.shape[1]].reshape(layer.weight.shape[1], -1).T))
        best, second = logits.topk(2).values.T
        clear = (best - second > 1e-3).numpy().reshape(case.labels.shape)
        winner = logits.argmax(1).numpy().reshape(case.labels.shape)
        assert clear.mean() > 0.9
        assert all(np.array_equal(masks[i][clear], winner[clear] == i + 1) for i in (0, 1))


def test_tokens_of_a_primus(plan_of):
    plan = derive(plan_of(patch=(16, 24, 16)), "p", network="primus:36,1,2")
    extractor = Extractor(random_network(plan, 0), plan, 0, CPU)
    found = extractor.sample(case_of((20, 20, 20)), np.array([[0, 0, 0], [19, 19, 19]]))
    assert found.shape == (2, 36) and stages_of(plan, 0).columns == 36 and bool(found.isfinite().all())


def test_voxels_are_drawn_by_label_and_stand_for_all():
    case = case_of((8, 9, 10))
    case.labels[0] = -1
    voxels, stands = draw_voxels(case, 50, 3)
    again, _ = draw_voxels(case, 50, 3)
    assert np.array_equal(voxels, again) and len(voxels) == 150 and len(np.unique(voxels, axis=0)) == 150
    labels = case.labels[tuple(voxels.T)]
    assert sorted(np.unique(labels)) == [0, 1, 2]
    assert stands.sum() == pytest.approx((case.labels >= 0).sum())
    assert stands[labels == 1].sum() == pytest.approx((case.labels == 1).sum())
    assert not np.array_equal(voxels, draw_voxels(case, 50, 4)[0])


@pytest.mark.parametrize("classes", [TWO, REGIONS])
def test_the_layer_is_the_minimum_of_its_objective(classes, monkeypatch):
    """Against scipy, on the balanced objective written out; the bias is not moved here."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 20, 10])
    x = rng.normal(size=(70, 4)) * [1, 5, 0.2, 1] + labels[:, None] * [1, 0, 0.2, -1] + 3
    x[:, 1] = 7.0  # a feature that never changes
    monkeypatch.setattr(linear_module, "MOVES", 2)
    monkeypatch.setattr(linear_module, "_dice", lambda *_: 0.0)  # the first move, none, wins
    layer = fit([Samples(torch.from_numpy(x).float(), labels, torch.ones(70))], classes, 4, CPU)
    weights = np.repeat([1 / 120, 1 / 60, 1 / 30], [40, 20, 10])
    mean = weights @ x
    scale = np.sqrt(weights @ (x - mean) ** 2)
    scale[1] = np.inf
    z, k = (x - mean) / scale, classes.n_outputs
    targets = classes.targets(labels)

    def objective(flat):
        w, b = flat[: 4 * k].reshape(k, 4), flat[4 * k :]
        logits = z @ w.T + b
        if classes.regions:
            each = (np.logaddexp(0, logits) - targets.T * logits).sum(1)
        else:
            each = np.log(np.exp(logits).sum(1)) - logits[np.arange(70), targets]
        return weights @ each + 0.5 * linear_module.DECAY * (w**2).sum()

    best = minimize(objective, np.zeros(5 * k), tol=1e-10).x
    expected = z @ best[: 4 * k].reshape(k, 4).T + best[4 * k :]
    got = layer(torch.from_numpy(x).float()).numpy()
    if not classes.regions:  # softmax knows differences only
        expected, got = expected - expected.mean(1, keepdims=True), got - got.mean(1, keepdims=True)
    assert np.allclose(got, expected, atol=5e-3)
    assert float(layer.weight[:, 1].abs().max()) == 0


def test_the_bias_knows_how_frequent_a_class_is():
    """Two overlapping classes, one of which stands for 100 times as many voxels: said as often as gives the best Dice."""
    x = torch.linspace(-3, 3, 200)[:, None]
    labels = (x[:, 0] + torch.sin(40 * x[:, 0]) > 0).numpy().astype(np.int64)
    stands = torch.where(torch.from_numpy(labels) == 0, 100.0, 1.0)
    plain = fit([Samples(x, labels, torch.ones(200))], ONE, 1, CPU)
    rare = fit([Samples(x, labels, stands)], ONE, 1, CPU)
    said = [int((layer(x).argmax(1) == 1).sum()) for layer in (plain, rare)]
    assert 0 < said[1] < said[0]


def test_dice_by_hand():
    labels = np.zeros((1, 2, 4), np.int16)
    labels[0, 0] = [1, 1, 2, -1]
    said = np.zeros((2, 1, 2, 4), bool)
    said[0, 0, 0] = [True, False, True, True]  # the last voxel is ignored
    case = Case("c", None, labels)
    assert np.allclose(dice_of(said, case, TWO), [2 * 1 / (2 + 2), 0.0])
    assert np.allclose(dice_of(said, case, REGIONS), [2 * 2 / (3 + 2), 0.0])
    labels[labels == 2] = 0
    dice = dice_of(said, case, TWO)
    assert dice[0] == pytest.approx(0.5) and math.isnan(dice[1])


def test_classes_of_regions_and_an_ignore_label(tiny_plans, tiny_dataset_json):
    info = tiny_dataset_json()
    info["labels"] = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    info["regions_class_order"] = [1, 2]
    classes = Classes.of(Plan.from_dicts(tiny_plans(), "3d_fullres", info))
    assert classes == Classes(("whole", "core"), ((1, 2), (2,)), True, 3) and classes.n_outputs == 2
    assert classes.targets(np.array([0, 1, 2])).tolist() == [[False, True, True], [False, False, True]]
    info["labels"] = {"background": 0}
    with pytest.raises(NnsslError, match="nothing to segment"):
        Classes.of(Plan.from_dicts(tiny_plans(), "3d_fullres", info))


def test_folds(dataset, tmp_path):
    names = [f"case_{i:03d}" for i in range(5)]
    left_out = choose_folds(dataset)
    assert sorted(f.score[0] for f in left_out) == names
    assert all(set(f.fit) == set(names) - set(f.score) for f in left_out)
    few = choose_folds(dataset, labels=2, seed=3, evaluate="val")
    assert len(few) == 1 and len(few[0].fit) == 2 and sorted({*few[0].fit, *few[0].score}) == names
    file = tmp_path / "score.txt"
    file.write_text("case_003\n\n# not this\ncase_001\n")
    chosen = tmp_path / "fit.txt"
    chosen.write_text("case_000\ncase_002\n")
    assert choose_folds(dataset, labels=str(chosen), evaluate=str(file)) == [
        Fold(("case_000", "case_002"), ("case_003", "case_001"))
    ]
    given = choose_folds(dataset, fold=0, evaluate="val")  # the split of the fixture
    assert given[0].score == ("case_000",) and len(given[0].fit) == 4
    write_variant(dataset, "few", labels=2, seed=1)
    variant = choose_folds(load_plan(901, plans_name="nnUNetPlans_few"))
    assert len(variant) == 2 and {f.score for f in variant} == {f.fit for f in variant}
    with pytest.raises(NnsslError, match="One labelled case"):
        choose_folds(dataset, labels=1)
    with pytest.raises(NnsslError, match="fitted on and scored"):
        choose_folds(dataset, evaluate="val")
    with pytest.raises(NnsslError, match="neither loo, val nor a file"):
        choose_folds(dataset, evaluate="low")
    with pytest.raises(NnsslError, match="no such fold"):
        choose_folds(dataset, fold=7)


def row(name, cases, difference=None, inits=()):
    cases = np.array(cases, float)
    return Row(name, "encoder", 0, cases, cases[:1], inits, difference)


def test_interval_and_sentences():
    d = compare(np.array([11.0, 12, 13, np.nan]), np.array([10.0, 10, 10, 5]))
    assert d.mean == 2 and d.cases == 3
    assert d.high - d.mean == pytest.approx(4.302653 / math.sqrt(3), abs=1e-4)
    random = row("random weights", [40, 40], inits=(38.0, 42.0))
    say = lambda *values: sentence(row("a", [values[0]] * 2, Difference(*values[1:], 2)), random)  # noqa: E731
    assert say(70, 30, 20, 40) == (
        "a, encoder: 70.0 against 40.0 of random weights (+30.0, 95 % over 2 cases +20.0 to +40.0): its features help."
    )
    assert say(41, 1, 0.5, 1.5).endswith("higher, but not clear of chance.")  # one initialisation is as good
    assert say(50, 10, -5, 25).endswith("higher, but not clear of chance.")
    assert say(39, -1, -5, 3).endswith("no better than random weights.")
    assert say(20, -20, -25, -15).endswith("its features are worse than those of random weights.")
    assert say(50, 10, math.nan, math.nan).endswith("one case cannot tell whether its features help.")
    assert "take it first" in choose_sentence([row("a", [70, 71, 72]), row("b", [60, 61.5, 62])])
    assert "cannot tell from chance" in choose_sentence([row("a", [70, 61, 72]), row("b", [60, 71, 62])])
    assert choose_sentence([row("a", [70])]) is None


def test_names_of_checkpoints(tmp_path):
    run = tmp_path / "nnsslMae_a__nnUNetPlans__3d_fullres"
    run.mkdir()
    for file in ("checkpoint_final.pth", "checkpoint_robust.pth", "step_10.pth"):
        (run / file).touch()
    texts = [run, run / "checkpoint_robust.pth", run / "step_10.pth", f"mine={run}", run / "checkpoint_final.pth"]
    named = name_checkpoints([str(t) for t in texts])
    assert [n for n, _ in named] == ["nnsslMae_a", "nnsslMae_a robust", "step_10", "mine", "nnsslMae_a (2)"]
    assert named[0][1] == run / "checkpoint_final.pth"
    with pytest.raises(NnsslError, match="folder without checkpoint_final.pth, .*Name the file itself"):
        name_checkpoints([str(tmp_path)])


def test_a_probe_from_end_to_end(dataset, tmp_path, capsys):
    """The file of a random initialisation is exactly as good as it; its decoder is a line of its own; the same twice."""
    same = store(tmp_path / "a" / "same.pth", random_network(dataset, 0), dataset, stages=(0,))
    other = store(tmp_path / "a" / "other.pth", random_network(dataset, 5), dataset)
    options = ["-d", "901", "-device", "cpu", "--random-inits", "1", "--output"]
    assert main([str(same), f"mine={other}", *options, str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "5 labelled cases, each scored by a layer that was fitted on the 4 others" in text
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    rows = {(r["name"], r["stages"]): r for r in found["rows"]}
    some = "encoder + 1 decoder stage"
    assert list(rows) == [
        ("random weights", "encoder"), ("random weights", some), ("same", "encoder"), ("same", some), ("mine", "encoder"),
    ]  # fmt: skip
    assert rows["same", "encoder"]["cases"] == rows["random weights", "encoder"]["cases"]
    assert rows["same", some]["difference"]["mean"] == 0 != rows["mine", "encoder"]["difference"]["mean"]
    assert found["sentences"][0].endswith("no better than random weights.") and found["sentences"][0] in text
    assert (
        30 < rows["mine", "encoder"]["dice"] < 100
    )  # the phantoms' organs differ in brightness: even random weights see it
    assert set(rows["mine", "encoder"]["classes"]) == {"liver", "spleen"}
    assert found["asked"]["checkpoints"] == [str(same), f"mine={other}"] and found["asked"]["random_inits"] == 1
    with (tmp_path / "out" / "probe.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 25 and lines[0]["case"] == "case_000"
    assert (tmp_path / "out" / "probe.png").read_bytes().startswith(b"\x89PNG")
    again = probe(901, [same, other], random_inits=1)
    assert [r.mean for r in again.rows] == pytest.approx([r["dice"] for r in found["rows"]], abs=1e-3)


def test_the_call_and_the_command_have_the_same_options(dataset):
    """Stated once: the signature, its text and the record; the parts of a probe are functions, not the modules they are in."""
    import nnssl.probe

    options = inspect.signature(probe).parameters
    assert (
        list(options)[:2] == ["dataset", "checkpoints"] and options["evaluate"].kind is inspect.Parameter.KEYWORD_ONLY
    )
    assert {name: o.default for name, o in options.items() if name in ("device", "step", "output")} == {
        "device": "cpu", "step": 0.75, "output": None,
    }  # fmt: skip
    typed = {action.dest for action in parser().options()} - {"help", "version", "verbose", "quiet"}
    assert typed == set(options) - {"checkpoints"} and all(f"    {name}: " in probe.__doc__ for name in options)
    assert all(callable(getattr(nnssl.probe, name)) for name in ("fit", "measure", "probe"))
    with pytest.raises(TypeError, match="'labls'.*labels"):
        probe(901, labls=2)
    with pytest.raises(NnsslError, match=r"--step must lie in \(0, 1\], got 0"):
        probe(901, step=0)
    with pytest.raises(NnsslError, match="--random-inits must be at least 1"):
        probe(901, random_inits=0)


def test_checkpoints_are_found_as_the_trainers_find_them(dataset, nnunet_env):
    with pytest.raises(NnsslError, match="No finished pretraining fits"):
        probe(901)
    folder = nnunet_env.results / dataset.dataset_name / "nnsslMae_x__nnUNetPlans__3d_fullres"
    store(folder / "checkpoint_final.pth", random_network(dataset, 3), dataset)
    config = {"method": "mae", "sources": [dataset.dataset_name], "architecture_hash": dataset.architecture_hash}
    config |= {"base_plans": "nnUNetPlans", "plans_name": "nnUNetPlans", "configuration": "3d_fullres"}
    (folder / "config.json").write_text(json.dumps(config))
    found = probe(901, labels=3, evaluate="val", random_inits=1)
    assert [s.name for s in found.sources] == ["nnsslMae_x"] and len(found.setup.scored) == 2
    assert any("2 scored cases" in w for w in found.warnings)


def test_of_a_file_of_others_the_weights_are_probed_that_the_plan_names(dataset, tmp_path):
    student, teacher = (random_network(dataset, seed).state_dict() for seed in (0, 5))
    torch.save({"student": student, "teacher": teacher}, tmp_path / "both.pth")
    write_variant(dataset, "both", checkpoint=tmp_path / "both.pth", place={"key": "student"})
    found = probe(901, plans="nnUNetPlans_both", labels=3, evaluate="val", random_inits=1)
    random, student = (row for row in found.rows if row.stages == "encoder + decoder")
    assert random.name == "random weights" and student.difference.mean == 0, "the student is the first random network"
    with pytest.raises(NnsslError, match="Choose one"):
        probe(901, [tmp_path / "both.pth"])


def test_what_does_not_fit_is_refused(dataset, tmp_path, plan_of):
    wider = plan_of(features=(8, 16, 32))
    file = store(tmp_path / "wide.pth", build_network(wider), wider)
    (tmp_path / "no.pth").write_bytes(b"")
    with pytest.raises(NnsslError, match="(?s)2 problems.*wide.pth.*no.pth is empty"):
        probe(901, [file, tmp_path / "no.pth"])
    assert main(["-d", "901", "-device", "cpu", str(tmp_path / "gone.pth")]) == 1


@pytest.mark.parametrize(("configuration", "channels"), [("2d", 1), ("3d_fullres", 2)])
def test_2d_plans_channels_regions_and_ignored_voxels(tiny_preprocessed, nnunet_env, tmp_path, configuration, channels):
    tiny_preprocessed(902, n=3, dim=2 if configuration == "2d" else 3, channels=channels)
    file = nnunet_env.preprocessed / "Dataset902_Tiny" / "dataset.json"
    info = json.loads(file.read_text())
    info["labels"], info["regions_class_order"] = {"background": 0, "both": [1, 2], "ignore": 3}, [1]
    file.write_text(json.dumps(info))
    plan = load_plan(902, configuration)
    path = store(tmp_path / "x.pth", random_network(plan, 4), plan)
    found = probe(902, [path], configuration=configuration, random_inits=1, output=tmp_path / "out")
    assert found.setup.classes.regions and found.rows[0].classes.shape == (1,) and 0 < found.rows[0].mean < 100
    assert (tmp_path / "out" / "probe.png").is_file()
