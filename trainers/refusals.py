"""A refusal ends ``nnUNetv2_train`` in its one message, without the twenty lines of traceback before it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from nnssl.errors import NnsslError

VARIABLE = "NNSSL_TRACEBACK"
"""Set to anything, it brings the traceback back."""


def tell_refusals_briefly() -> None:
    """Let an uncaught :class:`NnsslError` of this process print its message alone; every other exception as ever.

    The exit status stays 1. Processes that nnU-Net starts for several GPUs pack their exception into one of torch's, which keeps
    its traceback.
    """
    if getattr(sys.excepthook, "func", None) is not _tell:
        sys.excepthook = partial(_tell, sys.excepthook)


def _tell(
    before: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(error, NnsslError) and not os.environ.get(VARIABLE):
        sys.stdout.flush()
        sys.stderr.write(f"\nError: {error}\n")
    else:
        before(kind, error, trace)
