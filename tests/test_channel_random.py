"""Random networks: every analysis is proved by both oracles, by the eager model, and by counting."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxcompress import trace
from fxcompress.graph.channels import Channels, analyse, predict
from fxcompress.graph.channels.cut import cut
from fxcompress.graph.channels.kept import Kept
from fxcompress.graph.channels.proof import Proof
from fxcompress.graph.channels.rewriting import UnprovableError
from fxcompress.graph.cost import macs
from fxcompress.graph.inputs import arguments
from fxcompress.graph.settling import settle
from fxcompress.pass_base import Context
from fxcompress.passes.open_attention import OpenAttention
from fxcompress.pruning.selection import Budget, choose, removed_classes
from fxcompress.pruning.sites import Mask
from tests.channel_cases import LeaveOutTheSilent, error, shapes, silenced
from tests.channel_strategies import Drawn, channel_networks

EXAMPLES = int(os.environ.get("CHANNEL_EXAMPLES", "240"))
"""Networks drawn by the first test; the others draw a twelfth of them."""

CHANCE = "CHANNEL_EXAMPLES" in os.environ
"""Whether networks differ from run to run, as in a long search; otherwise every run draws the same ones."""

ALWAYS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": not CHANCE}

many = settings(max_examples=EXAMPLES, **ALWAYS)  # type: ignore[arg-type]
some = settings(max_examples=max(1, EXAMPLES // 12), **ALWAYS)  # type: ignore[arg-type]


def analysed(drawn: Drawn, refused: dict[str, str] | None = None, **options: Any) -> Channels:
    return analyse(captured(drawn), refused=refused, **options)


def captured(drawn: Drawn) -> fx.GraphModule:
    """The network as a pruner analyses it: traced, weights plain, attention opened."""
    module, call = trace(drawn.model, drawn.small), arguments(drawn.small)
    list(settle(module, Mask))
    OpenAttention().run(module, Context(inputs={"": call}))
    module.recompile()
    return module


def picked(channels: Channels, share: float, seed: int) -> np.ndarray:
    """Units drawn at random, a share of every group, as a pruner would choose them."""
    generator = torch.Generator().manual_seed(seed)
    found = {g.name: torch.rand(g.blocks.shape, generator=generator, dtype=torch.float64) for g in channels.groups}
    return removed_classes(channels, choose(channels, found, Budget(share, round_to=1)))


def shrink(channels: Channels, removed: np.ndarray) -> None:
    """Cut, and regenerate the code."""
    cut(channels, removed)
    channels.walk.module.recompile()


def plain(model: nn.Module) -> nn.Module:
    """A copy with computed weights made plain."""
    model = copy.deepcopy(model)
    list(settle(model, Mask))
    return model


def pruned(drawn: Drawn, share: float, seed: int, **options: Any) -> tuple[Channels, np.ndarray, Proof]:
    """(channels after the cut, classes removed, the proof that was begun before it)."""
    refused: dict[str, str] = {}
    while True:
        channels = analysed(drawn, refused, **options)
        removed = picked(channels, share, seed)
        proof = Proof(channels, removed, arguments(drawn.small))
        try:
            shrink(channels, removed)
            return channels, removed, proof
        except UnprovableError as found:
            refused[found.node] = "no form of its numbers is proved right"


@many
@given(drawn=channel_networks(), share=st.sampled_from([0.25, 0.5, 0.7]), seed=st.integers(0, 99), heads=st.booleans())
def test_what_is_left_computes_what_it_did(drawn: Drawn, share: float, seed: int, heads: bool) -> None:
    channels, _, proof = pruned(drawn, share, seed, heads=heads)
    small = channels.walk.module
    for oracle, gap in proof.errors().items():
        assert gap <= 1e-10, oracle
    truth = silenced(plain(drawn.model), small)
    for images in (drawn.small, drawn.large):
        with torch.no_grad():
            found = small(images)
            with LeaveOutTheSilent():
                expected = truth(images)
        assert error(expected, found) <= 1e-10


@some
@given(drawn=channel_networks(), share=st.sampled_from([0.3, 0.6]), seed=st.integers(0, 99))
def test_what_is_predicted_is_what_is_counted(drawn: Drawn, share: float, seed: int) -> None:
    channels = analysed(drawn)
    removed = picked(channels, share, seed)
    kept = Kept.without(channels.root, removed)
    parameters, operations = predict.parameters(channels, kept), predict.macs(channels, kept)
    try:
        shrink(channels, removed)
    except UnprovableError:
        return
    small = channels.walk.module
    assert parameters == sum(p.numel() for p in small.parameters())
    again = trace(small, drawn.small)
    assert operations == sum(macs(node) for node in again.graph.nodes if node.op.startswith("call"))


@some
@given(drawn=channel_networks())
def test_a_cut_of_nothing_changes_no_bit(drawn: Drawn) -> None:
    channels = analysed(drawn)
    module = channels.walk.module
    code, before = module.code, module(drawn.small)
    assert error(drawn.model(drawn.small), before) <= 1e-12
    shrink(channels, np.empty(0, dtype=np.int64))
    assert module.code == code
    assert error(before, module(drawn.small)) == 0


@some
@given(drawn=channel_networks(), seed=st.integers(0, 99))
def test_one_cut_after_another_is_both_at_once_in_either_order(drawn: Drawn, seed: int) -> None:
    grouped = [part for part in drawn.model.modules() if isinstance(part, nn.Conv2d) and part.groups > 1]
    assume(not grouped)  # a group that is down to one channel goes as a whole from then on
    channels = analysed(drawn)
    removed = picked(channels, 0.5, seed)
    parts = [np.intersect1d(group.blocks, removed) for group in channels.groups]
    first, second = (np.concatenate([*parts[i::2], np.empty(0, dtype=np.int64)]) for i in (0, 1))
    try:
        shrink(channels, removed)
        both = channels.walk.module
        orders = [one_after_another(drawn, [first, second]), one_after_another(drawn, [second, first])]
    except UnprovableError:
        return
    for other in orders:
        assert shapes(other).items() >= {n: s for n, s in shapes(both).items() if "index" not in n}.items()
        assert error(both(drawn.small), other(drawn.small)) <= 1e-12


def one_after_another(drawn: Drawn, removals: list[np.ndarray]) -> Any:
    """Cuts in turn, each after an analysis of its own; units are found again by the entries of the tensors they own."""
    channels = analysed(drawn)
    original = channels
    for position, removal in enumerate(removals):
        if position:
            channels = analyse(channels.walk.module)
            removal = translated(original, channels, removals[0], removal)
        shrink(channels, removal)
    return channels.walk.module


def translated(before: Channels, after: Channels, gone: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The classes ``wanted`` of one analysis in the analysis of what is left after ``gone``."""
    found = [np.empty(0, dtype=np.int64)]
    for name, value in before.walk.tensors.items():
        for dim, label in value.labels.items():
            if label.array.size != label.array.shape[dim]:
                continue
            roots = before.root[label.array].ravel()
            left = roots[~np.isin(roots, gone)]
            now = after.root[after.walk.tensors[name].labels[dim].array] if dim in after.walk.tensors[name].labels else None
            if now is not None and now.size == len(left):
                found.append(now.ravel()[np.isin(left, wanted)])
    return np.unique(np.concatenate(found))
