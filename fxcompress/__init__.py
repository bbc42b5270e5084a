"""fxcompress: a graph-rewriting compiler for model compression.

A trained model and a plan go in; a smaller, faster model comes out, with a ledger of what every pass did, what it cost, and
what it left alone and why::

    manager = PassManager(["fold-batchnorm", "fuse-activations"])
    compressed = manager.run(model, example_inputs=images)
    print(manager.ledger)
"""

from fxcompress.artifact import load, save
from fxcompress.builder import (
    PRUNERS,
    QUANTIZERS,
    CompressionPipeline,
    build_compression_pipeline,
    build_distiller,
    build_pruner,
    build_quantizer,
)
from fxcompress.distillation import (
    DISTILLERS,
    ATDistiller,
    BaseDistiller,
    CCDistiller,
    CRDDistiller,
    DISTDistiller,
    DKDDistiller,
    FeatureDistiller,
    FitNetDistiller,
    FSPDistiller,
    IndexedDataset,
    LogitDistiller,
    OFDDistiller,
    PKTDistiller,
    RelationDistiller,
    ReviewKDDistiller,
    RKDDistiller,
)
from fxcompress.errors import FxCompressError
from fxcompress.export import export_onnx, export_tensorrt
from fxcompress.graph import trace
from fxcompress.graph.coverage import coverage
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager
from fxcompress.models import DATASETS, MODELS
from fxcompress.pass_base import Context, Pass
from fxcompress.plan import Plan
from fxcompress.pruning import (
    AGPScheduler,
    ChannelPruner,
    CubicScheduler,
    FilterPruner,
    IterativeScheduler,
    L1UnstructuredPruner,
    LayerPruner,
    MagnitudePruner,
    OneShotScheduler,
    PruningPlan,
    PruningScheduler,
    RandomPruner,
    SensitivityAnalyzer,
    StructuredPruner,
)
from fxcompress.pruning.criteria import CRITERIA
from fxcompress.pruning.pruning_scheduler import SCHEDULERS
from fxcompress.quantization import (
    CALIBRATORS,
    Calibrator,
    DynamicQuantizer,
    EntropyCalibrator,
    HistogramCalibrator,
    LSQQuantizer,
    MinMaxCalibrator,
    MSECalibrator,
    PercentileCalibrator,
    PTQQuantizer,
    QATQuantizer,
    StaticQuantizer,
    auto_fuse,
    benchmark_latency,
    compare_activations,
    compare_weights,
    compute_scale_zp,
    compute_snr,
    dequantize_tensor,
    fuse_modules,
    get_model_size,
    get_quantizable_modules,
    quantize_tensor,
)
from fxcompress.report import write_report
from fxcompress.training import LOSSES, METRICS, OPTIMIZERS, Recipe, train

__version__ = "0.1.0"

__all__ = [
    "CALIBRATORS",
    "CRITERIA",
    "DATASETS",
    "DISTILLERS",
    "LOSSES",
    "METRICS",
    "MODELS",
    "OPTIMIZERS",
    "PRUNERS",
    "QUANTIZERS",
    "SCHEDULERS",
    "AGPScheduler",
    "ATDistiller",
    "BaseDistiller",
    "CCDistiller",
    "CRDDistiller",
    "Calibrator",
    "ChannelPruner",
    "CompressionPipeline",
    "Context",
    "CubicScheduler",
    "DISTDistiller",
    "DKDDistiller",
    "DynamicQuantizer",
    "EntropyCalibrator",
    "FSPDistiller",
    "FeatureDistiller",
    "FilterPruner",
    "FitNetDistiller",
    "FxCompressError",
    "HistogramCalibrator",
    "IndexedDataset",
    "IterativeScheduler",
    "L1UnstructuredPruner",
    "LSQQuantizer",
    "LayerPruner",
    "Ledger",
    "LogitDistiller",
    "MSECalibrator",
    "MagnitudePruner",
    "MinMaxCalibrator",
    "OFDDistiller",
    "OneShotScheduler",
    "PKTDistiller",
    "PTQQuantizer",
    "Pass",
    "PassManager",
    "PercentileCalibrator",
    "Plan",
    "PruningPlan",
    "PruningScheduler",
    "QATQuantizer",
    "RKDDistiller",
    "RandomPruner",
    "Recipe",
    "RelationDistiller",
    "ReviewKDDistiller",
    "SensitivityAnalyzer",
    "StaticQuantizer",
    "StructuredPruner",
    "auto_fuse",
    "benchmark_latency",
    "build_compression_pipeline",
    "build_distiller",
    "build_pruner",
    "build_quantizer",
    "compare_activations",
    "compare_weights",
    "compute_scale_zp",
    "compute_snr",
    "coverage",
    "dequantize_tensor",
    "export_onnx",
    "export_tensorrt",
    "fuse_modules",
    "get_model_size",
    "get_quantizable_modules",
    "load",
    "quantize_tensor",
    "save",
    "trace",
    "train",
    "write_report",
]
