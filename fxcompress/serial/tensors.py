"""The tensors of a saved model, each stored once, and what says where each belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import ArtifactError

__all__ = ["Tensors", "tensor_data"]


class Tensors:
    """Named tensors of a saved model; one that is used under several names is stored once."""

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        self.values = dict(values or {})
        self._names: dict[int, str] = {}
        self._parameters: dict[str, nn.Parameter] = {}

    def put(self, name: str, tensor: Tensor) -> str:
        """Store ``tensor``; returns the name it is stored under."""
        name = self._names.setdefault(id(tensor), name)
        self.values[name] = tensor
        return name

    def stored(self) -> dict[str, Tensor]:
        """What goes into the file: contiguous copies that share no memory."""
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self.values.items()}

    def parameter(self, data: dict[str, Any]) -> nn.Parameter:
        """The parameter under this name, one object however often it is asked for."""
        name = data["tensor"]
        if name not in self._parameters:
            self._parameters[name] = nn.Parameter(self.buffer(data), requires_grad=data["requires_grad"])
        return self._parameters[name]

    def buffer(self, data: dict[str, Any]) -> Tensor:
        """A copy of the stored tensor; ArtifactError where it is missing or of another shape."""
        if data["tensor"] not in self.values:
            raise ArtifactError(f"tensor {data['tensor']!r} is missing from the file.")
        value = self.values[data["tensor"]]
        if list(value.shape) != data["shape"]:
            raise ArtifactError(f"tensor {data['tensor']!r} has shape {list(value.shape)}, not {data['shape']}.")
        layout = torch.channels_last if data["channels_last"] else torch.contiguous_format
        return value.clone(memory_format=layout)  # the file's memory may be unaligned, which changes kernels and bits


def tensor_data(name: str, tensor: Tensor, tensors: Tensors) -> dict[str, Any]:
    """Keep ``tensor`` in ``tensors`` under ``name``; what finds it again there."""
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    return {
        "tensor": tensors.put(name, tensor),
        "shape": list(tensor.shape),
        "requires_grad": tensor.requires_grad,
        "channels_last": channels_last and tensor.is_contiguous(memory_format=torch.channels_last),
    }
