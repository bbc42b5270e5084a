"""Weights that other code reads beside their layer: for their values, their type, their device, their shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import DynamicQuantizer, PTQQuantizer, QATQuantizer

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)


class Values(Net):
    def forward(self, x: Tensor) -> Any:
        return self.last(F.relu(self.first(x)) * self.first.weight.abs().mean())


class Attributes(Net):
    def forward(self, x: Tensor) -> Any:
        x = x.to(self.first.weight.dtype).to(self.first.weight.device)
        x = torch.sigmoid(F.linear(x, self.first.weight, self.first.bias))
        return self.last(x.reshape(-1, self.first.weight.shape[0], 1).flatten(1, self.first.weight.dim()))


class Transposed(Net):
    def forward(self, x: Tensor) -> Any:
        return F.linear(F.relu(self.first(x)), self.first.weight.t())


def qat(model: nn.Module) -> Any:
    quantizer = QATQuantizer()
    prepared = quantizer.prepare(model.train(), X)
    prepared(X)
    return quantizer.convert(prepared.eval())


WAYS: dict[str, Any] = {
    **{
        backend: lambda model, backend=backend: PTQQuantizer(
            backend=backend, num_calibration_batches=1, progress=False
        ).quantize(model, [X])
        for backend in ("fbgemm", "onnxruntime", "openvino", "tensorrt")
    },
    "dynamic": lambda model: DynamicQuantizer().quantize(model, example_inputs=X),
    "half": lambda model: DynamicQuantizer(dtype="fp16").quantize(model, example_inputs=X),
    "trained": qat,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", [Values, Attributes, Transposed])
def test_a_weight_that_others_read_is_quantized_for_all_of_them(build: Any, way: str) -> None:
    if way in ("onnxruntime", "openvino"):
        pytest.importorskip(way)
    model = build().eval()
    expected = model(X)
    quantized = WAYS[way](model)
    assert (quantized(X) - expected).norm() < 0.03 * expected.norm()
    assert quantized(X[:3]).shape[0] == 3


def test_a_weight_whose_type_is_asked_for_is_not_kept_twice() -> None:
    model = Attributes().eval()
    quantized = PTQQuantizer(num_calibration_batches=1, progress=False).quantize(model, [X])
    floats = [value.numel() for value in quantized.state_dict().values() if value.dtype is torch.float32]
    assert max(floats, default=0) < model.first.weight.numel()
