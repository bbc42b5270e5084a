"""Files: written whole or not at all, read up to a size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxcompress.errors import ConfigError

__all__ = ["read_text", "whole", "write_text"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` that becomes it when the block ends; where the block fails, ``path`` stays what it was.

    Nothing but the draft of a process that was killed is ever left behind, and no reader sees half a file.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}.")
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str, newline: str | None = None) -> None:
    """Write ``text`` in UTF-8."""
    with whole(path) as draft:
        draft.write_text(text, encoding="utf-8", newline=newline)


def read_text(path: Path, most: int = 1 << 26) -> str:
    """A text file in UTF-8 of at most ``most`` bytes; OSError or ValueError (whose message says it) where it is none."""
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return data.decode("utf-8")
