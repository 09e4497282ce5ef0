"""Where preprocessed cases and what is made of them lie: beside nnU-Net's own folders, never in them."""

from __future__ import annotations

from pathlib import Path

from nnssl.plans import Plan
from nnssl.plans.unlabelled import prepared_folder

__all__ = ["beside", "body_folder"]


def beside(folder: Path, what: str) -> Path:
    """A file or folder beside a folder of preprocessed cases, in which nnU-Net would take everything for a case."""
    return folder.with_name(f"{folder.name}_{what}")


def body_folder(plan: Plan, source: str) -> Path:
    """Where a source's masks are: ``nnUNet_preprocessed/<source>/nnssl_<target>_<data identifier>_<data hash>_body``."""
    return beside(prepared_folder(plan, source), "body")
