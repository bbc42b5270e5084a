"""Distillers by name, with options as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxcompress.distillation.base_distiller import BaseDistiller
from fxcompress.distillation.feature_distiller import (
    ATDistiller,
    FeatureDistiller,
    FitNetDistiller,
    FSPDistiller,
    OFDDistiller,
    ReviewKDDistiller,
)
from fxcompress.distillation.logit_distiller import DISTDistiller, DKDDistiller, LogitDistiller
from fxcompress.distillation.relation_distiller import (
    CCDistiller,
    CRDDistiller,
    PKTDistiller,
    RelationDistiller,
    RKDDistiller,
)
from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.registry import Registry

__all__ = ["DISTILLERS", "make_distiller"]

_ALL: tuple[type[BaseDistiller], ...] = (
    BaseDistiller,
    LogitDistiller,
    DKDDistiller,
    DISTDistiller,
    FeatureDistiller,
    FitNetDistiller,
    ATDistiller,
    FSPDistiller,
    OFDDistiller,
    ReviewKDDistiller,
    RelationDistiller,
    RKDDistiller,
    CRDDistiller,
    PKTDistiller,
    CCDistiller,
)

DISTILLERS = Registry("distiller", {cls.__name__: cls for cls in _ALL})
"""Distillers by class name."""


def make_distiller(config: Mapping[str, Any] | Sequence[Mapping[str, Any]], **models: Any) -> BaseDistiller:
    """A distiller from ``{"type": name, option: value}``, or one that adds up a list of these.

    ``models`` are options that are no plain data: ``teacher``, ``student``, ``example_inputs``. Raises ConfigError naming
    the option and the closest ones.
    """
    if not isinstance(config, Mapping):
        return BaseDistiller(distillers=[make_distiller(part) for part in config], **models)
    options = dict(config)
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError(f"a distiller has a type: one of {', '.join(DISTILLERS)}.")
    cls: type[BaseDistiller] = DISTILLERS[name]
    known = cls.options()
    for key in options:
        if key not in known:
            raise ConfigError(f"{name} has no option {key!r}.{did_you_mean(str(key), known)} It takes: {', '.join(known)}.")
    if isinstance(options.get("distillers"), (list, tuple)):
        options["distillers"] = [d if isinstance(d, BaseDistiller) else make_distiller(d) for d in options["distillers"]]
    try:
        return cls(**options, **models)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}.") from error
