"""Values on the command line: what an argument may be, refused with its name where it is something else."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

__all__ = ["device", "number", "positive", "seconds", "seed", "text", "whole"]


def text(given: str) -> str:
    """A name or a path: some text."""
    if not given.strip():
        raise argparse.ArgumentTypeError("it is empty; leave the option out, or give it a value")
    if "\0" in given or any("\ud800" <= letter <= "\udfff" for letter in given):
        raise argparse.ArgumentTypeError(f"{given!r} is not text")
    return given


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number within bounds."""

    def read(given: str) -> int:
        try:
            value = int(given) if len(given) < 100 else most + 1
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{given[:100]!r} is not a whole number from {least} to {most}")
        return value

    return read


positive = whole(1, 2**40)
seed = whole(0, 2**32 - 1)


def number(given: str) -> float:
    """A number that is neither NaN nor infinite."""
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{given[:100]!r} is not a finite number")
    return value


def seconds(given: str) -> float:
    """A time that is more than none."""
    value = number(given)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{given[:100]!r} is no time to spend; give seconds, more than 0")
    return value


def device(given: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``, which must be there."""
    try:
        found = torch.device(given)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{given[:100]!r} is no device to train on; it is cpu, cuda or cuda:N")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            there = f"the GPUs here are cuda:0 to cuda:{count - 1}" if count else "torch sees no NVIDIA GPU here"
            raise argparse.ArgumentTypeError(f"there is no {given}: {there}")
    return found
