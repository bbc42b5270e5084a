"""int8 against eager fp32, each of our backends and others' quantizers: speed-up and SNR, side by side in one run.

python benchmarks/quantization.py [--models NAME ...] [--batch N] [--threads N] [--peers PYTHON] [--quick] [--json FILE]

``--peers`` names the Python of an environment with torch and what there is of torchao, nncf, openvino and onnxruntime; the
peers are built there from the same weights, calibrated with the same batches, timed in the same rounds and compared on the
same held-out images. Weights are seeded, batch normalisation has lived on seeded noise. Inputs are 224×224.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fxcompress import PTQQuantizer, backends, coverage
from fxcompress.backends.cpu import has_vnni
from fxcompress.bench import models
from fxcompress.observe import output_snr

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16")
OURS = ("fbgemm", "onnxruntime", "openvino", "auto")
STATIC = ("torch.ao FX", "NNCF + OpenVINO", "ONNX Runtime static", "torchao PT2E")
DYNAMIC = ("torch.ao dynamic", "ONNX Runtime dynamic")
SETTINGS: dict[str, dict[str, Any]] = {
    "resnet50": {"exclude_layers": ["conv1", "layer1.0"]},
}
"""What is asked of our quantizer beside the defaults; layers in float are named in the table."""
CALIBRATION: dict[str, Any] = {"calibration_method": "mse"}
BARS = {"resnet18": (3.06, 27.0), "resnet50": (3.31, 16.5), "mobilenet_v2": (3.39, 13.0), "vit_b_16": (1.9, 0.0)}


def subject(name: str) -> tuple[nn.Module, list[Tensor]]:
    """The seeded model and its calibration batches; a head of zeros, as ViT's comes, is drawn too."""
    model = models.build(name)
    batches = [models.example_inputs(name, batch=4, seed=seed)[0] for seed in range(1, 5)]
    models.live_in(model, [(batches[0],), (batches[1],)])
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            with torch.no_grad():
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
    return model, batches


