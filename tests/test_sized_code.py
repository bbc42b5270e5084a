"""Code that asks for sizes is traced as one graph: the batch stays free, and what else it decides by is guarded or said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import PTQQuantizer, coverage, trace
from fxcompress.errors import DataError
from fxcompress.graph.results import output_snr


def tokens(batch: int, length: int = 6) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(batch))


class Net(nn.Module):
    def __init__(self, code: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code = code
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head, self.places = nn.Linear(16, 4), nn.Embedding(12, 16)
        self.scale, self.table = np.float32(0.5), np.linspace(0, 1, 16, dtype=np.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.code(self, x))


def unpacked_shape(net: Any, x: Tensor) -> Tensor:
    shape = x.shape[:-1]
    hidden = (*shape, -1, 4)
    query, key, value = (layer(x).view(hidden).transpose(1, 2) for layer in net.layers)
    weights = (query @ key.transpose(2, 3) * 0.5).softmax(-1)
    return (weights @ value).transpose(1, 2).reshape(*shape, -1)


def arithmetic(net: Any, x: Tensor) -> Tensor:
    sizes = tuple(x.size())
    hidden = net.layers[0](x).view((*sizes[:2], 4, 4)) / math.sqrt(x.shape[-1]) / np.sqrt(x.shape[-1])
    return hidden.view(list(sizes)) * max(x.shape[1], 4)


def checked(net: Any, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    assert width == 16, f"{width} is no 16 in {x.shape}"
    if length > 12 or x[0].numel() == 0 or len(x.shape) != 3:
        raise ValueError(f"{tuple(x.shape)} is wrong")
    return net.layers[0](x).reshape(batch, -1, width)


def loop(net: Any, x: Tensor) -> Tensor:
    state, states = x.new_zeros(x.shape[0], 16), []
    for step in range(x.shape[1]):
        state = torch.tanh(net.layers[0](x[:, step]) + net.layers[1](state))
        states.append(state)
    return torch.stack(states, 1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def parts(net: Any, x: Tensor) -> Tensor:
    by_length = [layer(part) for layer, part in zip(net.layers, x.split(2, dim=1))]  # noqa: B905 - as many as there are
    return attend(*torch.cat(by_length, 1).repeat(1, 1, 3).chunk(3, -1))


def early_exit(net: Any, x: Tensor) -> Tensor:
    for number, layer in enumerate(net.layers):
        if number >= x.shape[1] // 3:
            break
        x = layer(x).relu()
    return x


def odd(net: Any, x: Tensor) -> Tensor:
    hidden = net.layers[0](x)
    return hidden * 2 if hidden.shape[1] % 2 else hidden


def factories(net: Any, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    bias = torch.zeros(length, length, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    hidden = net.layers[0](x + net.places(torch.arange(length, device=x.device)))
    padded = torch.zeros(batch, length + 2, 16, dtype=x.dtype)
    padded[:, 1:-1] = hidden
    return (hidden @ hidden.transpose(1, 2) + bias).softmax(-1) @ padded[:, 1:-1]


def written(net: Any, x: Tensor) -> Tensor:
    hidden = net.layers[0](x)
    first = hidden[:, 0]
    first += 1
    hidden[:, 1:, :4] *= 2
    hidden[..., -1] = hidden[..., 0]
    kept = net.layers[1](x)
    again = kept
    again += hidden
    count = x.shape[1]
    count += 1
    return again + kept * count + x.shape[1]


def cached(net: Any, x: Tensor) -> Tensor:
    cache: dict[int, Tensor] = {}
    if x.shape[1] not in cache:
        cache[int(x.shape[1])] = torch.linspace(0, 1, int(x.shape[1])).view(1, -1, 1)
    return net.layers[0](x) * cache[x.shape[1].__index__()]


def numbers_of_numpy(net: Any, x: Tensor) -> Tensor:
    return net.layers[0](x) * net.scale + torch.from_numpy(net.table)


def made_of_nothing(net: Any, x: Tensor) -> Tensor:
    line = torch.linspace(0, 1, 16).expand(x.shape[0], x.shape[1], -1)
    return (
        net.layers[0](x)
        + line
        + torch.arange(16).repeat(x.shape[0], 1)[:, None] * torch.ones(1).new_full((x.shape[1], 1), 2)
    )


def made_on_the_way(net: Any, x: Tensor) -> Tensor:
    return nn.Sequential(nn.ReLU(), nn.Flatten(1, 2))(net.layers[0](x)).view(x.shape)


CODES = [
    unpacked_shape,
    arithmetic,
    checked,
    loop,
    parts,
    early_exit,
    factories,
    written,
    cached,
    numbers_of_numpy,
    made_of_nothing,
    made_on_the_way,
]


@pytest.mark.parametrize("code", CODES)
def test_code_that_asks_for_sizes_is_one_graph_at_any_batch_size(code: Any, tmp_path: Path) -> None:
    model = Net(code).eval()
    traced = trace(model, tokens(2))
    assert {rung.rung for rung in traced.meta["rungs"]} <= {"note"}
    fxcompress.save(traced, tmp_path / "model")
    loaded = fxcompress.load(tmp_path / "model")
    for batch in (2, 3, 1):
        assert torch.equal(traced(tokens(batch)), model(tokens(batch)))
        assert torch.equal(loaded(tokens(batch)), model(tokens(batch)))


@pytest.mark.parametrize("code", CODES)
def test_layers_in_code_that_asks_for_sizes_run_in_integers(code: Any) -> None:
    model = Net(code).eval()
    quantized = PTQQuantizer(num_calibration_batches=1, progress=False).quantize(model, [tokens(2)])
    assert coverage(quantized).mac_share > 0.5
    for batch in (2, 3):
        with torch.no_grad():
            assert output_snr(model(tokens(batch)), quantized(tokens(batch))) > 15


@pytest.mark.parametrize(("code", "length"), [(early_exit, 9), (odd, 7), (loop, 7), (checked, 14)])
def test_sizes_that_go_another_way_are_refused_with_what_the_code_asks(code: Any, length: int) -> None:
    traced = trace(Net(code).eval(), tokens(2))
    with pytest.raises(DataError, match=r"decides by sizes, and .*\.shape\[1\].* compress the model with example_inputs"):
        traced(tokens(2, length))


def test_sizes_that_go_the_same_way_are_taken() -> None:
    model = Net(checked).eval()
    assert torch.equal(trace(model, tokens(2))(tokens(3, 4)), model(tokens(3, 4)))


def test_another_number_of_dimensions_is_refused_where_the_code_unpacked_a_shape() -> None:
    traced = trace(Net(unpacked_shape).eval(), tokens(2))
    with pytest.raises(DataError, match="argument 'x' has the number of dimensions 4"):
        traced(tokens(2)[None])


def test_sizes_of_values_that_decided_are_said() -> None:
    said = [rung.reason for rung in trace(Net(odd).eval(), tokens(2)).meta["rungs"]]
    assert said == ["its code decides by sizes, and what it does for others is not kept: dimension 1 of x"]


@pytest.mark.parametrize(
    "asked",
    [
        lambda batch: batch > 4,
        lambda batch: batch % 5 == 0,
        lambda batch: batch == 1,
        lambda batch: batch < 2,
        lambda batch: int(batch) > 100,
    ],
)
def test_a_decision_by_the_size_of_the_batch_is_left_to_export(asked: Callable[[Any], Any]) -> None:
    traced = trace(Net(lambda net, x: x * 2 if asked(net.layers[0](x).shape[0]) else x).eval(), tokens(2))
    (rung,) = traced.meta["rungs"]
    assert rung.rung == "exported" and rung.reason.startswith("its code decides by the size of the batch")


def broadcast(net: Any, x: Tensor) -> Tensor:
    bias = net.places.weight[:1]
    if x.shape[0] != 1 and bias.shape[0] != x.shape[0]:
        bias = bias.expand(x.shape[0], -1)
    return net.layers[0](x) + bias[:, None]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_code_that_does_the_same_for_one_sample_in_another_way_is_one_graph(batch: int) -> None:
    model = Net(broadcast).eval()
    traced = trace(model, tokens(batch))
    assert not traced.meta["rungs"]
    for other in (1, 2, 5):
        assert torch.equal(traced(tokens(other)), model(tokens(other)))


def test_a_decision_by_values_stays_with_python() -> None:
    model = Net(lambda net, x: x * 2 if net.layers[0](x).sum() > 0 else x).eval()
    traced = trace(model, tokens(2))
    assert [rung.rung for rung in traced.meta["rungs"]] == ["island"]
    for batch in range(1, 5):
        assert torch.allclose(traced(tokens(batch)), model(tokens(batch)), atol=1e-6)


def test_a_look_at_sizes_leaves_the_model_and_random_numbers_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.head = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.drop(self.norm(x))
            assert hidden.shape[2] == 16
            return self.head(hidden)

    model = Counting().train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    traced = trace(model, tokens(2))
    assert torch.equal(torch.rand(2), expected)
    held = model.norm.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in traced.get_submodule("norm").state_dict().items())
    assert int(held["num_batches_tracked"]) == 0


def test_what_is_given_by_name_behind_optional_arguments_is_taken_and_wanted() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor, mask: Tensor | None = None, **more: Tensor) -> Tensor:
            return self.head(x * more["gate"] if mask is None else x * mask)

    model, gate = Optional().eval(), torch.rand(16)
    traced = trace(model, {"x": tokens(2), "gate": gate})
    assert torch.equal(traced(tokens(3), gate=gate), model(tokens(3), gate=gate))
    with pytest.raises(DataError, match="argument 'gate' is missing"):
        traced(tokens(3))


def test_a_mapping_that_the_code_goes_through_keeps_its_keys() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 4)

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            return self.head(sum(given.values())) + sum(len(key) for key in given)

    model, batch = Summed().eval(), {"given": {"one": tokens(2), "three": tokens(2) + 1}}
    assert torch.equal(trace(model, batch)(**batch), model(**batch))


def test_logical_operators_are_not_taken_for_writes() -> None:
    def code(net: Any, x: Tensor) -> Tensor:
        positive, small = x > 0, x < 1
        both = positive & small
        return net.layers[0](x * both + x * (positive | small) * 2)

    model = Net(code).eval()
    traced = trace(model, tokens(2))
    assert torch.equal(traced(tokens(3)), model(tokens(3)))
