"""From any format that is read to any that is written. Weights are never changed, only their names and what is said about them.

==============  ========================================================================================================
``nnssl``       this package's checkpoint, see docs/checkpoints.md
``upstream``    ``network_weights``, ``nnssl_adaptation_plan``, ``citations``: MIC-DKFZ's nnssl and nnU-Net after 2.8.1
``nnunet``      ``network_weights`` with every name of the stock network, for ``nnUNetv2_train -pretrained_weights``
``safetensors`` one name per tensor, what is told about them as JSON in the header; no pickle
==============  ========================================================================================================

The state of a training that could be continued, case names and nnU-Net's logs stay behind.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor

from nnssl.errors import NnsslError, did_you_mean
from nnssl.files import write_atomic
from nnssl.options import as_function, given
from nnssl.parts import DECODER, ENCODER, UP, decoder_stage, part_names, promised_parts
from nnssl.plans import Plan
from nnssl.weights.adaptation_plan import adaptation_plan
from nnssl.weights.architecture import architecture_of, complete_aliases, plan_of
from nnssl.weights.compare import trained_on
from nnssl.weights.layout import Layout, same_tensor
from nnssl.weights.load import ENTRIES, Checkpoint, load
from nnssl.weights.save import SCHEMA, package_versions, plain, plan_entries, save
from nnssl.weights.wrappers import recorded_prefix

log = logging.getLogger("nnssl")

FORMATS = ("nnssl", "upstream", "nnunet", "safetensors")
HOW = "how"


@dataclass(frozen=True)
class ConvertOptions:
    """What :func:`convert` takes, and ``nnssl_convert`` with it."""

    source: str | os.PathLike[str] = given(..., None, metavar="INPUT", help="file to read")
    target: str | os.PathLike[str] = given(..., None, metavar="OUTPUT", help="file to write")
    form: str = given(
        ...,
        HOW,
        "--to",
        choices=FORMATS,
        help="nnssl; upstream (MIC-DKFZ's nnssl, nnU-Net after 2.8.1); nnunet (-pretrained_weights); safetensors",
    )
    _: KW_ONLY
    parts: str = given(
        "promised",
        HOW,
        "--parts",
        choices=("promised", "encoder", "all"),
        metavar="PARTS",
        help="which parts of a file of others count as pretrained: encoder, or all, which is the decoder too (default: the "
        "encoder of a pretraining, both of a network that nnU-Net has trained)",
    )
    key: str | None = given(None, HOW)
    prefix: str | None = given(None, HOW)
    trusted: bool = given(False, HOW, dest="trust")
    overwrite: bool = given(False, HOW, "--overwrite", action="store_true", help="replace an existing output")


def run_convert(asked: ConvertOptions) -> Checkpoint:
    """Read a checkpoint of nnssl, MIC-DKFZ's nnssl, nnU-Net or others with nnU-Net's network, and write it in another form.

    Returns:
        what was read.

    Raises:
        NnsslError: the source cannot be read or asks to run code, does not hold what the form needs or what it promises, or the
            target exists.
    """
    form, target = asked.form, Path(asked.target)
    if form not in FORMATS:
        raise NnsslError(f"There is no format '{form}'.{did_you_mean(form, FORMATS)} There are: {', '.join(FORMATS)}.")
    if target.exists() and (not asked.overwrite or target.resolve() == Path(asked.source).resolve()):
        raise NnsslError(
            f"{target} exists already and is left as it is. Give another name, or --overwrite for another file."
        )
    checkpoint = load(asked.source, trusted=asked.trusted, key=asked.key, prefix=asked.prefix)
    plan = plan_of(checkpoint)
    weights = _weights(checkpoint)
    content: dict[str, Any] = {"network_weights": weights}
    if form == "nnunet":
        _check_whole(weights, checkpoint)
    else:
        content |= _metadata(checkpoint, plan, weights, asked.parts)
        _check_promised(content, checkpoint)
    if form == "upstream":
        del content["nnssl"]
        _check_upstream(content, checkpoint)
    if form == "safetensors":
        _save_safetensors(target, content)
    else:
        save(target, content)
    return checkpoint


convert = as_function("convert", ConvertOptions, run_convert)


def _check_promised(content: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse to write a file that promises parts of which it holds nothing."""
    held = part_names(content["network_weights"])
    empty = [part for part in promised_parts(content["nnssl"]["pretrained_parts"]) if part not in held]
    if empty:
        raise NnsslError(
            f"{checkpoint.path} promises {', '.join(empty)} and holds no tensor of it; it holds "
            f"{', '.join(held) or 'nothing'}. Nothing is written. If the weights lie elsewhere in the file, "
            "name the place with --key or --prefix."
        )


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every name of the stock network where the file tells which network it is; else the file's own names."""
    weights = dict(checkpoint.weights)
    architecture = architecture_of(checkpoint)
    if architecture is None or not any(name.startswith("encoder.") or ".encoder." in name for name in weights):
        return weights
    complete = complete_aliases(weights, architecture, str(checkpoint.path))
    left = [name for name in weights if name not in complete]
    if left:
        log.info("%d tensors that are not the network's are left out, for example '%s'.", len(left), left[0])
    return complete


