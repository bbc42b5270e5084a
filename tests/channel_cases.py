"""Small models that are hard to prune, and the truth about what is left of them.

A case is an eager model and the shapes that its tensors have when half of every group of channels has gone. The truth is the
eager model itself in float64: every entry that the smaller model no longer holds is set to zero, and what normalises or
averages over channels leaves out those that are silent. Values are all distinct, so a tensor of the smaller model says by
itself which entries of the dense one it kept; nothing is taken from the record of the cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxcompress.pruning import StructuredPruner

__all__ = ["Case", "Hostile", "c3", "check", "error", "image", "lived_in", "net", "prune", "remarks", "silenced"]
__all__ += ["LeaveOutTheSilent", "shapes", "tokens"]

Shapes = Mapping[str, tuple[int, ...]]


def net(forward: Callable[..., Any], **parts: Any) -> Any:
    """A module of this forward function; parameters, buffers and layers by name."""
    model = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            model.register_buffer(name, part)
        else:
            setattr(model, name, part)
    return model


def image(channels: int = 3, size: int = 10, batch: int = 2, seed: int = 0) -> Tensor:
    """A batch of images in float64."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(channels: int = 6, length: int = 7, batch: int = 2, seed: int = 0) -> Tensor:
    """A batch of sequences in float64."""
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """``build`` makes the model, ``shapes`` what half leaves of it (``{}``: nothing goes); ``more`` are other inputs to try.

    ``frozen``   layer → a part of the reason why its channels stay
    ``options``  of the pruner
    ``plain``    makes the computed weights of the dense model plain, where there are any
    """

    build: Callable[[], Any]
    shapes: Shapes
    inputs: Any = field(default_factory=lambda: (image(),))
    more: Iterable[Any] = field(default_factory=lambda: [(image(size=13, batch=3),)])
    frozen: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    plain: Callable[[Any], Any] = lambda model: model


@dataclass(frozen=True)
class Hostile:
    """A model to be pruned by every policy: ``build`` makes it, ``inputs`` are its example, ``more`` other inputs to try.

    ``frozen``      a part of the reason why nothing of it can go
    ``statistics``  it divides by what goes, or compares it, which zeros in the eager model cannot tell: the oracles judge it
    ``options``     of the pruner
    """

    build: Callable[[], Any]
    inputs: tuple[Any, ...] = field(default_factory=lambda: (image(),))
    more: Iterable[Any] = field(default_factory=lambda: [(image(size=13, batch=3),)])
    frozen: str = ""
    statistics: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


conv, linear = nn.Conv2d, nn.Linear
X, T = (image(),), (tokens(),)
MORE = [(image(size=13, batch=3),)]
TOKENS = (T, [(tokens(length=4, batch=3),)])


