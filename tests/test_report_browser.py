"""The page in a browser: nothing fails, and what a reader does has the effect that it should have."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attackroute as ar
from attackroute.report.measuring import Measured, measure
from attackroute.report.page import Content, build_page
from attackroute.report.run_folder import RunFolder
from attackroute.selection import top_k

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = (Path(__file__).parent / "report_driver.js").read_text()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")

ROWS = 20
LIGHT, DARK = ("rgb(255, 255, 255)", 1), ("rgb(20, 23, 27)", 0)


@pytest.fixture(scope="module")
def measured() -> Measured:
    """A residual network, clean and attacked, of layers wider than a column shows."""
    torch.manual_seed(0)
    model = ar.build_model("resnet18", width=0.5, num_classes=4)
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6) % 4
    nothing = RunFolder(Path("run"), None, None, None, None, (), None, None, None, ())
    return measure(model, (images, labels), nothing, lambda _, x, y: (x * 0.2).flip(3))


@pytest.fixture(scope="module")
def page(measured: Measured) -> str:
    nothing = RunFolder(Path("run"), None, None, None, None, (), None, None, None, ())
    return build_page(Content(nothing, measured, ("a", "<b>", "c", "d"))).html


def use(page: str, folder: Path, width: int = 1100, scheme: int = 1) -> dict[str, Any]:
    """Open the page in a frame of this width with the driver beside its own script, and read what that tells."""
    digest = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    driven = page.replace("script-src ", f"script-src &#x27;sha256-{digest}&#x27; ", 1)
    driven = driven.replace("</body>", f"<script>{DRIVER}</script></body>")
    (folder / "page.html").write_text(driven)
    (folder / "frame.html").write_text(
        f"<iframe src=page.html width={width} height=1500></iframe><pre id=told></pre><script>"
        "addEventListener('message', (event) => { document.getElementById('told').textContent = event.data; })</script>"
    )
    assert BROWSER is not None
    result = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1300,1600",
            f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", (folder / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not re.findall(r".*CONSOLE.*", result.stderr)
    found = re.search(r'<pre id="told">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found is not None and found[1], result.stdout[:2000]
    told = json.loads(html.unescape(found[1]))
    assert isinstance(told, dict) and told["errors"] == [], told["errors"]
    return told


def kinds(measured: Measured, layer: str, width: float) -> dict[int, str]:
    """Channels of the model's routes at a width, by the routes that have them."""
    clean, attacked = (top_k(item.frequency()[layer], width) for item in (measured.clean, measured.attacked))
    return {
        channel: "shared" if clean[channel] and attacked[channel] else "clean" if clean[channel] else "attacked"
        for channel in (clean | attacked).nonzero().flatten().tolist()
    }


def by_layer(nodes: list[list[str]], layer: int) -> dict[int, str]:
    pairs = ([*key.split(":"), kind] for key, kind in nodes)
    return {int(channel): kind for place, channel, kind in pairs if int(place) == layer}