def _metadata(checkpoint: Checkpoint, plan: Plan | None, weights: Mapping[str, Tensor], parts: str) -> dict[str, Any]:
    """Everything but the weights: adaptation plan, citations, and this package's own entry."""
    adaptation = checkpoint.adaptation_plan
    if adaptation is None and plan is not None:
        adaptation = adaptation_plan(plan, plan.patch_size)
    return {
        **({} if adaptation is None else {"nnssl_adaptation_plan": _without_prefix(adaptation)}),
        "citations": checkpoint.citations,
        "nnssl": dict(checkpoint.nnssl) or _describe(checkpoint, plan, weights, parts),
    }


def _without_prefix(adaptation: Mapping[str, Any]) -> dict[str, Any]:
    """The keys to encoder and stem as they are once the weights have been read."""
    prefix, changed = recorded_prefix(adaptation) or "", dict(adaptation)
    for name in ("key_to_encoder", "key_to_stem", "key_to_lpe"):
        if isinstance(changed.get(name), str):
            changed[name] = changed[name].removeprefix(prefix)
    if changed.get("keys_to_in_proj"):
        changed["keys_to_in_proj"] = [str(k).removeprefix(prefix) for k in changed["keys_to_in_proj"]]
    return changed


def _describe(checkpoint: Checkpoint, plan: Plan | None, weights: Mapping[str, Tensor], parts: str) -> dict[str, Any]:
    """An entry of ours for a file that has none; only what the file itself says."""
    whole = parts == "all" or (parts == "promised" and checkpoint.origin in ("nnU-Net", "others"))
    stages = [part.stage for part in part_names(weights) if part.kind == DECODER] if whole else []
    return {
        "schema": SCHEMA,
        "method": checkpoint.method,
        "config": {},
        "pretrained_parts": {"encoder": True, "decoder_stages": stages},
        "data": {},
        "versions": package_versions(),
        "converted_from": checkpoint.origin,
        **(trained_on(checkpoint) if plan is None else plan_entries(plan, plan.patch_size)),
    }


def _check_whole(weights: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Refuse to write for ``-pretrained_weights`` what it would refuse to read."""
    instead = "Name the file in a plan instead: nnssl_plan --checkpoint FILE --name NAME"
    if Layout.of(weights).is_transformer:
        if not any(name.startswith(f"{UP}.") for name in weights):
            raise NnsslError(
                f"{checkpoint.path} has no up_projection, and -pretrained_weights asks for every tensor of a Primus. {instead}"
            )
        return
    architecture = architecture_of(checkpoint)
    if architecture is None:
        raise NnsslError(
            f"{checkpoint.path} does not tell which network its weights belong to, so nnU-Net's names for them are not known."
        )
    wanted = [ENCODER, *map(decoder_stage, range(int(architecture[1]["n_stages"]) - 1))]
    held = part_names(weights)
    missing = [part for part in wanted if part not in held]
    if missing:
        raise NnsslError(
            f"{checkpoint.path} has no {', '.join(missing)}, and -pretrained_weights asks for all but the heads. {instead}"
        )


def _check_upstream(content: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    adaptation = content.get("nnssl_adaptation_plan")
    if not adaptation:
        raise NnsslError(f"{checkpoint.path} holds no adaptation plan and no plans of nnU-Net's to make one of.")
    for key in (adaptation["key_to_encoder"], adaptation["key_to_stem"]):
        if not any(name.startswith(f"{key}.") for name in content["network_weights"]):
            raise NnsslError(
                f"{checkpoint.path} has no weights under '{key}', where its adaptation plan says that they are."
            )


def one_name_each(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the aliases of nnU-Net's networks: the decoder's copy of the encoder, and each block's list of its layers."""

    def twins(name: str) -> list[str]:
        head, middle, tail = name.rpartition(".all_modules.")
        found = [f"{head}.{layer}.{tail.rpartition('.')[2]}" for layer in ("conv", "norm")] if middle else []
        return [*found, name.removeprefix("decoder.")] if name.startswith("decoder.encoder.") else found

    return {
        name: tensor
        for name, tensor in weights.items()
        if not any(twin in weights and same_tensor(weights[twin], tensor) for twin in twins(name))
    }


def _save_safetensors(path: Path, content: Mapping[str, Any]) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in one_name_each(content["network_weights"]).items()}
    header = {key: json.dumps(plain(content[key])) for key in ENTRIES if content.get(key)}
    data = to_safetensors(tensors, metadata={"format": "pt", **header})
    write_atomic(path, lambda file: file.write(data))
