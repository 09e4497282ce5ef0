"""The garbage collector is paused and runs again, whatever happens."""

import gc

import pytest

from nnssl.collector import paused_collector
from nnssl.plans import load_plan
from nnssl.pretrain.prepare import prepare_sources, sources


@pytest.mark.parametrize("on", [True, False])
def test_it_is_afterwards_as_it_was(on):
    was = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ZeroDivisionError), paused_collector():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() is on
    finally:
        (gc.enable if was else gc.disable)()


def test_cases_are_listed_without_it(tiny_preprocessed, monkeypatch):
    tiny_preprocessed(901, "Tiny", 3)
    seen = []

    def spy(name):
        real = getattr(sources, name)
        monkeypatch.setattr(sources, name, lambda *a, **k: seen.append((name, gc.isenabled())) or real(*a, **k))

    for name in ("_as_it_is", "_use", "make_case_set"):
        spy(name)
    prepare_sources(load_plan(901), ["Dataset901_Tiny"], n_processes=1, held_out=0.0)
    assert seen == [("_as_it_is", False), ("_use", True), ("make_case_set", False)] and gc.isenabled()
