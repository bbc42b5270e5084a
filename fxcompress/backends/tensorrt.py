"""TensorRT: explicit quantize/dequantize by its rules, int8 symmetric, float16 elsewhere; an engine where it runs.

Without TensorRT and an NVIDIA GPU the graph stays what it is: it runs as the reference, and its ONNX is what engines are
built from. TensorRT 11 takes precision from the graph alone. Placement follows its recommendations: all inputs of weighted
operators are quantized and their outputs only where a quantized operator reads them, residual additions quantize the
shortcut only, operators that do not commute with rounding quantize on both sides, concatenations share one scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.backends import fbgemm
from fxcompress.backends.base import Backend, Rule, missing
from fxcompress.backends.engine import Session, lower_to
from fxcompress.errors import BackendError
from fxcompress.graph import edit
from fxcompress.graph.ops import Attr, Call
from fxcompress.graph.shapes import shape_of

__all__ = ["BACKEND", "RULES", "engine", "session", "tensorrt"]

_FEWEST_CHANNELS = 16


def _conv(call: Call) -> str | None:
    return fbgemm.RULES["conv2d"].refuse(call) or _narrow_conv(call)


def _narrow_conv(call: Call) -> str | None:
    """The shapes for which TensorRT has fast int8 convolutions, a first layer with few input channels among them.

    Channels are those of one group. From 16 on both sides any shape will do; below, a convolution in groups needs output
    channels by eights and a kernel of 3 or more, another one a square kernel, 16 channels on one side (or to be the first
    layer), and channels by eights on one side.
    """
    owner = call.node.graph.owning_module
    if owner is None or not isinstance(call["weight"], Attr):
        return None
    outputs, inputs, *kernel = edit.get_tensor(owner, call["weight"].name).shape
    groups = call["groups"] or 1
    if min(inputs, outputs) >= _FEWEST_CHANNELS:
        return None
    if groups > 1:
        fits = outputs % 8 == 0 and min(kernel) >= 3
    else:
        wide = max(inputs, outputs) >= _FEWEST_CHANNELS or call["input"].op == "placeholder"
        fits = wide and len(set(kernel)) == 1 and (outputs % 8 == 0 or inputs % 8 == 0)
    size = "×".join(map(str, kernel))
    return None if fits else f"TensorRT has no fast int8 kernel for {inputs}→{outputs} channels, {size}, {groups} group(s)"


def _linear(call: Call) -> str | None:
    reason = fbgemm.RULES["linear"].refuse(call)
    owner = call.node.graph.owning_module
    if reason or owner is None or not isinstance(call["weight"], Attr):
        return reason
    outputs, inputs = edit.get_tensor(owner, call["weight"].name).shape
    return f"{inputs}→{outputs} is too narrow to gain" if min(inputs, outputs) < _FEWEST_CHANNELS else None


def _matmul(call: Call) -> str | None:
    if not all(isinstance(call[name], torch.fx.Node) for name in ("input", "other")):
        return "one operand is a constant"
    left, right = (shape_of(call[name]) for name in ("input", "other"))
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return "the shapes of its operands are not known"
    narrow = left[-2] == 1 or right[-1] == 1 or min(left[-1], right[-1]) < _FEWEST_CHANNELS
    return "one of its operands is a vector, or narrow" if narrow else None


def _add(call: Call) -> str | None:
    reason = fbgemm.RULES["add"].refuse(call)
    given = [source for source in call.inputs if source.op == "placeholder"]
    return reason or (f"the model's input {given[0].name!r} is added, which repays no quantization" if given else None)


_CONV = Rule(weighted=True, float_result=True, refuse=_conv)
_TRANSPOSED = Rule(weighted=True, float_result=True, refuse=fbgemm.RULES["conv_transpose2d"].refuse)
_POOL = Rule(refuse=fbgemm.RULES["avg_pool2d"].refuse)

RULES: dict[str, Rule] = {
    "conv1d": _CONV,
    "conv2d": _CONV,
    "conv3d": _CONV,
    "conv_transpose1d": _TRANSPOSED,
    "conv_transpose2d": _TRANSPOSED,
    "linear": Rule(weighted=True, float_result=True, refuse=_linear),
    "matmul": Rule(operands=("input", "other"), float_result=True, demanding=True, refuse=_matmul),
    "add": Rule(operands=("input", "other"), float_result=True, residual=True, refuse=_add),
    "cat": Rule(operands=("tensors",), output="shared", refuse=fbgemm.RULES["cat"].refuse),
    "max_pool2d": Rule(output="input", refuse=fbgemm.RULES["max_pool2d"].refuse),
    "avg_pool2d": _POOL,
    "adaptive_avg_pool2d": _POOL,
}


Shapes = Sequence[tuple[int, ...]]


def tensorrt(model: bytes, threads: int) -> Session:
    """An engine built from ONNX for the shapes it is first called with, and built again where others come."""
    reason = _unavailable()
    if reason:
        raise BackendError(f"a TensorRT engine cannot be built here: {reason}.")
    sessions: dict[tuple[tuple[int, ...], ...], Session] = {}

    def run(tensors: list[Tensor]) -> list[Tensor]:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in sessions:
            sessions[shapes] = session(engine(model, shapes))
        return sessions[shapes](tensors)

    return run


def engine(model: bytes, shapes: Shapes) -> bytes:
    """An engine built from ONNX for inputs of exactly these shapes, as TensorRT saves it."""
    import tensorrt as trt

    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise BackendError(f"TensorRT does not take the graph: {parser.get_error(0)}")
    settings, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for number, shape in enumerate(shapes):
        profile.set_shape(network.get_input(number).name, shape, shape, shape)
    settings.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise BackendError("TensorRT could not build an engine; its log says why.")
    return bytes(plan)


def session(plan: bytes) -> Session:
    """A function over tensors on the GPU that runs a saved engine."""
    import tensorrt as trt

    built = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    if built is None:
        raise BackendError("TensorRT does not take the engine: it was built for another version or another GPU.")
    context, stream = built.create_execution_context(), torch.cuda.Stream()
    names = [built.get_tensor_name(number) for number in range(built.num_io_tensors)]
    inputs = [name for name in names if built.get_tensor_mode(name) == trt.TensorIOMode.INPUT]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        for name, tensor in zip(inputs, tensors, strict=True):
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        results = []
        for name in (name for name in names if name not in inputs):
            dtype = getattr(torch, str(trt.nptype(built.get_tensor_dtype(name)).__name__))
            results.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda"))
            context.set_tensor_address(name, results[-1].data_ptr())
        stream.wait_stream(torch.cuda.current_stream())
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return results

    return run


def _unavailable() -> str | None:
    reasons = [missing("tensorrt", "onnx", "onnxscript"), None if torch.cuda.is_available() else "torch sees no NVIDIA GPU"]
    return ", and ".join(reason for reason in reasons if reason) or None


BACKEND = Backend(
    name="tensorrt",
    runs_on="NVIDIA GPUs",
    activation="int8",
    per_channel=True,
    affine_weights=False,
    rules=RULES,
    lower=lower_to(tensorrt, device="cuda", half=True),
    unavailable=_unavailable,
    saturates=lambda: False,
    device="cuda",
    whole=True,
    optional=True,
)
