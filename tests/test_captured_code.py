"""Code that only torch.export captures: transforms of functions, results of classes of their own; saved and loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxcompress
from fxcompress import DynamicQuantizer, PTQQuantizer, QATQuantizer, coverage, trace
from fxcompress.graph.results import output_snr

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.inner, self.after = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.members = nn.Parameter(torch.randn(3, 8, 8))


class Mapped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.vmap(self.inner)(self.before(x)).relu())


class Ensemble(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x).relu()
        return self.after(torch.vmap(lambda weight: F.linear(hidden, weight))(self.members).mean(0))


class Differentiated(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.vmap(torch.func.grad(lambda v: self.inner(v).tanh().sum()))(self.before(x)))


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "static": lambda model: PTQQuantizer(num_calibration_batches=1, progress=False).quantize(model, [X]),
    "dynamic": lambda model: DynamicQuantizer().quantize(model, example_inputs=X),
    "trained": lambda model: QATQuantizer().prepare(model, X),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", [Mapped, Ensemble, Differentiated])
def test_transforms_of_functions_are_written_out_or_left_to_python(build: type[nn.Module], way: str) -> None:
    model = build().eval()
    expected = model(X)
    result = WAYS[way](model)
    assert output_snr(expected, result(X)) > 25
    assert output_snr(model(X[:3]), result(X[:3])) > 25
    assert torch.equal(model(X), expected)
    torch.randn(2)  # nothing of a transform is left behind


def test_layers_around_mapped_code_run_in_integers() -> None:
    quantized = WAYS["static"](Mapped().eval())
    assert coverage(quantized).mac_share > 0.5
    rungs = trace(Differentiated().eval(), X).meta["rungs"]
    assert any("torch.func" in rung.reason for rung in rungs)


@dataclass
class Output(OrderedDict[str, Any]):
    """A mapping with attributes, as models of transformers return it."""

    hidden: Any = None
    pooled: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output.keys())),
    lambda values, keys: Output(**dict(zip(keys, values, strict=True))),
    serialized_type_name="tests.Output",
)


class Body(nn.Module):
    """Control flow on the layout of a tensor, a learned token, and a result of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.randn(1, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Output:
        if not x.is_contiguous() or x.shape[1] != 8:
            raise ValueError("eight numbers are wanted")
        hidden = self.layer(x + self.token)
        return Output(hidden=hidden, pooled=hidden.tanh())


class Outer(nn.Module):
    """Hands on fields of a result, one of which it does not have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = Bodied(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Output:
        inner = self.body(x)
        return Output(hidden=self.head(inner.hidden), pooled=inner.pooled)


class Bodied(Body):
    def forward(self, x: Tensor) -> Output:
        return Output(hidden=self.layer(x + self.token))


def test_a_field_that_a_result_does_not_have_is_none() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    quantized = PTQQuantizer("openvino", num_calibration_batches=1, progress=False).quantize(Outer().eval(), [X])
    result = quantized(X)
    assert type(result) is Output and result.pooled is None
    assert output_snr(Outer()(X).hidden, result.hidden) > 25


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = Body(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).pooled)


def test_an_exported_part_keeps_the_class_of_its_result_and_is_saved_without_its_code(tmp_path: Path) -> None:
    model = Wrapper().eval()
    assert any(rung.rung == "exported" for rung in trace(model, X).meta["rungs"])
    quantized = WAYS["static"](model)
    assert output_snr(model(X), quantized(X)) > 25
    fxcompress.save(quantized, tmp_path / "model")
    assert torch.equal(fxcompress.load(tmp_path / "model")(X), quantized(X))


@pytest.mark.parametrize("backend", ["fbgemm", "onnxruntime", "openvino"])
def test_a_model_whose_result_is_of_a_class_of_its_own_runs_in_engines_and_is_saved(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("torch" if backend == "fbgemm" else backend)
    torch.manual_seed(0)
    model = Body().eval()
    quantized = PTQQuantizer(backend, num_calibration_batches=1, progress=False).quantize(model, [X])
    result = quantized(X)
    assert type(result) is Output
    assert output_snr(model(X).hidden, result.hidden) > 25
    assert output_snr(model(X).pooled, result["pooled"]) > 25
    for number in range(2):  # saved again, it is what it was
        fxcompress.save(quantized, tmp_path / f"model{number}")
        quantized = fxcompress.load(tmp_path / f"model{number}")
        again = quantized(X[:3])
        assert type(again).__name__ == "Output" and list(again) == ["hidden", "pooled"]
        assert torch.equal(again.hidden, again[0]) and torch.equal(again["pooled"], again.pooled)
        assert output_snr(model(X[:3]).pooled, again.pooled) > 25
