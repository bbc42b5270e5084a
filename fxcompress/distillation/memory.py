"""What contrastive distillation remembers of samples: a bank with a place for each, or a queue of the last ones."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.distillation.losses import info_nce_loss, nce_loss
from fxcompress.distributed import gather
from fxcompress.errors import ConfigError, DataError

__all__ = ["InBatch", "MemoryBank", "MemoryQueue"]


def _random(rows: int, width: int, generator: torch.Generator) -> Tensor:
    if rows * width > 2**40:
        raise ConfigError(f"samples is {rows!r}: a bank of them would hold {rows * width * 8 / 1e12:,.0f} TB.")
    return F.normalize(torch.empty(rows, width, device="cpu").uniform_(-1, 1, generator=generator))


def _from_everyone(value: Tensor) -> Tensor:
    """The rows of all processes, by rank."""
    return torch.cat([part.to(value.device) for part in gather(value)])


def _same_class(others: Tensor, labels: Tensor) -> Tensor:
    """Which of the ``others`` (K,) are of the class of each sample (B,); labels below 0 are unknown and alike to none."""
    return (others == labels[:, None]) & (labels[:, None] >= 0)


def _log_mean(logarithms: Tensor) -> Tensor:
    """The logarithm of the mean of what these are the logarithms of."""
    return torch.logsumexp(logarithms, 0) - math.log(len(logarithms))


class _Memory(nn.Module):
    """Counts steps, so that what is drawn follows from the seed and survives a checkpoint."""

    steps: Tensor
    kept_alike: ClassVar[tuple[str, ...]] = ()

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device="cpu"))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.steps))


class MemoryBank(_Memory):
    """Both embeddings of every sample (CRD, Tian 2020): two buffers of ``samples`` × ``width``, and a label for each.

    ``negatives`` samples are drawn for a batch as a whole. Every process of a distributed run holds the whole bank, and sees
    the samples of all; the banks stay equal.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    scales: Tensor
    kept_alike: ClassVar[tuple[str, ...]] = ("student", "teacher", "labels", "scales", "steps")

    def __init__(self, samples: int, width: int, negatives: int, temperature: float, momentum: float, seed: int) -> None:
        super().__init__(seed)
        self.samples, self.negatives, self.temperature, self.momentum = samples, negatives, temperature, momentum
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("student", _random(samples, width, generator))
        self.register_buffer("teacher", _random(samples, width, generator))
        self.register_buffer("labels", torch.full((samples,), -1, dtype=torch.int32, device="cpu"))
        unknown = torch.full((2,), torch.nan, device="cpu")  # log Z of both directions, from the first batch
        self.register_buffer("scales", unknown)

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor | None, labels: Tensor | None) -> Tensor:
        """The loss of a batch of embeddings of length one, which then enter the bank."""
        index = self._checked(index, len(student))
        drawn = torch.randint(self.samples, (self.negatives,), generator=self._generator(), device="cpu").to(index.device)
        counted = drawn != index[:, None]
        if labels is not None:
            counted &= ~_same_class(self.labels[drawn], labels)
        loss = torch.stack(
            [
                self._side(number, anchor, bank, index, drawn, counted)
                for number, (anchor, bank) in enumerate(((student, self.teacher), (teacher, self.student)))
            ]
        ).sum()
        if self.training:
            self._update(student.detach(), teacher.detach(), index, labels)
        return loss

    def _checked(self, index: Tensor | None, batch: int) -> Tensor:
        if index is None:
            raise DataError("the memory bank needs every sample's index: wrap the dataset in IndexedDataset.")
        if len(index) != batch:
            raise DataError(f"there are {len(index)} indices for {batch} samples.")
        wrong = (index < 0) | (index >= self.samples)
        if bool(wrong.any()):
            raise DataError(f"sample index {int(index[wrong][0])} is outside the memory bank of {self.samples} samples.")
        return index

    def _side(self, number: int, anchor: Tensor, bank: Tensor, index: Tensor, drawn: Tensor, counted: Tensor) -> Tensor:
        """One of the two directions: ``anchor`` against what the bank holds of the other model."""
        positive = (anchor * bank[index]).sum(1)
        both = torch.cat([positive[:, None], anchor @ bank[drawn].T], 1).div(self.temperature)
        if math.isnan(float(self.scales[number])):
            shares = _from_everyone(_log_mean(both.detach().flatten())[None])
            self.scales[number] = _log_mean(shares) + math.log(self.samples)
        both = both - self.scales[number].clone()
        return nce_loss(both[:, 0], both[:, 1:], self.samples, counted, logarithms=True)

    @torch.no_grad()
    def _update(self, student: Tensor, teacher: Tensor, index: Tensor, labels: Tensor | None) -> None:
        """Move the bank's entries towards the new embeddings; of equal indices the last one counts."""
        student, teacher, index = (_from_everyone(value) for value in (student, teacher, index))
        device = index.device
        places, which = torch.unique(index, return_inverse=True)
        order = torch.arange(len(index), device=device)
        last = torch.zeros_like(places).scatter_reduce_(0, which, order, "amax")
        for bank, new in ((self.student, student), (self.teacher, teacher)):
            moved = self.momentum * bank[places] + (1 - self.momentum) * new[last].to(bank.dtype)
            bank[places] = F.normalize(moved)
        if labels is not None:
            self.labels[places] = _from_everyone(labels)[last].int()
        self.steps += 1


class MemoryQueue(_Memory):
    """The embeddings of the last ``size`` samples (MoCo, He 2020), negatives for the batch at hand."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    kept_alike: ClassVar[tuple[str, ...]] = ("student", "teacher", "labels", "steps")

    def __init__(self, size: int, width: int, temperature: float, seed: int) -> None:
        super().__init__(seed)
        self.size, self.temperature = size, temperature
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("student", _random(size, width, generator))
        self.register_buffer("teacher", _random(size, width, generator))
        self.register_buffer("labels", torch.full((size,), -1, dtype=torch.int32, device="cpu"))

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor | None, labels: Tensor | None) -> Tensor:
        counted = None if labels is None else ~_same_class(self.labels.clone(), labels)
        positive = (student * teacher).sum(1) / self.temperature
        sides = ((student, self.teacher), (teacher, self.student))
        losses = [info_nce_loss(positive, anchor @ queue.clone().T / self.temperature, counted) for anchor, queue in sides]
        if self.training:
            self._update(student.detach(), teacher.detach(), labels)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _update(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
        student, teacher = (_from_everyone(value)[-self.size :] for value in (student, teacher))
        places = (int(self.steps) + torch.arange(len(student), device=student.device)) % self.size
        self.student[places], self.teacher[places] = student.to(self.student.dtype), teacher.to(self.teacher.dtype)
        self.labels[places] = -1 if labels is None else _from_everyone(labels)[-self.size :].int()
        self.steps += len(student)


class InBatch(nn.Module):
    """The other samples of the batch as negatives."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor | None, labels: Tensor | None) -> Tensor:
        similar = student @ teacher.T / self.temperature
        same = torch.eye(len(student), dtype=torch.bool, device=student.device)
        counted = ~same if labels is None else ~same & ~_same_class(labels, labels)
        positive = similar.diagonal()
        return info_nce_loss(positive, similar, counted) + info_nce_loss(positive, similar.T, counted)
