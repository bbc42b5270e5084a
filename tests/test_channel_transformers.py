"""nn.MultiheadAttention in all its forms, and torch's own transformer layers: opened, pruned, and held against the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import PTQQuantizer, coverage, trace
from fxcompress.graph import ops
from fxcompress.graph.results import output_snr
from tests.channel_cases import Case, check, error, lived_in, net, prune, remarks, silenced, tokens

linear = nn.Linear
X = (tokens(),)
MORE = [(tokens(batch=5),)]
ANY_LENGTH = [(tokens(length=3, batch=3),)]
HEADS = {"prune_heads": True}
PADDING = torch.arange(7) >= torch.tensor([[5], [7]])
CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)


def attention(forward: Any, masks: dict[str, Tensor] | None = None, **options: Any) -> Callable[[], Any]:
    return lambda: net(
        forward,
        embed=linear(6, 8),
        att=nn.MultiheadAttention(8, 2, **{"batch_first": True, **options}),
        out=nn.Sequential(linear(8, 10), linear(10, 3)),
        **{name: mask.clone() for name, mask in (masks or {}).items()},
    )


def attends(self: Any, x: Tensor, **options: Any) -> Any:
    x = self.embed(x)
    return self.att(x, x, x, **options)


def plain(self: Any, x: Tensor) -> Tensor:
    return self.out(attends(self, x)[0])


def masked(self: Any, x: Tensor) -> Tensor:
    return self.out(attends(self, x, attn_mask=self.mask, need_weights=False)[0])


def causal(self: Any, x: Tensor) -> Tensor:
    return self.out(attends(self, x, attn_mask=self.mask, is_causal=True, need_weights=False)[0])


def masked_with_weights(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y, weights = attends(self, x, attn_mask=self.mask, average_attn_weights=False)
    return self.out(y), weights.mean(1)


def padded(self: Any, x: Tensor, padding: Tensor) -> Tensor:
    return self.out(attends(self, x, key_padding_mask=padding)[0])


def padded_and_masked(self: Any, x: Tensor, padding: Tensor) -> Tensor:
    return self.out(attends(self, x, key_padding_mask=padding, attn_mask=self.mask)[0])


def twice(self: Any, x: Tensor) -> Tensor:
    x = attends(self, x)[0]
    return self.out(self.att(x, x, x)[0])


def to_itself_and_to_a_memory(self: Any, x: Tensor, y: Tensor) -> Tensor:
    x = attends(self, x)[0]
    return self.out(self.att(x, self.embed(y), self.embed(y))[0])


SCORES = torch.linspace(-1, 1, 49).reshape(7, 7)
PER_HEAD = torch.linspace(-1, 1, 4 * 49).reshape(4, 7, 7)
PACKED = {"embed.weight": (4, 6), "att.in_proj_weight": (12, 4), "att.out_proj.weight": (4, 4), "out.0.weight": (5, 4)}
SPLIT = {"att.q_proj_weight": (4, 4), "att.v_proj_bias": (4,), "att.out_proj.weight": (4, 4), "out.0.weight": (5, 4)}

ATTENTION = {
    "a mask of numbers": Case(attention(masked, {"mask": SCORES}), PACKED, X, MORE),
    "a mask of numbers, sequence first": Case(
        attention(masked, {"mask": SCORES[:2, :2]}, batch_first=False), PACKED, X, [(tokens(length=5),)]
    ),
    "a boolean mask": Case(attention(masked, {"mask": CAUSAL}), PACKED, X, MORE),
    "a causal mask": Case(attention(causal, {"mask": CAUSAL}), PACKED, X, MORE),
    "a mask for every head keeps both": Case(attention(masked, {"mask": PER_HEAD}), PACKED, X, []),
    "a mask for every head goes with its head": Case(
        attention(masked, {"mask": PER_HEAD}), {**PACKED, "mask": (2, 7, 7)}, X, [], options=HEADS
    ),
    "masked, with weights": Case(attention(masked_with_weights, {"mask": CAUSAL}), PACKED, X, MORE),
    "padding": Case(attention(padded), PACKED, (tokens(), PADDING), [(tokens(batch=1), PADDING[:1])]),
    "padding by numbers": Case(attention(padded), PACKED, (tokens(), PADDING.double() * -3.0), []),
    "padding and a boolean mask": Case(attention(padded_and_masked, {"mask": CAUSAL}), PACKED, (tokens(), PADDING), []),
    "padding by numbers and a mask for every head": Case(
        attention(padded_and_masked, {"mask": PER_HEAD}), PACKED, (tokens(), PADDING.double() * -3.0), [], options=HEADS
    ),
    "a bias behind the keys": Case(
        attention(plain, add_bias_kv=True), {**PACKED, "att.bias_k": (1, 1, 4), "att.bias_v": (1, 1, 4)}, X, ANY_LENGTH
    ),
    "a bias behind the keys loses heads": Case(
        attention(plain, add_bias_kv=True), {**PACKED, "att.bias_k": (1, 1, 4)}, X, ANY_LENGTH, options=HEADS
    ),
    "zeros behind the keys": Case(attention(plain, add_zero_attn=True), PACKED, X, ANY_LENGTH),
    "a bias, zeros, padding and a mask": Case(
        attention(padded_and_masked, {"mask": CAUSAL}, add_bias_kv=True, add_zero_attn=True, bias=False),
        PACKED,
        (tokens(), PADDING),
        [],
    ),
    "without a batch": Case(attention(plain), PACKED, (tokens()[0],), [(tokens(length=4)[1],)]),
    "one layer, called twice": Case(attention(twice), PACKED, X, ANY_LENGTH),
    "one layer, to itself and to a memory": Case(
        attention(to_itself_and_to_a_memory), SPLIT, (tokens(), tokens(length=3)), [(tokens(length=2), tokens(length=5))]
    ),
}


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, **{"dropout": 0.1, "batch_first": True, **options})


def encoder(made: nn.Module, forward: Any = None, **parts: Any) -> Callable[[], Any]:
    def through(self: Any, x: Tensor) -> Tensor:
        return self.head(self.enc(self.embed(x)))

    return lambda: net(forward or through, embed=linear(6, 8), enc=copy.deepcopy(made), head=linear(8, 3), **parts)


def with_source_mask(self: Any, x: Tensor) -> Tensor:
    return self.head(self.enc(self.embed(x), mask=self.mask))


def with_generated_mask(self: Any, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=torch.float64)
    return self.head(self.enc(self.embed(x), mask=mask, is_causal=True))


def with_source_padding(self: Any, x: Tensor, padding: Tensor) -> Tensor:
    return self.head(self.enc(self.embed(x), src_key_padding_mask=padding))


def decoded(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.head(self.enc(self.embed(x), self.embed(y)))


def translated(self: Any, x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], dtype=torch.float64)
    x, y = self.embed(x), self.embed(y)
    return self.head(
        self.enc(x, y, tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True)
    )


class Mine(nn.TransformerEncoderLayer):
    """A subclass that calls what it inherits."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src, *args, **kwargs) + 0.5 * src


