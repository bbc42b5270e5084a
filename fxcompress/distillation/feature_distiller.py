"""Distillation of features of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from fxcompress.distillation.base_distiller import BaseDistiller, Row, Step
from fxcompress.distillation.fusion import Reviewer
from fxcompress.distillation.logit_distiller import LogitDistiller, warmed_up
from fxcompress.distillation.losses import (
    attention_transfer_loss,
    feature_loss,
    fsp_loss,
    hcl_loss,
    hint_loss,
    ofd_loss,
)
from fxcompress.distillation.preactivation import (
    batch_norm_margin,
    find_preactivations,
    measured_margin,
    preactivation,
)
from fxcompress.distillation.projectors import align, build_projector, channel_axis, channels
from fxcompress.errors import ConfigError
from fxcompress.graph import taps
from fxcompress.graph.taps import Features
from fxcompress.options import validated

__all__ = [
    "ATDistiller",
    "FSPDistiller",
    "FeatureDistiller",
    "FitNetDistiller",
    "OFDDistiller",
    "ReviewKDDistiller",
]

Layers = str | Sequence[str]
Projector = str | dict[str, Any] | Sequence[str | dict[str, Any]] | None
"""As a configuration writes it; a module, or a list of modules, is taken too."""


class LayerDistiller(BaseDistiller):
    """Compares values of layers, pair by pair.

    ``teacher_layers``, ``student_layers``  addresses of values (see ``insert-taps``), pair by pair; one list serves both
                       where names agree, as after pruning
    ``logit_distill``  options of a LogitDistiller that is added

    Further options: :class:`BaseDistiller`.
    """

    reads_features: ClassVar[bool] = True
    needs_layers: ClassVar[bool] = True

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        teacher_layers: Layers | None = None,
        student_layers: Layers | None = None,
        *,
        logit_distill: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if logit_distill is not None:
            options["distillers"] = [*options.get("distillers", ()), _logit_member(logit_distill)]
        super().__init__(**options)
        first = teacher_layers if teacher_layers is not None else student_layers
        if not first and self.needs_layers:
            raise ConfigError(f"{type(self).__name__} needs teacher_layers and student_layers: names of layers to compare.")
        self.teacher_layers = _listed(first or ())
        self.student_layers = self.teacher_layers if student_layers is None else _listed(student_layers)
        self._bind(teacher, student)

    def choose(self, teacher: fx.GraphModule, student: fx.GraphModule) -> tuple[Sequence[str], Sequence[str]]:
        layers = taps.expand(teacher, self.teacher_layers), taps.expand(student, self.student_layers)
        if len(layers[0]) != len(layers[1]):
            raise ConfigError(
                f"teacher_layers names {len(layers[0])} values ({', '.join(layers[0])}) and student_layers {len(layers[1])} "
                f"({', '.join(layers[1])}); they are compared pair by pair."
            )
        self.teacher_layers, self.student_layers = layers
        return layers

    def pairs(self) -> list[tuple[str, str]]:
        """Teacher and student addresses, pair by pair."""
        return list(zip(self.teacher_layers, self.student_layers, strict=True))

    def compared(self, step: Step) -> tuple[list[Tensor], list[Tensor]]:
        """The values of the student's layers and of the teacher's."""
        students = [step.student_features[name] for name in self.student_layers]
        return students, [step.teacher_features[name] for name in self.teacher_layers]


class ProjectedDistiller(LayerDistiller):
    """Compares values of layers after bringing the student's to the teacher's channels.

    ``projector``    a name in PROJECTORS, a mapping with ``type``, a module, or a list of these by layer; None: what is
                     needed, a 1×1 convolution where channels differ
    ``channel_dim``  the axis of the channels; None: the second, of tokens (B, N, C) the last

    Other options: :class:`LayerDistiller`.
    """

    default_projector: ClassVar[str | None] = None

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        teacher_layers: Layers | None = None,
        student_layers: Layers | None = None,
        *,
        projector: Projector = None,
        channel_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(None, None, teacher_layers, student_layers, **options)
        self.projector = [projector] if isinstance(projector, nn.Module) else projector  # not a child before it is bound
        self.channel_dim = channel_dim
        self._bind(teacher, student)

    def build(self, teacher: Features, student: Features) -> list[Row]:
        count = len(self.teacher_layers)
        configs = self.projector if isinstance(self.projector, (list, tuple)) else [self.projector] * count
        if len(configs) != count:
            raise ConfigError(f"projector lists {len(configs)} projectors for {count} layers.")
        self.projectors, rows = nn.ModuleList(), []
        for config, (ours, theirs) in zip(configs, self.pairs(), strict=True):
            shapes = known_shape(teacher, ours), known_shape(student, theirs)
            try:
                layer = build_projector(config, shapes[1], shapes[0], self.channel_dim, self.default_projector)
            except ConfigError as error:
                raise ConfigError(f"{ours!r} and {theirs!r}: {error}") from error
            self.projectors.append(layer)
            rows.append(Row(ours, shapes[0], theirs, shapes[1], _described(layer, *shapes, self.channel_dim)))
        return rows

    def projected(self, step: Step) -> tuple[list[Tensor], list[Tensor]]:
        """The student's features with the teacher's channels, and the teacher's."""
        students, teachers = self.compared(step)
        return [layer(s) for layer, s in zip(self.projectors, students, strict=True)], teachers

    def aligned(self, step: Step) -> tuple[list[Tensor], list[Tensor]]:
        """The student's features with the teacher's channels and positions, and the teacher's."""
        students, teachers = self.projected(step)
        return [align(s, t, self.channel_dim) for s, t in zip(students, teachers, strict=True)], teachers


