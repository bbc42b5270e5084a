"""Loss terms: what a batch's loss is made of, and the record of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.data import split_batch
from fxcompress.distributed import average, gather
from fxcompress.errors import ConfigError, DataError, TrainingError
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.module import signature
from fxcompress.weighted import Weighted

__all__ = ["TermRecord", "Terms", "gradient_norms", "loss_terms", "split_target", "weighted"]

Terms = dict[str, Tensor]


def loss_terms(
    forward: Callable[..., Any], model: nn.Module, loss: Callable[[Any, Any], Any] | None, batch: Any, device: torch.device
) -> tuple[Terms, dict[str, float]]:
    """The scalar losses of a batch by name, and their weights.

    With ``loss``: ``loss(model(input), target)``, a scalar or scalars by name. Without: the model is called with everything
    in the batch, and returns ``(output, {name: loss})``, which may be :class:`~fxcompress.weighted.Weighted`. The model's
    ``loss_weights`` count as well.
    """
    terms = _terms(forward, model, loss, batch, device)
    inside = terms.weights if isinstance(terms, Weighted) else {}
    given: Mapping[str, float] = getattr(model, "loss_weights", None) or {}
    raw = terms.raw if isinstance(terms, Weighted) else dict(terms)
    return raw, {name: inside.get(name, 1.0) * given.get(name, 1.0) for name in raw}


def _terms(
    forward: Callable[..., Any], model: nn.Module, loss: Callable[[Any, Any], Any] | None, batch: Any, device: torch.device
) -> Mapping[str, Tensor]:
    if loss is None:
        try:
            return _own_terms(forward, model, _moved(batch, device))
        except TypeError:
            _check_takes(model, batch)
            raise
    call, target = split_target(model, batch, device)
    if target is None:
        raise DataError("a batch has no target; a dataloader for training yields (input, target).")
    value = loss(call(forward), target)
    return _checked(value if isinstance(value, Mapping) else {"loss": value}, "the loss")


def _check_takes(model: nn.Module, batch: Any) -> None:
    """Raise ConfigError where a model without a loss function does not take what a batch holds, targets and all."""
    args = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    try:
        signature(model).bind(*args, **(batch if isinstance(batch, Mapping) else {}))
    except TypeError as error:
        raise ConfigError(
            f"there is no loss, and {type(model).__name__}.forward does not take a whole batch ({error}): give "
            "loss=function(output, target), or its name."
        ) from error


def _moved(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return batch
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def split_target(model: nn.Module, batch: Any, device: torch.device) -> tuple[Arguments, Any]:
    """A call and its target, on ``device``; of a dict, the target is what ``forward`` does not take."""
    return split_batch(_moved(batch, device), model)


def _own_terms(forward: Callable[..., Any], model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    if isinstance(batch, Mapping):
        result = forward(**batch)
    else:
        result = forward(*batch) if isinstance(batch, (tuple, list)) else forward(batch)
    if not (isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise ConfigError(
            f"{type(model).__name__} returns no losses: give loss=function(output, target), or a module whose "
            "forward(images, targets) returns (output, {name: loss})."
        )
    return _checked(result[1], type(model).__name__)


def _checked(terms: Mapping[str, Any], who: str) -> Mapping[str, Tensor]:
    if not terms:
        raise ConfigError(f"{who} gives no loss term.")
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ConfigError(f"{who} gives {name!r}, which is not a scalar tensor.")
    return terms


def weighted(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    """Σ weight · term, in float32 or more; a single term of weight 1 as it is."""
    parts = [value if weights[name] == 1.0 else weights[name] * value for name, value in terms.items()]
    parts = [part.reshape(()) if part.dtype is torch.float64 else part.reshape(()).float() for part in parts]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def gradient_norms(terms: Terms, parameters: Sequence[nn.Parameter], scale: float) -> dict[str, float]:
    """The norm of each term's gradient over ``parameters``, all processes' samples together. ``scale`` guards small fp16."""
    norms = {}
    for name, value in terms.items():
        if not value.requires_grad:
            norms[name] = 0.0
            continue
        found = torch.autograd.grad(value * scale, parameters, retain_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        average(gradients)
        norms[name] = float(torch.nn.utils.get_total_norm(gradients)) / scale
    return norms


class TermRecord:
    """Sums of every loss term over an epoch, and the watch for values that are not finite.

    Values wait until :meth:`flush`: reading them at once would stall a GPU, and processes must stop together.
    """

    def __init__(self, wait: int) -> None:
        self.wait = wait
        self.sums: dict[str, float] = {}
        self.samples = 0.0
        self._waiting: list[tuple[int, list[str], Tensor, float]] = []

    def clear(self) -> None:
        """Begin an epoch."""
        self.sums, self.samples = {}, 0.0

    def add(self, step: int, terms: Terms, total: Tensor, samples: float) -> None:
        """Note the terms of one batch, before the step they lead to."""
        names = [*terms, "loss"]
        values = torch.stack([value.detach().reshape(()).float() for value in (*terms.values(), total)])
        self._waiting.append((step, names if "loss" not in terms else names[:-1], values, samples))
        if len(self._waiting) >= self.wait:
            self.flush()

    def flush(self) -> None:
        """Take up what waits; TrainingError naming the first term and step that is not finite, on every process."""
        bad: str | None = None
        for step, names, values, samples in self._waiting:
            for name, value in zip(names, values.tolist(), strict=False):
                if not math.isfinite(value) and bad is None:
                    bad = f"loss term {name!r} is {value} at step {step}"
                self.sums[name] = self.sums.get(name, 0.0) + value * samples
            self.samples += samples
        self._waiting.clear()
        found = [text for text in gather(bad) if text]
        if found:
            raise TrainingError(f"{found[0]}: training stops. Lower lr, clip gradients (clip_norm), or look at that batch.")

    def means(self) -> dict[str, float]:
        """Every term's mean over the samples of all processes."""
        self.flush()
        every = gather({"samples": self.samples, **self.sums})
        total = sum(part["samples"] for part in every) or 1.0
        return {name: sum(part.get(name, 0.0) for part in every) / total for name in self.sums}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.samples = dict(state["sums"]), state["samples"]
