"""Distillers: defaults, the loss that is minimised, what learns and what does not, and how distillers add up."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, distillation
from fxcompress.distillation import (
    DISTILLERS,
    ATDistiller,
    BaseDistiller,
    CRDDistiller,
    DISTDistiller,
    DKDDistiller,
    FeatureDistiller,
    LogitDistiller,
    OFDDistiller,
    losses,
    make_distiller,
)
from fxcompress.errors import ConfigError, DataError
from fxcompress.options import options_of
from tests.distilled import INDEX, LAYERS, MADE, X, Y, made, models

DEFAULTS: dict[str, dict[str, Any]] = {
    "BaseDistiller": {"freeze_teacher": True, "distill_weight": 1.0, "task_weight": 1.0},
    "LogitDistiller": {"temperature": 4.0, "alpha": 0.5, "beta": 0.5},
    "DKDDistiller": {"temperature": 4.0, "alpha": 1.0, "beta": 8.0, "warmup_epochs": 20},
    "DISTDistiller": {},
    "FeatureDistiller": {"loss_type": "mse", "projector": None, "normalize": False},
    "FitNetDistiller": {},
    "ATDistiller": {"p": 2, "normalize": True},
    "FSPDistiller": {},
    "OFDDistiller": {},
    "ReviewKDDistiller": {},
    "RelationDistiller": {},
    "RKDDistiller": {"distance_weight": 25.0, "angle_weight": 50.0},
    "CRDDistiller": {"feature_dim": 128, "num_negatives": 16384, "temperature": 0.07, "momentum": 0.5},
    "PKTDistiller": {},
    "CCDistiller": {},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_parameters_and_defaults_are_the_documented_ones(name: str) -> None:
    options = options_of(DISTILLERS[name])
    for key, value in {**DEFAULTS["BaseDistiller"], **DEFAULTS[name]}.items():
        assert options[key].default == value
    assert "teacher_pretrained" in options
    assert list(inspect.signature(DISTILLERS[name]).parameters)[:2] == ["teacher", "student"]
    assert getattr(distillation, name) is DISTILLERS[name]
    for method in ("register_hooks", "forward", "compute_distill_loss", "get_teacher_features", "get_student_features"):
        assert inspect.isfunction(getattr(DISTILLERS[name], method))


@pytest.mark.parametrize("name", MADE)
def test_the_total_is_task_and_distillation_weighted(name: str) -> None:
    distiller = made(name, distill_weight=3.0, task_weight=0.25)
    output, terms = distiller(X, Y, INDEX)
    task = F.cross_entropy(output, Y) * (0.5 if name == "LogitDistiller" else 1.0)
    expected = 0.25 * task + 3.0 * distiller.compute_distill_loss()
    total = torch.stack(list(terms.values())).sum()
    assert torch.allclose(total, expected, rtol=1e-5)
    assert torch.allclose(terms["task"], 0.25 * task)
    assert set(terms) > {"task"} and all(value.shape == () and bool(value.isfinite()) for value in terms.values())


@pytest.mark.parametrize("name", MADE)
def test_the_student_and_projectors_learn_and_nothing_else_moves(name: str) -> None:
    teacher, student = models()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (teacher, student)]
    modes = [m.training for m in (teacher, student)]
    distiller = make_distiller({"type": name, **MADE[name]}, teacher=teacher, student=student)
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), 0.05)
    started = {k: v.clone() for k, v in distiller.named_parameters()}
    for _ in range(2):
        _, terms = distiller(X, Y, INDEX)
        torch.stack(list(terms.values())).sum().backward()
        unmoved = [k for k, p in distiller.named_parameters() if p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
    assert not unmoved
    assert all(not torch.equal(p, started[k]) for k, p in distiller.named_parameters() if "bias" not in k and "bn" not in k)
    for model, state, mode in zip((teacher, student), before, modes, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and model.training == mode
    assert not any(m.training for m in distiller.teacher.modules())
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    held = {id(p) for p in distiller.parameters()}
    assert not held & {id(p) for p in distiller.teacher.parameters()}
    assert not any("teacher." in key and "memory" not in key for key in distiller.state_dict())
    trained = distiller.student_model()
    assert set(trained.state_dict()) == set(student.state_dict())
    with torch.no_grad():
        assert torch.equal(trained.eval()(X), distiller.student.eval()(X))


@pytest.mark.parametrize("name", MADE)
def test_distillers_copy_pickle_and_take_up_their_state(name: str) -> None:
    distiller = made(name)
    distiller(X, Y, INDEX)
    twin = copy.deepcopy(distiller)
    again = pickle.loads(pickle.dumps(distiller))
    fresh = made(name)
    fresh.load_state_dict(distiller.state_dict())
    values = [d(X, Y, INDEX)[1] for d in (distiller, twin, again, fresh)]
    assert all(torch.equal(values[0][key], other[key]) for other in values[1:] for key in values[0])


@pytest.mark.parametrize("name", MADE)
def test_half_precision_autocast_gives_finite_losses_and_gradients(name: str) -> None:
    distiller = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        _, terms = distiller(X, Y, INDEX)
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in distiller.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MADE)
def test_a_last_batch_of_one_is_finite(name: str) -> None:
    distiller = made(name).eval()
    _, terms = distiller(X[:1], Y[:1], INDEX[:1])
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(v.isfinite()) for v in terms.values())
    assert all(bool(p.grad.isfinite().all()) for p in distiller.parameters() if p.grad is not None)


def reference(name: str) -> dict[str, Tensor]:
    """Outputs and features of both models by hand, as the distillers must see them."""
    teacher, student = models()
    found: dict[str, Tensor] = {}
    for who, model in (("t", teacher.eval()), ("s", student)):
        h1 = model.stage1(X)
        h2 = model.stage2(h1)
        out = model.relu(model.bn(model.conv(h2)) + h2)
        found |= {f"{who}1": h1, f"{who}2": h2, f"{who}e": out.mean((2, 3)), f"{who}z": model.fc(out.mean((2, 3)))}
    return found


def test_losses_get_the_right_tensors() -> None:
    r = reference("")
    z, e = (r["sz"], r["tz"]), (r["se"], r["te"])
    expected = {
        "LogitDistiller": 0.5 * losses.kd_loss(*z),
        "DKDDistiller": losses.dkd_loss(*z, Y) / 20,
        "DISTDistiller": losses.dist_loss(*z),
        "ATDistiller": losses.attention_transfer_loss([r["s1"], r["s2"]], [r["t1"], r["t2"]]),
        "RKDDistiller": 25 * losses.distance_loss(*e) + 50 * losses.angle_loss(*e),
        "RelationDistiller": losses.distance_loss(*e) + losses.angle_loss(*e) + losses.similarity_loss(*e),
        "PKTDistiller": losses.pkt_loss(*e),
        "CCDistiller": losses.correlation_congruence_loss(*e),
    }
    for name, value in expected.items():
        distiller = made(name)
        distiller(X, Y, INDEX)
        assert torch.allclose(distiller.compute_distill_loss(), value, rtol=1e-4), name


def test_projection_comes_before_interpolation() -> None:
    teacher, student = models()
    distiller = FeatureDistiller(teacher, student, "stage1", "stage2")
    distiller(X, Y)
    s, t = distiller.get_student_features()["stage2"], distiller.get_teacher_features()["stage1"]
    assert s.shape[1:] == (8, 4, 4) and t.shape[1:] == (8, 8, 8)
    resized = F.interpolate(s, (8, 8), mode="bilinear", align_corners=False)
    assert torch.allclose(distiller.compute_distill_loss(), F.mse_loss(resized, t))
    projected = FeatureDistiller(teacher, student, "stage2", "stage1", projector={"type": "conv", "bias": True})
    projected(X, Y)
    s, t = projected.get_student_features()["stage1"], projected.get_teacher_features()["stage2"]
    layer: Any = projected.projectors[0]
    by_hand = F.interpolate(F.conv2d(s, layer.weight, layer.bias), (4, 4), mode="bilinear", align_corners=False)
    assert torch.allclose(projected.compute_distill_loss(), F.mse_loss(by_hand, t))
    assert "stage2" in projected.layout() and "Conv2d 4 → 16, interpolation" in projected.layout()


def test_the_warm_up_counts_epochs_from_one() -> None:
    distiller = made("DKDDistiller", warmup_epochs=4).eval()
    values = []
    for epoch in range(6):
        distiller.set_epoch(epoch)
        distiller(X, Y)
        values.append(float(distiller.compute_distill_loss().detach()))
    assert [v / values[-1] for v in values] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_distillers_add_up() -> None:
    teacher, student = models()
    parts = [LogitDistiller(alpha=1.0, distill_weight=0.5), ATDistiller(teacher_layers=LAYERS, distill_weight=100.0)]
    both = BaseDistiller(teacher, student, distillers=parts, distill_weight=2.0)
    output, terms = both(X, Y)
    assert set(terms) == {"task", "kd", "attention"}
    single = {name: made(name) for name in ("LogitDistiller", "ATDistiller")}
    for distiller in single.values():
        distiller(X, Y)
    assert torch.allclose(terms["kd"], 2 * 0.5 * 2 * single["LogitDistiller"].compute_distill_loss(), rtol=1e-5)
    assert torch.allclose(terms["attention"], 2 * 100 * single["ATDistiller"].compute_distill_loss(), rtol=1e-5)
    assert torch.allclose(terms["task"], F.cross_entropy(output, Y))


def test_a_logit_distiller_joins_a_feature_distiller() -> None:
    teacher, student = models()
    distiller = FeatureDistiller(teacher, student, LAYERS, LAYERS, logit_distill={"temperature": 2.0, "alpha": 0.7})
    output, terms = distiller(X, Y)
    assert set(terms) == {"task", "feature", "kd"}
    with torch.no_grad():
        expected = 0.7 * losses.kd_loss(output, distiller.teacher(X), 2.0)
    assert torch.allclose(terms["kd"], expected)
    with pytest.raises(ConfigError, match="task_weight"):
        FeatureDistiller(teacher_layers=LAYERS, logit_distill={"beta": 0.5})


def test_a_list_in_a_configuration_adds_up() -> None:
    teacher, student = models()
    config: list[dict[str, Any]] = [{"type": "DKDDistiller"}, {"type": "RKDDistiller", "distill_weight": 0.1}]
    distiller = make_distiller(config, teacher=teacher, student=student)
    assert set(distiller(X, Y)[1]) == {"task", "dkd", "distance", "angle"}


def test_a_teacher_that_is_not_frozen_learns_the_task() -> None:
    distiller = made("LogitDistiller", freeze_teacher=False)
    _, terms = distiller(X, Y)
    assert set(terms) == {"task", "teacher_task", "kd"}
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None for p in distiller.teacher.parameters())
    assert {id(p) for p in distiller.teacher.parameters()} <= {id(p) for p in distiller.parameters()}


def test_without_targets_only_the_teacher_is_followed() -> None:
    assert set(made("LogitDistiller")(X)[1]) == {"kd"}
    with pytest.raises(DataError, match="no targets"):
        made("DKDDistiller")(X)


def test_a_student_may_learn_from_itself_before_folding_and_pruning() -> None:
    teacher, _ = models()
    teacher.eval()
    folded = PassManager(["fold-batchnorm"], reproducer=False).run(teacher, X)
    distiller = FeatureDistiller(teacher, folded, ["stage1", "stage2:preactivation", "fc"], example_inputs=X)
    distiller(X, Y)
    assert float(distiller.compute_distill_loss().detach()) < 1e-8


def test_layers_are_found_by_pattern() -> None:
    teacher, student = models()
    distiller = ATDistiller(teacher, student, ["stage*"])
    distiller(X, Y)
    assert list(distiller.get_teacher_features()) == ["stage1", "stage2"]


def test_overhaul_finds_what_enters_the_last_activations_and_its_margins() -> None:
    teacher, student = models()
    norm = teacher.stage1[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.bias.uniform_(-1, 1)
        norm.weight.uniform_(-1, 1)
        norm.weight[0] = 0.0
    distiller = OFDDistiller(teacher, student)
    assert [row.teacher for row in distiller.rows] == ["stage1_1", "add"]
    distiller(X, Y)
    values = distiller.get_teacher_features()
    assert all(float(value.min()) < 0 for value in values.values())
    expected = losses.ofd_margin(norm.bias.detach(), norm.weight.detach())
    assert torch.allclose(distiller.get_buffer("margin_0").double(), expected, rtol=1e-5)
    named = OFDDistiller(teacher, student, ["stage1", "relu"])
    assert [row.teacher for row in named.rows] == ["stage1:preactivation", "relu:preactivation"]


def test_overhaul_takes_a_batchnorm_by_name_for_its_own_result() -> None:
    teacher, student = models()
    norm = teacher.stage1[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.bias.uniform_(-1, 1)
    by_norm, by_stage = (OFDDistiller(teacher, student, [name]) for name in ("stage1.1", "stage1"))
    for distiller in (by_norm, by_stage):
        distiller(X, Y)
    values = [next(iter(distiller.get_teacher_features().values())) for distiller in (by_norm, by_stage)]
    assert torch.equal(*values) and float(values[0].min()) < 0
    assert torch.equal(by_norm.get_buffer("margin_0"), by_stage.get_buffer("margin_0"))
    with pytest.raises(ConfigError, match="which is no activation, normalisation or addition"):
        OFDDistiller(teacher, student, ["stage1.0"])


def test_overhaul_measures_margins_where_the_teacher_has_no_batchnorm() -> None:
    teacher, student = models()
    folded = PassManager(["fold-batchnorm"], reproducer=False).run(teacher.eval(), X)
    distiller = OFDDistiller(folded, student, ["stage1", "stage2"], example_inputs=X)
    assert bool(distiller.get_buffer("margin_0").isnan().all())
    distiller(X, Y)
    value = distiller.get_teacher_features()["stage1:preactivation"]
    expected = torch.stack([c[c < 0].mean() for c in value.movedim(1, 0).flatten(1)])
    assert torch.allclose(distiller.get_buffer("margin_0"), expected, rtol=1e-5)


class Segmenter(nn.Module):
    """Returns a dict, as torchvision's segmentation models do."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.backbone = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, width, 3, stride, 1), relu=nn.ReLU()))
        self.head, self.aux = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        f = self.backbone(x)
        return OrderedDict(out=self.head(f), aux=self.aux(f))


