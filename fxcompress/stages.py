"""Stages: the model as costly steps left it, kept in a folder, so that an interrupted run goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxcompress import artifact
from fxcompress.distributed import gather, is_main
from fxcompress.errors import ArtifactError, ConfigError, brief
from fxcompress.files import make_folder, path_of, read_json, write_text
from fxcompress.graph.digest import digest, state_of
from fxcompress.graph.island import TOP, Island
from fxcompress.ledger import Ledger

__all__ = ["Stages"]

_STATE = "stages.json"


class Stages:
    """The stages of one run: ``plan`` over ``model``, in ``folder``. A folder of None keeps nothing.

    Raises ConfigError where the folder holds a run and ``resume`` is False, or one of another plan or model.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, plan: str, model: nn.Module, resume: bool) -> None:
        self.folder = None if folder is None else path_of(folder, "keep")
        self.done, self.rows = 0, Ledger()
        if self.folder is None:
            return
        self._identity = {"plan": plan, "model": digest(state_of(model))}
        self._path = self.folder / _STATE
        if gather(self._path.exists())[0]:
            self._read(resume)
        else:
            self._write()

    def _read(self, resume: bool) -> None:
        if not resume:
            raise ConfigError(f"{str(self.folder)!r} holds a run: resume it, or choose another folder.")
        try:
            state = read_json(self._path)
            if state.pop("digest") != _digest(state):
                raise ValueError("it is not what was written")
            self.done, self.rows = int(state["done"]), Ledger.from_data(state["ledger"])
            identity = state["identity"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{str(self._path)!r} is damaged: {brief(error)}. Delete {str(self.folder)!r} to begin the run anew."
            ) from error
        for what, mine in self._identity.items():
            if identity.get(what) != mine:
                raise ConfigError(f"{str(self.folder)!r} holds a run of another {what}; choose another folder.")
        self._sweep()

    def _sweep(self) -> None:
        """Delete the drafts of files that an interruption left half written."""
        if self.folder is None or not is_main():
            return
        for draft in self.folder.glob(".stage*"):
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)

    def _write(self) -> None:
        if not is_main():
            return
        make_folder(self._path.parent)
        state = {"identity": self._identity, "done": self.done, "ledger": self.rows.as_data()}
        write_text(self._path, json.dumps({**state, "digest": _digest(state)}, indent=1))

    def _model(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"stage-{number}"

    def scratch(self, number: int) -> Path | None:
        """Where step ``number`` may keep a state of its own."""
        return None if self.folder is None else self.folder / f"step-{number}"

    def load(self, original: fx.GraphModule) -> fx.GraphModule:
        """The model after the last step that was kept; ``original`` lends the code of its islands."""
        islands = {name: module.model for name, module in original.named_modules() if isinstance(module, Island)}
        modules = {name.removesuffix(TOP).removesuffix("."): module for name, module in islands.items()}
        try:
            loaded = artifact.load(self._model(self.done), modules=modules)
        except ArtifactError as error:
            raise ArtifactError(f"{error} Delete {str(self.folder)!r} to begin the run anew.") from error
        loaded.meta["history"] = original.meta.get("history", [])
        return loaded

    def keep(self, number: int, model: fx.GraphModule, ledger: Ledger) -> None:
        """Save the model after step ``number``; what earlier steps left is deleted."""
        if self.folder is None:
            return
        if is_main():
            artifact.save(model, self._model(number))
        before, self.done, self.rows = self.done, number, Ledger(list(ledger.rows), list(ledger.notes))
        self._write()
        if not is_main():
            return
        shutil.rmtree(self._model(before), ignore_errors=True)
        for step in range(before + 1, number + 1):
            shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
