"""The view of a tapped graph: the values that taps name, beside the output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxcompress.errors import TraceError
from fxcompress.graph.inplace import reuse_memory
from fxcompress.graph.island import TOP, Island
from fxcompress.graph.shapes import shape_of
from fxcompress.graph.taps import tap, taps

__all__ = ["Features", "features"]


class Features(nn.Module):
    """A tapped model whose call returns ``(output, {name: tensor})``.

    ``model``   the tapped graph itself; parameters, modes and devices are shared with it
    ``shapes``  the shape of every tapped value as traced, None where example inputs were not given
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.model = graph
        self.shapes = {name: shape_of(node) for name, node in taps(graph).items()}
        self.training = graph.training

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        view = self.__dict__.get("_view")
        if view is None:
            view = self.__dict__["_view"] = _view(self.model)
        return view(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_view"}


def features(graph: fx.GraphModule) -> Features:
    """A view of a tapped graph: name → tensor, beside the output."""
    if isinstance(getattr(graph, TOP, None), Island):
        raise TraceError("features() takes a traced graph; this model runs as its own code as a whole.")
    return Features(graph)


def _view(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module that shares everything with ``module`` and also returns its tapped values."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output: Any = graph.graph_copy(module.graph, copies)
    values = {name: copies[node] for name, node in taps(module).items()}
    for node in reversed(graph.nodes):
        if node.target is tap:
            graph.erase_node(node)
    output = (output, values)
    codegen = module.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        if info.out_spec is not None:
            output, info = pytree.tree_leaves(output), info._replace(out_spec=_with_values(info.out_spec, list(values)))
        graph.set_codegen(_PyTreeCodeGen(info))
    graph.output(output)
    view = fx.GraphModule({}, fx.Graph(), type(module).__name__)
    for table in ("_modules", "_parameters", "_buffers"):
        view.__dict__[table] = module.__dict__[table]
    view.graph = graph
    reuse_memory(view)
    return view


def _with_values(spec: pytree.TreeSpec, names: list[str]) -> pytree.TreeSpec:
    """The structure of ``(output, {name: tensor})`` around an output of structure ``spec``."""
    return pytree.tree_structure((pytree.tree_unflatten([0] * spec.num_leaves, spec), dict.fromkeys(names, 0)))
