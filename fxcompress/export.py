"""ONNX files and TensorRT engines: any graph, float or quantized, by our own mapping, checked by running what is written."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxcompress.backends import tensorrt
from fxcompress.backends.agreement import engine_agreement
from fxcompress.backends.base import missing
from fxcompress.backends.engine import Engine, Runtime, Session, install
from fxcompress.backends.flat import Flat, examples, flatten
from fxcompress.backends.half import in_half
from fxcompress.backends.onnx_graph import to_onnx
from fxcompress.backends.onnxruntime import onnxruntime
from fxcompress.errors import BackendError, ConfigError, VerificationError
from fxcompress.files import make_folder, path_of, whole
from fxcompress.graph import edit
from fxcompress.graph.inputs import Arguments, arguments, tensors_in
from fxcompress.graph.island import TOP
from fxcompress.graph.meta_run import propagate
from fxcompress.graph.module import shared_copy
from fxcompress.graph.trace import trace

__all__ = ["export_onnx", "export_tensorrt"]

log = logging.getLogger("fxcompress")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    half: bool | None = None,
) -> Path:
    """Write ``model`` as an ONNX file at ``path``, run the file in ONNX Runtime, and compare; returns the path.

    Quantize and dequantize operators become QuantizeLinear and DequantizeLinear; int8 weights stay int8 initialisers behind
    a DequantizeLinear; a lowered model is written in its portable form.

    ``example_inputs``  a tensor, a tuple of positional arguments or a dict by keyword; a model that was traced with some
                        needs none
    ``dynamic_batch``   leave the first dimension of every input free where the model allows it
    ``half``            float16 between the operators; None: for a model quantized for TensorRT, unless its values are too
                        large or too small for float16, which is logged as a warning (as it is where ONNX Runtime's own
                        optimizations do not take the file)

    Raises BackendError where a package is missing or an operator has no ONNX form, VerificationError where the file computes
    something else than the model (nothing is left at ``path`` then).
    """
    reason = missing("onnx", "onnxscript", "onnxruntime")
    if reason:
        raise BackendError(f"export_onnx needs more than is here: {reason}. pip install 'fxcompress[onnx]'.")
    target = _file(path)
    graph = _portable(model, example_inputs)
    flat, call = _with_examples(flatten(graph), example_inputs), _call(graph, example_inputs)
    as_written = functools.partial(onnxruntime, optimize=False)

    def make(half: bool) -> bytes:
        data: bytes = to_onnx(in_half(flat) if half else flat, dynamic=dynamic_batch).SerializeToString()
        _check(graph, call, as_written, data, half)
        return data

    data = _typed(make, half, _backend(graph))
    _warn_unless_it_loads(data)
    return _written(data, target)


def export_tensorrt(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, *, half: bool | None = None
) -> Path:
    """Write ``model`` as a TensorRT engine at ``path``, run the engine, and compare; returns the path.

    The engine is for inputs of exactly the shapes of ``example_inputs`` (or of those that the model was traced with), for
    this GPU and this TensorRT. ``half`` is that of :func:`export_onnx`, whose file is what the engine is built from.

    Raises BackendError where TensorRT or a GPU is missing, or where the model was quantized for a backend whose integers
    TensorRT does not take; VerificationError where the engine computes something else than the model.
    """
    graph = trace(model, example_inputs)
    quantized_for = _backend(graph)
    if quantized_for not in (None, "tensorrt"):
        raise BackendError(
            f"the model is quantized for {quantized_for!r}, whose activations TensorRT does not take: "
            "quantize it with backend='tensorrt'."
        )
    reason = tensorrt.BACKEND.unavailable()
    if reason:
        raise BackendError(f"a TensorRT engine cannot be built here: {reason}. Its ONNX can be exported anywhere.")
    target = _file(path)
    graph = _portable(graph, example_inputs)
    flat, call = _with_examples(flatten(graph), example_inputs), _call(graph, example_inputs)

    def make(half: bool) -> bytes:
        data: bytes = to_onnx(in_half(flat) if half else flat, dynamic=False).SerializeToString()
        plan = tensorrt.engine(data, [tuple(example.shape) for example in flat.examples])

        def on_gpu(model: bytes, threads: int) -> Session:
            run = tensorrt.session(plan) if model == data else tensorrt.tensorrt(model, threads)
            return lambda tensors: [found.cpu() for found in run([tensor.cuda() for tensor in tensors])]

        _check(graph, call, on_gpu, data, half)
        return plan

    return _written(_typed(make, half, quantized_for), target)


def _typed(make: Callable[[bool], bytes], half: bool | None, quantized_for: str | None) -> bytes:
    """``make(half)``; where nobody has chosen, in float16 for a backend that likes it, if that holds the model's values."""
    if half is not None or quantized_for != "tensorrt":
        return make(bool(half))
    try:
        return make(True)
    except VerificationError as error:
        data = make(False)
        log.warning("written with float32 between the operators, as float16 does not hold this model's values: %s", error)
        return data


