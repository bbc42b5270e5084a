"""Distillers: defaults, the loss that is minimised, what learns and what does not, and how distillers add up."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections import OrderedDict
from pathlib import Path
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
    FSPDistiller,
    IndexedDataset,
    LogitDistiller,
    OFDDistiller,
    RelationDistiller,
    RKDDistiller,
    losses,
    make_distiller,
)
from fxcompress.errors import ConfigError, DataError, TraceError
from fxcompress.options import options_of
from fxcompress.weights import load_weights

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


class Net(nn.Module):
    """Three stages of Conv-BN-ReLU, the last with a shortcut, and a classifier."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True)
        )
        self.conv, self.bn = nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(x))
        x = self.relu(self.bn(self.conv(x)) + x)
        return self.fc(x.mean((2, 3)))


LAYERS = ["stage1", "stage2"]
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 0])
INDEX = torch.arange(6)


def models() -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(8), Net(4)


MADE: dict[str, dict[str, Any]] = {
    "LogitDistiller": {},
    "DKDDistiller": {},
    "DISTDistiller": {},
    "FeatureDistiller": {"teacher_layers": LAYERS},
    "FitNetDistiller": {"teacher_layers": "stage2", "student_layers": "stage1"},
    "ATDistiller": {"teacher_layers": LAYERS},
    "FSPDistiller": {"teacher_layers": LAYERS},
    "OFDDistiller": {},
    "ReviewKDDistiller": {"teacher_layers": LAYERS},
    "RelationDistiller": {"relation_type": ["distance", "angle", "similarity"]},
    "RKDDistiller": {},
    "CRDDistiller": {"samples": 10, "num_negatives": 7, "feature_dim": 4},
    "PKTDistiller": {},
    "CCDistiller": {},
}


def made(name: str, **options: Any) -> BaseDistiller:
    teacher, student = models()
    return make_distiller({"type": name, **MADE[name], **options}, teacher=teacher, student=student)


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


# weights files


