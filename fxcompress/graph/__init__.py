"""What a program is: capture, the op table, shapes, cost, edit verbs, the verifier."""

from fxcompress.graph.cost import Cost, cost, macs
from fxcompress.graph.feature_view import features
from fxcompress.graph.inputs import Arguments, arguments
from fxcompress.graph.island import regions
from fxcompress.graph.meta_run import propagate
from fxcompress.graph.ops import Attr, Call, kind, read
from fxcompress.graph.trace import Rung, is_traced, trace

__all__ = [
    "Arguments",
    "Attr",
    "Call",
    "Cost",
    "Rung",
    "arguments",
    "cost",
    "features",
    "is_traced",
    "kind",
    "macs",
    "propagate",
    "read",
    "regions",
    "trace",
]
