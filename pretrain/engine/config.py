"""Options of the training loop; they are the same for every method."""

from __future__ import annotations

from dataclasses import dataclass

from nnssl.pretrain.methods.base import option

__all__ = ["RUNTIME_OPTIONS", "EngineConfig"]


@dataclass(frozen=True)
class EngineConfig:
    """Options of the loop, settable by ``-o key=value`` beside the method's own."""

    batch_size: int | None = option(None, "crops per step over all GPUs; auto: what the method asks for", low=1)
    grad_clip: float | None = option(None, "largest gradient norm, 0: no clipping; auto: the method's", low=0)
    amp: bool = option(True, "autocast on CUDA (bfloat16 where the GPU has it, else float16); losses stay float32")
    compile: bool = option(False, "torch.compile the method's forward")
    workers: int | None = option(None, "loader processes per GPU; auto: nnU-Net's nnUNet_n_proc_DA", low=0)
    held_out_batches: int = option(4, "batches of held-out cases that each epoch's held-out loss averages", low=0)
    save_every: int = option(1, "epochs between two checkpoints", low=1)
    picture_every: int | None = option(None, "epochs between two pictures, 0: none; auto: ten in a run", low=0)
    log_every: int = option(10, "steps between two step lines in metrics.jsonl, 0: none", low=0)


RUNTIME_OPTIONS = frozenset({"compile", "workers", "save_every", "picture_every", "log_every"})
"""Options that do not change what is learnt: they may differ when a run is continued."""
