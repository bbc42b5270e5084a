"""torch's transformer layers as plain code, for tracing.

``nn.TransformerEncoderLayer`` and those built of it choose at run time between their layers and one fused kernel for
inference (and, with padding, nested tensors). A graph holds the layers: that is what trains, exports and can be compressed.
Both compute the same, except at padded positions, where the fused encoder leaves zeros and the layers values that nobody
should read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PLAIN", "plain_transformers"]

Mask = Tensor | None


def _encoder_layer(
    self: Any, src: Tensor, src_mask: Mask = None, src_key_padding_mask: Mask = None, is_causal: bool = False
) -> Tensor:
    def attended(x: Tensor) -> Tensor:
        return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

    if self.norm_first:
        x = src + attended(self.norm1(src))
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + attended(src))
    return self.norm2(x + self._ff_block(x))


def _encoder(
    self: Any, src: Tensor, mask: Mask = None, src_key_padding_mask: Mask = None, is_causal: bool | None = None
) -> Tensor:
    x, causal = src, bool(is_causal)
    for layer in self.layers:
        x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
    return x if self.norm is None else self.norm(x)


def _decoder(
    self: Any,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Mask = None,
    memory_mask: Mask = None,
    tgt_key_padding_mask: Mask = None,
    memory_key_padding_mask: Mask = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    x = tgt
    for layer in self.layers:
        x = layer(
            x,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=bool(tgt_is_causal),
            memory_is_causal=memory_is_causal,
        )
    return x if self.norm is None else self.norm(x)


def _transformer(
    self: Any,
    src: Tensor,
    tgt: Tensor,
    src_mask: Mask = None,
    tgt_mask: Mask = None,
    memory_mask: Mask = None,
    src_key_padding_mask: Mask = None,
    tgt_key_padding_mask: Mask = None,
    memory_key_padding_mask: Mask = None,
    src_is_causal: bool | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
    return self.decoder(
        tgt,
        memory,
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        tgt_is_causal=tgt_is_causal,
        memory_is_causal=memory_is_causal,
    )


PLAIN: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoderLayer: nn.TransformerDecoderLayer.forward,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _transformer,
}
"""Class → its forward without fused kernels, in torch's own signature; subclasses come through it by inheritance."""


@contextmanager
def plain_transformers() -> Iterator[None]:
    """Inside, torch's transformer and attention layers run their plain code."""
    kept = {cls: cls.forward for cls in PLAIN}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for cls, forward in PLAIN.items():
            cls.forward = forward
        yield
    finally:
        for cls, forward in kept.items():
            cls.forward = forward
        torch.backends.mha.set_fastpath_enabled(fast)
