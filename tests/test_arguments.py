"""Every argument of every component, given what cannot be meant: taken, or refused by an error of the package's own."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress import (
    Recipe,
    SensitivityAnalyzer,
    build_compression_pipeline,
    build_distiller,
    build_pruner,
    build_quantizer,
)
from fxcompress.components import DISTILLERS, PRUNERS, QUANTIZERS
from fxcompress.errors import FxCompressError
from fxcompress.pruning.pruning_scheduler import SCHEDULERS
from fxcompress.quantization.calibrator import CALIBRATORS

NONSENSE: list[Any] = [
    *(float("nan"), float("inf"), -1, 0, 3.7, True, None),
    *("text", "", b"x", [], {}, (1, 2), [None], {"a": 1}, object(), int, torch.ones(2)),
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


def arguments() -> Iterator[Any]:
    registries = (QUANTIZERS, PRUNERS, DISTILLERS, CALIBRATORS, SCHEDULERS)
    made = {name: registry[name] for registry in registries for name in registry}
    for name, cls in {**made, "Recipe": Recipe, "SensitivityAnalyzer": SensitivityAnalyzer}.items():
        for parameter in inspect.signature(cls).parameters.values():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                yield pytest.param(cls, parameter.name, id=f"{name}-{parameter.name}")


@pytest.mark.parametrize(("cls", "argument"), list(arguments()))
def test_an_argument_that_cannot_be_meant_is_refused_by_name_of_the_package(cls: Any, argument: str) -> None:
    models = {"teacher": network(), "student": network()} if cls in DISTILLERS.values() else {}
    for value in NONSENSE:
        with contextlib.suppress(FxCompressError):
            cls(**{**models, argument: value})


CONFIGURATIONS: list[tuple[Any, dict[str, Any]]] = [
    (build_quantizer, {"type": "PTQQuantizer", "backend": "fbgemm", "dtype": "int8", "num_calibration_batches": 4}),
    (build_quantizer, {"type": "QATQuantizer", "epochs": 2, "lr": 0.1, "freeze_bn_epochs": 1, "observer": "minmax"}),
    (build_quantizer, {"type": "LSQQuantizer", "bits": 4, "learn_scale": True, "overrides": {"0": {"bits": 8}}}),
    (build_pruner, {"type": "StructuredPruner", "sparsity": 0.5, "criterion": "l1_norm", "round_to": 8}),
    (
        build_pruner,
        {"type": "MagnitudePruner", "sparsity": 0.5, "scheduler": {"type": "AGPScheduler", "end_epoch": 3}, "n": 2, "m": 4},
    ),
    (build_distiller, {"type": "LogitDistiller", "temperature": 4.0, "task_weight": 0.5}),
    (build_distiller, {"type": "FeatureDistiller", "teacher_layers": ["2"], "student_layers": ["2"], "loss_type": "mse"}),
    (
        build_compression_pipeline,
        {
            "compression": {
                "pipeline": [
                    {"type": "MagnitudePruner", "sparsity": 0.5, "finetune_epochs": 1},
                    {"type": "QATQuantizer", "epochs": 1, "lr": 0.1},
                ]
            }
        },
    ),
    (
        build_compression_pipeline,
        {"compression": {"prune": {"type": "L1UnstructuredPruner"}, "quantize": {"type": "PTQQuantizer"}}},
    ),
]


def places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [here, *(place for key, value in items for place in places(value, (*here, key)))]


def built(build: Any, config: Any) -> Any:
    return build(config, network(), network()) if build is build_distiller else build(config)


@pytest.mark.parametrize(("build", "config"), CONFIGURATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_configurations_that_are_altered_are_right(build: Any, config: dict[str, Any]) -> None:
    assert built(build, config) is not None


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just([[1]])
)


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_configuration_that_is_slightly_wrong_is_built_or_refused_by_an_error_of_the_package(data: Any) -> None:
    build, config = data.draw(st.sampled_from(CONFIGURATIONS))
    config = copy.deepcopy(config)
    path = data.draw(st.sampled_from(places(config)[1:]))
    target = config
    for key in path[:-1]:
        target = target[key]
    if data.draw(st.booleans()) and isinstance(target, dict):
        target[data.draw(st.text(max_size=4) | st.integers() | st.sampled_from(["typ", "sparsty", "epoch"]))] = target.pop(
            path[-1]
        )
    else:
        target[path[-1]] = data.draw(WRONG)
    with contextlib.suppress(FxCompressError):
        built(build, config)


@pytest.mark.parametrize(
    ("build", "config", "meant"),
    [
        (build_quantizer, {"type": "PTQQuantiser"}, "PTQQuantizer"),
        (build_quantizer, {"type": "PTQQuantizer", "bakend": "fbgemm"}, "backend"),
        (build_quantizer, {"type": "PTQQuantizer", "backend": "fbgem"}, "fbgemm"),
        (build_quantizer, {"type": "PTQQuantizer", "calibration_method": "histgram"}, "histogram"),
        (build_pruner, {"type": "StructuredPruner", "sparsty": 0.5}, "sparsity"),
        (build_pruner, {"type": "MagnitudePruner", "criterion": "l11"}, "l1"),
        (build_pruner, {"type": "StructuredPruner", "criterion": "l1norm"}, "l1_norm"),
        (build_pruner, {"type": "MagnitudePruner", "scheduler": {"type": "AGPSchedular"}}, "AGPScheduler"),
        (build_distiller, {"type": "LogitDistiler"}, "LogitDistiller"),
        (build_distiller, {"type": "LogitDistiller", "temprature": 4.0}, "temperature"),
        (build_compression_pipeline, {"compression": {"pipelin": []}}, "pipeline"),
        (build_compression_pipeline, {"compression": {"quantise": {"type": "PTQQuantizer"}}}, "quantize"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(build: Any, config: Any, meant: str) -> None:
    with pytest.raises(FxCompressError, match=f"Did you mean .*'{meant}'"):
        built(build, config)
