"""Components from configurations, and pipelines of them: each compiles to a plan of passes.

A configuration is a mapping, a YAML file's path or YAML text; the part under ``compression`` counts where there is one::

    compression:
      pipeline:
        - {type: MagnitudePruner, sparsity: 0.5, finetune_epochs: 5}
        - {type: PTQQuantizer, backend: fbgemm}

A ``pipeline`` list runs as written; stages given as a mapping (``prune``, ``distill``, ``quantize``) run in that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxcompress.components import (
    DISTILLERS,
    PRUNERS,
    PRUNING,
    QUANTIZERS,
    TRAINING,
    component_class,
    components,
    distiller,
    finetuning,
    made,
    made_pass,
    pruning_schedule,
    split,
)
from fxcompress.config import Config, read_config
from fxcompress.errors import ConfigError, Where, shown
from fxcompress.graph.tree import check_module
from fxcompress.models import given_or_built
from fxcompress.options import fault
from fxcompress.pipeline import CompressionPipeline, assembled, check_layers, stages_of
from fxcompress.registry import Registry

__all__ = [
    "DISTILLERS",
    "PRUNERS",
    "QUANTIZERS",
    "CompressionPipeline",
    "build_compression_pipeline",
    "build_distiller",
    "build_pruner",
    "build_quantizer",
    "components",
]


def build_quantizer(config: Any, model: nn.Module | None = None) -> Any:
    """The quantizer that ``config`` describes; with ``model``, layer names are checked against it."""
    return _single(config, QUANTIZERS, model)


def build_pruner(config: Any, model: nn.Module | None = None) -> Any:
    """The pruner that ``config`` describes, with its ``scheduler`` (or None); with ``model``, layer names are checked."""
    return _single(config, PRUNERS, model)


def build_distiller(config: Any, teacher: nn.Module | None = None, student: nn.Module | None = None) -> Any:
    """The distiller that ``config`` describes, over ``teacher`` and ``student`` or the models the configuration names.

    Where both are there, a warning says that the one in the configuration is not built.
    """
    config = read_config(config)
    with _places(config):
        stage, where = _section(config)
        stage = dict(stage)
        component_class(stage, DISTILLERS, where)
        models = {"teacher": teacher, "student": student}
        for name, given in models.items():
            described = stage.pop(name, None)
            if described is not None:
                models[name] = given_or_built(given, described, (*where, name))
            elif given is None:
                raise fault(where, f"{name!r} is missing: name a model, or give one to build_distiller.")
        return distiller(stage, where, **models)


def build_compression_pipeline(config: Any, model: nn.Module | None = None) -> CompressionPipeline:
    """The pipeline that ``config`` describes: one component, a ``pipeline`` list, or stages as a mapping.

    ``model`` is what it compresses; without one, the configuration's ``model`` or a distiller's ``student`` is built, or a
    model is given to :meth:`CompressionPipeline.run`. A warning names a model that is not built because one was given.
    Everything in the configuration is checked here.
    """
    config = read_config(config)
    with _places(config):
        section, where = _section(config)
        if "model" in config.data:
            model = given_or_built(model, config.data["model"], ("model",))
        return assembled(stages_of(section, where), model)


def _single(config: Any, registry: Registry, model: nn.Module | None) -> Any:
    """The one component that a configuration describes."""
    config = read_config(config)
    with _places(config):
        section, where = _section(config)
        cls = component_class(section, registry, where)
        if registry is PRUNERS:
            own, extra = split(cls, section, PRUNING, where)
            finetuning(extra, where)
        else:
            own, extra = split(cls, section, TRAINING if getattr(cls, "trains", False) else frozenset(), where)
            made_pass("train", extra, where)
        component = made(cls, own, where)
        if registry is PRUNERS:
            component.scheduler = pruning_schedule(extra, own, where)
        if model is not None:
            check_module(model)
            check_layers(model, own, where)
        return component


@contextmanager
def _places(config: Config) -> Iterator[None]:
    """Errors about a place in ``config`` name its file and line."""
    try:
        yield
    except ConfigError as error:
        raise config.placed(error) from error


def _section(config: Config) -> tuple[Mapping[str, Any], Where]:
    """The part of a configuration that describes compression, and where it stands."""
    if "compression" not in config.data:
        return config.data, ()
    section = config.data["compression"]
    if not isinstance(section, Mapping):
        raise fault(("compression",), f"is {shown(section)}; it is a mapping.")
    return section, ("compression",)
