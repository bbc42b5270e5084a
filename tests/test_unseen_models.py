"""Models that nobody had in mind: they quantize to what they compute, or are refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fxcompress import DynamicQuantizer, PTQQuantizer, backends, coverage, trace
from fxcompress.errors import BackendError, FxCompressError, VerificationError
from fxcompress.graph.results import output_snr


def ptq(model: nn.Module, x: Tensor, **options: Any) -> Any:
    return PTQQuantizer(num_calibration_batches=1, progress=False, **options).quantize(model, [x.clone()])


def dynamic(model: nn.Module, x: Tensor, **options: Any) -> Any:
    return DynamicQuantizer(progress=False, **options).quantize(model, example_inputs=x.clone())


def snr(model: nn.Module, quantized: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return output_snr(model(x.clone()), quantized(x.clone()))


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("channels", [(8, 16), (16, 8), (3, 5)])
@pytest.mark.parametrize(("stride", "padded"), [(1, 0), (2, 0), (2, 1)])
def test_transposed_convolutions_keep_their_channels_apart(
    backend: str, channels: tuple[int, int], stride: int, padded: int
) -> None:
    if reason := backends.find(backend).unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    for layer, x in (
        (nn.ConvTranspose2d(*channels, 3, stride, 1, padded), torch.randn(2, channels[0], 7, 7)),
        (nn.ConvTranspose1d(*channels, 3, stride, 1, padded), torch.randn(2, channels[0], 9)),
    ):
        model = nn.Sequential(layer).eval()
        quantized = ptq(model, x, backend=backend)
        assert coverage(quantized).mac_share == 1.0
        assert snr(model, quantized, x) > 30


class TiedHead(nn.Module):
    """A language model whose head is its embedding, read by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(F.relu(self.mix(self.embed(tokens))), self.embed.weight)


@pytest.mark.parametrize("quantize", [ptq, dynamic])
def test_a_weight_that_an_embedding_reads_too_is_quantized_beside_it(quantize: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, tokens = TiedHead().eval(), torch.randint(0, 50, (4, 7))
    quantized = quantize(model, tokens)
    assert snr(model, quantized, tokens) > 30
    assert coverage(quantized).mac_share == 1.0
    assert torch.equal(quantized.get_parameter("embed.weight"), model.embed.weight)


class Functional(nn.Module):
    """Convolutions as functions of parameters, their geometry by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2), nn.Parameter(torch.randn(8))
        self.head = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.weight, bias=self.bias, stride=2, padding=1))
        return F.relu(F.linear(y.mean((2, 3)), weight=self.head))


def test_layers_written_as_functions_by_keyword_run_in_integers() -> None:
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.randn(4, 3, 16, 16)
    quantized = ptq(model, x)
    assert coverage(quantized).mac_share == 1.0
    assert snr(model, quantized, x) > 30


def test_computed_weights_are_settled_and_the_ledger_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(6, 8)
    for quantizer in (PTQQuantizer(num_calibration_batches=1), DynamicQuantizer()):
        quantized = quantizer.quantize(model, [x])
        assert snr(model, quantized, x) > 30
        assert coverage(quantized).mac_share == 1
        assert {r.reason for r in quantizer.ledger.remarks("settle-weights") if r.node.startswith("0")}


def test_weights_that_are_no_numbers_are_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")  # type: ignore[operator, index]
    with pytest.raises(VerificationError, match=r"'2\.weight' holds NaN"):
        ptq(model, torch.randn(4, 8))
    with pytest.raises(FxCompressError, match=r"'2\.weight' holds NaN"):
        DynamicQuantizer(verify=False).quantize(model)


def test_infinities_that_a_model_means_are_no_obstacle() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            return y, torch.zeros(8).masked_fill(torch.arange(8) > 3, float("-inf")) + y.mean()

    model, x = Masked().eval(), torch.randn(4, 8)
    result = ptq(model, x)
    assert snr(model, result, x) > 20
    assert torch.equal(result(x)[1].isinf(), model(x)[1].isinf())


def test_output_snr_counts_infinities_that_only_one_side_has() -> None:
    masked = torch.tensor([1.0, float("-inf"), float("nan")])
    assert output_snr(masked, masked.clone()) == float("inf")
    assert output_snr(masked, torch.tensor([1.0, 0.0, float("nan")])) == -float("inf")
    assert output_snr(masked, torch.tensor([1.0, float("-inf"), 0.0])) == -float("inf")
    assert output_snr(masked, torch.tensor([0.9, float("-inf"), float("nan")])) == pytest.approx(20.0)


@pytest.mark.parametrize("quantize", [ptq, dynamic])
def test_one_vector_without_a_batch_stays_in_float(quantize: Callable[..., Any]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(8)
    quantized = quantize(model, x)
    assert torch.allclose(quantized(x), model(x))
    assert {row.reason for row in coverage(quantized).floats} >= {"its input is one vector"}


class Overwriting(nn.Module):
    """Writes into what it is given, before and after it reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        before = self.first(x)
        x.mul_(2)
        x += 1
        return self.second(before + x)


@pytest.mark.parametrize("quantize", [ptq, dynamic])
def test_a_model_that_overwrites_its_input_computes_the_same_and_leaves_it(quantize: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, x = Overwriting().eval(), torch.randn(4, 8)
    traced = trace(model, x.clone())
    kept = x.clone()
    assert torch.equal(traced(kept), model(x.clone()))
    assert torch.equal(kept, x)
    assert any("overwrites the input 'x'" in rung.reason for rung in traced.meta["rungs"])
    assert snr(model, quantize(model, x), x) > 30


def test_a_model_that_writes_into_a_view_of_its_input_is_checked_on_fresh_inputs() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, cache: Tensor, x: Tensor) -> Tensor:
            cache[:, 0] = 20 * x + cache[:, 0]
            hidden = self.linear(cache)
            hidden[:, 1] = 30.0
            return self.head(hidden)

    torch.manual_seed(0)
    model = Cache().eval()
    batch = {"cache": torch.randn(2, 3, 8), "x": torch.randn(2, 8)}
    given = {name: value.clone() for name, value in batch.items()}
    quantized = PTQQuantizer(num_calibration_batches=1).quantize(model, [given])
    one, two = ({name: value.clone() for name, value in batch.items()} for _ in range(2))
    with torch.no_grad():
        assert output_snr(model(**one), quantized(**two)) > 30
    assert torch.equal(one["cache"], two["cache"])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_convolutions_of_volumes_without_a_bias_are_exported(backend: str) -> None:
    if reason := backends.find(backend).unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv3d(8, 4, 1, bias=False)).eval()
    x = torch.randn(2, 3, 5, 6, 7)
    assert snr(model, ptq(model, x, backend=backend), x) > 30


