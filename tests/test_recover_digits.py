"""Accuracy recovery on handwritten digits: a trained ReLU6 network whose channels are scaled badly against each other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, coverage

datasets = pytest.importorskip("sklearn.datasets")


def digits() -> tuple[Tensor, Tensor]:
    found = datasets.load_digits()
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(found.target)


def block(inputs: int, outputs: int, **geometry: Any) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, bias=False, **geometry), nn.BatchNorm2d(outputs), nn.ReLU6()]


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    """A depthwise-separable network, trained on the first 1297 digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *block(1, 24, kernel_size=3, padding=1),
        *block(24, 24, kernel_size=3, padding=1, groups=24),
        *block(24, 32, kernel_size=1, stride=2),
        *block(32, 32, kernel_size=3, padding=1, groups=32),
        *block(32, 48, kernel_size=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    images, labels = (part[:1297] for part in digits())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(4):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def badly_scaled(model: nn.Sequential, octaves: float = 8.0) -> nn.Sequential:
    """The same function on the digits: channels that never reach 6 are shrunk, and the next layer grows by as much."""
    images, _ = digits()
    folded: Any = PassManager(["fold-batchnorm"], reproducer=False).run(model, images[:2])
    convs = [getattr(folded, str(place)) for place in range(0, 15, 3)]
    generator, value = torch.Generator().manual_seed(0), images
    with torch.no_grad():
        for conv, following in itertools.pairwise(convs):
            value = F.relu6(conv(value))
            free = value.movedim(1, 0).flatten(1).amax(1) < 6
            shrink = torch.where(free, torch.exp2(-octaves * torch.rand(len(free), generator=generator)), 1.0)
            conv.weight.mul_(shrink[:, None, None, None])
            conv.bias.mul_(shrink)
            following.weight.div_(shrink[:, None, None, None] if following.groups > 1 else shrink[None, :, None, None])
            value = value * shrink[:, None, None]
    return folded


def accuracy(model: nn.Module) -> float:
    images, labels = (part[1297:] for part in digits())
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).double().mean())


def quantized(model: nn.Module, *remedies: Any) -> tuple[Any, list[str]]:
    images, labels = (part[:1297] for part in digits())
    batches = list(zip(images.split(128), labels.split(128), strict=True))
    observe = {"insert-observers": {"calibrator": "minmax", "per_channel": False}}
    manager = PassManager(["fuse-activations", observe, "calibrate", *remedies, "fold-quantization"], reproducer=False)
    result = manager.run(model, data=batches)
    return result, [r.reason for r in manager.ledger.remarks("recover-accuracy")]


def test_scaling_channels_badly_changes_nothing_in_float_and_much_in_integers(trained: nn.Sequential) -> None:
    bad = badly_scaled(trained)
    assert accuracy(trained) > 94
    assert abs(accuracy(bad) - accuracy(trained)) < 0.3
    assert accuracy(quantized(bad)[0]) < accuracy(bad) - 5


def test_accuracy_comes_back_without_a_layer_in_float(trained: nn.Sequential) -> None:
    bad = badly_scaled(trained)
    mended, said = quantized(bad, {"recover-accuracy": {"max_drop": 0.5, "num_batches": 11}})
    assert any(line.startswith("equalize-layers:") and "undone" not in line for line in said)
    assert not any("ReLU6 replaced" in line and "undone" not in line for line in said)
    assert coverage(mended).mac_share == 1.0
    assert accuracy(mended) >= accuracy(bad) - 1.0


def test_replacing_relu6_throughout_would_cost_more_than_it_mends(trained: nn.Sequential) -> None:
    """Unmeasured, the paper's remedy for ReLU6 changes the network; measured, only chains that gain are changed."""
    bad = badly_scaled(trained)
    images, _ = digits()
    replaced = PassManager([{"equalize-layers": {"relu6": "replace"}}], reproducer=False).run(bad, images[:64])
    bound = PassManager(["equalize-layers"], reproducer=False).run(bad, data=[images[:1297]])
    with torch.no_grad():
        moved = [float((m(images) - bad(images)).square().sum() / bad(images).square().sum()) for m in (replaced, bound)]
    assert moved[1] < 1e-6 < 1e-4 < moved[0]
    assert accuracy(quantized(bad, "equalize-layers")[0]) >= accuracy(bad) - 1.0
