"""Roles of docstrings (``:func:`name```) as plain code, since pages are Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ROLE = re.compile(r":(?:\w+:)?(?:func|class|meth|mod|data|attr|obj):`(~)?([^`]+)`")


def plain(text: str) -> str:
    """``:func:`~a.b``` -> ```b```; ``:func:`a.b``` -> ```a.b```; double backticks -> single ones."""
    return ROLE.sub(lambda m: f"`{m[2].rsplit('.', 1)[-1] if m[1] else m[2]}`", text)


class Roles(Extension):
    """Rewrites every docstring."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for each object that is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
