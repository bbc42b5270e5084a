"""The exceptions of fxcompress, all under one root:

    FxCompressError
    ├── PlanError          a plan that cannot work: unknown pass or option, wrong type, impossible order
    ├── ConfigError        a configuration or argument that cannot be meant: unknown key, value out of range
    ├── TraceError         a model that cannot be captured with what was given
    ├── DataError          calibration or training data that is missing, empty, NaN, or does not fit the model
    ├── VerificationError  a graph that breaks the graph contract
    │   └── PromiseError   a pass whose result differs from what it promised
    ├── PassError          a pass that failed; carries the pass, the step and the reproducer
    ├── TrainingError      training that cannot go on: a loss or weights that are NaN or infinite
    ├── BackendError       a target that cannot run what was asked, or is not installed
    └── ArtifactError      a saved model that is missing, damaged, or needs something that was not supplied

Every message says what happened, where, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ArtifactError",
    "BackendError",
    "ConfigError",
    "DataError",
    "FxCompressError",
    "PassError",
    "PlanError",
    "PromiseError",
    "TraceError",
    "TrainingError",
    "VerificationError",
    "Where",
    "brief",
    "did_you_mean",
    "shown",
]


Where = tuple[str | int, ...]
"""The way to a value in a configuration: keys, and positions in lists."""


class FxCompressError(Exception):
    """Root of everything fxcompress raises on purpose."""


class PlanError(FxCompressError, ValueError):
    """A plan that cannot work as written."""


class ConfigError(FxCompressError, ValueError):
    """An argument or configuration value that cannot be meant; ``path`` leads to its key where there is one."""

    path: Where = ()


class TraceError(FxCompressError, RuntimeError):
    """A model, or a part of it, that could not be captured."""


class DataError(FxCompressError, ValueError):
    """Data that is missing, empty, not finite, or does not fit the model."""


class VerificationError(FxCompressError, RuntimeError):
    """A graph that breaks the graph contract; the message names the rule and the node."""


class PromiseError(VerificationError):
    """A pass whose result differs from the original by more than it promised."""


class PassError(FxCompressError, RuntimeError):
    """A pass that failed while rewriting; ``__cause__`` holds the original exception."""


class TrainingError(FxCompressError, RuntimeError):
    """Training that cannot go on; the message names the loss term and the step."""


class BackendError(FxCompressError, RuntimeError):
    """A backend that cannot do what was asked, or is not installed."""


class ArtifactError(FxCompressError, RuntimeError):
    """A saved model that cannot be read back."""


def shown(value: Any, most: int = 200) -> str:
    """``repr(value)``, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"


def brief(error: BaseException, most: int = 300) -> str:
    """The first line of what an error says, or its kind; of an error of the system what is wrong, without the place."""
    said = error.strerror if isinstance(error, OSError) else None
    text = (said or str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return text if len(text) <= most else f"{text[:most]} …"


def did_you_mean(name: object, known: Iterable[str], *, limit: int = 3) -> str:
    """`` Did you mean 'x'?`` with the closest of ``known``, or an empty string where nothing is close."""
    close = difflib.get_close_matches(str(name)[:200], list(known), n=limit, cutoff=0.5)
    if not close:
        return ""
    return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
