"""Engines: a whole graph handed to another runtime as ONNX, behind a module that is called like any other."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.backends.flat import Flat, casts_edge, flatten
from fxcompress.backends.half import in_half
from fxcompress.backends.onnx_graph import to_onnx
from fxcompress.errors import BackendError
from fxcompress.graph import edit, ops
from fxcompress.graph.cost import macs
from fxcompress.graph.guards import CHECKS, guard_fixed
from fxcompress.graph.shapes import tensor_meta

__all__ = ["Engine", "Runtime", "Session", "install", "lower_to"]

Session = Callable[[list[Tensor]], list[Tensor]]
Runtime = Callable[[bytes, int], Session]
"""From a model's bytes and a number of threads to a function from tensors to tensors."""


class Engine(nn.Module):
    """Runs an ONNX model in a runtime; takes tensors one by one and gives one tensor or a tuple.

    ``model``  the ONNX model's bytes, as a buffer: an engine copies, pickles and counts like a layer. The runtime's session
    is made when it is first called, anew where the number of torch's threads has changed, and never copied.
    """

    model: Tensor

    def __init__(self, runtime: Runtime, model: bytes, outputs: int) -> None:
        super().__init__()
        self.runtime, self.outputs = runtime, outputs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bytes are not writable, and nobody writes them
            self.register_buffer("model", torch.frombuffer(model, dtype=torch.uint8))
        self._session: Session | None = None
        self._threads = 0

    def forward(self, *inputs: Tensor) -> Any:
        results = self.run(inputs)
        return tuple(results) if self.outputs > 1 else results[0]

    def run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """What the session gives."""
        threads = torch.get_num_threads()
        if self._session is None or threads != self._threads:
            self._session, self._threads = self.runtime(self.model.cpu().numpy().tobytes(), threads), threads
        return self._session([tensor.detach().contiguous() for tensor in inputs])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def extra_repr(self) -> str:
        return f"{self.runtime.__name__}, {self.model.numel() / 1e6:.1f} MB"


def lower_to(
    runtime: Runtime, *, device: str = "cpu", half: bool = False, openvino: bool = False
) -> Callable[[fx.GraphModule, Callable[[fx.Node, str], None]], None]:
    """The lowering that hands a whole graph to ``runtime``; with ``half`` what is float in it becomes float16;
    with ``openvino`` it is written around that runtime's defects."""

    def lower(module: fx.GraphModule, remark: Callable[[fx.Node, str], None]) -> None:
        flat = flatten(module)
        _made_up_call(runtime, flat)
        exported = in_half(flat) if half else flat
        engine = Engine(runtime, to_onnx(exported, openvino=openvino).SerializeToString(), len(flat.outputs)).to(device)
        _first_call(engine, [example.to(device) for example in flat.examples])
        install(module, flat, engine)

    return lower


def _made_up_call(runtime: Runtime, flat: Flat) -> Any:
    """What the graph gives for its example tensors; BackendError where no values but the right ones run through it."""
    try:
        return flat.module.cpu()(*flat.examples)
    except Exception as error:  # any operator may refuse the values
        reason = f"values made up for its inputs do not run through the graph: {_reason(error)}"
        raise BackendError(
            f"{runtime.__name__} is given graphs that take any values of their inputs' shapes; {reason}"
        ) from error


def _first_call(engine: Engine, tensors: list[Tensor]) -> Any:
    """What the engine gives; what its runtime refuses, it refuses here: BackendError with the reason."""
    try:
        return engine(*tensors)
    except BackendError:
        raise
    except Exception as error:  # a runtime has exceptions of its own
        raise BackendError(f"{engine.runtime.__name__} does not take the graph: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line that says what is wrong, rather than where a runtime noticed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Exception from ")]
    return (telling or lines or [type(error).__name__])[0][:300]


def install(module: fx.GraphModule, flat: Flat, engine: Engine) -> None:
    """Leave of the graph its inputs, one call of the engine, and its outputs."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    nodes = list(module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder" or ((casts_edge(node) or node.target in CHECKS) and node.args[0] in values):
            values[node] = graph.node_copy(node, values.__getitem__)
    for node, value in values.items():
        if node.op == "placeholder" and tensor_meta(node) is None and ops.value_readers(node):
            guard_fixed(value, str(node.target), *(node.args or (None,)))
    inputs = tuple(value for value in values.values() if value.name in flat.inputs)
    module.add_module("engine", engine.train(module.training))
    call = graph.call_module("engine", inputs)
    call.meta |= {"macs": sum(macs(node) for node in nodes), "kind": "engine", "integer": True}
    for number, source in enumerate(flat.outputs):
        value = graph.call_function(operator.getitem, (call, number)) if len(flat.outputs) > 1 else call
        value.meta["tensor_meta"] = tensor_meta(source)
        values[source] = value
    if len(flat.outputs) > 1:
        call.meta["tensor_meta"] = tuple(tensor_meta(source) for source in flat.outputs)
    output = next(node for node in nodes if node.op == "output")
    for result in output.all_input_nodes:
        edit.copy_into(graph, result, values)
    graph.output(fx.node.map_arg(output.args[0], lambda node: values[node]))
    graph.set_codegen(module.graph._codegen)
    module.graph = graph
