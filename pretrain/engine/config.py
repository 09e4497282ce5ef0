"""Options of the training loop; they are the same for every method."""

from __future__ import annotations

from dataclasses import dataclass

from nnssl.config import option

IMPLEMENTATIONS = ("auto", "loop", "foreach", "fused")
"""Of torch's optimisers."""

OLD_NAMES = {"optimiser_kernels": "optimizer_implementation"}
"""Options that had another name."""


@dataclass(frozen=True)
class EngineConfig:
    """Options of the loop, settable by ``-o key=value`` beside the method's own."""

    batch_size: int | None = option(None, "crops per step over all GPUs; auto: what the method asks for", low=1)
    grad_clip: float | None = option(None, "largest gradient norm, 0: no clipping; auto: the method's", low=0)
    amp: bool = option(
        True,
        "autocast on CUDA (bfloat16 where the GPU has it, else float16), on a CPU with nnssl_cpu_bf16=1; losses stay float32",
    )
    accumulate: int | None = option(None, "micro-batches that a step's batch is computed in; auto: 1", low=1)
    compile: bool = option(False, "torch.compile the method's forward")
    checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory, about 1/3 more time"
    )
    channels_last: bool | None = option(
        None,
        "memory format of convolutions: channels last; auto: on a CPU, unless the first stage's features are a multiple of 16",
    )
    optimizer_implementation: str = option(
        "auto", "torch's arithmetic of the optimiser; auto: foreach on CUDA, loop on a CPU", choices=IMPLEMENTATIONS
    )
    workers: int | None = option(None, "loader processes per GPU; auto: nnU-Net's nnUNet_n_proc_DA", low=0)
    held_out_batches: int = option(4, "batches of held-out cases that each epoch's held-out loss averages", low=0)
    place_crops: int = option(
        8, "crops, and as much noise, on which each epoch measures what the place in the crop explains; 0: none", low=0
    )
    save_every: int = option(1, "epochs between two checkpoints", low=1)
    picture_every: int | None = option(None, "epochs between two pictures, 0: none; auto: ten in a run", low=0)
    log_every: int = option(10, "steps between two step lines in metrics.jsonl, 0: none", low=0)


RUNTIME_OPTIONS = frozenset(
    {
        "compile",
        "checkpointing",
        "channels_last",
        "optimizer_implementation",
        "workers",
        "save_every",
        "picture_every",
        "log_every",
        "place_crops",
    }
)
"""Options that do not change what is learnt: they may differ when a run is continued."""
