"""The page about a compressed model: what it says, and that nothing in it can run or load."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import PassManager, PTQQuantizer, SensitivityAnalyzer, trace, write_report
from fxcompress.__main__ import main
from fxcompress.errors import ConfigError
from fxcompress.graph.inputs import arguments
from fxcompress.pruning import read_analysis
from fxcompress.report import gather
from fxcompress.report.changes import Operator, compare, counts, operators, rows
from fxcompress.timing import Timing
from tests.pages import HOSTILE, INT8, harmless, in_integers, network, pictures


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures()


@pytest.fixture(scope="module")
def quantized(net: nn.Module, images: Tensor) -> fx.GraphModule:
    return in_integers(net, images)


def test_one_line_writes_a_page_with_everything_a_run_knows(
    net: nn.Module, quantized: fx.GraphModule, images: Tensor, tmp_path: Path
) -> None:
    assert write_report(tmp_path / "page.html", quantized, net, data=[images]) == tmp_path / "page.html"
    read = harmless((tmp_path / "page.html").read_text(encoding="utf-8"))
    for heading in ("Before and after", "Ledger", "Layers", "Graph", "Left alone, and why", "Plan"):
        assert heading in read.texts
    for row in fxcompress.Ledger.from_data(quantized.meta["history"][0]["ledger"]).rows:
        assert row.step in read.texts and f"{row.parameters:,}" in read.texts
    for said in ("Latency (median)", "Stored size", "SNR of the results", "MACs in integers", "first", "second"):
        assert said in read.texts
    assert read.tags["table"] == read.tags["caption"] >= 3
    assert all(value for kind, key, value in read.attributes if (kind, key) == ("svg", "aria-label"))


def test_what_users_wrote_is_shown_and_never_run(
    net: nn.Module, quantized: fx.GraphModule, images: Tensor, tmp_path: Path
) -> None:
    evil = "\"'><img src=x onerror=alert(1)>\x00\u202e\ud800"
    metrics = {"<b>accuracy</b>": (0.5, 0.25)}
    target = write_report(tmp_path / "a.html", quantized, net, data=[images], metrics=metrics, title=evil, latency=False)
    read = harmless(target.read_text(encoding="utf-8"))
    assert "<b>accuracy</b>" in read.text
    assert HOSTILE in read.text
    assert "<img src=x onerror=alert(1)>" in read.text


def test_numbers_before_and_after_are_those_of_the_models(net: nn.Module, images: Tensor) -> None:
    pruned = PassManager([{"mask-weights": {"sparsity": 0.5}}, "bake-masks"]).run(net, images)
    timings = Timing(0.004, 0.005, 0.003, 9), Timing(0.002, 0.003, 0.001, 9)
    case = gather("net", pruned, net, call=arguments(images), metrics={"mse_loss": (1, 2)}, timings=timings)
    found = {measure.title: measure for measure in case.measures}
    size = sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()])
    assert found["Stored size"].before == found["Stored size"].after == size / 1e6
    assert found["Parameters"].before == sum(p.numel() for p in net.parameters()) / 1e6
    macs = 4 * (64 * 9 * 8 + 64 * 9 * 64 + 8 * 4) / 1e6
    assert found["MACs"].before == pytest.approx(macs)
    assert (found["Latency (median)"].before, found["Latency (median)"].after) == (4.0, 2.0)
    assert (found["Mse loss"].before, found["Mse loss"].after, found["Mse loss"].less) == (1, 2, True)
    with torch.no_grad():
        exact, moved = net(images).double(), pruned(images).double()
    power = float(exact.square().sum() / (exact - moved).square().sum())
    assert found["SNR of the results"].after == pytest.approx(10 * math.log10(power))


def test_layers_tell_zeros_and_how_far_their_results_moved(net: nn.Module, images: Tensor) -> None:
    pruned = PassManager([{"mask-weights": {"sparsity": 0.5}}, "bake-masks"]).run(net, images)
    case = gather("net", pruned, net, call=arguments(images))
    layers = {layer.name: layer for layer in case.layers}
    for name, module in pruned.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert layers[name].zeros == pytest.approx(float((module.weight == 0).double().mean()))
    seen: dict[str, list[Tensor]] = {"first": [], "second": []}
    for model in (net, pruned):
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: seen[name].append(out.double()))
            for name in seen
        ]
        with torch.no_grad():
            model(images)
        for hook in hooks:
            hook.remove()
    for name, (exact, moved) in seen.items():
        expected = 10 * math.log10(float(exact.square().sum() / (exact - moved).square().sum()))
        assert layers[name].output_snr == pytest.approx(expected)


def test_layers_of_a_quantized_model_tell_their_own_error_and_where_they_run(
    net: nn.Module, quantized: fx.GraphModule, images: Tensor
) -> None:
    case = gather("net", quantized, net, call=arguments(images))
    layers = {layer.name: layer for layer in case.layers}
    assert [*layers] == ["x", "first", "norm", "second", "add", "mean", HOSTILE]
    assert (layers["first"].place, layers["norm"].place) == ("int8", "gone")
    assert (layers["norm"].before, layers["norm"].after) == (16, None)
    assert layers["add"].place == ""  # an operator of no layer: the graph tells where it runs
    rows = {row.name: row for row in fxcompress.compare_activations(net, quantized, [images])}
    assert layers["second"].output_snr == rows["second"].snr_db
    assert layers["second"].own_snr == rows["second"].local_snr_db
    weights = {row.name: row for row in fxcompress.compare_weights(net, quantized, images)}
    assert layers["second"].weight_snr == weights["second"].snr_db > 30


class Branching(nn.Module):
    """Its own code decides on values, so that only its child is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = self.child(x)
        return [found * 2 if float(found.sum()) > 0 else found]


