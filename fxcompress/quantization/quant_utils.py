"""Tools around quantization: what can be quantized, fusion, the arithmetic itself, size, latency, accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress import backends
from fxcompress.errors import ConfigError, DataError, did_you_mean
from fxcompress.graph import spellings
from fxcompress.graph.cost import stored_bytes
from fxcompress.graph.inputs import Arguments, arguments, tensors_in
from fxcompress.graph.island import regions
from fxcompress.graph.qdq import along
from fxcompress.graph.results import output_snr
from fxcompress.graph.shapes import example_of
from fxcompress.graph.trace import trace
from fxcompress.graph.tree import check_module, device_of, evaluating
from fxcompress.manager import PassManager
from fxcompress.quantization import grid as grids
from fxcompress.quantization.compare import compare_activations, compare_weights
from fxcompress.quantization.comparison import ActivationRow, Comparison, WeightRow
from fxcompress.quantization.quantizer import in_eval_mode
from fxcompress.timing import Timing, interleaved

__all__ = [
    "ActivationRow",
    "Comparison",
    "Timing",
    "WeightRow",
    "auto_fuse",
    "benchmark_latency",
    "compare_activations",
    "compare_weights",
    "compute_scale_zp",
    "compute_snr",
    "dequantize_tensor",
    "fuse_modules",
    "get_model_size",
    "get_quantizable_modules",
    "quantize_tensor",
]

_PASSED_THROUGH = ("identity", "dropout")


def get_quantizable_modules(model: nn.Module, backend: str = "fbgemm") -> dict[str, nn.Module]:
    """The modules that a backend can run in integers, by qualified name, in the model's order.

    Layers with weights, batch normalisation (it is folded), activations, pooling, reshapes; LSTM and GRU where the backend
    quantizes them at run time. Whether a given call qualifies depends on where it stands: a quantizer's ledger says so.
    """
    check_module(model)
    chosen = backends.find(backend)
    kinds = ({*chosen.rules, *chosen.dynamic, "batch_norm"}) - set(_PASSED_THROUGH)
    return {name: module for name, module in model.named_modules() if spellings.module_kind(module) in kinds}


def fuse_modules(
    model: nn.Module, modules_to_fuse: Sequence[str] | Sequence[Sequence[str]], example_inputs: Any = None
) -> fx.GraphModule:
    """A copy of ``model`` in which each named group is one layer: Conv+BN, Conv+BN+ReLU, Conv+ReLU, Linear+ReLU, Linear+BN.

    ``modules_to_fuse`` is one group of qualified names, or a list of groups, each in the order it runs. The fused layer has
    the first one's name. Raises ConfigError for a group that is no such sequence in the graph, with the reason.
    """
    groups = _groups(modules_to_fuse)
    traced = trace(in_eval_mode(model), example_inputs)
    folds, fuses = [], []
    for group in groups:
        kinds = [_kind_in(model, name) for name in group]
        if not kinds or tuple(kinds[1:]) not in _PATTERNS or not kinds[0].startswith(("conv", "linear")):
            known = ", ".join(" + ".join(("conv or linear", *rest)) for rest in _PATTERNS)
            raise ConfigError(f"{group} is {' + '.join(kinds) or 'empty'}; what fuses is {known}.")
        _check_sequence(traced, group)
        folds += [group[0]] if "batch_norm" in kinds else []
        fuses += [group[0]] if kinds[-1] != "batch_norm" else []
    steps = [{"fold-batchnorm": {"layers": folds}}, {"fuse-activations": {"layers": fuses}}]
    manager = PassManager(steps, reproducer=False, progress=False)
    fused = manager.run(traced, example_inputs)
    reasons = {remark.node: remark.reason for row in manager.ledger.rows for remark in row.remarks}
    for group in groups:
        for user in (user for node in _calls(fused, group[0]) for user in node.users):
            if user.target in group:
                reason = reasons.get(str(user.target), "it was left alone")
                raise ConfigError(f"{' + '.join(group)} did not fuse at {user.target!r}: {reason}.")
    return fused


def _groups(modules_to_fuse: Any) -> list[list[str]]:
    listed = list(modules_to_fuse) if isinstance(modules_to_fuse, Iterable) else modules_to_fuse
    if isinstance(modules_to_fuse, str) or not isinstance(listed, list) or not all(isinstance(g, Iterable) for g in listed):
        raise ConfigError(f"modules_to_fuse is {modules_to_fuse!r}; it is a list of names, or a list of such lists.")
    return [listed] if all(isinstance(name, str) for name in listed) else [list(group) for group in listed]


def _calls(model: fx.GraphModule, layer: str) -> list[fx.Node]:
    nodes = [node for graph in regions(model).values() for node in graph.graph.nodes]
    return [node for node in nodes if node.op == "call_module" and node.target == layer]


def _check_sequence(traced: fx.GraphModule, group: list[str]) -> None:
    """Raise ConfigError unless, wherever the first layer is called, the others follow it one by one."""
    calls = _calls(traced, group[0])
    if not calls:
        raise ConfigError(f"{' + '.join(group)}: the graph does not call {group[0]!r} as a layer.")
    for node in calls:
        for name in group[1:]:
            users = list(node.users)
            if len(users) != 1 or users[0].target != name:
                found = ", ".join(str(user.target if user.op == "call_module" else user.name) for user in users)
                raise ConfigError(f"{' + '.join(group)}: {node.target!r} is not followed by {name!r} alone, but by {found}.")
            node = users[0]


_PATTERNS = (("batch_norm",), ("batch_norm", "relu"), ("batch_norm", "relu6"), ("relu",), ("relu6",))


def _kind_in(model: nn.Module, name: str) -> str:
    names = dict(model.named_modules())
    if name not in names:
        raise ConfigError(f"no layer is called {name!r}.{did_you_mean(str(name), names)}")
    return spellings.module_kind(names[name]) or type(names[name]).__name__


def auto_fuse(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """A copy of ``model`` in which everything that fuses is fused: batch normalisation, ReLU, ReLU6."""
    manager = PassManager(["fold-batchnorm", "fuse-activations"], reproducer=False, progress=False)
    return manager.run(in_eval_mode(model), example_inputs)


def compute_scale_zp(
    min_val: float | Tensor,
    max_val: float | Tensor,
    dtype: str | torch.dtype = "int8",
    *,
    symmetric: bool = True,
    bits: int = 8,
) -> tuple[Any, Any]:
    """Scale and zero point that put ``[min_val, max_val]`` on the grid of ``dtype`` (``int8`` or ``uint8``).

    Numbers give a float and an int, tensors (any shape, elementwise) a float32 and an int32 tensor. Symmetric int8 has scale
    max|x| / 127 and zero point 0; symmetric uint8 zero point 128, or 0 where no value is negative; an affine grid holds 0
    exactly. A range without extent gets a step as for one of 1. Raises ConfigError where min exceeds max, DataError for NaN.
    """
    if not isinstance(symmetric, bool):
        raise ConfigError(f"symmetric is {symmetric!r}; it is True or False.")
    target = grids.grid(_dtype_name(dtype), symmetric=symmetric, bits=bits)
    low, high = (_numbers(n, v, torch.float64) for n, v in (("min_val", min_val), ("max_val", max_val)))
    if low.shape != high.shape and low.dim() and high.dim():
        raise ConfigError(f"min_val has shape {tuple(low.shape)} and max_val {tuple(high.shape)}.")
    scale, zero_point = grids.compute_scale_zp(low, high, target)
    if isinstance(min_val, Tensor) or isinstance(max_val, Tensor):
        return scale, zero_point
    return float(scale), int(zero_point)


def quantize_tensor(
    tensor: Tensor, scale: float | Tensor, zp: int | Tensor, dtype: str | torch.dtype = "int8", *, axis: int = 0
) -> Tensor:
    """``tensor`` as integers: round(x / scale), half to even, + zp, held to the range of ``dtype``.

    A scale of several elements is one per index of ``axis``. Raises DataError for NaN, ConfigError for a scale that is not
    positive and finite, or that does not fit the axis.
    """
    target = grids.grid(_dtype_name(dtype), symmetric=False)
    scales, zeros = _along(tensor, scale, zp, axis)
    if bool(((zeros < target.quant_min) | (zeros > target.quant_max) | (zeros != zeros.round())).any()):
        raise ConfigError(f"zp is {zp}; a zero point is an integer from {target.quant_min} to {target.quant_max}.")
    if bool(torch.isnan(tensor).any()):
        raise DataError("a tensor to quantize holds NaN.")
    levels = torch.round(tensor.to(torch.float32) / scales) + zeros
    return levels.clamp_(target.quant_min, target.quant_max).to(target.dtype)


def dequantize_tensor(tensor: Tensor, scale: float | Tensor, zp: int | Tensor, *, axis: int = 0) -> Tensor:
    """(q − zp) · scale in float32; a scale of several elements is one per index of ``axis``."""
    scales, zeros = _along(tensor, scale, zp, axis)
    return (tensor.to(torch.float32) - zeros) * scales


def _along(tensor: Tensor, scale: float | Tensor, zp: int | Tensor, axis: int) -> tuple[Tensor, Tensor]:
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"the tensor is a {type(tensor).__name__}; it is a torch.Tensor.")
    if tensor.is_complex() or tensor.is_quantized:
        raise ConfigError(f"the tensor is of {tensor.dtype}; it is of real numbers.")
    scales, zeros = (_numbers(name, value, torch.float32) for name, value in (("scale", scale), ("zp", zp)))
    if not bool(((scales > 0) & torch.isfinite(scales)).all()):
        raise ConfigError(f"the scale is {scale}; a scale is positive and finite.")
    spread = []
    for name, values in (("scale", scales), ("zp", zeros)):
        if values.numel() == 1:
            spread.append(values.reshape(()))
            continue
        if values.dim() != 1 or not -tensor.dim() <= axis < tensor.dim() or values.numel() != tensor.shape[axis]:
            raise ConfigError(
                f"{name} has shape {tuple(values.shape)}; axis {axis} of {tuple(tensor.shape)} does not fit it."
            )
        spread.append(along(values, tensor.dim(), axis))
    return spread[0].to(tensor.device), spread[1].to(tensor.device)


def _numbers(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    """A number, or a tensor or sequence of numbers, as a tensor; ConfigError for anything else."""
    try:
        return value.to(dtype) if isinstance(value, Tensor) else torch.as_tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} is {value!r}; it is a number or a tensor.") from error


def _dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def get_model_size(model: nn.Module, quantized: bool = False) -> int:
    """Bytes of what must be stored for inference: parameters and buffers, packed weights included, shared ones once.

    ``quantized`` asks for the size with int8 weights: of a float model, what it would be once the weights of its
    quantizable layers are int8 with a scale per channel. A quantized model has one size.
    """
    check_module(model)
    size = stored_bytes(model) + sum(_packed_bytes(module) for module in model.modules())
    if not quantized:
        return size
    layers = get_quantizable_modules(model).values()
    weights = {
        id(p): p for layer in layers for p in layer.parameters(recurse=False) if p.dim() > 1 and p.is_floating_point()
    }
    return size - sum(w.numel() * (w.element_size() - 1) - 4 * w.shape[0] for w in weights.values())


def _packed_bytes(module: nn.Module) -> int:
    """Bytes of weights that a module holds in packed form only, as torch's own quantized layers do."""
    packed = vars(module).get("_packed_params")
    tensors = packed.unpack() if isinstance(packed, torch.ScriptObject) and hasattr(packed, "unpack") else ()
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(tensors) if isinstance(t, Tensor))


