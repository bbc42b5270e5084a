"""Quantization-aware training: what is prepared, how it trains, and that conversion keeps what training saw."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxcompress
from benchmarks.digits import TRAINED, DigitsNet, accuracy, finetuned, trained
from fxcompress import LSQQuantizer, PassManager, QATQuantizer, coverage
from fxcompress.backends import fbgemm
from fxcompress.backends.saturation import largest_activation
from fxcompress.errors import ConfigError, DataError, PlanError, PromiseError
from fxcompress.graph import qdq
from fxcompress.pass_base import Context, Pass, Promise, close
from fxcompress.quantization.fake_quant import LearnedFakeQuantize, RangeFakeQuantize, fake_quantizers
from tests.replicas import on_two
from tests.strategies import Drawn, networks

QUANTIZERS: dict[str, Callable[[], Any]] = {
    "qat": QATQuantizer,
    "qat per tensor": lambda: QATQuantizer(per_channel=False),
    "qat affine": lambda: QATQuantizer(symmetric=False),
    "qat affine per tensor": lambda: QATQuantizer(symmetric=False, per_channel=False),
    "qat 4 bits": lambda: QATQuantizer(bits=4, observer="minmax"),
    "lsq": LSQQuantizer,
    "lsq 4 bits per tensor": lambda: LSQQuantizer(4, per_channel=False),
    "lsq 2 bits": lambda: LSQQuantizer(2, symmetric=False),
}


def lively(model: nn.Module) -> nn.Module:
    """Batch normalisation with weights of both signs, some of them zero."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            with torch.no_grad():
                module.weight[0] = 0.0
    return model


def train(model: nn.Module, *batches: Any, rate: float = 1e-3) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for batch in batches:
        optimizer.zero_grad()
        outputs = model(*batch) if isinstance(batch, tuple) else model(batch)
        loss = torch.stack([t.float().square().mean() for t in pytree.tree_leaves(outputs) if t.requires_grad]).mean()
        loss.backward()
        optimizer.step()


def images(count: int = 16) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(count, 1, 8, 8) for _ in range(4)]


def reference(prepared: Any, *call: Tensor) -> Any:
    """The quantize/dequantize graph of a trained model, which kernels are lowered from."""
    steps = ["freeze-scales", {"remove-dead": {"dropout": True}}, "fold-batchnorm", "fuse-activations", "fold-quantization"]
    return PassManager(steps, reproducer=False, progress=False).run(prepared, call)


def output_step(graph: Any) -> float:
    """The scale of the values that the output is, or is computed from."""
    return max(float(n.args[1]) for n in graph.graph.nodes if n.target is qdq.quantize)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_conversion_keeps_what_the_trained_model_computes(name: str) -> None:
    """On a residual network: at most one output step apart, for 99.9 % of outputs."""
    torch.manual_seed(0)
    quantizer, model = QUANTIZERS[name](), lively(DigitsNet())
    prepared = quantizer.prepare(model.train(), images()[0])
    train(prepared, *images())
    prepared.eval()
    x = torch.randn(512, 1, 8, 8)
    with torch.no_grad():
        expected = prepared(x)
        converted = quantizer.convert(prepared)(x)
    step = output_step(reference(prepared, images()[0]))
    assert ((expected - converted).abs() <= step).double().mean() >= 0.999
    assert coverage(quantizer.convert(prepared)).mac_share == 1.0


