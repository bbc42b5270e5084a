"""inspect: a saved model: its graph as a table, what it costs, how it came to be."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from fxcompress.commands.arguments import reported, saved
from fxcompress.commands.command import Command
from fxcompress.commands.given import page_of, print_json, saved_model
from fxcompress.graph.cost import cost, node_costs
from fxcompress.graph.coverage import coverage
from fxcompress.report import write_report

__all__ = ["INSPECT"]


def arguments(parser: argparse.ArgumentParser) -> None:
    saved(parser)
    reported(parser)


def run(options: argparse.Namespace) -> int:
    """Show a saved model."""
    report = page_of(options)
    model = saved_model(options)
    if report is not None:
        write_report(report, model, title=Path(options.model).name)
    totals, share = cost(model), coverage(model)
    rows = [(row.node, row.kind, f"{row.parameters:,}", f"{row.macs:,}", f"{row.bytes:,}") for row in node_costs(model)]
    history = model.meta.get("history", [])
    if options.json:
        summary = {"stage": model.meta["stage"], "nodes": totals.nodes, "parameters": totals.parameters, "macs": totals.macs}
        summary |= {"bytes": totals.bytes, "int8_macs": share.mac_share}
        print_json({**summary, "graph": [row.__dict__ for row in node_costs(model)], "history": history})
        return 0
    print(tabulate(rows, ("node", "kind", "parameters", "MACs", "bytes"), disable_numparse=True))
    count = f"{totals.macs / 1e6:,.1f}M" if totals.counted else "unknown"
    print(f"\nstage: {model.meta['stage']}; {totals.parameters:,} parameters, {count} MACs")
    print(f"stored: {totals.bytes / 1e6:.2f} MB; {share.told} in integers")
    for number, entry in enumerate(history, 1):
        print(f"\nrun {number}:\n{entry['plan'].rstrip()}")
    return 0


INSPECT = Command(
    "inspect",
    "show a saved model: graph, sizes, stage, history",
    "fxcompress inspect small --report small.html",
    run,
    arguments,
)
