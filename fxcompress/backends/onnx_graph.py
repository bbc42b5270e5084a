"""A graph as ONNX: our quantize and dequantize operators become QuantizeLinear and DequantizeLinear, one for one.

Weights stay int8 initialisers behind a DequantizeLinear, biases stay float, nothing stands between a Q and its DQ. A range
that is narrower than its type is kept by a Clip in float before the Q. The batch is free where the model lets it be.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.base import missing
from fxcompress.backends.flat import Flat
from fxcompress.errors import BackendError
from fxcompress.graph.quiet import quiet

__all__ = ["OPSET", "to_onnx"]

OPSET = 20
"""Has all that is written. From 21 on, ONNX Runtime types the quantize operators that it adds, and then changes the type."""
_NEEDED = ("onnx", "onnxscript")


def to_onnx(flat: Flat, *, dynamic: bool = True, openvino: bool = False) -> Any:
    """The graph as an ``onnx.ModelProto``; ``openvino``: around what it computes wrongly or breaks on.

    Raises BackendError where torch cannot export an operator.
    """
    reason = missing(*_NEEDED)
    if reason:
        raise BackendError(f"ONNX export needs {' and '.join(_NEEDED)}, and {reason}: pip install 'fxcompress[onnx]'.")
    from fxcompress.backends.onnx_operators import EXTREMES, TRANSLATIONS  # needs the packages
    from fxcompress.backends.onnx_tidying import tidied

    attempts = [_free_batch(flat.examples)] if dynamic else []
    failure: Exception | None = None
    for examples, shapes in [*attempts, (flat.examples, None)]:
        try:
            with quiet(), warnings.catch_warnings(action="ignore"), torch.no_grad():
                program = torch.export.export(flat.module, examples, dynamic_shapes=shapes, strict=False)
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    custom_translation_table=TRANSLATIONS | (EXTREMES if openvino else {}),
                    input_names=list(flat.inputs),
                    optimize=False,
                    verbose=False,
                )
        except Exception as error:  # whatever the exporter raises means the same: not this way
            failure = error
            continue
        assert exported is not None
        return tidied(exported.model, openvino=openvino)
    raise BackendError(f"the graph cannot be written as ONNX: {_reason(failure)}") from failure


def _reason(error: BaseException | None) -> str:
    """The first line of what is behind an error of the exporter, whose own lines are about reporting it."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _free_batch(examples: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Examples with two samples or more, and which of their dimensions may vary."""
    single = all(t.dim() and t.shape[0] == 1 for t in examples)
    widened = tuple(torch.cat([t, t]) for t in examples) if single else examples
    return widened, tuple({0: torch.export.Dim.AUTO} if t.dim() else None for t in examples)
