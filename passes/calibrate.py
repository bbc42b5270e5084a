"""calibrate: run batches through an observed graph."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from tqdm import tqdm

from fxcompress.data import batches
from fxcompress.distributed import gather, is_main, merge, rank, world
from fxcompress.errors import DataError
from fxcompress.graph.layout import channels_last
from fxcompress.graph.rungs import has_islands
from fxcompress.graph.tree import evaluating
from fxcompress.options import Count
from fxcompress.pass_base import EXACT, Context, Pass, Promise, hidden
from fxcompress.quantization.observer import Backlog, observers

__all__ = ["Calibrate"]

log = logging.getLogger("fxcompress")


@dataclass(frozen=True)
class Calibrate(Pass):
    """Let the observers see up to ``num_batches`` batches, in constant memory.

    A batch that is empty, holds NaN or infinite values, or does not fit the model is refused by number.
    Fewer batches than asked is a warning with both numbers, logged and in the ledger. Under ``torchrun`` every process sees
    its share of the batches, and all of them know what was seen.
    """

    name: ClassVar[str] = "calibrate"
    takes: ClassVar[tuple[str, ...]] = ("observed",)
    needs: ClassVar[tuple[str, ...]] = ("data",)
    promise: ClassVar[Promise] = EXACT
    costly: ClassVar[bool] = True
    on_device: ClassVar[bool] = True

    num_batches: Count = 100

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        watching, backlog = observers(model), Backlog(held=0) if has_islands(model) else Backlog()
        for observer in watching.values():
            observer.enabled, observer.backlog = True, backlog
        seen = 0
        try:
            with evaluating(model), channels_last(model), torch.no_grad():
                every = batches(context.require_data("'calibrate'"), model, self.num_batches)
                feed = itertools.islice(every, rank(), None, world())
                for call in tqdm(feed, "calibrate", disable=hidden(context.progress), leave=False, unit="batch"):
                    self._run(model, call, seen, backlog)
                    seen += 1
        finally:
            for observer in watching.values():
                observer.enabled, observer.backlog = False, None
        merge([observer.calibrator for observer in watching.values()])
        seen = sum(gather(seen))
        if not seen:
            raise DataError("the dataloader is empty: there is nothing to calibrate with.")
        model.meta["calibrated"] = seen
        if seen < self.num_batches:
            reason = f"{self.num_batches} batches were asked for and the data has {seen}"
            context.note("", reason)
            if is_main():
                log.warning("calibrate: %s", reason)

    def _run(self, model: fx.GraphModule, call: object, number: int, backlog: Backlog) -> None:
        try:
            call(model)  # type: ignore[operator]
            backlog.settle()
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"batch {number} does not run through the model: {str(error).splitlines()[0]}") from error