def test_a_transposed_convolution_says_that_it_has_one_scale() -> None:
    quantizer = PTQQuantizer(num_calibration_batches=1, progress=False)
    quantized = quantizer.quantize(nn.Sequential(nn.ConvTranspose2d(4, 6, 3)).eval(), [torch.randn(2, 4, 5, 5)])
    assert any("one scale per weight" in remark.reason for remark in quantizer.ledger.remarks("insert-observers"))
    assert quantized.meta["portable"].get_buffer("0.weight_scale").shape == (1,)  # type: ignore[union-attr]


RESHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, size=(5, 7)),
    "average": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 3),
    "largest": lambda x: F.max_pool2d(x, 2),
    "from one position": lambda x: F.interpolate(x[:, :, :1, :1], scale_factor=4),
}


class Tokens(nn.Module):
    """Tokens that become an image again, as backbones hand them on to a head."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code, self.embed, self.head = code, nn.Linear(12, 16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.code(self.embed(x).transpose(1, 2).reshape(x.shape[0], -1, 8, 8)))


@pytest.mark.parametrize("name", RESHAPED)
@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
def test_tokens_that_become_an_image_are_pooled_and_resampled_at_any_batch_size(backend: str, name: str) -> None:
    model, x = Tokens(RESHAPED[name]).eval(), torch.randn(4, 64, 12)
    quantized = ptq(model, x, backend=backend)
    assert coverage(quantized).mac_share == 1.0
    assert not coverage(quantized).floats
    for batch in (4, 2, 1):
        assert snr(model, quantized, x[:batch]) > 25


def test_convolutions_that_pad_alike_on_both_sides_run_in_integers_whatever_word_says_so() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding="same", dilation=2), nn.ReLU(), nn.Conv2d(8, 4, (1, 5), padding="same")]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 9, 9)
    quantized = ptq(model, x, backend="fbgemm")
    assert coverage(quantized).mac_share == 1.0
    assert snr(model, quantized, x[:1]) > 25
    assert layers[0].padding == "same"  # the caller's


class PerSample(nn.Module):
    """A convolution with a weight and a bias for each sample, mixed from learned ones (CondConv, Yang et al. 2019)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.groups, self.stem, self.route = groups, nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.weights, self.biases = nn.Parameter(torch.randn(4, 8 * 8 // groups * 9)), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        batch, channels, height, width = x.shape
        mix = self.route(x.mean((2, 3))).sigmoid()
        weight = (mix @ self.weights).view(batch * 8, channels // self.groups, 3, 3)
        bias = (mix @ self.biases).view(batch * 8)
        joined = x.reshape(1, batch * channels, height, width)
        mixed = F.conv2d(joined, weight, bias, stride=2, padding=1, groups=batch * self.groups)
        return mixed.view(batch, 8, mixed.shape[-2], mixed.shape[-1])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("backend", ["fbgemm", "onnxruntime", "openvino"])
def test_convolutions_with_a_group_for_each_sample_run_at_any_batch_size(backend: str, groups: int) -> None:
    if reason := backends.find(backend).unavailable():
        pytest.skip(reason)
    model, x = PerSample(groups).eval(), torch.randn(4, 3, 9, 9)
    quantized = ptq(model, x, backend=backend)
    for batch in (4, 3, 1):
        assert snr(model, quantized, x[:batch]) > 20


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings_are_exported_as_lookups(mode: str) -> None:
    """The exporter's own form of them crashes ONNX Runtime."""
    if reason := backends.find("onnxruntime").unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(50, 16, mode=mode), nn.Linear(16, 8)).eval()
    tokens = torch.randint(0, 50, (4, 7))
    assert snr(model, ptq(model, tokens, backend="onnxruntime"), tokens) > 30


def test_bags_that_runtimes_do_not_take_are_refused() -> None:
    if reason := backends.find("onnxruntime").unavailable():
        pytest.skip(reason)

    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(50, 16), nn.Linear(16, 8)

        def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
            return self.head(self.bag(tokens, offsets))

    batch = {"tokens": torch.randint(0, 50, (9,)), "offsets": torch.tensor([0, 4])}
    with pytest.raises(BackendError, match="embedding bag with offsets"):
        PTQQuantizer(backend="onnxruntime", num_calibration_batches=1).quantize(Offsets().eval(), [batch])
    assert PTQQuantizer(num_calibration_batches=1).quantize(Offsets().eval(), [batch])(**batch).shape == (2, 8)


def test_a_graph_that_only_some_values_run_through_is_refused_by_engines() -> None:
    if reason := backends.find("onnxruntime").unavailable():
        pytest.skip(reason)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])

    batch = {"x": torch.randn(3, 7, 12), "lengths": torch.tensor([7, 5, 2])}
    with pytest.raises(BackendError, match=r"takes? any values of their inputs' shapes.*lengths"):
        PTQQuantizer(backend="onnxruntime", num_calibration_batches=1).quantize(Packed().eval(), [batch])
    assert PTQQuantizer(num_calibration_batches=1).quantize(Packed().eval(), [batch])(**batch).shape == (3, 7, 5)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_convolution_that_pads_with_values_stays_in_float(mode: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode)]  # type: ignore[arg-type]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    quantized = ptq(model, x)
    assert snr(model, quantized, x) > 30
    assert f"it pads with {mode!r}" in {row.reason for row in coverage(quantized).floats}


