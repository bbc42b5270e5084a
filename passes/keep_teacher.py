"""keep-teacher: the model as it is now becomes the teacher of later steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import fx

from fxcompress import artifact
from fxcompress.distributed import is_main
from fxcompress.pass_base import EXACT, Context, Pass, Promise

__all__ = ["KeepTeacher"]


@dataclass(frozen=True)
class KeepTeacher(Pass):
    """Keep a copy of the model for later ``distill`` steps to learn from, before pruning or quantization change it."""

    name: ClassVar[str] = "keep-teacher"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed", "qdq")
    promise: ClassVar[Promise] = EXACT

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        context.teacher = copy.deepcopy(model)
        place = _place(context)
        if place is not None and is_main():
            artifact.save(model, place)

    def taken_up(self, context: Context) -> None:
        place = _place(context)
        if place is not None:
            context.teacher = artifact.load(place)


def _place(context: Context) -> Path | None:
    return None if context.folder is None else context.folder.with_name("teacher")
