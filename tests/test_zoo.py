"""A seeded sample of torchvision's models: captured, equal to eager, quantized.

The whole sweep is ``python -m benchmarks quantized-zoo``.
"""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torchvision")

from benchmarks import zoo
from fxcompress.bench import models

LIGHT = [
    "alexnet",
    "convnext_tiny",
    "deeplabv3_mobilenet_v3_large",
    "densenet121",
    "efficientnet_b0",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcn_resnet50",
    "googlenet",
    "inception_v3",
    "lraspp_mobilenet_v3_large",
    "mnasnet0_5",
    "mobilenet_v3_large",
    "r3d_18",
    "raft_small",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "ssdlite320_mobilenet_v3_large",
    "swin_t",
    "vit_b_32",
]


def test_every_model_is_known_to_the_benchmark() -> None:
    assert set(LIGHT) <= set(models.names())
    assert len(models.names()) >= 109


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", *random.Random(0).sample(LIGHT, 8)])
@pytest.mark.filterwarnings("ignore")
def test_models_are_captured_equal_and_quantized(name: str) -> None:
    row = zoo.examine(name)
    assert row["eager"] == "equal"
    assert row["finite"]
    if name in ("resnet50", "mobilenet_v2"):
        assert row["int8 MACs"] == "100.0%"
        done, total = row["int8 nodes"].split("/")
        assert done == total