class FeatureDistiller(ProjectedDistiller):
    """Bring the student's features to the teacher's: projected to its channels, then resized to its positions.

    ``teacher_layers``, ``student_layers``  addresses of values (see ``insert-taps``), pair by pair
    ``loss_type``  ``mse``, ``l1``, ``cosine``, ``kl``; see :func:`~fxcompress.distillation.losses.feature_loss`
    ``projector``  how channels are brought together (see :class:`ProjectedDistiller`); None: as needed
    ``normalize``  give the vectors along ``axis`` length one first
    ``axis``       what ``cosine``, ``kl`` and ``normalize`` run along: ``channel``, ``spatial``, ``flat``

    Other options: :class:`ProjectedDistiller`.
    """

    term: ClassVar[str] = "feature"

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        teacher_layers: Layers | None = None,
        student_layers: Layers | None = None,
        loss_type: Literal["mse", "l1", "cosine", "kl"] = "mse",
        projector: Projector = None,
        normalize: bool = False,
        *,
        axis: Literal["channel", "spatial", "flat"] = "channel",
        **options: Any,
    ) -> None:
        super().__init__(None, None, teacher_layers, student_layers, projector=projector, **options)
        if loss_type not in ("mse", "l1", "cosine", "kl"):
            raise ConfigError(f"there is no loss_type {loss_type!r}; known: mse, l1, cosine, kl.")
        if axis not in ("channel", "spatial", "flat"):
            raise ConfigError(f"there is no axis {axis!r}; known: channel, spatial, flat.")
        self.loss_type, self.normalize, self.axis = loss_type, normalize, axis
        self._bind(teacher, student)

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        losses = []
        for s, t in zip(*self.aligned(step), strict=True):
            axis = channel_axis(tuple(s.shape), self.channel_dim)
            options: dict[str, Any] = {"axis": self.axis, "normalize": self.normalize, "channel_dim": axis}
            losses.append(feature_loss(s, t, self.loss_type, **options))
        return {self.term: torch.stack(losses).sum()}


