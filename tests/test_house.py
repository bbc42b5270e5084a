"""The house itself: packaging, import directions, public names."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import fxcompress
from fxcompress import library
from fxcompress.graph.table import TABLE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fxcompress"

PUBLIC = {
    "AGPScheduler",
    "ATDistiller",
    "BaseDistiller",
    "CALIBRATORS",
    "CRITERIA",
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


def _named(root: Path, package: str) -> dict[str, Path]:
    files = {file: file.relative_to(root).with_suffix("").parts for file in sorted(root.rglob("*.py"))}
    return {".".join((package, *(part for part in parts if part != "__init__"))): file for file, parts in files.items()}


MODULES = _named(ROOT / "passes", "fxcompress.passes") | {
    name: file for name, file in _named(PACKAGE, "fxcompress").items() if "passes" not in file.relative_to(PACKAGE).parts
}
"""Every module of the package, and its file."""


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imported(module: str, *, lazily: bool) -> dict[str, set[str]]:
    """Module of ours → the names that ``module`` takes from it, inside functions as well where ``lazily``."""
    found: dict[str, set[str]] = defaultdict(set)
    statements = ast.walk(tree(module)) if lazily else iter(tree(module).body)
    for node in statements:
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found[whole if whole in MODULES else node.module].update(set() if whole in MODULES else {alias.name})
        elif isinstance(node, ast.Import):
            found.update({alias.name: set() for alias in node.names if alias.name in MODULES})
    return found


def attributes(module: str) -> dict[str, set[str]]:
    """Module of ours → the attributes that ``module`` reads off it, where it has the module itself."""
    held = {other.rpartition(".")[2]: other for other, names in imported(module, lazily=True).items() if not names}
    found: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in held:
            found[held[node.value.id]].add(node.attr)
    return found


def exported(module: str) -> set[str] | None:
    """``__all__``, or None where a module has none."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def level(part: str) -> int:
    return next(i for i, group in enumerate(ORDER) if part in group)


def test_every_part_of_the_package_has_one_place_in_the_order_of_imports() -> None:
    places = [part for group in ORDER for part in group]
    assert sorted(places) == sorted({part_of(module) for module in MODULES})


def test_imports_run_one_way() -> None:
    techniques = {"quantization", "pruning", "distillation"}
    for module in set(MODULES) - {"fxcompress"}:
        part = part_of(module)
        for other in {part_of(taken) for taken in imported(module, lazily=True)} - {"__init__"}:
            assert level(other) <= level(part) or (part, other) in LAZY, f"{module} imports {other}"
            assert not ({part, other} <= techniques and part != other), f"{module} imports {other}"


def test_files_import_one_another_in_no_circle() -> None:
    order = TopologicalSorter({module: imported(module, lazily=False) for module in MODULES})
    assert set(order.static_order()) == set(MODULES)


def test_what_a_file_takes_from_another_is_what_that_one_gives() -> None:
    for module in MODULES:
        for found in (imported(module, lazily=True), attributes(module)):
            for other, names in found.items():
                hidden = names - (exported(other) or names) - {"__version__"}
                assert not hidden, f"{module} takes {', '.join(sorted(hidden))}, which {other} does not list in __all__"
                private = {name for name in names if name.startswith("_") and not name.startswith("__")}
                assert not private, f"{module} takes {', '.join(sorted(private))} of {other}"


def test_nothing_rests_on_the_deprecated_quantization_package() -> None:
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "passes").glob("*.py")]:
        assert not re.search(r"torch\.(ao|quantization)\b", file.read_text()), file


MADE = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"}


def test_every_tensor_that_is_made_says_where() -> None:
    """A default device of the caller's is for tensors of the caller's."""
    silent = [
        f"{module}, line {node.lineno}"
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MADE | {"as_tensor"}}
        if not {"device", None} & {given.arg for given in node.keywords}
    ]
    assert not silent


def test_a_name_of_an_operator_is_in_one_row_of_the_table() -> None:
    names = Counter(name for op in TABLE for name in op.names.split())
    assert [name for name, rows in names.items() if rows > 1] == []