def test_dense_outputs_are_distilled_per_position() -> None:
    torch.manual_seed(0)
    teacher, student = Segmenter(8), Segmenter(4)
    targets = torch.randint(4, (6, 8, 8))
    targets[0] = 255
    parts = [LogitDistiller(alpha=1.0), DKDDistiller(warmup_epochs=0), DISTDistiller(), CRDDistiller(mode="batch")]
    parts += [FeatureDistiller(teacher_layers="backbone", loss_type="kl")]
    distiller = BaseDistiller(teacher, student, distillers=parts, ignore_index=255)
    output, terms = distiller(X, targets)
    assert set(output) == {"out", "aux"}
    with torch.no_grad():
        logits = teacher(X)["out"]
    assert torch.allclose(terms["kd"], losses.kd_loss(output["out"], logits), rtol=1e-5)
    assert torch.allclose(terms["task"], F.cross_entropy(output["out"], targets, ignore_index=255), rtol=1e-5)
    assert torch.allclose(terms["dkd"], losses.dkd_loss(output["out"], logits, targets, ignore_index=255), rtol=1e-5)
    half = LogitDistiller(teacher, Segmenter(4, stride=2), task_weight=0.0)
    assert half(X, targets)[0]["out"].shape[2:] == (4, 4)
    aux = LogitDistiller(teacher, student, output="aux")
    assert torch.allclose(aux(X)[1]["kd"], 0.5 * losses.kd_loss(student(X)["aux"], teacher(X)["aux"]), rtol=1e-5)