@pytest.mark.parametrize("name", ["qat", "qat affine per tensor", "lsq 4 bits per tensor"])
def test_transposed_convolutions_have_one_scale_and_convert(name: str) -> None:
    torch.manual_seed(0)
    layers = [nn.ConvTranspose2d(1, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(6, 4, 1)]
    quantizer = QUANTIZERS[name]()
    prepared = quantizer.prepare(lively(nn.Sequential(*layers)).train(), images()[0])
    train(prepared, *images())
    prepared.eval()
    graph, x = reference(prepared, images()[0]), images()[1]
    assert graph.get_buffer("0.weight_scale").numel() == 1
    with torch.no_grad():
        gap = (prepared(x) - quantizer.convert(prepared)(x)).abs()
    assert (gap <= output_step(graph) * 1.01).double().mean() >= 0.999


@given(networks())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_conversion_keeps_what_drawn_networks_compute(drawn: Drawn) -> None:
    quantizer = QATQuantizer(observer="minmax", progress=False)
    prepared = quantizer.prepare(drawn.model, drawn.call)
    train(prepared, drawn.call, drawn.call, rate=1e-4)
    prepared.eval()
    graph = reference(prepared, *drawn.call)
    with torch.no_grad():
        expected, found = prepared(*drawn.call), graph(*drawn.call)
    step = output_step(graph)
    gaps = torch.cat([(a - b).abs().flatten() for a, b in _pairs(expected, found)])
    assert (gaps <= step * 1.01).double().mean() >= 0.999
    assert not any("moves" in remark.reason for remark in quantizer.ledger.remarks())


def _pairs(a: Any, b: Any) -> list[tuple[Tensor, Tensor]]:
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    return list(zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


def test_a_training_step_is_the_layer_on_a_rounded_weight_then_live_normalisation() -> None:
    """Written out in torch's own operators, gradients and running statistics included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()).train()
    x = torch.randn(8, 3, 10, 10)
    prepared = QATQuantizer(observer="minmax").prepare(model, x)
    twin = copy.deepcopy(model)

    def rounded(value: Tensor, low: int, high: int, signed: bool) -> Tensor:
        bottom, top = (float(value.detach().min()) if signed else 0.0), float(value.detach().max())
        scale = (top - min(bottom, 0.0)) / 255
        return torch.fake_quantize_per_tensor_affine(value, scale, round(-bottom / scale), low, high)

    scale = twin[0].weight.detach().abs().amax((1, 2, 3)) / 127  # type: ignore[operator]
    weight = torch.fake_quantize_per_channel_affine(twin[0].weight, scale, torch.zeros(6, dtype=torch.int32), 0, -127, 127)  # type: ignore[arg-type]
    expected = rounded(F.relu(twin[1](F.conv2d(rounded(x, 0, 255, True), weight))), 0, 255, False)
    found = prepared(x)
    assert torch.allclose(found, expected, atol=1e-4)
    (found * torch.arange(6.0)[:, None, None]).sum().backward()
    (expected * torch.arange(6.0)[:, None, None]).sum().backward()
    names = dict(prepared.named_parameters())
    for name, parameter in twin.named_parameters():
        assert torch.allclose(names[name].grad, parameter.grad, rtol=1e-3, atol=1e-2), name  # type: ignore[arg-type]
    for name in ("1.running_mean", "1.running_var"):
        assert torch.allclose(prepared.get_buffer(name), twin.get_buffer(name), atol=1e-6)


def test_per_tensor_weights_are_rounded_as_they_will_be_folded() -> None:
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).eval()
    prepared = QATQuantizer(per_channel=False).prepare(model, torch.randn(2, 3, 8, 8))
    fake = fake_quantizers(prepared)["fake_quant.0_weight"]
    conv, norm = model[0], model[1]  # type: ignore[index]
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().double()[:, None, None, None]
    folded = conv.weight.detach().double() * factor
    scale = folded.abs().max() / 127
    expected = (folded / scale).round() * scale
    found = fake(conv.weight.detach(), norm.weight, norm.running_var, norm.eps).double() * factor
    assert torch.allclose(found, expected, atol=1e-6)


def test_names_flags_and_the_callers_model_stay() -> None:
    model = DigitsNet().train()
    model.blocks[0].bn1.eval()  # type: ignore[union-attr]
    before = copy.deepcopy(model.state_dict())
    prepared = QATQuantizer().prepare(model, images()[0])
    assert set(before) <= set(prepared.state_dict())
    assert set(dict(prepared.named_parameters())) == set(dict(model.named_parameters()))
    assert prepared.training and not prepared.get_submodule("blocks.0.bn1").training
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    prepared.load_state_dict(before, strict=False)


def test_fake_quantization_switches_off_and_on() -> None:
    model, quantizer = DigitsNet(), QATQuantizer()
    prepared = quantizer.prepare(model.train(), images()[0])
    train(prepared, *images())
    prepared.eval()
    x = images()[0]
    rounded = prepared(x)
    assert quantizer.disable_fake_quant(prepared) is prepared
    plain = DigitsNet()
    plain.load_state_dict({name: value for name, value in prepared.state_dict().items() if "fake_quant" not in name})
    assert torch.allclose(prepared(x), plain.eval()(x), atol=1e-5)
    quantizer.enable_fake_quant(prepared)
    assert torch.equal(prepared(x), rounded)
    with pytest.raises(ConfigError, match=r"prepare\(model\)"):
        quantizer.enable_fake_quant(model)


def test_batch_normalisation_freezes_from_an_epoch_on_and_stays_frozen() -> None:
    quantizer = QATQuantizer(freeze_bn_epochs=2)
    prepared = quantizer.prepare(DigitsNet().train(), images()[0])
    norm = prepared.get_submodule("blocks.0.bn1")
    for epoch, moves in enumerate([True, True, False, False]):
        quantizer.on_epoch(prepared, epoch)
        before, gamma = norm.running_mean.clone(), norm.weight.detach().clone()  # type: ignore[operator]
        train(prepared, *images())
        assert torch.equal(before, norm.running_mean) is not moves  # type: ignore[arg-type]
        assert not torch.equal(gamma, norm.weight)  # type: ignore[arg-type]
    never = QATQuantizer()
    again = never.prepare(DigitsNet().train(), images()[0])
    never.on_epoch(again, 1000)
    assert again.get_submodule("blocks.0.bn1").train().training


def test_ranges_are_a_moving_average_of_the_batches_and_stand_still_in_eval_mode() -> None:
    steps = ["remove-dead", {"insert-fake-quant": {"observer": "minmax", "momentum": 0.4}}]
    prepared = PassManager(steps).run(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), images()[0]).train()
    fake = fake_quantizers(prepared)["fake_quant.input_1"]
    assert isinstance(fake, RangeFakeQuantize)
    low = None
    for number, x in enumerate(images()):
        prepared(x)
        rate = max(0.4, 1 / (number + 1))
        low = float(x.min()) if low is None else low + rate * (float(x.min()) - low)
        assert fake.low.item() == pytest.approx(low, rel=1e-5)
    prepared.eval()(images()[0] * 100)
    assert fake.low.item() == pytest.approx(low, rel=1e-5)


def test_learned_scales_start_with_the_first_batch_and_learn_unless_told_otherwise() -> None:
    for learn in (True, False):
        prepared = LSQQuantizer(4, learn_scale=learn).prepare(DigitsNet().train(), images()[0])
        learned = [f for f in fake_quantizers(prepared).values() if isinstance(f, LearnedFakeQuantize)]
        inside = prepared.get_submodule("fake_quant.stem")
        assert float(inside.scale.detach()) == 0.0 and all(f.scale.requires_grad is learn for f in learned)  # type: ignore[operator]
        prepared(images()[0])
        start = [f.scale.detach().clone() for f in learned]
        assert all(bool((scale > 0).all()) for scale in start)
        train(prepared, *images(), rate=0.1)
        moved = [not torch.equal(a, f.scale) for a, f in zip(start, learned, strict=True)]
        assert all(moved) if learn else not any(moved)


def test_first_and_last_layers_keep_eight_bits_and_what_no_layer_reads_too() -> None:
    prepared = QATQuantizer(bits=2).prepare(DigitsNet(), images()[0])
    tops = {name.removeprefix("fake_quant."): fake.quant_max for name, fake in fake_quantizers(prepared).items()}
    assert tops["stem_weight"] == tops["head_weight"] == 127
    assert tops["x"] == tops["add_1"] == 255  # read by the first layer; by the last
    assert tops["blocks_0_conv1_weight"] == 1
    assert tops["blocks_0_conv1"] == tops["stem"] == tops["add"] == 3
    assert tops["blocks_0_conv2"] == tops["blocks_0_shortcut_0"] == 255  # read by an addition only
    narrow = QATQuantizer(bits=2, first_last_bits=4, activation_bits=3).prepare(DigitsNet(), images()[0])
    tops = {name.removeprefix("fake_quant."): fake.quant_max for name, fake in fake_quantizers(narrow).items()}
    assert (tops["stem_weight"], tops["x"], tops["blocks_0_conv1_weight"], tops["add"]) == (7, 15, 1, 7)


def test_narrow_weights_are_stored_as_int8_of_few_levels() -> None:
    quantizer = LSQQuantizer(2)
    prepared = quantizer.prepare(lively(DigitsNet()).train(), images()[0])
    train(prepared, *images())
    converted = quantizer.convert(prepared)
    weight = converted.get_buffer("blocks.0.conv1.weight")
    assert weight.dtype == torch.int8
    assert all(len(channel.unique()) <= 4 for channel in weight)


def test_a_prepared_model_copies_pickles_saves_and_resumes(tmp_path: Path) -> None:
    for quantizer in (QATQuantizer(), LSQQuantizer(4)):
        prepared = quantizer.prepare(DigitsNet().train(), images()[0])
        train(prepared, *images())
        fxcompress.save(prepared, tmp_path / "model")
        fresh = quantizer.prepare(DigitsNet().train(), images()[0])
        buffer = io.BytesIO()
        torch.save(prepared.state_dict(), buffer)
        buffer.seek(0)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        others = [
            copy.deepcopy(prepared),
            pickle.loads(pickle.dumps(prepared)),
            fxcompress.load(tmp_path / "model"),
            fresh,
        ]
        expected = prepared.eval()(images()[0])
        for other in others:
            assert torch.equal(other.eval()(images()[0]), expected)
        for model in (prepared, *others):
            train(model, *images())
            assert torch.equal(model.eval()(images()[0]), prepared.eval()(images()[0]))
        assert torch.equal(quantizer.convert(others[2])(images()[0]), quantizer.convert(prepared)(images()[0]))


@pytest.mark.parametrize("quantizer", [QATQuantizer(), LSQQuantizer(4)], ids=["qat", "lsq"])
def test_it_trains_under_autocast(quantizer: Any) -> None:
    prepared = quantizer.prepare(DigitsNet().train(), images()[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = prepared(images()[0]).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in prepared.parameters())


def test_it_trains_compiled_in_one_graph() -> None:
    for quantizer in (QATQuantizer(), LSQQuantizer(4)):
        prepared = quantizer.prepare(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train(), images()[0])
        twin = copy.deepcopy(prepared)
        compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)
        for x in images():
            found, expected = compiled(x), twin(x)
            assert torch.allclose(found, expected, atol=1e-6)
        found.square().mean().backward()
        expected.square().mean().backward()
        for a, b in zip(prepared.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-6)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(prepared.buffers(), twin.buffers(), strict=True))


def _replica(rank: int, folder: Path) -> None:
    for name, quantizer in (("qat", QATQuantizer()), ("lsq", LSQQuantizer(4))):
        torch.manual_seed(0)
        prepared = quantizer.prepare(DigitsNet().train(), torch.zeros(2, 1, 8, 8))
        wrapped = nn.parallel.DistributedDataParallel(prepared)
        torch.manual_seed(rank)
        train(wrapped, *[torch.randn(8, 1, 8, 8) * (1 + rank) for _ in range(3)])
        quantizer.freeze_bn(wrapped)
        for fake in fake_quantizers(wrapped).values():
            fake.eval()
        wrapped(torch.zeros(2, 1, 8, 8))  # a step starts with the buffers of rank 0
        torch.save(prepared.state_dict(), folder / f"{name}{rank}.pt")


def test_replicas_agree(tmp_path: Path) -> None:
    on_two(_replica, tmp_path)
    for name in ("qat", "lsq"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_nothing_saturates_where_the_cpu_adds_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded weights with observed ranges; 7-bit activations where a learned step may leave any 8-bit weight."""
    monkeypatch.setattr(fbgemm, "has_vnni", lambda: False)
    for quantizer, top in ((QATQuantizer(), 255), (LSQQuantizer(), 127)):
        prepared = quantizer.prepare(lively(DigitsNet()).train(), images()[0])
        train(prepared, *images())
        graph = reference(prepared.eval(), images()[0])
        highest = {n.args[4] for n in graph.graph.nodes if n.target is qdq.quantize}
        assert highest == {top}
        weights = [b for name, b in graph.named_buffers() if b.dtype == torch.int8]
        assert len(weights) == 8
        assert all(largest_activation(w) >= top for w in weights)


def test_real_digits_survive_narrow_grids_and_learned_steps_do_best() -> None:
    model, everywhere = trained(), "{} 2 bits, first and last layer too"
    found = {name: accuracy(finetuned(TRAINED[name](), model, epochs=2)) for name in ("QAT 8 bits", "QAT 4 bits")}
    narrow = [accuracy(finetuned(TRAINED[everywhere.format(name)](), model, epochs=2)) for name in ("QAT", "LSQ")]
    assert found["QAT 8 bits"] >= accuracy(model) - 0.5
    assert found["QAT 4 bits"] >= accuracy(model) - 2.0
    assert narrow[1] > narrow[0] + 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QATQuantizer(backend="fbgem"), "fbgemm"),
        (lambda: QATQuantizer(dtype="int9"), "int8"),
        (lambda: QATQuantizer(observer="histo"), "histogram"),
        (lambda: QATQuantizer(freeze_bn_epochs=-2), "-1 for never"),
        (lambda: QATQuantizer(bits=9), "less than or equal to 8"),
        (lambda: LSQQuantizer(1), "greater than or equal to 2"),
        (lambda: LSQQuantizer(4, overrides={"*": {"bit": 3}}), "bits"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ConfigError, PlanError, fxcompress.FxCompressError), match=message):
        make()


