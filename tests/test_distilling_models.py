"""Distillers on models of every kind: sequences, volumes, tokens, half precision, compiled, without values, half frozen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.distillation import (
    DISTILLERS,
    ATDistiller,
    BaseDistiller,
    FeatureDistiller,
    FSPDistiller,
    LogitDistiller,
    RKDDistiller,
    distiller,
    losses,
    make_distiller,
)
from fxcompress.distillation.step import Step
from fxcompress.errors import ConfigError
from fxcompress.training import Recipe, train

CONVS: Any = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS: Any = (None, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Plain(nn.Module):
    """Two stages of Conv-BN-ReLU over any number of dimensions, and a classifier."""

    def __init__(self, width: int, dims: int = 2, stride: int = 2) -> None:
        super().__init__()
        widths = ((2, width, 1), (width, 2 * width, stride))
        stages = [nn.Sequential(CONVS[dims](i, o, 3, s, 1), NORMS[dims](o), nn.ReLU(inplace=True)) for i, o, s in widths]
        self.stage1, self.stage2 = stages
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage2(self.stage1(x)).flatten(2).mean(2))


class Mixer(nn.Module):
    """Tokens (B, N, C) through linear layers and norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.block1, self.block2 = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2))
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.block1(x)
        return self.fc((x + self.block2(x)).mean(1))


STAGES = ["stage1", "stage2"]
SIZES = {1: (20,), 2: (6, 10), 3: (4, 6, 8)}
Y = torch.tensor([0, 1, 2, 3])
MADE: dict[str, dict[str, Any]] = {
    "LogitDistiller": {},
    "DKDDistiller": {},
    "DISTDistiller": {},
    "FeatureDistiller": {"teacher_layers": STAGES},
    "FitNetDistiller": {"teacher_layers": STAGES},
    "ATDistiller": {"teacher_layers": STAGES},
    "FSPDistiller": {"teacher_layers": STAGES},
    "OFDDistiller": {},
    "ReviewKDDistiller": {"teacher_layers": STAGES},
    "RelationDistiller": {},
    "RKDDistiller": {},
    "CRDDistiller": {"mode": "queue", "num_negatives": 8, "feature_dim": 4},
    "PKTDistiller": {},
    "CCDistiller": {},
}


def images(dims: int = 2) -> Tensor:
    return torch.randn(4, 2, *SIZES[dims], generator=torch.Generator().manual_seed(dims))


def pair(dims: int = 2) -> tuple[Plain, Plain]:
    torch.manual_seed(0)
    return Plain(8, dims, stride=1), Plain(4, dims)


def learned(distiller: BaseDistiller, *batch: Any) -> dict[str, Tensor]:
    """The losses of a batch, after a backward pass that reached every parameter with finite gradients."""
    _, terms = distiller(*batch)
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(value.isfinite()) for value in terms.values())
    for name, p in distiller.named_parameters():
        assert not p.requires_grad or (p.grad is not None and bool(p.grad.isfinite().all())), name
    return terms


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_models_over_any_number_of_dimensions_and_of_other_strides(name: str, dims: int) -> None:
    teacher, student = pair(dims)
    config = {"type": name, **MADE[name]}
    if name == "ReviewKDDistiller" and dims == 3:
        with pytest.raises(ConfigError, match="ReviewKD takes maps"):
            make_distiller(config, teacher=teacher, student=student, example_inputs=images(dims))
        return
    learned(make_distiller(config, teacher=teacher, student=student, example_inputs=images(dims)), images(dims), Y)