def test_a_reader_finds_what_the_numbers_say(page: str, measured: Measured, tmp_path: Path) -> None:
    told = use(page, tmp_path)
    layers = measured.clean.layers
    clean = measured.clean.frequency()
    # the slider: each column is the model's route at its width
    for step, width in (("first", 0.3), ("wider", 0.5), ("every", 0.25)):
        for index, layer in enumerate(layers):
            shown, expected = by_layer(told[step], index), kinds(measured, layer, width)
            assert shown.items() <= expected.items(), (step, layer, told["hash"])
            assert len(shown) == (min(ROWS, len(expected)) if step != "every" else min(200, len(expected))), layer
    assert "width=0.5" in told["hash"] and told["tabbable"] == 1
    either = sum(len(kinds(measured, layer, 0.3)) for layer in layers)
    both = sum(list(kinds(measured, layer, 0.3).values()).count("shared") for layer in layers)
    assert f"share {both} of {either} channels" in told["says"]
    # edges: neighbours in paths, the others as arcs
    assert told["skips"] == sum(layers.index(b) - layers.index(a) > 1 for a, b in measured.clean.methods) > 0
    assert 0 < told["edges"] < 600
    # one channel: pointer, click, and the influence of attacked images
    layer, channel = layers[2], int(told["key"].split(":")[1])
    matrices = {"clean": measured.clean_influence.matrices, "attacked": measured.attacked_influence.matrices}
    for step, kind in (("hovered", "clean"), ("clicked", "clean"), ("attacked", "attacked")):
        text = told[step]
        assert f"{layer}, channel {channel}" in text and f"{100 * clean[layer][channel]:.1f} %" in text
        into = {source: matrix[channel] for (source, target), matrix in matrices[kind].items() if target == layer}
        total = sum(float(row.sum()) for row in into.values())
        best, share = max(
            ((f"{source} {int(row.argmax())}", float(row.max()) / total) for source, row in into.items()),
            key=lambda item: item[1],
        )
        assert best in text and f"{100 * share:.1f} % of what arrives here" in text
    assert told["picked"] == 10 and told["left"].startswith("Point at a channel") and told["hovered"] == told["clicked"]
    assert told["pressed"] == [told["key"]] and f"channel={told['key'].replace(':', '%3A')}" in told["kept"]
    # the keyboard
    assert "channel" not in told["released"][0] and told["released"][1] == told["key"]
    assert told["down"].startswith("2:") and told["down"] != told["key"] and told["right"].startswith("3:")
    assert told["entered"][1] == told["right"] and told["right"].replace(":", "%3A") in told["entered"][0]
    # a sample
    assert told["sample"]["pressed"] == "true" and told["sample"]["title"].startswith("1: <b>") and told["without"] == 0
    for index, layer in enumerate(layers):
        own = {channel for channel in range(measured.clean.channels[layer]) if measured.clean.masks[layer][1, channel]}
        ringed = {int(key.split(":")[1]) for key in told["sample"]["ringed"] if key.startswith(f"{index}:")}
        assert ringed and ringed <= own
    own = sum(int(measured.clean.masks[layer][1].sum()) for layer in layers)
    on = sum(
        len(kinds(measured, x, 0.25).keys() & set(measured.clean.masks[x][1].nonzero().flatten().tolist()))
        for x in layers
    )
    assert f"this sample's {own} channels {on} are" in told["sample"]["says"]
    # the search box, and the data
    assert told["unfound"] == "No such channel."
    assert told["found"] == ["layer4.1.conv2 3", "layer4.1.conv2, channel 3"]
    assert told["json"] > 10_000
    assert told["background"] == LIGHT[0] and told["overflow"] <= 0


def test_a_dark_narrow_screen(page: str, tmp_path: Path) -> None:
    told = use(page, tmp_path, width=320, scheme=DARK[1])
    assert told["background"] == DARK[0]
    assert told["overflow"] <= 0 and told["wide"] == []


def test_a_page_without_influence_or_frequencies_works_too(measured: Measured, tmp_path: Path) -> None:
    nothing = RunFolder(Path("run"), None, None, None, None, (), None, None, None, ())
    clean = replace(measured, attacked=None, clean_influence=None, attacked_influence=None)
    route = ar.Route({"a": [1, 2], "b": [0]}, {"a": 4, "b": 4})
    for number, content in enumerate(
        [Content(nothing, clean), Content(replace(nothing, route=route), Measured(None, None))]
    ):
        (tmp_path / str(number)).mkdir()
        result = looked_at(build_page(content).html, tmp_path / str(number))
        assert 'class="node clean' in result and 'class="node attacked' not in result


def looked_at(page: str, folder: Path) -> str:
    """The page's elements after its script ran, with nothing on the console."""
    (folder / "page.html").write_text(page)
    assert BROWSER is not None
    result = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom",
            f"{(folder / 'page.html').as_uri()}#width=0.4&channel=0:1&sample=0",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not re.findall(r".*CONSOLE.*", result.stderr)
    return result.stdout
