"""Every registered pass, on networks drawn at random: the graph contract holds and every promise is kept."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch.utils import _pytree as pytree

import fxcompress
from fxcompress import PassManager, library, trace
from fxcompress.errors import ConfigError, PassError
from fxcompress.graph import verify
from fxcompress.graph.results import output_snr
from tests.strategies import Drawn, networks

INT8 = [
    "remove-dead",
    "fold-batchnorm",
    "fuse-activations",
    {"insert-observers": {"calibrator": "minmax"}},
    {"calibrate": {"num_batches": 1}},
    "fold-quantization",
    "lower",
]
QUICK: dict[str, dict[str, Any]] = {
    "adaround": {"iterations": 10},
    "recover-accuracy": {"max_drop": 0.001, "adaround_iterations": 10},
}
UP_TO = {"float": 0, "observed": 5, "qdq": 6, "lowered": 7}
common = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def compress(drawn: Drawn, plan: Any, model: Any = None) -> Any:
    manager = PassManager(plan, reproducer=False, progress=False)
    return manager.run(drawn.model if model is None else model, drawn.call, [drawn.batch])


def same(a: Any, b: Any) -> bool:
    return pytree.tree_structure(a) == pytree.tree_structure(b) and all(
        torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    )


@given(networks())
@common
def test_tracing_keeps_outputs_names_and_sharing(drawn: Drawn) -> None:
    model, call = drawn.model, drawn.call
    before = copy.deepcopy(model.state_dict())
    traced = trace(model, call)
    verify.check(traced)
    with torch.no_grad():
        assert same(model(*call), traced(*call))
    assert set(dict(traced.named_parameters())) <= set(dict(model.named_parameters()))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def _prefix(name: str) -> list[Any]:
    """The shortest usual plan that brings the graph to a stage the pass takes."""
    steps = INT8[: UP_TO[library.find(name).takes[0]]]
    return [step for step in steps if name not in (step, *step)]


UNLABELLED = sorted(name for name, cls in library.passes().items() if "labels" not in cls.needs)
"""Passes that learn from labels have pages of their own: networks drawn at random are no classifiers."""


@pytest.mark.parametrize("name", UNLABELLED)
@given(drawn=networks())
@common
def test_every_pass_keeps_the_contract(name: str, drawn: Drawn) -> None:
    model, call = drawn.model, drawn.call
    before = copy.deepcopy(model.state_dict())
    try:
        result = compress(drawn, [*_prefix(name), {name: QUICK.get(name, {})}])
    except PassError as error:
        assume("every one is frozen" not in str(error))  # some networks have nothing that can go
        raise
    except ConfigError as error:
        assume("can be left out" not in str(error))
        raise
    with torch.no_grad():
        expected, found = model(*call), result(*call)
    assert pytree.tree_structure(expected) == pytree.tree_structure(found)
    assert all(bool(t.isfinite().all()) for t in pytree.tree_leaves(found))
    assert not any(module.training for module in result.modules())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@given(networks())
@common
def test_int8_stays_close_copies_pickles_and_saves(drawn: Drawn) -> None:
    model, call = drawn.model, drawn.call
    result = compress(drawn, INT8)
    with torch.no_grad():
        expected, found = model(*call), result(*call)
        assert output_snr(expected, found) > 10
        assert same(found, copy.deepcopy(result)(*call))
        assert same(found, pickle.loads(pickle.dumps(result))(*call))


@pytest.mark.parametrize("stage", UP_TO)
@given(drawn=networks())
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_saved_model_computes_the_same_bits(stage: str, drawn: Drawn, tmp_path: Path) -> None:
    _model, call = drawn.model, drawn.call
    result = compress(drawn, INT8[: UP_TO[stage]])
    fxcompress.save(result, tmp_path / "model")
    loaded = fxcompress.load(tmp_path / "model")
    with torch.no_grad():
        assert same(result(*call), loaded(*call))
    assert loaded.meta["stage"] == stage
    if stage == "observed":
        both = [compress(drawn, INT8[5:], m) for m in (result, loaded)]
        assert same(both[0](*call), both[1](*call))


@given(networks())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_lowered_kernels_agree_with_the_reference_graph(drawn: Drawn) -> None:
    """Quantize/dequantize operators in float against integer kernels: bounded by a few steps of the coarsest output grid."""
    _model, call = drawn.model, drawn.call
    reference = compress(drawn, INT8[:6])
    lowered = compress(drawn, "[lower]", reference)
    with torch.no_grad():
        assert output_snr(reference(*call), lowered(*call)) > 20
