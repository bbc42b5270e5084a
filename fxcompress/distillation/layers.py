"""Tapped values of layers: their shapes, and which of their axes holds the channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, fx

from fxcompress.errors import ConfigError
from fxcompress.graph import ops, taps
from fxcompress.graph.feature_view import Features
from fxcompress.graph.shapes import shape_of

__all__ = ["Layer", "channel_axis", "layer_of", "map_of"]


class Layer(NamedTuple):
    """A tapped value: its address, its shape with a batch first, and the axis of its channels."""

    address: str
    shape: tuple[int, ...]
    axis: int

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return self.shape[self.axis]

    @property
    def first(self) -> tuple[int, ...]:
        """The shape with the channels second."""
        rest = [size for axis, size in enumerate(self.shape) if axis not in (0, self.axis)]
        return (self.shape[0], self.channels, *rest)

    def read(self, values: dict[str, Tensor]) -> Tensor:
        """The value with the channels second."""
        return values[self.address].movedim(self.axis, 1)


def layer_of(view: Features, address: str, channel_dim: int | None = None) -> Layer:
    """A tapped value; ConfigError where it is not one tensor with a batch. ``channel_dim`` None: read off the graph."""
    shape = view.shapes[address]
    if shape is None or len(shape) < 2:
        raise ConfigError(f"the value {address!r} is no feature: its shape is {None if shape is None else tuple(shape)}.")
    if channel_dim is None:
        return Layer(address, tuple(shape), channel_axis(taps.taps(view.model)[address], len(shape)))
    if not -len(shape) <= channel_dim < len(shape) or channel_dim % len(shape) == 0:
        raise ConfigError(f"channel_dim is {channel_dim}, and {address!r} is {tuple(shape)}, its batch first.")
    return Layer(address, tuple(shape), channel_dim % len(shape))


def map_of(view: Features, address: str, channel_dim: int | None = None) -> Layer:
    """A tapped feature map; ConfigError where there are no positions."""
    layer = layer_of(view, address, channel_dim)
    if len(layer.shape) < 3:
        raise ConfigError(
            f"the value {address!r} is {layer.shape}: it has no positions. Choose a feature map (B, C, *positions)."
        )
    return layer


def channel_axis(value: fx.Node, rank: int) -> int:
    """The axis on which layers around ``value`` have their channels: the one that makes it says, or else one that reads it.

    Where neither does, the second; of three axes (tokens) the last.
    """
    if rank == 2:
        return 1
    for queue, following in (([value], _sources), (list(value.users), _readers)):
        said = _said(queue, following, shape_of(value))
        if said is not None:
            return said % rank
    return 2 if rank == 3 else 1


_LAST = ("linear", "layer_norm", "embedding", "scaled_dot_product_attention", "multihead_attention")
_SECOND = ("conv", "batch_norm", "group_norm", "instance_norm", "max_pool", "avg_pool", "adaptive_")


def _said(queue: list[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]], shape: Any) -> int | None:
    """What the closest layer says, through operators that leave every value in its place."""
    seen = set(queue)
    for node in queue:
        kind = ops.kind(node)
        if kind.startswith(_SECOND):
            return 1
        if kind in _LAST:
            return -1
        found = ops.lookup(node)
        moves = found is None or (found.family == "movement" and kind != "identity")
        if not moves and shape_of(node) == shape:
            fresh = [other for other in following(node) if other not in seen]
            seen.update(fresh)
            queue += fresh
    return None


def _sources(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    return node.users
