"""One forward of student and teacher, as the losses see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import ConfigError

__all__ = ["Row", "Step", "logits_of"]


@dataclass
class Step:
    """One forward of both models: outputs, tapped values by address, and what came with the batch.

    ``epoch`` counts from 1.
    """

    student: Any
    teacher: Any
    student_features: dict[str, Tensor]
    teacher_features: dict[str, Tensor]
    targets: Any = None
    index: Tensor | None = None
    epoch: int = 1
    output: str | int | None = None
    ignore_index: int = -100

    def logits(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's class scores; the student's are resized where only the positions differ."""
        student, teacher = logits_of(self.student, self.output), logits_of(self.teacher, self.output)
        if student.dim() == teacher.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
        return student, teacher


@dataclass(frozen=True)
class Row:
    """How one pair of layers is brought together."""

    teacher: str
    teacher_shape: tuple[int, ...]
    student: str
    student_shape: tuple[int, ...]
    how: str


def _at(output: Any, key: str | int) -> Any:
    """What an output holds at ``key``; None where it has no such key or position."""
    if isinstance(key, str) and not isinstance(output, Mapping):
        return getattr(output, key, None)
    try:
        return output[key]
    except (LookupError, TypeError):
        return None


def logits_of(output: Any, key: str | int | None = None) -> Tensor:
    """The class scores in a model's output; ConfigError where ``key`` must say which they are."""
    if isinstance(output, Tensor):
        return output
    if key is not None:
        found = _at(output, key)
    elif isinstance(output, Mapping):
        found = next((output[name] for name in ("out", "logits") if name in output), None)
        found = next(iter(output.values())) if found is None and len(output) == 1 else found
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    else:
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        held = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ConfigError(f"the model returns a {type(output).__name__}{held}: say where the logits are with output=name.")
    return found