def benchmark_latency(
    model: nn.Module,
    input_shape: Sequence[int] | Sequence[Sequence[int]],
    *,
    runs: int = 50,
    warmup: int = 5,
    seconds: float = 30.0,
    example_inputs: Any = None,
) -> Timing:
    """Seconds per call on random inputs of ``input_shape`` (or of several shapes): median, p90, minimum, number of runs.

    Calls ``model`` in eval mode, ``warmup`` times first; stops early after ``seconds``; leaves it in the mode it came in. On
    a GPU every call is synchronised. Random inputs are of the number type that the model was traced with, or of its
    parameters; ``example_inputs`` are used instead where they are given: token numbers, masks, keywords.
    """
    check_module(model)
    if runs < 1 or warmup < 0:
        raise ConfigError(f"runs is {runs} and warmup {warmup}; runs is at least 1, warmup at least 0.")
    call = arguments(example_inputs) if example_inputs is not None else _random(input_shape, _number_type(model))
    call = call.to(device_of(model))
    try:
        with evaluating(model):
            return interleaved({"model": lambda: call(model)}, runs=runs, warmup=warmup, seconds=seconds)["model"]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"inputs of shape {input_shape} do not run through the model: {reason}") from error


def _number_type(model: nn.Module) -> torch.dtype:
    example = example_of(model) if isinstance(model, fx.GraphModule) else None
    known = list(model.parameters()) if example is None else tensors_in(tuple(example))
    return next((t.dtype for t in known if t.is_floating_point()), torch.float32)


