"""The configuration examples of the requirement run as they stand, from a file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from fxcompress import Plan, build_compression_pipeline, build_distiller, build_pruner, build_quantizer
from fxcompress.graph.coverage import coverage

CONFIGS = Path(__file__).parent / "configs"


class Net(nn.Module):
    """A small network with the layer names that the examples exclude."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 12, 12, generator=generator)
    return list(zip(images.split(8), torch.randint(0, 10, (16,), generator=generator).split(8), strict=True))


def shorter(name: str, tmp_path: Path, **numbers: int) -> Path:
    """The example with smaller numbers of epochs, everything else as it stands."""
    text = (CONFIGS / name).read_text(encoding="utf-8")
    for key, value in numbers.items():
        text, changed = re.subn(rf"\b{key}: \d+", f"{key}: {value}", text)
        assert changed
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_post_training_quantization(model: nn.Module, data: Any) -> None:
    path = CONFIGS / "ptq.yaml"
    quantizer = build_quantizer(path, model)
    assert (quantizer.backend, quantizer.calibration_method, quantizer.num_calibration_batches) == (
        "tensorrt",
        "entropy",
        100,
    )
    quantized = build_compression_pipeline(path, model).run(data=data)
    assert coverage(quantized).mac_share > 0.99
    with torch.no_grad():
        assert quantized(data[0][0]).shape == (8, 10)


def test_quantization_aware_training(model: nn.Module, data: Any, tmp_path: Path) -> None:
    plan = build_compression_pipeline(CONFIGS / "qat.yaml", model).plan
    train: Any = next(step for step in plan if step.name == "train")
    assert (train.epochs, train.lr, train.freeze_bn_epochs) == (100, 0.001, 80)
    pipeline = build_compression_pipeline(shorter("qat.yaml", tmp_path, epochs=3, freeze_bn_epochs=1), model)
    quantized = pipeline.run(data=data)
    assert coverage(quantized).mac_share > 0.99
    assert any("3 epochs" in remark.reason for remark in pipeline.ledger.remarks("train"))


def test_structured_pruning(model: nn.Module, data: Any, tmp_path: Path) -> None:
    pruner = build_pruner(CONFIGS / "structured.yaml", model)
    assert (pruner.sparsity, pruner.criterion, pruner.options["round_to"]) == (0.5, "bn_scale", 8)
    assert pruner.scheduler.end_epoch == 50
    plan = build_compression_pipeline(CONFIGS / "structured.yaml").plan
    assert sum(step.name == "prune-channels" for step in plan) == 50
    pipeline = build_compression_pipeline(shorter("structured.yaml", tmp_path, end_epoch=3), model)
    pruned = pipeline.run(data=data)
    assert pruned.get_submodule("stem.0").out_channels == 16
    kept: list[Any] = [pruned.get_submodule(name).out_channels for name in ("body.0", "body.3")]
    assert pruned.get_submodule("head").in_features == kept[-1]  # what the head reads follows the layer before it
    assert sum(kept) == 32 and all(channels % 8 == 0 for channels in kept)
    trained = [step for step in pipeline.plan if step.name == "train"]
    assert sum(step.epochs for step in trained) == 4  # type: ignore[attr-defined]


def test_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    teacher = torchvision.models.resnet101(weights=None)
    torch.save(teacher.state_dict(), "resnet101.pth")
    distiller = build_distiller(CONFIGS / "distillation.yaml")
    assert torch.equal(distiller.teacher.get_parameter("fc.weight"), teacher.fc.weight)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    output, losses = distiller(images, labels)
    assert output.shape == (2, 1000)
    assert {"task", "kd"} < set(losses)
    pipeline = build_compression_pipeline(CONFIGS / "distillation.yaml")
    before = pipeline.model.get_parameter("fc.weight").clone()  # type: ignore[union-attr]
    step: Any = pipeline.plan.steps[0]
    pipeline.plan = Plan((dataclasses.replace(step, epochs=1),))
    student = pipeline.run(data=[(images, labels)])
    assert not torch.equal(student.get_parameter("fc.weight"), before)
    assert any("1 epochs" in remark.reason for remark in pipeline.ledger.remarks("distill"))


def test_a_pipeline_of_three(model: nn.Module, data: Any, tmp_path: Path) -> None:
    assert [stage.title for stage in build_compression_pipeline(CONFIGS / "pipeline.yaml", model).stages] == [
        "LogitDistiller",
        "StructuredPruner",
        "PTQQuantizer",
    ]
    path = shorter("pipeline.yaml", tmp_path, epochs=2, finetune_epochs=1)
    torch.manual_seed(2)
    pipeline = build_compression_pipeline(path, model)
    result = pipeline.run(data=data, teacher=Net())
    assert [row.step for row in pipeline.ledger.rows] == ["trace", *(step.name for step in pipeline.plan)]
    assert coverage(result).mac_share > 0.9
    first, last = pipeline.ledger.rows[0], pipeline.ledger.rows[-1]
    assert last.parameters < 0.6 * first.parameters
    with torch.no_grad():
        assert result(data[0][0]).shape == (8, 10)


def test_the_examples_are_the_requirements_own() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == {"compression"}