def many(made: nn.Module) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(made, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)  # type: ignore[arg-type]


LAYER = {
    "embed.weight": (4, 6),
    "enc.self_attn.in_proj_weight": (12, 4),
    "enc.linear1.weight": (8, 4),
    "enc.norm2.bias": (4,),
}
STACK = {"enc.layers.1.self_attn.in_proj_weight": (12, 4), "enc.layers.0.linear2.weight": (4, 8), "enc.norm.weight": (4,)}
TWO = (tokens(), tokens(length=4))

TRANSFORMERS = {
    "encoder layer": Case(encoder(layer()), LAYER, X, ANY_LENGTH),
    "encoder layer, sequence first": Case(encoder(layer(batch_first=False)), LAYER, X, ANY_LENGTH),
    "encoder layer, norm first": Case(encoder(layer(norm_first=True, activation="gelu")), LAYER, X, ANY_LENGTH),
    "encoder layer of another activation": Case(encoder(layer(activation=torch.tanh, bias=False)), {}, X, ANY_LENGTH),
    "encoder layer loses heads": Case(encoder(layer()), LAYER, X, ANY_LENGTH, options=HEADS),
    "a layer that inherits": Case(encoder(Mine(8, 2, 16, batch_first=True)), LAYER, X, ANY_LENGTH),
    "encoder": Case(encoder(many(layer())), STACK, X, ANY_LENGTH),
    "encoder that may nest tensors": Case(encoder(nn.TransformerEncoder(layer(), 2)), {}, X, ANY_LENGTH),
    "encoder with a mask": Case(encoder(many(layer()), with_source_mask, mask=SCORES.clone()), STACK, X, MORE),
    "encoder with a mask of its length": Case(encoder(many(layer()), with_generated_mask), STACK, X, ANY_LENGTH),
    "encoder with padding": Case(encoder(many(layer()), with_source_padding), STACK, (tokens(), PADDING), []),
    "encoder that may nest tensors, with padding": Case(
        encoder(nn.TransformerEncoder(layer(), 2), with_source_padding),
        {},
        (tokens(), PADDING),
        [],
        frozen={"enc": "padded positions hold values"},
    ),
    "decoder layer": Case(
        encoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), decoded),
        {"enc.multihead_attn.q_proj_weight": (4, 4), "enc.linear1.weight": (8, 4)},
        TWO,
        [(tokens(length=2), tokens(length=9))],
    ),
    "decoder": Case(
        encoder(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, norm_first=True, batch_first=True), 2), decoded),
        {"enc.layers.1.multihead_attn.v_proj_weight": (4, 4), "enc.layers.0.self_attn.in_proj_weight": (12, 4)},
        TWO,
        [(tokens(length=2), tokens(length=9))],
    ),
    "nn.Transformer": Case(
        encoder(nn.Transformer(8, 2, 2, 1, 16, batch_first=True), translated),
        {"enc.encoder.layers.1.linear1.weight": (8, 4), "enc.decoder.layers.0.multihead_attn.k_proj_weight": (4, 4)},
        (*TWO, PADDING),
        [(tokens(), tokens(length=6), PADDING)],
    ),
}

