"""Example inputs where nobody gave any: made up from what the first layer takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxcompress.errors import ConfigError

__all__ = ["guess_example"]

_SIZES = (64, 224, 32, 299)


def guess_example(model: nn.Module) -> Tensor:
    """A batch of two that runs through ``model``; ConfigError asks for example_inputs where none is found."""
    layer = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))), None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(layer, nn.Linear):
        shapes: list[tuple[int, ...]] = [(2, layer.in_features)]
    elif layer is not None:
        shapes = [(2, layer.in_channels, *[size] * len(layer.kernel_size)) for size in _SIZES]
    else:
        shapes = []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for shape in shapes:
            example = torch.zeros(shape, device=device)
            try:
                with torch.no_grad():
                    model(example)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                continue
            return example
    finally:
        for module, training in modes.items():
            module.training = training
    raise ConfigError(
        f"the features of {type(model).__name__} have no known shapes, and its first layer does not tell its input: "
        "give example_inputs=."
    )