def _random(shapes: Any, dtype: torch.dtype) -> Arguments:
    several = list(shapes) if isinstance(shapes, Sequence) and shapes and not isinstance(shapes[0], int) else [shapes]
    for shape in several:
        if not isinstance(shape, Sequence) or not shape or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ConfigError(f"input_shape is {shapes!r}; it is a shape of positive integers, or a list of shapes.")
    generator = torch.Generator().manual_seed(0)
    return Arguments(
        tuple(
            torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu").to(dtype) for shape in several
        ),
        {},
    )


def compute_snr(original: Any, quantized: Any) -> float:
    """10·log₁₀(Σx² / Σ(x − y)²) in dB over all tensors of the two together; inf for equal values.

    Tensors of torch's quantized types count as what they stand for. Raises ConfigError where shapes or keys differ,
    DataError for NaN or infinite values.
    """
    first, second = ([_dequantized(t) for t in tensors_in(value)] for value in (original, quantized))
    if isinstance(original, Mapping) and isinstance(quantized, Mapping) and set(original) != set(quantized):
        raise ConfigError(f"the keys are {list(original)} and {list(quantized)}.")
    if [t.shape for t in first] != [t.shape for t in second] or not first:
        raise ConfigError(f"the shapes are {[tuple(t.shape) for t in first]} and {[tuple(t.shape) for t in second]}.")
    if not all(bool(torch.isfinite(t).all()) for t in (*first, *second)):
        raise DataError("NaN or infinite values have no signal-to-noise ratio.")
    return output_snr(first, second)


def _dequantized(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor
