"""Hundreds of models that are hard to prune: each becomes smaller and right, or says why it cannot."""

from __future__ import annotations

import copy
import os
import re
import zlib
from typing import Any

import pytest
import torch

from fxcompress.errors import PassError
from tests import (
    hostile_attention,
    hostile_designs,
    hostile_layers,
    hostile_moves,
    hostile_networks,
    hostile_norms,
    hostile_picks,
    hostile_spellings,
    hostile_sums,
    hostile_weights,
)
from tests.channel_cases import Hostile, LeaveOutTheSilent, error, lived_in, prune, remarks, silenced

PAGES = (
    hostile_moves,
    hostile_picks,
    hostile_sums,
    hostile_layers,
    hostile_norms,
    hostile_weights,
    hostile_networks,
    hostile_attention,
    hostile_spellings,
    hostile_designs,
)
MODELS: dict[str, Hostile] = {name: model for page in PAGES for name, model in page.MODELS.items()}

EVERY = bool(os.environ.get("CHANNEL_POLICIES"))
"""Whether each model is pruned by every policy, or by one of them, which its name decides."""

POLICIES: list[dict[str, Any]] = [
    {"criterion": "random"},
    {"criterion": "l1_norm", "policy": "exact"},
    {"criterion": "random", "global_pruning": True, "sparsity": 0.7, "seed": 3},
    {"criterion": "random", "prune_heads": True, "pruning_dim": 1, "round_to": 2, "sparsity": 0.3, "seed": 1},
    {"criterion": "l1_norm", "policy": "compensate"},
]


def pruned(model: Any, case: Hostile, policy: dict[str, Any]) -> Any:
    """The smaller model, or None where everything is frozen; proved by both oracles, and the caller's model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        small, pruner = prune(model, case.inputs, **{**policy, **case.options})
    except PassError as error:
        refusal = str(error)
        small = None
    if small is None:
        strict = policy.get("policy") == "exact" or policy.get("prune_heads")
        assert "every one is frozen" in refusal and (strict or (case.frozen and case.frozen in refusal)), refusal
        return None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    said = remarks(pruner)
    errors = re.search(r"permutation error (\S+), silence error ([^'\s]+)", said)
    assert errors is not None and max(float(errors[1]), float(errors[2])) <= 1e-10, said
    assert "is not understood" not in said
    assert "the analysis is wrong" not in said, said
    return small


@pytest.mark.parametrize("name", MODELS)
def test_it_is_right_or_says_why_it_stays(name: str) -> None:
    case = MODELS[name]
    torch.manual_seed(0)
    model = lived_in(case.build())
    for policy in POLICIES if EVERY else [POLICIES[max(0, zlib.crc32(name.encode()) % 8 - 3)]]:
        small = pruned(model, case, policy)
        if small is None:
            continue
        truth = silenced(copy.deepcopy(model), small)
        for call in [case.inputs, *case.more]:
            with torch.no_grad(), LeaveOutTheSilent():
                expected = truth(*call)
            with torch.no_grad():
                found = small(*call)
            if not case.statistics and policy.get("policy") != "compensate":
                assert error(expected, found) <= 1e-9
