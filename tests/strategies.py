"""Random small networks and inputs for them: every rewrite must hold on every one.

A network is drawn as a program over a pool of live tensors: convolutions (plain, depthwise, grouped), batch normalisation,
activations in functional, method and module spellings, residual additions, concatenations, splits, pooling, gates, shared
modules, one or two inputs, one or several outputs in nested structures.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Drawn", "Network", "networks"]

SIZE = 8


class Network(nn.Module):
    """Interprets a drawn program; symbolic tracing unrolls it into an ordinary graph."""

    def __init__(
        self, steps: list[tuple[str, tuple[int, ...], int]], modules: list[nn.Module], outputs: Any, inputs: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modules)
        self.steps, self.outputs, self.inputs = steps, outputs, inputs

    def forward(self, x: Tensor, y: Tensor | None = None, *, scale: float = 1.0) -> Any:
        pool = [x] if self.inputs == 1 else [x, y]
        for spelling, operands, layer in self.steps:
            values = [pool[i] for i in operands]
            pool.append(self.layers[layer](*values) if spelling == "module" else FUNCTIONS[spelling](*values))
        return _structured(self.outputs, pool)


def _structured(outputs: Any, pool: list[Any]) -> Any:
    if isinstance(outputs, int):
        return pool[outputs]
    if isinstance(outputs, dict):
        return {key: _structured(value, pool) for key, value in outputs.items()}
    return type(outputs)(_structured(value, pool) for value in outputs)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch.relu": torch.relu,
    "F.relu": F.relu,
    "F.relu_": lambda x: F.relu(x.clone(), inplace=True),
    "method relu": lambda x: x.relu(),
    "F.relu6": F.relu6,
    "F.hardswish": F.hardswish,
    "F.hardsigmoid": F.hardsigmoid,
    "F.silu": F.silu,
    "clamp": lambda x: x.clamp(min=0.0),
    "sigmoid": torch.sigmoid,
    "torch.add": torch.add,
    "operator.add": operator.add,
    "iadd": lambda a, b: operator.iadd(a.clone(), b),
    "mul": operator.mul,
    "cat": lambda a, b: torch.cat([a, b], 1),
    "first half": lambda x: x.chunk(2, dim=1)[0],
    "second half": lambda x: torch.split(x, x.shape[1] // 2, dim=1)[1],
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "flip": lambda x: x.flip(3),
}

SAME_SHAPE = [
    name for name in FUNCTIONS if name.startswith(("torch.relu", "F.", "method", "clamp", "sigmoid", "max", "avg", "gate"))
]


@dataclass
class _Draft:
    """The program while it is drawn: channel count of each live tensor, and the modules made so far."""

    draw: Callable[[Any], Any]
    channels: list[int]
    steps: list[tuple[str, tuple[int, ...], int]]
    modules: list[nn.Module]

    def emit(self, spelling: str, operands: tuple[int, ...], channels: int, module: nn.Module | int | None = None) -> int:
        layer = -1
        if isinstance(module, nn.Module):
            self.modules.append(module)
            layer = len(self.modules) - 1
        elif module is not None:
            layer = module
        self.steps.append((spelling, operands, layer))
        self.channels.append(channels)
        return len(self.channels) - 1

    def pick(self) -> int:
        return int(self.draw(st.integers(0, len(self.channels) - 1)))


def _conv(draft: _Draft) -> None:
    source = draft.pick()
    channels = draft.channels[source]
    kind = draft.draw(st.sampled_from(["plain", "1x1", "depthwise", "grouped"]))
    out = draft.draw(st.sampled_from([4, 6, 8]))
    groups = 1
    if kind == "depthwise":
        groups, out = channels, channels
    elif kind == "grouped" and channels % 2 == 0:
        groups = 2
    kernel = 1 if kind == "1x1" else 3
    bias = draft.draw(st.booleans())
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
    made = draft.emit("module", (source,), out, conv)
    if draft.draw(st.booleans()):
        made = draft.emit("module", (made,), out, nn.BatchNorm2d(out))
    follow = draft.draw(
        st.sampled_from(["none", "nn.ReLU", "nn.ReLU inplace", "F.relu", "F.relu6", "F.hardswish", "F.silu"])
    )
    if follow.startswith("nn"):
        draft.emit("module", (made,), out, nn.ReLU(inplace=follow.endswith("inplace")))
    elif follow != "none":
        draft.emit(follow, (made,), out)


def _same(draft: _Draft) -> None:
    source = draft.pick()
    draft.emit(draft.draw(st.sampled_from(SAME_SHAPE)), (source,), draft.channels[source])


def _binary(draft: _Draft) -> None:
    first = draft.pick()
    equal = [i for i, channels in enumerate(draft.channels) if channels == draft.channels[first]]
    second = draft.draw(st.sampled_from(equal))
    draft.emit(
        draft.draw(st.sampled_from(["torch.add", "operator.add", "iadd", "mul"])), (first, second), draft.channels[first]
    )


def _join(draft: _Draft) -> None:
    first, second = draft.pick(), draft.pick()
    if draft.channels[first] + draft.channels[second] <= 24:
        draft.emit("cat", (first, second), draft.channels[first] + draft.channels[second])


def _halve(draft: _Draft) -> None:
    source = draft.pick()
    if draft.channels[source] % 2 == 0 and draft.channels[source] > 2:
        half = draft.draw(st.sampled_from(["first half", "second half"]))
        draft.emit(half, (source,), draft.channels[source] // 2)


def _share(draft: _Draft) -> None:
    """Call a convolution that exists once more."""
    convs = [i for i, m in enumerate(draft.modules) if isinstance(m, nn.Conv2d)]
    if not convs:
        return
    layer = draft.draw(st.sampled_from(convs))
    conv = draft.modules[layer]
    assert isinstance(conv, nn.Conv2d)
    fitting = [i for i, channels in enumerate(draft.channels) if channels == conv.in_channels]
    if fitting:
        draft.emit("module", (draft.draw(st.sampled_from(fitting)),), conv.out_channels, layer)


STEPS = (_conv, _conv, _conv, _same, _binary, _join, _halve, _share)


class Drawn:
    """A network in eval mode with lived-in statistics, arguments for one call, and the same as a batch of a dataloader."""

    def __init__(self, model: Network, call: tuple[Tensor, ...]) -> None:
        self.model, self.call = model, call
        self.batch: Any = {"x": call[0], "y": call[1]} if len(call) == 2 else call[0]

    def __repr__(self) -> str:
        return f"{self.model.steps} -> {self.model.outputs} with {[*self.model.layers]}"


@st.composite
def networks(draw: Any, max_steps: int = 8) -> Drawn:
    """A network of up to ``max_steps`` steps and a batch of 2."""
    inputs = draw(st.sampled_from([1, 1, 1, 2]))
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = _Draft(draw, [4] * inputs, [], [])
        _conv(draft)
        for _ in range(draw(st.integers(0, max_steps))):
            draw(st.sampled_from(STEPS))(draft)
        _conv(draft)  # so that no network is without a layer that counts
        last = len(draft.channels) - 1
        if draw(st.booleans()):
            last = _head(draft, last)
        outputs = draw(st.sampled_from([last, (last, 0), [last, (inputs,)], {"out": last, "aux": {"first": inputs}}]))
        model = Network(draft.steps, draft.modules, outputs, inputs)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = torch.randn(module.num_features) * 0.1
                module.running_var = torch.rand(module.num_features) + 0.5
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.1)
        call = tuple(torch.randn(2, 4, SIZE, SIZE) for _ in range(inputs))
    return Drawn(model.eval(), call)


def _head(draft: _Draft, source: int) -> int:
    channels = draft.channels[source]
    pooled = draft.emit("module", (source,), channels, nn.AdaptiveAvgPool2d(1))
    flat = draft.emit("module", (pooled,), channels, nn.Flatten())
    return draft.emit("module", (flat,), 5, nn.Linear(channels, 5))
