"""Distillation of features of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from fxcompress.distillation.fusion import Reviewer
from fxcompress.distillation.layer_distiller import LayerDistiller, ProjectedDistiller, Projector
from fxcompress.distillation.layers import Layer, map_of
from fxcompress.distillation.logit_distiller import warmed_up
from fxcompress.distillation.losses import (
    attention_transfer_loss,
    feature_loss,
    fsp_loss,
    hcl_loss,
    hint_loss,
    ofd_loss,
)
from fxcompress.distillation.parameters import distiller
from fxcompress.distillation.preactivation import (
    batch_norm_margin,
    find_preactivations,
    measured_margin,
    preactivation,
)
from fxcompress.distillation.projectors import feed
from fxcompress.distillation.step import Row, Step
from fxcompress.errors import ConfigError
from fxcompress.graph.feature_view import Features
from fxcompress.options import Count

__all__ = [
    "ATDistiller",
    "FSPDistiller",
    "FeatureDistiller",
    "FitNetDistiller",
    "OFDDistiller",
    "ReviewKDDistiller",
]


@distiller
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

    loss_type: Literal["mse", "l1", "cosine", "kl"] = "mse"
    projector: Projector = None
    normalize: bool = False
    _: KW_ONLY
    axis: Literal["channel", "spatial", "flat"] = "channel"

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: feature_loss(*self.aligned(step), self.loss_type, axis=self.axis, normalize=self.normalize)}


@distiller
class FitNetDistiller(ProjectedDistiller):
    """Bring a regressor of the student's layer to the teacher's (FitNets, Romero 2015).

    The regressor is always there, a 1×1 convolution unless ``projector`` says otherwise; the loss is the mean squared
    difference. RepDistiller weights it with 100. Other options: :class:`ProjectedDistiller`.
    """

    term: ClassVar[str] = "hint"
    default_projector: ClassVar[str | None] = "conv"

    _: KW_ONLY
    projector: Projector = None

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: hint_loss(*self.aligned(step))}


@distiller
class ATDistiller(LayerDistiller):
    """Look where the teacher looks (attention transfer, Zagoruyko 2017): mean of |f|^p over channels, per position.

    ``p`` is the power, ``normalize`` gives each map length one. Channels need not agree; the larger map is pooled.
    RepDistiller weights it with 1000. Other options: :class:`LayerDistiller`.
    """

    term: ClassVar[str] = "attention"

    p: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 2
    normalize: bool = True

    def layer(self, view: Features, address: str) -> Layer:
        return map_of(view, address, self.channel_dim)

    def how(self, number: int) -> str:
        ours, theirs = self.pairs[number]
        if len(ours.shape) != len(theirs.shape):
            raise ConfigError(
                f"{ours.address!r} {ours.shape} and {theirs.address!r} {theirs.shape}: their positions do not compare."
            )
        return "attention map"

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: attention_transfer_loss(*self.compared(step), self.p, self.normalize)}


@distiller
class FSPDistiller(ProjectedDistiller):
    """Learn the flow between consecutive layers (Yim 2017): products of their features over all positions.

    The layers are listed in order, two at least; a student with other channels is projected. RepDistiller weights it with
    50. Other options: :class:`ProjectedDistiller`.
    """

    term: ClassVar[str] = "flow"

    _: KW_ONLY
    projector: Projector = None

    def layer(self, view: Features, address: str) -> Layer:
        return map_of(view, address, self.channel_dim)

    def build(self, teacher: Features, student: Features) -> list[Row]:
        rows = super().build(teacher, student)
        if len(rows) < 2:
            raise ConfigError("FSPDistiller compares the flow from layer to layer: name two at least.")
        return rows

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: fsp_loss(*self.projected(step))}


@distiller
class OFDDistiller(ProjectedDistiller):
    """Learn the teacher's features before their ReLU, as far as they matter (overhaul, Heo 2019).

    Layers named here stand for what enters their last activation, a BatchNorm for its result; None: the last value before a
    ReLU at every resolution, found in the graphs (BatchNorm → ReLU, or addition → ReLU). Margins come from the teacher's
    BatchNorm, or, where it has none, from the first batch. The student goes through a 1×1 convolution and BatchNorm. Other
    options: :class:`ProjectedDistiller`.
    """

    term: ClassVar[str] = "ofd"
    default_projector: ClassVar[str | None] = "conv_bn"
    needs_layers: ClassVar[bool] = False

    _: KW_ONLY
    projector: Projector = None

    def choose(self, teacher: fx.GraphModule, student: fx.GraphModule) -> tuple[Sequence[str], Sequence[str]]:
        if self.asked[0]:
            chosen = super().choose(teacher, student)
            self.teacher_layers, self.student_layers = preactivation(chosen[0]), preactivation(chosen[1])
        else:
            found = find_preactivations(teacher), find_preactivations(student)
            depth = min(map(len, found))
            self.teacher_layers, self.student_layers = tuple(found[0][-depth:]), tuple(found[1][-depth:])
        return self.teacher_layers, self.student_layers

    def build(self, teacher: Features, student: Features) -> list[Row]:
        rows = super().build(teacher, student)
        for number, (layer, _) in enumerate(self.pairs):
            margin = batch_norm_margin(teacher.model, layer.address)
            unknown = torch.full((layer.channels,), torch.nan, device="cpu")
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


@distiller
class ReviewKDDistiller(LayerDistiller):
    """Let every layer of the student learn from the teacher's by way of all deeper ones (ReviewKD, Chen 2021).

    Layers are listed from shallow to deep. Features are joined by attention-based fusion, of width ``width`` (None: the
    deepest layer's, 512 at most), and compared at several scales; warm-up min(epoch / ``warmup_epochs``, 1). Other options:
    :class:`LayerDistiller`.
    """

    term: ClassVar[str] = "review"

    _: KW_ONLY
    width: Count | None = None
    warmup_epochs: Annotated[int, Field(ge=0)] = 20

    def build(self, teacher: Features, student: Features) -> list[Row]:
        rows = super().build(teacher, student)
        self.reviewer = Reviewer([s.channels for _, s in self.pairs], [t.channels for t, _ in self.pairs], self._width())
        return rows

    def _width(self) -> int:
        return self.width or min(512, self.pairs[-1][1].channels)

    def how(self, number: int) -> str:
        ours, theirs = self.pairs[number]
        if any(len(layer.shape) > 4 for layer in (ours, theirs)) or len(ours.shape) != len(theirs.shape):
            raise ConfigError(
                f"{ours.address!r} {ours.shape} and {theirs.address!r} {theirs.shape}: "
                "ReviewKD takes maps (B, C, H, W), (B, C, N) or (B, C), both alike."
            )
        return f"attention-based fusion, width {self._width()}"

    def factors(self) -> dict[str, float]:
        return {self.term: warmed_up(self.epoch, self.warmup_epochs)}

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        students, teachers = (list(map(_as_map, side)) for side in self.compared(step))
        return {self.term: hcl_loss(feed(self.reviewer, students, teachers), teachers)}


def _as_map(feature: Tensor) -> Tensor:
    return feature[(...,) + (None,) * (4 - feature.dim())]
