"""Which weights are pruned: every prunable one of a model once, with all that reads it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fxcompress.errors import ConfigError
from fxcompress.graph import ops
from fxcompress.graph.island import regions
from fxcompress.graph.select import Selection, matches
from fxcompress.graph.tree import check_module, unwrapped
from fxcompress.pruning.sites import Mask, Site, below_masks

__all__ = ["PRUNABLE", "Skip", "bake_masks", "sites"]


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)
"""Layers whose weight is pruned; biases and normalisation are not."""

OPERANDS = {
    "linear": ("weight", 1),
    **{f"conv{dims}d": ("weight", 1) for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": ("weight", 0) for dims in (1, 2, 3)},
    "matmul": ("other", 0),
    "addmm": ("other", 0),
}
"""Functions whose weight is pruned: which argument it is, and the dimension of its inputs."""

PACKED = {
    nn.MultiheadAttention: "its packed projections are not masked; its output projection is",
    nn.RNNBase: "recurrent weights are not masked",
    nn.Bilinear: "bilinear weights are not masked",
}

Skip = Callable[[str, str], None]

EVERYTHING = Selection()


def _silently(name: str, reason: str) -> None:
    """Tell nobody."""


def sites(model: nn.Module, selection: Selection = EVERYTHING, skip: Skip = _silently) -> dict[str, Site]:
    """The chosen prunable weights, each once, under the first layer that has it (its own name where no layer does).

    ``skip`` hears of weights that are chosen and cannot be masked. Raises ConfigError for weights without values.
    """
    check_module(model)
    model = unwrapped(model)
    graphs = regions(model)
    owners, fetches = _owners(model, graphs), _fetches(graphs)
    named: dict[int, list[str]] = defaultdict(list)
    for key, held in owners.items():
        named[key] += [name for name, _, _ in held]
    for key, fetched in fetches.items():
        named[key] += [name for name, _, _ in fetched]
    found: dict[int, Site] = {}
    for key, name, dim, groups in [*_layers(owners), *_operands(graphs)]:
        if key not in found:
            holders = tuple((module, leaf) for _, module, leaf in owners.get(key, ()))
            readers = tuple((graph, target) for _, graph, target in fetches.get(key, ()))
            found[key] = Site(name, dim, groups, holders, readers)
    chosen = {site.name: site for key, site in found.items() if _chosen(site.name, named[key], selection, skip)}
    left_out = {name: reason for name, site in chosen.items() if (reason := _unfit(name, site.dense()))}
    left_out |= {
        name: reason for name, module in model.named_modules() if name in selection and (reason := _unmaskable(module))
    }
    for name, reason in left_out.items():
        skip(name, reason)
    return {name: site for name, site in chosen.items() if name not in left_out}


def bake_masks(model: nn.Module) -> int:
    """Multiply every mask into its weight and take it off, in place; returns how many weights had one."""
    masked = [site for site in sites(model).values() if site.masks()]
    for site in masked:
        site.bake()
    return len(masked)


def _owners(model: nn.Module, graphs: dict[str, fx.GraphModule]) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Tensor → the modules that hold it and run their own code: their name, the module, the attribute."""
    called = {region: _calls(graph) for region, graph in graphs.items()}
    found: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or not _runs(name, called):
            continue
        for leaf in [*_parametrized(module), *module._parameters]:
            tensor = below_masks(module, leaf)
            if tensor is not None:
                found[id(tensor)].append((name, module, leaf))
    return found


def _parametrized(module: nn.Module) -> list[str]:
    lists: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
    return list(lists)


def _calls(graph: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}


def _runs(name: str, called: dict[str, set[str]]) -> bool:
    """Whether a module runs its own code: it is outside every graph, or the graph around it calls it or what it is in."""
    around = max((region for region in called if not region or f"{name}.".startswith(f"{region}.")), key=len, default=None)
    if around is None:
        return True
    parts = name.removeprefix(around).removeprefix(".").split(".")
    return any(".".join(parts[: end + 1]) in called[around] for end in range(len(parts)))


