"""Distillers as dataclasses: what one takes is written down once, as its fields."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, TypeVar, dataclass_transform

from torch import nn

from fxcompress.options import check_given, options_of

__all__ = ["Assignable", "check_options", "distiller"]

T = TypeVar("T", bound=type)


@dataclass_transform(field_specifiers=(dataclasses.field,))
def distiller(cls: T) -> T:
    """Make the annotated names of a module class the parameters of its constructor.

    Defaults do not stay on the class: there they would hide a module that is given in their place.
    """
    dataclasses.dataclass(eq=False, repr=False)(cls)
    for field in dataclasses.fields(cls):
        if field.name in vars(cls):
            delattr(cls, field.name)
    return cls


class Assignable(nn.Module):
    """A module from its first moment on, so that fields can be assigned to it before any constructor has run."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        made = super().__new__(cls)
        nn.Module.__init__(made)
        return made


def check_options(made: nn.Module) -> None:
    """ConfigError for an option of another type, or out of its range; what is no plain data is not looked at."""
    kind: Any = type(made)
    given = {name: getattr(made, name) for name in options_of(kind) if hasattr(made, name)}
    check_given(kind, {name: value for name, value in given.items() if not _holds_module(value)})


def _holds_module(value: Any) -> bool:
    return any(isinstance(leaf, nn.Module) for leaf in (value if isinstance(value, (list, tuple)) else [value]))
