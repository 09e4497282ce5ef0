"""The one training loop. It knows a method only through :class:`~nnssl.pretrain.methods.Method`."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nnssl.distributed import is_distributed, rank, world_size
from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.pretrain.data import make_loader
from nnssl.pretrain.data.weights import case_weights
from nnssl.pretrain.engine.drawing import draw, draw_views
from nnssl.pretrain.engine.evaluate import HeldOut
from nnssl.pretrain.engine.logs import RunLog
from nnssl.pretrain.engine.messages import (
    clock,
    disk_reason,
    epoch_line,
    memory_advice,
    non_finite_advice,
    out_of_memory,
)
from nnssl.pretrain.engine.place import place_sentence
from nnssl.pretrain.engine.signals import StopSignals
from nnssl.pretrain.engine.spec import Outcome, RunSpec
from nnssl.pretrain.engine.speed import Prefetcher, apply_options
from nnssl.pretrain.engine.state import restore, training_state
from nnssl.pretrain.engine.stepping import Numbers, Stepper, views_in_parts
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.types import Crops, Progress
from nnssl.words import per_cent

log = logging.getLogger("nnssl")

GO_ON = "The same command with --c goes on from there."


class NonFiniteError(NnsslError):
    """The loss or a gradient became NaN or infinite."""


class Engine:
    """Trains one method.

    Args:
        spec: the run.
        state: training state of the checkpoint that is continued, or None.

    Attributes:
        stop_reason: set by a hook to end the run after the current epoch.
        verdict: ``{"learnt": bool, "sentence": str}`` once the run has ended.
        start: what it starts from, with the report of the transfer; None where it starts from random weights or is continued.
        started_from: what its checkpoints say about that.
        first: held-out terms before the first step.
        sums, counted: of each term over the steps of this epoch, and how many those are.
    """

    def __init__(self, spec: RunSpec, state: dict[str, Any] | None = None) -> None:
        self.spec = spec
        torch.manual_seed(spec.seed)
        network = build_network(spec.plan)
        self.start = spec.start.fill(network, spec.plan) if spec.start is not None and state is None else None
        self.started_from: dict[str, Any] | None = None if self.start is None else self.start.metadata()
        self.verdict: dict[str, Any] | None = None
        self.method = spec.method(network, spec.plan, spec.request, spec.config).to(spec.device)
        self.parts = spec.engine.accumulate or 1
        if self.parts > 1 and spec.auxiliary is not None:
            raise NnsslError("-o accumulate does not go with --labelled: lower -o batch_size, or use more GPUs.")
        apply_options(self.method, spec.engine)
        module: nn.Module = self.method
        if spec.engine.compile:
            module.compile()
        if is_distributed():
            ids = [spec.device.index] if spec.device.type == "cuda" else None
            module = nn.parallel.DistributedDataParallel(module, device_ids=ids)
        clip = spec.engine.grad_clip if spec.engine.grad_clip is not None else self.method.grad_clip
        kernels = spec.engine.optimiser_kernels
        self.stepper = Stepper(self.method, module, spec.device, spec.steps, clip, spec.engine.amp, kernels)
        self.transfers = Prefetcher(spec.device)
        self.step = 0
        self.first: dict[str, float] = {}
        self._untrained: Method | None = None
        self.stop_reason: str | None = None
        self.sums: dict[str, float] = {}
        self.counted = 0
        self._pending: Numbers | None = None
        self._last: dict[str, float] = {}
        self._stop_agreed = False
        self._cases: list[str] = []
        self._saved: int | None = None
        self.log = RunLog(spec.folder.path if rank() == 0 else None, loggers=spec.loggers)
        if state is not None:
            restore(self, state)
            self._saved = self.step
        total, place = spec.batch_size // self.parts, spec.engine.place_crops
        self.held_out = HeldOut(self._loader("held_out", 0), spec.seed, spec.device, total, place)

    def _loader(self, split: str, start: int) -> Any:
        spec = self.spec
        held_out = split == "held_out"
        if held_out and (not spec.case_set.held_out or not spec.engine.held_out_batches):
            return []
        return make_loader(
            spec.case_set,
            spec.plan,
            spec.request,
            seed=spec.seed,
            batch_size=spec.batch_size // self.parts if held_out else spec.batch_size,
            start_step=start,
            steps=spec.engine.held_out_batches if held_out else spec.steps - start,
            rank=rank(),
            world_size=world_size(),
            num_workers=0 if held_out else spec.workers,
            split=split,
            pin_memory=spec.device.type == "cuda",
            weights=None if held_out else case_weights(spec.case_set.train, spec.weights),
            auxiliary=None if spec.auxiliary is None else spec.auxiliary.reader(split),
        )

    def save(self, *, final: bool = False) -> None:
        """Write ``checkpoint_latest.pth`` (and, at the end, ``checkpoint_final.pth`` without the training state).

        Raises:
            NonFiniteError: the weights are not finite; what was saved before stays.
        """
        self._check_weights()
        if rank() == 0:
            self.spec.save(self, self.spec.folder.latest, training_state(self))
            self._saved = self.step
            if final:
                self.spec.save(self, self.spec.folder.final, None)

    # ---- training ------------------------------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train to the end, or until a signal or a hook asks to stop.

        Raises:
            NonFiniteError: names the cases of the batch; the last checkpoint on disk is from before it.
            NnsslError: out of memory, with what to lower.
        """
        try:
            return self._fit()
        except KeyboardInterrupt:
            if rank() == 0:
                where = f"The last checkpoint is of step {self._saved}. {GO_ON}"
                log.warning(
                    "Interrupted at step %d. %s", self.step, "Nothing was saved." if self._saved is None else where
                )
            raise
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, NnsslError) or not out_of_memory(error):
                raise
            raise NnsslError(memory_advice(self.spec)) from error
        except OSError as error:
            advice = disk_reason(error)
            if advice is None:
                raise
            whole = "The checkpoint saved last is whole. " if self.spec.folder.latest.is_file() else ""
            raise NnsslError(
                f"{error.strerror} in {self.spec.folder.path}. {whole}{advice}, then continue with --c."
            ) from error

    def _fit(self) -> Outcome:
        spec = self.spec
        for hook in spec.hooks:
            hook.start(self)
        self.log.panels = [p for p in (h.panel() for h in spec.hooks) if p is not None]
        if self.step == 0:
            # evaluated at the first epoch's end, since on a CPU it would hold up the first step for seconds
            self._untrained = deepcopy(self.method) if self.held_out else None
            self.log.event("start", step=0)
        else:
            self.log.event("continue", step=self.step)
        batches = iter(self._loader("train", self.step))
        finished = True
        with StopSignals() as signals:
            while self.step < spec.steps and self.stop_reason is None:
                epoch = self.step // spec.iterations
                if not self._epoch(epoch, batches, signals):
                    finished = False
                    break
            self._look_at_untrained()
            judged = self._judge() if finished else None
            self.verdict = None if judged is None else dict(zip(("learnt", "sentence"), judged))
            self.save(final=finished)
        if finished:
            draw(self, self.step // spec.iterations)
        else:
            name = signals.spoken or "a signal to another process"
            log.info("Stopped by %s after step %d of %d. %s", name, self.step, spec.steps, GO_ON)
        outcome = self._outcome(finished)
        return outcome if finished else replace(outcome, signal=signals.number or int(signal.SIGTERM))

    def _epoch(self, epoch: int, batches: Iterator[Crops], signals: StopSignals) -> bool:
        """One epoch, or what is left of it; False where a signal ended it."""
        spec = self.spec
        begin, waited, done = time.perf_counter(), 0.0, 0
        bar = tqdm(
            total=spec.iterations,
            initial=self.step - epoch * spec.iterations,
            desc=f"epoch {epoch + 1}/{spec.epochs}",
            disable=True if rank() else None,
            leave=False,
            dynamic_ncols=True,
        )
        with bar:
            while self.step < (epoch + 1) * spec.iterations:
                t = time.perf_counter()
                crops = next(batches)
                waited += time.perf_counter() - t
                self._step(crops, signals.received)
                done += 1
                seconds = (time.perf_counter() - begin) / done
                self._show(bar, seconds, waited / (seconds * done))
                if self._stop_agreed:
                    self._flush()
                    return False
            self._flush()
        seconds = (time.perf_counter() - begin) / max(1, done)
        self._end_epoch(epoch, seconds, waited / max(1e-9, seconds * done))
        return True

    def _step(self, crops: Crops, stop: bool) -> None:
        spec = self.spec
        crops = self.transfers(crops)
        first = rank() * len(crops)
        draw = {"seed": spec.seed, "step": self.step, "total": spec.batch_size, "first": first}
        batches = views_in_parts(self.method, crops, self.parts, spec.device, **draw)
        batch = batches if self.parts > 1 else next(batches)
        numbers, stepped = self.stepper.step(batch, self.step, crops.case, stop, self.parts)
        self.step += 1
        if stepped:
            self.method.after_step(Progress(self.step, spec.steps, (self.step - 1) // spec.iterations, spec.epochs))
        self._flush()
        self._pending = numbers

    def _flush(self) -> None:
        """Read the numbers of the step before, which the device has finished by now."""
        numbers, self._pending = self._pending, None
        if numbers is None:
            return
        values = numbers.read()
        self._stop_agreed, self._cases = values.pop("stop") > 0, numbers.cases
        skipped = self.stepper.scaler is not None and not math.isfinite(values["grad_norm"])
        if not math.isfinite(values["total"]) or (not math.isfinite(values["grad_norm"]) and not skipped):
            bad = ", ".join(k for k, v in values.items() if not math.isfinite(v))
            raise NonFiniteError(non_finite_advice(self.spec.folder, numbers.step, bad, numbers.cases))
        for key, value in values.items():
            if not (skipped and key == "grad_norm"):
                self.sums[key] = self.sums.get(key, 0.0) + value
        self.counted += 1
        self._last = values
        if self.spec.engine.log_every and numbers.step % self.spec.engine.log_every == 0:
            self.log.event("step", step=numbers.step, lr=self.stepper.optimiser.param_groups[0]["lr"], **values)

    def _show(self, bar: tqdm, seconds: float, wait: float) -> None:
        left = (self.spec.steps - self.step) * seconds
        shown = {k: f"{v:.3g}" for k, v in list(self._last.items())[:4]}
        bar.set_postfix({**shown, "s/step": f"{seconds:.2f}", "data": per_cent(wait), "left": clock(left)})
        bar.update()

    def _look_at_untrained(self) -> None:
        """Held-out terms and picture of the method as it was before the first step, once; training is not touched."""
        untrained, self._untrained = self._untrained, None
        if untrained is None:
            return
        devices = [self.spec.device] if self.spec.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.first = self.held_out.evaluate(untrained, self.stepper)
        draw_views(self, 0, untrained)
        self.log.event("untrained", step=0, **{f"held_out/{k}": v for k, v in self.first.items()})

    def _check_weights(self) -> None:
        """An update can spoil the weights though the loss before it was finite; a sum of squares sees it on any device."""
        with torch.no_grad():
            sums = [p.detach().float().square().sum() for p in self.method.network.parameters()]
            finite = bool(torch.isfinite(torch.stack(sums)).all())
        if not finite:
            raise NonFiniteError(non_finite_advice(self.spec.folder, self.step - 1, "a weight after it", self._cases))

    def _end_epoch(self, epoch: int, seconds: float, wait: float) -> None:
        spec = self.spec
        self._look_at_untrained()
        self._check_weights()
        means = {k: v / max(1, self.counted) for k, v in self.sums.items()}
        self.sums, self.counted = {}, 0
        row: dict[str, Any] = {"epoch": epoch + 1, "step": self.step}
        row["lr"] = self.stepper.optimiser.param_groups[0]["lr"]
        row["grad_norm"] = means.pop("grad_norm", None)
        row.update({f"train/{k}": v for k, v in means.items()})
        if self.held_out:
            held_out = self.held_out.evaluate(self.method, self.stepper)
            row["embedding_sd"] = held_out.pop("embedding_sd", None)
            row["effective_rank"] = held_out.pop("effective_rank", None)
            row.update({f"held_out/{k}": v for k, v in held_out.items()})
        row.update(step_s=seconds, data_wait=wait)
        for hook in spec.hooks:
            hook.after_epoch(self, row)
        self.log.epoch(row)
        left = (spec.steps - self.step) * seconds
        prefix = "held_out/" if self.held_out else "train/"
        note = self.method.note({k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)})
        log.info("%s", epoch_line(row, spec.epochs, note, left, self.method.spoken))
        last = self.step >= spec.steps or self.stop_reason is not None
        if last:
            return  # the final checkpoint comes first, then what is drawn
        if (epoch + 1) % spec.engine.save_every == 0:
            self.save()
        draw(self, epoch + 1, last=False)

    # ---- words ---------------------------------------------------------------------------------------------------

    def ends(self) -> tuple[dict[str, float], dict[str, float]]:
        """Held-out terms before the first step and now; training terms where nothing is held out."""
        row = self.log.history[-1] if self.log.history else {}
        prefix = "held_out/" if self.held_out else "train/"
        last = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
        first = self.first
        if not self.held_out and self.log.history:
            first = {k.removeprefix(prefix): v for k, v in self.log.history[0].items() if k.startswith(prefix)}
        return first, last

    def _judge(self) -> tuple[bool, str] | None:
        """Whether the method learnt, by its own judgement; None where no epoch has ended."""
        first, last = self.ends()
        if not last:
            return None
        learnt, sentence = self.method.verdict(first, last)
        if not self.held_out:
            sentence += " (No case is held out: these are training losses.)"
        return bool(learnt), sentence

    def _outcome(self, finished: bool) -> Outcome:
        first, last = self.ends()
        if not finished or self.verdict is None:
            return Outcome(finished, False, "The run has not ended yet.", first, last, self.log.history)
        learnt, sentence = self.verdict["learnt"], self.verdict["sentence"]
        place, risen = place_sentence(first, last)
        if risen:
            log.warning("%s See docs/methods/README.md.", place)
        closing = [s for s in (h.finish(self) for h in self.spec.hooks) if s]
        return Outcome(
            True, learnt, "\n".join(s for s in (sentence, place, *closing) if s), first, last, self.log.history
        )
