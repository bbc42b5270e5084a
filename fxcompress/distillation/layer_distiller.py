"""What distillers of features share: pairs of layers, their channels second, the student's projected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, fx, nn

from fxcompress.distillation.base_distiller import BaseDistiller
from fxcompress.distillation.layers import Layer, layer_of
from fxcompress.distillation.logit_distiller import LogitDistiller
from fxcompress.distillation.parameters import distiller
from fxcompress.distillation.projectors import align, build_projector, feed
from fxcompress.distillation.step import Row, Step
from fxcompress.errors import ConfigError
from fxcompress.graph.addresses import expand
from fxcompress.graph.feature_view import Features
from fxcompress.options import validated

__all__ = ["LayerDistiller", "Layers", "ProjectedDistiller", "Projector"]

Layers = str | Sequence[str]
Projector = str | dict[str, Any] | Sequence[str | dict[str, Any]] | None
"""As a configuration writes it; a module, or a list of modules, is taken too."""


@distiller
class LayerDistiller(BaseDistiller):
    """Compares values of layers, pair by pair.

    ``teacher_layers``, ``student_layers``  addresses of values (see ``insert-taps``), pair by pair; one list serves both
                       where names agree, as after pruning
    ``logit_distill``  options of a LogitDistiller that is added
    ``channel_dim``    the axis of the channels; None: as the layers around a value have it

    Further options: :class:`BaseDistiller`.
    """

    reads_features: ClassVar[bool] = True
    needs_layers: ClassVar[bool] = True

    teacher_layers: Layers | None = None
    student_layers: Layers | None = None
    _: KW_ONLY
    logit_distill: Mapping[str, Any] | None = None
    channel_dim: int | None = None

    def prepare(self) -> None:
        super().prepare()
        if self.logit_distill is not None:
            self.distillers = [*self.distillers, _logit_member(self.logit_distill)]
        first = self.teacher_layers if self.teacher_layers is not None else self.student_layers
        if not first and self.needs_layers:
            raise ConfigError(f"{type(self).__name__} needs teacher_layers and student_layers: names of layers to compare.")
        self.teacher_layers = _listed(first or ())
        self.student_layers = self.teacher_layers if self.student_layers is None else _listed(self.student_layers)
        self.asked = self.teacher_layers, self.student_layers  # the fields become what that is in the models bound last
        self.pairs: list[tuple[Layer, Layer]] = []

    def choose(self, teacher: fx.GraphModule, student: fx.GraphModule) -> tuple[Sequence[str], Sequence[str]]:
        layers = expand(teacher, self.asked[0]), expand(student, self.asked[1])
        if len(layers[0]) != len(layers[1]):
            raise ConfigError(
                f"teacher_layers names {len(layers[0])} values ({', '.join(layers[0])}) and student_layers {len(layers[1])} "
                f"({', '.join(layers[1])}); they are compared pair by pair."
            )
        self.teacher_layers, self.student_layers = layers
        return layers

    def build(self, teacher: Features, student: Features) -> list[Row]:
        layers = zip(_listed(self.teacher_layers), _listed(self.student_layers), strict=True)
        self.pairs = [(self.layer(teacher, ours), self.layer(student, theirs)) for ours, theirs in layers]
        return [Row(t.address, t.shape, s.address, s.shape, self.how(n)) for n, (t, s) in enumerate(self.pairs)]

    def layer(self, view: Features, address: str) -> Layer:
        """A tapped value that this distiller can compare; ConfigError where it cannot."""
        return layer_of(view, address, self.channel_dim)

    def how(self, number: int) -> str:
        """How a pair of layers is brought together; the place to make what that takes."""
        return self.term

    def compared(self, step: Step) -> tuple[list[Tensor], list[Tensor]]:
        """The values of the student's layers and of the teacher's, (B, C, *positions)."""
        students = [student.read(step.student_features) for _, student in self.pairs]
        return students, [teacher.read(step.teacher_features) for teacher, _ in self.pairs]


@distiller
class ProjectedDistiller(LayerDistiller):
    """Compares values of layers after bringing the student's to the teacher's channels.

    ``projector``    a name in PROJECTORS, a mapping with ``type``, a module, or a list of these by layer; None: what is
                     needed, a 1×1 convolution where channels differ. Every kind declares it at its own place

    Other options: :class:`LayerDistiller`.
    """

    default_projector: ClassVar[str | None] = None

    if TYPE_CHECKING:
        projector: Projector = None

    def prepare(self) -> None:
        super().prepare()
        given: Any = self._modules.pop("projector", None)
        if given is not None:
            self.projector = [given]  # learns as one of ``projectors``, once it is bound

    def build(self, teacher: Features, student: Features) -> list[Row]:
        self.projectors = nn.ModuleList()
        return super().build(teacher, student)

    def how(self, number: int) -> str:
        ours, theirs = self.pairs[number]
        count = len(self.pairs)
        configs: Any = self.projector if isinstance(self.projector, (list, tuple)) else [self.projector] * count
        if len(configs) != count:
            raise ConfigError(f"projector lists {len(configs)} projectors for {count} layers.")
        try:
            layer = build_projector(configs[number], theirs, ours, self.default_projector)
        except ConfigError as error:
            raise ConfigError(f"{ours.address!r} and {theirs.address!r}: {error}") from error
        self.projectors.append(layer)
        name = "" if isinstance(layer, nn.Identity) else f"{type(layer).__name__} {theirs.channels} → {ours.channels}"
        resized = "interpolation" if theirs.first[2:] != ours.first[2:] else ""
        return ", ".join(part for part in (name, resized) if part) or "as it is"

    def projected(self, step: Step) -> tuple[list[Tensor], list[Tensor]]:
        """The student's features with the teacher's channels, and the teacher's."""
        students, teachers = self.compared(step)
        return [feed(layer, s) for layer, s in zip(self.projectors, students, strict=True)], teachers

    def aligned(self, step: Step) -> tuple[list[Tensor], list[Tensor]]:
        """The student's features with the teacher's channels and positions, and the teacher's."""
        students, teachers = self.projected(step)
        return [align(s, t) for s, t in zip(students, teachers, strict=True)], teachers


def _logit_member(options: Mapping[str, Any]) -> LogitDistiller:
    known = ("temperature", "alpha", "distill_weight", "output")
    for key in options:
        if key not in known:
            why = " The labels' weight is task_weight." if key == "beta" else ""
            raise ConfigError(f"logit_distill has no option {key!r}; it takes {', '.join(known)}.{why}")
    try:
        return LogitDistiller(**validated(LogitDistiller, options, ("logit_distill",)))
    except ConfigError as error:
        raise error if error.path else ConfigError(f"logit_distill: {error}") from error


def _listed(layers: Layers | None) -> tuple[str, ...]:
    return (layers,) if isinstance(layers, str) else tuple(layers or ())