def test_channels_of_sequences_and_of_tokens_are_told_apart() -> None:
    """(B, C, L) of a convolution and (B, N, C) of a linear layer look alike; the layers around them do not."""
    teacher, student = pair(1)
    sequences = FeatureDistiller(teacher, student, STAGES, example_inputs=images(1))
    terms = learned(sequences, images(1), Y)
    s, t = sequences.get_student_features(), sequences.get_teacher_features()
    expected = torch.zeros(())
    for name, layer in zip(STAGES, sequences.projectors, strict=True):
        assert isinstance(layer, nn.Conv1d)
        wide = F.conv1d(s[name], layer.weight)
        expected = expected + F.mse_loss(F.interpolate(wide, t[name].shape[2:], mode="linear"), t[name])
    assert torch.allclose(terms["feature"], expected, rtol=1e-5)

    x = torch.randn(4, 7, 3)
    attention = ATDistiller(Mixer(16), Mixer(8), ["block1", "block2"], example_inputs=x)
    learned(attention, x, Y)
    maps = [
        [F.normalize(values[name].square().mean(2), dim=1) for name in ("block1", "block2")]
        for values in (attention.get_student_features(), attention.get_teacher_features())
    ]
    by_hand = torch.stack([F.mse_loss(a, b) for a, b in zip(*maps, strict=True)]).sum()
    assert torch.allclose(attention.compute_distill_loss(), by_hand, rtol=1e-5)

    flow = FSPDistiller(Mixer(8), Mixer(8), ["block1", "block2"], example_inputs=x, task_weight=0.0)
    flow(x)
    flows = [
        values["block1"].transpose(1, 2) @ values["block2"] / 7
        for values in (flow.get_student_features(), flow.get_teacher_features())
    ]
    assert torch.allclose(flow.compute_distill_loss(), F.mse_loss(flows[0], flows[1]), rtol=1e-5)

    own = nn.Linear(8, 16)
    given = FeatureDistiller(Mixer(16), Mixer(8), ["block1"], projector=own, example_inputs=x)  # type: ignore[arg-type]
    given(x, Y)
    s1, t1 = given.get_student_features()["block1"], given.get_teacher_features()["block1"]
    assert torch.allclose(given.compute_distill_loss(), F.mse_loss(own(s1), t1), rtol=1e-5)


def test_channels_last_maps_are_seen_as_such() -> None:
    class Last(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
            self.mlp, self.fc = nn.Sequential(nn.Linear(width, width), nn.GELU()), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).permute(0, 2, 3, 1)
            return self.fc((x + self.mlp(self.norm(x))).mean((1, 2)))

    x = torch.randn(4, 3, 8, 12)
    distiller = FeatureDistiller(Last(8), Last(5), ["conv", "mlp", "norm"], example_inputs=x)
    assert [row.how for row in distiller.rows] == ["Conv2d 5 → 8"] * 3
    learned(distiller, x, Y)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_number_types_learn_alone_and_from_each_other(name: str, dtype: torch.dtype) -> None:
    x, config = images(), {"type": name, **MADE[name]}
    teacher, student = (model.to(dtype) for model in pair())
    learned(make_distiller(config, teacher=teacher, student=student, example_inputs=x.to(dtype)), x.to(dtype), Y)
    mixed = make_distiller(config, teacher=teacher, student=pair()[1], example_inputs=x)
    learned(mixed, x, Y)
    assert {p.dtype for p in mixed.teacher.parameters()} == {dtype}
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}


def test_a_half_precision_teacher_says_what_it_says_alone() -> None:
    teacher, student = pair()
    teacher.to(torch.bfloat16)
    distiller = LogitDistiller(teacher, student, alpha=1.0)
    output, terms = distiller(images(), Y)
    with torch.no_grad():
        alone = teacher.eval()(images().bfloat16())
    assert torch.allclose(terms["kd"], losses.kd_loss(output, alone.float()), rtol=1e-5)