class FitNetDistiller(ProjectedDistiller):
    """Bring a regressor of the student's layer to the teacher's (FitNets, Romero 2015).

    The regressor is always there, a 1×1 convolution unless ``projector`` says otherwise; the loss is the mean squared
    difference. RepDistiller weights it with 100. Other options: :class:`ProjectedDistiller`.
    """

    term: ClassVar[str] = "hint"
    default_projector: ClassVar[str | None] = "conv"

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: hint_loss(*self.aligned(step))}


class ATDistiller(LayerDistiller):
    """Look where the teacher looks (attention transfer, Zagoruyko 2017): mean of |f|^p over channels, per position.

    ``p`` is the power, ``normalize`` gives each map length one. Channels need not agree; the larger map is pooled.
    RepDistiller weights it with 1000. Other options: :class:`LayerDistiller`.
    """

    term: ClassVar[str] = "attention"

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        teacher_layers: Layers | None = None,
        student_layers: Layers | None = None,
        p: float = 2,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(None, None, teacher_layers, student_layers, **options)
        if p < 1:
            raise ConfigError(f"p is {p!r}; the power of an attention map is 1 or more.")
        self.p, self.normalize = p, normalize
        self._bind(teacher, student)

    def build(self, teacher: Features, student: Features) -> list[Row]:
        return [
            Row(ours, known_maps(teacher, ours), theirs, known_maps(student, theirs), "attention map")
            for ours, theirs in self.pairs()
        ]

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: attention_transfer_loss(*self.compared(step), self.p, self.normalize)}


class FSPDistiller(ProjectedDistiller):
    """Learn the flow between consecutive layers (Yim 2017): products of their features over all positions.

    The layers are listed in order, two at least; a student with other channels is projected. RepDistiller weights it with
    50. Other options: :class:`ProjectedDistiller`.
    """

    term: ClassVar[str] = "flow"

    def build(self, teacher: Features, student: Features) -> list[Row]:
        if len(self.teacher_layers) < 2:
            raise ConfigError("FSPDistiller compares the flow from layer to layer: name two at least.")
        for ours, theirs in self.pairs():
            known_maps(teacher, ours)
            known_maps(student, theirs)
        return super().build(teacher, student)

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: fsp_loss(*self.projected(step))}


class OFDDistiller(ProjectedDistiller):
    """Learn the teacher's features before their ReLU, as far as they matter (overhaul, Heo 2019).

    Layers named here stand for what enters their last activation; None: the last value before a ReLU at every resolution,
    found in the graphs (BatchNorm → ReLU, or addition → ReLU). Margins come from the teacher's BatchNorm, or, where it has
    none, from the first batch. The student goes through a 1×1 convolution and BatchNorm. Other options:
    :class:`ProjectedDistiller`.
    """

    term: ClassVar[str] = "ofd"
    default_projector: ClassVar[str | None] = "conv_bn"
    needs_layers: ClassVar[bool] = False

    def choose(self, teacher: fx.GraphModule, student: fx.GraphModule) -> tuple[Sequence[str], Sequence[str]]:
        if self.teacher_layers:
            chosen = super().choose(teacher, student)
            self.teacher_layers, self.student_layers = preactivation(chosen[0]), preactivation(chosen[1])
        else:
            found = find_preactivations(teacher), find_preactivations(student)
            depth = min(map(len, found))
            self.teacher_layers, self.student_layers = tuple(found[0][-depth:]), tuple(found[1][-depth:])
        return self.teacher_layers, self.student_layers

    def build(self, teacher: Features, student: Features) -> list[Row]:
        rows = super().build(teacher, student)
        for number, name in enumerate(self.teacher_layers):
            margin = batch_norm_margin(teacher.model, name)
            unknown = torch.full((known_shape(teacher, name)[1],), torch.nan)
            self.register_buffer(f"margin_{number}", unknown if margin is None else margin)
        return rows

    def margins(self, teachers: Sequence[Tensor]) -> list[Tensor]:
        """The margin of every layer's channels, those that no BatchNorm tells measured on ``teachers`` the first time."""
        found = []
        for number, teacher in enumerate(teachers):
            margin = self.get_buffer(f"margin_{number}")
            if bool(margin.isnan().all()):
                margin.copy_(measured_margin(teacher))
            found.append(margin)
        return found

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        students, teachers = self.aligned(step)
        return {self.term: ofd_loss(students, teachers, self.margins(teachers))}


