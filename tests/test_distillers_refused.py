"""What distillers refuse: weights files, options, layers and data that cannot work."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.distillation import (
    ATDistiller,
    BaseDistiller,
    CRDDistiller,
    DKDDistiller,
    FeatureDistiller,
    FSPDistiller,
    LogitDistiller,
    OFDDistiller,
    RelationDistiller,
    RKDDistiller,
    make_distiller,
)
from fxcompress.errors import ConfigError, DataError, TraceError
from fxcompress.weights import load_weights
from tests.distilled import INDEX, LAYERS, Net, X, Y, models


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
        (
            lambda t, s: FeatureDistiller(t, s, LAYERS, projector={"type": "conv", "kernel_size": -1}),
            ConfigError,
            "projector 'conv': ",
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
