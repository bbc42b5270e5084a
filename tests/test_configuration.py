"""Configurations that are refused, naming the file, the line and the key; and that any other builds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress import Plan
from fxcompress.builder import (
    DISTILLERS,
    PRUNERS,
    QUANTIZERS,
    build_compression_pipeline,
    build_pruner,
    components,
)
from fxcompress.components import TRAINING
from fxcompress.errors import ConfigError, PlanError
from fxcompress.models import build_data, build_model
from fxcompress.options import options_of
from fxcompress.pruning import AGPScheduler
from fxcompress.weights import load_weights
from tests.configurations import small, written


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("compression:\n  type: PTQQuantiser\n", 2, "Did you mean 'PTQQuantizer'"),
        ("compression:\n  type: PTQQuantizer\n  dtyp: int8\n", 3, "Did you mean 'dtype'"),
        ("compression:\n  type: PTQQuantizer\n  per_channel: 3\n", 3, "per_channel"),
        ("compression:\n  type: PTQQuantizer\n  calibration_method: entropi\n", 3, "entropi"),
        ("compression:\n  type: PTQQuantizer\n  epochs: 3\n", 3, "epochs"),
        ("compression:\n  type: MagnitudePruner\n  sparsity: 1.5\n", 3, "sparsity"),
        ("compression:\n  type: MagnitudePruner\n  sparsity: .nan\n", 3, "sparsity"),
        ("compression:\n  type: MagnitudePruner\n  finetune_epochs: -1\n", 3, "finetune_epochs"),
        ("compression:\n  type: MagnitudePruner\n  finetune:\n    lr: fast\n", 4, "lr"),
        ("compression:\n  type: MagnitudePruner\n  scheduler:\n    type: AGP\n", 4, "AGPScheduler"),
        ("compression:\n  type: MagnitudePruner\n  scheduler:\n    type: AGPScheduler\n    end_epoch: -1\n", 5, "end_epoch"),
        ("compression:\n  pipeline:\n  - type: MagnitudePruner\n  - sparsity: 0.5\n", 4, "step"),
        ("compression:\n  pipeline: []\n", 2, "list of stages"),
        ("compression:\n  type: PTQQuantizer\n  pipeline: []\n", 3, "contradicts"),
        ("compression:\n  prune: {type: PTQQuantizer}\n", 2, "there is no pruner"),
        ("compression:\n  type: PTQQuantizer\n  1: 2\n", 3, "no such key"),
        ("compression:\n  type: PTQQuantizer\n  on: 2\n", 3, "no such key"),
        ("compression:\n  type: PTQQuantizer\n  overrides: {conv: {bits: 99}}\n", 3, "overrides"),
        ("compression:\n  type: PTQQuantizer\n  overrides: {conv: {float: true, bits: 4}}\n", 3, "float contradicts bits"),
        ("compression:\n  type: PTQQuantizer\n  calibrator_options: {num_bins: 1}\n", 3, "num_bins"),
        ("compression:\n  type: QATQuantizer\n  observer_options: {num_bin: 1}\n", 3, "num_bin"),
        ("compression:\n  type: FeatureDistiller\n  teacher_layers: [a]\n  logit_distill: {alpha: ~}\n", 4, "alpha"),
        (
            "compression:\n  type: PTQQuantizer\n  calibration_method: minmax\n  calibrator_options: {per_channel: true}\n",
            4,
            "an activation has one range",
        ),
        ("compression:\n  type: MagnitudePruner\n  include_layers: [a, b]\n  exclude_layers: [b]\n", 4, "included as well"),
        ("compression:\n  type: MagnitudePruner\n  include_layers: []\n", 3, "names no layer"),
        ("compression:\n  type: MagnitudePruner\n  sparsity: 0.9\n  pruning_type: semi_structured\n", 3, "contradicts 2:4"),
        ("compression:\n  type: MagnitudePruner\n  finetune_epochs: 2\n  finetune:\n    epochs: 3\n", 5, "contradicts"),
        (
            "compression:\n  type: MagnitudePruner\n  sparsity: 0.3\n  scheduler:\n    type: AGPScheduler\n    "
            "target_sparsity: 0.8\n",
            6,
            "contradicts the pruner's sparsity",
        ),
        (
            "compression:\n  type: MagnitudePruner\n  finetune_epochs: 1\n  scheduler: {type: AGPScheduler, end_epoch: 2}\n",
            4,
            "training has 1 epochs",
        ),
        ("compression:\n  type: StructuredPruner\n  sparsity: 0.5\n  target: {macs: 0.5}\n", 4, "one or the other"),
        ("compression:\n  type: RandomPruner\n  seed: -1\n", 3, "seed"),
        ("compression:\n  type: RandomPruner\n  seed: 99999999999999999999999\n", 3, "seed"),
        (
            "compression:\n  type: MagnitudePruner\n  finetune:\n    optimizer: sgd\n    optimizer_options: {momentun: 1}\n",
            5,
            "momentun",
        ),
        ("compression:\n  type: MagnitudePruner\n  finetune:\n    optimizer_options: {lr: 1}\n", 4, "place of its own"),
        ("compression:\n  type: MagnitudePruner\n  finetune:\n    scheduler_options: {finl: 1}\n", 4, "finl"),
        ("compression:\n  type: LogitDistiller\n  alpha: -1\n", 3, "alpha"),
        ("compression:\n  type: DKDDistiller\n  warmup_epochs: -1\n", 3, "warmup_epochs"),
        ("compression: 3\n", 1, "mapping"),
        ("compression: {}\n", 1, "empty"),
        ("compression:\n  type: PTQQuantizer\nmodel:\n  type: resnet18\n  pretrained: no.pth\n", 5, "no.pth"),
    ],
)
def test_an_error_names_the_file_the_line_and_the_key(text: str, line: int, message: str, tmp_path: Path) -> None:
    if "resnet18" in text:
        pytest.importorskip("torchvision")
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        build_compression_pipeline(path)
    assert f"{path}, line {line}: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: [*a, *a]\n",
        "compression: !!python/object/apply:os.system ['true']\n",
        "compression: !!python/name:os.system\n",
        "compression: {type: PTQQuantizer, type: MagnitudePruner}\n",
        "compression: [unclosed\n",
        "&a [" * 500 + "\n",
        "- a list\n- of words\n",
        "\x00\n",
        "compression: {type: !!timestamp x}\n",
        "compression: {type: !!bool x}\n",
        "compression: {type: !!int ''}\n",
        "compression: {type: !!float ''}\n",
        "compression: {type: !!binary '@'}\n",
        "compression: !!set {type, dtype}\n",
        "compression: !!omap [type: PTQQuantizer]\n",
        "compression: {type: PTQQuantizer, <<: {type: MagnitudePruner}}\n",
        "compression: {type: PTQQuantizer, ? [a, b] : 1}\n",
        "compression: {type: PTQQuantizer, num_calibration_batches: " + "9" * 5000 + "}\n",
        'compression: {type: PTQQuantizer, exclude_layers: ["\\ud800"]}\n',
        "%YAML 9.9\n---\ncompression: {type: PTQQuantizer}\n",
        "compression: {type: PTQQuantizer}\n---\ncompression: {type: PTQQuantizer}\n",
    ],
)
def test_hostile_yaml_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        build_compression_pipeline(written(tmp_path, text))


def test_a_billion_laughs_are_not_laughed() -> None:
    bomb = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    with pytest.raises(ConfigError, match="line 2"):
        build_compression_pipeline(bomb)


@pytest.mark.parametrize("text", ["'" + "x" * 10**5 + "'", "[" + "1, " * 10**4 + "1]", "[" * 200 + "]" * 200])
def test_a_long_value_is_named_shortly(text: str) -> None:
    for key in ("type", "per_channel", "overrides", "exclude_layers"):
        kind = "" if key == "type" else "  type: PTQQuantizer\n"
        message = refusal(f"compression:\n{kind}  {key}: {text}\n")
        assert key in message
        assert len(message) < 1500


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no endless file here")
def test_an_endless_file_is_not_read_to_its_end() -> None:
    for read in (build_compression_pipeline, Plan.parse):
        with pytest.raises((ConfigError, PlanError), match="MiB"):
            read(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["a\0b.yaml", "x" * 5000 + ".yaml", "x" * 5000])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    for read in (build_compression_pipeline, Plan.parse):
        with pytest.raises((ConfigError, PlanError)) as caught:
            read(name)
        assert len(str(caught.value)) < 1500
    with pytest.raises(ConfigError, match="weights file") as wrong:
        load_weights(nn.Linear(1, 1), name)
    assert len(str(wrong.value)) < 1500


@pytest.mark.parametrize(
    ("description", "key"),
    [
        ({"type": "resnet18", "weights": "DEFAULT"}, "weights"),
        ({"type": "resnet18", "num_classes": -1}, ""),
        ({"type": "resnet18", "num_classes": 10**30}, ""),
        ({"type": "vit_b_16", "image_size": 10}, ""),
        ({"type": "mobilenet_v2", "width_mult": float("nan")}, ""),
    ],
)
def test_what_torchvision_refuses_is_an_error_of_one_line(description: dict[str, Any], key: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ConfigError) as caught:
        build_model(description, ("model",))
    assert key in caught.value.path or not key
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("samples", [0, -1, 10**30]),
        ("shape", [[-1, 2], [0], "3"]),
        ("classes", [0]),
        ("seed", [-1, 10**30]),
        ("batch_size", [0, 10**30]),
        ("workers", [-1]),
        ("shuffle", [1]),
    ],
)
def test_data_that_cannot_be_is_refused_at_its_key(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            build_data({"type": "random", key: value}, ("data",))
        assert caught.value.path == ("data", key)


def test_layer_names_are_checked_where_there_is_a_model(tmp_path: Path) -> None:
    path = written(tmp_path, "compression:\n  type: MagnitudePruner\n  exclude_layers:\n  - '0'\n  - hed\n")
    for build in (build_compression_pipeline, build_pruner):
        build(path)
        with pytest.raises(ConfigError, match=r"line 5.*hed"):
            build(path, small())


NAMES = sorted(components())
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**20), st.floats(), st.text("aé.:#{}[]*&! \n", max_size=6), st.dates()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("abc", max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, str, Any]:
    """A component's name, one of its keys (or a misspelt one), and a value that has nothing to do with it."""
    name = draw(st.sampled_from(NAMES))
    registry = next(r for r in (QUANTIZERS, PRUNERS, DISTILLERS) if name in r)
    keys = [*options_of(registry[name]), "type", "finetune", "finetune_epochs", "scheduler", "epochs", "distillers"]
    key = draw(st.sampled_from(keys))
    key = key if draw(st.booleans()) else draw(st.sampled_from([key + "s", key[1:] or "x", key.upper()]))
    return name, key, draw(VALUES)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_any_value_of_any_key_builds_or_is_refused_at_its_line(case: tuple[str, str, Any]) -> None:
    name, key, value = case
    registry = next(r for r in (QUANTIZERS, PRUNERS, DISTILLERS) if name in r)
    layers: dict[str, Any] = {k: ["a", "b"] for k in ("teacher_layers", "student_layers") if k in options_of(registry[name])}
    stage: dict[str, Any] = {"type": name, **layers, key: value}
    text = "compression:\n" + "".join(
        f"  {yaml.safe_dump({k: v}, default_flow_style=True).strip()[1:-1]}\n" for k, v in stage.items()
    )
    message = refusal(text)
    if message and "not YAML" not in message:
        assert message.startswith("the configuration, line ")
        assert key in message


