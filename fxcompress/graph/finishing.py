"""A captured graph becomes a program: out-of-place, without dead code, with the modes and the modules of its model."""

from __future__ import annotations

from torch import fx, nn

from fxcompress.graph import edit, inplace
from fxcompress.graph.containers import open_mappings
from fxcompress.graph.rungs import Rung
from fxcompress.graph.tree import submodule

__all__ = ["finished"]


def finished(module: fx.GraphModule, model: nn.Module, rungs: list[Rung]) -> fx.GraphModule:
    """Make the captured graph a program: out-of-place, without dead code, with the model's training flags."""
    for name, part in module.named_modules(remove_duplicate=False):
        held = submodule(model, name)
        part.training = held.training if held is not None else model.training
    for name in dict.fromkeys(inplace.make_functional(module)):
        rungs.append(
            Rung("", "note", f"its code overwrites the input {name!r}; the graph computes the same and leaves it as it is")
        )
    open_mappings(module.graph)
    inplace.drop_dead(module)
    edit.finish(module)
    _forget_code(module)
    _number_paddings(module)
    module.graph.lint()
    module.meta.update(rungs=tuple(rungs), stage="float")
    return module


def _number_paddings(module: nn.Module) -> None:
    """Give convolutions that pad with "same", alike on both sides, the numbers: what knows no word takes them then."""
    for part in module.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and part.padding == "same":
            reach = [size * (kernel - 1) for size, kernel in zip(part.dilation, part.kernel_size, strict=True)]
            if all(pixels % 2 == 0 for pixels in reach):
                part.padding = tuple(pixels // 2 for pixels in reach)


def _forget_code(module: fx.GraphModule) -> None:
    """Leave of modules whose code is operators of the graph now (exported ones) what they hold, under their names."""
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    plain: dict[int, nn.Module] = {}
    for name, part in list(module.named_modules(remove_duplicate=False)):
        is_own = not type(part).__module__.startswith("torch.") and not isinstance(part, fx.GraphModule)
        if not name or not is_own or edit.reached(name, called):
            continue
        if id(part) not in plain:
            made = plain[id(part)] = nn.Module().train(part.training)
            for kept in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
                setattr(made, kept, getattr(part, kept))
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._modules[leaf] = plain[id(part)]
