"""The pages in a browser: nothing fails, nothing is loaded, and what a reader does has the effect that it should."""

from __future__ import annotations

import html
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

import attackroute as ar
from attackroute.report.measuring import Measured, measure, unmeasured
from attackroute.report.page import Content, build_page
from attackroute.report.run_folder import RunFolder
from attackroute.report.two_runs import RunComparison, build_comparison
from attackroute.routes.masks import top_k
from report_runs import CLASSES

playwright = pytest.importorskip("playwright.sync_api", reason='needs Playwright: pip install "attackroute[browser]"')
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
ROWS = 20
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
NOTHING = RunFolder(Path("run"))
NAMES = (CLASSES[0], "b", "c", "d")
RADII = ("2/255", "8/255")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield opened
        opened.close()


def darker(share: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    return lambda _, x, y: (x * share).flip(3)


def residual(seed: int, data: tuple[Tensor, Tensor]) -> Measured:
    """A residual network of layers wider than a column shows, as if attacked with two radii."""
    torch.manual_seed(seed)
    model = ar.build_model("resnet18", width=0.5, num_classes=4)
    attacks = {f"pgd:eps={eps}": darker(share) for eps, share in zip(RADII, (0.9, 0.2), strict=True)}
    return measure(model, data, unmeasured(None), attacks, shown=6)


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(6, 3, 32, 32), torch.arange(6) % 4


@pytest.fixture(scope="module")
def measured(images: tuple[Tensor, Tensor]) -> Measured:
    return residual(0, images)


@pytest.fixture(scope="module")
def page(measured: Measured) -> str:
    return build_page(Content(NOTHING, measured, NAMES)).html


@contextmanager
def reading(
    browser: Any, html: str, folder: Path, address: str = "", width: int = 1100, **options: Any
) -> Iterator[Any]:
    """The page before a reader, who finds no error, no dialog and no request but that for the page itself."""
    file = folder / "page.html"
    file.write_text(html)
    context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True, **options)
    view = context.new_page()
    faults: list[str] = []
    requests: list[str] = []
    view.on("console", lambda message: faults.append(message.text))
    view.on("pageerror", lambda error: faults.append(str(error)))
    view.on("dialog", lambda dialog: (faults.append("dialog"), dialog.dismiss()))
    view.on("request", lambda request: requests.append(request.url))
    try:
        view.goto(file.as_uri() + address)
        yield view
        assert faults == []
        sent = [url for url in requests if not url.startswith(("data:", "blob:"))]
        assert [url.partition("#")[0] for url in sent] == [file.as_uri()]
    finally:
        context.close()


def part(view: Any, name: str, number: int = 0) -> Any:
    return view.locator(f'.route-view[data-view="{number}"] [data-part="{name}"]')


def move(view: Any, name: str, value: str, number: int = 0) -> None:
    """Set a slider or a list, and wait for the drawing that follows some 16 ms later."""
    part(view, name, number).evaluate(
        "(control, value) => { control.value = value; control.dispatchEvent(new Event('input', { bubbles: true })); }",
        value,
    )
    view.evaluate("new Promise((done) => setTimeout(done, 40))")  # timers of one page keep their order


def overflowing(view: Any) -> list[str]:
    """What is wider than the screen and not in a box of its own to scroll."""
    found: list[str] = view.evaluate(
        "[...document.querySelectorAll('body *')]"
        ".filter((item) => !item.closest('.scroll, .table-box, pre'))"
        ".filter((item) => item.getBoundingClientRect().right > innerWidth + 1)"
        ".map((item) => item.outerHTML.slice(0, 80))"
    )
    return found


def drawn(view: Any, number: int = 0) -> dict[int, dict[int, str]]:
    """Channels by layer, with what the drawing makes of them."""
    found: dict[int, dict[int, str]] = {}
    for key, kind in view.evaluate(
        'number => [...document.querySelectorAll(`.route-view[data-view="${number}"] .node`)]'
        ".map((node) => [node.dataset.key, node.getAttribute('class').split(' ')[1]])",
        number,
    ):
        layer, channel = map(int, key.split(":"))
        found.setdefault(layer, {})[channel] = kind
    return found


def kinds(first: ar.InstanceRoutes, second: ar.InstanceRoutes, layer: str, width: float) -> dict[int, str]:
    """Channels of two routes at a width, by the routes that have them."""
    one, other = (top_k(item.frequency()[layer], width) for item in (first, second))
    return {
        channel: "both" if one[channel] and other[channel] else "first" if one[channel] else "second"
        for channel in (one | other).nonzero().flatten().tolist()
    }


