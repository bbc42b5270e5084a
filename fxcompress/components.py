"""Components by name, and what each one is: passes of a plan."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fxcompress.distillation import DISTILLERS, make_distiller
from fxcompress.errors import FxCompressError, PlanError, Where, shown
from fxcompress.options import fault, located, no_such, only, options_of, unknown, validated
from fxcompress.pass_base import Pass
from fxcompress.passes.train import Train
from fxcompress.plan import build_pass
from fxcompress.pruning import (
    ChannelPruner,
    FilterPruner,
    L1UnstructuredPruner,
    LayerPruner,
    MagnitudePruner,
    PruningScheduler,
    RandomPruner,
    StructuredPruner,
)
from fxcompress.pruning.pruning_scheduler import SCHEDULERS
from fxcompress.quantization.ptq import DynamicQuantizer, PTQQuantizer, StaticQuantizer
from fxcompress.quantization.qat import LSQQuantizer, QATQuantizer
from fxcompress.quantization.quantizer import Quantizer
from fxcompress.registry import Registry

__all__ = [
    "DISTILLERS",
    "ORDER",
    "PRUNERS",
    "PRUNING",
    "QUANTIZERS",
    "TRAINING",
    "component_class",
    "components",
    "distiller",
    "finetuning",
    "made",
    "made_pass",
    "pruning_schedule",
    "split",
    "steps_of",
]

_QUANTIZERS = (PTQQuantizer, StaticQuantizer, DynamicQuantizer, QATQuantizer, LSQQuantizer)
QUANTIZERS = Registry("quantizer", {cls.__name__: cls for cls in _QUANTIZERS})
"""Quantizers by name: classes with a ``plan``."""

_PRUNERS = (MagnitudePruner, L1UnstructuredPruner, RandomPruner, StructuredPruner, FilterPruner, ChannelPruner, LayerPruner)
PRUNERS = Registry("pruner", {cls.__name__: cls for cls in _PRUNERS})
"""Pruners by name: classes with ``plan(sparsity)``."""


ORDER = {"prune": PRUNERS, "distill": DISTILLERS, "quantize": QUANTIZERS}
"""The stages of a mapping, in the order in which they run."""


def components() -> dict[str, Callable[[Mapping[str, Any]], tuple[Pass, ...]]]:
    """Every component by name, as a function from its options to the passes it stands for in a plan."""
    names = [name for registry in ORDER.values() for name in registry]
    return {name: functools.partial(_component, name) for name in names}


def _component(name: str, options: Mapping[str, Any]) -> tuple[Pass, ...]:
    return steps_of({"type": name, **options}, ())


def steps_of(config: Mapping[str, Any], where: Where) -> tuple[Pass, ...]:
    """The passes that the component of a configuration stands for; ConfigError at what is wrong."""
    for registry, compiled in _COMPILERS:
        if isinstance(config["type"], str) and config["type"] in registry:
            return tuple(compiled(config, where))
    raise no_such("component", config["type"], components(), (*where, "type"))


def _quantizer_steps(config: Mapping[str, Any], where: Where) -> Iterable[Pass]:
    cls = component_class(config, QUANTIZERS, where)
    own, training = split(cls, config, TRAINING if getattr(cls, "trains", False) else frozenset(), where)
    quantizer: Quantizer = made(cls, own, where)
    if not training and not getattr(quantizer, "trains", False):
        return quantizer.plan
    if "freeze_bn_epochs" in own:
        training["freeze_bn_epochs"] = own["freeze_bn_epochs"]
    return (*quantizer.preparation, made_pass("train", training, where), *quantizer.conversion)


def _pruner_steps(config: Mapping[str, Any], where: Where) -> Iterable[Pass]:
    cls = component_class(config, PRUNERS, where)
    own, extra = split(cls, config, PRUNING, where)
    pruner = made(cls, own, where)
    training = finetuning(extra, where)
    scheduler = pruning_schedule(extra, own, where)
    if scheduler is None:
        yield from _at_once(pruner, training, where)
    elif isinstance(pruner, StructuredPruner):
        yield from _channels_by_and_by(pruner, scheduler, training, where)
    elif isinstance(pruner, LayerPruner):
        raise fault((*where, "scheduler"), "does not fit: layers go at once.")
    else:
        mask = {key: value for key, value in own.items() if key != "sparsity"} | {"criterion": pruner.criterion}
        schedule = {"target_sparsity": pruner.sparsity, "type": type(scheduler).__name__, **extra["scheduler"]}
        yield _masks_by_and_by(mask, schedule, scheduler, training, where)
    if not isinstance(pruner, (StructuredPruner, LayerPruner)):
        yield made_pass("bake-masks", {}, where)


def _at_once(pruner: Any, training: dict[str, Any], where: Where) -> Iterable[Pass]:
    """Everything that is to go, and then the training."""
    yield from pruner.plan(recalibrate=_recalibrates(pruner)) if isinstance(pruner, StructuredPruner) else pruner.plan()
    if training:
        yield made_pass("train", training, where)


def _recalibrates(pruner: StructuredPruner) -> bool:
    return bool(pruner.options["policy"] == "compensate")


def _masks_by_and_by(
    mask: dict[str, Any], schedule: dict[str, Any], scheduler: PruningScheduler, training: dict[str, Any], where: Where
) -> Pass:
    """Training in which a schedule raises the share of weights that are masked."""
    if training.setdefault("epochs", scheduler.end_epoch + 1) <= scheduler.end_epoch:
        late = f"reaches its sparsity at epoch {scheduler.end_epoch} (counted from 0)"
        raise fault((*where, "scheduler"), f"{late}, and training has {training['epochs']} epochs.")
    return made_pass("train", {**training, "schedule": schedule, "mask": mask}, where)


_MOST_EVENTS = 1000
"""Times that a schedule may prune channels: each is a step of the plan."""


def _channels_by_and_by(
    pruner: StructuredPruner, scheduler: PruningScheduler, training: dict[str, Any], where: Where
) -> Iterable[Pass]:
    """Channels go at the epochs of a schedule, with training between; every step counts in the model before the first."""
    last = max(int(training.get("epochs", 0)), scheduler.end_epoch + 1)
    if (scheduler.end_epoch - scheduler.start_epoch) / scheduler.frequency > _MOST_EVENTS or last > 100 * _MOST_EVENTS:
        raise fault((*where, "scheduler"), f"prunes channels more than {_MOST_EVENTS} times; raise its frequency.")
    events = [epoch for epoch in range(last) if scheduler.should_prune(epoch) and scheduler.sparsity_at(epoch) > 0]
    if not events or events[0] > 0:
        yield build_pass("train", {**training, "epochs": events[0] if events else last})
    for number, (epoch, following) in enumerate(zip(events, [*events[1:], last], strict=True)):
        part = scheduler.sparsity_at(epoch) / scheduler.target_sparsity
        asked = {**_asked(pruner, scheduler), "part": part, "earlier": number}
        yield from pruner.plan(recalibrate=_recalibrates(pruner), **asked)
        yield build_pass("train", {**training, "epochs": following - epoch})


def _asked(pruner: StructuredPruner, scheduler: PruningScheduler) -> dict[str, Any]:
    """What a schedule asks in all: the pruner's own target, or the schedule's."""
    return {} if pruner.options["target"] else {"sparsity": scheduler.target_sparsity}


def finetuning(extra: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """Training options from ``finetune_epochs`` and ``finetune``, checked."""
    options = extra.get("finetune", {})
    if not isinstance(options, Mapping):
        raise fault((*where, "finetune"), f"is {shown(options)}; it is a mapping of training options.")
    only(options, TRAINING, (*where, "finetune"))
    made_pass("train", options, (*where, "finetune"))
    if "finetune_epochs" not in extra:
        return dict(options)
    if options.get("epochs", extra["finetune_epochs"]) != extra["finetune_epochs"]:
        raise fault((*where, "finetune", "epochs"), "contradicts 'finetune_epochs'.")
    made_pass("train", {"epochs": extra["finetune_epochs"]}, where, {"epochs": (*where, "finetune_epochs")})
    return {**options, "epochs": extra["finetune_epochs"]}


def pruning_schedule(extra: Mapping[str, Any], own: Mapping[str, Any], where: Where) -> Any:
    """The schedule that a pruning stage asks for, up to the pruner's own sparsity; None where it asks for none."""
    if "scheduler" not in extra:
        return None
    place, config = (*where, "scheduler"), extra["scheduler"]
    cls = component_class(config, SCHEDULERS, place)
    options = {key: value for key, value in config.items() if key != "type"}
    for what, gone in _ends(own).items():
        if options.setdefault("target_sparsity", gone) != gone:
            raise fault((*place, "target_sparsity"), f"contradicts the pruner's {what} of {own[what]!r}.")
    return made(cls, options, place)


