"""Distillation of the relations between samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from fxcompress.distillation.base_distiller import BaseDistiller, Row, Step
from fxcompress.distillation.feature_distiller import known_shape
from fxcompress.distillation.logit_distiller import positive
from fxcompress.distillation.losses import (
    angle_loss,
    correlation_congruence_loss,
    distance_loss,
    pkt_loss,
    similarity_loss,
)
from fxcompress.distillation.losses.precision import unit
from fxcompress.distillation.memory import InBatch, MemoryBank, MemoryQueue
from fxcompress.distillation.projectors import channel_axis, channels
from fxcompress.errors import ConfigError
from fxcompress.graph import ops
from fxcompress.graph.taps import Features

__all__ = ["CCDistiller", "CRDDistiller", "PKTDistiller", "RKDDistiller", "RelationDistiller", "embedding"]

_RELATIONS = {"distance": distance_loss, "angle": angle_loss, "similarity": similarity_loss}


def embedding(graph: fx.GraphModule) -> str:
    """The address of what the classifier reads: the input of the last linear layer (or 1×1 convolution)."""
    for node in reversed(graph.graph.nodes):
        call = ops.read(node) if node.op.startswith("call") else None
        if call is not None and (call.kind == "linear" or call.kind.startswith("conv")) and call.inputs:
            return call.inputs[0].name
    raise ConfigError("there is no last layer whose input could be the embedding: name teacher_layer and student_layer.")


def _vectors(feature: Tensor) -> Tensor:
    """One vector per sample: the mean over positions."""
    return feature if feature.dim() == 2 else feature.movedim(channel_axis(tuple(feature.shape)), 1).flatten(2).mean(2)


class EmbeddingDistiller(BaseDistiller):
    """Compares embeddings: one vector per sample and model.

    ``teacher_layer``, ``student_layer``  addresses of the embeddings; None: what the last linear layer reads. Feature maps
    (and tokens) are averaged over positions; widths may differ. Further options: :class:`BaseDistiller`.
    """

    reads_features: ClassVar[bool] = True

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        *,
        teacher_layer: str | None = None,
        student_layer: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.teacher_layer, self.student_layer = teacher_layer, student_layer
        self._bind(teacher, student)

    def choose(self, teacher: fx.GraphModule, student: fx.GraphModule) -> tuple[Sequence[str], Sequence[str]]:
        self.teacher_layer = self.teacher_layer or embedding(teacher)
        self.student_layer = self.student_layer or embedding(student)
        return (self.teacher_layer,), (self.student_layer,)

    def build(self, teacher: Features, student: Features) -> list[Row]:
        assert self.teacher_layer
        assert self.student_layer
        shapes = known_shape(teacher, self.teacher_layer), known_shape(student, self.student_layer)
        return [Row(self.teacher_layer, shapes[0], self.student_layer, shapes[1], "relations of samples")]

    def embeddings(self, step: Step) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's embeddings, (B, D)."""
        assert self.teacher_layer
        assert self.student_layer
        return _vectors(step.student_features[self.student_layer]), _vectors(step.teacher_features[self.teacher_layer])


class RelationDistiller(EmbeddingDistiller):
    """Keep the relations between the samples of a batch as the teacher has them.

    ``relation_type``: ``distance``, ``angle``, ``similarity``, several of them, or a mapping with a weight for each. The
    usual weights are 25 for distances, 50 for angles, 3000 for similarities. Other options: :class:`EmbeddingDistiller`.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        relation_type: str | Sequence[str] | Mapping[str, float] = "distance",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        names = [relation_type] if isinstance(relation_type, str) else relation_type
        self.relations = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
        unknown = [name for name in self.relations if name not in _RELATIONS]
        if unknown or not self.relations:
            raise ConfigError(f"relation_type is {relation_type!r}; known: {', '.join(_RELATIONS)}.")
        self._bind(teacher, student)

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        pair = self.embeddings(step)
        return {name: weight * _RELATIONS[name](*pair) for name, weight in self.relations.items() if weight}


class RKDDistiller(EmbeddingDistiller):
    """Keep distances and angles between samples (RKD, Park 2019).

    ``distance_weight`` · distances + ``angle_weight`` · angles. Other options: :class:`EmbeddingDistiller`.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self._bind(teacher, student)

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        pair = self.embeddings(step)
        weighted = (("distance", self.distance_weight), ("angle", self.angle_weight))
        return {name: weight * _RELATIONS[name](*pair) for name, weight in weighted if weight}


