"""int8 against eager fp32, each of our backends and others' quantizers: speed-up and SNR, side by side in one run.

The peers are built in their own environment from the same weights, calibrated with the same batches, timed in the same
rounds and compared on the same held-out images. Weights are seeded, batch normalisation has lived on seeded noise. Inputs
are 224×224. ``auto`` is asked for the bar's SNR and finds by itself what that takes (``recover-accuracy``), judged on
batches that neither it nor the peers calibrate with; the table's SNR is that of further images, which nothing has seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.figure import Figure
from benchmarks.peer_process import PeerError, Peers
from benchmarks.run import Run
from benchmarks.subjects import lived_in
from benchmarks.turns import in_turns, stopwatch
from fxcompress import PTQQuantizer, backends, coverage
from fxcompress.bench import models
from fxcompress.graph.results import output_snr

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16")
OURS = ("fbgemm", "onnxruntime", "openvino", "auto")
STATIC = ("torch.ao FX", "NNCF + OpenVINO", "ONNX Runtime static", "torchao PT2E")
DYNAMIC = ("torch.ao dynamic", "ONNX Runtime dynamic")
COMPILED = ("torchao PT2E",)
"""Left out of a quick run: compiling takes minutes."""
CALIBRATION: dict[str, Any] = {"calibration_method": "mse"}
BARS = {"resnet18": (3.06, 27.0), "resnet50": (3.31, 16.5), "mobilenet_v2": (3.39, 13.0), "vit_b_16": (1.9, 30.0)}
"""Speed-up and SNR in dB that ``auto`` must reach at batch 1 on one thread; the SNR of ViT-B/16 is above the clearest of
ONNX Runtime's (29.7 dB, dynamic)."""
SPREAD = 3.0
"""dB between our clearest and our least clear backend: saturating sums would cost more."""


@dataclass(frozen=True)
class Setting:
    batch: int
    threads: int
    rounds: int


def one(run: Run) -> Iterator[Figure]:
    """Batch 1, one thread: held against the bars."""
    yield from measure(run, Setting(1, 1, run.pick(20, 5)))


def batch8(run: Run) -> Iterator[Figure]:
    """Batch 8, one thread."""
    yield from measure(run, Setting(8, 1, run.pick(10, 3)))


def threads2(run: Run) -> Iterator[Figure]:
    """Batch 1, two threads."""
    yield from measure(run, Setting(1, 2, run.pick(20, 5)))


def measure(run: Run, setting: Setting) -> Iterator[Figure]:
    torch.set_num_threads(setting.threads)
    for name in run.chosen(MODELS, MODELS[:1]):
        rows = compare(name, run, setting)
        title = f"{name}, batch {setting.batch}, {setting.threads} thread(s), medians of {setting.rounds} rounds in turns"
        run.table(title, rows)
        yield from figures(name, rows, setting)


def compare(name: str, run: Run, setting: Setting) -> list[dict[str, Any]]:
    """Rows for one model: every candidate built, compared on held-out images, then timed in turns."""
    model, batches = lived_in(name)
    judged = [models.example_inputs(name, batch=4, seed=seed)[0] for seed in range(5, 9)]
    held_out = [models.example_inputs(name, batch=setting.batch, seed=seed)[0] for seed in range(99, 103)]
    image = held_out[0]
    with torch.no_grad():
        expected = torch.cat([model(x) for x in held_out])
    rows: list[dict[str, Any]] = [{"what": "eager fp32"}]
    timers: dict[str, Callable[[], float]] = {"eager fp32": _timer(model, image)}
    for backend in OURS:
        run.tell(f"{name}: {backend}")
        asked: dict[str, Any] = {"recover": recovery(name), "judged": judged} if backend == "auto" else {}
        row, quantized = ours(backend, model, batches, held_out, expected, **asked)
        rows.append(row)
        if quantized is not None:
            timers[row["what"]] = _timer(quantized, image)
    with ExitStack() as stack:
        for peer in _peers_of(name, run):
            run.tell(f"{name}: {peer}")
            rows.append({"what": peer})
            peers = stack.enter_context(run.peer_process(setting.threads))
            _hand_over(peers, name, model, batches, held_out)
            try:
                peers.ask("build", peer)
            except PeerError as error:
                rows[-1]["note"] = str(error)
                continue
            outputs = torch.load(peers.folder / "outputs.pt", weights_only=True)
            rows[-1]["SNR dB"] = output_snr(expected, outputs)
            timers[peer] = partial(peers.seconds, "time", peer)
        run.tell(f"{name}: {len(timers)} candidates take turns")
        turns = in_turns(timers, setting.rounds, warmup=2)
    for row in rows:
        if row["what"] in timers:
            row["ms"] = 1e3 * turns.median(row["what"])
            row["speed-up"] = turns.ratio("eager fp32", row["what"])
    heads = ("what", "ms", "speed-up", "SNR dB", "int8 MACs", "build s", "note")
    return [{head: row.get(head) for head in heads} for row in rows]


