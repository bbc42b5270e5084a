"""distill and keep-teacher: distillation as a step of a plan, as a component, and from the example configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import PassManager, Plan, build_compression_pipeline, build_distiller
from fxcompress.distillation import CRDDistiller, FeatureDistiller, IndexedDataset, LogitDistiller
from fxcompress.errors import ConfigError, PlanError
from fxcompress.models import MODELS

CONFIGS = Path(__file__).parent / "configs"


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def net(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net(width).eval()


def sharp(model: nn.Module) -> nn.Module:
    """``model`` with surer predictions."""
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(20)
    return model


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 8, 8, generator=generator)
    return list(zip(images.split(8), (images.mean((1, 2, 3)) > 0).long().split(8), strict=True))


X = data()[0][0]


def distance(a: nn.Module, b: nn.Module) -> float:
    with torch.no_grad():
        return float((a.eval()(X).softmax(1) - b.eval()(X).softmax(1)).square().mean())


def test_a_step_brings_the_student_to_its_teacher_and_leaves_both_models_alone() -> None:
    teacher, student = sharp(net(8, 1)), net(4)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    options = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
    plan: list[Any] = [{"distill": {"type": "LogitDistiller", "options": options, "epochs": 15, "lr": 0.01}}]
    manager = PassManager(plan, reproducer=False, progress=False)
    result = manager.run(student, data=data(), teacher=teacher)
    assert distance(result, teacher) < 0.5 * distance(student, teacher)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert set(result.state_dict()) == set(before) and not result.training
    assert any("15 epochs" in remark.reason for remark in manager.ledger.remarks("distill"))


def test_without_a_teacher_the_model_as_it_came_is_the_teacher() -> None:
    """Pruned channels learn from the whole model by the same names."""
    student = sharp(net(16))
    options = {"teacher_layers": ["stem", "body"], "task_weight": 0.0, "logit_distill": {"alpha": 1.0}}
    prune: dict[str, Any] = {"prune-channels": {"sparsity": 0.5, "round_to": 1}}
    distill = {"distill": {"type": "FeatureDistiller", "options": options, "epochs": 8, "lr": 0.01}}
    pruned = PassManager([prune], reproducer=False).run(student, data=data())
    manager = PassManager([prune, distill], reproducer=False, progress=False)
    learned = manager.run(student, data=data())
    assert sum(p.numel() for p in learned.parameters()) == sum(p.numel() for p in pruned.parameters())
    assert distance(learned, student) < distance(pruned, student)
    follows = [
        r.reason for r in manager.ledger.remarks("distill") if "follows the teacher's stem: Conv2d 8 → 16" in r.reason
    ]
    assert follows


def test_taps_hold_through_channel_pruning() -> None:
    plan: list[Any] = [
        {"insert-taps": {"layers": ["stem", "body:preactivation", "body"]}},
        {"prune-channels": {"sparsity": 0.5, "round_to": 1}},
    ]
    from fxcompress.graph import features

    pruned = PassManager(plan, reproducer=False).run(net(16), data=data())
    with torch.no_grad():
        output, values = features(pruned)(X)
        by_hand = X
        for layer in ("stem.0", "stem.1", "stem.2"):
            by_hand = pruned.get_submodule(layer)(by_hand)
        assert torch.equal(output, pruned(X))
    assert {name: value.shape[1] for name, value in values.items()} == {"stem": 8, "body:preactivation": 8, "body": 8}
    assert torch.equal(values["stem"], by_hand)
    assert torch.equal(values["body:preactivation"].relu(), values["body"])


def test_a_kept_teacher_is_the_model_at_that_step() -> None:
    plan: list[Any] = [
        {"train": {"epochs": 2, "lr": 0.05}},
        "keep-teacher",
        {"prune-channels": {"sparsity": 0.5, "round_to": 1}},
        {"distill": {"type": "LogitDistiller", "options": {"alpha": 1.0, "beta": 0.0}, "epochs": 10, "lr": 0.01}},
    ]
    student = sharp(net(16))
    whole = PassManager(plan[:1], reproducer=False, progress=False).run(student, data=data())
    pruned = PassManager(plan[:3], reproducer=False, progress=False).run(student, data=data())
    learned = PassManager(plan, reproducer=False, progress=False).run(student, data=data())
    assert distance(learned, whole) < distance(pruned, whole)


def test_an_interrupted_run_takes_up_the_kept_teacher(tmp_path: Path) -> None:
    plan: list[Any] = [
        "keep-teacher",
        {"train": {"epochs": 1, "lr": 0.05}},
        {"distill": {"type": "LogitDistiller", "options": {"beta": 0.0}, "epochs": 2}},
    ]
    options: dict[str, Any] = {"reproducer": False, "progress": False}
    expected = PassManager(plan, **options).run(net(4), data=data())

    class StopError(Exception):
        pass

    calls = 0

    class Data(list[Any]):
        def __iter__(self) -> Any:
            nonlocal calls
            for batch in list.__iter__(self):
                calls += 1
                if calls == 12:
                    raise StopError
                yield batch

    with pytest.raises(Exception):  # noqa: B017
        PassManager(plan, **options).run(net(4), X, Data(data()), keep=tmp_path / "run")
    again = PassManager(plan, **options).run(net(4), X, data(), keep=tmp_path / "run", resume=True)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in again.state_dict().items())


def test_a_crd_step_takes_the_index_from_the_data() -> None:
    images, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    dataset = IndexedDataset(torch.utils.data.TensorDataset(images, labels))
    loader = torch.utils.data.DataLoader(dataset, 8, shuffle=True)
    options = {"samples": 32, "num_negatives": 16, "feature_dim": 8}
    plan: list[Any] = [{"distill": {"type": "CRDDistiller", "options": options, "epochs": 2}}]
    trained = PassManager(plan, reproducer=False, progress=False).run(net(4), X, loader, teacher=net(8, 1))
    before = net(4).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(bool(value.isfinite().all()) for value in trained.state_dict().values())


def test_masked_weights_stay_zero_while_distilling() -> None:
    plan: list[Any] = [
        {"mask-weights": {"sparsity": 0.6}},
        "bake-masks",
        {"distill": {"epochs": 2, "keep_zeros": True}},
    ]
    manager = PassManager(plan, reproducer=False, progress=False)
    manager.run(net(8), data=data())
    assert manager.ledger.rows[-1].sparsity == pytest.approx(manager.ledger.rows[-2].sparsity)


@pytest.mark.parametrize(
    ("step", "match"),
    [
        ({"type": "LogitDistiler"}, "Did you mean 'LogitDistiller'"),
        ({"options": {"temprature": 2.0}}, "Did you mean 'temperature'"),
        ({"type": "FeatureDistiller"}, "needs teacher_layers and student_layers"),
        ({"options": {"temperature": -1.0}}, "temperature: -1.0 cannot be meant: input should be greater than 0"),
        ({"loss": "mae"}, "no loss 'mae'"),
        ({"loss_options": {"reduction": "sum"}}, "there is no loss"),
        ({"epoch": 2}, "Did you mean 'epochs'"),
    ],
)
def test_a_step_is_checked_before_any_work(step: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        Plan.parse([{"distill": step}])


def test_a_plan_with_distillation_reads_back() -> None:
    step = {
        "type": "FeatureDistiller",
        "options": {"teacher_layers": ["a", "b"], "logit_distill": {"alpha": 0.5}},
        "epochs": 3,
    }
    plan = Plan.parse(["keep-teacher", {"distill": step}])
    assert Plan.parse(str(plan)) == plan


def test_distillers_are_built_from_a_configuration() -> None:
    def little(width: int = 4) -> nn.Module:
        return net(width)

    MODELS.register("Little")(little)
    try:
        config: dict[str, Any] = {"type": "FeatureDistiller", "teacher_layers": ["stem"], "student_layers": ["body"]}
        config |= {"teacher": {"type": "Little", "width": 8}, "student": {"type": "Little"}}
        config |= {"logit_distill": {"temperature": 4.0, "alpha": 0.5}, "projector": {"type": "mlp", "hidden": 6}}
        distiller = build_distiller({"compression": config})
        assert isinstance(distiller, FeatureDistiller)
        assert set(distiller(X, data()[0][1])[1]) == {"task", "feature", "kd"}
        crd = build_distiller({"type": "CRDDistiller", "samples": 9}, net(8), net(4))
        assert isinstance(crd, CRDDistiller) and crd.samples == 9
        both = {"type": "BaseDistiller", "distillers": [{"type": "DKDDistiller"}, {"type": "RKDDistiller"}]}
        assert len(build_distiller(both, net(8), net(4)).members) == 2
        with pytest.raises(ConfigError, match="teacher"):
            build_distiller({"type": "LogitDistiller"}, student=net(4))
    finally:
        del MODELS._entries["Little"]


def test_a_pipeline_distils_then_prunes_then_quantizes() -> None:
    config = {
        "pipeline": [
            {"type": "LogitDistiller", "temperature": 4.0, "epochs": 1},
            {"type": "StructuredPruner", "sparsity": 0.5, "finetune_epochs": 1, "round_to": 1},
            {"type": "PTQQuantizer", "dtype": "int8"},
        ]
    }
    pipeline = build_compression_pipeline(config, net(16))
    result = pipeline.run(data=data(), teacher=net(8, 1), verify=True, reproducer=False, progress=False)
    assert result.meta["stage"] == "lowered"
    assert "distill" in [row.step for row in pipeline.ledger.rows]


def test_models_of_a_configuration_that_give_way_to_given_ones_are_said(caplog: pytest.LogCaptureFixture) -> None:
    config = {"type": "LogitDistiller", "teacher": {"type": "resnet101"}, "student": "resnet18"}
    teacher, student = net(8), net(4)
    distiller = build_distiller({"compression": config}, teacher, student)
    assert distiller.student.get_parameter("head.weight").shape == student.get_parameter("head.weight").shape
    assert "compression.teacher: 'resnet101' is not built" in caplog.text
    assert "compression.student: 'resnet18' is not built" in caplog.text
    caplog.clear()
    build_compression_pipeline({"model": "resnet18", "compression": {"type": "PTQQuantizer"}}, net(4))
    assert "model: 'resnet18' is not built" in caplog.text
    with pytest.raises(ConfigError, match="student"):
        build_distiller({"type": "LogitDistiller", "student": 3}, teacher, student)


def test_the_distillation_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision.models.resnet101(weights=None).state_dict(), "resnet101.pth")
    distiller = build_distiller(CONFIGS / "distillation.yaml")
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    output, terms = distiller(images, labels)
    assert output.shape == (2, 1000) and set(terms) == {"task", "feature", "kd"}
    assert LogitDistiller().alpha == distiller.members[0].alpha == 0.5
