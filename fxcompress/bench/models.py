"""Models to measure on: torchvision's by name, with seeded weights, lived-in statistics and inputs they accept."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import ConfigError, did_you_mean

__all__ = ["build", "example_inputs", "kind_of", "live_in", "names"]

_IMAGE = (224, 224)
_SIZES: dict[str, tuple[int, ...]] = {"inception_v3": (299, 299), "vit_h_14": (224, 224)}
_VIDEO: dict[str, tuple[int, ...]] = {"mvit": (16, 224, 224), "swin3d": (8, 64, 64), "s3d": (16, 224, 224)}


def _torchvision() -> Any:
    try:
        import torchvision
    except ImportError as error:
        raise ConfigError("models by name come from torchvision, which is not installed.") from error
    return torchvision.models


def names(kind: str | None = None) -> list[str]:
    """Every non-quantized torchvision model, or those of one ``kind`` (classification, segmentation, detection, ...)."""
    models = _torchvision()
    every = [name for name in models.list_models() if not name.startswith("quantized_")]
    return every if kind is None else [name for name in every if kind_of(name) == kind]


def kind_of(name: str) -> str:
    """classification, segmentation, detection, video or optical_flow."""
    package = str(_torchvision().get_model_builder(name).__module__).split(".")
    return package[2] if package[2] in ("detection", "segmentation", "video", "optical_flow") else "classification"


def build(name: str, *, weights: bool = False, seed: int = 0, **options: Any) -> nn.Module:
    """A torchvision model in eval mode, its weights drawn from ``seed``; with ``weights`` its default ones, downloaded.

    ``options`` go to torchvision's builder.

    Raises ConfigError for a name torchvision does not have, with the closest ones.
    """
    models = _torchvision()
    known = names()
    if name not in known:
        raise ConfigError(f"torchvision has no model {name!r}.{did_you_mean(name, known)}")
    builder = models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    options["weights"] = "DEFAULT" if weights else None
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3") and not weights:
        options["init_weights"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = models.get_model(name, **options)
    return model.eval()


def example_inputs(name: str, *, batch: int = 1, size: tuple[int, ...] | None = None, seed: int = 0) -> tuple[Any, ...]:
    """Positional arguments the model accepts: ``batch`` samples of normal noise of ``size`` (height, width)."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    kind = kind_of(name)
    if kind == "detection":
        return ([torch.rand(3, *(size or (200, 300)), generator=generator, device="cpu") for _ in range(batch)],)
    if kind == "optical_flow":
        return noise(batch, 3, *(size or (128, 128))), noise(batch, 3, *(size or (128, 128)))
    if kind == "video":
        clip = next((shape for prefix, shape in _VIDEO.items() if name.startswith(prefix)), (8, 64, 64))
        return (noise(batch, 3, *(size or clip)),)
    return (noise(batch, 3, *(size or _SIZES.get(name, _IMAGE))),)


def live_in(model: nn.Module, batches: list[tuple[Any, ...]]) -> None:
    """Give batch normalisation the statistics of ``batches``, as training would have left them."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