def test_a_table_that_is_indexed_like_attention_biases_is_left_alone() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))
            self.index = nn.Buffer(torch.tensor([1, 0, 3, 2, 1, 0, 3, 2]))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.table[:, self.index]

    torch.manual_seed(0)
    model, x = Biased().eval(), torch.randn(4, 8)
    assert snr(model, ptq(model, x), x) > 30


class PartlyGated(nn.Module):
    """A projection taken apart: two parts go to float operators, one through a convolution (MambaOut)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.conv, self.out = nn.Linear(8, 24), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, same, mixed = torch.split(self.wide(x), [8, 8, 8], dim=-1)
        mixed = self.conv(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out(F.gelu(torch.cat((gate, gate), -1)) * torch.cat((same, mixed), dim=-1))


@pytest.mark.parametrize("backend", ["fbgemm", "onnxruntime", "openvino"])
def test_parts_of_a_projection_quantize_each_in_its_way(backend: str) -> None:
    if reason := backends.find(backend).unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    model, x = PartlyGated().eval(), torch.randn(2, 5, 5, 8)
    quantized = ptq(model, x, backend=backend)
    assert snr(model, quantized, x) > 25
    assert snr(model, quantized, torch.cat((x, x[:1]))) > 25


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack", "onnxruntime"])
@pytest.mark.parametrize(
    "options",
    [{"mode": "bicubic"}, {"mode": "bilinear", "antialias": True}, {"mode": "bilinear", "align_corners": True}, {}],
    ids=str,
)
def test_images_are_resampled_in_integers_or_left_in_float(options: dict[str, Any], backend: str) -> None:
    if reason := backends.find(backend).unavailable():
        pytest.skip(reason)

    class Enlarged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.interpolate(self.first(x).relu(), scale_factor=2, **options))

    torch.manual_seed(0)
    model, x = Enlarged().eval(), torch.randn(2, 3, 9, 9)
    try:
        quantized = ptq(model, x, backend=backend)
    except BackendError:
        assert backend == "onnxruntime" and options.get("antialias")
        return
    assert snr(model, quantized, x) > 30
    assert coverage(quantized).mac_share == 1.0


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_transposed_convolutions_of_any_kernel_are_right(kernel: int, backend: str) -> None:
    if reason := backends.find(backend).unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.ConvTranspose2d(32, 16, kernel, 2)).eval(), torch.randn(2, 32, 8, 8)
    assert snr(model, ptq(model, x, backend=backend), x) > 30
