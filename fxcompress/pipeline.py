"""Pipelines: stages that compress a model, one after the other, as one plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxcompress.components import DISTILLERS, ORDER, component_class, steps_of
from fxcompress.errors import ConfigError, PlanError, Where, shown
from fxcompress.graph.select import Selection
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager
from fxcompress.models import build_model, given_or_built
from fxcompress.options import fault, only, unknown
from fxcompress.pass_base import Pass
from fxcompress.plan import Plan
from fxcompress.quantization.quantizer import in_eval_mode

__all__ = ["CompressionPipeline", "Stage", "assembled", "check_layers", "stages_of"]


@dataclass(frozen=True)
class Stage:
    """One component of a pipeline: its type, and the passes it is."""

    title: str
    steps: tuple[Pass, ...]


class CompressionPipeline:
    """Stages that compress a model, one after the other: :attr:`plan` is what they compile to, :meth:`run` runs it.

    ``stages``   the components, in order
    ``model``    what is compressed; None: given to :meth:`run`
    ``teacher``  what distillation stages learn from; None: given to :meth:`run`, or the model as it came in
    """

    def __init__(self, stages: Sequence[Stage], model: nn.Module | None = None, teacher: nn.Module | None = None) -> None:
        self.stages, self.model, self.teacher = tuple(stages), model, teacher
        self.plan = Plan(tuple(step for stage in self.stages for step in stage.steps))
        self.ledger = Ledger()

    def run(
        self,
        model: nn.Module | None = None,
        data: Iterable[Any] | None = None,
        example_inputs: Any = None,
        *,
        teacher: nn.Module | None = None,
        **options: Any,
    ) -> fx.GraphModule:
        """The compressed model. ``options`` are those of :meth:`PassManager.run` (``validation``, ``keep``, ``resume``) and
        of :class:`PassManager` (``verify``, ``seed``, ``progress``, ``device``, …)."""
        target = model if model is not None else self.model
        if target is None:
            raise ConfigError("there is no model to compress: give run(model), or name one in the configuration.")
        during = {name: options.pop(name) for name in ("validation", "keep", "resume") if name in options}
        manager = PassManager(self.plan, **options)
        self.ledger = manager.ledger
        return manager.run(
            in_eval_mode(target), example_inputs, data, teacher=teacher if teacher is not None else self.teacher, **during
        )

    def __str__(self) -> str:
        lines = []
        for stage in self.stages:
            lines += [f"# {stage.title}", str(Plan(stage.steps)).rstrip()]
        return "\n".join(lines)


def stages_of(section: Mapping[str, Any], where: Where) -> list[tuple[Any, Where]]:
    """The configuration of every stage, in the order in which they run, and where each stands."""
    forms = [key for key in ("type", "pipeline") if key in section]
    named = [key for key in section if key in ORDER]
    if len(forms) + bool(named) > 1:
        raise fault(
            (*where, forms[-1]), "contradicts what stands beside it: write a 'type', a 'pipeline', or stages by name."
        )
    if "type" in section:
        return [(section, where)]
    if named:
        return _ordered(section, where)
    if "pipeline" not in section:
        if not section:
            raise fault(where, "is empty; it needs a 'type' or 'pipeline'.")
        raise unknown(next(iter(section)), dict.fromkeys(("type", "pipeline", *ORDER)), where)
    only(section, {"pipeline"}, where)
    pipeline, place = section["pipeline"], (*where, "pipeline")
    if not isinstance(pipeline, (Mapping, list, tuple)) or not pipeline:
        raise fault(place, f"is {shown(pipeline)}; it is a list of stages, or stages by name.")
    if isinstance(pipeline, Mapping):
        return _ordered(pipeline, place)
    return [(stage, (*place, number)) for number, stage in enumerate(pipeline)]


def _ordered(section: Mapping[str, Any], where: Where) -> list[tuple[Any, Where]]:
    only(section, ORDER, where)
    found = []
    for name, registry in ORDER.items():
        if name in section:
            stage = section[name]
            component_class(stage, registry, (*where, name))
            found.append((stage, (*where, name)))
    return found


def assembled(stages: Sequence[tuple[Any, Where]], model: nn.Module | None) -> CompressionPipeline:
    """The pipeline of these stages; models and the teacher they name are built here. ConfigError at what is wrong."""
    built, teacher = [], None
    for config, where in stages:
        if isinstance(config, Mapping) and config.get("type") in DISTILLERS:
            config = dict(config)
            if "student" in config:
                model = given_or_built(model, config.pop("student"), (*where, "student"))
            if "teacher" in config:
                if teacher is not None:
                    raise fault((*where, "teacher"), "a pipeline has one teacher, and an earlier stage names it.")
                teacher = build_model(config.pop("teacher"), (*where, "teacher"))
        built.append(_stage(config, where))
        if model is not None and isinstance(config, Mapping):
            check_layers(model, config, where)
    steps = iter(list(_zeros_kept(step for stage in built for step in stage.steps)))
    kept = [Stage(stage.title, tuple(next(steps) for _ in stage.steps)) for stage in built]
    try:
        return CompressionPipeline(kept, model, teacher)
    except PlanError as error:
        raise fault(stages[0][1] if len(stages) == 1 else stages[0][1][:-1], str(error)) from error


def _stage(config: Any, where: Where) -> Stage:
    """One stage: a component by its ``type``, or a pass as a plan writes it."""
    if isinstance(config, Mapping) and "type" in config:
        return Stage(str(config["type"]), steps_of(config, where))
    try:
        steps = Plan.parse([config]).steps
    except PlanError as error:
        raise fault(where, str(error)) from error
    return Stage(steps[0].name, steps)


def _zeros_kept(steps: Iterable[Pass]) -> Iterator[Pass]:
    """Training that comes after masks leaves their zeros alone."""
    baked = False
    for step in steps:
        baked = baked or step.name == "bake-masks"
        keeps = baked and hasattr(step, "keep_zeros")
        yield dataclasses.replace(step, keep_zeros=True) if keeps else step  # type: ignore[type-var]


def check_layers(model: nn.Module, options: Mapping[str, Any], where: Where) -> None:
    """Layer names in ``options`` must be layers of ``model``."""
    for key in ("include_layers", "exclude_layers"):
        for number, pattern in enumerate(options.get(key) or ()):
            try:
                Selection((pattern,)).check(model)
            except ConfigError as error:
                raise fault((*where, key, number), str(error)) from error
