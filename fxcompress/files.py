"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole", "write_text"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` that becomes it when the block ends; where the block fails, ``path`` stays what it was.

    Nothing but the draft of a process that was killed is ever left behind, and no reader sees half a file.
    """
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