class ReviewKDDistiller(LayerDistiller):
    """Let every layer of the student learn from the teacher's by way of all deeper ones (ReviewKD, Chen 2021).

    Layers are listed from shallow to deep. Features are joined by attention-based fusion, of width ``width`` (None: the
    deepest layer's, 512 at most), and compared at several scales; warm-up min(epoch / ``warmup_epochs``, 1). Other options:
    :class:`LayerDistiller`.
    """

    term: ClassVar[str] = "review"

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        teacher_layers: Layers | None = None,
        student_layers: Layers | None = None,
        *,
        width: int | None = None,
        warmup_epochs: int = 20,
        **options: Any,
    ) -> None:
        super().__init__(None, None, teacher_layers, student_layers, **options)
        self.width, self.warmup_epochs = width, warmup_epochs
        self._bind(teacher, student)

    def build(self, teacher: Features, student: Features) -> list[Row]:
        shapes = [(known_shape(teacher, ours), known_shape(student, theirs)) for ours, theirs in self.pairs()]
        for (ours, theirs), pair in zip(self.pairs(), shapes, strict=True):
            if any(len(shape) not in (2, 4) for shape in pair):
                raise ConfigError(
                    f"{ours!r} {pair[0]} and {theirs!r} {pair[1]}: ReviewKD takes maps (B, C, H, W) or (B, C)."
                )
        width = self.width or min(512, shapes[-1][1][1])
        self.reviewer = Reviewer([s[1] for _, s in shapes], [t[1] for t, _ in shapes], width)
        how = f"attention-based fusion, width {width}"
        return [Row(ours, t, theirs, s, how) for (ours, theirs), (t, s) in zip(self.pairs(), shapes, strict=True)]

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        students, teachers = (list(map(_as_map, side)) for side in self.compared(step))
        loss = hcl_loss(self.reviewer(students, teachers), teachers)
        return {self.term: warmed_up(step.epoch, self.warmup_epochs) * loss}


def _as_map(feature: Tensor) -> Tensor:
    return feature[:, :, None, None] if feature.dim() == 2 else feature


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


def _listed(layers: Layers) -> tuple[str, ...]:
    return (layers,) if isinstance(layers, str) else tuple(layers)


def known_shape(view: Features, name: str) -> tuple[int, ...]:
    """The shape of a tapped value; ConfigError where it is not one tensor with a batch."""
    shape = view.shapes[name]
    if shape is None or len(shape) < 2:
        raise ConfigError(f"the value {name!r} is no feature: its shape is {None if shape is None else tuple(shape)}.")
    return tuple(shape)


def known_maps(view: Features, name: str) -> tuple[int, ...]:
    """The shape of a tapped feature map; ConfigError where there are no positions."""
    shape = known_shape(view, name)
    if len(shape) < 3:
        raise ConfigError(f"the value {name!r} is {shape}: it has no positions. Choose a feature map (B, C, *positions).")
    return shape


def _described(layer: nn.Module, teacher: tuple[int, ...], student: tuple[int, ...], channel_dim: int | None) -> str:
    wide = channels(student, channel_dim), channels(teacher, channel_dim)
    name = "" if isinstance(layer, nn.Identity) else f"{type(layer).__name__} {wide[0]} → {wide[1]}"
    axis = channel_axis(student, channel_dim)
    positions = [shape[1:axis] + shape[axis + 1 :] for shape in (student, teacher)]
    resized = "interpolation" if positions[0] != positions[1] else ""
    return ", ".join(part for part in (name, resized) if part) or "as it is"
