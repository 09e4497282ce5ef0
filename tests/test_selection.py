"""Which tests run: slow ones only where asked, and of these another part each day."""

import time
from types import SimpleNamespace

import pytest


@pytest.fixture
def hooks(request):
    """Our conftest."""
    return next(
        p
        for p in request.config.pluginmanager.get_plugins()
        if hasattr(p, "pytest_runtest_setup") and hasattr(p, "_phantom")
    )


class Item:
    def __init__(self, nodeid, *marks):
        self.nodeid, self.keywords, self.added = nodeid, set(marks), []

    def add_marker(self, mark):
        self.added.append(mark)


def suite():
    slow = [Item(f"tests/test_a.py::test_{i}", "slow") for i in range(60)]
    return [Item("tests/test_a.py::test_quick"), *slow, Item("tests/test_demo.py::test_demo", "slow", "long")]


def config(marks="", part=None, seconds=None):
    values = {"-m": marks, "--slow-part": part, "--slow-seconds": seconds}
    return SimpleNamespace(getoption=values.get, hook=SimpleNamespace(pytest_deselected=lambda items: None))


def collect(hooks, **options):
    items = suite()
    hooks.pytest_collection_modifyitems(config(**options), items)
    return items


def test_slow_tests_are_skipped_unless_asked_for(hooks, monkeypatch):
    monkeypatch.delenv("RUN_SLOW", raising=False)
    assert [bool(i.added) for i in collect(hooks)] == [False] + [True] * 61
    assert not any(i.added for i in collect(hooks, marks="slow"))
    monkeypatch.setenv("RUN_SLOW", "1")
    assert not any(i.added for i in collect(hooks))


def test_parts_make_up_the_slow_tests(hooks):
    parts = [{i.nodeid for i in collect(hooks, marks="slow", part=f"{k}/4") if i.keywords} for k in range(4)]
    assert sum(len(p) for p in parts) == 60 and all(5 < len(p) < 25 for p in parts)
    assert set().union(*parts) == {i.nodeid for i in suite() if i.keywords == {"slow"}}  # what is long is in none


def test_no_slow_test_starts_when_its_time_is_over(hooks, monkeypatch):
    monkeypatch.setattr(hooks, "_STARTED", time.monotonic() - 100)
    slow, quick = Item("a", "slow"), Item("b")
    for item, seconds in ((slow, None), (slow, 1000), (quick, 10)):
        item.config = config(seconds=seconds)
        hooks.pytest_runtest_setup(item)
    slow.config = config(seconds=10)
    with pytest.raises(pytest.skip.Exception, match="10 seconds"):
        hooks.pytest_runtest_setup(slow)


def test_an_empty_part_is_no_failure(hooks):
    for part, expected in (("1/4", pytest.ExitCode.OK), (None, pytest.ExitCode.NO_TESTS_COLLECTED)):
        session = SimpleNamespace(config=config(part=part), exitstatus=pytest.ExitCode.NO_TESTS_COLLECTED)
        hooks.pytest_sessionfinish(session, session.exitstatus)
        assert session.exitstatus == expected
