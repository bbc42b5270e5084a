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


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("- calibrate:\n\tnum_batches: 1\n", "line 2, column 1", "indent with spaces"),
        ("calibrate: num_batches: 1\n", "line 1, column 23", "quote a value"),
        ("- lower\n- calibrate: {}\n  - lower\n", "line 3, column 3", "items of one list"),
        ("calibrate: {}\nlower\n", "of line 2", "a key is followed by"),
        ("- {num_batches: 1\n- lower\n", "of line 1", "close what was opened"),
        ("? [a, b]\n: 1\n", "line 1, column 3", "a key is a word"),
        ("- lower\n---\n- lower\n", "line 2, column 1", "one document"),
        ("- lower\n- 'a\x07b'\n", "line 2", "take it out"),
        ("- lower\n- !!int x\n", "line 2", "cannot be read as int"),
        ("[" * 5000, "", "nested too deeply"),
    ],
)
def test_text_that_is_not_yaml_is_refused_with_the_place_and_what_to_do(
    text: str, where: str, what: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(PlanError) as caught:
        Plan.parse(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: this is not YAML") and where in message and what in message
    assert "<unicode string>" not in message


@pytest.mark.parametrize(
    ("content", "message"), [(b"- lower\n- \xff\n", "line 2 is not UTF-8"), (b"lower\n", "there is no file")]
)
def test_a_plan_file_that_holds_something_else_is_refused_by_its_name(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.parse(str(file))
    assert str(file) in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_data_is_a_plan_or_a_plan_error(value: Any) -> None:
    with contextlib.suppress(PlanError):
        assert isinstance(Plan.parse(value), Plan)
