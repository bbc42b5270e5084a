"""Configurations: what they build, what they compile to, and what that does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from fxcompress import PassManager, Plan, PTQQuantizer
from fxcompress.builder import (
    PRUNERS,
    build_compression_pipeline,
    build_pruner,
    build_quantizer,
)
from fxcompress.errors import ConfigError, PlanError
from fxcompress.models import DATASETS, MODELS, build_data, build_model
from fxcompress.pruning import AGPScheduler, MagnitudePruner
from fxcompress.training import OPTIMIZERS
from tests.configurations import small, written

X = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = X.flatten(1)[:, :4].argmax(1)
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))


def test_a_quantizer_is_what_its_configuration_says(tmp_path: Path) -> None:
    text = "compression:\n  type: PTQQuantizer\n  calibration_method: minmax\n  num_calibration_batches: 7\n"
    for config in (written(tmp_path, text), str(written(tmp_path, text)), text, yaml.safe_load(text)):
        quantizer = build_quantizer(config)
        assert isinstance(quantizer, PTQQuantizer)
        assert (quantizer.calibration_method, quantizer.num_calibration_batches) == ("minmax", 7)
    assert isinstance(build_quantizer({"type": "PTQQuantizer"}, small()), PTQQuantizer)


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it is an nn\.Module"):
        build_quantizer({"type": "PTQQuantizer"}, "resnet18")  # type: ignore[arg-type]


def test_a_pruner_carries_its_scheduler() -> None:
    pruner = build_pruner(
        {"type": "MagnitudePruner", "sparsity": 0.7, "scheduler": {"type": "AGPScheduler", "end_epoch": 5}}
    )
    assert type(pruner).__name__ == "MagnitudePruner"
    assert isinstance(pruner.scheduler, AGPScheduler)
    assert (pruner.scheduler.target_sparsity, pruner.scheduler.end_epoch) == (0.7, 5)
    assert build_pruner({"type": "RandomPruner"}).scheduler is None


def test_a_pipeline_compiles_to_a_plan_that_prints_and_runs() -> None:
    pipeline = build_compression_pipeline(
        {"pipeline": [{"type": "MagnitudePruner", "finetune_epochs": 1}, {"type": "PTQQuantizer"}]}, small()
    )
    names = [step.name for step in pipeline.plan]
    assert names[:3] == ["mask-weights", "train", "bake-masks"]
    assert names[3:] == [step.name for step in PTQQuantizer().plan]
    assert Plan.parse(str(pipeline.plan)) == pipeline.plan
    assert "# PTQQuantizer" in str(pipeline)
    one = pipeline.run(data=BATCHES)
    two = PassManager(str(pipeline.plan)).run(small(), data=BATCHES)
    assert torch.equal(one(X), two(X))
    assert [row.step for row in pipeline.ledger.rows] == ["trace", *names]


def test_a_list_runs_as_written_and_a_mapping_prunes_before_it_quantizes() -> None:
    stages = {"quantize": {"type": "PTQQuantizer"}, "prune": {"type": "MagnitudePruner"}}
    listed = [{"type": "MagnitudePruner", "sparsity": 0.3}, {"type": "MagnitudePruner", "sparsity": 0.2}]
    for config in ({"compression": stages}, {"compression": {"pipeline": stages}}):
        assert [stage.title for stage in build_compression_pipeline(config).stages] == ["MagnitudePruner", "PTQQuantizer"]
    plan = build_compression_pipeline({"pipeline": listed}).plan
    assert [step.sparsity for step in plan if step.name == "mask-weights"] == [0.3, 0.2]  # type: ignore[attr-defined]


def test_a_plan_step_may_be_a_component_and_a_pipeline_stage_a_pass() -> None:
    plan = Plan.parse(["remove-dead", {"PTQQuantizer": {"calibration_method": "minmax"}}])
    assert plan == Plan.parse(["remove-dead"]) + PTQQuantizer(calibration_method="minmax").plan
    pipeline = build_compression_pipeline({"pipeline": ["fold-batchnorm", {"remove-dead": {"dropout": True}}]})
    assert pipeline.plan == Plan.parse(["fold-batchnorm", {"remove-dead": {"dropout": True}}])
    with pytest.raises(PlanError, match="step 1 'PTQQuantizer': calibration_methd"):
        Plan.parse([{"PTQQuantizer": {"calibration_methd": "minmax"}}])
    with pytest.raises(PlanError, match="Did you mean 'PTQQuantizer'"):
        Plan.parse(["PTQQuantiser"])


def test_zeros_survive_the_stages_after_pruning() -> None:
    scheduler = {"type": "AGPScheduler", "end_epoch": 1}
    pipeline = build_compression_pipeline(
        {
            "pipeline": [
                {"type": "MagnitudePruner", "sparsity": 0.5, "scheduler": scheduler, "finetune": {"lr": 0.01}},
                {"train": {"epochs": 2, "lr": 0.01}},
                {"type": "PTQQuantizer"},
            ]
        }
    )
    result = pipeline.run(small(), BATCHES)
    weights = [b for b in result.state_dict().values() if torch.is_tensor(b) and b.dim() > 1]
    rows = {row.step: row.sparsity for row in pipeline.ledger.rows}
    assert rows["bake-masks"] == pytest.approx(0.5, abs=0.001)
    trained = [row.sparsity for row in pipeline.ledger.rows if row.step == "train"][-1]
    assert trained >= rows["bake-masks"]
    assert rows["fold-quantization"] >= 0.5
    assert weights is not None


def test_a_pipeline_builds_the_model_that_the_configuration_names() -> None:
    pytest.importorskip("torchvision")
    config = {"compression": {"type": "MagnitudePruner"}, "model": {"type": "ResNet", "depth": 18, "num_classes": 3}}
    pipeline = build_compression_pipeline(config)
    assert pipeline.model is not None
    assert pipeline.model.fc.out_features == 3  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no model"):
        build_compression_pipeline({"type": "MagnitudePruner"}).run(data=BATCHES)


def test_a_pipeline_that_was_interrupted_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "pipeline": [
            {"type": "MagnitudePruner", "finetune_epochs": 2},
            {"train": {"epochs": 2, "checkpoint_every": 1}},
            {"type": "PTQQuantizer"},
        ]
    }
    whole = build_compression_pipeline(config).run(small(), BATCHES)

    class Cut:
        """Data that fails after some batches."""

        def __init__(self, batches: int) -> None:
            self.left = batches

        def __iter__(self) -> Any:
            for batch in BATCHES:
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
                yield batch

        def __len__(self) -> int:
            return len(BATCHES)

    for batches in (6, 5, 6):  # in the first training, in its second epoch, in the second training
        with pytest.raises(KeyboardInterrupt):
            build_compression_pipeline(config).run(small(), Cut(batches), X[:8], keep=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "stages.json").is_file()
    pipeline = build_compression_pipeline(config)
    resumed = pipeline.run(small(), BATCHES, X[:8], keep=tmp_path / "run", resume=True)
    assert torch.equal(whole(X), resumed(X))
    assert [row.step for row in pipeline.ledger.rows] == ["trace", *(step.name for step in pipeline.plan)]
    with pytest.raises(ConfigError, match="holds a run"):
        build_compression_pipeline(config).run(small(), BATCHES, keep=tmp_path / "run")
    with pytest.raises(ConfigError, match="another plan"):
        build_compression_pipeline({"type": "PTQQuantizer"}).run(small(), BATCHES, keep=tmp_path / "run", resume=True)
    other = small()
    with torch.no_grad():
        other[0].bias.add_(1.0)  # type: ignore[index, union-attr]
    with pytest.raises(ConfigError, match="another model"):
        build_compression_pipeline(config).run(other, BATCHES, X[:8], keep=tmp_path / "run", resume=True)


def test_users_register_components() -> None:
    @PRUNERS.register("TestPruner")
    class TestPruner(MagnitudePruner):
        """Prunes lightly."""

        def __init__(self, lightness: float = 0.9) -> None:
            super().__init__(1 - lightness)

    pipeline = build_compression_pipeline({"type": "TestPruner", "lightness": 0.75})
    assert pipeline.plan.steps[0].sparsity == 0.25  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="lightness"):
        build_compression_pipeline({"type": "TestPruner", "lightness": "very"})


def test_classes_are_found_by_their_own_names_too() -> None:
    config = {"type": "PTQQuantizer", "calibration_method": "EntropyCalibrator", "num_calibration_batches": 1}
    named, short = ({**config, "calibration_method": method} for method in ("EntropyCalibrator", "entropy"))
    first, second = (build_compression_pipeline(c).run(small(), BATCHES, X[:8]) for c in (named, short))
    assert torch.equal(first(X[:8]), second(X[:8]))
    assert "AdamW" in OPTIMIZERS and OPTIMIZERS["AdamW"] is OPTIMIZERS["adamw"]
    assert list(OPTIMIZERS).count("AdamW") == 0
    with pytest.raises(ConfigError, match="Did you mean 'entropy'"):
        build_compression_pipeline({**config, "calibration_method": "EntropyCalibrater"})


# models and data


def test_models_are_named_by_registry_or_by_torchvision(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    model = build_model({"type": "resnet18", "num_classes": 2})
    assert model.fc.out_features == 2  # type: ignore[union-attr]
    for content in (model.state_dict(), {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}):
        torch.save(content, tmp_path / "w.pth")
        again = build_model({"type": "ResNet", "depth": 18, "num_classes": 2, "pretrained": str(tmp_path / "w.pth")})
        assert torch.equal(again.fc.weight, model.fc.weight)  # type: ignore[arg-type, union-attr]


def test_weights_that_do_not_fit_are_named_key_by_key(tmp_path: Path) -> None:
    @MODELS.register("TestLinear")
    def linear(width: int = 3) -> nn.Module:
        return nn.Linear(width, 2)

    torch.save({"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="bias is missing; extra is not in the model; weight has shape") as caught:
        build_model({"type": "TestLinear", "pretrained": str(tmp_path / "w.pth")}, ("model",))
    assert caught.value.path == ("model", "pretrained")
    with pytest.raises(ConfigError, match="no weights file"):
        build_model({"type": "TestLinear", "pretrained": "nowhere.pth"})
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="cannot be read"):
        build_model({"type": "TestLinear", "pretrained": str(tmp_path / "junk.pth")})
    with pytest.raises(ConfigError, match="width"):
        build_model({"type": "TestLinear", "width": "wide"})
    with pytest.raises(ConfigError, match="Did you mean"):
        build_model("resnet81")


def test_builders_of_ones_own_need_no_types_and_may_take_keywords() -> None:
    @MODELS.register()
    def plain_builder(width, depth=1, **more):  # type: ignore[no-untyped-def]
        return nn.Sequential(*(nn.Linear(width, width, **more) for _ in range(depth)))

    model = build_model({"type": "plain_builder", "width": 4, "depth": 2, "bias": False})
    assert len(model) == 2 and model[0].in_features == 4 and model[0].bias is None  # type: ignore[arg-type, index, union-attr]
    with pytest.raises(ConfigError, match="'width' is missing"):
        build_model({"type": "plain_builder"})
    with pytest.raises(ConfigError, match="wide"):
        build_model({"type": "plain_builder", "width": 4, "wide": 1})


def test_data_sets_are_named_by_registry() -> None:
    loader = build_data({"type": "random", "samples": 6, "shape": [1, 4, 4], "classes": 3, "batch_size": 4})
    sizes = [images.shape for images, _ in loader]
    assert sizes == [(4, 1, 4, 4), (2, 1, 4, 4)]
    pytest.importorskip("sklearn")
    train, test = (len(build_data({"type": "digits", "train": part}).dataset) for part in (True, False))  # type: ignore[arg-type]
    assert (train, test) == (1437, 360)
    for bad in ({"type": "digit"}, {"type": "random", "batch_size": 0}, {"type": "random", "samples": "many"}, 3):
        with pytest.raises(ConfigError):
            build_data(bad)
    assert "random" in DATASETS