class PKTDistiller(EmbeddingDistiller):
    """Keep every sample's neighbourhood as a distribution (PKT, Passalis 2018). RepDistiller weights it with 30000.

    See :func:`~fxcompress.distillation.losses.pkt_loss`. Other options: :class:`EmbeddingDistiller`.
    """

    term: ClassVar[str] = "pkt"

    def __init__(self, teacher: nn.Module | None = None, student: nn.Module | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._bind(teacher, student)

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: pkt_loss(*self.embeddings(step))}


class CCDistiller(EmbeddingDistiller):
    """Keep the correlations of samples under a Gaussian kernel (CC, Peng 2019): ``gamma``, and the series' ``order``.

    See :func:`~fxcompress.distillation.losses.correlation_congruence_loss`. Other options: :class:`EmbeddingDistiller`.
    """

    term: ClassVar[str] = "cc"

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        gamma: float = 0.4,
        order: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if gamma <= 0 or order < 1:
            raise ConfigError(f"gamma is {gamma!r} and order {order!r}; gamma is above 0, order 1 or more.")
        self.gamma, self.order = gamma, order
        self._bind(teacher, student)

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: correlation_congruence_loss(*self.embeddings(step), self.gamma, self.order)}


class CRDDistiller(EmbeddingDistiller):
    """Tell a sample's pair of embeddings from those of other samples (contrastive, Tian 2020).

    ``feature_dim``    width of the common space both embeddings are mapped to
    ``num_negatives``  other samples that a batch is held against
    ``temperature``    divides the cosines
    ``momentum``       how much of a bank's entry stays when its sample comes again
    ``mode``           ``bank``: an entry for each of ``samples`` (noise-contrastive, as in the paper; batches hold the
                       index, from IndexedDataset); ``queue``: the last ``num_negatives`` samples; ``batch``: the other
                       samples of the batch. None: a bank where ``samples`` is given, a queue otherwise
    ``same_class``     whether samples of the same class count as negatives; unknown without targets

    A bank takes 2 · ``samples`` · ``feature_dim`` · 4 bytes (and 4 for each label), 1 GB for a million; a step's cost does
    not depend on it. The paper weights the loss with 0.8. Other options: :class:`EmbeddingDistiller`.
    """

    term: ClassVar[str] = "crd"

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        feature_dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        *,
        samples: int | None = None,
        mode: Literal["bank", "queue", "batch"] | None = None,
        same_class: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        mode = mode or ("bank" if samples else "queue")
        if mode not in ("bank", "queue", "batch"):
            raise ConfigError(f"mode is {mode!r}; known: bank, queue, batch.")
        if mode == "bank" and not (isinstance(samples, int) and samples > 0):
            raise ConfigError(f"a bank has a place for every sample: give samples=len(dataset), not {samples!r}.")
        for name, count in (("feature_dim", feature_dim), ("num_negatives", num_negatives)):
            if not isinstance(count, int) or count < 1:
                raise ConfigError(f"{name} is {count!r}; it is a positive integer.")
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum is {momentum!r}; it is in [0, 1).")
        self.feature_dim, self.num_negatives, self.momentum = feature_dim, num_negatives, momentum
        self.temperature, self.samples = positive("temperature", temperature), samples
        self.mode, self.same_class = mode, same_class
        self._bind(teacher, student)

    def build(self, teacher: Features, student: Features) -> list[Row]:
        (row,) = super().build(teacher, student)
        self.teacher_head = nn.Linear(channels(row.teacher_shape), self.feature_dim)
        self.student_head = nn.Linear(channels(row.student_shape), self.feature_dim)
        memories = {
            "bank": lambda: MemoryBank(
                self.samples or 0, self.feature_dim, self.num_negatives, self.temperature, self.momentum, self.seed
            ),
            "queue": lambda: MemoryQueue(self.num_negatives, self.feature_dim, self.temperature, self.seed),
            "batch": lambda: InBatch(self.temperature),
        }
        self.memory = memories[self.mode]()
        return [dataclasses.replace(row, how=f"linear to {self.feature_dim}, {self.mode} of negatives")]

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        student, teacher = self.embeddings(step)
        pair = unit(self.student_head(student).float()), unit(self.teacher_head(teacher).float())
        with torch.autocast(pair[0].device.type, enabled=False):
            return {self.term: self.memory(*pair, step.index, None if self.same_class else _labels(step))}


def _labels(step: Step) -> Tensor | None:
    """The class of every sample, -1 where it is unknown; None where targets are no classes of samples."""
    targets = step.targets
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        return None
    return targets.masked_fill(targets == step.ignore_index, -1)
