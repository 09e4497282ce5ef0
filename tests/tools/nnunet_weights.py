"""A method's network as nnU-Net loads it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nnssl import checkpoint
from nnssl.networks import build_network
from nnssl.pretrain.methods import Method


def loaded_by_nnunet(method: Method, path: Path) -> nn.Module:
    """A new network with the weights that ``-pretrained_weights`` finds in the method's checkpoint, written to ``path``."""
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    payload = checkpoint.build_payload(
        method.network,
        method.plan,
        method=method.name,
        config=vars(method.config),
        crop_size=method.request.size,
        pretrained_parts=method.pretrained_parts(),
        data={},
        citations=method.citation,
    )
    checkpoint.save(path, payload)
    network = build_network(method.plan)
    load_pretrained_weights(network, str(path))
    return network
