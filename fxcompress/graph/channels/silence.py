"""The oracle of silence: the dense model, with the removed channels kept out of every sum and every statistic.

It is run by an interpreter of its own, which knows the operators' mathematics and nothing of the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxcompress.graph import ops
from fxcompress.graph.channels.analysis import Channels
from fxcompress.graph.channels.atoms import Ints
from fxcompress.graph.channels.calls import operand_names
from fxcompress.graph.channels.kept import Kept, Mask, select
from fxcompress.graph.channels.labels import Value
from fxcompress.graph.channels.walk import Walk
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.recorder import Recorder
from fxcompress.graph.shapes import module_of

__all__ = ["Silent", "silenced"]


def silenced(channels: Channels, removed: Ints, call: Arguments) -> Any:
    """What the dense graph that was analysed computes for ``call`` when the classes ``removed`` take no part."""
    return Silent(channels.walk, Kept.without(channels.root, removed)).record(call)


class Silent(Recorder):
    """Runs the dense graph with removed entries kept out of sums and statistics."""

    def __init__(self, walk: Walk, kept: Kept) -> None:
        super().__init__(walk.module)
        self.walk, self.left = walk, kept

    def run_node(self, n: fx.Node) -> Any:
        call = self.walk.call(n) if n.op.startswith("call") else None
        rule = _SILENT.get(call.kind) or _SILENT.get(call.op.family) if call is not None else None
        if call is None or rule is None or not self._matters(n):
            return super().run_node(n)
        self.current = n
        return rule(self, call)

    def _matters(self, node: fx.Node) -> bool:
        values = [v for source in node.all_input_nodes for v in pytree.tree_leaves(self.walk.env.get(source))]
        owned = [
            v for name, v in self.walk.tensors.items() if node.op == "call_module" and name.startswith(f"{node.target}.")
        ]
        return any(isinstance(v, Value) and self.left.touches(v) for v in [*values, *owned])

    def masks(self, argument: Any) -> dict[int, Mask]:
        """The masks of an operand."""
        if isinstance(argument, ops.Attr):
            value: Any = self.walk.tensors.get(self.walk.canonical.get(argument.name, argument.name))
        else:
            value = self.walk.env.get(argument)
        return self.left.masks(value) if isinstance(value, Value) else {}

    def tensor(self, argument: Any) -> Any:
        """An operand's tensor."""
        if isinstance(argument, ops.Attr):
            return self.fetch_attr(argument.name)
        return self.env[argument] if isinstance(argument, fx.Node) else argument

    def again(self, call: ops.Call, **replaced: torch.Tensor) -> Any:
        """The call, with some node operands' tensors replaced, by node name."""
        saved = {node: self.env[node] for node in call.node.all_input_nodes if node.name in replaced}
        for node in saved:
            self.env[node] = replaced[node.name]
        try:
            return super().run_node(call.node)
        finally:
            self.env.update(saved)


def zeroed(tensor: torch.Tensor, masks: dict[int, Mask]) -> torch.Tensor:
    """``tensor`` with removed entries zero."""
    for mask in masks.values():
        tensor = torch.where(
            torch.from_numpy(np.ascontiguousarray(mask)).to(tensor.device), tensor, torch.zeros_like(tensor)
        )
    return tensor


def scattered(small: torch.Tensor, like: tuple[int, ...], masks: dict[int, Mask]) -> torch.Tensor:
    """The inverse of :func:`select`: the kept part in its places, zeros elsewhere."""
    numbers = torch.arange(int(np.prod(like)), device="cpu").reshape(like)
    full = small.new_zeros(int(np.prod(like)))
    full[select(numbers, masks).reshape(-1)] = small.reshape(-1)
    return full.reshape(like)


def _sum(run: Silent, call: ops.Call) -> Any:
    replaced = {}
    for node in call.node.all_input_nodes:
        value = run.env.get(node)
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            replaced[node.name] = zeroed(run.env[node], run.masks(node))
    return run.again(call, **replaced)


