"""The graph module that tracing makes: it generates its code when that is wanted, and pickles with metadata and stage."""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

from torch import fx, nn

__all__ = ["TracedModule", "calls", "shared_copy", "signature"]


class _OnDemand:
    """``forward`` of a module whose graph has changed since its code was generated: generates it."""

    def __get__(self, module: fx.GraphModule | None, cls: type) -> Any:
        if module is None:
            return self
        module.recompile()
        return module.forward


class TracedModule(fx.GraphModule):
    """What :func:`fxcompress.trace` and every pass return.

    ``meta["stage"]``  float, observed, qdq or lowered
    ``meta["rungs"]``  parts that symbolic tracing could not take, and why
    """

    _written: ClassVar[list[Any] | None] = None
    __jit_unused_properties__ = [*fx.GraphModule.__jit_unused_properties__, "code"]  # noqa: RUF012 - as torch has it

    def outdate(self) -> None:
        """Say that the graph may have changed: its code is generated anew when somebody runs it or looks at it."""
        if self._written != calls(self.graph):
            type(self).forward = _OnDemand()  # type: ignore[assignment]

    def recompile(self) -> Any:
        """Generate the code; not while the module is being made."""
        if "meta" not in vars(self):
            return self.outdate()
        type(self)._written = calls(self.graph)  # fx makes a class of its own for every graph module
        return super().recompile()

    @property
    def code(self) -> str:
        """The code of ``forward``."""
        self._generate()
        return super().code

    def __str__(self) -> str:
        """The modules, and the code of ``forward``."""
        self._generate()
        return super().__str__()

    def _generate(self) -> None:
        if isinstance(vars(type(self)).get("forward"), _OnDemand):
            self.recompile()

    def __reduce__(self) -> Any:
        """Pickle as a saved model: graph as data, tensors, no generated code; islands pickle as fx does it."""
        from fxcompress import artifact

        return artifact.reduced(self) or super().__reduce__()


def calls(graph: fx.Graph) -> list[Any]:
    """What the code of a graph says."""
    return [(node.op, node.name, node.target, node.args, node.kwargs) for node in graph.nodes]


def signature(module: nn.Module) -> inspect.Signature:
    """What ``forward`` takes; of a graph without its code where the graph says so."""
    if not isinstance(module, TracedModule) or isinstance(module.graph._codegen, fx.graph._PyTreeCodeGen):
        return inspect.signature(module.forward)
    return inspect.Signature([_parameter(node) for node in module.graph.nodes if node.op == "placeholder"])


def _parameter(node: fx.Node) -> inspect.Parameter:
    name, stars = str(node.target).lstrip("*"), str(node.target).count("*")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    empty = inspect.Parameter.empty
    default, annotation = node.args[0] if node.args else empty, empty if node.type is None else node.type
    return inspect.Parameter(name, kinds[stars], default=default, annotation=annotation)


def shared_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph whose tensors are the originals: replacing one does not touch the other."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
