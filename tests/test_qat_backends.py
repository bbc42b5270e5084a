"""Trained with rounding, converted for any backend: what its kernels compute is what was trained, within one output step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.digits import DigitsNet
from fxcompress import LSQQuantizer, QATQuantizer, backends, coverage
from tests.test_qat import images, lively, output_step, reference, train

BACKENDS = ["fbgemm", "qnnpack", "onnxruntime", "openvino", "tensorrt"]
QUANTIZERS: dict[str, Any] = {
    "qat": lambda backend: QATQuantizer(backend=backend, progress=False),
    "qat, 4 bits, one scale per weight": lambda backend: QATQuantizer(
        backend=backend, bits=4, per_channel=False, progress=False
    ),
    "lsq": lambda backend: LSQQuantizer(backend=backend, progress=False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_kernels_agree_with_the_trained_model_within_one_step_for_999_of_1000_outputs(name: str, backend: str) -> None:
    reason = backends.find(backend).unavailable()
    if reason and not backends.find(backend).optional:
        pytest.skip(reason)
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name](backend)
    prepared = quantizer.prepare(lively(DigitsNet()).train(), images()[0])
    train(prepared, *images())
    prepared.eval()
    x = torch.randn(512, 1, 8, 8)
    with torch.no_grad():
        expected = prepared(x)
        converted = quantizer.convert(prepared, images()[0])
        gap = (expected - converted(x)).abs()
    step = output_step(reference(prepared, images()[0]))
    assert (gap <= step * 1.01).double().mean() >= 0.999
    if backend != "tensorrt":  # which leaves narrow layers to float
        assert coverage(converted).mac_share == 1.0
