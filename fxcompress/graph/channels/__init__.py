"""Channel groups: which slices of which tensors must go together, found by labelling every index of every dimension."""

from fxcompress.graph.channels.analysis import ChannelGroup, Channels, Frozen, analyse

__all__ = ["ChannelGroup", "Channels", "Frozen", "analyse"]
