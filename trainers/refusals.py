"""A refusal ends ``nnUNetv2_train`` in its one message, without the twenty lines of traceback before it."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from nnssl.errors import NnsslError

VARIABLE = "NNSSL_TRACEBACK"
"""Set to anything, it brings the traceback back."""


def tell_refusals_briefly() -> None:
    """Let an uncaught :class:`NnsslError` of this process print its message alone; every other exception as ever.

    The exit status stays 1. Processes that nnU-Net starts for several GPUs pack their exception into one of torch's, which keeps
    its traceback.
    """
    before = sys.excepthook
    if getattr(before, "of_nnssl", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, NnsslError) and not os.environ.get(VARIABLE):
            sys.stdout.flush()
            sys.stderr.write(f"\nError: {error}\n")
        else:
            before(kind, error, trace)

    hook.of_nnssl = True  # type: ignore[attr-defined]
    sys.excepthook = hook