CASES = {**ATTENTION, **TRANSFORMERS}


@pytest.fixture(autouse=True)
def without_fused_kernels() -> Any:
    """The truth at padded positions is what the layers compute; fused kernels leave zeros there."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_channels_go_and_the_rest_compute_what_they_did(name: str) -> None:
    check(CASES[name])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_graphs_of_transformers_hold_layers_and_compute_what_the_fused_kernels_do_where_nothing_is_padded() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    for inputs in ({"src": torch.randn(2, 7, 8)}, {"src": torch.randn(2, 7, 8), "src_key_padding_mask": PADDING}):
        graph = trace(model, inputs)
        assert torch.backends.mha.get_fastpath_enabled()
        assert all(rung.rung == "note" for rung in graph.meta["rungs"])
        assert {"linear", "layer_norm", "multihead_attention"} <= {ops.kind(node) for node in graph.graph.nodes}
        with torch.no_grad():
            expected, found = model(**inputs), graph(**inputs)
        heard = ~inputs.get("src_key_padding_mask", torch.zeros(2, 7, dtype=torch.bool))
        assert error(expected[heard], found[heard]) <= 1e-5


def test_transformers_run_in_integers_layer_by_layer() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False)
    x = torch.randn(8, 7, 32)
    result = PTQQuantizer(num_calibration_batches=1, progress=False).quantize(model.eval(), [{"src": x}])
    assert coverage(result).mac_share > 0.8
    assert output_snr(model(x), result(x)) > 25


def test_attention_that_stays_closed_is_frozen_and_named() -> None:
    model = lived_in(attention(lambda self, x: (self.out(self.embed(x) * 2), attends(self, x)))())
    small, pruner = prune(model, X)
    assert "passed on whole" in remarks(pruner)
    assert small.get_parameter("embed.weight").shape == (8, 6)
    assert small.get_parameter("out.0.weight").shape == (5, 8)
    assert small.get_parameter("att.in_proj_weight").shape == (24, 8)
    assert error(silenced(model, small)(*X), small(*X)) <= 1e-10


def test_attention_whose_dropout_is_active_is_pruned_and_drops_on() -> None:
    model = lived_in(attention(plain, dropout=0.5)())
    model.att.train()
    small, _ = prune(model, X)
    assert small.get_parameter("att.in_proj_weight").shape[0] < 24
    assert not torch.equal(small(*X), small(*X))
    assert error(silenced(model.eval(), small)(*X), small.eval()(*X)) <= 1e-10


def test_a_mask_that_is_an_input_for_every_head_keeps_the_heads() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(attends(self, x, attn_mask=mask, need_weights=False)[0])

    model, inputs = lived_in(attention(forward)()), (*X, PER_HEAD.double())
    for options, rows in (({}, 12), (HEADS, 24)):
        small, pruner = prune(model, inputs, criterion="random", **options)
        assert small.get_parameter("att.in_proj_weight").shape == (rows, 4)
        assert error(silenced(model, small)(*inputs), small(*inputs)) <= 1e-10
    assert "att.in_proj_weight" in remarks(pruner)
