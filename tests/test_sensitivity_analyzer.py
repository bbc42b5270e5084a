"""Sensitivity: curves against pruning by hand, scores, recommendations that hold, resuming, reports."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxcompress import METRICS, PassManager, Recipe
from fxcompress.errors import ConfigError, DataError
from fxcompress.graph.cost import cost
from fxcompress.pruning import MagnitudePruner, SensitivityAnalyzer
from fxcompress.pruning import sensitivity_analyzer as module

ROOT = Path(__file__).parent.parent
X = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def data(model: nn.Module | None = None) -> list[tuple[Tensor, Tensor]]:
    """Labels that the dense model gets right."""
    with torch.no_grad():
        labels = (network() if model is None else model)(X).argmax(1)
    return [(X[:120], labels[:120]), (X[120:], labels[120:])]


def analyzed(**options: Any) -> SensitivityAnalyzer:
    analyzer = SensitivityAnalyzer(**{"pruning_type": "unstructured", "progress": False, **options})
    analyzer.analyze(network(), data())
    return analyzer


def masked_by_hand(layer: str, sparsity: float) -> float:
    """Accuracy with the smallest weights of one layer zeroed, by numpy."""
    weights = [p.detach().double().numpy().copy() for p in network().parameters()]
    matrix = weights[{"0": 0, "2": 2, "4": 4}[layer]]
    matrix.ravel()[np.argsort(np.abs(matrix).ravel(), kind="stable")[: round(sparsity * matrix.size)]] = 0
    return _accuracy(weights)


def _accuracy(weights: list[Any]) -> float:
    h = X.double().numpy()
    for position in range(0, 6, 2):
        h = h @ weights[position].T + weights[position + 1]
        h = np.maximum(h, 0) if position < 4 else h
    labels = torch.cat([y for _, y in data()]).numpy()
    return float((h.argmax(1) == labels).mean())


def test_curves_are_those_of_pruning_by_hand_and_the_model_stays() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    analyzer = SensitivityAnalyzer([0.2, 0.8], 4, pruning_type="unstructured", progress=False)
    curves = analyzer.analyze(model, data())
    assert analyzer.baseline == 1.0
    assert list(curves) == ["0", "2", "4"]
    for layer, curve in curves.items():
        assert list(curve) == [0.2, 0.4, 0.6, 0.8]
        for sparsity, value in curve.items():
            assert value == pytest.approx(masked_by_hand(layer, sparsity), abs=1e-9)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def cut_by_hand(position: int, sparsity: float) -> float:
    """Accuracy with the units of least l1 norm taken out of one hidden layer, by numpy."""
    weights = [p.detach().double().numpy() for p in network().parameters()]
    norms = np.abs(weights[position]).sum(1)
    gone = np.argsort(norms, kind="stable")[: round(sparsity * len(norms))]
    weights[position], weights[position + 1] = (np.delete(weights[position + i], gone, 0) for i in range(2))
    weights[position + 2] = np.delete(weights[position + 2], gone, 1)
    return _accuracy(weights)


def test_structured_curves_are_those_of_cutting_units_by_hand() -> None:
    analyzer = analyzed(pruning_type="structured", sparsity_range=[0.25, 0.75], num_steps=3)
    assert list(analyzer.curves) == ["0", "2"]
    for name, curve in analyzer.curves.items():
        for sparsity, value in curve.items():
            assert value == pytest.approx(cut_by_hand(int(name), sparsity), abs=1e-9)


def test_semi_structured_tries_what_n_of_m_allow() -> None:
    analyzer = analyzed(pruning_type="semi_structured")
    assert list(analyzer.curves) == ["2", "4"]
    assert list(analyzer.curves["2"]) == [0.25, 0.5, 0.75]
    pruner = MagnitudePruner(pruning_type="semi_structured", include_layers=["2"])
    masked = pruner.prune(network())
    hits = sum(float((masked(x).argmax(1) == y).sum()) for x, y in data())
    assert analyzer.curves["2"][0.5] == pytest.approx(hits / 200)


def test_scores_are_the_mean_loss_and_follow_the_direction_of_the_metric() -> None:
    analyzer = analyzed(num_steps=3)
    for name, score in analyzer.get_sensitivity_scores().items():
        assert score == pytest.approx(np.mean([1.0 - value for value in analyzer.curves[name].values()]))
    loss = analyzed(num_steps=3, metric="cross_entropy_loss")
    for name, score in loss.get_sensitivity_scores().items():
        assert score == pytest.approx(np.mean([value - loss.baseline for value in loss.curves[name].values()]))


def test_a_registered_metric_says_which_way_it_is_better() -> None:
    @METRICS.register("perplexity", lower_is_better=True)
    def perplexity(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target).exp()

    @METRICS.register("negative_error", lower_is_better=False)
    def negative_error(output: Tensor, target: Tensor) -> Tensor:
        return -(output.argmax(1) != target).double().mean()

    for name, sign in (("perplexity", 1.0), ("negative_error", -1.0)):
        found = analyzed(num_steps=2, metric=name)
        for part, score in found.get_sensitivity_scores().items():
            assert score == pytest.approx(np.mean([sign * (v - found.baseline) for v in found.curves[part].values()]))
        assert Recipe(metric=name).better(1.0, 2.0) is (sign > 0)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("pruning_type", ["unstructured", "structured", "semi_structured"])
def test_the_recommended_plan_runs_as_it_is_and_keeps_the_metric(pruning_type: str, target: float) -> None:
    analyzer = analyzed(pruning_type=pruning_type)
    shares = analyzer.get_optimal_sparsity(target)
    advice = analyzer.recommendation
    assert advice is not None and advice.shares == shares and advice.metric >= target
    assert all(share == 0 or share in analyzer.curves[name] for name, share in shares.items())
    scores = analyzer.get_sensitivity_scores()
    last = sorted(shares, key=lambda name: scores[name])[-1]
    higher = [step for step in analyzer.curves[last] if step > shares[last]]
    assert not higher or analyzer._together({**shares, last: min(higher)}) < target
    if any(shares.values()):
        result = PassManager(str(advice.plan)).run(network(), X)
        assert sum(float((result(x).argmax(1) == y).sum()) for x, y in data()) / 200 == pytest.approx(advice.metric)
        if pruning_type == "structured":
            assert cost(result).macs / cost(PassManager([]).run(network(), X)).macs == pytest.approx(advice.macs)


def test_a_lower_target_allows_more() -> None:
    analyzer = analyzed()
    totals = [sum(analyzer.get_optimal_sparsity(target).values()) for target in (1.0, 0.9, 0.7, 0.4)]
    assert totals == sorted(totals) and totals[-1] > totals[0]


@pytest.mark.parametrize("pruning_type", ["unstructured", "structured"])
def test_a_share_of_macs_is_reached_with_the_least_harm(pruning_type: str) -> None:
    analyzer = analyzed(pruning_type=pruning_type)
    analyzer.get_optimal_sparsity(macs=0.6)
    advice = analyzer.recommendation
    assert advice is not None and advice.macs <= 0.6
    if pruning_type == "unstructured":
        macs = {"0": 6 * 16, "2": 16 * 12, "4": 12 * 4}
        left = sum(count * (1 - advice.shares[name]) for name, count in macs.items()) / sum(macs.values())
        assert advice.macs == pytest.approx(left)
    for wrong in ("most", float("nan"), 0.0):
        with pytest.raises(ConfigError, match="macs"):
            analyzer.get_optimal_sparsity(macs=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="target_metric is 'best'"):
        analyzer.get_optimal_sparsity("best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="path is 3"):
        analyzer.export_report(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"cannot be had while it stays at 1"):
        analyzer.get_optimal_sparsity(1.0, macs=0.1)


def test_a_metric_may_be_any_function_of_model_and_batch() -> None:
    def margin(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
        top = model(batch[0]).topk(2).values
        return float((top[:, 0] - top[:, 1]).mean())

    analyzer = analyzed(metric=margin, num_steps=2)
    with torch.no_grad():
        top = network()(X).topk(2).values
    assert analyzer.baseline == pytest.approx(float((top[:, 0] - top[:, 1]).mean()), rel=1e-5)


def test_an_interrupted_analysis_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, whole = tmp_path / "deep" / "cache.json", analyzed(num_steps=3)
    real, calls = module._evaluate, [0]

    def dying(*arguments: Any) -> float:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
        analyzed(num_steps=3, cache=cache)
    assert len(json.loads(cache.read_text())["values"]) == 4
    again = analyzed(num_steps=3, cache=cache)
    assert calls[0] == 5 + 6 and again.curves == whole.curves
    analyzed(num_steps=3, cache=cache)
    assert calls[0] == 11
    assert not list(cache.parent.glob("*.partial"))


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    analyzed(num_steps=1, cache=cache)
    with pytest.raises(ConfigError, match="belongs to another model, metric"):
        analyzed(num_steps=1, cache=cache, metric="top5")
    cache.write_text("[]")
    with pytest.raises(ConfigError, match="not a cache"):
        analyzed(num_steps=1, cache=cache)


def test_processes_under_torchrun_share_the_work_and_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = str(ROOT / "tests" / "programs" / "sensitivity.py")
    run = subprocess.run([*command, program, str(tmp_path)], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["world"] == 2 and first["wrote"] and first["baseline"] == 1.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 6)
    alone = SensitivityAnalyzer(num_steps=3, pruning_type="unstructured", progress=False)
    curves = alone.analyze(model, [(x, model(x).argmax(1))])
    assert first["curves"] == {name: {str(k): v for k, v in curve.items()} for name, curve in curves.items()}


def test_reports_hold_scores_curves_and_the_recommendation(tmp_path: Path) -> None:
    analyzer = analyzed(num_steps=3)
    analyzer.get_optimal_sparsity(0.8)
    advice = analyzer.recommendation
    assert advice is not None
    for ending in ("json", "csv", "md"):
        analyzer.export_report(tmp_path / f"report.{ending}")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["baseline"] == 1.0 and read["scores"] == analyzer.get_sensitivity_scores()
    assert read["curves"]["2"] == {str(step): value for step, value in analyzer.curves["2"].items()}
    assert PassManager(read["recommendation"]["plan"]).plan == advice.plan
    rows = list(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    ranked = sorted(rows, key=lambda row: -float(row["score"]))
    assert rows == ranked and {row["part"]: float(row["recommended"]) for row in rows} == advice.shares
    text = (tmp_path / "report.md").read_text()
    assert (
        all(name in text for name in (" part ", " score ", " recommended "))
        and "mask-weights" in text
        and "of the dense model: 1" in text
    )
    with pytest.raises(ConfigError, match=r"\.json, \.csv, \.md"):
        analyzer.export_report(tmp_path / "report.pdf")


def test_the_plot_shows_every_curve_and_every_score(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    analyzer = analyzed(num_steps=3)
    figure = analyzer.plot_sensitivity(tmp_path / "plot.png")
    curves, scores = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in curves.lines}  # type: ignore[arg-type]
    for name, curve in analyzer.curves.items():
        assert drawn[name] == list(curve.values())
    assert drawn["dense"] == [1.0, 1.0]
    assert sorted(bar.get_width() for bar in scores.patches) == pytest.approx(  # type: ignore[attr-defined]
        sorted(analyzer.get_sensitivity_scores().values())
    )
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity_range": [0.5]},
        {"sparsity_range": [0.9, 0.1]},
        {"sparsity_range": [0.1, 1.0]},
        {"num_steps": 0},
        {"metric": "acuracy"},
        {"pruning_type": "blocks"},
        {"maximize": "accuracy"},
        {"progress": "no"},
        {"pruner_options": 3},
        {"pruner_options": {"criterium": "l2_norm"}},
        {"pruner_options": {"n": 1}},
        {"pruner_options": {"round_to": 2}, "pruning_type": "unstructured"},
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SensitivityAnalyzer(**options)


def test_misuse_and_bad_data_are_errors() -> None:
    analyzer = SensitivityAnalyzer(pruning_type="unstructured", progress=False, example_inputs=X)
    for method in (analyzer.get_sensitivity_scores, analyzer.plot_sensitivity, lambda: analyzer.get_optimal_sparsity(0.5)):
        with pytest.raises(ConfigError, match="call analyze"):
            method()
    with pytest.raises(DataError, match="batch 0 holds NaN or infinite values"):
        analyzer.analyze(network(), [(X / 0, torch.zeros(len(X), dtype=torch.int64))])
    with pytest.raises(DataError, match="the data is a int"):
        SensitivityAnalyzer().analyze(nn.Linear(2, 2), 5)  # type: ignore[arg-type]
    for given in (None, "ab", [0.1]):
        with pytest.raises(ConfigError, match="sparsity_range is"):
            SensitivityAnalyzer(given)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="empty"):
        analyzer.analyze(network(), [])
    with pytest.raises(DataError, match="has no target"):
        analyzer.analyze(network(), [X])
    with pytest.raises(ConfigError, match="nothing that unstructured pruning could take"):
        analyzer.analyze(nn.ReLU(), data())
    with pytest.raises(ConfigError, match="pruned by nothing is nan"):
        SensitivityAnalyzer(metric=lambda m, b: float("nan"), pruning_type="unstructured", progress=False).analyze(
            network(), data()
        )
    done = analyzed(num_steps=1)
    with pytest.raises(ConfigError, match="the dense model reaches 1"):
        done.get_optimal_sparsity(1.1)
    with pytest.raises(ConfigError, match="what must the pruned model keep"):
        done.get_optimal_sparsity()
    with pytest.raises(ConfigError, match="share of the dense model's"):
        done.get_optimal_sparsity(macs=3)


def test_shares_by_layer_mask_each_layer_on_its_own() -> None:
    result = MagnitudePruner().prune(network(), {"0": 0.25, "[24]": 0.5})
    zeros = {name: int((result.get_submodule(name).weight == 0).sum()) for name in ("0", "2", "4")}  # type: ignore[union-attr, arg-type]
    assert zeros == {"0": 24, "2": 96, "4": 24}
    with pytest.raises(ConfigError, match="no prunable layer is called 'fc'"):
        MagnitudePruner().prune(network(), {"fc": 0.5})
