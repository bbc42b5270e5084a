"""What a backend is: which operators it runs in integers and under which conditions, as data; and how it lowers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from torch import fx

from fxcompress.graph.ops import Call

__all__ = ["Backend", "Rule", "missing"]

Output = Literal["own", "input", "shared"]


@dataclass(frozen=True)
class Rule:
    """How a backend runs one kind of operator in integers.

    ``operands``  the arguments that must be quantized (an argument may hold a list of tensors)
    ``weighted``  the operator has an int8 weight and a float bias
    ``output``    ``own``: its result gets a range of its own; ``input``: it keeps scale and zero point of its input;
                  ``shared``: operands and result are on one scale
    ``float_result``  its kernel can give a float result: it is quantized only where an integer operator reads it
    ``demanding`` worth a quantization of its own inputs, though it has no weight
    ``residual``  an operand that a weighted operator computes for this one alone stays in float: the two are one kernel
    ``fixed``     (scale, zero point) the kernel dictates, instead of a range
    ``refuse``    the reason why this very call cannot run in integers, or None
    """

    operands: tuple[str, ...] = ("input",)
    weighted: bool = False
    output: Output = "own"
    float_result: bool = False
    demanding: bool = False
    residual: bool = False
    fixed: tuple[float, int] | None = None
    refuse: Callable[[Call], str | None] = lambda call: None


@dataclass(frozen=True)
class Backend:
    """A target.

    ``activation``        dtype of activations: ``uint8`` (affine) or ``int8`` (symmetric)
    ``per_channel``       whether weights may have a scale per output channel
    ``affine_weights``    whether int8 weights may have a zero point
    ``rules``             operator kind → rule; a kind without one stays in float
    ``lower``             rewrite one quantize/dequantize region into the backend's kernels, in place
    ``unavailable``       the reason why it cannot run on this machine, or None
    ``saturates``         whether 8-bit activations can overflow the kernels' 16-bit partial sums on this CPU
    ``narrow``            whether the kernel of a call, its weights symmetric or not, adds in 16 bits on any CPU
    ``adjacent``          whether these sums are known to be of neighbours in the reduction; else any two elements may meet
    ``dynamic``           operator kinds it can quantize at run time, without ranges
    ``device``            the kind of device its kernels take tensors on
    ``whole``             its runtime takes a graph as a whole
    ``optional``          without its runtime the quantize/dequantize graph serves as it is
    """

    name: str
    runs_on: str
    activation: str
    per_channel: bool
    affine_weights: bool
    rules: Mapping[str, Rule]
    lower: Callable[[fx.GraphModule, Callable[[fx.Node, str], None]], None]
    unavailable: Callable[[], str | None]
    saturates: Callable[[], bool]
    narrow: Callable[[Call, bool], bool] = lambda call, symmetric: False
    adjacent: bool = False
    dynamic: tuple[str, ...] = ()
    device: str = "cpu"
    whole: bool = False
    optional: bool = False


def missing(*packages: str) -> str | None:
    """The reason why ``packages`` cannot be used, or None where all can be imported."""
    absent = [name for name in packages if find_spec(name) is None]
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed" if absent else None
