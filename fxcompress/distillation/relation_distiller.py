"""Distillation of the relations between samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from fxcompress.distillation.base_distiller import BaseDistiller
from fxcompress.distillation.layers import layer_of
from fxcompress.distillation.losses import (
    angle_loss,
    correlation_congruence_loss,
    distance_loss,
    pkt_loss,
    similarity_loss,
)
from fxcompress.distillation.losses.precision import raised, unit
from fxcompress.distillation.memory import InBatch, MemoryBank, MemoryQueue
from fxcompress.distillation.parameters import distiller
from fxcompress.distillation.projectors import feed
from fxcompress.distillation.step import Row, Step
from fxcompress.errors import ConfigError
from fxcompress.graph import ops
from fxcompress.graph.feature_view import Features
from fxcompress.options import Count, Fraction, Positive, Weight

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
    """One vector per sample, (B, C): the mean over positions."""
    return feature if feature.dim() == 2 else feature.flatten(2).mean(2)


@distiller
class EmbeddingDistiller(BaseDistiller):
    """Compares embeddings: one vector per sample and model.

    ``teacher_layer``, ``student_layer``  addresses of the embeddings; None: what the last linear layer reads. Feature maps
    (and tokens) are averaged over positions; widths may differ. Further options: :class:`BaseDistiller`.
    """

    reads_features: ClassVar[bool] = True

    _: KW_ONLY
    teacher_layer: str | None = None
    student_layer: str | None = None

    def prepare(self) -> None:
        super().prepare()
        self.asked = self.teacher_layer, self.student_layer  # the fields become what that is in the models bound last

    def choose(self, teacher: fx.GraphModule, student: fx.GraphModule) -> tuple[Sequence[str], Sequence[str]]:
        self.teacher_layer = self.asked[0] or embedding(teacher)
        self.student_layer = self.asked[1] or embedding(student)
        return (self.teacher_layer,), (self.student_layer,)

    def build(self, teacher: Features, student: Features) -> list[Row]:
        self.pair = layer_of(teacher, str(self.teacher_layer)), layer_of(student, str(self.student_layer))
        ours, theirs = self.pair
        return [Row(ours.address, ours.shape, theirs.address, theirs.shape, "relations of samples")]

    def embeddings(self, step: Step) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's embeddings, (B, D)."""
        ours, theirs = self.pair
        return _vectors(theirs.read(step.student_features)), _vectors(ours.read(step.teacher_features))


@distiller
class RelationDistiller(EmbeddingDistiller):
    """Keep the relations between the samples of a batch as the teacher has them.

    ``relation_type``: ``distance``, ``angle``, ``similarity``, several of them, or a mapping with a weight for each. The
    usual weights are 25 for distances, 50 for angles, 3000 for similarities. Other options: :class:`EmbeddingDistiller`.
    """

    relation_type: str | Sequence[str] | Mapping[str, float] = "distance"

    def prepare(self) -> None:
        super().prepare()
        names = [self.relation_type] if isinstance(self.relation_type, str) else self.relation_type
        self.relations = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
        unknown = [name for name in self.relations if name not in _RELATIONS]
        if unknown or not self.relations:
            raise ConfigError(f"relation_type is {self.relation_type!r}; known: {', '.join(_RELATIONS)}.")
        wrong = [name for name, weight in self.relations.items() if not 0.0 <= weight < math.inf]
        if wrong:
            raise ConfigError(f"relation_type is {self.relation_type!r}; a weight is 0 or more, and finite.")

    def factors(self) -> dict[str, float]:
        return self.relations

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        pair = self.embeddings(step)
        return {name: _RELATIONS[name](*pair) for name, weight in self.factors().items() if weight}


@distiller
class RKDDistiller(EmbeddingDistiller):
    """Keep distances and angles between samples (RKD, Park 2019).

    ``distance_weight`` · distances + ``angle_weight`` · angles. Other options: :class:`EmbeddingDistiller`.
    """

    distance_weight: Weight = 25.0
    angle_weight: Weight = 50.0

    def factors(self) -> dict[str, float]:
        return {"distance": self.distance_weight, "angle": self.angle_weight}

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        pair = self.embeddings(step)
        return {name: _RELATIONS[name](*pair) for name, weight in self.factors().items() if weight}


class PKTDistiller(EmbeddingDistiller):
    """Keep every sample's neighbourhood as a distribution (PKT, Passalis 2018). RepDistiller weights it with 30000.

    See :func:`~fxcompress.distillation.losses.pkt_loss`. Other options: :class:`EmbeddingDistiller`.
    """

    term: ClassVar[str] = "pkt"

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: pkt_loss(*self.embeddings(step))}


@distiller
class CCDistiller(EmbeddingDistiller):
    """Keep the correlations of samples under a Gaussian kernel (CC, Peng 2019): ``gamma``, and the series' ``order``.

    See :func:`~fxcompress.distillation.losses.correlation_congruence_loss`. Other options: :class:`EmbeddingDistiller`.
    """

    term: ClassVar[str] = "cc"

    gamma: Positive = 0.4
    order: Count = 2

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: correlation_congruence_loss(*self.embeddings(step), self.gamma, self.order)}


@distiller
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

    feature_dim: Count = 128
    num_negatives: Count = 16384
    temperature: Positive = 0.07
    momentum: Fraction = 0.5
    _: KW_ONLY
    samples: Count | None = None
    mode: Literal["bank", "queue", "batch"] | None = None
    same_class: bool = False

    def prepare(self) -> None:
        super().prepare()
        self.mode = self.mode or ("bank" if self.samples else "queue")
        if self.mode == "bank" and self.samples is None:
            raise ConfigError("a bank has a place for every sample: give samples=len(dataset).")

    def build(self, teacher: Features, student: Features) -> list[Row]:
        (row,) = super().build(teacher, student)
        ours, theirs = self.pair
        self.teacher_head, self.student_head = (nn.Linear(layer.channels, self.feature_dim) for layer in (ours, theirs))
        self.memory = self._remembering()
        return [dataclasses.replace(row, how=f"linear to {self.feature_dim}, {self.mode} of negatives")]

    def _remembering(self) -> nn.Module:
        if self.mode == "batch":
            return InBatch(self.temperature)
        if self.mode == "queue":
            return MemoryQueue(self.num_negatives, self.feature_dim, self.temperature, self.seed)
        numbers = self.num_negatives, self.temperature, self.momentum
        return MemoryBank(self.samples or 0, self.feature_dim, *numbers, self.seed)

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        student, teacher = self.embeddings(step)
        pair = unit(raised(feed(self.student_head, student))), unit(raised(feed(self.teacher_head, teacher)))
        with torch.autocast(pair[0].device.type, enabled=False):
            return {self.term: self.memory(*pair, step.index, None if self.same_class else _labels(step))}


def _labels(step: Step) -> Tensor | None:
    """The class of every sample, -1 where it is unknown; None where targets are no classes of samples."""
    targets = step.targets
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        return None
    return targets.masked_fill(targets == step.ignore_index, -1)
