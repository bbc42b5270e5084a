"""What a pass is, what it may use, and what it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx, nn

from fxcompress.errors import DataError
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.island import regions
from fxcompress.graph.recorder import Look

__all__ = ["APPROXIMATE", "EXACT", "STAGES", "Context", "Figures", "Pass", "Promise", "Remark", "close", "hidden"]

STAGES = ("float", "observed", "qdq", "lowered")
"""The stages of a graph: as trained, with observers, with explicit quantize/dequantize, in a backend's kernels."""

T = TypeVar("T")


@dataclass(frozen=True)
class Promise:
    """How far a pass may move the outputs: ``exact`` (same bits), ``close`` (within tolerances), ``approximate``.

    ``rtol`` is relative to the largest output magnitude, the scale at which rounding errors of a network live.
    """

    kind: str
    atol: float = 0.0
    rtol: float = 0.0


EXACT = Promise("exact")
APPROXIMATE = Promise("approximate")


def close(rtol: float, atol: float = 1e-6) -> Promise:
    """Outputs may move by ``atol + rtol * max|output|``."""
    return Promise("close", atol, rtol)


@dataclass(frozen=True)
class Remark:
    """Something a pass did not do, or did in another way than asked: where, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Figures:
    """What a pass measured of layers on its way: what the numbers say, their unit, and each layer's."""

    title: str
    unit: str
    values: Mapping[str, float]


class Pass:
    """One rewrite. A subclass is a frozen dataclass: its fields are its options, :meth:`run` its work.

    ``name``     the word in a plan
    ``takes``    the stages it accepts
    ``leaves``   the stage it leaves the graph in; None leaves it as it was
    ``needs``    what must be given to the run: ``inputs``, ``data``, ``labels``, ``teacher``
    ``promise``  how far outputs may move
    ``costly``   a run that keeps its stages saves the model after this pass
    ``on_device``  it trains or calibrates: a run that was given a device does this there
    ``replaces``  it puts new parameters in the place of old ones and never writes to one, so that those it does not replace
                 need no copy before it runs
    """

    name: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ("float",)
    leaves: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    promise: ClassVar[Promise] = EXACT
    costly: ClassVar[bool] = False
    on_device: ClassVar[bool] = False
    replaces: ClassVar[bool] = False

    def run(self, module: fx.GraphModule, context: Context) -> None:
        """Rewrite one compiled region in place."""
        raise TypeError(f"{type(self).__name__} defines neither run nor run_model")

    def taken_up(self, context: Context) -> None:
        """A run goes on after this step: take up what it left beside the model."""

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        """Rewrite a whole model: every compiled region in turn."""
        for region, module in regions(model).items():
            with context.in_region(region):
                self.run(module, context)
                if self.leaves:
                    module.meta["stage"] = self.leaves
        if self.leaves:
            model.meta["stage"] = self.leaves


@dataclass
class Context:
    """What a pass may use besides the graph.

    ``inputs``    arguments of one call of each compiled region; empty where no example inputs were given
    ``data``      an iterable of batches, or None
    ``validation``  batches to judge the model on while it trains, or None
    ``teacher``   the model to learn from, or None
    ``seed``      for every random choice
    ``progress``  whether to show progress bars; None: on a terminal
    ``folder``    where a long step may keep its own state, or None
    ``looks``     what each region gave for ``inputs``, as it stands; those that somebody has run and is to be run again
    """

    inputs: dict[str, Arguments] = field(default_factory=dict)
    data: Iterable[Any] | None = None
    validation: Iterable[Any] | None = None
    teacher: nn.Module | None = None
    seed: int = 0
    progress: bool | None = None
    folder: Path | None = None
    remarks: list[Remark] = field(default_factory=list)
    figures: list[Figures] = field(default_factory=list)
    region: str = ""
    looks: dict[str, Look] = field(default_factory=dict)
    _analyses: dict[tuple[Any, int], Any] = field(default_factory=dict)

    def skip(self, node: fx.Node | str, reason: str) -> None:
        """Say that ``node`` is left alone, and why."""
        self.remarks.append(Remark(self._where(node), reason))

    note = skip

    def measured(self, title: str, unit: str, values: Mapping[str, float]) -> None:
        """Say what was measured of layers: a plot of its own in a report."""
        self.figures.append(Figures(title, unit, dict(values)))

    def _where(self, node: fx.Node | str) -> str:
        name = node if isinstance(node, str) else str(node.target if node.op == "call_module" else node.name)
        return f"{self.region}.{name}" if self.region and name else name or self.region

    @contextmanager
    def in_region(self, region: str) -> Iterator[None]:
        """Name remarks after ``region`` inside a ``with``."""
        outer, self.region = self.region, region
        try:
            yield
        finally:
            self.region = outer

    def example(self) -> Arguments | None:
        """Arguments of one call of the current region."""
        return self.inputs.get(self.region)

    def analysis(self, analyse: Callable[[fx.GraphModule], T], module: fx.GraphModule) -> T:
        """``analyse(module)``, remembered until the graph changes."""
        key = (analyse, id(module))
        if key not in self._analyses:
            self._analyses[key] = analyse(module)
        return self._analyses[key]

    def forget(self) -> None:
        """Drop what is remembered of the graph: it has changed."""
        self._analyses.clear()
        self.looks.clear()

    def generator(self) -> torch.Generator:
        """A fresh random generator seeded with ``seed``."""
        return torch.Generator().manual_seed(self.seed)

    def resumable(self, what: str) -> dict[str, Any]:
        """Options of a training run for a step that goes on where it was interrupted; none where nothing is kept."""
        return {} if self.folder is None else {"checkpoint": self.folder / f"{what}.pt", "resume": True}

    def require_data(self, who: str) -> Iterable[Any]:
        """The data, or DataError naming who needs it."""
        if self.data is None:
            raise DataError(f"{who} needs data: give run(..., data=dataloader).")
        return self.data


def hidden(progress: bool | None) -> bool | None:
    """tqdm's ``disable``: None hides the bar where the output is not a terminal."""
    return None if progress is None else not progress
