"""The one training loop: distillation, quantization-aware training and fine-tuning, in one process or under ``torchrun``."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer, swa_utils
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from fxcompress.errors import ConfigError, DataError, TrainingError
from fxcompress.training import checkpoint as files
from fxcompress.training.callbacks import Callback, TensorBoard
from fxcompress.training.distributed import gather, is_main, local_device, rank, world
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
from fxcompress.training.terms import TermRecord, gradient_norms, loss_terms

__all__ = ["Trainer", "train"]

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(model: nn.Module, data: Iterable[Any], recipe: Recipe | None = None, **options: Any) -> History:
    """Train ``model`` in place and return its history. Under ``torchrun`` the same call trains on every process.

    ``data``        batches: ``(input, target)``, or dicts by keyword; a ``DataLoader``, or anything that can be iterated
                    again. A batch is the global one: processes share it.
    ``recipe``      epochs, optimizer, precision, … (:class:`Recipe`)
    ``loss``        a function of ``(output, target)``, or its name; a scalar, or scalars by name, which are summed. None:
                    ``model(images, targets, …)`` returns ``(output, {name: loss})`` itself, as distillers do.
    ``optimizer``, ``scheduler``  objects in the place of the recipe's; such a scheduler steps once an epoch
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
        self.model, self.recipe = model, recipe or Recipe()
        self.loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or build_optimizer(self.recipe, self.parameters)
        self.feed = Feed(data, self.recipe.seed)
        self._scheduler, self._scheduler_is_ours = scheduler, scheduler is None
        self._evaluate, self._progress = evaluate, progress
        self.callbacks = [*callbacks, *([TensorBoard(log_dir)] if log_dir else [])]
        self._path = None if checkpoint is None else Path(checkpoint)
        self._resume_wanted = resume
        if self._path is not None and self._path.exists() and not resume:
            raise ConfigError(
                f"there is a checkpoint at {str(self._path)!r}: go on from it with resume=True, or move it away."
            )
        self.epoch = self.step = self.batch = 0
        self.history = History()
        self.device = local_device(self.parameters[0].device)
        self._best: float | None = None
        self._best_state: dict[str, Any] | None = None
        self._waited = 0
        self._first_norms: dict[str, float] = {}
        self._averages: list[Tensor] = []

    def stop(self, reason: str) -> None:
        """End after this epoch."""
        self.history.stopped = reason

    def run(self) -> History:
        """Train to the end."""
        modes = {module: module.training for module in self.model.modules()}
        with preserved_randomness():
            self._set_up()
            self._resume()
            while self.epoch < self.recipe.epochs and not self.history.stopped:
                self._run_epoch()
            self._finish()
        for module, training in modes.items():
            module.training = training
        return self.history

    def _set_up(self) -> None:
        recipe = self.recipe
        self.model.to(self.device)
        horizon = Horizon(recipe.epochs, self._steps_per_epoch())
        if self._scheduler is None:
            self._scheduler = build_schedule(recipe, self.optimizer, horizon)
        self._dtype = _PRECISIONS[recipe.precision]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self._record = TermRecord(self._patience_for_values())
        if recipe.ema is not None:
            self._averages = [p.detach().clone() for p in self.parameters]
            self._average = swa_utils.get_ema_multi_avg_fn(recipe.ema)
        self._forward: Callable[..., Any] = self.model
        if world() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self._forward = DistributedDataParallel(
                self.model, device_ids=ids, find_unused_parameters=recipe.find_unused_parameters
            )

    def _patience_for_values(self) -> int:
        return 1 if self.device.type == "cpu" and world() == 1 else 16

    def _steps_per_epoch(self) -> int | None:
        try:
            return -(-len(self.feed) // self.recipe.accumulate)
        except TypeError:
            return None

    # one epoch

    def _run_epoch(self) -> None:
        started = time.perf_counter()
        if self.batch == 0:
            self._enter(self.epoch)
            self._record = TermRecord(self._record.wait)
        batches = self.feed.batches(self.epoch, self.batch)
        self._after_skipping()
        before = self.batch
        for group in self._groups(batches):
            self._take_step(group)
            for callback in self.callbacks:
                callback.after_step(self, self.step)
            if self.recipe.checkpoint_every and self.step % self.recipe.checkpoint_every == 0:
                self._save()
        if before == self.batch == 0:
            raise DataError("the dataloader is empty: there is nothing to train on.")
        self._end_epoch(time.perf_counter() - started)

    def _enter(self, epoch: int) -> None:
        """Make the model what it is at the start of ``epoch``."""
        seed_everything(self.recipe.seed, epoch)
        self.model.train()
        enter = getattr(self.model, "set_epoch", None)
        if enter is not None:
            enter(epoch)
        for callback in self.callbacks:
            callback.enter_epoch(self, epoch)

    def _groups(self, batches: Iterator[Any]) -> Iterator[list[Any]]:
        """The batches of every step."""
        title = f"epoch {self.epoch + 1}/{self.recipe.epochs}"
        hidden = True if not is_main() else None if self._progress is None else not self._progress
        total = self._steps_per_epoch()
        done = self.batch // self.recipe.accumulate
        with tqdm(total=total, desc=title, initial=done, disable=hidden, leave=False, unit="step") as bar:
            while group := list(itertools.islice(batches, self.recipe.accumulate)):
                yield group
                bar.update()

    def _take_step(self, group: list[Any]) -> None:
        sizes = [batch_size(batch) for batch in group]
        for number, (batch, size) in enumerate(zip(group, sizes, strict=True), 1):
            with self._local(number < len(group)):
                self._backward(batch, size, size / sum(sizes))
        self._descend()
        self.batch += len(group)
        self.step += 1

    def _local(self, more: bool) -> AbstractContextManager[Any]:
        """Gradients of all but a step's last batch stay on this process."""
        return self._forward.no_sync() if more and isinstance(self._forward, DistributedDataParallel) else nullcontext()

    def _backward(self, batch: Any, size: int, share: float) -> None:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not torch.float32):
            terms = loss_terms(self._forward, self.model, self.loss, batch, self.device)
        weights: Mapping[str, float] = getattr(self.model, "loss_weights", None) or {}
        total = sum((weights.get(name, 1.0) * value.float() for name, value in terms.items()), start=torch.zeros(()))
        self._record.add(self.step + 1, terms, total, size)
        if self.recipe.gradient_norms and self.batch == 0 and not self._first_norms:
            norms = gradient_norms(terms, self.parameters, self._scaler.get_scale())
            self._first_norms = {f"gradient/{name}": norm for name, norm in norms.items()}
            self._first_norms |= {f"weight/{name}": float(weights.get(name, 1.0)) for name in terms}
        self._scaler.scale(total * share if share != 1.0 else total).backward()

    def _descend(self) -> None:
        if self.recipe.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        scale = self._scaler.get_scale() if self._scaler.is_enabled() else 1.0
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()
        skipped = self._scaler.is_enabled() and self._scaler.get_scale() < scale
        if skipped:
            return
        if self._scheduler_is_ours and self._scheduler is not None:
            self._scheduler.step()
        if self._averages:
            with torch.no_grad():
                self._average(self._averages, self.parameters, 0)

    def _end_epoch(self, seconds: float) -> None:
        means = self._record.means()
        row: dict[str, float] = {"epoch": self.epoch, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        row["loss"] = means.pop("loss")
        row |= {f"loss/{name}": value for name, value in means.items()}
        row |= {name: value for name, value in self._first_norms.items() if means or not name.startswith("weight")}
        row |= self._evaluated()
        row["seconds"] = seconds
        self._first_norms = {}
        self.history.rows.append(row)
        if not self._scheduler_is_ours and self._scheduler is not None:
            self._scheduler.step()
        for callback in self.callbacks:
            callback.end_epoch(self, row)
        self._watch(row)
        self.epoch, self.batch = self.epoch + 1, 0
        self._save()

    def _evaluated(self) -> dict[str, float]:
        """What the evaluation says of the weights that would be kept now; rank 0's word where processes differ."""
        if self._evaluate is None:
            return {}
        modes = {module: module.training for module in self.model.modules()}
        self._swap()
        try:
            with torch.no_grad():
                found = self._evaluate(self.model.eval())
        finally:
            self._swap()
            for module, training in modes.items():
                module.training = training
        named = (
            found
            if isinstance(found, Mapping)
            else {"metric" if self.recipe.metric == "loss" else self.recipe.metric: found}
        )
        return gather({name: float(value) for name, value in named.items()})[0]

    def _swap(self) -> None:
        """Exchange the parameters with their moving averages, where there are any."""
        for parameter, average in zip(self.parameters, self._averages, strict=False):
            parameter.data, average.data = average.data, parameter.data

    def _watch(self, row: dict[str, float]) -> None:
        """Early stopping."""
        if self.recipe.patience is None:
            return
        if self.recipe.metric not in row:
            raise ConfigError(f"metric is {self.recipe.metric!r}, and an epoch gives: {', '.join(row)}. Give evaluate=...")
        if self.recipe.better(row[self.recipe.metric], self._best):
            self._best, self._waited = row[self.recipe.metric], 0
            self._swap()
            self._best_state = {name: value.clone() for name, value in _tensors(self.model).items()}
            self._swap()
        else:
            self._waited += 1
        if self._waited >= self.recipe.patience:
            self.stop(f"{self.recipe.metric} has not improved on {self._best:.6g} for {self._waited} epochs")

    def _finish(self) -> None:
        """Leave the model with the weights to keep."""
        self._swap()
        if self._best_state is not None:
            with torch.no_grad():
                for name, value in _tensors(self.model).items():
                    value.copy_(self._best_state[name])

    # state

    def _save(self) -> None:
        if self._path is None:
            return
        self._record.flush()
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise TrainingError(f"weights are not finite after step {self.step}: training stops; the last checkpoint stays.")
        generators = gather(random_state())
        if is_main():
            files.write(self._state(generators), self._path)

    def _state(self, generators: list[Any]) -> dict[str, Any]:
        assert self._scheduler is not None
        return {
            "recipe": self.recipe.as_data(),
            "processes": world(),
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
            "model": files.model_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "averages": self._averages,
            "record": self._record.state_dict(),
            "norms": self._first_norms,
            "history": self.history.as_data(),
            "best": self._best,
            "best_state": self._best_state,
            "waited": self._waited,
            "random": generators,
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }

    def _resume(self) -> None:
        self._generators: dict[str, Any] | None = None
        if not self._resume_wanted or self._path is None or not self._path.exists():
            return
        state = files.read(self._path)
        self._check_same_run(state)
        for epoch in range(state["epoch"] + (state["batch"] > 0)):
            self._enter(epoch)
        assert self._scheduler is not None
        files.load_model_state(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
        self.epoch, self.step, self.batch = state["epoch"], state["step"], state["batch"]
        self._record.load_state_dict(state["record"])
        self._first_norms = state["norms"]
        self.history.rows, self.history.stopped = state["history"]["rows"], state["history"]["stopped"]
        self._best, self._waited = state["best"], state["waited"]
        best: dict[str, Tensor] | None = state["best_state"]
        self._best_state = None if best is None else {name: value.to(self.device) for name, value in best.items()}
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=False):
            callback.load_state_dict(saved)
        self._generators = state["random"][rank()]

    def _after_skipping(self) -> None:
        """Mid-epoch, the generators stand where the checkpoint left them."""
        if self.batch and self._generators is not None:
            restore_random_state(self._generators)
        self._generators = None

    def _check_same_run(self, state: dict[str, Any]) -> None:
        mine = {**self.recipe.as_data(), "processes": world()}
        saved = {**state["recipe"], "processes": state["processes"]}
        different = [name for name in mine if saved.get(name) != mine[name]]
        if different:
            parts = ", ".join(f"{name} was {saved.get(name)!r} and is {mine[name]!r}" for name in different)
            raise ConfigError(f"the checkpoint {str(self._path)!r} is of another run: {parts}.")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
