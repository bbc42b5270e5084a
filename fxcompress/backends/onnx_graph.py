"""A graph as ONNX: our quantize and dequantize operators become QuantizeLinear and DequantizeLinear, one for one.

Weights stay int8 initialisers behind a DequantizeLinear, biases stay float, nothing stands between a Q and its DQ. A range
that is narrower than its type is kept by a Clip in float before the Q. The batch is free where the model lets it be.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.backends.embedding_bags import is_bag, open_bag
from fxcompress.errors import BackendError
from fxcompress.graph import ops, qdq
from fxcompress.graph.containers import leaves
from fxcompress.graph.guards import CHECKS
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.quiet import quiet
from fxcompress.graph.shapes import dtype_of, tensor_meta

__all__ = ["OPSET", "Flat", "casts_edge", "examples", "flatten", "in_half", "missing", "to_onnx"]

OPSET = 21
_NEEDED = ("onnx", "onnxscript")


def missing(*packages: str) -> str | None:
    """The reason why ``packages`` cannot be used, or None where all can be imported."""
    from importlib.util import find_spec

    absent = [name for name in packages if find_spec(name) is None]
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed" if absent else None


@dataclass(frozen=True)
class Flat:
    """A graph that takes tensors one by one and gives a tuple of tensors, as exchange formats want it.

    ``inputs``   the names of the tensors it takes, in order
    ``outputs``  the nodes of the original graph whose values it gives, in order
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[fx.Node, ...]
    examples: tuple[Tensor, ...]


def flatten(module: fx.GraphModule) -> Flat:
    """``module`` with its containers opened; arguments that are not tensors are fixed to their defaults.

    Example tensors are made up from the shapes in the metadata. Raises BackendError where these are not known. Casts of
    inputs to float32 and of outputs from it are left to the caller, since runtimes take float32.
    """
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    names: list[str] = []
    examples: list[Tensor] = []
    for node in module.graph.nodes:
        if node.target in CHECKS or (node.op == "placeholder" and any(casts_edge(user) for user in node.users)):
            continue
        if node.op == "placeholder" or (casts_edge(node) and node.args[0] not in values):
            example = _example(node)
            if example is None:
                values[node] = node.args[0] if node.args else None
                continue
            names.append(node.name)
            examples.append(example)
            values[node] = graph.placeholder(node.name)
            values[node].meta["tensor_meta"] = node.meta["tensor_meta"]
        elif node.op == "output":
            outputs = [result.all_input_nodes[0] if casts_edge(result) else result for result in _results(node)]
            graph.output(tuple(values[result] for result in outputs))
        elif is_bag(node):
            values[node] = open_bag(graph, node, values)
        else:
            values[node] = graph.node_copy(node, lambda old: values[old])
            values[node].meta.pop("nn_module_stack", None)  # torch.export would read it, and wants it in its own form
    if not outputs:
        raise BackendError("the graph gives no tensor; there is nothing to export.")
    flat = fx.GraphModule(module, _drop_redundant_activations(graph))
    return Flat(flat.eval(), tuple(names), tuple(outputs), tuple(examples))


def examples(module: fx.GraphModule) -> Arguments:
    """Arguments of one call, made up from the shapes in the metadata; a graph takes its placeholders' values in order."""
    values = [_example(node) for node in module.graph.nodes if node.op == "placeholder"]
    codegen = module.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        spec = codegen.pytree_info.in_spec
        args, kwargs = pytree.tree_unflatten(values, spec)
        return Arguments(tuple(args), kwargs)
    names = [str(node.target).lstrip("*") for node in module.graph.nodes if node.op == "placeholder"]
    return Arguments((), {name: value for name, value in zip(names, values, strict=True) if value is not None})


def _example(node: fx.Node) -> Tensor | None:
    """Seeded noise of the placeholder's shape and dtype; None where its value is no tensor."""
    if "tensor_meta" not in node.meta:
        raise BackendError(
            f"the shape of input {node.name!r} is not known: give example_inputs, or data, when the model is quantized."
        )
    meta = tensor_meta(node)
    if meta is None:
        return None
    generator = torch.Generator().manual_seed(0)
    if meta.dtype.is_floating_point:
        return torch.randn(meta.shape, generator=generator).to(meta.dtype)
    return torch.zeros(meta.shape, dtype=meta.dtype)


_OTHERS = (torch.float16, torch.bfloat16, torch.float64)


def casts_edge(node: fx.Node) -> bool:
    """Whether a node does nothing but make an input of another type float32, or of a result an output of another type."""
    if node.op != "call_method" or node.target != "to" or len(node.args) != 2:
        return False
    source, dtype = node.args
    assert isinstance(source, fx.Node)
    if source.op == "placeholder":
        return dtype is torch.float32 and dtype_of(source) in _OTHERS and len(ops.value_readers(source)) == 1
    return dtype in _OTHERS and dtype_of(source) == torch.float32 and all(user.op == "output" for user in node.users)


