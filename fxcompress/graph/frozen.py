"""Batch normalisation whose statistics are frozen: ``train()`` does not wake it."""

from __future__ import annotations

from typing import Self

from torch import nn

__all__ = ["FROZEN", "freeze_statistics"]


class _Frozen(nn.Module):
    """Mixed in before a normalisation class: never in training mode; weight and bias still learn."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """BatchNorm1d with frozen statistics."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """BatchNorm2d with frozen statistics."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """BatchNorm3d with frozen statistics."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """SyncBatchNorm with frozen statistics."""


FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}


def freeze_statistics(model: nn.Module) -> nn.Module:
    """Freeze every batch normalisation with running statistics in place; returns ``model``."""
    for module in model.modules():
        if type(module) in FROZEN and getattr(module, "running_mean", None) is not None:
            module.__class__ = FROZEN[type(module)]
            module.eval()
    return model
