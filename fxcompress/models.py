"""Models and data by name, as a configuration writes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fxcompress.errors import ConfigError, FxCompressError, Where, brief, shown
from fxcompress.options import Seed, fault, located, no_such, validated
from fxcompress.registry import Registry
from fxcompress.weights import load_weights

__all__ = ["DATASETS", "MODELS", "build_data", "build_model", "given_or_built"]

log = logging.getLogger("fxcompress")

Count = Annotated[int, Field(ge=1, lt=2**40)]


def _torchvision(name: str, **options: Any) -> nn.Module:
    try:
        from torchvision.models import get_model
    except ImportError as error:
        raise ConfigError(f"the model {name!r} comes from torchvision, which is not installed.") from error
    return get_model(name, weights=None, **options)


def resnet(depth: int = 50, num_classes: int = 1000) -> nn.Module:
    """torchvision's ResNet of 18, 34, 50, 101 or 152 layers."""
    if depth not in (18, 34, 50, 101, 152):
        raise ConfigError(f"depth is {depth}; a ResNet has 18, 34, 50, 101 or 152 layers.")
    return _torchvision(f"resnet{depth}", num_classes=num_classes)


MODELS = Registry("model", {"ResNet": resnet})
"""Model builders by name; torchvision's own names (``resnet101``) are known beside them."""


def build_model(config: Any, path: Where = ()) -> nn.Module:
    """The model that ``{type: name, pretrained: weights file, …}`` describes; a name alone has no options.

    Raises ConfigError at the key that is wrong.
    """
    options = _options(config, path)
    name, pretrained = options.pop("type"), options.pop("pretrained", None)
    if name in MODELS:
        model: nn.Module = _called(MODELS[name], options, path)
    elif name in _torchvision_names():
        if "weights" in options:
            raise fault((*path, "weights"), "there is no such key. 'pretrained' is the path of a weights file.")
        model = _called(lambda **given: _torchvision(name, **given), options, path, checked=False)
    else:
        raise no_such("model", name, [*MODELS, *_torchvision_names()], (*path, "type"))
    if pretrained is not None:
        if not isinstance(pretrained, str):
            raise fault((*path, "pretrained"), f"is {shown(pretrained)}; it is the path of a weights file.")
        try:
            load_weights(model, pretrained)
        except ConfigError as error:
            raise fault((*path, "pretrained"), str(error)) from error
    return model


def given_or_built(given: nn.Module | None, config: Any, path: Where) -> nn.Module:
    """``given``, with a warning that the model which ``config`` describes is not built; that model where none is given."""
    if given is None:
        return build_model(config, path)
    place, name = ".".join(map(str, path)), _options(config, path)["type"]
    log.warning("%s: %r is not built, for a model was given: %s", place, name, type(given).__name__)
    return given


def _torchvision_names() -> list[str]:
    try:
        from torchvision.models import list_models
    except ImportError:
        return []
    return [name for name in list_models() if not name.startswith("quantized_")]


def _options(config: Any, path: Where) -> dict[str, Any]:
    if isinstance(config, str):
        config = {"type": config}
    if not isinstance(config, Mapping) or not isinstance(config.get("type"), str):
        raise fault(path, f"is {shown(config)}; write a name, or a mapping with its 'type'.")
    return dict(config)


def _called(function: Any, options: dict[str, Any], path: Where, checked: bool = True) -> Any:
    try:
        return function(**(validated(function, options, path) if checked else options))
    except FxCompressError as error:
        raise error if getattr(error, "path", ()) else located(error, path, options) from error
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError, AssertionError) as error:
        raise located(ConfigError(brief(error)), path, options) from error


def random_data(samples: Count = 64, shape: tuple[Count, ...] = (3, 224, 224), classes: Count = 1000, seed: Seed = 0) -> Any:
    """Normal noise with random labels, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, *shape, generator=generator, device="cpu")
    return TensorDataset(images, torch.randint(0, classes, (samples,), generator=generator, device="cpu"))


def digits(train: bool = True) -> Any:
    """scikit-learn's handwritten digits, 1×8×8 in [0, 1]; every fifth is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the data set 'digits' comes from scikit-learn, which is not installed.") from error
    data = load_digits()
    images, labels = (
        torch.tensor(data.images, dtype=torch.float32, device="cpu")[:, None] / 16,
        torch.tensor(data.target, device="cpu"),
    )
    chosen = (torch.arange(len(labels), device="cpu") % 5 == 0) != train
    return TensorDataset(images[chosen], labels[chosen])


def image_folder(root: str, size: Count = 224, resize: Count = 256) -> Any:
    """Images in a folder per class, resized, cropped in the middle and normalised as for ImageNet."""
    try:
        from torchvision import datasets, transforms
    except ImportError as error:
        raise ConfigError("the data set 'image-folder' comes from torchvision, which is not installed.") from error
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = [transforms.Resize(resize), transforms.CenterCrop(size), transforms.ToTensor(), normalise]
    try:
        return datasets.ImageFolder(root, transforms.Compose(steps))
    except (OSError, ValueError) as error:
        raise ConfigError(f"root {root!r} is no folder of images by class: {brief(error)}.") from error


DATASETS = Registry("data set", {"random": random_data, "digits": digits, "image-folder": image_folder})
"""Data sets by name: a function of options that returns a map-style data set of (input, target)."""


def build_data(config: Any, path: Where = ()) -> DataLoader[Any]:
    """The loader that ``{type: name, batch_size: 32, shuffle: false, …}`` describes; ConfigError at a key that is wrong."""
    options = _options(config, path)
    name = options.pop("type")
    if name not in DATASETS:
        raise no_such("data set", name, DATASETS, (*path, "type"))
    batch_size, shuffle = options.pop("batch_size", 32), options.pop("shuffle", False)
    workers = options.pop("workers", 0)
    for key, value, kind in (("batch_size", batch_size, int), ("shuffle", shuffle, bool), ("workers", workers, int)):
        if type(value) is not kind or not int(key == "batch_size") <= value < 2**40:
            raise fault(
                (*path, key), f"is {shown(value)}; it is a {'positive ' if key == 'batch_size' else ''}{kind.__name__}."
            )
    if isinstance(options.get("shape"), list):
        options["shape"] = tuple(options["shape"])
    dataset: Dataset[Any] = _called(DATASETS[name], options, path)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, num_workers=workers)
