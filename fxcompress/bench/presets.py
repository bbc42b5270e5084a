"""Plans by one word."""

from __future__ import annotations

from pathlib import Path

from fxcompress.errors import PlanError, did_you_mean
from fxcompress.plan import Plan
from fxcompress.quantization.ptq import PTQQuantizer

__all__ = ["PRESETS", "find"]

_FOLD = ["remove-dead", "fold-batchnorm", "fuse-activations"]

PRESETS = {
    "fp32": lambda: Plan(),
    "fused": lambda: Plan.parse(_FOLD),
    "int8": lambda: PTQQuantizer(num_calibration_batches=4).plan,
    "int8-minmax": lambda: PTQQuantizer(calibration_method="minmax", num_calibration_batches=4).plan,
    "int8-7bit": lambda: PTQQuantizer(reduce_range=True, num_calibration_batches=4).plan,
}


def find(name: str) -> Plan:
    """The preset ``name``, or the plan in the file ``name``."""
    if name in PRESETS:
        return PRESETS[name]()
    if Path(name).suffix in (".yaml", ".yml", ".json") or Path(name).exists():
        return Plan.parse(Path(name))
    raise PlanError(
        f"there is no preset {name!r}.{did_you_mean(name, PRESETS)} Known: {', '.join(PRESETS)}; or a file's path."
    )