def _ends(own: Mapping[str, Any]) -> dict[str, Any]:
    """The share that is gone in the end, by the option of a pruner that says so."""
    shares = own.get("target") or {}
    left = next(iter(shares.values()), None) if isinstance(shares, Mapping) else None
    ends = {"target": 1 - left} if isinstance(left, float) else {}
    return {**ends, **({"sparsity": own["sparsity"]} if "sparsity" in own else {})}


def _distiller_steps(config: Mapping[str, Any], where: Where) -> Iterable[Pass]:
    distiller(config, where)
    own, training = _distiller_options(config, where)
    yield made_pass("distill", {"type": config["type"], "options": own, **training}, where)


def distiller(config: Mapping[str, Any], where: Where, **models: Any) -> Any:
    """The distiller of a configuration, over ``models``; ConfigError at the option that is wrong."""
    own, training = _distiller_options(config, where)
    made_pass("train", training, where)
    try:
        return make_distiller({"type": config["type"], **own}, **models)
    except (FxCompressError, TypeError, ValueError) as error:
        raise located(error, where, own) from error


def _distiller_options(config: Mapping[str, Any], where: Where) -> tuple[dict[str, Any], dict[str, Any]]:
    """A distiller's own options (among them ``distillers``, configurations of further ones), and those of training."""
    cls = component_class(config, DISTILLERS, where)
    own, extra = split(cls, config, TRAINING, where)
    validated(cls, own, where)
    for number, member in enumerate(own.get("distillers", ())):
        distiller(member, (*where, "distillers", number))
    return own, extra


