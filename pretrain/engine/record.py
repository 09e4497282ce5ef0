"""What ``config.json`` of a run must look like to be continued: an editor or a copy may have spoilt it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nnssl.fields import Wanted, anything, check_fields, flag, listing, mapping, number, optional, text, whole

_TOP = {
    "method": text,
    "sources": listing(text),
    "dataset": text,
    "plans_name": text,
    "configuration": text,
    "architecture_hash": text,
    "identity": mapping(text),
    "accepted": optional(mapping(text)),
}
_IDENTITY = {
    "method": text,
    "options": mapping(text),
    "engine": mapping(text),
    "epochs": whole(1),
    "iterations": whole(1),
    "batch_size": whole(1),
    "seed": whole(0),
    "crop": mapping(text),
    "weights": optional(mapping(text, number(0))),
    "omni": optional(mapping(text)),
    "cases": mapping(text, anything),
}
_CROP = {"size": listing(whole(1), (2, 3))}
_ACCEPTED = {
    "allow_mismatch": optional(flag),
    "skip_bad": optional(flag),
    "cases": optional(text),
    "exclude": optional(text),
    "start": optional(mapping(text)),
}
_START = {
    "init": text,
    "adapt": optional(mapping(text)),
    "coverage": optional(number(0)),
    "key": optional(text),
    "prefix": optional(text),
}


def check_record(content: dict[str, Any], what: str, *, whole_run: bool = False) -> None:
    """Refuse the content of ``config.json`` (``what``, for the message) whose fields are of a wrong kind.

    Args:
        whole_run: also refuse one without all that a continued run is made from.

    Raises:
        NnsslError: names the fields.
    """

    def check(part: Any, wanted: dict[str, Wanted], prefix: str = "") -> None:
        needed = wanted if whole_run else {k: replace(w, needed=False) for k, w in wanted.items()}
        check_fields(part or {}, needed, what, prefix)

    check(content, _TOP)
    identity, accepted = content.get("identity") or {}, content.get("accepted") or {}
    check(identity, _IDENTITY, "identity.")
    check(identity.get("crop"), _CROP, "identity.crop.")
    check_fields(accepted, _ACCEPTED, what, "accepted.")
    if accepted.get("start"):
        check_fields(accepted["start"], _START, what, "accepted.start.")
