"""The observer: a module that passes a value through and lets a calibrator see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import ConfigError
from fxcompress.quantization.calibrator import Calibrator, build_calibrator

__all__ = ["ActivationObserver", "Backlog", "check_calibrator", "observers"]

_HELD = 1 << 22


def check_calibrator(name: str, options: Mapping[str, Any], option: str = "calibrator_options") -> None:
    """Raise ConfigError, naming ``option``, for options that an activation's calibrator does not take."""
    try:
        made = build_calibrator(name, **options)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error
    if getattr(made, "per_channel", False):
        raise ConfigError(f"{option}: per_channel is for weights; an activation has one range.")


class Backlog:
    """What observers were shown and their calibrators have not collected yet: up to four million values, or ``held``.

    Between two layers the code that collects is in no cache, which takes as long as the values of a small batch do; for many
    of them at once it is fetched once. Nobody may write into what is held; :meth:`settle` after every batch.
    """

    def __init__(self, held: int = _HELD) -> None:
        self.held, self.size = held, 0
        self.shown: list[tuple[Calibrator, Tensor]] = []

    def add(self, calibrator: Calibrator, values: Tensor) -> None:
        """Have ``calibrator`` collect ``values``, now or later."""
        self.shown.append((calibrator, values))
        self.size += values.numel()
        if self.size > self.held:
            self.settle()

    def settle(self) -> None:
        """Collect what is held. Raises DataError as calibrators do."""
        shown, self.shown, self.size = self.shown, [], 0
        for calibrator, values in shown:
            calibrator.collect(values)


class ActivationObserver(nn.Module):
    """Returns its input; while ``enabled``, its calibrator collects it, by way of a ``backlog`` where there is one.

    ``calibrator``  a calibrator's name (``minmax``, ``histogram``, ...)
    ``options``     the calibrator's parameters
    ``bits``        of the grid the value will be put on
    """

    def __init__(self, calibrator: str, options: Mapping[str, Any] | None = None, bits: int = 8) -> None:
        super().__init__()
        self.calibrator_name, self.options, self.bits = calibrator, dict(options or {}), bits
        self.calibrator: Calibrator = build_calibrator(calibrator, **self.options)
        self.enabled = False
        self.backlog: Backlog | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.enabled and self.backlog:
            self.backlog.add(self.calibrator, input)
        elif self.enabled:
            self.calibrator.collect(input)
        return input

    def passes_on(self) -> bool:
        """Whether it hands on the very tensor it is given and nothing else happens, as tried."""
        probe = torch.zeros(1, dtype=torch.float32, device="cpu")
        return not self.enabled and self(probe) is probe

    def saved_state(self) -> dict[str, Any]:
        """The observer as plain data and tensors."""
        seen = self.calibrator.state_dict()
        return {"calibrator": self.calibrator_name, "options": self.options, "bits": self.bits, "seen": seen}

    @classmethod
    def from_saved_state(cls, state: dict[str, Any]) -> ActivationObserver:
        """The inverse of :meth:`saved_state`."""
        observer = cls(state["calibrator"], state["options"], state["bits"])
        observer.calibrator.load_state_dict(state["seen"])
        return observer

    def extra_repr(self) -> str:
        return self.calibrator_name


def observers(model: nn.Module) -> dict[str, ActivationObserver]:
    """Every observer in a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ActivationObserver)}
