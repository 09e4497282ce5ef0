"""What the page says of how it was made: state of the experiment, failed jobs, commands, versions, hardware."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from nnssl.experiments.tables import Table, means
from nnssl.weights.save import package_versions
from nnssl.words import counted

FIRST = ("job", "method", "labels", "setting", "seed", "fold", "phase", "reason", "log")


def lead(about: Mapping[str, Any], rows: pd.DataFrame, failed: pd.DataFrame) -> dict[str, Any]:
    """The lines below the title: when, how long, how much is there, what is wrong, and the notes of the file."""
    when = [str(about[k]) for k in ("started", "finished") if about.get(k)]
    facts = ["made " + " to ".join(when)] if when else []
    if about.get("minutes"):
        facts.append(_duration(float(about["minutes"])))
    cells = means(rows)
    facts.append(f"{cells['measured'].sum()} of {len(cells)} combinations of method and number of labels measured")
    warnings = []
    if (cells["seeds"] < cells["seeds_wanted"]).any() or not cells["measured"].all():
        warnings.append(
            "This experiment is not finished: some combinations are missing or incomplete, and the statistics may change."
        )
    if len(failed):
        warnings.append(f"{counted(len(failed), 'job')} failed, see **Failed jobs**.")
    return {"facts": " · ".join(facts), "warnings": warnings, "notes": [str(n) for n in about.get("notes") or ()]}


def _duration(minutes: float) -> str:
    return f"{minutes / 60:.1f} hours of computing" if minutes >= 90 else f"{minutes:.0f} minutes of computing"


def failures(failed: pd.DataFrame) -> Table | None:
    """The failed jobs; None where there are none."""
    used = failed.loc[:, (failed != "").any()]
    columns = [*(c for c in FIRST if c in used), *(c for c in used if c not in FIRST)]
    return Table("Failed jobs", used[columns], left=len(columns)) if len(failed) else None


def _pairs(values: Mapping[str, Any]) -> dict[str, str]:
    """What is there, as text."""
    return {str(k): _text(v) for k, v in values.items() if v not in (None, "", [], {})}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in _pairs(value).items())
    return ", ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)


def _asked(setting: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Name, and what one setting came to: network, lengths, number of test cases; no names of cases."""
    shown = {k.replace("_", " "): v for k, v in setting.items() if k not in ("setting", "arms", "labelled")}
    shown["test cases"] = len(setting.get("test_cases") or ()) or None
    for name, arm in (setting.get("arms") or {}).items():
        pretraining = _text(arm.get("pretraining") or {})
        shown[name] = _text({**arm, "pretraining": None}) + (f"; pretraining: {pretraining}" if pretraining else "")
    return str(setting.get("setting", "")), _pairs(shown)


def made(about: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, hardware and commands. Versions are those at the time of the runs where they are known, else of this report."""
    versions, hardware = about.get("versions"), about.get("hardware")
    return {
        "versions": _pairs(versions if isinstance(versions, Mapping) and versions else package_versions()),
        "of_this_machine": not versions,
        "hardware": _pairs(hardware) if isinstance(hardware, Mapping) else _text(hardware) if hardware else "",
        "asked": [_asked(setting) for setting in about.get("asked") or ()],
        "commands": [str(c) for c in about.get("commands") or ()],
    }
