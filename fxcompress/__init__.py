"""fxcompress: a graph-rewriting compiler for model compression.

A trained model and a plan go in; a smaller, faster model comes out, with a ledger of what every pass did, what it cost, and
what it left alone and why::

    manager = PassManager(["fold-batchnorm", "fuse-activations"])
    compressed = manager.run(model, example_inputs=images)
    print(manager.ledger)
"""

from fxcompress.artifact import load, save
from fxcompress.builder import build_compression_pipeline, build_distiller, build_pruner, build_quantizer
from fxcompress.errors import FxCompressError
from fxcompress.export import export_onnx
from fxcompress.graph import trace
from fxcompress.graph.coverage import coverage
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager
from fxcompress.pass_base import Context, Pass
from fxcompress.plan import Plan
from fxcompress.quantization.ptq import DynamicQuantizer, PTQQuantizer, StaticQuantizer
from fxcompress.quantization.qat import LSQQuantizer, QATQuantizer
from fxcompress.training import Recipe, train

__version__ = "0.1.0"

__all__ = [
    "Context",
    "DynamicQuantizer",
    "FxCompressError",
    "LSQQuantizer",
    "Ledger",
    "PTQQuantizer",
    "Pass",
    "PassManager",
    "Plan",
    "QATQuantizer",
    "Recipe",
    "StaticQuantizer",
    "build_compression_pipeline",
    "build_distiller",
    "build_pruner",
    "build_quantizer",
    "coverage",
    "export_onnx",
    "load",
    "save",
    "trace",
    "train",
]