def node(view: Any, key: str, number: int = 0) -> Any:
    return view.locator(f'.route-view[data-view="{number}"] .node[data-key="{key}"]')


def test_sliders_show_what_the_numbers_say(browser: Any, page: str, measured: Measured, tmp_path: Path) -> None:
    clean, layers = measured.clean.routes, measured.clean.routes.layers
    with reading(browser, page, tmp_path) as view:
        for at, width, rows in ((1, 0.3, ROWS), (1, 0.5, ROWS), (0, 0.5, ROWS), (0, 0.25, 200)):
            move(view, "pair-slider", str(at))
            move(view, "width", str(width))
            move(view, "rows", str(rows))
            shown = drawn(view)
            for index, layer in enumerate(layers):
                expected = kinds(clean, measured.attacked[at].routes, layer, width)
                assert shown[index].items() <= expected.items(), (layer, width)
                assert len(shown[index]) == min(rows, len(expected))
            assert part(view, "pair-value").inner_text() == RADII[at]
            every = [kinds(clean, measured.attacked[at].routes, layer, width) for layer in layers]
            both = sum(list(found.values()).count("both") for found in every)
            assert f"share {both} of {sum(map(len, every))} channels" in part(view, "says").inner_text()
            assert f"width={width}" in view.url and f"pair={at}" in view.url
        assert view.locator('.node[tabindex="0"]').count() == 1
        skips = sum(layers.index(target) - layers.index(source) > 1 for source, target in clean.methods)
        assert view.locator(".skip").count() == skips > 0
        assert 0 < view.locator(".edges path").count() < 600  # bundled, not one a pair
        lengths = "[...document.querySelectorAll('.edges path')].map((item) => item.getAttribute('d').length).join()"
        few = sum(map(int, view.evaluate(lengths).split(",")))
        move(view, "share", "1")
        assert sum(map(int, view.evaluate(lengths).split(","))) > 1.5 * few
        for by, values in (("gradient", measured.clean.gradient), ("sensitivity", measured.attacked[0].sensitivity)):
            move(view, "order", by)
            other = measured.attacked[0].gradient if by == "gradient" else values
            column = list(drawn(view)[2])
            known = [max(values[layers[2]][channel], other[layers[2]][channel]) for channel in column]
            # numbers in the page have four digits
            assert all(above >= 0.999 * below for above, below in pairwise(known))


def test_a_channel_tells_what_is_known_of_it(browser: Any, page: str, measured: Measured, tmp_path: Path) -> None:
    clean, attacked = measured.clean, measured.attacked[1]
    layers = clean.routes.layers
    with reading(browser, page, tmp_path) as view:
        panel = part(view, "channel")
        assert panel.inner_text().startswith("Point at a channel")
        channel = next(iter(drawn(view)[2]))
        key, layer = f"2:{channel}", layers[2]
        node(view, key).hover()
        text = panel.inner_text()
        assert f"{layer}, channel {channel}" in text
        for condition in (clean, attacked):
            assert f"{100 * condition.routes.frequency()[layer][channel]:.1f} %" in text
            rank = 1 + int((condition.gradient[layer] > condition.gradient[layer][channel]).sum())
            assert f"{float(f'{condition.gradient[layer][channel]:.3g}'):g}, rank {rank}" in text
        moved = attacked.sensitivity[layer]
        assert f"{float(f'{moved[channel]:.3g}'):g}, rank {1 + int((moved > moved[channel]).sum())}" in text
        assert view.locator(".picked-edges path").count() == 10
        view.mouse.move(5, 5)
        assert panel.inner_text().startswith("Point at a channel")
        node(view, key).click()
        view.mouse.move(5, 5)
        assert panel.inner_text() == text and f"channel=2%3A{channel}" in view.url
        for side, condition in (("first", clean), ("second", attacked)):
            move(view, "influence", side)
            matrices = condition.influence.matrices
            into = {source: matrix[channel] for (source, target), matrix in matrices.items() if target == layer}
            total = sum(float(row.sum()) for row in into.values())
            best, share = max(
                ((f"{source} {int(row.argmax())}", float(row.max()) / total) for source, row in into.items()),
                key=lambda item: item[1],
            )
            assert f"{best} {100 * share:.1f} %" in panel.inner_text()
        panel.locator("ol button").first.click()
        assert panel.locator("h3").inner_text() == best.replace(" ", ", channel ")


