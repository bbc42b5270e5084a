"""PassManager: trace, then for every step of the plan: run it, sweep up, let the observers look."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxcompress import reproducer
from fxcompress.data import Once, fed, split_batch
from fxcompress.distributed import placed_on
from fxcompress.errors import DataError, FxCompressError, PassError, PlanError, VerificationError
from fxcompress.graph import edit, trace
from fxcompress.graph.example import guess_example
from fxcompress.graph.inputs import Arguments, arguments, undisturbed
from fxcompress.graph.island import regions
from fxcompress.graph.select import resolved_step
from fxcompress.graph.sharing import own
from fxcompress.graph.trace import region_inputs
from fxcompress.graph.tree import check_module
from fxcompress.ledger import Ledger
from fxcompress.observe import Diffs, LedgerKeeper, Observer, Promises, Run, Verifier
from fxcompress.pass_base import Context, Pass, Remark
from fxcompress.plan import Plan
from fxcompress.stages import Stages

__all__ = ["PassManager", "example_call", "tried_call"]


class PassManager:
    """Runs a plan over a model.

    ``plan``        a :class:`Plan`, a list, a mapping, YAML text or a path (see :meth:`Plan.parse`)
    ``verify``      check the graph contract and every pass's promise after every pass (needs example inputs or data to
                    run the graph; without them the structure alone is checked)
    ``show``        ``"changes"`` prints what every pass changed in the graph
    ``observers``   further :class:`Observer` objects
    ``reproducer``  the folder in which a failing run leaves what is needed to replay it; None: a new temporary folder;
                    False: none
    ``device``      where steps that train or calibrate run, each process of several on its own GPU; the model comes back
                    for what follows. None: where the model is
    """

    def __init__(
        self,
        plan: Plan | Pass | Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str],
        *,
        verify: bool = True,
        show: str | None = None,
        observers: Sequence[Observer] = (),
        reproducer: str | os.PathLike[str] | bool | None = None,
        seed: int = 0,
        progress: bool | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if show not in (None, "changes"):
            raise PlanError(f"show is {show!r}; it is None or 'changes'.")
        self.plan = Plan.parse(plan)
        self.ledger = Ledger()
        self.reproducer = reproducer
        self.seed, self.progress = seed, progress
        self.device = None if device is None else torch.device(device)
        checks: list[Observer] = [Verifier(), Promises()] if verify else []
        self._watchers: list[Observer] = [*checks, *([Diffs()] if show else []), *observers]

    @undisturbed()
    def run(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        data: Iterable[Any] | None = None,
        *,
        teacher: nn.Module | None = None,
        validation: Iterable[Any] | None = None,
        keep: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> fx.GraphModule:
        """The compressed model; ``model`` itself is left as it is.

        ``example_inputs``  a tensor, a tuple of positional arguments, or a dict by keyword; the first batch of ``data``
                            serves where they are left out
        ``data``            an iterable of batches, for steps that calibrate or train
        ``teacher``         the model to learn from; the model as it came in serves where it is left out
        ``validation``      batches to judge the model on while it trains
        ``keep``            a folder for the model after every step that trains or calibrates; with ``resume`` a run that was
                            interrupted goes on from what it finds there, to the same result

        Raises PlanError before any work where a step needs what was not given; PassError, VerificationError or
        PromiseError where a step fails, with the folder that replays it.
        """
        data = None if data is None else fed(data)
        if data is not None and iter(data) is data:
            if example_inputs is None:
                example_inputs, data = _peeked(iter(data), model)
            data = Once(iter(data))
        call, tried = self._call(model, example_inputs, data)
        self._check_needs(call is not None or data is not None, data, teacher)
        self.ledger.rows.clear()
        traced = trace(model, call, shared=True)
        stages = Stages(keep, str(self.plan), traced, resume)
        context = Context(
            inputs=region_inputs(traced, call) if call is not None else {},
            data=data,
            validation=validation,
            teacher=teacher if teacher is not None else model,
            seed=self.seed,
            progress=self.progress,
        )
        context.remarks = [*tried, *(Remark(rung.module, f"{rung.rung}: {rung.reason}") for rung in traced.meta["rungs"])]
        run = Run(traced, context, model, call)
        self._check_stage(traced)
        watchers = [*self._watchers, LedgerKeeper(self.ledger)]
        for watcher in watchers:
            watcher.begin(run)
        self._steps(run, stages, watchers)
        own(run.model, model)
        for watcher in watchers:
            watcher.end(run)
        entry = {"plan": str(self.plan), "ledger": self.ledger.as_data()}
        run.model.meta["history"] = [*run.model.meta.get("history", []), entry]
        return run.model

    def _steps(self, run: Run, stages: Stages, watchers: Sequence[Observer]) -> None:
        """Every step that no earlier run has taken."""
        if stages.done:
            self._take_up(run, stages, watchers)
        for number, step in list(enumerate(self.plan, 1))[stages.done :]:
            run.context.folder = stages.scratch(number)
            self._step(run, number, watchers)
            if step.costly:
                stages.keep(number, run.model, self.ledger)

    def _take_up(self, run: Run, stages: Stages, watchers: Sequence[Observer]) -> None:
        """Go on from what an interrupted run had kept."""
        run.model = stages.load(run.model)
        for number, step in enumerate(self.plan.steps[: stages.done], 1):
            run.context.folder = stages.scratch(number)
            step.taken_up(run.context)
        self.ledger.rows[:] = stages.rows.rows
        for watcher in watchers:
            watcher.taken_up(run)

    def _step(self, run: Run, number: int, watchers: Sequence[Observer]) -> None:
        run.step = step = resolved_step(self.plan.steps[number - 1], run.model)
        if not step.replaces:
            own(run.model, run.given)
        try:
            for watcher in watchers:
                watcher.before(run)
            with placed_on(run.model, self.device if step.on_device else None):
                step.run_model(run.model, run.context)
            for region in regions(run.model).values():
                edit.finish(region)
            run.context.forget()
            for watcher in watchers:
                watcher.after(run)
        except VerificationError as error:
            raise type(error)(f"{error}{self._leave_reproducer(run, number)}") from error
        except FxCompressError:
            raise
        except Exception as error:  # a pass is somebody's code: say which, and leave a way to replay it
            where = f"step {number} {step.name!r}"
            raise PassError(
                f"{where} failed: {type(error).__name__}: {error}{self._leave_reproducer(run, number)}"
            ) from error

    def _leave_reproducer(self, run: Run, number: int) -> str:
        if self.reproducer is False:
            return ""
        steps = self.plan.steps[:number]
        place = self.reproducer if isinstance(self.reproducer, (str, os.PathLike)) else None
        folder = reproducer.leave(run.given, Plan(steps), run.call, place)
        return f"\nA reproducer is in {folder}; replay it with: python -m fxcompress replay {folder}"

    def _call(self, model: nn.Module, example_inputs: Any, data: Any) -> tuple[Arguments | None, list[Remark]]:
        """One call of the model, and a remark where it is none that was given: a step needs it, and the model takes it."""
        call = example_call(example_inputs, data, model)
        if call is not None or data is not None or not any("inputs" in step.needs for step in self.plan):
            return call, []
        call = tried_call(model)
        if call is None:
            return None, []
        reason = f"no example inputs were given: random ones of shape {tuple(call.args[0].shape)} run through it"
        return call, [Remark("", reason)]

    def _check_needs(self, inputs: bool, data: Any, teacher: Any) -> None:
        given = {
            "inputs": inputs,
            "data": data is not None,
            "teacher": teacher is not None,
        }
        for number, step in enumerate(self.plan, 1):
            for need in step.needs:
                if not given.get(need, True):
                    how = {"inputs": "example_inputs", "data": "data=dataloader", "teacher": "teacher=model"}[need]
                    raise PlanError(f"step {number} {step.name!r} needs {need}, and none were given: run(..., {how}).")

    def _check_stage(self, traced: fx.GraphModule) -> None:
        stage = traced.meta["stage"]
        if self.plan.steps and stage not in self.plan.steps[0].takes:
            first = self.plan.steps[0]
            raise PlanError(f"the model is {stage}, and step 1 {first.name!r} takes a {' or '.join(first.takes)} graph.")


def tried_call(model: nn.Module) -> Arguments | None:
    """A call of a model that nobody gave example inputs for: what its first layer takes, if it runs; else None."""
    check_module(model)
    example = guess_example(model)
    return None if example is None else arguments(example)


def example_call(example_inputs: Any, data: Iterable[Any] | None, model: nn.Module) -> Arguments | None:
    """One call of ``model``: the example inputs, or the first batch of data that can be read again; None for neither."""
    if example_inputs is not None:
        return arguments(example_inputs)
    if data is None or iter(data) is data:  # an iterator's first batch is not ours to take
        return None
    return _peeked(iter(data), model)[0]


def _peeked(data: Iterator[Any], model: nn.Module) -> tuple[Arguments, Iterator[Any]]:
    """The call that an iterator's first batch is, and all of its batches."""
    first = list(itertools.islice(data, 1))
    if not first:
        raise DataError("the dataloader is empty: it yields no batch.")
    return split_batch(first[0], model)[0], itertools.chain(first, data)
