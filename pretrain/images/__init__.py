"""Images as hospitals export them to an nnU-Net raw dataset without labels: what ``nnssl_add_images`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl.pretrain.images.add import Summary, add_images
    from nnssl.pretrain.images.items import Rejected

__all__ = ["Rejected", "Summary", "add_images"]


def __getattr__(name: str) -> Any:
    # nnU-Net reads its variables while it is imported: the command checks them before
    if name in __all__:
        from nnssl.pretrain.images import add

        return getattr(add, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