def test_conversion_before_training_and_out_of_turn_is_refused() -> None:
    quantizer, model = QATQuantizer(), DigitsNet()
    with pytest.raises(ConfigError, match=r"prepare\(model\) and train it"):
        quantizer.convert(model)
    with pytest.raises(DataError, match="no observer has seen data"):
        quantizer.convert(quantizer.prepare(model, images()[0]))
    with pytest.raises(ConfigError, match="no layer is called 'fc'"):
        QATQuantizer(exclude_layers=["fc"]).prepare(model, images()[0])
    for epoch in (-1, 1.5, "first"):
        with pytest.raises(ConfigError, match="epoch is"):
            quantizer.on_epoch(model, epoch)  # type: ignore[arg-type]


def test_a_plan_holds_its_promises_for_a_model_in_training_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).train()
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    manager = PassManager(["insert-fake-quant", "freeze-scales"])
    frozen = manager.run(model, data=data)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(part.training for part in frozen.modules())


@dataclasses.dataclass(frozen=True)
class Nudge(Pass):
    """Promises next to nothing of a change in the last bits, or of a large one."""

    name: ClassVar[str] = "nudge"
    takes: ClassVar[tuple[str, ...]] = ("observed",)
    promise: ClassVar[Promise] = close(rtol=1e-4)
    by: float = 1e-6

    def run(self, module: fx.GraphModule, context: Context) -> None:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                with torch.no_grad():
                    part.bias.add_(self.by)


def test_a_last_bit_that_rounding_carries_to_the_next_level_breaks_no_promise() -> None:
    torch.manual_seed(0)
    blocks = [[nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()] for _ in range(8)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *(layer for block in blocks for layer in block))
    quantizer = QATQuantizer(bits=8)
    images = torch.randn(8, 3, 24, 24)
    prepared = quantizer.prepare(model.train(), images)
    prepared(images)
    ready = PassManager(["freeze-scales"]).run(prepared.eval(), images)
    nudged = PassManager([Nudge()]).run(ready, images)
    gap = (nudged(images) - ready(images)).abs().max() / ready(images).abs().max()
    assert gap > 1e-3  # far more than was promised
    with pytest.raises(PromiseError, match="nudge"):
        PassManager([Nudge(by=0.05)]).run(ready, images)