class Peers:
    """The other process, or nobody where no interpreter was named."""

    def __init__(self, python: str | None, folder: Path, threads: int) -> None:
        self.process = None
        if python is not None:
            program = Path(__file__).with_name("peers.py")
            log = open(folder / "peers.log", "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
            self.process = subprocess.Popen(
                [python, str(program), str(folder), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
            )

    def ask(self, do: str, name: str) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, "name": name}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended"}  # type: ignore[no-any-return]

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for one model: every candidate built, compared on held-out images, then timed in turns."""
    model, batches = subject(name)
    image = models.example_inputs(name, batch=options.batch, seed=99)[0]
    held_out = [models.example_inputs(name, batch=options.batch, seed=seed)[0] for seed in range(99, 103)]
    with torch.no_grad():
        expected = torch.cat([model(x) for x in held_out])
    rows: list[dict[str, Any]] = [{"model": name, "what": "eager fp32"}]
    timers: dict[str, Callable[[], float]] = {"eager fp32": lambda: _seconds(model, image)}
    for backend in OURS:
        label = f"fxcompress {backend}"
        reason = backends.find(backend).unavailable()
        if reason:
            rows.append({"model": name, "what": label, "note": reason})
            continue
        _tell(f"{name}: {label}")
        row, quantized = ours(name, backend, model, batches, image, held_out, expected)
        rows.append(row)
        timers[label] = lambda quantized=quantized: _seconds(quantized, image)  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        peers = _started_peers(name, model, batches, image, held_out, folder, options)
        for peer in () if peers.process is None else _peers_of(name, options):
            _tell(f"{name}: {peer}")
            answer = peers.ask("build", peer)
            rows.append({"model": name, "what": peer, "note": answer.get("error", "")})
            if "error" not in answer:
                outputs = torch.load(folder / "outputs.pt", weights_only=True)
                rows[-1]["SNR dB"] = output_snr(expected, outputs)
                timers[peer] = lambda peer=peer: peers.ask("time", peer)["seconds"]  # type: ignore[misc]
        _tell(f"{name}: {len(timers)} candidates take turns")
        taken = _rounds(timers, options.runs)
        peers.close()
    for row in rows:
        if row["what"] in taken:
            row["ms"] = 1e3 * statistics.median(taken[row["what"]])
            ratios = [eager / own for eager, own in zip(taken["eager fp32"], taken[row["what"]], strict=True)]
            row["speed-up"] = statistics.median(ratios)
    return rows


def ours(
    name: str,
    backend: str,
    model: nn.Module,
    batches: list[Tensor],
    image: Tensor,
    held_out: list[Tensor],
    expected: Tensor,
) -> tuple[dict[str, Any], nn.Module]:
    quantizer = PTQQuantizer(
        backend, num_calibration_batches=len(batches), progress=False, **CALIBRATION, **SETTINGS.get(name, {})
    )
    started = time.perf_counter()
    quantized = quantizer.quantize(model, batches, image)
    spent = time.perf_counter() - started
    with torch.no_grad():
        found = torch.cat([quantized(x) for x in held_out])
    chosen = quantized.meta["quantization"].get("fastest", "")
    floats = ", ".join(SETTINGS.get(name, {}).get("exclude_layers", ()))
    notes = [part for part in (f"chose {chosen}" if chosen else "", f"{floats} in float" if floats else "") if part]
    row = {
        "model": name,
        "what": f"fxcompress {backend}",
        "SNR dB": output_snr(expected, found),
        "int8 MACs": coverage(quantized).mac_share,
        "build s": spent,
        "note": "; ".join(notes),
    }
    return row, quantized


def _peers_of(name: str, options: argparse.Namespace) -> tuple[str, ...]:
    chosen = (*STATIC, *DYNAMIC) if name.startswith("vit") else STATIC
    return tuple(peer for peer in chosen if not (options.quick and peer == "torchao PT2E"))


def _started_peers(
    name: str,
    model: nn.Module,
    batches: list[Tensor],
    image: Tensor,
    held_out: list[Tensor],
    folder: Path,
    options: argparse.Namespace,
) -> Peers:
    (folder / "model.json").write_text(json.dumps({"model": name}))
    contents = {"weights": model.state_dict(), "batches": batches, "image": image, "held_out": held_out}
    for word, value in contents.items():
        torch.save(value, folder / f"{word}.pt")
    return Peers(options.peers, folder, options.threads)


def _seconds(model: nn.Module, image: Tensor) -> float:
    with torch.no_grad():
        started = time.perf_counter()
        model(image)
        return time.perf_counter() - started


def _rounds(timers: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Every candidate once per round, so that a machine that slows down slows all of them; three rounds warm up."""
    taken: dict[str, list[float]] = {name: [] for name in timers}
    gc.collect()
    for round_ in range(3 + runs):
        for name, timer in timers.items():
            seconds = timer()
            if round_ >= 3:
                taken[name].append(seconds)
    return taken


def verdict(name: str, rows: list[dict[str, Any]]) -> str:
    """Our best backend against the bar, and against the peers of this run."""
    own = next((row for row in rows if row["what"] == "fxcompress auto" and "speed-up" in row), None)
    if own is None or name not in BARS:
        return ""
    speed, snr = BARS[name]
    peers = [row for row in rows if not row["what"].startswith("fxcompress") and "SNR dB" in row]
    fastest = max((row["speed-up"] for row in peers), default=0.0)
    clearest = max((row["SNR dB"] for row in peers if row["what"] in STATIC), default=0.0)
    return (
        f"{name}: auto {own['speed-up']:.2f}x at {own['SNR dB']:.1f} dB; the bar is {speed}x at {snr} dB; "
        f"the fastest peer here {fastest:.2f}x, the best static peer {clearest:.1f} dB"
    )


def _tell(what: str) -> None:
    """Where a long run stands, on a terminal or in a log, apart from the tables."""
    print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--peers", help="the Python of an environment with other quantizers")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no peer that compiles")
    parser.add_argument("--json")
    options = parser.parse_args()
    options.runs = 7 if options.quick else options.runs
    torch.set_num_threads(options.threads)
    vnni = "with VNNI" if has_vnni() else "without VNNI"
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()} {vnni}, {options.threads} thread(s)")
    print(f"batch {options.batch}, 224×224, medians of {options.runs} rounds in turns")
    heads = ("model", "what", "ms", "speed-up", "SNR dB", "int8 MACs", "build s", "note")
    everything: list[dict[str, Any]] = []
    for name in options.models:
        rows = measure(name, options)
        everything += rows
        table = [[_cell(row.get(head, "")) for head in heads] for row in rows]
        print(tabulate(table, heads, disable_numparse=True), verdict(name, rows), sep="\n", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
