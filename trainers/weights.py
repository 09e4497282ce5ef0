"""Which pretraining a plan's training starts from: the one that the plan names, or the only one made for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.files import sha256_of
from nnssl.paths import decode_path
from nnssl.plans import Plan, dataset_id
from nnssl.plans.commands import plan_command, pretrain_command
from nnssl.results import PretrainingRun, find_pretrainings, find_pretrainings_elsewhere, list_pretrainings


@dataclass(frozen=True)
class Source:
    """A file to load.

    Attributes:
        path: the checkpoint.
        sha256: hash (hex) of the file's content.
        why: half a sentence for the log.
        place: where the weights lie in a file of others (``key``, ``prefix``).
    """

    path: Path
    sha256: str
    why: str
    place: dict[str, str] = field(default_factory=dict)


def find_weights(plan: Plan) -> Source:
    """The checkpoint that the plan names, else that of the only finished pretraining made for its plans and network.

    Raises:
        NnsslError: the named file is missing or another than it was, or there is no pretraining, or several; the message
            lists what there is and the command to type.
    """
    named = plan.nnssl.get("checkpoint")
    if named and not _for_the_second_stage(plan):
        return _named(plan, str(named))
    fitting = [run for run in find_pretrainings(plan) if run.finished]
    if len(fitting) > 1:
        raise NnsslError(_several(plan, fitting))
    path = fitting[0].checkpoint if fitting else None
    if path is None:
        raise NnsslError(_none(plan))
    return Source(path, sha256_of(path), f"the only finished pretraining for these plans ({_describe(fitting[0])})")


def _for_the_second_stage(plan: Plan) -> bool:
    """Whether the plan is the first stage of a cascade and its file is meant for the second, which shares the plans' name."""
    made_for = plan.plans["configurations"].get(plan.nnssl.get("configuration"), {})
    return made_for.get("previous_stage") == plan.configuration


def _named(plan: Plan, text: str) -> Source:
    where = f"Plans '{plan.plans_name}' of {plan.dataset_name} name the pretrained file"
    made_for = plan.nnssl.get("configuration", plan.configuration)
    if made_for != plan.configuration:
        raise NnsslError(
            f"{where} {text}, for configuration {made_for}, not {plan.configuration}. Train {made_for}, or name a file "
            f"for {plan.configuration}: {_naming(plan)}"
        )
    path = decode_path(text)
    if not path.is_file():
        raise NnsslError(
            f"{where} {text}, which is not on this machine ({path}). Copy it there, or name another: {_naming(plan)}"
        )
    digest, expected = sha256_of(path), plan.nnssl.get("sha256")
    if expected and digest != expected:
        for kept in sorted(path.parent.glob("checkpoint_final_*epochs.pth")):  # the run was lengthened since
            if sha256_of(kept) == expected:
                return Source(kept, expected, f"named by plans '{plan.plans_name}' before the run was lengthened")
        raise NnsslError(
            f"{where} {path}, whose content has changed since (sha256 {digest[:12]}... instead of {expected[:12]}...). "
            f"Restore it, or name what is there now: {_naming(plan, path)}"
        )
    return Source(path, digest, f"named by plans '{plan.plans_name}'", dict(plan.nnssl.get("place") or {}))


def _describe(run: PretrainingRun) -> str:
    return f"{run.method}, from {', '.join(run.sources)}: {run.folder}"


def _naming(plan: Plan, checkpoint: object = "FILE") -> str:
    return plan_command(plan, f"--checkpoint {checkpoint}")


def _listed(runs: list[PretrainingRun]) -> list[str]:
    return [f"  - {_describe(run)}" for run in runs]


def _several(plan: Plan, runs: list[PretrainingRun]) -> str:
    lines = "\n".join(_listed(runs))
    return (
        f"{len(runs)} finished pretrainings fit plans '{plan.plans_name}' ({plan.configuration}) of {plan.dataset_name}:\n"
        f"{lines}\nChoose one by giving it a name, for example:\n"
        f"  {_naming(plan, runs[0].checkpoint)}\n"
        f"and train with -p {plan.plans_name}_NAME."
    )


def _none(plan: Plan) -> str:
    """Why nothing is found, in lines: what there is instead, and what to type."""
    if plan.is_second_stage:
        text = _second_stage(plan)
    else:
        here, others = list_pretrainings(plan.dataset_name), find_pretrainings_elsewhere(plan)
        text = [
            f"No finished pretraining fits plans '{plan.plans_name}' ({plan.configuration}) of {plan.dataset_name}."
        ]
        unfinished = [run for run in here if run.made_for(plan) and not run.finished]
        unfit = [run for run in here if not run.made_for(plan)]
        for heading, runs in (
            ("Not finished; continue with the command that started it and --c:", unfinished),
            ("For other plans, another configuration or another network of this dataset:", unfit),
            ("For the plans of other datasets, which do not count here:", others),
        ):
            text += [heading, *_listed(runs)] if runs else []
        if others:
            source = next((s for run in others for s in run.sources), others[0].dataset_name)
            text.append(f"To learn from {source} for these plans, type: {pretrain_command(plan, [source])}")
        else:
            command = pretrain_command(plan, plan.nnssl.get("unlabelled") or ())
            text.append(f"Type: {command}   (from other images: -d SOURCE -t {dataset_id(plan.dataset_name)})")
    text.append(f"To train without pretraining: -tr {plan.trainer(pretrained=False)}")
    return "\n".join(text)


def _second_stage(plan: Plan) -> list[str]:
    """A cascade's second stage is not pretrained itself: it takes the weights for the same network on the image alone."""
    runs = [run for run in list_pretrainings(plan.dataset_name) if run.finished and run.base_plans == plan.base_plans]
    text = [
        f"{plan.configuration} of plans '{plan.plans_name}' is the second stage of a cascade. It takes the image channels' "
        "weights of a pretraining for 3d_fullres, which has the same network; name one:",
        f"  {_naming(plan, runs[0].checkpoint if runs else 'FILE')}",
    ]
    if runs:
        return [*text, "There are:", *_listed(runs)]
    number = dataset_id(plan.dataset_name)
    return [*text, f"There is none yet. Type: nnssl_pretrain -d {number} -c 3d_fullres -p {plan.plans_name} -m mae"]
