"""The proof, before the first epoch, that stock nnU-Net will accept a checkpoint."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import nn

from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict, forward_features
from nnssl.parts import ENCODER, HEADS, part_of
from nnssl.plans import Plan
from nnssl.weights.apply import apply
from nnssl.weights.report import TransferReport


def _load_as_nnunet_does(network: nn.Module, payload: Mapping[str, Any]) -> None:
    """Hand the weights to nnU-Net's own ``load_pretrained_weights``, through memory."""
    buffer = io.BytesIO()
    torch.save({"network_weights": dict(payload["network_weights"])}, buffer)
    buffer.seek(0)
    torch.load(buffer, map_location="cpu", weights_only=True)
    buffer.seek(0)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() >= torch.cuda.device_count():
        # under a process group nnU-Net reads onto the GPU of this rank, which a CPU run has not: its rules without its reading
        weights, state = payload["network_weights"], network.state_dict()
        needed = {name: tensor for name, tensor in state.items() if f".{HEADS}." not in name}
        wrong = [n for n, t in needed.items() if n not in weights or weights[n].shape != t.shape]
        if wrong:
            raise KeyError(f"{wrong[0]} is missing or of another shape")
        network.load_state_dict({**state, **{name: weights[name] for name in needed}})
        return
    with redirect_stdout(io.StringIO()):
        load_pretrained_weights(network, buffer)


def check_loadable(payload: Mapping[str, Any], plan: Plan) -> TransferReport:
    """Show before the first epoch that the result of a run will be usable.

    A freshly built network of the plan takes the weights through nnU-Net's ``load_pretrained_weights``; afterwards every
    tensor but the heads must equal the payload's. A second one takes them through :func:`apply`; where the encoder is pretrained,
    both must compute the same. Neither the global random state nor the payload changes.

    Raises:
        NnsslError: where a later ``nnUNetv2_train`` would fail to load the checkpoint.
    """
    where = f"{plan.plans_name} {plan.configuration} of {plan.dataset_name}"
    with torch.random.fork_rng(devices=[]):
        stock = build_network(plan)
        size = plan.patch_size if plan.is_primus else (*plan.total_stride[:-1], 2 * plan.total_stride[-1])
        x = torch.randn(1, plan.n_channels, *size)
    own = deepcopy(stock)
    weights = payload["network_weights"]
    try:
        _load_as_nnunet_does(stock, payload)
    except (AssertionError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise NnsslError(f"nnU-Net would not load this run's checkpoint for {where}: {reason}") from error
    for name, tensor in canonical_state_dict(stock).items():
        if part_of(name) != HEADS and not torch.equal(tensor, weights[name].to(tensor)):
            raise NnsslError(f"nnU-Net would load other weights than were trained for {where}: '{name}' differs.")
    report = apply(own, payload, plan, parts="all")
    if report.part(ENCODER).percent == 100.0:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            stock.eval(), own.eval()  # a Primus drops paths in training
            features = zip(forward_features(stock, x, 0).skips, forward_features(own, x, 0).skips)
            if not all(torch.equal(a, b) for a, b in features):
                raise NnsslError(f"The encoder of {where} computes something else after loading this run's checkpoint.")
    return report


prove_loadable = check_loadable
"""Its name before."""
