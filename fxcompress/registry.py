"""Registries: what a configuration may name. Each lives beside what it holds; users add their own with a decorator::

    @OPTIMIZERS.register("lion")
    class Lion(torch.optim.Optimizer): ...

A class is found by its own name as well. A name that is not there is a ConfigError with the closest ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from fxcompress.errors import ConfigError, did_you_mean, shown

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """Names of one kind of thing. Reading a name that is not there raises ConfigError with the closest ones.

    ``kind``     what the things are, for messages: ``optimizer``
    ``entries``  what is there from the start
    """

    def __init__(self, kind: str, entries: Mapping[str, Any] | None = None) -> None:
        self.kind = kind
        self._entries = dict(entries or {})

    def __getitem__(self, name: str) -> Any:
        key = self._key(name)
        if key is None:
            known = ", ".join(self._entries) or "none"
            raise ConfigError(
                f"there is no {self.kind} {shown(name)}.{did_you_mean(str(name), self._entries)} Known: {known}."
            )
        return self._entries[key]

    def __contains__(self, name: object) -> bool:
        return self._key(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _key(self, name: object) -> str | None:
        """The name under which that is held what is asked for: a class is found by its own name too."""
        if not isinstance(name, str) or name in self._entries:
            return name if isinstance(name, str) else None
        return next((key for key, held in self._entries.items() if isinstance(held, type) and held.__name__ == name), None)

    def register(self, name: str | None = None) -> Callable[[T], T]:
        """A decorator that adds a class or function under ``name``, or its own; ConfigError where that is taken."""

        def add(thing: T) -> T:
            key = name or thing.__name__  # type: ignore[attr-defined]
            if key in self._entries:
                raise ConfigError(f"the {self.kind} {key!r} exists; register under another name.")
            self._entries[key] = thing
            return thing

        return add
