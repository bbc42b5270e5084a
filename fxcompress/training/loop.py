"""The one training loop: distillation, quantization-aware training and fine-tuning, in one process or under ``torchrun``."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from fxcompress.data import fitting
from fxcompress.distributed import gather, is_main, local_device, share_buffers, world
from fxcompress.errors import ConfigError, DataError, TrainingError, shown
from fxcompress.graph.tree import check_module, evaluating, kept_modes
from fxcompress.training import checkpoint as files
from fxcompress.training.average import Average, Best
from fxcompress.training.callbacks import Callback, TensorBoard
from fxcompress.training.history import History
from fxcompress.training.order import (
    Feed,
    batch_size,
    preserved_randomness,
    random_state,
    restore_random_state,
    seed_everything,
)
from fxcompress.training.recipe import LOSSES, Horizon, Recipe, build_optimizer, build_schedule
from fxcompress.training.terms import TermRecord, gradient_norms, loss_terms, weighted

__all__ = ["Trainer", "train"]

log = logging.getLogger("fxcompress")

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(model: nn.Module, data: Iterable[Any], recipe: Recipe | None = None, **options: Any) -> History:
    """Train ``model`` in place and return its history. Under ``torchrun`` the same call trains on every process.

    ``data``        batches: ``(input, target)``, or dicts by keyword; a ``DataLoader``, or anything that can be iterated
                    again. A batch is the global one: processes share it.
    ``recipe``      epochs, optimizer, precision, … (:class:`Recipe`)
    ``loss``        a function of ``(output, target)``, or its name; a scalar, or scalars by name, which are summed. None:
                    ``model(images, targets, …)`` returns ``(output, {name: loss})`` itself, as distillers do.
    ``optimizer``, ``scheduler``  objects in the place of the recipe's; such a scheduler steps after every epoch
    ``evaluate``    a function of the model after every epoch, in eval mode, without gradients: a number, or numbers by name
    ``callbacks``   :class:`Callback` objects
    ``checkpoint``  the file that holds the run's state; with ``resume=True`` a run that finds it goes on from it, exactly
    ``log_dir``     a folder for TensorBoard
    ``progress``    whether to show a progress bar; None: on a terminal

    A model may have ``loss_weights``, factors of its terms by name (1 where one is not named), read at every step, and
    ``set_epoch(epoch)``, called with epochs from 0. The trained model is left in the mode (train or eval) it came in.

    Raises TrainingError where a loss or the weights are not finite, naming the term and the step; the last checkpoint stays.
    """
    return Trainer(model, data, recipe, **options).run()


_HALF = "float16 weights lose small steps, and optimizers overflow: train model.float() with precision='fp16' instead"


class Trainer:
    """A training run; callbacks see ``model``, ``optimizer``, ``epoch`` (from 0), ``step`` (steps taken) and ``history``."""

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        recipe: Recipe | None = None,
        *,
        loss: Callable[[Any, Any], Any] | str | None = None,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        log_dir: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> None:
        check_module(model)
        _check(recipe, loss, optimizer, evaluate, callbacks)
        self.model, self.recipe = model, recipe or Recipe()
        self.path = None if checkpoint is None else Path(checkpoint)
        self._found = self.path is not None and self.path.exists()
        if self._found and not resume:
            raise ConfigError(f"there is a checkpoint at {str(self.path)!r}: resume=True goes on from it; or move it away.")
        self.loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if any(parameter.dtype is torch.float16 for parameter in self.parameters):
            log.warning("train: %s", _HALF)
        self.optimizer = optimizer or build_optimizer(self.recipe, self.parameters)
        self.device = local_device(self.parameters[0].device)
        self.model.to(self.device)
        self.feed = Feed(data, self.recipe.seed)
        self.steps_per_epoch = _steps(self.feed, self.recipe.accumulate)
        self._scheduler_is_ours = scheduler is None
        self.scheduler = scheduler or self._schedule()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.recipe.precision == "fp16")
        self.record = TermRecord(1 if self.device.type == "cpu" and world() == 1 else 16)
        self.average, self.best = Average(self.parameters, self.recipe.ema), Best(self.recipe)
        self.callbacks = [*callbacks, *([TensorBoard(log_dir)] if log_dir else [])]
        self.epoch = self.step = self.batch = 0
        self.first: dict[str, float] = {}
        self.history = History()
        self._evaluate, self._progress = evaluate, progress
        self._generators: Any = None
        self._forward: Callable[..., Any] = model

    def _schedule(self) -> LRScheduler:
        return build_schedule(self.recipe, self.optimizer, Horizon(self.recipe.epochs, self.steps_per_epoch))

    @property
    def parts(self) -> dict[str, Any]:
        """Everything beside the model that has a state."""
        return {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "record": self.record,
            "average": self.average,
            "best": self.best,
        }

    def stop(self, reason: str) -> None:
        """End after this epoch."""
        self.history.stopped = reason

    def run(self) -> History:
        """Train to the end, also where the caller is in ``no_grad`` or ``inference_mode``."""
        with kept_modes(self.model), preserved_randomness(), torch.inference_mode(False), torch.enable_grad():
            if self._found and self.path is not None:
                self._generators = files.take_up(self, files.read(self.path), self.path)
            if world() > 1:
                self._forward = self._shared()
            while self.epoch < self.recipe.epochs and not self.history.stopped:
                self._run_epoch()
        self.average.swap()
        self.best.give_back(self.model)
        return self.history

    def _shared(self) -> DistributedDataParallel:
        ids = [self.device.index] if self.device.type == "cuda" else None
        unused = self.recipe.find_unused_parameters
        return DistributedDataParallel(self.model, device_ids=ids, find_unused_parameters=unused)

    def enter(self, epoch: int) -> None:
        """Make the model what it is at the start of ``epoch``."""
        seed_everything(self.recipe.seed, epoch)
        self.model.train()
        set_epoch = getattr(self.model, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        for callback in self.callbacks:
            callback.enter_epoch(self, epoch)

    def _run_epoch(self) -> None:
        started = time.perf_counter()
        if self.batch == 0:
            self.enter(self.epoch)
            self.record.clear()
            self.first = {}
        batches = self.feed.batches(self.epoch, self.batch)
        if self.batch:
            restore_random_state(self._generators)
        for group in self._groups(batches):
            self._take_step(group)
            for callback in self.callbacks:
                callback.after_step(self, self.step)
            if self.recipe.checkpoint_every and self.step % self.recipe.checkpoint_every == 0:
                self._save()
        if not self.batch:
            raise DataError("the dataloader is empty: there is nothing to train on.")
        self._end_epoch(time.perf_counter() - started)

    def _groups(self, batches: Iterator[Any]) -> Iterator[list[Any]]:
        """The batches of every step."""
        title = f"epoch {self.epoch + 1}/{self.recipe.epochs}"
        hidden = True if not is_main() else None if self._progress is None else not self._progress
        done = self.batch // self.recipe.accumulate
        with tqdm(total=self.steps_per_epoch, desc=title, initial=done, disable=hidden, leave=False, unit="step") as bar:
            while group := list(itertools.islice(batches, self.recipe.accumulate)):
                yield group
                bar.update()

    def _take_step(self, group: list[Any]) -> None:
        sizes = [batch_size(batch) for batch in group]
        if not sum(sizes):
            raise DataError(f"batch {self.batch} holds no sample: there is nothing to train on.")
        for number, (batch, size) in enumerate(zip(group, sizes, strict=True), 1):
            with self._local(number < len(group)):
                self._backward(batch, self.batch + number - 1, size, size / sum(sizes))
        self._descend()
        self.batch += len(group)
        self.step += 1

    def _local(self, more: bool) -> AbstractContextManager[Any]:
        """Gradients of all but a step's last batch stay on this process."""
        return self._forward.no_sync() if more and isinstance(self._forward, DistributedDataParallel) else nullcontext()

    def _backward(self, batch: Any, position: int, size: int, share: float) -> None:
        dtype = _PRECISIONS[self.recipe.precision]
        half = nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
        with half, fitting(position):
            terms, weights = loss_terms(self._forward, self.model, self.loss, batch, self.device)
        total = weighted(terms, weights)
        self.record.add(self.step + 1, terms, total, size)
        if not self.first and self.recipe.gradient_norms:
            norms = gradient_norms(terms, self.parameters, self.scaler.get_scale())
            self.first = {f"gradient/{name}": norm for name, norm in norms.items()}
            self.first |= {f"weight/{name}": weight for name, weight in weights.items()}
        self.scaler.scale(total * share if share != 1.0 else total).backward()

    def _descend(self) -> None:
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.get_scale() < scale:  # fp16 overflowed, and no step was taken
            return
        if self._scheduler_is_ours:
            self.scheduler.step()
        self.average.update()

    def _end_epoch(self, seconds: float) -> None:
        means = self.record.means()
        share_buffers(self.model)
        row = {"epoch": self.epoch, "step": self.step, "lr": float(self.optimizer.param_groups[0]["lr"])}
        row["loss"] = means.pop("loss")
        row |= {f"loss/{name}": value for name, value in means.items()} | self.first
        with self.average.in_place():
            row |= self._evaluated()
            reason = self.best.watch(row, self.model)
        row["seconds"] = seconds
        self.history.rows.append(row)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(row[self.recipe.metric])
        elif not self._scheduler_is_ours:
            self.scheduler.step()
        for callback in self.callbacks:
            callback.end_epoch(self, row)
        if reason:
            self.stop(reason)
        self.epoch, self.batch = self.epoch + 1, 0
        self._save()

    def _evaluated(self) -> dict[str, float]:
        """What the evaluation says of the weights as they are; rank 0's word where processes differ."""
        if self._evaluate is None:
            return {}
        with evaluating(self.model), torch.no_grad():
            found = self._evaluate(self.model)
        name = "metric" if self.recipe.metric == "loss" else self.recipe.metric
        named = found if isinstance(found, Mapping) else {name: found}
        return gather({name: float(value) for name, value in named.items()})[0]

    def _save(self) -> None:
        if self.path is None:
            return
        self.record.flush()
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise TrainingError(f"weights are not finite after step {self.step}: training stops; the last checkpoint stays.")
        generators = gather(random_state())
        if is_main():
            files.write(files.captured(self, generators), self.path)


def _check(recipe: Any, loss: Any, optimizer: Any, evaluate: Any, callbacks: Any) -> None:
    """Raise ConfigError for a part of a training run that is of another kind."""
    kinds: tuple[tuple[str, Any, Any, str], ...] = (
        ("recipe", recipe, Recipe, "a Recipe"),
        ("loss", loss, (str, Callable), "a function of (output, target), or its name"),
        ("optimizer", optimizer, Optimizer, "an optimizer over the model's parameters; a recipe names one"),
        ("evaluate", evaluate, Callable, "a function of the model"),
        ("callbacks", callbacks, Iterable, "a list of Callback objects"),
    )
    for name, value, kind, meant in kinds:
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} is {shown(value)}; it is {meant}.")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks holds {shown(callback)}; it is a list of Callback objects, such as OnEpoch.")


def _steps(feed: Feed, accumulate: int) -> int | None:
    try:
        return -(-len(feed) // accumulate)
    except TypeError:
        return None
