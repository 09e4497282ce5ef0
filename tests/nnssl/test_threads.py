"""How many threads a CPU computes with."""

from __future__ import annotations

import pytest
import torch

from nnssl.threads import keep_to_threads, threads_asked


@pytest.mark.parametrize(
    ("text", "number"),
    [("3", 3), (" 2 ", 2), ("4,2", 4), ("", None), ("0", None), ("-1", None), ("many", None), (None, None)],
)
def test_threads_are_what_the_variable_asks_for(monkeypatch, text, number):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if text is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads_asked() == number


def test_torch_keeps_to_them_after_nnunet_has_taken_all_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        keep_to_threads()
        assert torch.get_num_threads() == before + 2
        monkeypatch.setenv("OMP_NUM_THREADS", str(before + 1))
        keep_to_threads()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