def _results(output: fx.Node) -> list[fx.Node]:
    found = dict.fromkeys(leaves(output.args[0]))
    for leaf in found:
        if tensor_meta(leaf) is None and "tensor_meta" in leaf.meta:
            raise BackendError(f"output {leaf.name!r} is no tensor, and an exported graph gives tensors only.")
    return list(found)


def _drop_redundant_activations(graph: fx.Graph) -> fx.Graph:
    """Take ReLU and ReLU6 out where the quantize after it clamps at the very same levels: the same bits, and one kernel."""
    for node in graph.nodes:
        activation = node.kwargs.get("activation") if node.op == "call_function" else None
        readers = list(node.users)
        if activation in ("relu", "relu6") and readers and all(_clamps(reader, activation) for reader in readers):
            found = ops.lookup(node)
            assert found is not None
            node.target = torch.add if found.kind == "add" else getattr(nn.functional, found.kind)
            node.kwargs = {}
    return graph


def _clamps(node: fx.Node, activation: str) -> bool:
    if node.target is not qdq.quantize:
        return False
    scale, zero_point, low, high = (float(level) for level in node.args[1:5])  # type: ignore[arg-type]
    return zero_point == low and (activation == "relu" or round(6.0 / scale) + zero_point >= high)


_NORMS = ("layer_norm", "group_norm", "instance_norm", "rms_norm", "batch_norm")
_FRAGILE = (*_NORMS, "softmax", "log_softmax", "exp", "pow", "sum", "var", "norm", "mean", "cumsum")


def in_half(flat: Flat) -> Flat:
    """The graph with float16 between its operators: scales, biases, activations; inputs and outputs keep their type.

    Softmax, normalisation, exponentials and sums compute in float32 between two casts; nothing is cast between a dequantize
    and its reader.
    """
    module = copy.deepcopy(flat.module).half()
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "placeholder" and _is_float(node):
            _cast_after(node, torch.float16)
        elif node.target in (qdq.dequantize, qdq.dequantize_per_channel):
            node.update_kwarg("dtype", torch.float16)
        elif node.op == "output":
            node.args = (tuple(_cast(node, value, torch.float32) if _is_float(value) else value for value in node.args[0]),)
        elif ops.kind(node) in _FRAGILE and _is_float(node):
            _compute_in_single(module, node)
    graph.lint()
    module.recompile()
    return Flat(module, flat.inputs, flat.outputs, flat.examples)


def _is_float(node: Any) -> bool:
    meta = tensor_meta(node) if isinstance(node, fx.Node) else None
    return meta is not None and meta.dtype == torch.float32


def _cast(before: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    with before.graph.inserting_before(before):
        return before.graph.call_method("to", (value, dtype))


def _cast_after(node: fx.Node, dtype: torch.dtype) -> None:
    with node.graph.inserting_after(node):
        made = node.graph.call_method("to", (node, dtype))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made and user.target is not qdq.quantize)
    if not made.users:
        node.graph.erase_node(made)


def _compute_in_single(module: fx.GraphModule, node: fx.Node) -> None:
    for source in node.all_input_nodes:
        if _is_float(source) or source.op == "get_attr":
            node.replace_input_with(source, _cast(node, source, torch.float32))
    if node.op == "call_module":
        module.get_submodule(str(node.target)).float()
    _cast_after(node, torch.float16)


def to_onnx(flat: Flat, *, dynamic: bool = True) -> Any:
    """The graph as an ``onnx.ModelProto``. Raises BackendError where torch cannot export an operator."""
    reason = missing(*_NEEDED)
    if reason:
        raise BackendError(f"ONNX export needs {' and '.join(_NEEDED)}, and {reason}: pip install 'fxcompress[onnx]'.")
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
                    custom_translation_table=_translations(),
                    input_names=list(flat.inputs),
                    optimize=False,
                    verbose=False,
                )
        except Exception as error:  # whatever the exporter raises means the same: not this way
            failure = failure or error
            continue
        assert exported is not None
        return _tidied(exported.model)
    lines = str(failure).strip().splitlines()
    raise BackendError(f"the graph cannot be written as ONNX: {lines[0] if lines else type(failure).__name__}") from failure


