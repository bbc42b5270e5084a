"""lower: explicit quantize/dequantize graphs become a backend's integer kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxcompress import backends
from fxcompress.backends.agreement import Reference
from fxcompress.backends.base import Backend
from fxcompress.backends.flat import examples
from fxcompress.errors import BackendError
from fxcompress.graph import edit
from fxcompress.graph.inputs import Arguments, frozen_state
from fxcompress.graph.island import regions
from fxcompress.graph.module import shared_copy
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.quantization.weight_bounds import bound_weights
from fxcompress.timing import interleaved

__all__ = ["Lower", "become"]

_EVEN = 1.02
"""Medians this close are chance: backends compute the same graph, so the simplest of them is taken."""


@dataclass(frozen=True)
class Lower(Pass):
    """Lower to the kernels of the backend that the graph was quantized for.

    The portable form is kept with the model: it is what is saved, and what a loaded model is lowered from again. For the
    backend ``auto`` the model is lowered to each one that is installed, they take turns on the example inputs with torch's
    number of threads, and the fastest is kept; of those within 2 % of it, the one that needs least beside torch.

    Options: ``engine``, for backends that can do without (TensorRT): None builds one where that is possible, True makes it
    an error where it is not, False keeps the quantize/dequantize graph.
    """

    name: ClassVar[str] = "lower"
    takes: ClassVar[tuple[str, ...]] = ("qdq",)
    leaves: ClassVar[str | None] = "lowered"
    promise: ClassVar[Promise] = APPROXIMATE

    engine: bool | None = None

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        for module in regions(model).values():
            module.meta.pop("float_weights", None)
            module.meta["portable"] = shared_copy(module)
        super().run_model(model, context)

    def run(self, module: fx.GraphModule, context: Context) -> None:
        settings = module.meta.get("quantization")
        if settings is None:
            return
        backend = backends.find(settings["backend"])
        if backend is backends.AUTO:
            self._lower_to_fastest(module, context)
            return
        reason = backend.unavailable()
        if reason and (self.engine or not backend.optional):
            raise BackendError(f"{backend.name} cannot run here: {reason}. Keep the quantize/dequantize graph instead.")
        if backend.optional and (reason or self.engine is False):
            why = reason or "no engine was asked for"
            context.note("", f"{why}: the quantize/dequantize graph stays, and export_onnx writes what {backend.name} takes")
            return
        _check_device(module, backend)
        _bound(module, backend, context)
        become(module, _lowered(module, backend, _reference(module, context), context))

    def _lower_to_fastest(self, module: fx.GraphModule, context: Context) -> None:
        _check_device(module, backends.AUTO)
        _bound(module, backends.AUTO, context)
        known = module.meta["quantization"].get("fastest")
        trials: dict[str, fx.GraphModule] = {}
        reference = _reference(module, context)
        for name in backends.CANDIDATES:
            reason = backends.find(name).unavailable()
            if reason is None and (known in (None, name) or backends.find(known).unavailable()):
                try:
                    trials[name] = _lowered(module, backends.find(name), reference, context)
                except BackendError as error:
                    reason = str(error)
            if reason:
                context.note("", f"auto leaves {name} out: {reason}")
        if not trials:
            raise BackendError("no backend can run the graph here; the ledger's remarks say why, one by one.")
        fastest = next(iter(trials)) if len(trials) == 1 else _fastest(trials, module, context)
        for graph in (module, module.meta["portable"]):
            graph.meta["quantization"] = {**module.meta["quantization"], "fastest": fastest}
        become(module, trials[fastest])


def _lowered(module: fx.GraphModule, backend: Backend, reference: Reference | None, context: Context) -> fx.GraphModule:
    """The kernels of ``backend``, held against the graph; what computes something else runs in float."""
    refused: dict[str, str] = {}
    while True:
        trial = shared_copy(module)
        for node in trial.graph.nodes:
            if node.name in refused:
                node.meta |= {"integer": False, "float": refused[node.name]}
        backend.lower(trial, context.skip)
        edit.finish(trial)
        runtime = backend.name if backend.whole else ""
        found = None if reference is None else reference.compare(trial, runtime=runtime)
        if found is None or not (wrong := found.wrong.keys() - refused.keys()):
            break
        refused |= {name: found.wrong[name] for name in wrong}
    for name, reason in refused.items():
        context.skip(name, f"{reason}: it runs in float")
    context.note("", f"{backend.name}: {found or 'not held against the graph, whose inputs are not known'}")
    return trial


def _reference(module: fx.GraphModule, context: Context) -> Reference | None:
    """What lowered forms are held against, on the example inputs or on made-up ones; None where nobody knows any."""
    call = context.example()
    if call is not None:
        return Reference(module, call, context.looks.get(context.region))
    call = _made_up(module)
    return None if call is None else Reference(module, call)


def _made_up(module: fx.GraphModule) -> Arguments | None:
    """A call of made-up values; None where their shapes are not known or the graph takes no such values."""
    try:
        call = examples(module)
        with frozen_state(module):
            call(module)
    except Exception:  # any operator may refuse the values
        return None
    return call


def _fastest(trials: dict[str, fx.GraphModule], module: fx.GraphModule, context: Context) -> str:
    call = context.example() or examples(module)
    turns = {name: functools.partial(trial, *call.args, **call.kwargs) for name, trial in trials.items()}
    timed = interleaved(turns, runs=15, seconds=20.0)
    order = sorted(timed, key=lambda name: timed[name].median)
    context.note("", "auto measured " + ", ".join(f"{name} {1e3 * timed[name].median:.2f} ms" for name in order))
    even = [name for name in backends.CANDIDATES if name in timed and timed[name].median <= _EVEN * timed[order[0]].median]
    if even[0] != order[0]:
        context.note("", f"auto takes {even[0]}, the simplest of those within {_EVEN - 1:.0%} of the fastest")
    return even[0]


def _bound(module: fx.GraphModule, backend: Backend, context: Context) -> None:
    """Keep a graph that was quantized for another CPU from saturating this one's sums; the portable form stays as it is."""
    settings = module.meta["quantization"]
    if not backend.saturates() or settings["bound_pairs"] or settings["reduce_range"]:
        return
    if settings.get("full_range"):
        context.note("", "full-range weights were asked for: partial sums may saturate on this CPU")
        return
    coarser = bound_weights(module, backend, settings)
    if coarser:
        context.forget()
        context.note(
            "",
            f"quantized for a CPU that adds in 32 bits: {len(coarser)} weight(s) were put on coarser scales, so that 16-bit "
            "sums cannot saturate here; quantizing again on this CPU finds better ones",
        )


def _check_device(module: nn.Module, backend: Backend) -> None:
    elsewhere = {t.device.type for t in [*module.parameters(), *module.buffers()]} - {backend.device}
    if elsewhere:
        raise BackendError(
            f"{backend.name} runs on {backend.runs_on} and the model is on {elsewhere.pop()}: "
            f"move it with .to({backend.device!r}) first."
        )


def become(module: fx.GraphModule, other: fx.GraphModule) -> None:
    """Give ``module`` the graph, layers and tensors of ``other``; what holds ``module`` keeps holding it."""
    for kept in ("_modules", "_parameters", "_buffers"):
        setattr(module, kept, getattr(other, kept))
    module.graph = other.graph