@pytest.mark.parametrize("name", ["LogitDistiller", "FeatureDistiller"])
def test_models_without_values_are_refused_unless_a_file_has_them(name: str, tmp_path: Path) -> None:
    teacher, student = pair()
    with torch.device("meta"):
        empty = Plain(8, stride=1)
    config = {"type": name, **MADE[name]}
    with pytest.raises(ConfigError, match=r"the teacher has no values: 16 of its tensors are on the meta device \(stage1.0"):
        make_distiller(config, teacher=empty, student=student)
    with pytest.raises(ConfigError, match="the student has no values"):
        make_distiller(config, teacher=teacher, student=empty)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    config["teacher_pretrained"] = str(tmp_path / "teacher.pth")
    read = make_distiller(config, teacher=empty, student=student, example_inputs=images())
    with torch.no_grad():
        found = read.teacher(images())
    assert torch.allclose(found, teacher.eval()(images()), atol=1e-6)


def test_what_is_frozen_in_a_student_stays_as_it_is() -> None:
    teacher, student = pair()
    student.stage1.requires_grad_(False)
    before = student.stage1[0].weight.clone()  # type: ignore[operator]
    distiller = FeatureDistiller(teacher, student, STAGES, logit_distill={})
    learned(distiller, images(), Y)
    train(distiller, [(images(), Y)], Recipe(epochs=2, lr=0.1), progress=False)
    trained = distiller.student_model()
    assert torch.equal(trained.get_parameter("stage1.0.weight"), before)
    assert not torch.equal(trained.get_parameter("stage2.0.weight"), student.get_parameter("stage2.0.weight"))


def test_compiled_students_and_compiled_distillers(caplog: pytest.LogCaptureFixture) -> None:
    teacher, student = pair()
    plain = {name: make_distiller({"type": name, **MADE[name]}, teacher=teacher, student=student) for name in MADE}
    for name in ("LogitDistiller", "FeatureDistiller"):
        compiled: Any = torch.compile(student, backend="eager")
        distiller = make_distiller({"type": name, **MADE[name]}, teacher=teacher, student=compiled)
        found, expected = learned(distiller, images(), Y), plain[name](images(), Y)[1]
        assert all(torch.allclose(found[key], expected[key], rtol=1e-5) for key in expected)
    assert "the student was compiled" in caplog.text


def test_gradient_checkpoints_recompute_and_give_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    class Thrifty(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.stage1, x, use_reentrant=False)
            x = checkpoint(self.stage2, x, use_reentrant=False)
            return self.fc(x.flatten(2).mean(2))

    teacher, student = pair()
    thrifty = Thrifty(4)
    thrifty.load_state_dict(student.state_dict())
    for config in ({"type": "LogitDistiller"}, {"type": "FeatureDistiller", "teacher_layers": STAGES}):
        one, two = (make_distiller(config, teacher=teacher, student=model) for model in (student, thrifty))
        learned(one, images(), Y), learned(two, images(), Y)  # type: ignore[func-returns-value]
        gradients = dict(one.named_parameters())
        assert all(torch.allclose(p.grad, gradients[name].grad, atol=1e-6) for name, p in two.named_parameters())  # type: ignore[arg-type]


def test_outputs_of_many_forms() -> None:
    class Output(OrderedDict[str, Tensor]):
        """As transformers' models return: a dict with attributes."""

        def __getattr__(self, name: str) -> Tensor:
            if name not in self:
                raise AttributeError(name)
            return self[name]

    class Model(nn.Module):
        def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
            super().__init__()
            self.body, self.fc, self.form = nn.Linear(6, 5), nn.Linear(5, 4), form

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            hidden = self.body(x)
            return self.form(self.fc(hidden), hidden)

    x = torch.randn(4, 6)
    forms: list[Callable[[Tensor, Tensor], Any]] = [
        lambda logits, hidden: {"logits": logits, "hidden": hidden},
        lambda logits, hidden: (logits, hidden),
        lambda logits, hidden: Output(logits=logits, hidden=hidden),
    ]
    for form in forms:
        for made in (LogitDistiller(Model(form), Model(form)), FeatureDistiller(Model(form), Model(form), ["body"])):
            learned(made, {"x": x, "mask": None}, Y)
            learned(made, x, Y)