def _free_batch(examples: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Examples with two samples or more, and which of their dimensions may vary."""
    single = all(t.dim() and t.shape[0] == 1 for t in examples)
    widened = tuple(torch.cat([t, t]) for t in examples) if single else examples
    return widened, tuple({0: torch.export.Dim.AUTO} if t.dim() else None for t in examples)


def _name_batch(model: Any) -> None:
    """Call the free leading dimension ``batch`` wherever a value's shape shows it."""
    import onnx_ir as ir

    leading = next((v.shape[0] for v in model.graph.inputs if v.shape and isinstance(v.shape[0], ir.SymbolicDim)), None)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values if leading is not None else ():
        if value.shape is not None:
            named = [ir.SymbolicDim("batch") if size == leading else size for size in value.shape]
            value.shape = ir.Shape(named)


def _translations() -> dict[Any, Any]:
    """Our operators → functions that build their ONNX form."""
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset21 as op

    def number(value: Any, dtype: Any) -> Any:
        return op.Constant(value=ir.tensor(np.array(value, dtype=dtype)))  # type: ignore[arg-type]

    def quantize(input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: Any) -> Any:
        stored = np.dtype(ir.DataType(dtype).numpy())
        real = input.dtype.numpy()
        whole = np.iinfo(stored)
        if (quant_min, quant_max) != (whole.min, whole.max):
            low, high = ((level - zero_point) * scale for level in (quant_min, quant_max))
            input = op.Clip(input, number(low, real), number(high, real))
        return op.QuantizeLinear(input, number(scale, real), number(zero_point, stored))

    def quantize_per_channel(input: Any, scale: Any, axis: int, quant_min: int, quant_max: int, dtype: Any) -> Any:
        stored = np.dtype(ir.DataType(dtype).numpy())
        shape = [1] * len(input.shape)
        shape[axis] = -1
        along = op.Reshape(scale, number(shape, np.int64))
        low, high = (op.Mul(along, number(level, np.float32)) for level in (quant_min, quant_max))
        bounded = op.Min(op.Max(input, low), high)
        return op.QuantizeLinear(bounded, scale, number([0] * int(scale.shape[0]), stored), axis=axis)

    def dequantize(input: Any, scale: float, zero_point: int, dtype: Any = ir.DataType.FLOAT) -> Any:
        real = ir.DataType(dtype).numpy()
        return op.DequantizeLinear(input, number(scale, real), number(zero_point, input.dtype.numpy()))

    def dequantize_per_channel(
        input: Any, scale: Any, axis: int, zero_point: Any = None, dtype: Any = ir.DataType.FLOAT
    ) -> Any:
        if zero_point is None:
            zero_point = number([0] * int(scale.shape[0]), input.dtype.numpy())
        if scale.shape[0] == 1 and input.shape[axis] != 1:
            first = number([0], np.int64)
            return op.DequantizeLinear(input, op.Squeeze(scale, first), op.Squeeze(zero_point, first))
        return op.DequantizeLinear(input, scale, zero_point, axis=axis)

    return {
        qdq.quantize: quantize,
        qdq.quantize_per_channel: quantize_per_channel,
        qdq.dequantize: dequantize,
        qdq.dequantize_per_channel: dequantize_per_channel,
    }


def _tidied(model: Any) -> Any:
    """Constants as initialisers, transposed weights stored transposed, and nothing that is not used; as a proto.

    Every weight has scales and zero points of its own: where two share them, OpenVINO computes both layers in float.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph):
        if node.op_type == "Squeeze":
            _fold_squeeze(node)
        elif node.op_type == "Transpose":
            _fold_transpose(node)
        elif node.op_type == "Conv":
            _drop_made_up_bias(node)
    _name_batch(model)
    common.RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _drop_made_up_bias(node: Any) -> None:
    """Take out the zeros that the exporter expands for a bias that is not there; for volumes they have a wrong shape."""
    maker = node.inputs[2].producer() if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if maker is not None and maker.op_type == "Expand":
        node.resize_inputs(2)


def _fold_squeeze(node: Any) -> None:
    """A scale of one element as a scalar."""
    import onnx_ir as ir

    scale = node.inputs[0]
    if not scale.is_initializer() or scale.const_value.numpy().size != 1:
        return
    value = ir.tensor(scale.const_value.numpy().reshape(()), name=f"{scale.name}_scalar")
    ir.convenience.replace_all_uses_with(node.outputs[0], _initializer(node.graph, value))


def _fold_transpose(node: Any) -> None:
    """Transpose(DequantizeLinear(weight)): store the weight transposed, its scales along the axis where they now are."""
    import numpy as np
    import onnx_ir as ir

    source = node.inputs[0].producer()
    if source is None or source.op_type != "DequantizeLinear" or not source.inputs[0].is_initializer():
        return
    order = node.attributes["perm"].as_ints()
    weight = source.inputs[0]
    moved = ir.tensor(np.ascontiguousarray(weight.const_value.numpy().transpose(order)), name=f"{weight.name}_transposed")
    attributes = []
    if len(source.inputs[1].shape) == 1:
        attributes = [ir.AttrInt64("axis", order.index(source.attributes["axis"].as_int()))]
    made = ir.Node("", "DequantizeLinear", [_initializer(node.graph, moved), *source.inputs[1:]], attributes)
    node.graph.insert_before(node, made)
    made.outputs[0].name = f"{node.outputs[0].name}_value"
    ir.convenience.replace_all_uses_with(node.outputs[0], made.outputs[0])


def _initializer(graph: Any, tensor: Any) -> Any:
    """The initialiser called like ``tensor``, made where there is none."""
    import onnx_ir as ir

    if tensor.name not in graph.initializers:
        stored = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(stored)
    return graph.initializers[tensor.name]