TRAINING = frozenset(f.name for f in dataclasses.fields(Train)) - {"schedule", "mask", "freeze_bn_epochs", "keep_zeros"}
"""What a stage that trains may say about it."""

PRUNING = frozenset({"finetune_epochs", "finetune", "scheduler"})
"""What a pruning stage may say beside the options of its pruner."""

_COMPILERS = ((QUANTIZERS, _quantizer_steps), (PRUNERS, _pruner_steps), (DISTILLERS, _distiller_steps))


def component_class(config: Any, registry: Registry, where: Where) -> Any:
    """The class that a configuration's ``type`` names."""
    if not isinstance(config, Mapping):
        raise fault(where, f"is {shown(config)}; it is a mapping with a 'type'.")
    if "type" not in config:
        raise fault(where, f"'type' is missing: name a {registry.kind}.")
    if not isinstance(config["type"], str) or config["type"] not in registry:
        raise no_such(registry.kind, config["type"], registry, (*where, "type"))
    return registry[config["type"]]


def split(
    cls: Any, config: Mapping[str, Any], others: frozenset[str], where: Where
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of ``cls`` and the ``others`` in a configuration; anything else is refused."""
    own, extra = {}, {}
    known = options_of(cls)
    for key, value in config.items():
        if key == "type":
            continue
        if key in known:
            own[key] = value
        elif key in others:
            extra[key] = value
        else:
            raise unknown(key, dict.fromkeys((*known, *sorted(others))), where)
    return own, extra


def _agreeing(options: Mapping[str, Any], where: Where) -> None:
    """Raise ConfigError for options that contradict one another."""
    included, excluded = options.get("include_layers"), options.get("exclude_layers") or ()
    if included is not None and not included:
        raise fault((*where, "include_layers"), "names no layer; leave it out to take all.")
    both = sorted(set(included or ()) & set(excluded))
    if both:
        raise fault((*where, "exclude_layers"), f"{both[0]!r} is included as well.")
    if "sparsity" in options and options.get("target"):
        raise fault((*where, "target"), "contradicts 'sparsity': what goes is given as one or the other.")
    if "sparsity" in options and options.get("pruning_type") == "semi_structured":
        n, m = options.get("n", 2), options.get("m", 4)
        if m and options["sparsity"] != 1 - n / m:
            raise fault((*where, "sparsity"), f"contradicts {n}:{m}, which leaves {n} of every {m} weights.")


def made(cls: Callable[..., Any], options: Mapping[str, Any], where: Where) -> Any:
    """``cls(**options)``; ConfigError at the option that is wrong."""
    values = validated(cls, options, where)
    _agreeing(values, where)
    try:
        return cls(**values)
    except (FxCompressError, TypeError) as error:
        raise located(error, where, options) from error


def made_pass(name: str, options: Mapping[str, Any], where: Where, places: Mapping[str, Where] | None = None) -> Pass:
    """The pass ``name`` with ``options``; ConfigError at the option that is wrong, ``places`` saying where some stand."""
    try:
        return build_pass(name, options)
    except PlanError as error:
        raise located(error, where, options, places) from error