def test_the_ledger_tells_every_terms_value_weight_and_gradient() -> None:
    teacher, student = pair()
    parts = [RKDDistiller(distill_weight=0.1)]
    options: dict[str, Any] = {"logit_distill": {"alpha": 0.7}, "distillers": parts}
    distiller = FeatureDistiller(teacher, student, STAGES, distill_weight=0.25, task_weight=0.5, **options).eval()
    output, terms = distiller(images(), Y)
    weights = {"task": 0.5, "feature": 0.25, "kd": 0.25 * 0.7, "distance": 0.25 * 0.1 * 25, "angle": 0.25 * 0.1 * 50}
    assert terms.weights == pytest.approx(weights)
    assert all(torch.allclose(terms[name], weights[name] * terms.raw[name]) for name in weights)
    expected = {"task": F.cross_entropy(output, Y), "kd": losses.kd_loss(output, distiller.teacher(images()))}
    distiller.train()
    row = train(distiller, [(images(), Y)], Recipe(epochs=1, lr=1e-6), progress=False).rows[0]
    assert {name: row[f"weight/{name}"] for name in weights} == pytest.approx(weights)
    assert row["loss"] == pytest.approx(sum(weights[name] * row[f"loss/{name}"] for name in weights), rel=1e-5)
    assert all(row[f"gradient/{name}"] > 0 for name in weights)
    assert set(expected) <= set(terms.raw)
    assert all(torch.allclose(terms.raw[name], value, rtol=1e-5) for name, value in expected.items())


class Scaled(BaseDistiller):
    """A distiller of one's own, with a constructor of its own."""

    def __init__(self, teacher: Any = None, student: Any = None, scale: float = 2.0, **options: Any) -> None:
        self.scale = scale
        super().__init__(teacher, student, **options)

    def factors(self) -> dict[str, float]:
        return {"gap": self.scale}

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        student, teacher = step.logits()
        return {"gap": F.mse_loss(student, teacher)}


@distiller
class Huber(BaseDistiller):
    """A distiller of one's own, whose options are annotated names."""

    delta: float = 1.0

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {"huber": F.huber_loss(*step.logits(), delta=self.delta)}


class Late(BaseDistiller):
    """A distiller of one's own, which sets its option last."""

    def __init__(self, teacher: Any = None, student: Any = None, delta: float = 1.0, **options: Any) -> None:
        super().__init__(teacher, student, **options)
        self.delta = delta

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {"huber": F.huber_loss(*step.logits(), delta=self.delta)}


@pytest.mark.parametrize("kind", [Huber, Late])
def test_options_of_ones_own_are_annotated_or_set_by_the_constructor(kind: Any) -> None:
    DISTILLERS.register()(kind)
    try:
        teacher, student = pair()
        own = make_distiller({"type": kind.__name__, "delta": 0.25}, teacher=teacher, student=student)
        output, terms = own(images(), Y)
        with torch.no_grad():
            expected = F.huber_loss(output, teacher.eval()(images()), delta=0.25)
        assert torch.allclose(terms["huber"], expected)
    finally:
        del DISTILLERS._entries[kind.__name__]


def test_distillers_of_ones_own_are_registered_configured_and_added() -> None:
    DISTILLERS.register()(Scaled)
    try:
        teacher, student = pair()
        own = make_distiller({"type": "Scaled", "scale": 3.0, "distill_weight": 0.5}, teacher=teacher, student=student)
        output, terms = own(images(), Y)
        with torch.no_grad():
            gap = F.mse_loss(output, teacher.eval()(images()))
        assert torch.allclose(terms["gap"], 1.5 * gap) and torch.allclose(own.compute_distill_loss(), 3.0 * gap)
        both = FeatureDistiller(teacher, student, STAGES, distillers=[{"type": "Scaled", "scale": 1.0}])
        assert set(learned(both, images(), Y)) == {"task", "feature", "gap"}
        with pytest.raises(ConfigError, match="Did you mean 'scale'"):
            make_distiller({"type": "Scaled", "scal": 3.0})
    finally:
        del DISTILLERS._entries["Scaled"]
