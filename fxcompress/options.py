"""What a class or function may be given: its parameters, their types and defaults, and a check that names what is wrong.

The signature is the one description: values of a configuration are checked against it, and its JSON Schema is made from it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import pydantic

from fxcompress.errors import ConfigError, Where, did_you_mean, shown

__all__ = [
    "Count",
    "Fraction",
    "Option",
    "Positive",
    "Seed",
    "Weight",
    "check_given",
    "check_whole",
    "fault",
    "located",
    "no_such",
    "only",
    "options_of",
    "unknown",
    "validated",
]


Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
"""What every random generator takes."""

Count = Annotated[int, pydantic.Field(ge=1)]
"""One or more."""

Fraction = Annotated[float, pydantic.Field(ge=0.0, lt=1.0)]
"""A share in [0, 1)."""

Positive = Annotated[float, pydantic.Field(gt=0.0, allow_inf_nan=False)]
"""A finite number above zero."""

Weight = Annotated[float, pydantic.Field(ge=0.0, allow_inf_nan=False)]
"""A finite factor, zero or more."""


@dataclass(frozen=True)
class Option:
    """One parameter: its type as a pydantic checker, and its default where it has one."""

    name: str
    checker: pydantic.TypeAdapter[Any]
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    def complaint(self, value: Any) -> str:
        """What is wrong with a value: another type, or out of range; empty where nothing is."""
        try:
            self.checker.validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            return error.errors()[0]["msg"].lower()
        return ""


@functools.cache
def options_of(made: Callable[..., Any]) -> dict[str, Option]:
    """The options of a class or function that can be written as plain data; parameters that cannot are left out.

    A parameter without a type takes anything. A class that hands keywords on (``**options``) has the options of its base as
    well.
    """
    is_plain_class = isinstance(made, type) and (not dataclasses.is_dataclass(made) or _has_own_constructor(made))
    typed = getattr(made, "__init__") if is_plain_class else made  # noqa: B009 - mypy mistrusts the plain form
    hints = get_type_hints(typed, include_extras=True)
    found: dict[str, Option] = {}
    for name, parameter in inspect.signature(made).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and isinstance(made, type):
            found = {**options_of(made.__mro__[1]), **found}
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            checker = _checker(hints[name]) if name in hints else pydantic.TypeAdapter(Any)
            if checker is not None:
                found[name] = Option(name, checker, parameter.default)
    return found


def _has_own_constructor(made: type) -> bool:
    return "__init__" in vars(made) and "__dataclass_fields__" not in vars(made)


def _checker(hint: Any) -> pydantic.TypeAdapter[Any] | None:
    """A checker for values of a type; None where they cannot be written as plain data."""
    if hint is Any:
        return None
    try:
        checker: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(hint)
        checker.json_schema()
    except (pydantic.errors.PydanticUserError, pydantic.errors.PydanticInvalidForJsonSchema):
        return None
    return checker


def fault(path: Where, message: str) -> ConfigError:
    """A ConfigError about the value at ``path`` of a configuration."""
    error = ConfigError(f"{dotted(path)}: {message}" if path else message)
    error.path = path
    return error


def dotted(path: Where) -> str:
    """``compression.pipeline[0].type``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def located(
    error: Exception,
    path: Where,
    options: Iterable[str],
    places: Mapping[str, Where] | None = None,
) -> ConfigError:
    """``error``, raised for ``options`` at ``path``, at the option that its message names first.

    ``places``: where options stand that do not stand directly at ``path``.
    """
    text = str(error)
    named = [name for name in map(str, options) if name in text]
    if not named:
        return fault(path, text)
    name = min(named, key=lambda name: (text.find(name), -len(name)))
    return fault((places or {}).get(name, (*path, name)), text)


def validated(made: Callable[..., Any], values: Mapping[str, Any], path: Where) -> dict[str, Any]:
    """``values`` checked against the options of ``made``; ConfigError at the key that is unknown, missing or mistyped."""
    known = options_of(made)
    for key, value in values.items():
        if key not in known and _takes_any_keyword(made):
            continue
        if key not in known:
            raise unknown(key, known, path)
        if wrong := known[key].complaint(value):
            raise fault((*path, key), f"{shown(value)} cannot be meant: {wrong}.")
    for name, option in known.items():
        if option.required and name not in values:
            raise fault(path, f"{name!r} is missing.")
    return dict(values)


def _takes_any_keyword(made: Callable[..., Any]) -> bool:
    """Whether a function has ``**keywords``; a class hands them to its base, whose options are known."""
    return not isinstance(made, type) and any(p.kind is p.VAR_KEYWORD for p in inspect.signature(made).parameters.values())


def check_given(made: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """ConfigError for a value ``given`` to ``made`` that is of another type, or out of its range.

    What cannot be written as plain data is not looked at; a set may stand for a list. A constructor calls it first, with its
    ``locals()``.
    """
    for name, option in options_of(made).items():
        if name in given and (wrong := option.complaint(list(given[name]) if isinstance(given[name], Set) else given[name])):
            raise ConfigError(f"{name} is {shown(given[name])}: {wrong}.")


def check_whole(name: str, value: object, least: int = 0) -> None:
    """Raise ConfigError unless the value of ``name`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; it is a whole number of at least {least}.")


def no_such(kind: str, name: Any, known: Iterable[str], path: Where) -> ConfigError:
    """The error for a value at ``path`` that names nothing that exists."""
    names = list(known)
    hint = did_you_mean(name, names) if isinstance(name, str) else ""
    listed = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
    return fault(path, f"there is no {kind} {shown(name)}.{hint or f' Known: {listed or None}.'}")


def unknown(key: Any, known: Mapping[str, Any], path: Where) -> ConfigError:
    """The error for a key that does not exist."""
    hint = did_you_mean(str(key), known) or f" Known: {', '.join(known)}."
    return fault((*path, key), f"there is no such key.{hint}")


def only(section: Mapping[str, Any], known: Iterable[str], path: Where) -> None:
    """Refuse keys of ``section`` that are not ``known``."""
    for key in section:
        if key not in known:
            raise unknown(key, dict.fromkeys(known), path)
