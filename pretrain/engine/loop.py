"""The one training loop. It knows a method only through :class:`~nnssl.pretrain.methods.Method`."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nnssl.distributed import is_distributed, rank, world_size
from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.pretrain.data import HELD_OUT, CropLoader, SampleStream, make_loader
from nnssl.pretrain.data.weights import case_weights
from nnssl.pretrain.engine.drawing import draw, draw_views
from nnssl.pretrain.engine.evaluate import HeldOut
from nnssl.pretrain.engine.logs import RunLog
from nnssl.pretrain.engine.messages import disk_reason, epoch_line, memory_advice, non_finite_advice, out_of_memory
from nnssl.pretrain.engine.place import place_sentence
from nnssl.pretrain.engine.signals import StopSignals
from nnssl.pretrain.engine.spec import RunResult, RunSpec
from nnssl.pretrain.engine.speed import Prefetcher, apply_options
from nnssl.pretrain.engine.state import restore, training_state
from nnssl.pretrain.engine.stepping import Numbers, Stepper, views_in_parts
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.types import Crops, Progress
from nnssl.words import per_cent

log = logging.getLogger("nnssl")

GO_ON = "The same command with --c goes on from there."
NOT_ENDED = "The run has not ended yet."


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
        self.stepper = Stepper.of(spec, self.method, module)
        self.prefetch = Prefetcher(spec.device)
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
        self.held_out = HeldOut(self._held_out_crops(), spec.seed, spec.device, spec.engine.place_crops)

    def _train_loader(self) -> CropLoader:
        spec = self.spec
        weights = case_weights(spec.case_set.train, spec.weights)
        stream = SampleStream(spec.seed, spec.batch_size, weights=weights, rank=rank(), world_size=world_size())
        return self._loader(stream, range(self.step, spec.steps), "train", spec.workers)

    def _held_out_crops(self) -> Iterable[Crops]:
        spec = self.spec
        batches = range(spec.engine.held_out_batches)
        if not spec.case_set.held_out or not batches:
            return []
        size = spec.batch_size // self.parts
        stream = SampleStream(spec.seed, size, HELD_OUT, rank=rank(), world_size=world_size())
        return self._loader(stream, batches, "held_out", 0)

    def _loader(self, stream: SampleStream, steps: range, split: str, workers: int) -> CropLoader:
        spec = self.spec
        auxiliary = None if spec.auxiliary is None else spec.auxiliary.reader(split)
        more: dict[str, Any] = {"pin_memory": spec.device.type == "cuda", "auxiliary": auxiliary}
        return make_loader(spec.case_set, spec.plan, spec.request, stream, steps, num_workers=workers, **more)

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

    def fit(self) -> RunResult:
        """Train to the end, or until a signal or a hook asks to stop.

        Raises:
            NonFiniteError: names the cases of the batch; the last checkpoint on disk is from before it.
            NnsslError: out of memory, with what to lower.
        """
        try:
            return self._fit()
        except KeyboardInterrupt:
            if rank() == 0:
                saved = f"The last checkpoint is of step {self._saved}. {GO_ON}"
                saved = "Nothing was saved." if self._saved is None else saved
                log.warning("Interrupted at step %d. %s", self.step, saved)
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

    def _fit(self) -> RunResult:
        spec = self.spec
        for hook in spec.hooks:
            hook.start(self)
        if self.step == 0:
            # evaluated at the first epoch's end, since on a CPU it would hold up the first step for seconds
            self._untrained = deepcopy(self.method) if self.held_out else None
            self.log.event("start", step=0)
        else:
            self.log.event("continue", step=self.step)
        batches = iter(self._train_loader())
        finished = True
        with StopSignals() as signals:
            while self.step < spec.steps and self.stop_reason is None:
                epoch = self.step // spec.iterations
                if not self._epoch(epoch, batches, signals):
                    finished = False
                    break
            self._look_at_untrained()
            self.verdict = self._judge() if finished else None
            self.save(final=finished)
        if finished:
            draw(self, self.step // spec.iterations)
            return self._result()
        name = signals.spoken or "a signal to another process"
        log.info("Stopped by %s after step %d of %d. %s", name, self.step, spec.steps, GO_ON)
        number = signals.number or int(signal.SIGTERM)
        return RunResult(spec.folder.path, None, False, False, NOT_ENDED, self.ends()[1], number)

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
        crops = self.prefetch(crops)
        batches = views_in_parts(self.method, crops, self.parts, spec.device, spec.seed, self.step)
        numbers, stepped = self.stepper.step(batches, self.step, crops.case, stop, self.parts)
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
        bar.set_postfix(
            {**shown, "s/step": f"{seconds:.2f}", "data": per_cent(wait), "left": tqdm.format_interval(left)}
        )
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
        lr, norm = self.stepper.optimiser.param_groups[0]["lr"], means.pop("grad_norm", None)
        row: dict[str, Any] = {"epoch": epoch + 1, "step": self.step, "lr": lr, "grad_norm": norm}
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
        log.info("%s", epoch_line(row, spec.epochs, self.method.note(self._terms(row)), left, self.method.spoken))
        if self.step >= spec.steps or self.stop_reason is not None:
            return  # the final checkpoint comes first, then what is drawn
        if (epoch + 1) % spec.engine.save_every == 0:
            self.save()
        draw(self, epoch + 1, last=False)

    # ---- words ---------------------------------------------------------------------------------------------------

    def ends(self) -> tuple[dict[str, float], dict[str, float]]:
        """Held-out terms before the first step and now; training terms where nothing is held out."""
        history = self.log.history
        first = self.first if self.held_out or not history else self._terms(history[0])
        return first, self._terms(history[-1]) if history else {}

    def _terms(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The held-out terms of an epoch's row; those of training where nothing is held out."""
        prefix = "held_out/" if self.held_out else "train/"
        return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}

    def _judge(self) -> dict[str, Any] | None:
        """Whether the method learnt, by its own judgement; None where no epoch has ended."""
        first, last = self.ends()
        if not last:
            return None
        learnt, sentence = self.method.verdict(first, last)
        if not self.held_out:
            sentence += " (No case is held out: these are training losses.)"
        return {"learnt": bool(learnt), "sentence": sentence}

    def _result(self) -> RunResult:
        folder = self.spec.folder
        first, last = self.ends()
        if self.verdict is None:
            return RunResult(folder.path, folder.final, True, False, NOT_ENDED, last)
        place, risen = place_sentence(first, last)
        if risen:  # said once, also with -q
            log.warning("%s See docs/methods/README.md.", place)
            place = ""
        sentences = [self.verdict["sentence"], place, *(hook.finish(self) for hook in self.spec.hooks)]
        sentence = "\n".join(s for s in sentences if s)
        return RunResult(folder.path, folder.final, True, self.verdict["learnt"], sentence, last)
