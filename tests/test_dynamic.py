"""Dynamic quantization: kernels against the reference graph, the reference against float64, saved models, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from fxcompress import DynamicQuantizer, PassManager, coverage, load, save
from fxcompress.errors import BackendError, ConfigError
from fxcompress.graph import qdq
from fxcompress.graph.results import output_snr


class Classifier(nn.Module):
    """Tokens to classes through a recurrent layer."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.rnn = kind(24, 32, batch_first=True, **options)
        self.head = nn.Linear(64 if options.get("bidirectional") else 32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        output, _ = self.rnn(self.embed(tokens))
        return self.head(output[:, -1])


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
}
TOKENS = torch.randint(0, 50, (6, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_classifier_runs_in_int8_as_its_reference_and_is_saved(
    kind: type[nn.RNNBase], variant: str, per_channel: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = Classifier(kind, **VARIANTS[variant]).eval()
    result = DynamicQuantizer(per_channel=per_channel).quantize(model)
    with torch.no_grad():
        expected, found = model(TOKENS), result(TOKENS)
        assert output_snr(expected, found) > 25
        assert output_snr(result.meta["portable"](TOKENS), found) > 60
        save(result, tmp_path / "model")
        again = load(tmp_path / "model")
        assert torch.equal(again(TOKENS), found)
    example = DynamicQuantizer(per_channel=per_channel).quantize(model, example_inputs=TOKENS)
    assert coverage(example).mac_share == 1.0
    assert torch.equal(example(TOKENS), found)


def on_own_grid(x: np.ndarray, top: int = 255) -> np.ndarray:
    """x on the unsigned grid of its own range, in float64."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float64(np.float32((high - low) / top))
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, top) - zero) * scale


def test_a_gru_cell_and_an_lstm_cell_are_the_written_out_formulas() -> None:
    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    for kind in (nn.LSTM, nn.GRU):
        torch.manual_seed(2)
        layer = kind(5, 7).eval()
        x = torch.randn(4, 3, 5)
        result = PassManager(["quantize-dynamic"], reproducer=False).run(nn.Sequential(layer))
        tensors = {name: tensor.double().numpy() for name, tensor in result.named_buffers()}
        w, v = (tensors[f"0.weight_{n}_l0"] * tensors[f"0.weight_{n}_l0_scale"][:, None] for n in ("ih", "hh"))
        b, c = tensors["0.bias_ih_l0"], tensors["0.bias_hh_l0"]
        h, memory = np.zeros((3, 7)), np.zeros((3, 7))
        inputs = on_own_grid(x.double().numpy()) @ w.T + b
        for step in range(4):
            hidden = on_own_grid(h) @ v.T + c if h.any() else np.broadcast_to(c, (3, len(c)))
            if kind is nn.LSTM:
                i, f, g, o = np.split(inputs[step] + hidden, 4, 1)
                memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(memory)
            else:
                (r, z, n), (r_h, z_h, n_h) = np.split(inputs[step], 3, 1), np.split(hidden, 3, 1)
                update = sigmoid(z + z_h)
                h = (1 - update) * np.tanh(n + sigmoid(r + r_h) * n_h) + update * h
            assert np.abs(result(x)[0][step].numpy() - h).max() < 2e-3


def test_recurrent_layers_take_states_and_single_sequences_as_torch_has_them() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru = nn.LSTM(6, 8, 2, bidirectional=True), nn.GRU(6, 8)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            return self.lstm(x, (h, c)), self.gru(x, h[:1])

    torch.manual_seed(0)
    model = Steps().eval()
    for call in (
        (torch.randn(5, 3, 6), torch.randn(4, 3, 8), torch.randn(4, 3, 8)),
        (torch.randn(5, 6), torch.randn(4, 8), torch.randn(4, 8)),
    ):
        expected = model(*call)
        for stage in (["quantize-dynamic"], ["quantize-dynamic", "lower"]):
            found = PassManager(stage, reproducer=False).run(model, call)(*call)
            assert output_snr(expected, found) > 30


class Packed(nn.Module):
    """Sequences of several lengths, packed, as text classifiers have them."""

    def __init__(self, kind: Any, attribute: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.rnn = kind(16, 20, num_layers=2, batch_first=True, bidirectional=True)
        self.head, self.attribute = nn.Linear(40, 3), attribute

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        pack = nn.utils.rnn.pack_padded_sequence if self.attribute else pack_padded_sequence
        packed = pack(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        output, state = self.rnn(packed)
        hidden = state[0] if isinstance(self.rnn, nn.LSTM) else state
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1)), pad_packed_sequence(output, batch_first=True)[0]


@pytest.mark.parametrize("attribute", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_are_traced_quantized_and_saved(kind: Any, attribute: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Packed(kind, attribute).eval()
    call = (torch.randint(0, 50, (4, 9)), torch.tensor([9, 3, 5, 2]))
    result = DynamicQuantizer().quantize(model, example_inputs=call)
    assert coverage(result).mac_share == 1.0
    for lengths in (call[1], torch.tensor([1, 9, 9, 4])):
        expected, found = model(call[0], lengths), result(call[0], lengths)
        assert output_snr(expected, found) > 25
        assert output_snr(result.meta["portable"](call[0], lengths), found) > 60
    save(result, tmp_path / "packed")
    assert all(torch.equal(a, b) for a, b in zip(load(tmp_path / "packed")(*call), result(*call), strict=True))


@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_linear_layer_is_integer_arithmetic_written_out(activation: nn.Module | None, symmetric: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 12)
    nn.init.uniform_(layer.weight, -0.1, 0.5)
    model, x = nn.Sequential(layer, *([activation] if activation else [])).eval(), torch.randn(9, 40) * 3
    reference = PassManager(["fuse-activations", {"quantize-dynamic": {"symmetric": symmetric}}]).run(model, x)
    lowered = PassManager(["lower"], reproducer=False).run(reference, x)
    scale = reference.get_buffer("0.weight_scale").double()[:, None]
    zero = 0 if symmetric else reference.get_buffer("0.weight_zero_point").double()[:, None]
    weight = ((reference.get_buffer("0.weight").double() - zero) * scale).numpy()
    exact = on_own_grid(x.double().numpy()) @ weight.T + layer.bias.detach().double().numpy()
    if activation is not None:
        exact = np.clip(exact, 0, 6 if isinstance(activation, nn.ReLU6) else np.inf)
    step = (float(x.max()) - float(x.min())) / 255 * np.abs(weight).sum(1).max() / 40
    for stage in (reference, lowered):
        assert np.abs(stage(x).detach().numpy() - exact).max() < step
    assert coverage(lowered).integer_nodes == coverage(lowered).total_nodes == 1


def test_attention_projections_run_in_int8() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 7, 32)
    result = DynamicQuantizer().quantize(model, example_inputs=x)
    assert output_snr(model(x), result(x)) > 30
    left = {row.kind for row in coverage(result).floats if row.macs}
    assert left == {"scaled_dot_product_attention"}


def test_the_reduced_range_reaches_kernels_and_reference() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(30, 16)
    result = DynamicQuantizer(reduce_range=True).quantize(model, example_inputs=x)
    assert output_snr(result.meta["portable"](x), result(x)) > 60
    assert [n.args[1] for n in result.meta["portable"].graph.nodes if n.target is qdq.fake_quantize_dynamic] == [127]


def test_layers_are_chosen_and_their_weights_have_bits() -> None:
    torch.manual_seed(0)
    model = Classifier(nn.LSTM).eval()
    result = DynamicQuantizer(exclude_layers=["head"], overrides={"rnn": {"bits": 4}}).quantize(model)
    portable = result.meta["portable"]
    assert portable.get_buffer("rnn.weight_ih_l0").abs().max() == 7
    assert portable.get_parameter("head.weight").dtype == torch.float32
    assert {row.node: row.reason for row in coverage(result).floats}["head"] == "it is excluded by name"


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_what_has_no_dynamic_kernel_stays_in_float_and_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn, self.lstm = nn.Conv1d(4, 4, 3), nn.RNN(4, 4), nn.LSTM(4, 6, proj_size=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.rnn(self.conv(x).permute(2, 0, 1))[0])[0]

    x = torch.randn(2, 4, 8)
    quantizer = DynamicQuantizer()
    result = quantizer.quantize(Odd().eval(), example_inputs=x)
    text = str(quantizer.ledger)
    for reason in ("no dynamic kernel for conv1d", "no dynamic kernel for rnn", "projects its hidden state"):
        assert reason in text
    assert torch.isfinite(result(x)).all()


def test_a_tied_embedding_keeps_its_values() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.embed(tokens))

    model, tokens = Tied().eval(), torch.arange(20)
    result = DynamicQuantizer().quantize(model, example_inputs=tokens)
    assert output_snr(model(tokens), result(tokens)) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int9"}, "Did you mean 'int8'"),
        ({"overrides": {"head": {"calibrator": "minmax"}}}, "quantized to 8 bits as they come"),
        ({"backend": "onnxruntime"}, "no kernels that quantize at run time; fbgemm"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, BackendError, ValueError), match=message):
        DynamicQuantizer(**options)


def test_prepare_and_convert_are_quantize_in_parts() -> None:
    torch.manual_seed(0)
    model = Classifier(nn.GRU).eval()
    quantizer = DynamicQuantizer()
    parts = quantizer.convert(quantizer.calibrate(quantizer.prepare(model)))
    assert torch.equal(parts(TOKENS), quantizer.quantize(model)(TOKENS))


BARE: dict[str, tuple[Any, int]] = {
    "lstm": (lambda: nn.LSTM(16, 8, 2, bidirectional=True), 1),
    "gru": (lambda: nn.GRU(16, 8, batch_first=True), 1),
    "multihead_attention": (lambda: nn.MultiheadAttention(16, 2), 3),
    "linear": (lambda: nn.Linear(16, 8), 1),
}


@pytest.mark.parametrize("kind", BARE)
def test_one_layer_as_the_whole_model_is_quantized(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, inputs = BARE[kind]
    model, x = made().eval(), torch.randn(5, 3, 16)
    call = (x,) * inputs
    quantized = DynamicQuantizer().quantize(model, example_inputs=call)
    with torch.no_grad():
        expected, found = pytree.tree_leaves(model(*call)), pytree.tree_leaves(quantized(*call))
    assert len(expected) == len(found)
    assert all(output_snr(before, after) > 25 for before, after in zip(expected, found, strict=True))
    assert coverage(quantized).mac_share > 0.7
    save(quantized, tmp_path / "model")
    again = pytree.tree_leaves(load(tmp_path / "model")(*call))
    assert all(torch.equal(after, loaded) for after, loaded in zip(found, again, strict=True))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_one_recurrent_layer_needs_no_example_and_takes_its_state(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = kind(16, 8).eval(), torch.randn(5, 3, 16)
    assert not any(parameter.is_floating_point() for parameter in _levels(DynamicQuantizer().quantize(model)))
    state = model(x)[1]
    quantized = DynamicQuantizer().quantize(model, example_inputs=(x, state))
    assert output_snr(model(x, state)[0], quantized(x, state)[0]) > 25


def _levels(quantized: Any) -> list[Tensor]:
    state = quantized.meta["portable"].state_dict()
    found = [tensor for name, tensor in state.items() if name.rpartition(".")[2] in ("weight_ih_l0", "weight_hh_l0")]
    assert len(found) == 2
    return found
