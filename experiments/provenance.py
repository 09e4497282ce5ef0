"""The parts of the page that say how it was made: state of the experiment, failed jobs, commands, versions, hardware."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib import metadata
from typing import Any

from nnssl.experiments import html
from nnssl.experiments.summary import Row
from nnssl.experiments.tables import Table

FIRST = ("job", "method", "labels", "setting", "seed", "fold", "phase", "reason", "log")
PACKAGES = ("nnssl", "nnunetv2", "torch", "scipy", "numpy")


def lead(about: Mapping[str, Any], rows: Sequence[Row], failed: Sequence[Mapping[str, str]]) -> str:
    """The lines below the title: when, how long, how much is there, what is wrong, and the notes of the file."""
    when = [str(about[k]) for k in ("started", "finished") if about.get(k)]
    facts = ["made " + " to ".join(when)] if when else []
    if about.get("minutes"):
        facts.append(_duration(float(about["minutes"])))
    there = sum(bool(r.values) for r in rows)
    facts.append(f"{there} of {len(rows)} combinations of method and number of labels measured")
    out = html.paragraph(" · ".join(facts), "muted")
    warnings = []
    if there < len(rows) or any(r.done < r.wanted for r in rows):
        warnings.append(
            "This experiment is not finished: some combinations are missing or incomplete, and the statistics may change."
        )
    if failed:
        warnings.append(f"{len(failed)} job{'s' * (len(failed) != 1)} failed, see **Failed jobs**.")
    if warnings:
        out += f'<div class="lead warn">{"".join(html.paragraph(w) for w in warnings)}</div>'
    return out + html.listing(str(n) for n in about.get("notes") or ())


def _duration(minutes: float) -> str:
    return f"{minutes / 60:.1f} hours of computing" if minutes >= 90 else f"{minutes:.0f} minutes of computing"


def failures(rows: Sequence[Mapping[str, str]]) -> str:
    """The failed jobs as a table; nothing where there are none."""
    if not rows:
        return ""
    columns = dict.fromkeys([*(c for c in FIRST if any(c in r for r in rows)), *(c for r in rows for c in r if c)])
    used = [c for c in columns if any(r.get(c) for r in rows)]
    content = Table("Failed jobs", used, [[str(r.get(c) or "") for c in used] for r in rows], left=len(used))
    return html.paragraph(
        "Their figures are missing or incomplete above. The same command tries them again."
    ) + html.table(content)


def _pairs(values: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<dt>{escape(str(k))}</dt><dd>{escape(_text(v))}</dd>"
        for k, v in values.items()
        if v not in (None, "", [], {})
    )
    return f"<dl>{lines}</dl>" if lines else ""


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)


def _versions() -> dict[str, str]:
    out = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def _asked(setting: Mapping[str, Any]) -> str:
    """What one setting came to: network, lengths, number of test cases; no names of cases."""
    plain = {
        k.replace("_", " "): v for k, v in setting.items() if k not in ("setting", "arms", "labelled", "test_cases")
    }
    if setting.get("test_cases"):
        plain["test cases"] = len(setting["test_cases"])
    for name, arm in (setting.get("arms") or {}).items():
        pretraining = {k: v for k, v in (arm.get("pretraining") or {}).items() if v not in (None, {}, [])}
        own = {k: v for k, v in arm.items() if k != "pretraining" and v not in (None, {}, [])}
        plain[name] = _text(own) + (f"; pretraining: {_text(pretraining)}" if pretraining else "")
    return f"<h3>{escape(str(setting.get('setting', '')))}</h3>{_pairs(plain)}"


def made(about: Mapping[str, Any]) -> str:
    """Versions, hardware and commands. Versions are those at the time of the runs where they are known, else of this report."""
    versions = about.get("versions")
    parts = ["<h3>Versions</h3>", _pairs(versions if isinstance(versions, Mapping) and versions else _versions())]
    if not versions:
        parts.append(html.paragraph("Of the machine that wrote this page.", "muted"))
    hardware = about.get("hardware")
    if hardware:
        parts += [
            "<h3>Hardware</h3>",
            _pairs(hardware) if isinstance(hardware, Mapping) else html.paragraph(_text(hardware)),
        ]
    parts += [_asked(setting) for setting in about.get("asked") or ()]
    commands = [str(c) for c in about.get("commands") or ()]
    if commands:
        shown = f"<pre>{escape(chr(10).join(commands))}</pre>"
        parts += [
            "<h3>Commands</h3>",
            shown if len(commands) <= 12 else html.details(f"{len(commands)} commands", shown),
        ]
    return "".join(parts)
