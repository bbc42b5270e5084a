"""fuse-activations: a layer or addition and the ReLU after it become one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from fxcompress.graph import edit, fused, ops
from fxcompress.graph.shapes import module_of
from fxcompress.pass_base import EXACT, Context, Pass, Promise

__all__ = ["FuseActivations"]


@dataclass(frozen=True)
class FuseActivations(Pass):
    """Fuse ReLU and ReLU6 into the convolution, linear layer or addition before them.

    The arithmetic stays what it was; what changes is that one node stands for both, so that one range is observed (the one
    after the activation) and one kernel runs.

    Options: ``activations``, which ones to fuse; ``layers``, the names of the layers to fuse into, all where it is left out.
    """

    name: ClassVar[str] = "fuse-activations"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed")
    promise: ClassVar[Promise] = EXACT

    activations: tuple[Literal["relu", "relu6"], ...] = ("relu", "relu6")
    layers: tuple[str, ...] | None = None

    def run(self, module: fx.GraphModule, context: Context) -> None:
        calls = _calls_by_module(module)
        done: set[str] = set()
        for node in list(module.graph.nodes):
            activation = activation_of(node)
            if activation not in self.activations:
                continue
            producer = node.all_input_nodes[0]
            if self.layers is not None and ops.owner_name(producer) not in self.layers:
                continue
            reason = _obstacle(producer, activation, calls)
            if reason:
                context.skip(node, reason)
                continue
            if producer.op == "call_module":
                if producer.target not in done:
                    fused.fuse_module(module_of(producer), activation)
                    done.add(str(producer.target))
            else:
                call = ops.read(producer)
                assert call is not None
                producer.target = fused.FUNCTIONS[call.kind]
                producer.op = "call_function"
                producer.update_kwarg("activation", activation)
            edit.bypass(node)


def activation_of(node: fx.Node) -> str | None:
    """``relu`` or ``relu6`` where ``node`` computes it, however it is spelled."""
    call = ops.read(node) if node.op.startswith("call") else None
    if call is None:
        return None
    if call.kind == "hardtanh" and (call["min_val"], call["max_val"]) == (0, 6):
        return "relu6"
    if call.kind == "clamp" and call["min"] == 0 and call["max"] in (None, 6):
        return "relu" if call["max"] is None else "relu6"
    return call.kind if call.kind in fused.ACTIVATIONS else None


def _calls_by_module(module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _obstacle(producer: fx.Node, activation: str, calls: dict[str, list[fx.Node]]) -> str | None:
    call = ops.read(producer) if producer.op.startswith("call") else None
    if call is None or call.kind not in fused.FUNCTIONS:
        return f"it follows {ops.kind(producer)!r}, which no kernel joins with it"
    if call["activation"]:
        return "the operator before it has an activation already"
    if len(ops.value_readers(producer)) > 1:
        return f"{producer.name!r} before it is also used elsewhere"
    if call.kind == "add" and call["alpha"] not in (None, 1):
        return "the addition before it scales an operand"
    if producer.op != "call_module":
        return None
    if type(module_of(producer)) not in fused.MODULES:
        return f"{type(module_of(producer)).__name__} has no fused form"
    readers = [ops.value_readers(node) for node in calls[str(producer.target)]]
    followers = [activation_of(found[0]) if len(found) == 1 else None for found in readers]
    if any(follower != activation for follower in followers):
        return f"{producer.target!r} is called several times, not always with this activation"
    return None
