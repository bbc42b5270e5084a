"""Example inputs for a model that nobody gave any for: what its first layer takes, tried out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fxcompress.graph.tree import evaluating

__all__ = ["guess_example"]

_SIZES = (64, 224, 32, 28, 299, 16, 8, 128, 96, 256)
_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, nn.RNNBase)


def guess_example(model: nn.Module) -> Tensor | None:
    """A random batch of two that runs through ``model`` in eval mode, the same each time; None where none is found.

    The first convolution, linear, embedding or recurrent layer tells the channels; for images the usual sizes are tried.
    """
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        return None
    with evaluating(model):
        return next((example for example in _candidates(model) if _runs(model, example)), None)


def _candidates(model: nn.Module) -> Iterator[Tensor]:
    layer = next((module for module in model.modules() if isinstance(module, _FIRST)), None)
    weight = next(
        (p for p in model.parameters() if p.is_floating_point()), torch.zeros((), dtype=torch.float32, device="cpu")
    )
    if isinstance(layer, nn.Embedding):
        yield torch.zeros((2, 8), dtype=torch.int64, device=weight.device)
    generator = torch.Generator().manual_seed(0)
    for shape in _shapes(layer):
        yield torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(weight.device, weight.dtype)


def _shapes(layer: nn.Module | None) -> Iterator[tuple[int, ...]]:
    if isinstance(layer, nn.Linear):
        yield from ((2, layer.in_features), (2, 8, layer.in_features))
    elif isinstance(layer, nn.RNNBase):
        yield (2, 8, layer.input_size)
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        yield from ((2, layer.in_channels, *[size] * len(layer.kernel_size)) for size in _SIZES)


def _runs(model: nn.Module, example: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return False
    return True