NESTED: dict[str, tuple[str, list[str]]] = {
    "finetune": ("MagnitudePruner", sorted(TRAINING)),
    "scheduler": ("MagnitudePruner", ["type", *options_of(AGPScheduler)]),
    "target": ("StructuredPruner", ["parameters", "macs", "latency"]),
    "calibrator_options": ("PTQQuantizer", ["num_bins", "percentile", "symmetric", "per_channel", "axis"]),
    "overrides": ("PTQQuantizer", ["conv", "*"]),
    "optimizer_options": ("QATQuantizer", ["momentum", "lr", "weight_decay", "foreach"]),
    "logit_distill": ("FeatureDistiller", ["temperature", "alpha", "distill_weight", "output"]),
}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_value_inside_an_option_builds_or_is_refused_at_its_line(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(sorted(NESTED)))
    name, keys = NESTED[section]
    key = data.draw(st.sampled_from([*keys, keys[0] + "s", "x"]))
    layers = {"teacher_layers": ["a"], "student_layers": ["a"]} if name == "FeatureDistiller" else {}
    kind = {"type": "AGPScheduler"} if section == "scheduler" and key != "type" else {}
    stage = {"type": name, **layers, section: {**kind, key: data.draw(VALUES)}}
    text = yaml.safe_dump({"compression": stage}, sort_keys=False)
    line = text[: text.index(f"{section}:")].count("\n") + 1
    message = refusal(text)
    if message and "not YAML" not in message:
        found = re.match(r"the configuration, line (\d+): ", message)
        assert found, message
        assert int(found[1]) >= line, message


SECTIONS = {
    "model": {"type": "ResNet", "depth": 18, "num_classes": 2, "pretrained": None},
    "data": {
        "type": "random",
        "samples": 4,
        "shape": [1, 2, 2],
        "classes": 2,
        "batch_size": 2,
        "shuffle": True,
        "workers": 0,
    },
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_value_in_the_description_of_models_and_data_is_taken_or_refused_at_its_key(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(sorted(SECTIONS)))
    key = data.draw(st.sampled_from([*SECTIONS[section], "sampels", "depht"]))
    description = {**SECTIONS[section], key: data.draw(VALUES.filter(lambda v: not isinstance(v, int) or v < 50))}
    build = {"model": build_model, "data": build_data}[section]
    try:
        build(description, (section,))
    except ConfigError as error:
        path = error.path
    else:
        path = (section, key)
    assert path[0] == section
    assert len(path) < 2 or path[1] == key or path[1] in SECTIONS[section]


def refusal(text: str) -> str:
    """Why a configuration is refused, or an empty string."""
    try:
        build_compression_pipeline(text)
    except ConfigError as error:
        return str(error)
    return ""