def _statistics(run: Silent, call: ops.Call) -> Any:
    """Normalisation over what is left."""
    masks, x, eps = run.masks(call["input"]), run.tensor(call["input"]), call["eps"]

    def left(name: str) -> Any:
        return select(run.tensor(call[name]), run.masks(call[name])) if call[name] is not None else None

    small, weight, bias = left("input"), left("weight"), left("bias")
    if call.kind == "group_norm":
        groups = _groups_left(call["num_groups"], masks.get(1), x.shape[1])
        result = F.group_norm(small, groups, weight, bias, eps)
    else:
        shape = small.shape[small.dim() - _normalised(call) :]
        if call.kind == "layer_norm":
            result = F.layer_norm(small, shape, weight, bias, eps)
        else:
            result = F.rms_norm(small, shape, weight, eps)
    return scattered(result, tuple(x.shape), masks)


def _per_channel(run: Silent, call: ops.Call) -> Any:
    """Normalisation channel by channel, over what is left of each."""
    source = call["input"]
    masks = {dim: mask for dim, mask in run.masks(source).items() if dim != 1}
    whole = run.tensor(source)
    result = run.again(call, **dict.fromkeys(operand_names(call.node, source), select(whole, masks)))
    return scattered(result, tuple(whole.shape), masks) if masks else result


def _normalised(call: ops.Call) -> int:
    shape = call["normalized_shape"]
    return len(shape) if isinstance(shape, (tuple, list)) else 1


def _groups_left(groups: int, mask: Mask | None, channels: int) -> int:
    if mask is None:
        return groups
    left = mask.reshape(-1).reshape(groups, channels // groups).any(axis=1)
    return int(left.sum())


def _over_what_is_left(run: Silent, call: ops.Call) -> Any:
    """A reduction or a softmax of the kept part, put back in place."""
    source = call["input"]
    if isinstance(call["dim"], fx.Node):  # the larger of two tensors is no reduction
        return run.again(call)
    small = select(run.tensor(source), run.masks(source))
    result = run.again(call, **dict.fromkeys(operand_names(call.node, source), small))
    values = pytree.tree_leaves(run.walk.env.get(call.node))
    leaves, spec = pytree.tree_flatten(result)
    return pytree.tree_unflatten([_put_back(run, r, v) for r, v in zip(leaves, values, strict=True)], spec)


def _put_back(run: Silent, small: Any, value: Any) -> Any:
    """One result of the kept part, in a tensor of the whole size."""
    masks = run.left.masks(value) if isinstance(value, Value) else {}
    if not isinstance(small, torch.Tensor) or not masks:
        return small
    return scattered(small, tuple(masks[d].shape[d] if d in masks else size for d, size in enumerate(small.shape)), masks)


def _recurrent(run: Silent, call: ops.Call) -> Any:
    """A recurrence whose removed units have zeros in every tensor: they stay at zero."""
    saved = []
    held = module_of(call.node).named_parameters() if call.node.op == "call_module" else ()
    try:
        for name, parameter in held:
            masks = run.masks(ops.Attr(f"{call.node.target}.{name}"))
            if masks:
                saved.append((parameter, parameter.data))
                parameter.data = zeroed(parameter.data, masks)
        return _sum(run, call)
    finally:
        for parameter, data in saved:
            parameter.data = data


_SILENT: dict[str, Callable[[Silent, ops.Call], Any]] = {
    "contraction": _sum,
    "attention": _sum,
    "cosine_similarity": _sum,
    "cdist": _sum,
    "recurrent": _recurrent,
    "batch_norm": _per_channel,
    "instance_norm": _per_channel,
    "layer_norm": _statistics,
    "rms_norm": _statistics,
    "group_norm": _statistics,
    "softmax": _over_what_is_left,
    "log_softmax": _over_what_is_left,
    "softmin": _over_what_is_left,
    "softmax2d": _over_what_is_left,
    "normalize": _over_what_is_left,
    "reduction": _over_what_is_left,
}
"""Kind or family → how it runs without the removed entries; everything else runs as it is."""
