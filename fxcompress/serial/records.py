"""Dataclasses that models return: a saved model makes others like them, since their classes live in the models' code."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

from torch.utils import _pytree as pytree

from fxcompress.errors import ArtifactError

__all__ = ["build_record", "is_record", "record_data"]


def is_record(cls: Any) -> bool:
    """Whether ``cls`` is a dataclass: a plain one, or a mapping whose items are attributes too."""
    return isinstance(cls, type) and dataclasses.is_dataclass(cls)


def record_data(cls: Any) -> dict[str, Any]:
    """The name, the fields and the kind of a dataclass."""
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    return {"record": cls.__name__, "fields": fields, "mapping": issubclass(cls, dict)}


@functools.cache
def build_record(name: str, fields: tuple[str, ...], mapping: bool) -> Any:
    """A dataclass of that name and these fields, each of which may be left out."""
    try:
        made: Any = dataclasses.make_dataclass(
            name, [(field, Any, None) for field in fields], bases=(_Items,) if mapping else (), eq=not mapping
        )
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the saved graph makes {name!r} of {', '.join(fields)}: {error}.") from error
    if mapping:
        pytree.register_pytree_node(
            made,
            lambda record: (list(record.values()), list(record)),
            lambda values, keys: made(**dict(zip(keys, values, strict=True))),
        )
    return made


class _Items(OrderedDict[str, Any]):
    """A mapping whose items are its attributes that are not None, also found by number."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())
