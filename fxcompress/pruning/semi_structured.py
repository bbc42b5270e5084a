"""2:4 weights on sparse tensor cores: which can be packed, what packing computes, and whether it is faster."""

from __future__ import annotations

import statistics
import warnings
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["SparseLinear", "is_two_of_four", "measure", "obstacle", "pack"]

DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 16
"""Rows and columns of a packed half-precision weight come in multiples of this."""


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer's weight cannot be packed, or None."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Conv2d) and not _is_pointwise(layer):
        return "there is no sparse kernel for a convolution that is not 1×1, unstrided, unpadded and in one group"
    rows = weight.detach().flatten(1)
    if not is_two_of_four(rows):
        return "its weight is not 2:4 along its inputs"
    if weight.device.type != "cuda":
        return f"it is on the {weight.device.type}; sparse tensor cores are on NVIDIA GPUs"
    if weight.dtype not in DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}; sparse tensor cores take float16 and bfloat16"
    if rows.shape[0] % MULTIPLE or rows.shape[1] % MULTIPLE:
        return f"its weight of {tuple(rows.shape)} is not a multiple of {MULTIPLE} both ways"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "its GPU has no sparse tensor cores (compute capability 8.0)"
    return None


def _is_pointwise(layer: nn.Conv2d) -> bool:
    ones = (layer.kernel_size, layer.stride) == ((1, 1), (1, 1))
    return ones and layer.groups == 1 and layer.padding in ((0, 0), "valid")


def is_two_of_four(rows: Tensor) -> bool:
    """Whether at most two of every four neighbours along the last dimension are not zero."""
    if rows.shape[-1] % 4:
        return False
    return bool((rows.reshape(-1, 4).count_nonzero(1) <= 2).all())


def pack(weight: Tensor) -> Tensor:
    """``weight`` [out, in] as torch's semi-structured sparse tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        packed: Tensor = torch.sparse.to_sparse_semi_structured(weight.detach().flatten(1).contiguous())
    return packed


class SparseLinear(nn.Module):
    """A linear layer, or a 1×1 convolution as one over channels, with a packed weight that no longer trains."""

    def __init__(self, layer: nn.Module, packed: Tensor) -> None:
        super().__init__()
        self._packed = packed
        self.bias = layer.bias
        self.channels_first = isinstance(layer, nn.Conv2d)
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.movedim(1, -1) if self.channels_first else x
        rows = nn.functional.linear(tokens.reshape(-1, tokens.shape[-1]), self._packed, self.bias)  # type: ignore[arg-type]
        result = rows.reshape(*tokens.shape[:-1], -1)
        return result.movedim(-1, 1) if self.channels_first else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = self.__new__(type(self))
        nn.Module.__init__(copy)
        memo[id(self)] = copy
        copy._packed, copy.channels_first, copy.training = self._packed, self.channels_first, self.training
        copy.bias = memo.get(id(self.bias), self.bias if self.bias is None else nn.Parameter(self.bias.detach().clone()))  # type: ignore[operator]
        return copy


def measure(layer: nn.Module, shape: torch.Size, repeats: int = 20) -> float:
    """Median milliseconds of a call on the GPU that the layer is on, with a random input of this shape."""
    tensor = next(t for t in [*layer.parameters(), getattr(layer, "_packed", None)] if t is not None)
    x = torch.randn(shape, device=tensor.device, dtype=tensor.dtype)
    times: list[float] = []
    with torch.no_grad():
        for _ in range(repeats + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            layer(x)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times[3:])