def test_keywords_and_dicts_reach_both_models() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
            return self.layer(a + b)

    distiller = LogitDistiller(Two(), Two())
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    first = distiller(a=a, b=b, targets=torch.zeros(5, dtype=torch.long))[1]
    second = distiller({"a": a, "b": b}, torch.zeros(5, dtype=torch.long))[1]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_training_lowers_every_distillation_loss() -> None:
    for name in MADE:
        teacher, student = models()
        with torch.no_grad():
            teacher.fc.weight *= 30
        config = {"type": name, **MADE[name], "task_weight": 0.0}
        distiller = make_distiller(config, teacher=teacher, student=student).train()
        optimizer = torch.optim.Adam(distiller.parameters(), 1e-2)
        values = []
        for _ in range(25):
            _, terms = distiller(X, Y, INDEX)
            total = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            values.append(float(distiller.compute_distill_loss().detach()))
        assert min(values[-5:]) < values[0], name


def test_pyramids_of_a_detector_backbone_are_distilled() -> None:
    pytest.importorskip("torchvision")
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    def backbone(name: str) -> nn.Module:
        return resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=5)

    layers = ["fpn.layer_blocks.*"]
    teacher, student = backbone("resnet34"), backbone("resnet18")
    distiller = FeatureDistiller(teacher, student, layers, task_weight=0.0, loss_type="cosine")
    output, terms = distiller(torch.randn(2, 3, 64, 64))
    assert list(output) == ["0", "1", "2", "3", "pool"] and len(distiller.get_teacher_features()) == 4
    terms["feature"].backward()
