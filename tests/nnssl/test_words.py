"""Numbers as a person says them, in one form."""

import re
from pathlib import Path

import pytest

from nnssl.words import counted, per_cent, spoken

ROOT = Path(__file__).resolve().parents[2]


def test_counts_and_shares():
    assert (counted(1, "epoch"), counted(2000, "epoch"), counted(2, "box", "boxes")) == (
        "1 epoch",
        "2,000 epochs",
        "2 boxes",
    )
    assert (per_cent(0.344), per_cent(0.0125, 1), per_cent(1)) == ("34 %", "1.2 %", "100 %")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (7.2, "8 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5340, "89 min"),
        (5400, "1 h 30 min"),
        (180001, "2 days 3 h"),
    ],
)
def test_durations(seconds, text):
    assert spoken(seconds) == text


def test_shares_are_printed_in_one_form():
    """``34 %`` everywhere, not ``34%`` beside it."""
    files = [p for folder in ("nnssl", "pretrain", "trainers", "experiments") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    found = [f"{p}: {line.strip()}" for p in files for line in p.read_text(encoding="utf-8").splitlines()
             if re.search(r":\.\d%\}|\d\}%|%d%%|\df%%", line)]  # fmt: skip
    assert not found
