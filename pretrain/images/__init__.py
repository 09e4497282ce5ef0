"""Images as hospitals export them to an nnU-Net raw dataset without labels: what ``nnssl_add_images`` does."""

from nnssl.pretrain.images.add import Summary, add_images
from nnssl.pretrain.images.items import Rejected

__all__ = ["Rejected", "Summary", "add_images"]
