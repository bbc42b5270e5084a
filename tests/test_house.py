"""The house itself: packaging, import directions, public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fxcompress
from fxcompress import library

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fxcompress"

PUBLIC = {
    "AGPScheduler",
    "ATDistiller",
    "BaseDistiller",
    "CALIBRATORS",
    "CCDistiller",
    "CRDDistiller",
    "Calibrator",
    "ChannelPruner",
    "CompressionPipeline",
    "Context",
    "CubicScheduler",
    "DATASETS",
    "DISTDistiller",
    "DISTILLERS",
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
    "LOSSES",
    "LSQQuantizer",
    "LayerPruner",
    "Ledger",
    "LogitDistiller",
    "METRICS",
    "MODELS",
    "MSECalibrator",
    "MagnitudePruner",
    "MinMaxCalibrator",
    "OFDDistiller",
    "OPTIMIZERS",
    "OneShotScheduler",
    "PKTDistiller",
    "PRUNERS",
    "PTQQuantizer",
    "Pass",
    "PassManager",
    "PercentileCalibrator",
    "Plan",
    "PruningPlan",
    "PruningScheduler",
    "QATQuantizer",
    "QUANTIZERS",
    "RKDDistiller",
    "RandomPruner",
    "Recipe",
    "RelationDistiller",
    "ReviewKDDistiller",
    "SCHEDULERS",
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
}

ORDER = [
    {"errors", "registry", "distributed", "files"},
    {"graph", "options", "html"},
    {"backends", "pass_base", "data", "timing", "weighted", "weights"},
    {"plan", "yaml_text", "manager", "observe", "library", "ledger", "artifact", "export", "serial", "reproducer", "stages"},
    {"quantization", "pruning", "distillation", "training"},
    {"passes"},
    {
        "models",
        "config",
        "components",
        "pipeline",
        "builder",
        "explain",
        "schema",
        "report",
        "commands",
        "bench",
        "__main__",
        "exit_status",
        "__init__",
    },
]
LAZY = {("graph", "artifact")}


def test_public_names_are_pinned() -> None:
    assert set(fxcompress.__all__) == PUBLIC


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(init.parent.relative_to(ROOT).parts) for init in PACKAGE.rglob("__init__.py") if "passes" not in init.parts
    }
    assert listed == found | {"fxcompress.passes"}


def test_the_library_is_a_relative_link_and_not_a_top_level_package() -> None:
    assert (PACKAGE / "passes").is_symlink()
    assert (PACKAGE / "passes").readlink() == Path("../passes")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import passes"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode != 0
    assert "imported as 'fxcompress.passes'" in run.stderr


def test_every_pass_is_a_file_of_its_name_with_a_first_line() -> None:
    for name, cls in library.passes().items():
        assert (ROOT / "passes" / f"{name.replace('-', '_')}.py").is_file()
        assert cls.__doc__
        assert cls.__doc__.splitlines()[0].endswith(".")


def level(part: str) -> int:
    return next(i for i, group in enumerate(ORDER) if part in group)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fxcompress"):
            names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            found.update(names)
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    for other in imports(file):
        known = other in {name for group in ORDER for name in group}
        assert not known or level(other) <= level(part) or (part, other) in LAZY, f"{part} imports {other}"
        techniques = {"quantization", "pruning", "distillation"}
        assert not ({part, other} <= techniques and part != other)


def test_nothing_rests_on_the_deprecated_quantization_package() -> None:
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "passes").glob("*.py")]:
        assert not re.search(r"torch\.(ao|quantization)\b", file.read_text()), file