def recovery(name: str) -> dict[str, Any] | None:
    """What to do where integers alone do not reach the bar's SNR, as a user would ask for it."""
    if name not in BARS:
        return None
    _, bar = BARS[name]
    return {"metric": "fidelity", "max_drop": 100 * 10 ** (-bar / 10), "num_batches": 4, "adaround_layers": 0}


def ours(
    backend: str,
    model: nn.Module,
    batches: list[Tensor],
    held_out: list[Tensor],
    expected: Tensor,
    judged: Sequence[Tensor] = (),
    **asked: Any,
) -> tuple[dict[str, Any], nn.Module | None]:
    """The row of one of our backends, and the model; no model where the backend is not available."""
    label = f"fxcompress {backend}"
    reason = backends.find(backend).unavailable()
    if reason:
        return {"what": label, "note": reason}, None
    quantizer = PTQQuantizer(backend, num_calibration_batches=len(batches), progress=False, **CALIBRATION, **asked)
    started = time.perf_counter()
    quantized = quantizer.quantize(model, [*batches, *judged], held_out[0])
    spent = time.perf_counter() - started
    with torch.no_grad():
        found = torch.cat([quantized(x) for x in held_out])
    chosen = quantized.meta["quantization"].get("fastest", "")
    heard = quantizer.ledger.remarks("recover-accuracy")
    mended = [r for r in heard if r.node or ("became" in r.reason and "undone" not in r.reason)]
    said = [f"{r.node} in float" if r.node else r.reason.partition(":")[0] for r in mended]
    notes = [f"chose {chosen}"] * bool(chosen) + ([f"recovered by {', '.join(said)}"] if said else [])
    row = {
        "what": label,
        "SNR dB": output_snr(expected, found),
        "int8 MACs": coverage(quantized).mac_share,
        "build s": spent,
        "note": "; ".join(notes),
    }
    return row, quantized


def figures(name: str, rows: list[dict[str, Any]], setting: Setting) -> Iterator[Figure]:
    """``auto`` against the bars (at batch 1 on one thread), and against the peers of this run."""
    measured = [row for row in rows if row["speed-up"] is not None]
    own = [row for row in measured if row["what"].startswith("fxcompress")]
    peers = [row for row in measured if row not in own and row["what"] != "eager fp32"]
    auto = next(row for row in own if row["what"] == "fxcompress auto")
    held = setting == Setting(1, 1, setting.rounds) and name in BARS
    speed, clear = BARS[name] if held else (None, None)
    yield Figure(f"{name}: auto, eager fp32 / int8", auto["speed-up"], "x", at_least=speed, note=auto["note"])
    yield Figure(f"{name}: auto, SNR of the output", auto["SNR dB"], "dB", at_least=clear)
    fastest = max(peers, key=lambda row: row["speed-up"], default=None)
    if fastest is None:
        yield Figure(f"{name}: seconds of the fastest peer / auto", None, "x", at_least=1.0, note="no peer was measured")
    else:
        ratio = auto["speed-up"] / fastest["speed-up"]
        yield Figure(
            f"{name}: seconds of the fastest peer / auto", ratio, "x", at_least=1.0, note=f"the fastest is {fastest['what']}"
        )
    for peer in (row for row in peers if row["what"] in STATIC):
        gap = auto["SNR dB"] - peer["SNR dB"]
        yield Figure(f"{name}: SNR of auto above {peer['what']}", gap, "dB", at_least=0.0)
    alike = [row["SNR dB"] for row in own if row is not auto]
    spread = max(alike) - min(alike)
    yield Figure(f"{name}: spread of SNR over our backends", spread, "dB", at_most=SPREAD)


def _peers_of(name: str, run: Run) -> tuple[str, ...]:
    chosen = (*STATIC, *DYNAMIC) if name.startswith("vit") else STATIC
    return tuple(peer for peer in chosen if not (run.quick and peer in COMPILED))


def _hand_over(peers: Peers, name: str, model: nn.Module, batches: list[Tensor], held_out: list[Tensor]) -> None:
    """Leave what the peers are built from in their folder."""
    (peers.folder / "model.json").write_text(json.dumps({"model": name}))
    contents = {"weights": model.state_dict(), "batches": batches, "image": held_out[0], "held_out": held_out}
    for word, value in contents.items():
        torch.save(value, peers.folder / f"{word}.pt")


def _timer(model: nn.Module, image: Tensor) -> Callable[[], float]:
    @torch.no_grad()
    def run() -> None:
        model(image)

    return stopwatch(run)
