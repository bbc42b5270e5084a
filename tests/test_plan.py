"""Plans: every spelling, canonical text, and refusal at the door."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxcompress import Plan
from fxcompress.errors import PlanError
from fxcompress.passes.calibrate import Calibrate
from fxcompress.passes.fold_batchnorm import FoldBatchNorm

SPELLINGS: list[Any] = [
    [FoldBatchNorm(), "fuse-activations", {"insert-observers": {"calibrator": "minmax"}}],
    ["fold-batchnorm", "fuse-activations", {"insert-observers": {"calibrator": "minmax"}}],
    {"fold-batchnorm": None, "fuse-activations": {}, "insert-observers": {"calibrator": "minmax"}},
    {"steps": ["fold-batchnorm", "fuse-activations", {"insert-observers": {"calibrator": "minmax"}}]},
    "- fold-batchnorm\n- fuse-activations\n- insert-observers: {calibrator: minmax}\n",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_plan(spelling: Any, tmp_path: Path) -> None:
    plan = Plan.parse(spelling)
    assert plan == Plan.parse(SPELLINGS[0])
    assert Plan.parse(str(plan)) == plan
    (tmp_path / "plan.yaml").write_text(str(plan))
    assert Plan.parse(tmp_path / "plan.yaml") == Plan.parse(str(tmp_path / "plan.yaml")) == plan


@given(
    st.integers(1, 10**6), st.lists(st.sampled_from(["relu", "relu6"]), unique=True), st.sampled_from([None, True, False])
)
def test_text_parses_back_to_an_equal_plan(batches: int, activations: list[str], reduce: bool | None) -> None:
    observe = {"reduce_range": reduce, "exclude_layers": ["head", "layer*.0"]}
    steps = [{"fuse-activations": {"activations": activations}}, {"insert-observers": observe}, Calibrate(batches)]
    plan = Plan.parse(steps)
    assert Plan.parse(str(plan)) == plan


BAD: list[tuple[Any, str]] = [
    (["fold-batchnrom"], "step 1 : there is no pass 'fold-batchnrom'. Did you mean 'fold-batchnorm'"),
    ([{"calibrate": {"num_batch": 3}}], "'calibrate' has no option 'num_batch'. Did you mean 'num_batches'"),
    ([{"calibrate": {"num_batches": "3"}}], "option 'num_batches' is '3'"),
    ([{"calibrate": {"num_batches": 0}}], "greater than or equal to 1"),
    ([{"calibrate": {"num_batches": True}}], "option 'num_batches' is True"),
    ([{"insert-observers": {"backend": "fbgem"}}], "there is no backend 'fbgem'"),
    ([{"insert-observers": {"calibrator": "histgram"}}], "there is no calibration method 'histgram'"),
    ([{"insert-observers": {"calibrator_options": {"bins": 3}}}], "bins"),
    ([{"require": {"int8_macs": 1.5}}], "less than or equal to 1"),
    (["insert-observers", "lower"], "Put 'fold-quantization' before it"),
    (["calibrate", "open-attention"], "step 2 'open-attention' takes a float graph"),
    ([{"calibrate": 3}], "must be a mapping"),
    ([3], "step 1 is 3"),
    ([["calibrate"]], "write a pass's name"),
    ({"steps": "calibrate"}, "'steps' is a str"),
    ({"steps": [], "requires": {}}, "Did you mean 'require'"),
    (7, "not a int"),
    ("nonsense", "there is no file 'nonsense'"),
    ("missing.yaml", "cannot be read"),
    ("- !!python/object/apply:os.system [ls]\n", "not YAML"),
    ("- a: &x [1]\n- b: *x\n", "aliases"),
    ("- calibrate: {num_batches: 1, num_batches: 2}\n", "stands twice"),
    ("- [\n", "not YAML"),
]


@pytest.mark.parametrize(("plan", "message"), BAD)
def test_what_cannot_work_is_refused_by_name(plan: Any, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(plan)
    assert message in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_data_is_a_plan_or_a_plan_error(value: Any) -> None:
    with contextlib.suppress(PlanError):
        assert isinstance(Plan.parse(value), Plan)