def _fetches(graphs: dict[str, fx.GraphModule]) -> dict[int, list[tuple[str, fx.GraphModule, str]]]:
    """Tensor → the graphs that fetch it by name: the name of its layer, the graph, the target."""
    found: dict[int, list[tuple[str, fx.GraphModule, str]]] = defaultdict(list)
    for region, graph in graphs.items():
        called = _calls(graph)
        for target in dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr"):
            prefix, _, leaf = target.rpartition(".")
            tensor = below_masks(graph.get_submodule(prefix), leaf)
            if tensor is not None and not _runs(prefix, {"": called}):
                name = f"{region}.{target}" if region else target
                found[id(tensor)].append((name.removesuffix(".weight"), graph, target))
    return found


def _layers(owners: dict[int, list[tuple[str, nn.Module, str]]]) -> Iterator[tuple[int, str, int, int]]:
    """The weights of prunable layers: tensor, layer, input dimension, groups."""
    for key, held in owners.items():
        for name, module, leaf in held:
            if isinstance(module, PRUNABLE) and leaf == "weight":
                transposed = isinstance(module, TRANSPOSED)
                yield key, name, 0 if transposed else 1, int(getattr(module, "groups", 1)) if transposed else 1


def _operands(graphs: dict[str, fx.GraphModule]) -> Iterator[tuple[int, str, int, int]]:
    """The weights that graphs give to functions: tensor, name, input dimension, groups."""
    for region, graph in graphs.items():
        for node in graph.graph.nodes:
            call = ops.read(node) if node.op != "call_module" else None
            if call is None or call.kind not in OPERANDS:
                continue
            argument, dim = OPERANDS[call.kind]
            target = _fetched(graph, call[argument])
            if target is None:
                continue
            prefix, _, leaf = target.rpartition(".")
            tensor = below_masks(graph.get_submodule(prefix), leaf)
            if isinstance(tensor, Tensor) and tensor.dim() >= 2 and (tensor.dim() == 2 or argument == "weight"):
                name = f"{region}.{target}" if region else target
                yield id(tensor), name.removesuffix(".weight"), dim, call["groups"] if "transpose" in call.kind else 1


def _fetched(graph: fx.GraphModule, value: Any) -> str | None:
    """The name of the tensor an argument is, with or without a mask on it."""
    if isinstance(value, fx.Node) and value.op == "call_module" and isinstance(graph.get_submodule(str(value.target)), Mask):
        value = value.args[0]
        return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None
    return value.name if isinstance(value, ops.Attr) else None


def _chosen(name: str, names: list[str], selection: Selection, skip: Skip) -> bool:
    """Whether a weight with these names is chosen: any of them included, none excluded."""
    included = Selection(selection.include)
    if not any(other in included for other in (name, *names)):
        return False
    excluded = [other for other in (name, *names) if any(matches(pattern, other) for pattern in selection.exclude)]
    if excluded and name not in excluded and selection.include is None:
        skip(name, f"its weight is tied to that of {excluded[0]!r}, which is excluded")
    return not excluded


def _unmaskable(module: nn.Module) -> str | None:
    """Why a layer with weights has none that masks go on, or None."""
    if isinstance(module, PRUNABLE) and isinstance(module.__dict__.get("weight"), Tensor):
        return "its weight is computed by a hook (torch.nn.utils.prune, weight_norm); make that permanent first"
    return next((reason for packed, reason in PACKED.items() if isinstance(module, packed)), None)


def _unfit(name: str, weight: Tensor) -> str | None:
    """Why a weight cannot be masked, or None. Raises ConfigError where it has no values yet."""
    if is_lazy(weight) or weight.is_meta:
        raise ConfigError(f"the weight of {name!r} has no values yet: run the model once, or load its weights, first.")
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return None if weight.numel() and weight.dim() >= 2 else f"its weight has shape {tuple(weight.shape)}"