def test_a_teacher_is_read_from_a_weights_file(tmp_path: Path) -> None:
    teacher, student = models()
    trained = Net(8)
    torch.save(trained.state_dict(), tmp_path / "teacher.pth")
    torch.save({"state_dict": trained.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    for file in ("teacher.pth", "checkpoint.pth"):
        distiller = LogitDistiller(teacher, student, teacher_pretrained=tmp_path / file)
        with torch.no_grad():
            assert torch.equal(distiller.teacher(X), trained.eval()(X))


def test_weights_that_do_not_fit_are_named_one_by_one(tmp_path: Path) -> None:
    state = Net(8).state_dict()
    state["extra"] = torch.zeros(1)
    state["head.weight"] = state.pop("fc.weight")
    state["conv.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "teacher.pth")
    with pytest.raises(ConfigError) as caught:
        load_weights(Net(8), tmp_path / "teacher.pth")
    for part in ("fc.weight is missing", "extra is not in the model", "head.weight is not", "conv.bias has shape (3,)"):
        assert part in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_files_that_are_missing_or_hold_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="there is no weights file"):
        load_weights(Net(8), tmp_path / "nowhere.pth")
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_weights(Net(8), tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=r"holds more than tensors.* save model.state_dict\(\)") as caught:
        load_weights(Net(8), tmp_path / "evil.pth")
    assert "weights_only" not in str(caught.value)
    torch.save(Net(8).state_dict(), tmp_path / "flipped.pth")
    content = bytearray((tmp_path / "flipped.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    with pytest.raises(ConfigError, match="it is damaged"):
        load_weights(Net(8), tmp_path / "flipped.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(ConfigError):
        load_weights(Net(8), tmp_path / "noise.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="no tensors by name"):
        load_weights(Net(8), tmp_path / "list.pth")
    assert "executed" not in capsys.readouterr().out


# what cannot work


WRONG: Any = "mae"
NUMBERS: Any = [3]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda t, s: FeatureDistiller(t, s, ["stage1"], ["stege1"]), ConfigError, "student_layers.*Did you mean 'stage1'"),
        (lambda t, s: FeatureDistiller(t, s, ["stagee1"]), ConfigError, "teacher_layers.*Did you mean 'stage1'"),
        (lambda t, s: FeatureDistiller(t, s), ConfigError, "needs teacher_layers and student_layers"),
        (lambda t, s: FeatureDistiller(t, s, ["stage1"], LAYERS), ConfigError, "teacher_layers names 1 values"),
        (lambda t, s: FeatureDistiller(t, s, ["stage1"], ["fc"]), ConfigError, "no projector aligns a feature"),
        (
            lambda t, s: FeatureDistiller(t, s, LAYERS, loss_type=WRONG),
            ConfigError,
            "loss_type is 'mae': input",
        ),
        (
            lambda t, s: FeatureDistiller(t, s, LAYERS, projector="cnv"),
            ConfigError,
            "no projector 'cnv'. Did you mean 'conv",
        ),
        (lambda t, s: FeatureDistiller(t, s, LAYERS, projector="identity"), ConfigError, "identity cannot bring 4 channels"),
        (lambda t, s: FeatureDistiller(t, s, LAYERS, projector=["conv"]), ConfigError, "lists 1 projectors for 2"),
        (lambda t, s: ATDistiller(t, s, ["fc"]), ConfigError, "has no positions"),
        (lambda t, s: ATDistiller(t, s, LAYERS, p=0), ConfigError, "p is 0: input should be greater than or equal to 1"),
        (lambda t, s: FSPDistiller(t, s, ["stage1"]), ConfigError, "name two at least"),
        (lambda t, s: LogitDistiller(t, s, temperature=0.0), ConfigError, "temperature is 0.0"),
        (lambda t, s: LogitDistiller(t, s, distill_weight=-1.0), ConfigError, "distill_weight is -1.0"),
        (lambda t, s: LogitDistiller(t, s, temperature=WRONG), ConfigError, "temperature is 'mae': input should be a valid"),
        (lambda t, s: LogitDistiller(t, s, alpha=float("nan")), ConfigError, "alpha is nan"),
        (lambda t, s: DKDDistiller(t, s, warmup_epochs=-1), ConfigError, "warmup_epochs is -1"),
        (
            lambda t, s: FeatureDistiller(t, s, NUMBERS),
            ConfigError,
            r"teacher_layers is \[3\]: input should be a valid string",
        ),
        (lambda t, s: FeatureDistiller(t, s, LAYERS, channel_dim=5), ConfigError, "channel_dim is 5, and 'stage1'"),
        (lambda t, s: RKDDistiller(t, s, distance_weight=-1.0), ConfigError, "distance_weight is -1.0"),
        (lambda t, s: CRDDistiller(t, s, samples=9)(X, Y, torch.rand(6)), DataError, "index holds the samples' numbers"),
        (lambda t, s: CRDDistiller(t, s, samples=9)(X, Y, INDEX[:2]), DataError, "2 indices for 6 samples"),
        (lambda t, s: LogitDistiller(t, s)(X[:0], Y[:0]), DataError, "the batch holds no sample"),
        (lambda t, s: LogitDistiller(t, s)(X, Y.tolist()), DataError, "targets are a list"),
        (lambda t, s: LogitDistiller(t, s)(X, Y[:2]), DataError, r"targets are \[2\] labels.* take \[6\]"),
        (lambda t, s: LogitDistiller(t, s)(X, Y.float()), DataError, r"\[6\] probabilities \(labels are int64\)"),
        (lambda t, s: LogitDistiller(t), ConfigError, "needs teacher and student, or neither"),
        (lambda t, s: LogitDistiller(WRONG, s), ConfigError, "teacher is a str; it is a module"),
        (lambda t, s: RelationDistiller(t, s, "angels"), ConfigError, "relation_type is 'angels'"),
        (lambda t, s: RelationDistiller(t, s, {"angle": -1.0}), ConfigError, "a weight is 0 or more"),
        (lambda t, s: LogitDistiller(t, s, task_loss=WRONG), ConfigError, "it is a function"),
        (lambda t, s: LogitDistiller(t, s).set_epoch(-1), ConfigError, "epoch is -1"),
        (lambda t, s: CRDDistiller(t, s, mode="bank"), ConfigError, "samples=len"),
        (lambda t, s: CRDDistiller(t, s, momentum=1.0), ConfigError, "momentum is 1.0"),
        (lambda t, s: BaseDistiller(t, s, distillers=[LogitDistiller(t, s)]), ConfigError, "without models of their own"),
        (lambda t, s: LogitDistiller()(X), ConfigError, "has no models yet"),
        (lambda t, s: LogitDistiller(t, s).get_teacher_features(), ConfigError, "call the distiller on a batch first"),
        (lambda t, s: LogitDistiller(t, Net(4, 7))(X, Y), DataError, "the student tells 7 classes apart and the teacher 5"),
        (lambda t, s: LogitDistiller(t, s)(X, Y + 3), DataError, "label 5 is out of range"),
        (lambda t, s: BaseDistiller(t, s)(X), DataError, "nothing to learn from"),
        (lambda t, s: CRDDistiller(t, s, samples=3)(X, Y, INDEX), DataError, "index 3 is outside the memory bank of 3"),
        (lambda t, s: CRDDistiller(t, s, samples=3)(X, Y), DataError, "IndexedDataset"),
        (lambda t, s: LogitDistiller(t, s, cache_teacher="memory")(X, Y), DataError, "IndexedDataset"),
        (lambda t, s: make_distiller({"type": "LogitDistiler"}), ConfigError, "Did you mean 'LogitDistiller'"),
        (
            lambda t, s: make_distiller({"type": "LogitDistiller", "temprature": 1}),
            ConfigError,
            "Did you mean 'temperature'",
        ),
        (lambda t, s: make_distiller({"temperature": 1}), ConfigError, "a distiller has a type"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make(*models())


def test_outputs_that_hold_several_things_must_be_named() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"first": self.fc(x), "second": x}

    with pytest.raises(ConfigError, match="with first, second: say where the logits are with output=name"):
        LogitDistiller(Strange(), Strange())(torch.randn(2, 3))
    for missing in ("third", 2):
        with pytest.raises(ConfigError, match="with first, second: say where the logits are"):
            LogitDistiller(Strange(), Strange(), output=missing)(torch.randn(2, 3))
    LogitDistiller(Strange(), Strange(), output="first")(torch.randn(2, 3))


@pytest.mark.parametrize("make", [OFDDistiller, RKDDistiller, lambda: FeatureDistiller(teacher_layers="stage*.0")])
def test_models_may_be_bound_anew_and_layers_are_looked_up_in_them_anew(make: Any) -> None:
    def deep(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, *widths)):
            layers.append(nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()))
        named = {f"stage{n}": layer for n, layer in enumerate(layers)}
        return nn.Sequential(
            OrderedDict(named, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(widths[-1], 5))
        )

    distiller = make().register_hooks(deep(8, 8, 8), deep(4, 4, 4))
    distiller(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    rebound, fresh = distiller.register_hooks(deep(6, 6), deep(3, 3)), make().register_hooks(deep(6, 6), deep(3, 3))
    rebound(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    assert rebound.layout() == fresh.layout()


def test_a_layer_inside_code_that_was_not_traced_is_refused() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.sum()) < 1e9 else x

    model = nn.Sequential(OrderedDict(island=Stubborn(), fc=nn.Linear(3, 2)))
    with pytest.raises(TraceError, match=r"teacher_layers: 'island.inner' cannot be tapped"):
        FeatureDistiller(model, model, ["island.inner"])
    distiller = FeatureDistiller(model, model, ["island"])
    distiller(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))


# what is remembered


def test_an_indexed_dataset_numbers_its_samples() -> None:
    data = IndexedDataset([(X[i], int(Y[i])) for i in range(6)])
    assert len(data) == 6 and data[3][2] == 3 and torch.equal(data[3][0], X[3])
    batch = next(iter(torch.utils.data.DataLoader(data, 4)))
    assert batch[2].tolist() == [0, 1, 2, 3]
    assert IndexedDataset([{"x": 1}])[0] == {"x": 1, "index": 0}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(8)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        return self.net(x)


CALLS: list[int] = []


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_cached_teacher_answers_every_sample_once(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, student = Counting().eval(), Net(4)
    where = "memory" if place == "memory" else str(tmp_path / "cache")
    distiller = LogitDistiller(teacher, student, cache_teacher=where)
    plain = LogitDistiller(teacher, student)
    CALLS.clear()
    for batch in ([0, 1, 2], [3, 4, 5], [5, 0, 3], [4, 4, 1]):
        index = torch.tensor(batch)
        found = distiller(X[index], Y[index], index)[1]
        assert torch.allclose(found["kd"], plain(X[index], Y[index])[1]["kd"], rtol=1e-4)
    assert sum(CALLS) == 6 + 12
    if place == "disk":
        CALLS.clear()
        again = LogitDistiller(teacher, student, cache_teacher=where)
        assert torch.allclose(again(X, Y, INDEX)[1]["kd"], plain(X, Y)[1]["kd"], rtol=1e-4)
        assert sum(CALLS) == 6
        with pytest.raises(ConfigError, match="another teacher's answers"):
            LogitDistiller(Net(8), student, cache_teacher=where)
        (tmp_path / "cache" / "cache.json").write_text("{")
        with pytest.raises(ConfigError, match="is damaged"):
            LogitDistiller(teacher, student, cache_teacher=where)


def test_cached_features_are_the_teachers() -> None:
    teacher, student = models()
    cached = FeatureDistiller(teacher, student, LAYERS, cache_teacher="memory").eval()
    first = cached(X, Y, INDEX)[1]
    second = cached(X.flip(0), Y.flip(0), INDEX.flip(0))[1]
    assert torch.allclose(first["feature"], second["feature"], rtol=1e-5)


def test_a_cached_teacher_refuses_other_inputs_than_it_saw() -> None:
    distiller = made("LogitDistiller", cache_teacher="memory")
    distiller(X, Y, INDEX)
    distiller(X, Y, INDEX)
    flipped = X.clone()
    flipped[2] = X[2].flip(-1)
    with pytest.raises(DataError, match="sample 2 is not what the teacher saw"):
        distiller(flipped, Y, INDEX)


def test_the_bank_moves_towards_new_embeddings_and_the_last_of_equal_samples_counts() -> None:
    distiller = made("CRDDistiller", momentum=0.5)
    assert isinstance(distiller, CRDDistiller)
    bank: Any = distiller.memory
    before = bank.student.clone()
    index = torch.tensor([0, 3, 3, 7, 9, 3])
    distiller(X, Y, index)
    embedded = F.normalize(distiller.student_head(distiller.get_student_features()[str(distiller.student_layer)]))
    expected = before.clone()
    for place, row in ((0, 0), (7, 3), (9, 4), (3, 5)):
        expected[place] = F.normalize(0.5 * before[place] + 0.5 * embedded[row], dim=0)
    assert torch.allclose(bank.student, expected.detach(), atol=1e-6)
    assert bank.labels.tolist() == [0, -1, -1, 0, -1, -1, -1, 3, -1, 4]


def test_the_bank_loss_is_the_papers() -> None:
    """Both directions, against a bank, with the partition estimated on the first batch; everything by hand in float64."""
    distiller = made("CRDDistiller", same_class=True)
    assert isinstance(distiller, CRDDistiller)
    bank: Any = distiller.memory
    memory = {"s": bank.student.double().clone(), "t": bank.teacher.double().clone()}
    drawn = torch.randint(10, (7,), generator=torch.Generator().manual_seed(0))
    _, terms = distiller(X, Y, INDEX)
    s, t = distiller.embeddings(distiller._features())
    anchors = {
        "t": F.normalize(distiller.student_head(s)).double(),
        "s": F.normalize(distiller.teacher_head(t)).double(),
    }
    expected = 0.0
    for side, anchor in anchors.items():
        scores = [
            [float(torch.exp(a @ memory[side][j] / 0.07).detach()) for j in (i, *drawn.tolist())]
            for i, a in enumerate(anchor)
        ]
        scale = sum(map(sum, scores)) / (6 * 8) * 10
        for i, row in enumerate(scores):
            h = [v / scale / (v / scale + 7 / 10 + 1e-7) for v in row]
            expected -= float(torch.tensor(h[0]).double().log()) / 6
            misses = [
                float(torch.tensor(0.7 / (v / scale + 0.7 + 1e-7)).double().log())
                for v, j in zip(row[1:], drawn.tolist(), strict=True)
                if j != i
            ]
            expected -= sum(misses) / 6
    assert float(terms["crd"].detach()) == pytest.approx(expected, rel=1e-4)


def test_a_bank_is_reproducible_and_resumes() -> None:
    def run(steps: int, state: Any = None) -> tuple[list[float], Any]:
        distiller = made("CRDDistiller", seed=5)
        if state is not None:
            distiller.load_state_dict(state)
        values = [float(distiller(X, Y, INDEX)[1]["crd"].detach()) for _ in range(steps)]
        return values, {key: value.clone() for key, value in distiller.state_dict().items()}

    whole, _ = run(4)
    first, state = run(2)
    rest, _ = run(2, state)
    assert whole == first + rest == run(4)[0]


def test_a_queue_holds_the_last_samples() -> None:
    distiller = made("CRDDistiller", samples=None, num_negatives=8)
    assert isinstance(distiller, CRDDistiller)
    queue: Any = distiller.memory
    distiller(X, Y)
    assert queue.labels.tolist() == [0, 1, 2, 3, 4, 0, -1, -1]
    distiller(X, Y)
    assert queue.labels.tolist() == [2, 3, 4, 0, 4, 0, 0, 1]


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
