"""Sensitivity analyses read back from files: a report in JSON, or the cache of an analysis that ran to its end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxcompress.errors import ConfigError, PlanError, brief
from fxcompress.files import read_json
from fxcompress.plan import Plan
from fxcompress.pruning.sensitivity_report import Recommendation, Summary, scores

__all__ = ["read_analysis"]

Curves = dict[str, dict[float, float]]


def read_analysis(path: str | os.PathLike[str]) -> Summary:
    """The analysis that ``export_report("analysis.json")`` wrote, or that an analyzer's ``cache`` holds.

    Raises ConfigError where the file is neither, or an analysis that was interrupted.
    """
    source = Path(path)
    try:
        data = read_json(source)
        return _of_cache(data) if "values" in data else _of_report(data)
    except OSError as error:
        raise ConfigError(f"the analysis {str(source)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError, AttributeError, PlanError) as error:
        raise ConfigError(
            f"{str(source)!r} is not an analysis of sensitivity ({brief(error)}); give the .json report or the cache of one."
        ) from error


def _of_report(data: Mapping[str, Any]) -> Summary:
    curves = {name: {float(step): _finite(value) for step, value in curve.items()} for name, curve in data["curves"].items()}
    advice = data["recommendation"]
    if advice is not None:
        shares = {name: _finite(advice["sparsity"][name]) for name in curves}
        advice = Recommendation(shares, _finite(advice["metric"]), _finite(advice["macs"]), Plan.parse(advice["plan"]))
    found = {name: _finite(data["scores"][name]) for name in curves}
    return _whole(
        Summary(_word(data, "metric"), _word(data, "pruning_type"), _finite(data["baseline"]), found, curves, advice)
    )


def _of_cache(data: Mapping[str, Any]) -> Summary:
    """Its measurements of single parts; what was tried of several together belongs to no curve."""
    curves: Curves = {}
    baseline = math.nan
    for key, value in data["values"].items():
        shares = json.loads(key)
        if not shares:
            baseline = _finite(value)
        elif len(shares) == 1:
            name, step = next(iter(shares.items()))
            curves.setdefault(name, {})[_finite(step)] = _finite(value)
    found = scores(_finite(baseline), curves, -1.0 if data["less_is_better"] else 1.0)
    if set(curves) != set(data["parts"]):
        raise ValueError(_UNFINISHED)
    return _whole(Summary(_word(data, "metric"), _word(data, "pruning_type"), baseline, found, curves, None))


_UNFINISHED = "it was interrupted: analyse again with this cache, which goes on"


def _whole(summary: Summary) -> Summary:
    if not summary.curves or any(set(curve) != set(summary.steps) for curve in summary.curves.values()):
        raise ValueError(_UNFINISHED)
    return summary


def _word(data: Mapping[str, Any], key: str) -> str:
    if not isinstance(data[key], str):
        raise TypeError(f"{key} is no word")
    return str(data[key])


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError("it holds a number that is not finite")
    return float(value)
