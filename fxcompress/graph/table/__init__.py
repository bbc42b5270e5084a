"""The op table: one row per operator, every spelling of it, and what the analyses need to know about it.

Adding an operator is adding a row, to the layers or to what is done with values. Argument names are those of
``torch.nn.functional``.
"""

from fxcompress.graph.spellings import Op
from fxcompress.graph.table.layers import LAYERS
from fxcompress.graph.table.values import VALUES

__all__ = ["TABLE"]

TABLE: tuple[Op, ...] = (*LAYERS, *VALUES)
