"""How near the share of channels that goes comes to the share that was asked, over every torchvision model.

Every model is traced and analysed once and ranked once; no forward pass is made but where tracing needs one. Without
rounding, a group misses its share where it is a whole unit or more off (a unit of every block, where its blocks lose equal
numbers).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from benchmarks.figure import Figure
from benchmarks.run import Run
from benchmarks.zoo import build, inputs
from fxcompress import PassManager
from fxcompress.bench import models
from fxcompress.graph import edit, regions
from fxcompress.graph.channels import ChannelGroup, Channels
from fxcompress.graph.inputs import arguments
from fxcompress.graph.trace import region_inputs
from fxcompress.pass_base import Context
from fxcompress.passes.prune_channels import PruneChannels
from fxcompress.pruning.selection import Budget, choose

SHARES = (0.1, 0.25, 0.5, 0.75)


def examine(name: str, shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """One row: the share achieved for each share asked, and what missed it."""
    started = time.perf_counter()
    found = _ranked(name)
    units = sum(group.size for channels, _ in found for group in channels.groups)
    row: dict[str, Any] = {"model": name, "groups": sum(len(channels.groups) for channels, _ in found), "units": units}
    missed = []
    for share in shares:
        gone = 0
        for channels, scores in found:
            chosen = choose(channels, scores, Budget(share, round_to=1))
            gone += sum(len(chosen[group.name]) for group in channels.groups)
            missed += [_miss(group, len(chosen[group.name]), share) for group in channels.groups]
        row[f"{share:.0%}"] = f"{gone / units:.2%}" if units else "nothing"
    notes = [note for note in missed if note]
    return {**row, "missed": "; ".join(notes), "count": len(notes), "seconds": time.perf_counter() - started, "failed": ""}


def _ranked(name: str) -> list[tuple[Channels, dict[str, Tensor]]]:
    """The channel groups of every region of a model, and the scores of their units."""
    call = inputs(name)
    traced = PassManager(["open-attention"], progress=False, verify=False).run(build(name), call)
    for region in regions(traced).values():
        edit.finish(region)
    step, context = PruneChannels(round_to=1), Context(inputs=region_inputs(traced, arguments(call)))
    return [(channels, step.importance(channels, context)) for channels in step.analysed(traced, context).values()]


def _miss(group: ChannelGroup, gone: int, share: float) -> str:
    """What a group lost and was asked to lose, where that is a unit or more apart."""
    blocks, asked = len(group.blocks), share * group.size
    return f"{group.name} lost {gone} of {group.size}, not {asked:.1f}" if abs(gone - asked) >= blocks else ""


def measure(run: Run) -> Iterator[Figure]:
    """The zoo at 10, 25, 50 and 75 %."""
    rows = run.sweep(examine, models.names())
    run.table("channels achieved where a share was asked", rows)
    failed = [row["model"] for row in rows if row["failed"]]
    done = [row for row in rows if not row["failed"]]
    missed = [row["model"] for row in done if row["count"]]
    yield Figure("models tried at four shares", len(rows))
    yield Figure("models that fail at a share", len(failed), at_most=0, note=", ".join(failed))
    total = sum(row["count"] for row in done)
    yield Figure("channel groups a unit or more off the share asked", total, at_most=0, note=", ".join(missed))
