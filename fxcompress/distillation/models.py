"""Models on their way into a distiller: that they have values, their number type, their graph, and what to run them on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import ConfigError
from fxcompress.graph import propagate, trace
from fxcompress.graph.example import guess_example
from fxcompress.graph.inputs import Arguments, arguments
from fxcompress.graph.tree import device_of

__all__ = ["check_values", "common_dtype", "deterministic", "in_dtype", "traced"]

log = logging.getLogger("fxcompress")


def check_values(model: nn.Module, who: str) -> None:
    """ConfigError where parameters or buffers are on the meta device."""
    empty = [name for table in (model.named_parameters(), model.named_buffers()) for name, t in table if t.is_meta]
    if empty:
        raise ConfigError(
            f"the {who} has no values: {len(empty)} of its tensors are on the meta device ({', '.join(empty[:3])}, …). "
            "Load its weights (load_state_dict(..., assign=True)) or build it on a real device."
        )


def common_dtype(model: nn.Module) -> torch.dtype | None:
    """The number type of all parameters; None where they have several, or there are none."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def in_dtype(call: Arguments, dtype: torch.dtype | None) -> Arguments:
    """``call`` with its fractional numbers as ``dtype``; None: as they are."""
    if dtype is None:
        return call
    return Arguments(*pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tuple(call)))


@contextmanager
def deterministic(seed: int, dtype: torch.dtype | None) -> Iterator[None]:
    """Make layers as ``seed`` says, in float64 where the student is, whatever the defaults are."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64 if dtype is torch.float64 else torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def traced(model: nn.Module, example_inputs: Any, who: str, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """``model`` as a graph with the shape of every value. ``dtype`` is what its example inputs are brought to."""
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, nn.Module):
        log.warning(
            "the %s was compiled; what is compared by layers runs as a graph of its own: compile the distiller.", who
        )
        model = original
    example = example_inputs if example_inputs is not None else guess_example(model)
    if example is None:
        raise ConfigError(
            f"the features of {type(model).__name__} have no known shapes, and its first layer does not tell its input: "
            "give example_inputs=."
        )
    device = device_of(model)
    call = in_dtype(arguments(example).to(device), dtype)
    graph = trace(model, call, copied=True)
    if any("tensor_meta" not in node.meta for node in graph.graph.nodes if node.op.startswith("call")):
        propagate(graph, call)
    return graph
