"""Channels-last memory for forward passes on the CPU: who gets it, what stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcompress import PTQQuantizer, trace
from fxcompress.errors import DataError
from fxcompress.graph.layout import channels_last
from fxcompress.quantization.observer import observers

plain_layout, last = torch.contiguous_format, torch.channels_last


class Net(nn.Module):
    """Convolutions on a large map and on a small one; ``by`` leads to the linear layer."""

    def __init__(self, by: str = "flatten") -> None:
        super().__init__()
        self.by = by
        self.wide, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(4)
        self.deep, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.pool(torch.relu(self.wide(x))))
        return self.head(x.view(x.size(0), -1) if self.by == "view" else x.flatten(1))


def net(by: str = "flatten", batch: int = 1) -> tuple[Net, list[Tensor]]:
    """The map of ``deep`` is a small one for one image, a large one for eight."""
    torch.manual_seed(0)
    return Net(by).eval(), [torch.randn(batch, 3, 16, 16) for _ in range(3)]


def test_large_maps_have_their_channels_last_and_small_ones_do_not() -> None:
    model, batches = net()
    traced = trace(model, batches[0])
    results: dict[str, Tensor] = {}
    for name in ("wide", "pool", "deep"):
        traced.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: results.update({name: out}))
    with channels_last(traced), torch.no_grad():
        for images in batches:
            output = traced(images)
            assert results["wide"].is_contiguous(memory_format=last) and results["pool"].is_contiguous(memory_format=last)
            assert results["deep"].is_contiguous()
            torch.testing.assert_close(output, model(images))


@pytest.mark.parametrize("by", ["flatten", "view"])
def test_calibrating_sees_the_values_of_the_plain_layout_and_leaves_weights_as_they_were(by: str) -> None:
    model, batches = net(by, batch=8)
    quantizer = PTQQuantizer(calibration_method="minmax", num_calibration_batches=3, progress=False)
    prepared = quantizer.prepare(model, batches[0])
    weights = {name: (weight, weight.stride()) for name, weight in prepared.named_parameters()}
    quantizer.calibrate(prepared, batches)
    seen = {name: observer.calibrator for name, observer in observers(prepared).items()}
    with torch.no_grad():
        wide = torch.cat([torch.relu(model.wide(images)) for images in batches])
        deep = torch.cat([model.deep(model.pool(torch.relu(model.wide(images)))) for images in batches])
    for name, expected in (("observers.wide", wide), ("observers.deep", deep)):
        low, high = seen[name].compute_range()
        torch.testing.assert_close((low.float(), high.float()), (expected.min(), expected.max()))
    assert all(
        weight is weights[name][0] and weight.stride() == weights[name][1] for name, weight in prepared.named_parameters()
    )
    assert all(not part._forward_pre_hooks for part in prepared.modules())


def test_weights_are_put_back_where_a_batch_fails() -> None:
    model, batches = net()
    quantizer = PTQQuantizer(progress=False)
    prepared = quantizer.prepare(model, batches[0])
    weights = dict(prepared.named_parameters())
    with pytest.raises(DataError, match="batch 1 does not run"):
        quantizer.calibrate(prepared, [batches[0], torch.randn(1, 3, 7, 7)])
    assert all(weight is weights[name] for name, weight in prepared.named_parameters())
    assert all(not part._forward_pre_hooks for part in prepared.modules())
