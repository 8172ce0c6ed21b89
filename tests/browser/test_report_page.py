"""The report in a real browser: legible in light and dark, wide and narrow, and inert."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route

from core.store import ArtifactStore
from service.api.files import HTML_HEADERS
from tests.integration.hf_models import save_image_model, save_text_model
from tests.integration.workshop import Workshop

ADDRESS = "http://report.test/"
SCRIPT = "<script>document.title='gotcha'</script><img src=http://evil.test/x onerror=alert(1)>"

# WCAG's contrast of a text with the nearest background that is painted behind it.
CONTRASTS = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const painted = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const seen = {};
  for (const e of document.querySelectorAll('h1, h2, p, li span, td, th, summary, dt, dd, .name')) {
    if (!e.textContent.trim() || e.matches('.zero') || !e.checkVisibility()) continue;
    const pair = [getComputedStyle(e).color, painted(e)];
    const [a, b] = [luminance(numbers(pair[0])), luminance(pair[1])].sort((x, y) => y - x);
    seen[pair.join(' on ')] = (a + .05) / (b + .05);
  }
  return seen;
}"""


@pytest.fixture(scope="module")
def text_page(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("text")
    model = save_text_model("bert", folder / "tiny")
    workshop = Workshop(ArtifactStore(str(folder / "store")), str(model))
    numbers = np.random.default_rng(0)
    words = ["where", "card", "lost", "money", "transfer", "failed", "help", "pin"]
    rows = [
        (
            f"{' '.join(numbers.choice(words, 4))} {n}",
            ["card", "money", "a label & <b>more</b>"][n % 3],
        )
        for n in range(90)
    ]
    rows[4] = (f"{SCRIPT} {'long' * 60}", "card")
    workshop.upload_texts("file-train", rows)
    manifest, _ = workshop.run("ftjob-page", training_file="file-train", suffix="page")
    return workshop.file(manifest, "report.html")


@pytest.fixture(scope="module")
def image_page(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("image")
    model = save_image_model("resnet", folder / "tiny")
    workshop = Workshop(ArtifactStore(str(folder / "store")), str(model))
    numbers, archive = np.random.default_rng(0), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as entries:
        for n in range(24):
            data = io.BytesIO()
            Image.fromarray(numbers.integers(0, 255, (48, 64, 3), np.uint8)).save(data, "PNG")
            entries.writestr(f"{'noise' if n % 2 else 'static'}/{n}.png", data.getvalue())
            if n == 5:
                entries.writestr("static/copy.png", data.getvalue())
    workshop.upload("file-train", "images.zip", archive.getvalue())
    manifest, _ = workshop.run("ftjob-page", training_file="file-train", suffix="page")
    return workshop.file(manifest, "report.html")


@contextmanager
def opened(browser: Browser, content: bytes, scheme: str, width: int) -> Iterator[Page]:
    """Open a page as the service would serve it; fail on whatever it asks for or complains of."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    asked: list[str] = []
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))

    def answer(route: Route) -> None:
        if route.request.url.startswith("data:"):
            return route.continue_()
        asked.append(route.request.url)
        return route.fulfill(body=content, content_type="text/html", headers=HTML_HEADERS)

    page.route("**/*", answer)
    try:
        page.goto(ADDRESS)
        yield page
        assert asked == [ADDRESS]
        assert said == []
    finally:
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_is_legible(browser: Browser, text_page: bytes, scheme: str, width: int) -> None:
    with opened(browser, text_page, scheme, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(17, 21, 27)") == (scheme == "dark")
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) >= 4
        assert {pair: ratio for pair, ratio in contrasts.items() if ratio < 4.5} == {}
        for plot in page.query_selector_all("svg.plot"):
            box = plot.bounding_box()
            assert box is not None
            assert box["width"] > 200
            assert box["height"] > 150
        for heading in ("Against baselines", "Would more data help?", "By class", "The data"):
            assert page.get_by_role("heading", name=heading).is_visible()


def test_what_the_data_says_is_text(browser: Browser, text_page: bytes) -> None:
    with opened(browser, text_page, "light", 1200) as page:
        assert page.title() == "page: evaluation report"
        assert page.locator("script").count() == 0
        assert page.locator("img").count() == 0
        assert page.get_by_text("a label & <b>more</b>", exact=True).first.is_visible()


def test_details_open_without_a_script(browser: Browser, text_page: bytes) -> None:
    with opened(browser, text_page, "light", 1200) as page:
        counts = page.locator("details", has=page.get_by_text("Rows by class"))
        assert not counts.locator("table").is_visible()
        counts.locator("summary").click()
        assert counts.locator("table").is_visible()


def test_wrong_answers_are_shown_as_pictures(browser: Browser, image_page: bytes) -> None:
    with opened(browser, image_page, "dark", 1200) as page:
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(widths) > 3
        pair = page.locator("details", has=page.get_by_text("Exact duplicates")).locator("img")
        assert len(set(pair.evaluate_all("images => images.map(image => image.src)"))) == 1
        assert pair.count() == 2
        assert all(0 < width <= 112 for width in widths)