def test_parts_of_a_model_whose_own_code_runs_are_compared_as_well(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    small = PassManager(INT8, progress=False).run(model, data=[images])
    case = gather("branching", small, model, call=arguments(images))
    snr = {layer.name: (layer.weight_snr, layer.output_snr) for layer in case.layers}
    assert min(v for name in ("child.0", "child.2") for v in snr[name] if v is not None) > 20
    assert (
        "child.0"
        in harmless(write_report(tmp_path / "a.html", small, model, data=[images]).read_text(encoding="utf-8")).texts
    )


def test_what_cannot_be_measured_is_said(net: nn.Module, quantized: fx.GraphModule, tmp_path: Path) -> None:
    alone = harmless(write_report(tmp_path / "alone.html", quantized).read_text(encoding="utf-8"))
    assert "Ledger" in alone.texts and not any("before and after" in text for text in alone.texts)
    dataless = harmless(write_report(tmp_path / "b.html", quantized, net).read_text(encoding="utf-8"))
    assert "neither data nor example inputs were given" in dataless.text
    with pytest.raises(ConfigError, match="traced model, not a Net"):
        write_report(tmp_path / "c.html", net, net)
    assert not (tmp_path / "c.html").exists()


def test_a_pruned_and_quantized_model_has_no_snr_by_layer_and_says_so(images: Tensor) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    plan = [{"prune-channels": {"sparsity": 0.5}}, *INT8]
    small = PassManager(plan, progress=False).run(wide, data=[images])
    case = gather("wide", small, wide, call=arguments(images))
    assert case.unknown == ["how far layers moved: channels are gone, and results of other shapes have no SNR."]
    assert {layer.output_snr for layer in case.layers} == {None}


def test_a_model_that_was_traced_with_another_batch_is_compared_by_its_own_shapes(net: nn.Module, images: Tensor) -> None:
    small = PassManager([]).run(net, images[:2])
    case = gather("net", small, net, call=arguments(images))
    assert set(counts(case.lines)) == {"same"}


def op(name: str, kind: str = "relu", shape: str = "1×4", dtype: str = "float32", *sources: str) -> Operator:
    return Operator(name, kind, shape, dtype, sources)


def test_operators_are_added_removed_changed_or_the_same() -> None:
    before = [op("x"), op("a"), op("b"), op("c"), op("d")]
    after = [op("x"), op("n"), op("b", shape="1×2"), op("d", dtype="int8"), op("c", kind="relu6")]
    lines = compare(before, after)
    found = {(line.after or line.before).name: line.status for line in lines}  # type: ignore[union-attr]
    assert found == {"x": "same", "a": "removed", "n": "added", "b": "changed", "d": "changed", "c": "changed"}
    assert [line.after.name for line in lines if line.after] == ["x", "n", "b", "d", "c"]
    words = {line.after.name: line.difference for line in lines if line.after}
    assert (words["b"], words["d"], words["c"]) == ("1×4 → 1×2", "float32 → int8", "relu → relu6")
    drawn = rows(lines)
    assert drawn[1][0] is not None and drawn[1][0].before == before[1]
    assert drawn[1][1] is not None and drawn[1][1].after == after[1]


def test_a_folded_batchnorm_is_what_changed(net: nn.Module, images: Tensor) -> None:
    folded = PassManager(["fold-batchnorm"]).run(net, images)
    lines = compare(operators(trace(net, images)), operators(folded))
    assert [(line.status, line.before.name) for line in lines if line.status != "same" and line.before] == [
        ("removed", "norm")
    ]
    relu = next(o for o in operators(folded) if o.kind == "relu")
    assert (relu.sources, relu.shape, relu.dtype) == (("first",), "4×8×8×8", "float32")


def test_shortcuts_run_in_the_margin_and_every_operator_is_drawn(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    same = PassManager([]).run(net, images)
    target = write_report(tmp_path / "page.html", same, net, example_inputs=images, latency=False)
    text = target.read_text(encoding="utf-8")
    assert harmless(text).tags["path"] == 2  # the residual, before and after
    assert text.count('class="node same"') == 2 * len(operators(same))


def test_the_graph_of_a_model_without_an_original_is_one_column(quantized: fx.GraphModule, tmp_path: Path) -> None:
    text = write_report(tmp_path / "page.html", quantized).read_text(encoding="utf-8")
    assert "Graph" in harmless(text).texts
    assert text.count('class="node same"') == len(operators(quantized))
    assert harmless(text).tags["path"] == 1  # the residual


def test_the_commands_write_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    data = "{type: random, samples: 4, shape: [3, 32, 32], batch_size: 2}"
    config = "compression: {type: PTQQuantizer, num_calibration_batches: 2}\nmodel: mobilenet_v3_small\n"
    config += f"data: {data}\nvalidation: {data}\n"
    (tmp_path / "c.yaml").write_text(config)
    assert main(["compress", "c.yaml", "-o", "small", "--report", "a.html"]) == 0
    assert "Accuracy" in harmless((tmp_path / "a.html").read_text(encoding="utf-8")).texts
    assert main(["inspect", "small", "--report", "b.html"]) == 0
    assert "Stored size" in harmless((tmp_path / "b.html").read_text(encoding="utf-8")).texts
    threads = torch.get_num_threads()
    bench = [
        "bench",
        "--models",
        "mobilenet_v3_small",
        "--plans",
        "fp32",
        "int8",
        "--runs",
        "1",
        "--shape",
        "32",
        "32",
        "--json",
    ]
    capsys.readouterr()
    assert main([*bench, "--report", "c.html"]) == 0
    torch.set_num_threads(threads)
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    assert "mobilenet_v3_small, int8" in harmless((tmp_path / "c.html").read_text(encoding="utf-8")).texts


@pytest.mark.parametrize(
    ("target", "message"),
    [("a.txt", "does not end in .html"), ("no/a.html", "cannot be written"), ("d.html", "is a folder")],
)
def test_a_page_that_cannot_be_written_is_refused_before_any_work(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.html").mkdir()
    (tmp_path / "c.yaml").write_text("compression: {type: PTQQuantizer}\nmodel: resnet18\ndata: random\n")
    for command in (["compress", "c.yaml", "-o", "out"], ["inspect", "nothing"], ["bench"]):
        assert main([*command, "--report", target]) == 2
        assert message in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"c.yaml", "d.html"}


def test_an_analysis_of_sensitivity_is_a_page_and_part_of_one(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    batches = [(images, torch.tensor([0, 1, 2, 3]))]
    analyzer = SensitivityAnalyzer(num_steps=2, pruning_type="unstructured")
    analyzer.analyze(net, batches)
    analyzer.get_optimal_sparsity(0.0)
    analyzer.export_report(tmp_path / "s.html")
    own = harmless((tmp_path / "s.html").read_text(encoding="utf-8"))
    assert own.tags["polyline"] == len(analyzer.curves) == 3
    assert {"first", "second", HOSTILE, "Recommended"} <= set(own.texts)
    pruned = PassManager([{"mask-weights": {"sparsity": 0.5}}, "bake-masks"]).run(net, images)
    target = write_report(
        tmp_path / "p.html", pruned, net, data=batches, validation=batches, sensitivity=analyzer, latency=False
    )
    read = harmless(target.read_text(encoding="utf-8"))
    assert "Sensitivity to pruning" in read.texts and "Accuracy" in read.texts


def test_an_analysis_is_read_back_from_its_report_and_from_its_cache(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    report, cache = tmp_path / "s.json", tmp_path / "cache.json"
    loss = SensitivityAnalyzer([0.5, 0.9], 2, "cross_entropy_loss", "unstructured", cache=cache, progress=False)
    loss.analyze(net, [(images, torch.tensor([0, 1, 2, 3]))])
    assert read_analysis(cache) == loss.summary()
    loss.get_optimal_sparsity(loss.baseline + 0.1)
    loss.export_report(report)
    assert read_analysis(report) == loss.summary()
    assert read_analysis(cache) == dataclasses.replace(loss.summary(), recommendation=None)
    kept = json.loads(cache.read_text())
    for damage in (
        {"values": {key: value for key, value in kept["values"].items() if "first" not in key}},
        {"values": {key: value for key, value in kept["values"].items() if '"second": 0.9' not in key}},
    ):
        cache.write_text(json.dumps({**kept, **damage}))
        with pytest.raises(ConfigError, match="was interrupted"):
            read_analysis(cache)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"values": 3}', '{"values": {"{}": NaN}}', '{"curves": {"a": {"x": 1}}}', "9" * 5000]
)
def test_what_is_no_analysis_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ConfigError, match="is not an analysis of sensitivity"):
        read_analysis(tmp_path / "s.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_analysis(tmp_path)


def test_what_a_pass_measured_of_layers_is_plotted(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    recovering = PTQQuantizer(num_calibration_batches=1, recover={"max_drop": 0.0, "adaround_layers": 0})
    quantized = recovering.quantize(net, [images])
    rows = {row.step: row for row in fxcompress.Ledger.from_data(quantized.meta["history"][0]["ledger"]).rows}
    (found,) = rows["recover-accuracy"].figures
    assert set(found.values) == {"first", "second", HOSTILE} and min(found.values.values()) > 0
    read = harmless(write_report(tmp_path / "a.html", quantized, net, data=[images]).read_text(encoding="utf-8"))
    assert {"Sensitivity", found.title} <= set(read.texts)
    assert all(f"{value:.4g} %" in read.texts for value in found.values.values())


def test_compress_shows_the_curves_of_an_analysis_of_its_model(
    net: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fxcompress.save(PassManager([]).run(net, images), "dense")
    Path("c.yaml").write_text("compression: {type: MagnitudePruner}")
    data = "{type: random, samples: 8, shape: [1, 8, 8], classes: 4}"
    analysis = ["sensitivity", "--model", "dense", "--data", data, "--steps", "2", "--type", "unstructured"]
    assert main([*analysis, "--cache", "cache.json", "-o", "s.json"]) == 0
    compress = ["compress", "c.yaml", "--model", "dense", "--shape", "1", "1", "8", "8", "-o", "small"]
    for file in ("cache.json", "s.json"):
        assert main([*compress, "--report", "page.html", "--sensitivity", file]) == 0
        read = harmless(Path("page.html").read_text(encoding="utf-8"))
        assert "Sensitivity to pruning" in read.texts and read.tags["polyline"] == 3
    capsys.readouterr()
    Path("other.json").write_text(
        Path("s.json").read_text().replace("first", "x").replace("second", "y").replace("alert", "z")
    )
    page = ["--report", "b.html"]
    for given, message in (
        (["--sensitivity", "s.json"], "give --report"),
        (["--sensitivity", "nowhere.json", *page], "cannot be read"),
        (["--sensitivity", "other.json", *page], "another model"),
    ):
        assert main([*compress, *given]) == 2
        assert message in capsys.readouterr().err
    assert not Path("b.html").exists()
