"""Files: written whole or not at all, read up to a size; and whether a place can be written to, asked before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fxcompress.errors import ConfigError, shown

__all__ = [
    "make_folder",
    "path_of",
    "read_json",
    "read_text",
    "target_file",
    "target_folder",
    "whole",
    "write_text",
    "writing",
]


def path_of(path: Any, what: str) -> Path:
    """``path`` as a Path; ConfigError where it cannot name a file, ``what`` saying what it is for."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ConfigError(f"{what} takes a path, a str or a pathlib.Path, not {shown(path)}.")
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise ConfigError(f"{what}: {shown(path)} is no path; name a file or folder.")
    return Path(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ConfigError where the system does not let ``path`` be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{shown(str(path))} cannot be written: {reason}. Choose another place.") from error


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it, if they are not there; ConfigError where that cannot be."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` that becomes it when the block ends; where the block fails, ``path`` stays what it was.

    Nothing but the draft of a process that was killed is ever left behind, and no reader sees half a file.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}.")
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            yield draft
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, newline: str | None = None) -> None:
    """Write ``text`` in UTF-8; ConfigError where that cannot be."""
    with whole(path_of(path, "writing")) as draft:
        draft.write_text(text, encoding="utf-8", newline=newline)


def read_text(path: str | os.PathLike[str], most: int = 1 << 26) -> str:
    """A text file in UTF-8 of at most ``most`` bytes; OSError or ValueError (whose message says it) where it is none."""
    with open(path_of(path, "reading"), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save it as UTF-8") from error


def read_json(path: str | os.PathLike[str], most: int = 1 << 30) -> Any:
    """The data of a JSON file in UTF-8; OSError or ValueError (whose message says it) where it is none."""
    try:
        return json.loads(read_text(path, most))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def target_file(path: str | os.PathLike[str], what: str, endings: Sequence[str] = (), *, made: bool = False) -> Path:
    """Where a file is going to be written; ConfigError where it cannot be, ``what`` saying what asks for it.

    ``endings``  how its name may end; ``made``: folders on the way to it will be made
    """
    target = path_of(path, what)
    if endings and target.suffix.lower() not in endings:
        raise ConfigError(f"{what} {str(path)!r} does not end in {' or '.join(endings)}.")
    if target.is_dir():
        raise ConfigError(f"{what} {str(path)!r} is a folder; name a file.")
    _check_place(target, what, made)
    return target


def target_folder(path: str | os.PathLike[str], what: str, *, made: bool = False) -> Path:
    """Where a folder is going to be written; ConfigError where it cannot be."""
    target = path_of(path, what)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{what} {str(path)!r} is a file; name a folder.")
    _check_place(target, what, made)
    return target


def _check_place(target: Path, what: str, made: bool) -> None:
    place = target.resolve().parent
    if made:
        place = next(folder for folder in (place, *place.parents) if folder.exists())
    if not place.is_dir():
        raise ConfigError(f"{what} {str(target)!r} cannot be written: there is no folder {str(place)!r}.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{what} {str(target)!r} cannot be written: you may not write to {str(place)!r}.")
