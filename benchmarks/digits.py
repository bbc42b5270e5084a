"""A small residual network on scikit-learn's handwritten digits: trained, quantized after and during training, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.figure import Figure
from benchmarks.run import Run
from fxcompress import LSQQuantizer, PTQQuantizer, QATQuantizer, coverage
from fxcompress.quantization import CALIBRATORS


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """About 80 thousand parameters, 1×8×8 in, 10 classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1)
        self.blocks = nn.Sequential(Block(16, 32, 1), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels (every fifth digit)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def trained(seed: int = 0, epochs: int = 15) -> DigitsNet:
    """The network after a few epochs, in eval mode."""
    images, labels, _, _ = digits()
    torch.manual_seed(seed)
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * (len(labels) // 64 + 1))
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """Share of test digits recognised, in percent."""
    _, _, images, labels = digits()
    with torch.no_grad():
        return float(100 * (model(images).argmax(1) == labels).double().mean())


TRAINED: dict[str, Callable[[], QATQuantizer | LSQQuantizer]] = {
    "QAT 8 bits": lambda: QATQuantizer(freeze_bn_epochs=3),
    "QAT 4 bits": lambda: QATQuantizer(bits=4, freeze_bn_epochs=3),
    "LSQ 4 bits": lambda: LSQQuantizer(4, freeze_bn_epochs=3),
    "QAT 2 bits": lambda: QATQuantizer(bits=2, freeze_bn_epochs=3),
    "LSQ 2 bits": lambda: LSQQuantizer(2, freeze_bn_epochs=3),
    "QAT 2 bits, first and last layer too": lambda: QATQuantizer(bits=2, first_last_bits=2, freeze_bn_epochs=3),
    "LSQ 2 bits, first and last layer too": lambda: LSQQuantizer(2, first_last_bits=2, freeze_bn_epochs=3),
}


def finetuned(quantizer: QATQuantizer | LSQQuantizer, model: nn.Module, epochs: int = 4, seed: int = 0) -> nn.Module:
    """``model`` trained on by a quantizer for a few epochs, and converted."""
    images, labels, _, _ = digits()
    torch.manual_seed(seed)
    prepared = quantizer.prepare(model, images[:2]).train()
    named = dict(prepared.named_parameters())
    scales = [p for name, p in named.items() if name.startswith("fake_quant.")]
    weights = [p for name, p in named.items() if not name.startswith("fake_quant.")]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (len(labels) // 64 + 1))
    for epoch in range(epochs):
        quantizer.on_epoch(prepared, epoch)
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(prepared(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return quantizer.convert(prepared.eval())


DROPS = {"QAT 8 bits": 0.5, "QAT 4 bits": 2.0}
"""Points of accuracy that training at few bits may cost."""


def measure(run: Run) -> Iterator[Figure]:
    """Test accuracy of every calibrator, and of training at 8, 4 and 2 bits."""
    model = trained(run.seed)
    images, _, _, _ = digits()
    batches = list(images.split(64))
    top = accuracy(model)
    yield Figure("fp32: test accuracy", top, "%")
    for method in CALIBRATORS:
        quantized = PTQQuantizer(calibration_method=method, num_calibration_batches=len(batches)).quantize(model, batches)
        yield Figure(
            f"int8, {method}: points lost", top - accuracy(quantized), "points", at_most=0.5, note=_integers(quantized)
        )
    reached = {}
    for name, quantizer in TRAINED.items():
        learnt = finetuned(quantizer(), model, epochs=run.pick(4, 1), seed=run.seed)
        reached[name] = accuracy(learnt)
        yield Figure(f"{name}: points lost", top - reached[name], "points", at_most=DROPS.get(name), note=_integers(learnt))
    for name, value in reached.items():
        if name.startswith("LSQ 2 bits"):
            gain = value - reached[name.replace("LSQ", "QAT")]
            yield Figure(f"{name}: points above QAT", gain, "points", at_least=0.01)


def _integers(model: nn.Module) -> str:
    return f"{coverage(model).mac_share:.1%} of MACs in integers"
