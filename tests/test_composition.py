"""Techniques in one plan: masks that grow while training, distillation from the unpruned model, then QAT."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import build_compression_pipeline
from fxcompress.errors import FxCompressError
from fxcompress.graph.coverage import coverage

X = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = X.flatten(1)[:, :4].argmax(1)
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))

CONFIG = """
compression:
  pipeline:
  - type: MagnitudePruner
    sparsity: 0.5
    scheduler: {type: AGPScheduler, end_epoch: 2}
    finetune: {lr: 0.01, checkpoint_every: 1}
  - {type: LogitDistiller, epochs: 2, lr: 0.01}
  - {type: QATQuantizer, epochs: 2, lr: 0.01, freeze_bn_epochs: 1}
"""


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(512, 4)
    ).eval()


class Failing:
    """Data whose reader is interrupted after some batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in BATCHES:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield batch


@pytest.fixture(scope="module")
def whole() -> tuple[Any, Any]:
    pipeline = build_compression_pipeline(CONFIG)
    return pipeline, pipeline.run(small(), BATCHES, X[:8])


def test_sparsity_survives_distillation_and_quantization(whole: tuple[Any, Any]) -> None:
    pipeline, result = whole
    zeros = {(number, row.step): row.sparsity for number, row in enumerate(pipeline.ledger.rows)}
    after = [share for (number, step), share in zeros.items() if step in ("bake-masks", "distill", "freeze-scales", "lower")]
    assert len(after) == 4
    assert all(share >= 0.5 - 1 / 2120 for share in after)
    weights = [tensor for name, tensor in result.meta["portable"].state_dict().items() if tensor.dtype is torch.int8]
    total, empty = sum(w.numel() for w in weights), sum(int((w == 0).sum()) for w in weights)
    assert total == 72 + 2048
    assert empty / total >= 0.5 - 1 / 2120
    assert coverage(result).mac_share == 1.0


def test_every_stage_reports_in_one_ledger(whole: tuple[Any, Any]) -> None:
    pipeline, _ = whole
    assert [row.step for row in pipeline.ledger.rows] == ["trace", *(step.name for step in pipeline.plan)]
    said = {row.step: " ".join(remark.reason for remark in row.remarks) for row in pipeline.ledger.rows}
    assert "3 epochs" in said["train"] or "2 epochs" in said["train"]
    assert "2 epochs" in said["distill"]


def test_an_interruption_in_any_stage_changes_nothing(whole: tuple[Any, Any], tmp_path: Path) -> None:
    _, expected = whole
    seen = []
    for batches in (4, 8, 5, 4):
        with pytest.raises(KeyboardInterrupt):
            build_compression_pipeline(CONFIG).run(small(), Failing(batches), X[:8], keep=tmp_path / "run", resume=True)
        seen.append(sorted(path.name for path in (tmp_path / "run").iterdir()))
    pipeline = build_compression_pipeline(CONFIG)
    result = pipeline.run(small(), BATCHES, X[:8], keep=tmp_path / "run", resume=True)
    assert torch.equal(result(X), expected(X))
    assert [row.step for row in pipeline.ledger.rows] == ["trace", *(step.name for step in pipeline.plan)]
    assert len({tuple(names) for names in seen}) > 1


@pytest.mark.parametrize("step", ["insert-fake-quant", "freeze-scales", "fold-quantization", "lower"])
def test_a_run_that_ends_between_steps_goes_on_to_the_same_result(
    whole: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    pipeline, expected = whole
    cls = type(next(found for found in pipeline.plan if found.name == step))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cls, "run_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_compression_pipeline(CONFIG).run(small(), BATCHES, X[:8], keep=tmp_path / "run")
    for draft in (".stages.json.1.partial", ".stage-3-abc"):
        (tmp_path / "run" / draft).write_text("half")
    result = build_compression_pipeline(CONFIG).run(small(), BATCHES, X[:8], keep=tmp_path / "run", resume=True)
    assert torch.equal(result(X), expected(X))
    assert not list((tmp_path / "run").glob(".stage*"))


def outcome(folder: Path, expected: Any) -> str:
    try:
        result = build_compression_pipeline(CONFIG).run(small(), BATCHES, X[:8], keep=folder, resume=True)
    except FxCompressError as error:
        return str(error)
    return "the same" if torch.equal(result(X), expected(X)) else "another model"


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_run_whose_files_are_damaged_is_refused_or_redone_and_never_another_model(
    whole: tuple[Any, Any], tmp_path: Path, damage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_compression_pipeline(CONFIG).run(small(), Failing(14), X[:8], keep=tmp_path / "run")
    files = [path.relative_to(tmp_path / "run") for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()]
    assert {"stages.json", "tensors.safetensors"} < {file.name for file in files}
    for number, file in enumerate(files):
        damaged = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        content = (damaged / file).read_bytes()
        middle = len(content) // 2
        (damaged / file).unlink()
        if damage != "missing":
            rest = bytes([content[middle] ^ 1]) + content[middle + 1 :] if damage == "flipped" else b""
            (damaged / file).write_bytes(content[:middle] + rest)
        said = outcome(damaged, whole[1])
        assert said == "the same" or re.search(r"(damaged|missing|is not a file).*|cannot be read", said), (file, said)
        assert damage == "missing" or said != "the same", file


class TwoInputs(nn.Module):
    """Images and a mask, each by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        masked = images if mask is None else images * mask
        return self.head(torch.relu(self.second(torch.relu(self.first(masked)))).mean((2, 3)))


@pytest.mark.parametrize(
    "stage",
    [
        {"type": "PTQQuantizer", "num_calibration_batches": 2},
        {"type": "StructuredPruner", "round_to": 1, "criterion": "taylor"},
        {"type": "StructuredPruner", "round_to": 1, "criterion": "hrank", "policy": "compensate", "finetune_epochs": 1},
        {"type": "MagnitudePruner", "finetune_epochs": 1},
        {"type": "LogitDistiller", "epochs": 1},
        {"type": "QATQuantizer", "epochs": 1},
    ],
    ids=lambda stage: f"{stage['type']} {stage.get('criterion', '')}",
)
def test_dicts_with_a_label_serve_every_stage_as_pairs_do(stage: dict[str, Any]) -> None:
    model, mask = TwoInputs().eval(), torch.ones(8, 1, 8, 8)
    pairs = build_compression_pipeline(stage, model).run(data=BATCHES)
    dicts = build_compression_pipeline(stage, model).run(data=[{"images": x, "mask": mask, "label": y} for x, y in BATCHES])
    assert torch.allclose(dicts(images=X, mask=torch.ones(24, 1, 8, 8)), pairs(X), atol=0.02)


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_defaults_of_the_caller_change_nothing(default: str) -> None:
    config = """
compression:
  pipeline:
  - {type: StructuredPruner, sparsity: 0.5, round_to: 2, finetune_epochs: 1}
  - {type: RandomPruner, sparsity: 0.2}
  - {type: FeatureDistiller, teacher_layers: ["2"], student_layers: ["2"], logit_distill: {}, epochs: 1}
  - {type: PTQQuantizer, num_calibration_batches: 2}
"""

    def compressed() -> Tensor:
        return build_compression_pipeline(config).run(small(), BATCHES, progress=False)(X)

    expected, model = compressed(), small()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if default == "dtype" else before)
    torch.set_default_device("meta" if default == "device" else None)
    try:
        found = build_compression_pipeline(config).run(model, BATCHES, progress=False)(X)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert torch.equal(found, expected)