def test_the_keyboard_reaches_everything(browser: Any, page: str, tmp_path: Path) -> None:
    with reading(browser, page, tmp_path) as view:
        active = "document.activeElement.dataset.key || null"
        view.keyboard.press("Tab")
        assert view.evaluate("document.activeElement.tagName") == "A"
        channels = list(drawn(view)[2])
        node(view, f"2:{channels[0]}").focus()
        view.keyboard.press("ArrowDown")
        assert view.evaluate(active) == f"2:{channels[1]}"
        view.keyboard.press("ArrowRight")
        right = view.evaluate(active)
        assert right.startswith("3:")
        view.keyboard.press("Enter")
        assert right.replace(":", "%3A") in view.url and view.evaluate(active) == right
        assert node(view, right).get_attribute("aria-pressed") == "true"
        assert "channel" in part(view, "channel").inner_text()
        view.keyboard.press("Escape")
        assert "channel=" not in view.url and view.evaluate(active) == right
        view.keyboard.press("Tab")  # out of the drawing, which is one stop
        assert view.evaluate(active) is None


def test_a_sample_shows_its_own_route(browser: Any, page: str, measured: Measured, tmp_path: Path) -> None:
    clean = measured.clean.routes
    with reading(browser, page, tmp_path) as view:
        button = view.locator('[data-sample="4"]')
        assert button.locator("img").get_attribute("src").startswith("data:image/png;base64,")
        assert button.inner_text().strip().startswith(f"4: {NAMES[0]}")  # the hostile name, as text
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        ringed = view.evaluate("[...document.querySelectorAll('.node.on-sample')].map((item) => item.dataset.key)")
        for index, layer in enumerate(clean.layers):
            own = set(clean.masks[layer][4].nonzero().flatten().tolist())
            found = {int(key.split(":")[1]) for key in ringed if key.startswith(f"{index}:")}
            assert found and found <= own
        whole = sum(int(clean.masks[layer][4].sum()) for layer in clean.layers)
        on = sum(
            len(
                kinds(clean, measured.attacked[1].routes, x, 0.3).keys()
                & set(clean.masks[x][4].nonzero().flatten().tolist())
            )
            for x in clean.layers
        )
        assert f"this sample's {whole} channels {on} are" in part(view, "says").inner_text()
        assert view.locator(".own-edges path").count() > 0 and "sample=4" in view.url
        button.click()
        assert view.locator(".node.on-sample").count() == 0


def test_search_and_addresses(browser: Any, page: str, tmp_path: Path) -> None:
    with reading(browser, page, tmp_path, "#width=0.4&order=gradient&channel=3:7&sample=2&pair=0") as view:
        assert part(view, "width").input_value() == "0.4" and part(view, "order").input_value() == "gradient"
        assert "channel 7" in part(view, "channel").inner_text() and part(view, "pair-value").inner_text() == RADII[0]
        assert view.locator('[data-sample="2"]').get_attribute("aria-pressed") == "true"
        for text, told in (
            ("conv1 999999", "No such channel."),
            ("nothing", "Write a layer and a channel, as in conv1 12."),
            ("layer4.1.conv2 3", "layer4.1.conv2 3"),
        ):
            part(view, "search").fill(text)
            assert part(view, "found").inner_text() == told
        assert part(view, "channel").locator("h3").inner_text() == "layer4.1.conv2, channel 3"
        view.goto(view.url.partition("#")[0] + "#summary")
        assert part(view, "width").input_value() == "0.4"
    with reading(browser, page, tmp_path, "#width=7&pair=99&channel=3:99999&sample=-1&order=no&influence=x") as view:
        assert part(view, "width").input_value() == "0.3" and part(view, "pair-value").inner_text() == RADII[1]


def test_data_and_drawing_can_be_saved(browser: Any, page: str, tmp_path: Path) -> None:
    with reading(browser, page, tmp_path) as view:
        saved = {}
        for name, button in (
            ("json", view.locator("#save-json")),
            ("svg", part(view, "files").locator("button").nth(0)),
            ("png", part(view, "files").locator("button").nth(1)),
        ):
            with view.expect_download() as waiting:
                button.click()
            assert waiting.value.suggested_filename.endswith(f".{name}")
            saved[name] = Path(waiting.value.path()).read_bytes()
        held = json.loads(view.locator("#data").text_content())
        assert json.loads(saved["json"]) == held and held["route_data"][0]["classes"] == list(NAMES)
        assert saved["png"].startswith(b"\x89PNG") and len(saved["png"]) > 10_000
        assert saved["svg"].startswith(b"<svg") and b"rgb(0, 114, 178)" in saved["svg"]
        for text in (part(view, "says").text_content(), "clean and attacked images"):  # legend and attack go with it
            assert text in html.unescape(saved["svg"].decode())
        view.locator("#json-details summary").click()
        playwright.expect(view.locator("#json")).to_contain_text("route_data")


