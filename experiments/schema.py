"""The old place of what :mod:`nnssl.experiments.reading` and :mod:`nnssl.config` hold; importing it tells so."""

import warnings

from nnssl.case_lists import read_case_list as read_names
from nnssl.config import _number as number
from nnssl.config import build
from nnssl.config import option as key
from nnssl.config import unknown_keys as check_keys
from nnssl.experiments.reading import read_yaml, resolve_path

__all__ = ["build", "check_keys", "key", "number", "read_names", "read_yaml", "resolve_path"]

warnings.warn(
    "nnssl.experiments.schema is now nnssl.experiments.reading (read_yaml, read_names, resolve_path) and nnssl.config (build; "
    "key is option there, check_keys is unknown_keys).",
    FutureWarning,
    stacklevel=2,
)
