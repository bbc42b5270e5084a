"""Arguments that decided the way through a model's code: given otherwise, they are refused, never silently ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import DynamicQuantizer, PTQQuantizer, QATQuantizer, StructuredPruner
from fxcompress.errors import DataError
from fxcompress.graph import trace


class Optional(nn.Module):
    """A layer between branches that arguments choose."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, flag: bool = False, scale: float = 2.0, *, mode: str = "plain"
    ) -> Tensor:
        hidden = self.layer(x).relu()
        if mask is not None:
            hidden = hidden * mask
        if flag:
            hidden = -hidden
        return self.head(hidden * scale) + (mode == "shifted")


class Contiguous(Optional):
    """The same behind a question that symbolic tracing cannot answer."""

    def forward(self, x: Tensor, mask: Tensor | None = None, flag: bool = False, scale: float = 2.0, **more: Any) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        return super().forward(x, mask, flag, scale, **more)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
OTHERWISE: dict[str, Any] = {"mask": torch.zeros(3, 8), "flag": True, "scale": 3.0}

COMPRESSED: dict[str, Callable[[nn.Module], Any]] = {
    "trace": lambda model: trace(model, X),
    "int8": lambda model: PTQQuantizer(num_calibration_batches=1).quantize(model, [X]),
    "session": lambda model: PTQQuantizer(backend="onnxruntime", num_calibration_batches=1).quantize(model, [X]),
    "openvino": lambda model: PTQQuantizer(backend="openvino", num_calibration_batches=1).quantize(model, [X]),
    "qdq": lambda model: PTQQuantizer(backend="tensorrt", num_calibration_batches=1).quantize(model, [X]),
    "half": lambda model: DynamicQuantizer(dtype="fp16").quantize(model, example_inputs=X),
    "dynamic": lambda model: DynamicQuantizer().quantize(model, example_inputs=X),
    "training": lambda model: QATQuantizer().prepare(model, X),
    "pruned": lambda model: StructuredPruner(sparsity=0.5, example_inputs=X).prune(model),
}


@pytest.mark.parametrize("cls", [Optional, Contiguous])
@pytest.mark.parametrize("form", COMPRESSED)
def test_a_compressed_model_refuses_an_argument_that_it_was_not_traced_with(cls: type[nn.Module], form: str) -> None:
    if form in ("session", "openvino"):
        pytest.importorskip({"session": "onnxruntime", "openvino": "openvino"}[form])
    made = COMPRESSED[form](cls().eval())
    plain = made(X)
    assert torch.equal(made(X, None, False, 2.0), plain) and torch.equal(made(X, mask=None), plain)
    for name, value in OTHERWISE.items():
        with pytest.raises(
            DataError, match=f"argument '{name}' is .*, and was .* while .* compress the model with example_inputs"
        ):
            made(X, **{name: value})


@pytest.mark.parametrize("cls", [Optional, Contiguous])
def test_a_loaded_model_refuses_it_as_well(cls: type[nn.Module], tmp_path: Path) -> None:
    fxcompress.save(trace(cls().eval(), X), tmp_path / "model")
    loaded = fxcompress.load(tmp_path / "model")
    loaded(X, mask=None)
    with pytest.raises(DataError, match="argument 'mask' is a Tensor, and was None"):
        loaded(X, mask=OTHERWISE["mask"])


@pytest.mark.parametrize("cls", [Optional, Contiguous])
def test_what_the_examples_give_is_taken(cls: type[nn.Module]) -> None:
    model = cls().eval()
    traced = trace(model, {"x": X, "mask": torch.ones(3, 8), "flag": True})
    half = torch.full((3, 8), 0.5)
    assert torch.allclose(traced(X, half, True), model(X, half, True))
    with pytest.raises(DataError, match="argument 'flag' is False, and was True"):
        traced(X, half)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.int64:
            x = x.float() / 255
        if x.ndim == 3:
            x = x.mean(1)
        return self.layer(x)


class Asking(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        return super().forward(x)


@pytest.mark.parametrize("cls", [Deciding, Asking])
def test_a_branch_taken_by_type_or_dimensions_is_guarded(cls: type[nn.Module]) -> None:
    model, images = cls().eval(), torch.arange(48).reshape(2, 3, 8)
    for example in (X, images):
        traced = trace(model, example)
        assert torch.allclose(traced(example), model(example))
    with pytest.raises(DataError, match=r"argument 'x' has .*, and the code goes another way"):
        traced(images.float())
    with pytest.raises(DataError, match=r"argument 'x' has .*, and the code goes another way"):
        traced(images[0])


def test_a_decision_by_type_leaves_other_types_of_the_same_way_alone() -> None:
    model = Deciding().eval()
    traced = trace(model, X).double()
    assert torch.allclose(traced(X.double()).float(), model(X), atol=1e-5)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
        for other in more:
            x = x + other
        hidden = self.layer(x)
        return hidden * named["gate"] if "gate" in named else hidden


def test_of_any_number_of_arguments_those_in_the_examples_are_taken() -> None:
    model, gate = Keywords().eval(), torch.rand(3, 8)
    bare = trace(model, X)
    assert torch.equal(bare(X), model(X))
    with pytest.raises(TypeError, match="gate"):
        bare(X, gate=gate)
    full = trace(model, fxcompress.graph.inputs.Arguments((X, X, 2 * X), {"gate": gate}))
    assert torch.equal(full(X, 3 * X, X, gate=gate), model(X, 3 * X, X, gate=gate))
    assert any("of **named" in rung.reason and "gate" in rung.reason for rung in full.meta["rungs"])
    with pytest.raises(TypeError):
        full(X, X, X, X, gate=gate)


class Twice(nn.Module):
    """A part that only ``torch.export`` takes, called in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + 2 * self.part(x, flag=True) + 3 * self.part(x, x) + 5 * self.part(x[None], scale=4.0)[0]


def test_a_part_that_is_called_in_several_ways_computes_each() -> None:
    model = Twice().eval()
    traced = trace(model, X)
    assert ("part", "exported") in {(rung.module, rung.rung) for rung in traced.meta["rungs"]}
    assert torch.allclose(traced(X), model(X), atol=1e-5)