def c3(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return conv(inputs, outputs, 3, padding=1, **options)


def lived_in(model: Any, seed: int = 0) -> Any:
    """The model in float64 and eval mode, every parameter and floating-point buffer with values of its own."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if name.endswith(("running_var", "_weight_v", "_u")):
                tensor.uniform_(0.5, 1.5, generator=generator)
                continue
            fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 4
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / fan**0.5)
    return model


def prune(model: Any, inputs: Any, **options: Any) -> tuple[fx.GraphModule, StructuredPruner]:
    """Half of the channels, proved by the oracles, and the pruner with its ledger."""
    pruner = StructuredPruner(**{"sparsity": 0.5, "round_to": 1, "progress": False, **options})
    return pruner.prune(model, example_inputs=inputs), pruner


def remarks(pruner: StructuredPruner) -> str:
    """Everything the ledger remarks."""
    return "\n".join(f"{remark}" for row in pruner.ledger.rows for remark in row.remarks)


class LeaveOutTheSilent(TorchFunctionMode):
    """Normalisation, softmax and means over channels, of which those count that are not zero everywhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {{"axis": "dim", "keepdims": "keepdim"}.get(name, name): value for name, value in (kwargs or {}).items()}
        rule = LEAVING_OUT.get(func)
        return rule(func, *args, **kwargs) if rule is not None else func(*args, **kwargs)


def _heard(x: Tensor, dims: Iterable[int], apart: Iterable[int] = ()) -> Tensor:
    """1 where an index along ``dims`` is not silent, in a shape that broadcasts with ``x``.

    Every index of the dimensions ``apart`` (heads, groups) is asked by itself: each may have lost other channels.
    """
    heard = torch.ones((), dtype=x.dtype)
    for dim in dims:
        rest = [d for d in range(x.dim()) if d not in (dim % x.dim(), *apart)]
        heard = heard * (x != 0).sum(rest, keepdim=True).ne(0).to(x.dtype)
    return heard


def _layer_norm(func: Any, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    heard = ((weight != 0).to(x.dtype) if weight is not None else _heard(x, dims)).expand_as(x)
    count = heard.sum(dims, keepdim=True)
    mean = (x * heard).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * heard).sum(dims, keepdim=True) / count
    y = (x - mean) * heard / (variance + eps).sqrt()
    return (y * weight if weight is not None else y) + (bias if bias is not None else 0.0)


def _rms_norm(func: Any, x: Tensor, shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
    heard = ((weight != 0).to(x.dtype) if weight is not None else _heard(x, range(-len(shape), 0))).expand_as(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(shape), 0))
    y = x / ((x.square() * heard).sum(dims, keepdim=True) / heard.sum(dims, keepdim=True) + eps).sqrt()
    return y * weight if weight is not None else y


def _group_norm(func: Any, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    heard = (weight != 0).to(x.dtype) if weight is not None else _heard(x, [1]).reshape(-1)
    grouped = x.reshape(x.shape[0], groups, -1)
    mask = heard.reshape(1, -1, 1).expand(x.shape[0], -1, x[0, 0].numel()).reshape(grouped.shape)
    count = mask.sum(2, keepdim=True).clamp(min=1)
    mean = (grouped * mask).sum(2, keepdim=True) / count
    variance = ((grouped - mean).square() * mask).sum(2, keepdim=True) / count
    y = ((grouped - mean) * mask / (variance + eps).sqrt()).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return y * weight.reshape(shape) + bias.reshape(shape) if weight is not None else y


def _softmax(func: Any, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
    heads = range(1, x.dim() - 2) if dim % x.dim() == x.dim() - 1 else ()
    powers = x.exp() * _heard(x, [dim], heads)
    return powers / powers.sum(dim, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _var(func: Any, x: Tensor, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    """The variance over channels, the first of ``dim``, group by group."""
    dims = [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)]
    heard = _heard(x, dims[:1], range(1, dims[0])).expand_as(x)
    count = heard.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * heard).sum(dims, keepdim=True) / count
    squares = ((x - mean).square() * heard).sum(dims, keepdim=keepdim)
    return squares / (count.reshape(squares.shape) - int(unbiased))


def _std(func: Any, x: Tensor, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return _var(func, x, dim, unbiased, keepdim).sqrt()


def _mean(func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if x.dim() == 4 and {d % 4 for d in dims} <= {2, 3}:  # a row of an image may be zero without being silent
        return func(x, dims, keepdim)
    heard = _heard(x, dims).expand_as(x)
    return (x * heard).sum(dims, keepdim=keepdim) / heard.sum(dims, keepdim=keepdim)


def _amax(func: Any, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    dims = [dim] if isinstance(dim, int) else list(dim)
    return func(x.masked_fill(_heard(x, dims) == 0, -torch.inf), dim, keepdim)


LEAVING_OUT: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    torch.mean: _mean,
    Tensor.mean: _mean,
    Tensor.amax: _amax,
    Tensor.softmax: _softmax,
    Tensor.var: _var,
    Tensor.std: _std,
}


def silenced(dense: Any, small: fx.GraphModule) -> Any:
    """A copy of the dense eager model with a zero for every entry that the smaller model does not hold."""
    model = copy.deepcopy(dense)
    held = {**dict(small.named_parameters(remove_duplicate=False)), **dict(small.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            left = held.get(name, _split_projection(name, held))
            if left is not None and left.shape != tensor.shape and (tensor.is_floating_point() or tensor.is_complex()):
                tensor.copy_(torch.where(_is_in(tensor, left), tensor, torch.zeros_like(tensor)))
    return model


def _is_in(tensor: Tensor, left: Tensor) -> Tensor:
    return torch.isin(tensor.real, left.real) if tensor.is_complex() else torch.isin(tensor, left)


def _split_projection(name: str, held: Mapping[str, Tensor]) -> Tensor | None:
    """What is left of a projection of attention that was taken apart."""
    layer, found, kind = name.rpartition("in_proj_")
    parts = [held.get(f"{layer}{letter}_proj_{kind}") for letter in "qkv"] if found else []
    return torch.cat([part.flatten() for part in parts if part is not None]) if any(p is not None for p in parts) else None


def error(expected: Any, found: Any) -> float:
    """The largest difference over the largest magnitude."""
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if isinstance(a, Tensor):
            assert a.shape == b.shape
            gap = (a - b).abs().max().item()
            assert gap == gap
            worst = max(worst, gap / a.abs().max().item())
    return worst


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer by name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in named}


def check(case: Case, criterion: str = "random") -> tuple[Any, fx.GraphModule, StructuredPruner]:
    """Hold one case against the truth; returns (dense model, smaller model, pruner)."""
    dense = lived_in(case.build())
    before = copy.deepcopy(dense.state_dict())
    inputs = case.inputs if isinstance(case.inputs, (tuple, dict)) else (case.inputs,)
    small, pruner = prune(dense, inputs, criterion=criterion, **case.options)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the caller's model changed"
    said = remarks(pruner)
    assert "the analysis is wrong" not in said, said
    for layer, reason in case.frozen.items():
        assert any(layer in line and reason in line for line in said.splitlines()), f"{layer}: {reason!r} not in:\n{said}"
    found, whole = shapes(small), shapes(dense)
    assert {name: found[name] for name in case.shapes} == dict(case.shapes), f"left: {found}"
    assert found != whole, "nothing was removed"
    truth = silenced(case.plain(copy.deepcopy(dense)), small)
    for call in [inputs, *case.more]:
        with torch.no_grad(), LeaveOutTheSilent():
            expected = truth(**call) if isinstance(call, dict) else truth(*call)
        with torch.no_grad():
            result = small(**call) if isinstance(call, dict) else small(*call)
        assert error(expected, result) <= 1e-10
    return dense, small, pruner