def _file(path: str | os.PathLike[str]) -> Path:
    target = path_of(path, "an export")
    if target.is_dir():
        raise ConfigError(f"{str(target)!r} is a folder; give the name of a file.")
    return target


def _written(data: bytes, target: Path) -> Path:
    make_folder(target.parent)
    with whole(target) as draft:
        draft.write_bytes(data)
    return target


def _backend(graph: fx.GraphModule) -> str | None:
    """The backend that a graph was quantized for; None where it was not."""
    found: str | None = graph.meta.get("quantization", {}).get("backend")
    return found


def _portable(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    graph = trace(model, example_inputs)
    if "portable" in graph.meta:
        graph = trace(graph.meta["portable"])
    if TOP in graph._modules:
        raise BackendError(
            f"the graph of {type(model).__name__} is an island: its own Python code runs, which has no ONNX form. "
            "Export the parts that were compiled, or torch.onnx.export the model itself."
        )
    if example_inputs is not None:
        propagate(graph, arguments(example_inputs))
    return graph.cpu().eval()


def _call(graph: fx.GraphModule, example_inputs: Any) -> Arguments:
    return examples(graph) if example_inputs is None else arguments(example_inputs).to("cpu")


def _with_examples(flat: Flat, example_inputs: Any) -> Flat:
    """The caller's tensors in place of made-up ones, where they were given one by one in order."""
    given = tensors_in(tuple(arguments(example_inputs))) if example_inputs is not None else []
    if [t.shape for t in given] != [t.shape for t in flat.examples]:
        return flat
    taken = tuple(t.cpu().to(example.dtype) for t, example in zip(given, flat.examples, strict=True))
    return Flat(flat.module, flat.inputs, flat.outputs, taken)


def _check(graph: fx.GraphModule, call: Arguments, runtime: Runtime, data: bytes, half: bool) -> None:
    """Run what is to be written against the graph."""
    lowered = shared_copy(graph)
    flat = flatten(lowered)
    install(lowered, flat, Engine(runtime, data, len(flat.outputs)))
    edit.finish(lowered)
    with torch.no_grad():
        expected, found = call.fresh()(graph), call.fresh()(lowered)
        made = engine_agreement(graph, lowered, call, expected, found)
    if made.wrong:
        raise VerificationError(
            f"the exported model computes something else than the graph: {made.reason()}. "
            f"Nothing was written.{_hint(expected) if half else ''}"
        )


def _warn_unless_it_loads(data: bytes) -> None:
    """What ONNX Runtime runs as written it may not load as it is used: its fused integer kernels take float32 alone."""
    try:
        onnxruntime(data, torch.get_num_threads())
    except Exception as error:  # the runtime raises types of its own
        log.warning(
            "the file is right, but ONNX Runtime loads it only with graph_optimization_level=ORT_DISABLE_ALL; "
            "half=False may write one that it loads as it is: %s",
            str(error).splitlines()[0],
        )


def _hint(expected: Any) -> str:
    floats = [value for value in tensors_in(expected) if value.is_floating_point() and value.numel()]
    largest = max((float(value.abs().max()) for value in floats), default=0)
    held = "float16 holds magnitudes from 6e-8 to 65504"
    return f" {held}, and the largest of the results is {largest:.1e}: half=False exports the model in float32."
