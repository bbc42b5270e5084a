"""Sensitivity: what pruning one part of a model costs, part by part, and how much every part can lose."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxcompress.data import check_batch, fed, fitting
from fxcompress.distributed import gather, rank, spread, world
from fxcompress.errors import ConfigError, DataError
from fxcompress.files import make_folder, read_json, write_text
from fxcompress.graph.digest import digest, state_of
from fxcompress.graph.tree import device_of
from fxcompress.manager import PassManager, example_call
from fxcompress.options import Count, check_given
from fxcompress.plan import Plan
from fxcompress.pruning import sensitivity_report as report
from fxcompress.pruning.sensitivity_report import Recommendation
from fxcompress.pruning.trials import Trials, check_options, trials
from fxcompress.training import METRICS
from fxcompress.training.order import batch_size
from fxcompress.training.terms import split_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SensitivityAnalyzer"]

TYPES = ("structured", "unstructured", "semi_structured")


class SensitivityAnalyzer:
    """Prunes one part of a model at a time, at several sparsities, and measures what that costs.

    ``sparsity_range``  the least and the largest sparsity tried
    ``num_steps``       how many, evenly spaced (for ``semi_structured``: those that N of every M allow)
    ``metric``          a name (``accuracy``, ``top5``, ``cross_entropy_loss``, …), or ``function(model, batch)`` → a number
    ``pruning_type``    ``structured`` (parts are channel groups), ``unstructured`` or ``semi_structured`` (layers)
    ``maximize``        whether more of the metric is better; None: as METRICS says; more of a function
    ``cache``           a file that keeps every measurement, so that an interrupted analysis goes on where it stopped
    ``pruner_options``  options of the :class:`StructuredPruner` or :class:`MagnitudePruner` that prunes

    The caller's model stays as it is. Under ``torchrun`` the measurements are spread over the processes.
    """

    def __init__(
        self,
        sparsity_range: Sequence[float] = (0.1, 0.9),
        num_steps: Count = 9,
        metric: str | Callable[[nn.Module, Any], float] = "accuracy",
        pruning_type: str = "structured",
        *,
        maximize: bool | None = None,
        example_inputs: Any = None,
        cache: str | os.PathLike[str] | None = None,
        pruner_options: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> None:
        check_given(SensitivityAnalyzer, locals())
        if not _is_range(sparsity_range):
            raise ConfigError(f"sparsity_range is {sparsity_range!r}; it is [low, high] with 0 < low <= high < 1.")
        if pruning_type not in TYPES:
            raise ConfigError(f"pruning_type is {pruning_type!r}; it is one of {', '.join(TYPES)}.")
        check_options(pruning_type, pruner_options or {})
        if not callable(metric):
            METRICS[metric]  # an unknown name is an error here
        self.sparsity_range, self.num_steps = list(sparsity_range), num_steps
        self.metric, self.pruning_type = metric, pruning_type
        if maximize is None:
            maximize = callable(metric) or not METRICS.lower_is_better(metric)
        self.sign = 1.0 if maximize else -1.0
        self.example_inputs, self.options = example_inputs, dict(pruner_options or {})
        self.cache, self._progress = None if cache is None else Path(cache), progress
        self.baseline = math.nan
        self.curves: dict[str, dict[float, float]] = {}
        self.recommendation: Recommendation | None = None
        self._values: dict[str, float] = {}
        self._trials: Trials | None = None
        self._data: Iterable[Any] = ()

    def analyze(self, model: nn.Module, dataloader: Iterable[Any]) -> dict[str, dict[float, float]]:
        """Part → sparsity → the metric with that part alone pruned; :attr:`baseline` is the metric of the dense model.

        ``dataloader`` yields batches with targets (anything, for a metric of your own). Raises ConfigError where a cache
        belongs to another analysis, or a metric is not a finite number.
        """
        data = fed(dataloader)
        self._data = list(data) if iter(data) is data else data
        call = example_call(self.example_inputs, self._data, model)
        traced = PassManager(Plan(), verify=False, progress=False).run(model, call)
        self._trials = trials(self.pruning_type, traced, call, self.options)
        steps = self._trials.steps(self.sparsity_range[0], self.sparsity_range[1], self.num_steps)
        if not steps:
            raise ConfigError(f"no sparsity that N of every M allow lies in {self.sparsity_range}.")
        self._fingerprint = digest(state_of(model), json.dumps(self._settings(), sort_keys=True, default=str))
        self._values = self._recall()
        single = [{name: step} for name in self._trials.names for step in steps]
        self._measure([{}, *single])
        self.baseline = self._values[_key({})]
        self.curves = {n: {step: self._values[_key({n: step})] for step in steps} for n in self._trials.names}
        self.recommendation = None
        return self.curves

    def get_sensitivity_scores(self) -> dict[str, float]:
        """Part → by how much the metric is worse than the dense model's, mean over the sparsities tried."""
        self._analysed()
        return report.scores(self.baseline, self.curves, self.sign)

    def get_optimal_sparsity(self, target_metric: float | None = None, *, macs: float | None = None) -> dict[str, float]:
        """Part → the largest sparsity that can be had together with the others'.

        ``target_metric``  the metric that the pruned model must still reach, before any fine-tuning
        ``macs``           the share of the dense model's multiply-accumulates that may be left; without ``target_metric``,
                           the least harm that reaches it

        Parts are pruned further step by step, the step that costs least alone first, as far as the target allows when all
        of them are pruned together, which is measured; then every part is raised on its own while it still holds.
        :attr:`recommendation` has the shares, the metric and MACs measured with them, and the plan, which runs as it is.
        Raises ConfigError where both cannot be had, or the dense model misses the target.
        """
        check_given(SensitivityAnalyzer.get_optimal_sparsity, locals())
        self._analysed()
        assert self._trials is not None
        if target_metric is None and macs is None:
            raise ConfigError("give target_metric, macs, or both: what must the pruned model keep?")
        if macs is not None and not 0 < macs <= 1:
            raise ConfigError(f"macs is {macs!r}; it is a share of the dense model's, in (0, 1].")
        if target_metric is not None and not self._reaches(self.baseline, target_metric):
            raise ConfigError(
                f"the dense model reaches {self.baseline:.6g}, and {target_metric:.6g} is asked of the pruned one."
            )
        if target_metric is not None:
            shares = self._within(target_metric)
        else:
            assert macs is not None
            shares = self._lighter(macs)
        found = Recommendation(shares, self._together(shares), self._trials.macs(shares), self._trials.plan(shares))
        if macs is not None and found.macs > macs:
            raise ConfigError(
                f"{found.macs:.1%} of the MACs are left at a metric of {found.metric:.6g}; {macs:.1%} cannot be had"
                + ("." if target_metric is None else f" while it stays at {target_metric:.6g}.")
            )
        self.recommendation = found
        return found.shares

    def plot_sensitivity(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A matplotlib figure: the curve of every part, and the scores; written to ``path`` where one is given."""
        figure = report.plot(self.summary())
        if path is not None:
            figure.savefig(os.fspath(path))
        return figure

    def export_report(self, path: str | os.PathLike[str]) -> None:
        """Scores, curves and the recommendation as JSON, CSV, Markdown or an HTML page, by the ending of ``path``."""
        check_given(SensitivityAnalyzer.export_report, locals())
        report.write(self.summary(), Path(path))

    def summary(self) -> report.Summary:
        """All that a report shows."""
        self._analysed()
        scores = self.get_sensitivity_scores()
        return report.Summary(
            self._metric_name(), self.pruning_type, self.baseline, scores, self.curves, self.recommendation
        )

    def _metric_name(self) -> str:
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", type(self.metric).__name__)

    def _analysed(self) -> None:
        if not self.curves:
            raise ConfigError("nothing has been analysed yet: call analyze(model, dataloader) first.")

    def _drops(self) -> dict[str, list[float]]:
        """Part → how much worse every sparsity is, from the least on."""
        return {
            name: [self.sign * (self.baseline - curve[step]) for step in sorted(curve)]
            for name, curve in self.curves.items()
        }

    def _reaches(self, value: float, target: float) -> bool:
        return self.sign * value >= self.sign * target

    def _within(self, target: float) -> dict[str, float]:
        """The furthest that measures well together, then every part raised on its own, the least sensitive first."""
        path = self._path()
        holds = range(len(path) + 1)
        last = bisect.bisect_left(holds, True, key=lambda n: not self._reaches(self._together(path[:n]), target)) - 1
        shares = self._shares(path[:last])
        scores = self.get_sensitivity_scores()
        for name in sorted(shares, key=lambda n: scores[n]):
            for step in (step for step in sorted(self.curves[name]) if step > shares[name]):
                if not self._reaches(self._together({**shares, name: step}), target):
                    break
                shares[name] = step
        return shares

    def _lighter(self, macs: float) -> dict[str, float]:
        """As few steps as leave this share of MACs."""
        path = self._path()
        trials: Any = self._trials
        count = bisect.bisect_left(range(len(path) + 1), True, key=lambda n: trials.macs(self._shares(path[:n])) <= macs)
        return self._shares(path[: min(count, len(path))])

    def _path(self) -> list[tuple[str, float]]:
        """Every step of every part: what cost least alone first, and among equals the least sparsity."""
        steps = []
        for name, drops in self._drops().items():
            costs = itertools.accumulate(drops, max)
            steps += [(cost, step, name) for cost, step in zip(costs, sorted(self.curves[name]), strict=True)]
        return [(name, step) for _, step, name in sorted(steps, key=lambda s: s[:2])]

    def _shares(self, path: Iterable[tuple[str, float]]) -> dict[str, float]:
        return {**dict.fromkeys(self.curves, 0.0), **dict(path)}

    def _together(self, shares: Mapping[str, float] | Iterable[tuple[str, float]]) -> float:
        """The metric of the model with all of these pruned."""
        chosen = {name: share for name, share in dict(shares).items() if share}
        self._measure([chosen])
        return self._values[_key(chosen)]

    def _measure(self, wanted: Sequence[dict[str, float]]) -> None:
        """Evaluate what has no value yet, spread over the processes, and remember it."""
        missing = [shares for shares in wanted if _key(shares) not in self._values]
        hidden = True if rank() or len(missing) < 2 else None if self._progress is None else not self._progress
        with tqdm(total=len(missing), desc="sensitivity", disable=hidden, leave=False, unit="trial") as bar:

            def evaluated(shares: dict[str, float]) -> float:
                assert self._trials is not None
                value = _evaluate(self._trials.pruned(shares), self._data, self.metric)
                if not math.isfinite(value):
                    raise ConfigError(f"the metric of the model pruned by {shares or 'nothing'} is {value}.")
                self._values[_key(shares)] = value
                self._keep()
                bar.update(world())
                return value

            for shares, value in zip(missing, spread(missing, evaluated), strict=True):
                self._values[_key(shares)] = value
        if missing:
            self._keep()

    def _settings(self) -> dict[str, Any]:
        metric = (
            self.metric if isinstance(self.metric, str) else getattr(self.metric, "__qualname__", repr(type(self.metric)))
        )
        return {"metric": metric, "pruning_type": self.pruning_type, "pruner_options": self.options}

    def _own_cache(self) -> Path | None:
        """The file this process writes: rank 0 the cache itself, the others one beside it."""
        if self.cache is None or not rank():
            return self.cache
        return self.cache.with_name(f"{self.cache.name}.rank{rank()}")

    def _keep(self) -> None:
        target = self._own_cache()
        if target is None:
            return
        make_folder(target.parent)
        assert self._trials is not None
        about = {"metric": self._metric_name(), "pruning_type": self.pruning_type, "less_is_better": self.sign < 0}
        kept = {"fingerprint": self._fingerprint, **about, "parts": self._trials.names, "values": self._values}
        write_text(target, json.dumps(kept, indent=1))

    def _recall(self) -> dict[str, float]:
        """Every process's measurements of this very analysis, from its files."""
        values: dict[str, float] = {}
        files = [] if self.cache is None else [self.cache, *self.cache.parent.glob(f"{self.cache.name}.rank*")]
        for file in files:
            if not file.is_file():
                continue
            try:
                data = read_json(file)
                theirs, found = data["fingerprint"], {str(k): float(v) for k, v in data["values"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{str(file)!r} is not a cache of a sensitivity analysis; choose another path.") from error
            if theirs != self._fingerprint:
                raise ConfigError(
                    f"{str(file)!r} belongs to another model, metric or pruning type; delete it, or choose another."
                )
            values |= found
        together: dict[str, float] = {}
        for part in gather(values):
            together |= part
        return together


def _key(shares: Mapping[str, float]) -> str:
    return json.dumps(dict(shares), sort_keys=True)


def _evaluate(model: nn.Module, data: Iterable[Any], metric: str | Callable[[nn.Module, Any], float]) -> float:
    """The metric's mean over samples, in eval mode, on this process alone."""
    device = device_of(model)
    total, samples = 0.0, 0
    model.eval()
    with torch.no_grad():
        for position, batch in enumerate(data):
            if callable(metric):
                moved = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batch)
                value = float(metric(model, moved))
            else:
                call, target = split_target(model, batch, device)
                if target is None:
                    raise DataError(f"batch {position} has no target; {metric!r} compares outputs with targets.")
                check_batch(call, position)
                with fitting(position):
                    value = float(METRICS[metric](call(model), target))
            total += value * batch_size(batch)
            samples += batch_size(batch)
    if not samples:
        raise DataError("the dataloader is empty: there is nothing to evaluate on.")
    return total / samples


def _is_range(value: Any) -> bool:
    """Whether this is [low, high] with 0 < low <= high < 1."""
    if not isinstance(value, Sequence) or len(value) != 2 or not all(isinstance(end, (int, float)) for end in value):
        return False
    return bool(0 < value[0] <= value[1] < 1)
