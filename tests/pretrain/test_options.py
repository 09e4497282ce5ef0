from dataclasses import dataclass
from importlib import import_module

import pytest

from nnssl.config import config_dict, describe_options, make_config, parse_assignments, split_options
from nnssl.errors import NnsslError
from nnssl.pretrain.engine.config import EngineConfig
from nnssl.pretrain.methods import get_method, list_methods, option


@dataclass(frozen=True)
class Example:
    lr: float = option(1e-3, "learning rate", low=0.0)
    pool: str = option("gap", "pooling", choices=("gap", "flatten"))
    flip: bool = option(True, "mirror")
    weights: tuple[float, ...] = option((1.0, 0.5), "of the terms", low=0.0)
    blocks: int | None = option(None, "decoder blocks", low=0, high=4)


def test_assignments():
    assert parse_assignments(["lr=1e-2", "pool=a=b"]) == {"lr": "1e-2", "pool": "a=b"}
    assert parse_assignments(None) == {}
    with pytest.raises(NnsslError, match="not of the form"):
        parse_assignments(["lr"])
    with pytest.raises(NnsslError, match="given twice"):
        parse_assignments(["lr=1", "lr=2"])


def test_text_becomes_the_annotated_type():
    c = make_config(Example, {"lr": "1e-2", "flip": "no", "weights": "1,2", "blocks": "3", "pool": "flatten"})
    assert c == Example(lr=0.01, pool="flatten", flip=False, weights=(1.0, 2.0), blocks=3)
    assert make_config(Example, {"blocks": "auto"}, preset={"blocks": 2, "lr": 5.0}) == Example(lr=5.0)
    assert config_dict(c)["weights"] == [1.0, 2.0]


def test_a_saved_config_is_read_back():
    c = Example(blocks=2, weights=(0.25,))
    assert make_config(Example, config_dict(c)) == c


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": "-1"}, "'lr' must be a number of at least 0.0, not '-1'"),
        ({"lr": "nan"}, "'lr' must be a number .*not 'nan'"),
        ({"lr": "fast"}, "'lr' must be a number .*not 'fast'"),
        ({"pool": "flaten"}, "Did you mean 'flatten'"),
        ({"blocks": "5"}, r"'blocks' must be a whole number in \[0, 4\], or auto, not '5'"),
        ({"blocks": "1.5"}, "'blocks' must be a whole number .*not '1.5'"),
        ({"flip": "maybe"}, "'flip' must be true or false, not 'maybe'"),
        ({"weights": "1,-1"}, "'weights' must be a list, each a number of at least 0.0, not '1,-1'"),
        ({"lr": "x", "pool": "y"}, "found 2 problems"),
    ],
)
def test_wrong_values_are_named(values, words):
    with pytest.raises(NnsslError, match=words):
        make_config(Example, values)


def test_options_find_their_config_and_unknown_ones_the_nearest_name():
    assert split_options({"lr": 1, "workers": 2}, [Example, EngineConfig]) == [{"lr": 1}, {"workers": 2}]
    with pytest.raises(NnsslError, match="'batchsize'. Did you mean 'batch_size'"):
        split_options({"batchsize": 1}, [Example, EngineConfig])


def test_every_option_of_every_method_is_explained():
    for cls in list_methods().values():
        names = set()
        for name, _, _, help_text in describe_options(cls.Config):
            assert help_text, f"{cls.name}.{name}"
            names.add(name)
        assert not names & {r[0] for r in describe_options(EngineConfig)}, cls.name
        assert cls.title
        assert cls.citation
        for preset, values in cls.presets.items():
            make_config(cls.Config, {}, values), preset


def test_an_option_under_both_its_names_says_one_thing():
    config = get_method("voco").Config
    assert split_options({"align": "false", "reorient": "false"}, [config]) == [{"reorient": "false"}]
    with pytest.raises(NnsslError, match="'reorient' is given twice, as false and, by its old name align, true"):
        split_options({"align": "true", "reorient": "false"}, [config])


def test_unknown_method_gets_the_nearest_name():
    with pytest.raises(NnsslError, match="Did you mean 'macl'"):
        get_method("mcal")


def test_an_argument_that_does_not_exist_gets_the_nearest_name():
    from nnssl.pretrain import run

    with pytest.raises(TypeError, match=r"there is no argument 'iteration'. Did you mean 'iterations'\?"):
        run(500, method="mae", iteration=3)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("nnssl.pretrain.run", (500, "mae"), r"run\(\): too many positional arguments"),
        ("nnssl.pretrain.preprocess", (), r"preprocess\(\): missing a required argument: 'sources'"),
        ("nnssl.probe.probe", (), r"probe\(\): missing a required argument: 'dataset'"),
        ("nnssl.transferability.compare", (501, [], "2d"), r"compare\(\): too many positional arguments"),
    ],
)
def test_arguments_without_a_name_are_counted_as_the_function_has_them(function, arguments, message):
    module, _, name = function.rpartition(".")
    with pytest.raises(TypeError, match=message):
        getattr(import_module(module), name)(*arguments)


@pytest.mark.parametrize(
    ("seed", "message"),
    [(int("9" * 20), r"--seed 9{20}: less than 2\^63 is needed"), (-1, "--seed -1: 0 or more is needed")],
)
def test_a_seed_that_torch_has_no_room_for_is_refused(tiny_preprocessed, seed, message):
    from nnssl.pretrain import run
    from nnssl.probe import probe
    from nnssl.transferability import compare

    tiny_preprocessed(901)
    with pytest.raises(NnsslError, match=message):
        run(901, method="mae", device="cpu", seed=seed, dry_run=True)
    with pytest.raises(NnsslError, match=message):
        probe(901, ["random"], seed=seed)
    with pytest.raises(NnsslError, match=message):
        compare(901, ["any.pth"], seed=seed)
