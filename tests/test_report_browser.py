"""The page about a compressed model, looked at in a browser: it fits its window and has its colours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fxcompress import SensitivityAnalyzer, write_report
from tests.pages import HOSTILE, Reader, in_integers, network, pictures

FRAMES = """<!doctype html><meta charset="utf-8"><body style="margin:0;display:flex;align-items:flex-start">
<iframe width="380" height="1600" style="border:0" src="page.html"></iframe>
<iframe width="1280" height="1600" style="border:0" src="page.html"></iframe>
<pre id="found"></pre>
<script>
addEventListener("load", () => {
  const measured = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const outside = [...page.querySelectorAll("body *")].filter(element =>
      !element.parentElement.closest(".scroll, svg, details:not([open])") &&
      element.getBoundingClientRect().right > root.clientWidth + 1);
    return {client: root.clientWidth, scroll: root.scrollWidth, outside: outside.map(e => e.outerHTML.slice(0, 80)),
            text: page.body.innerText, alerted: page.title};
  });
  document.getElementById("found").textContent = JSON.stringify(measured);
});
</script></body>"""


def browse(folder: Path, *options: str) -> str:
    """What headless Chromium prints about frames.html; skips where there is none, or it cannot start here."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed to look at the page with")
    command = [
        found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-dev-shm-usage", "--allow-file-access-from-files", "--force-color-profile=srgb",
        "--force-device-scale-factor=1", f"--user-data-dir={folder / 'profile'}", "--window-size=1660,1600", *options,
        (folder / "frames.html").as_uri(),
    ]  # fmt: skip
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        pytest.skip(f"Chromium does not run here: {error}")
    return run.stdout


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder, net, images = tmp_path_factory.mktemp("browser"), network(), pictures()
    analyzer = SensitivityAnalyzer(num_steps=2, pruning_type="unstructured")
    analyzer.analyze(net, [(images, torch.tensor([0, 1, 2, 3]))])
    title = "a very long name without any space in it, " + "x" * 200
    write_report(folder / "page.html", in_integers(net, images), net, data=[images], sensitivity=analyzer, title=title)
    (folder / "frames.html").write_text(FRAMES, encoding="utf-8")
    dom = Reader(browse(folder, "--dump-dom").replace("<!DOCTYPE html>", ""))
    return folder, json.loads(next(text for text in dom.texts if text.startswith("[{")))


def test_the_page_fits_narrow_and_wide_windows(looked_at: tuple[Path, list[dict[str, Any]]]) -> None:
    _, frames = looked_at
    assert [frame["client"] for frame in frames] == [380, 1280]
    for frame in frames:
        assert frame["scroll"] <= frame["client"]
        assert frame["outside"] == []
        assert HOSTILE in frame["text"] and "fold-quantization" in frame["text"]


def test_the_page_is_drawn_in_its_colours(looked_at: tuple[Path, list[dict[str, Any]]]) -> None:
    image = pytest.importorskip("matplotlib.image")
    folder, _ = looked_at
    browse(folder, f"--screenshot={folder / 'shot.png'}", "--blink-settings=preferredColorScheme=1")
    pixels = torch.tensor((image.imread(folder / "shot.png")[..., :3] * 255).round()).int()
    for left, right in ((0, 380), (380, 1660)):
        seen = pixels[:1600, left:right].reshape(-1, 3)
        for colour, least in (
            ((255, 255, 255), 0.3),
            ((36, 87, 214), 0.0005),
            ((245, 247, 250), 0.005),
            ((27, 34, 48), 0.0005),
        ):
            share = float((seen == torch.tensor(colour)).all(1).double().mean())
            assert share >= least, (left, colour, share)
