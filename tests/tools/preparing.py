"""What the tests of preparing sources share: small datasets, and ``prepare_sources`` in this process."""

from __future__ import annotations

from pathlib import Path

from nnssl.pretrain.data import CaseSet
from nnssl.pretrain.prepare import prepare_sources

SMALL = {"shape": (12, 16, 12), "plan_options": {"patch": (8, 8, 8)}}
RAW = {"shape": (12, 16, 12)}


def prepare(plan, *sources, **options) -> CaseSet:
    return prepare_sources(plan, list(sources), n_processes=0, **options)


def own_folder(env, source="Dataset902_Free") -> Path:
    """The folder of its preprocessed cases."""
    (folder,) = [p for p in (env.preprocessed / source).iterdir() if p.is_dir() and not p.name.endswith("_tmp")]
    return folder
