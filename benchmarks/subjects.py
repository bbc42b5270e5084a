"""Models to measure on, as training would have left them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxcompress.bench import models

__all__ = ["lived_in"]


def lived_in(name: str, batch: int = 4) -> tuple[nn.Module, list[Tensor]]:
    """A seeded model whose normalisation has lived on seeded noise, and four batches of such noise.

    A head of zeros, as ViT's comes, is drawn too.
    """
    model = models.build(name)
    batches = [models.example_inputs(name, batch=batch, seed=seed)[0] for seed in range(1, 5)]
    models.live_in(model, [(batches[0],), (batches[1],)])
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            with torch.no_grad():
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
    return model, batches
