"""Analyses made wrong on purpose: whatever is forgotten or shifted, an oracle or the run itself must notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.graph import ops
from fxcompress.graph.channels import Channels, analysis
from fxcompress.graph.channels.analysis import _Grouping
from fxcompress.graph.channels.blocks import resolve
from fxcompress.graph.channels.kept import Kept
from fxcompress.graph.channels.labels import Value
from fxcompress.graph.channels.proof import Proof
from fxcompress.graph.channels.walk import Count, Walk
from fxcompress.graph.inputs import arguments
from tests.channel_cases import LeaveOutTheSilent, error, silenced
from tests.channel_strategies import Drawn, channel_networks
from tests.test_channel_random import ALWAYS, EXAMPLES, analysed, picked, plain, shrink

some = settings(max_examples=max(12, EXAMPLES // 20), **ALWAYS)  # type: ignore[arg-type]


@dataclass
class Subject:
    """An analysis to be made wrong, and the units that are to go."""

    drawn: Drawn
    channels: Channels
    removed: np.ndarray
    chance: np.random.Generator

    @property
    def live(self) -> np.ndarray:
        """By class: whether it is a unit that other tensors hold too, so that forgetting it somewhere is wrong."""
        counts = np.zeros(len(self.channels.root), dtype=np.int64)
        for group in self.channels.groups:
            for roots in group.slices.values():
                counts[np.intersect1d(roots, group.blocks)] += 1
        return counts > 1

    def place(self, wanted: Callable[[np.ndarray], bool]) -> tuple[str, int] | None:
        """A tensor dimension drawn from those whose classes are ``wanted`` and whose entries all matter to the result."""
        tensors = self.channels.walk.tensors.items()
        found = [(n, d) for n, v in tensors for d, label in v.labels.items() if wanted(self.channels.root[label.array])]
        found = [found[i] for i in self.chance.permutation(len(found))]
        return next(((name, int(dim)) for name, dim in found if self.matters(name, int(dim))), None)

    def matters(self, name: str, dim: int) -> bool:
        """Whether another value in any slice of this dimension is another result, as far as one input tells."""
        module = copy.deepcopy(self.channels.walk.module)
        tensor = {**dict(module.named_parameters()), **dict(module.named_buffers())}[name]
        with torch.no_grad():
            before = module(self.drawn.small)
            for index in range(tensor.shape[dim]):
                part = tensor.select(dim, index)
                saved = part.clone()
                part.add_(0.4)
                if same(module(self.drawn.small), before):
                    return False
                part.copy_(saved)
        return True

    def one(self, places: list[Any]) -> Any:
        return places[int(self.chance.integers(len(places)))]


def same(first: Any, second: Any) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def forget_a_dimension(subject: Subject) -> str | None:
    place = subject.place(lambda roots: bool(np.isin(roots, subject.removed).any() and subject.live[roots].all()))
    if place is None:
        return None
    name, dim = place
    del subject.channels.walk.tensors[name].labels[dim]
    return f"{name} dimension {dim} forgotten"


def rearranged(subject: Subject, name: str, dim: int, array: np.ndarray) -> str:
    labels = subject.channels.walk.tensors[name].labels
    labels[dim] = labels[dim].with_array(array)
    return f"{name} dimension {dim} rearranged"


def shift_a_label(subject: Subject) -> str | None:
    root, live = subject.channels.root, subject.live

    def changes(roots: np.ndarray) -> bool:
        line = roots.reshape(-1)
        goes = np.isin(line, subject.removed)
        return bool(live[line].all()) and roots.size == max(roots.shape) and bool((np.roll(goes, 1) != goes).any())

    place = subject.place(changes)
    if place is None:
        return None
    name, dim = place
    label = subject.channels.walk.tensors[name].labels[dim]
    assert (root[label.array] != 0).all()
    return rearranged(subject, name, dim, np.roll(label.array, 1, axis=dim))


def swap_two_atoms(subject: Subject) -> str | None:
    root, live = subject.channels.root, subject.live

    def several(roots: np.ndarray) -> bool:
        line = roots.reshape(-1)
        goes = np.isin(line, subject.removed)
        return roots.size == max(roots.shape) and bool((live[line] & goes).any() and (live[line] & ~goes).any())

    place = subject.place(several)
    if place is None:
        return None
    name, dim = place
    array = subject.channels.walk.tensors[name].labels[dim].array.copy()
    line = array.reshape(-1)
    units = root[line]
    goes = np.isin(units, subject.removed)  # two that stay, or the two of a pair, are swapped without a trace
    first = int(subject.chance.choice(np.flatnonzero(live[units] & goes)))
    second = int(subject.chance.choice(np.flatnonzero(live[units] & ~goes)))
    line[first], line[second] = line[second], line[first]
    return rearranged(subject, name, dim, array)


def stated(count: Count) -> bool:
    """Whether the module or the call says the number at all."""
    call = ops.read(count.node)
    return count.node.op == "call_module" or (call is not None and call[count.name.partition(".")[0]] is not None)


def forget_a_count(subject: Subject) -> str | None:
    kept = Kept.without(subject.channels.root, subject.removed)
    counts = subject.channels.walk.counts
    changing = [i for i, count in enumerate(counts) if kept.count(count.atoms) != count.atoms.size and stated(count)]
    if not changing:
        return None
    gone = counts.pop(subject.one(changing))
    return f"{gone.name} of {gone.node.name} forgotten"


MUTATIONS = (forget_a_dimension, shift_a_label, swap_two_atoms, forget_a_count)


def noticed(subject: Subject) -> bool:
    """Whether the cut, a run, an oracle, or an attribute that contradicts its tensors gives the mistake away."""
    channels, drawn = subject.channels, subject.drawn
    try:
        proofs = [Proof(channels, subject.removed, arguments(drawn.small), seed) for seed in range(3)]
        shrink(channels, subject.removed)
        small = channels.walk.module
        small(drawn.large)
        gaps = [gap for proof in proofs for gap in proof.errors().values()]
    except Exception:  # whatever the mistake makes fail: it was noticed
        return True
    return max(gaps) > 1e-10 or contradictory(small)


STATED = {"num_features": "weight", "num_channels": "weight", "num_parameters": "weight", "normalized_shape": "weight"}


def contradictory(model: nn.Module) -> bool:
    """Whether an attribute states another size than the tensors of its module have."""
    for part in model.modules():
        for name, leaf in STATED.items():
            stated, tensor = getattr(part, name, None), getattr(part, leaf, None)
            if isinstance(stated, (int, tuple)) and isinstance(tensor, torch.Tensor):
                sizes = (stated,) if isinstance(stated, int) else tuple(stated)
                if sizes != tuple(tensor.shape):
                    return True
    return False


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda m: m.__name__)
def test_every_mistake_is_noticed(mutate: Callable[[Subject], str | None]) -> None:
    tried: list[str] = []

    @some
    @given(drawn=channel_networks(), seed=st.integers(0, 999))
    def run(drawn: Drawn, seed: int) -> None:
        channels = analysed(drawn)
        subject = Subject(drawn, channels, picked(channels, 0.5, seed), np.random.default_rng(seed))
        what = mutate(subject)
        if what is None:
            return
        tried.append(what)
        assert noticed(subject), what

    run()
    assert len(tried) > 0


@some
@given(drawn=channel_networks(), seed=st.integers(0, 999))
def test_a_forgotten_tie_is_noticed_wherever_the_eager_model_disagrees(drawn: Drawn, seed: int) -> None:
    channels, chance = analysed(drawn), np.random.default_rng(seed)
    edges = channels.walk.atoms._edges
    wrong = [k for k, (a, b) in enumerate(edges) if ((a != b) & (a != 0) & (b != 0)).any()]
    if not wrong:
        return
    del edges[int(chance.choice(wrong))]
    mutant = _Grouping(channels.walk, resolve(channels.walk.atoms, channels.walk.sites.blocks), "out").run()
    judge(drawn, mutant, seed, chance)


def judge(drawn: Drawn, mutant: Channels, seed: int, chance: np.random.Generator) -> None:
    """A wrong analysis must be noticed, or cut what the eager model agrees with."""
    try:
        removed = picked(mutant, 0.5, seed)
    except Exception:  # blocks that no longer fit together
        return
    if noticed(Subject(drawn, mutant, removed, chance)):
        return
    truth = silenced(plain(drawn.model), mutant.walk.module)
    with torch.no_grad(), LeaveOutTheSilent():
        expected = truth(drawn.small)
    assert error(expected, mutant.walk.module(drawn.small)) <= 1e-10


@some
@given(drawn=channel_networks(), seed=st.integers(0, 999))
def test_a_rule_that_shifts_or_drops_a_label_is_noticed_wherever_the_eager_model_disagrees(drawn: Drawn, seed: int) -> None:
    chance = np.random.default_rng(seed)
    values = analysed(drawn).walk.env
    labelled = [node.name for node, value in values.items() if isinstance(value, Value) and value.labels and node.users]
    if not labelled:
        return
    target, drops = labelled[int(chance.integers(len(labelled)))], bool(chance.integers(2))

    class Wrong(Walk):
        def _visit(self, node: fx.Node) -> Any:
            found = super()._visit(node)
            if node.name != target or not isinstance(found, Value) or not found.labels:
                return found
            dim = int(chance.choice(sorted(found.labels)))
            label = found.labels[dim]
            rest = {d: other for d, other in found.labels.items() if d != dim}
            shifted = {} if drops else {dim: label.with_array(np.roll(label.array, 1, axis=dim))}
            return Value(found.shape, {**rest, **shifted})

    with mock.patch.object(analysis, "Walk", Wrong):
        try:
            mutant = analysed(drawn)
        except Exception:  # labels that no longer fit together
            return
    judge(drawn, mutant, seed, chance)


def test_an_unmutated_analysis_passes_the_same_judge() -> None:
    @some
    @given(drawn=channel_networks(), seed=st.integers(0, 999))
    def run(drawn: Drawn, seed: int) -> None:
        channels = analysed(drawn)
        labels = [v for v in channels.walk.tensors.values() if isinstance(v, Value)]
        assert labels
        kept = Subject(drawn, channels, np.empty(0, dtype=np.int64), np.random.default_rng(seed))
        assert not noticed(kept)

    run()