def test_light_dark_narrow_and_on_paper(browser: Any, page: str, tmp_path: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    for scheme, colour in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")):
        for width in (1100, 320):
            with reading(browser, page, tmp_path, "#channel=2:1&sample=1", width, color_scheme=scheme) as view:
                assert view.evaluate(background) == colour
                assert overflowing(view) == []
    with reading(browser, page, tmp_path, color_scheme="dark") as view:
        view.emulate_media(media="print")
        assert view.evaluate(background) == "rgb(255, 255, 255)"
        for hidden in ("controls", "panel", "samples-part", "files"):
            assert not part(view, hidden).is_visible()
        assert view.pdf(format="A4").startswith(b"%PDF")
        view.evaluate("dispatchEvent(new Event('beforeprint'))")
        strips = part(view, "paper").locator("svg")  # 20 layers, eight side by side
        assert strips.count() == 3 and strips.first.is_visible() and not part(view, "scroll").is_visible()


def test_a_run_with_nothing_but_a_trace(browser: Any, measured: Measured, tmp_path: Path) -> None:
    route = ar.Route({"a": [1, 2], "b": [0]}, {"a": 4, "b": 4})
    for known in (unmeasured(measured.clean.routes), unmeasured(None, route=route)):
        with reading(browser, build_page(Content(NOTHING, known)).html, tmp_path, "#width=0.4&channel=0:1") as view:
            assert view.locator(".node.first").count() > 0 and view.locator(".node.second, .node.both").count() == 0
            assert "influence was not measured" in part(view, "channel").inner_text()
            assert not part(view, "pair").is_visible() and not part(view, "influence-label").is_visible()
    with reading(browser, build_page(Content(NOTHING, unmeasured(None))).html, tmp_path) as view:
        assert "no route to draw" in view.locator("#route").inner_text()


def test_a_comparison_moves_together(
    browser: Any, measured: Measured, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    other = residual(1, images)
    contents = Content(NOTHING, measured, NAMES), Content(NOTHING, other, NAMES)
    html = build_comparison(RunComparison(contents, ("before", "<i>after</i>"))).html
    layers = measured.clean.routes.layers
    with reading(browser, html, tmp_path) as view:
        move(view, "width", "0.2")
        for at, (ours, theirs) in enumerate(zip(measured.conditions, other.conditions, strict=True)):
            move(view, "pair-list", str(at))
            shown = drawn(view)
            for index, layer in enumerate(layers):
                assert shown[index].items() <= kinds(ours.routes, theirs.routes, layer, 0.2).items()
        for number, side in ((1, measured), (2, other)):
            shown = drawn(view, number)
            for index, layer in enumerate(layers):
                expected = kinds(side.clean.routes, side.attacked[1].routes, layer, 0.2)
                assert shown[index].items() <= expected.items() and len(shown[index]) == min(ROWS, len(expected))
            assert not part(view, "width", number).is_visible() and part(view, "pair-slider", number).is_visible()
        channel = next(iter(drawn(view, 1)[2]))
        node(view, f"2:{channel}", 1).click()
        for number in range(3):
            assert f"{layers[2]}, channel {channel}" in part(view, "channel", number).inner_text()
            assert node(view, f"2:{channel}", number).get_attribute("aria-pressed") == "true"
        assert view.locator("#differences table").count() > 0 and view.locator("i").count() == 0
        view.set_viewport_size({"width": 320, "height": 700})
        assert overflowing(view) == []


@pytest.mark.slow
def test_resnet_50_is_ready_at_once(browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how long the page takes; ``pytest -m slow -s -k resnet_50 tests/test_report_browser.py``."""
    torch.manual_seed(0)
    model = resnet50(num_classes=10)
    images = torch.rand(64, 3, 64, 64), torch.arange(64) % 10
    traces = [ar.trace_routes(model, images)] * 16
    known = unmeasured(ar.InstanceRoutes.concatenate(traces[:15]))
    found = measure(model, images, known, {"pgd:eps=8/255": darker(0.3)}, rows=range(64), shown=64)
    html = build_page(Content(NOTHING, found)).html
    assert len(html.encode()) <= 10_000_000
    started = time.perf_counter()
    with reading(browser, html, tmp_path) as view:
        loaded = time.perf_counter() - started
        assert view.locator(".skip").count() > 0 and view.locator("svg.drawing *").count() < 12_000
        started = time.perf_counter()
        move(view, "width", "0.5")
        moved = time.perf_counter() - started - 0.04
        node(view, next(f"52:{channel}" for channel in drawn(view)[52])).hover()
        assert "channel" in part(view, "channel").inner_text()
    with capsys.disabled():
        print(f"\nResNet-50: {len(html) / 1e6:.1f} MB, ready in {loaded:.2f} s, redrawn in {moved:.2f} s")
