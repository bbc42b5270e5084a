"""A failing run leaves a folder from which it can be replayed: the model, the plan up to the failing step, the inputs."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress import artifact
from fxcompress.errors import ArtifactError, FxCompressError, brief
from fxcompress.files import read_json
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.trace import trace
from fxcompress.graph.treespec import read_spec
from fxcompress.plan import Plan

__all__ = ["leave", "read"]

_PLAN, _INPUTS, _SPEC, _MODEL = "plan.yaml", "inputs.safetensors", "inputs.json", "model"


def leave(model: nn.Module, plan: Plan, call: Arguments | None, folder: str | os.PathLike[str] | None = None) -> Path:
    """Write the reproducer; what cannot be written (an island's code) is said in ``note.txt``. Returns the folder."""
    place = Path(folder) if folder else Path(tempfile.mkdtemp(prefix="fxcompress-failure-"))
    place.mkdir(parents=True, exist_ok=True)
    (place / _PLAN).write_text(str(plan), encoding="utf-8")
    try:
        artifact.save(trace(model, call), place / _MODEL)
        if call is not None:
            _write_inputs(place, call)
    except FxCompressError as error:
        (place / "note.txt").write_text(f"The model is not in this folder: {error}\n", encoding="utf-8")
    return place


def _write_inputs(place: Path, call: Arguments) -> None:
    leaves, spec = pytree.tree_flatten(tuple(call))
    tensors = {str(i): leaf.detach().contiguous() for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, place / _INPUTS)
    (place / _SPEC).write_text(json.dumps({"spec": pytree.treespec_dumps(spec), "plain": plain}), encoding="utf-8")


def read(folder: str | os.PathLike[str]) -> tuple[nn.Module, Plan, Arguments | None]:
    """The model, the plan and the example call of a reproducer; ArtifactError where the folder is not one."""
    place = Path(folder)
    if not (place / _PLAN).is_file():
        raise ArtifactError(f"{str(place)!r} is not a reproducer: {_PLAN} is missing.")
    model = artifact.load(place / _MODEL)
    call: Any = None
    if (place / _SPEC).is_file():
        try:
            stored = read_json(place / _SPEC)
            tensors = load_file(place / _INPUTS)
            leaves = [tensors.get(str(i), value) for i, value in enumerate(stored["plain"])]
            call = Arguments(*pytree.tree_unflatten(leaves, read_spec(stored["spec"])))
        except Exception as error:  # whatever a damaged file breaks means the same
            raise ArtifactError(f"the inputs in {str(place)!r} are damaged: {brief(error)}.") from error
    plan = Plan.parse(place / _PLAN)
    if not plan.steps:
        raise ArtifactError(f"{str(place / _PLAN)!r} is damaged: it holds no step.")
    return model, plan, call
