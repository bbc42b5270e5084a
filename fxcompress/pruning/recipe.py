"""What pruning did to a model, as plain data: done again to a fresh original, and to an optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from fxcompress.errors import ConfigError
from fxcompress.graph.channels.kept import mask_from_data, select
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.island import regions
from fxcompress.graph.shapes import example_of
from fxcompress.graph.trace import is_traced
from fxcompress.manager import PassManager

__all__ = ["apply_recipe", "carry_optimizer", "get_recipe"]

FORMAT = 1


def get_recipe(model: nn.Module) -> dict[str, Any]:
    """How channel pruning made ``model``: plain data for JSON, or for ``torch.save`` beside the ``state_dict``.

    It holds every pruning plan in order, which indices of every tensor stayed, the numbers that changed in the graph, and
    the shapes of the example inputs. Raises ConfigError for a model that no channels were pruned from.
    """
    if not is_traced(model) or not any(region.meta.get("pruning") for region in regions(model).values()):
        raise ConfigError("no channels were pruned from this model, so there is no recipe.")
    assert isinstance(model, fx.GraphModule)
    inputs = example_of(model)
    shapes = None if inputs is None else [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in inputs.args]
    done = {name: region.meta["pruning"] for name, region in regions(model).items() if region.meta.get("pruning")}
    return {"format": FORMAT, "inputs": shapes, "regions": done}


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any], example_inputs: Any = None) -> fx.GraphModule:
    """A freshly built original, cut as the recipe says; load the pruned ``state_dict`` into the result.

    ``example_inputs`` serve where the recipe holds no shapes (a model with islands). Every number in the graph is computed
    and proved anew, and must come out as the recipe has it. Raises ConfigError where the model does not fit.
    """
    steps = _steps(recipe)
    given = example_inputs if example_inputs is not None else _inputs(recipe)
    if given is None:
        raise ConfigError("the recipe holds no input shapes; give example_inputs.")
    plan: list[Any] = ["open-attention"]
    plan += [{"prune-channels": {**step["options"], "plan": {"groups": step["groups"]}, "prove": False}} for step in steps]
    made = PassManager(plan, progress=False).run(model, given)
    found = {name: region.meta.get("pruning", []) for name, region in regions(made).items()}
    for name, records in recipe["regions"].items():
        for old, new in zip(records, found.get(name, []), strict=False):
            _compare(name, old, new)
    return made


def _steps(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pruning passes, in order, each with the groups of every region."""
    if not isinstance(recipe, Mapping) or recipe.get("format") != FORMAT or not isinstance(recipe.get("regions"), Mapping):
        raise ConfigError(f"this is not a pruning recipe of format {FORMAT}.")
    steps: list[dict[str, Any]] = []
    for records in recipe["regions"].values():
        for number, record in enumerate(records):
            if number == len(steps):
                steps.append({"options": {**record["options"], "whole_groups": []}, "groups": {}})
            steps[number]["groups"].update(record["groups"])
            steps[number]["options"]["whole_groups"] += record["options"].get("whole_groups", [])
    return steps


def _inputs(recipe: Mapping[str, Any]) -> Arguments | None:
    if recipe.get("inputs") is None:
        return None
    return Arguments(
        tuple(torch.zeros(shape, dtype=getattr(torch, kind), device="cpu") for shape, kind in recipe["inputs"]), {}
    )


def _compare(region: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for what in ("kept", "literals"):
        keys = [k for k in {**old[what], **new[what]} if _plain(old[what].get(k)) != _plain(new[what].get(k))]
        if keys:
            where = f"{region}.{keys[0]}".lstrip(".")
            raise ConfigError(f"the recipe does not fit the model: {what} of {where!r} (and {len(keys) - 1} more) differ.")


def _plain(value: Any) -> Any:
    """As JSON has it, where the keys of mappings are strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def carry_optimizer(optimizer: Optimizer, before: nn.Module, after: nn.Module) -> Optimizer:
    """An optimizer for the pruned model with the state of the one for the model before.

    Options of every parameter group stay; momentum and the like lose the channels that their parameters lost. Parameters
    that are gone are left out.
    """
    names = {id(parameter): name for name, parameter in before.named_parameters()}
    parameters = dict(after.named_parameters())
    masks = _masks(after, before)
    groups: list[dict[str, Any]] = []
    moved: dict[torch.Tensor, Any] = {}
    for group in optimizer.param_groups:
        kept = [(old, parameters[names[id(old)]]) for old in group["params"] if names.get(id(old)) in parameters]
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": [new for _, new in kept]})
        for old, new in kept:
            if old in optimizer.state:
                moved[new] = _sliced(optimizer.state[old], old, masks.get(names[id(old)], []))
    kind: Any = type(optimizer)
    made: Optimizer = kind(groups)
    made.state.update(moved)
    return made


def _masks(after: nn.Module, before: nn.Module) -> dict[str, list[dict[int, Any]]]:
    """Parameter → the masks of every cut since ``before``."""
    found: dict[str, list[dict[int, Any]]] = {}
    earlier = {n: len(r.meta.get("pruning", ())) for n, r in regions(before).items()} if is_traced(before) else {}
    for region, module in regions(after).items():
        for record in module.meta.get("pruning", [])[earlier.get(region, 0) :]:
            for name, dims in record["kept"].items():
                full = f"{region}.{name}" if region else name
                found.setdefault(full, []).append({int(dim): mask_from_data(data) for dim, data in dims.items()})
    return found


def _sliced(state: Mapping[str, Any], old: nn.Parameter, cuts: list[dict[int, Any]]) -> dict[str, Any]:
    made = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == old.shape:
            for masks in cuts:
                value = select(value, masks)
            made[key] = value.clone()
        else:
            made[key] = value.clone() if isinstance(value, torch.Tensor) else value
    return made
