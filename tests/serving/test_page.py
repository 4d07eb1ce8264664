"""The page at `/` in Chromium: what it shows, by keyboard, on a phone, in the dark, and what it must never do.

Tests that need a browser are skipped where Playwright or Chromium is missing. `make pictures` makes those of the docs.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest

import promptembedder
from conftest import INSTRUCTION, SECOND, TEXTS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PICTURES = os.environ.get("PROMPTEMBEDDER_PICTURES")
MOST_PICTURE_BYTES = 200_000
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
WIDE = {"width": 1160, "height": 900}
NASTY = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(2)</script>",
    "</textarea><b>&amp;",
    "x" * 200,
    "שלום עולם",
    "a",
]

pytestmark = pytest.mark.browser


def address_of(texts, a=INSTRUCTION, b=SECOND, **more):
    return "#" + urlencode({"texts": "\n".join(texts), "a": a, "b": b, **more})


@contextmanager
def running(service):
    """Address of a server in a thread of this process."""
    import uvicorn

    from promptembedder.serving.app import create_app, gated

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = gated(create_app(service), service)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served_page(served_models):
    """`served_page(api_key=...)`: address of a server of two tiny models."""
    from contextlib import ExitStack

    from promptembedder.serving.service import Service
    from promptembedder.serving.settings import ServeSettings

    with ExitStack() as stack:
        known = {}

        def start(**settings):
            key = tuple(settings.items())
            if key not in known:
                models = [served_models["plain"], served_models["deep"]]
                known[key] = stack.enter_context(running(Service(models, ServeSettings(**settings))))
            return known[key]

        yield start


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, served_page):
    """`visit(fragment, **of the window)`: an open page. No test may ask another host or find an error."""
    pages = []

    def opened(fragment="", *, at=None, wait=True, settings=None, **window):
        base = at or served_page(**(settings or {}))
        page = chromium.new_context(**{"viewport": DESKTOP, **window}).new_page()
        page.set_default_timeout(30_000)
        page.base, page.asked, page.problems = base, [], []
        page.on("request", lambda request: page.asked.append(request))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("dialog", lambda dialog: (page.problems.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda line: page.problems.append(line.text) if "Content Security" in line.text else None)
        pages.append(page)
        page.goto(base + fragment)
        if wait:
            finished(page)
        return page

    yield opened
    for page in pages:
        page.context.close()
        assert not page.problems
        assert [request.url for request in page.asked if not request.url.startswith((page.base, "data:"))] == []


def finished(page):
    page.wait_for_selector("#results:not([hidden])[aria-busy=false]")
    page.wait_for_selector("#words-b .word")


def until(page, selector, text):
    from playwright.sync_api import expect

    expect(page.locator(selector).first).to_have_text(text, timeout=30_000)


def cells(page, name):
    """Numbers of a table, in the order of the texts; 1 on the diagonal."""
    rows = page.eval_on_selector_all(
        f"#table-{name} tbody tr",
        "rows => rows.map(row => [row.querySelector('button').getAttribute('aria-label'),"
        " ...[...row.querySelectorAll('td')].map(cell => parseFloat(cell.textContent) || 1)])",
    )
    order = [int(row[0].split(":")[0]) - 1 for row in rows]
    found = np.empty((len(rows), len(rows)))
    found[np.ix_(order, order)] = np.array([row[1:] for row in rows])
    return found


def near(page, side):
    return page.locator(".near-list").nth(side).locator(".words").all_inner_texts()


def test_shows_what_the_library_computes(visit, served_models):
    page = visit(address_of(TEXTS, text=2))
    model = served_models["plain"].model
    for side, (name, instruction) in enumerate(zip("ab", (INSTRUCTION, SECOND), strict=True)):
        embeddings = model.encode(TEXTS, prompt=instruction)
        cosines = embeddings @ embeddings.T
        np.testing.assert_allclose(cells(page, name), cosines, atol=0.006)
        ranked = [n for n in np.argsort(-cosines[1]) if n != 1]
        assert near(page, side) == [TEXTS[n] for n in ranked]
        assert page.locator(f"#map-{name} [role=option]").count() == len(TEXTS)
        readings = promptembedder.explain(model, instruction)
        shown = page.locator(f"#words-{name} li").count()
        assert shown == len(readings)
        first = page.locator(f"#words-{name} li").first.locator(".word bdi").all_inner_texts()
        assert first == [text.replace("\n", "↵").replace("\t", "⇥").strip() or "␣" for text, _ in readings[0].words]
    asked = [request.post_data_json for request in page.asked if request.url.endswith("/v1/embeddings")]
    assert [one["instruction"] for one in asked] == [[INSTRUCTION, SECOND]]


def test_headline_counts_the_texts_whose_nearest_one_changes(visit, served_models):
    page = visit(address_of(TEXTS))
    nearest = []
    for instruction in (INSTRUCTION, SECOND):
        embeddings = served_models["plain"].model.encode(TEXTS, prompt=instruction)
        nearest.append((embeddings @ embeddings.T - 9 * np.eye(len(TEXTS))).argmax(1))
    changed = int((nearest[0] != nearest[1]).sum())
    expected = f"{changed} of 5 texts" if changed else "Every text has the same nearest text"
    assert page.inner_text("#headline").startswith(expected)
    same = visit(address_of(TEXTS, INSTRUCTION, INSTRUCTION))
    assert same.inner_text("#headline").startswith("Every text has the same nearest text")
    assert same.locator(".differs").count() == 0


def test_geometry(visit):
    """Cosines, components, groups and rotations beside numpy and scikit-learn."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    page = visit()
    drawn = np.random.default_rng(0)
    centres = drawn.normal(size=(3, 8)) * 3
    vectors = np.concatenate([centre + drawn.normal(size=(5, 8)) for centre in centres])
    found = page.evaluate(
        """async (vectors) => {
            const g = await import("/static/geometry.js");
            const cosine = g.cosines(vectors);
            const turned = g.principal(vectors).places.map(([x, y]) => [y, -x]);
            return {cosine, map: g.principal(vectors), groups: g.groups(cosine), near: g.neighbours(cosine, 3),
                    aligned: g.aligned(turned, g.principal(vectors).places),
                    hull: g.hull(vectors.map((v) => v.slice(0, 2)))};
        }""",
        vectors.tolist(),
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found["cosine"], unit @ unit.T, atol=1e-9)
    assert found["near"] == [n for n in np.argsort(-(unit @ unit[3]), kind="stable") if n != 3]
    left, values, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    places = np.array(found["map"]["places"])
    np.testing.assert_allclose(np.abs(places), np.abs(left[:, :2] * values[:2]), atol=1e-6)
    assert found["map"]["share"] == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())
    np.testing.assert_allclose(found["aligned"], places, atol=1e-6)
    distances = np.clip(1 - unit @ unit.T, 0, None)
    np.fill_diagonal(distances, 0)
    labels = {
        k: AgglomerativeClustering(k, metric="precomputed", linkage="average").fit_predict(distances)
        for k in range(2, 7)
    }
    best = max(labels, key=lambda k: silhouette_score(distances, labels[k], metric="precomputed"))
    same = np.equal.outer(found["groups"]["label"], found["groups"]["label"])
    assert np.array_equal(same, np.equal.outer(labels[best], labels[best]))
    from scipy.spatial import ConvexHull

    corners = vectors[ConvexHull(vectors[:, :2]).vertices, :2]
    assert sorted(map(tuple, np.round(found["hull"], 9))) == sorted(map(tuple, np.round(corners, 9)))


def test_by_keyboard_alone(visit):
    page = visit(address_of(TEXTS, text=1))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.textContent"
        )
        if page.evaluate("document.activeElement === document.body") or name in seen:
            break
        seen.append(name)
        visible = """() => {
            const one = document.activeElement, style = getComputedStyle(one), box = one.getBoundingClientRect();
            const ring = one.querySelector(".ring");
            const marked = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2
                || ring && parseFloat(getComputedStyle(ring).strokeWidth) >= 4;
            return marked && box.bottom > 0 && box.top < innerHeight && box.width > 0;
        }"""
        assert page.evaluate(visible), name
    for wanted in ("texts", "a", "b", "model", "compare", "copy", "map-a-0", "map-b-0", "next", "near-a-0", "row-b-0"):
        assert wanted in seen
    assert len(seen) < 25  # maps, lists and tables are one stop each
    page.focus("#map-a-0")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "map-a-1"
    assert page.inner_text("#selected bdi") == TEXTS[1]
    assert "Text 2 is selected" in page.inner_text("#status")
    page.focus("#row-b-1")
    page.keyboard.press("End")
    assert page.locator("[aria-selected=true], [aria-pressed=true]").count() == 4
    page.focus("#near-b-0")
    page.keyboard.press("ArrowDown")
    wanted = page.inner_text("#near-b-1 .words")
    page.keyboard.press("Enter")
    assert page.inner_text("#selected bdi") == wanted
    assert page.evaluate("document.activeElement.id") == "near-b-0"
    page.focus("#b")
    page.keyboard.press("Control+A")
    page.keyboard.type("Identify the topic.")
    assert "stale" in page.get_attribute("#compare", "class")
    page.keyboard.press("Enter")
    until(page, "#map-b bdi", "Identify the topic.")
    finished(page)
    assert page.inner_text("#status").startswith("Done.")


@pytest.mark.parametrize("texts", [TEXTS, NASTY, [f"{text} {n}" for n in range(10) for text in TEXTS]])
def test_fits_a_phone(visit, texts):
    page = visit(address_of(texts), viewport=PHONE, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    small = "all => all.filter(one => { const {width, height} = one.getBoundingClientRect();"
    small += " return width && (width < 24 || height < 24) }).map(one => one.outerHTML)"
    assert page.eval_on_selector_all("button, select, input, textarea", small) == []
    page.tap(f"#map-b-{len(texts) - 1}")
    assert page.inner_text("#selected bdi") == texts[-1]


@pytest.mark.parametrize("window", [DESKTOP, PHONE])
def test_marks_and_labels_do_not_overlap(visit, window):
    texts = [f"{text} {n}" for n in range(4) for text in TEXTS] + [TEXTS[0]] * 2
    page = visit(address_of(texts), viewport=window)
    for name in "ab":
        boxes = page.eval_on_selector_all(
            f"#map-{name} .mark, #map-{name} .label",
            "all => all.map(one => { const {x, y, width, height} = one.getBBox();"
            " return [{x, y, width, height}, one.classList.contains('label')] })",
        )
        assert sum(label for _, label in boxes) >= 3
        for n, (one, is_label) in enumerate(boxes):
            for other, other_is_label in boxes[:n]:
                if is_label or other_is_label:
                    across = min(one["x"] + one["width"], other["x"] + other["width"]) - max(one["x"], other["x"])
                    down = min(one["y"] + one["height"], other["y"] + other["height"]) - max(one["y"], other["y"])
                    # A mark's box has corners that the mark does not fill.
                    assert min(across, down) <= (1.5 if is_label and other_is_label else 3)
                else:
                    centres = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in (one, other)]
                    assert math.dist(*centres) >= 22


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_and_names_are_accessible(visit, scheme):
    """axe finds nothing, contrast of texts included; in the dark the ground is dark."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    page = visit(address_of(TEXTS), color_scheme=scheme)
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found["violations"]] == []
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert (red + green + blue < 200) == (scheme == "dark")


def test_an_address_shows_the_same(visit):
    page = visit(address_of(TEXTS, text=3, model="deep"))
    assert page.input_value("#model") == "deep"
    assert page.inner_text("#selected bdi") == TEXTS[2]
    page.click("#next")
    page.click("#copy")
    copied = page.url
    again = visit(copied.removeprefix(page.base))
    assert again.inner_text("#selected bdi") == TEXTS[3]
    assert again.input_value("#model") == "deep"
    assert np.array_equal(cells(again, "b"), cells(page, "b"))
    # Nothing of a text is in an address that a server gets.
    assert not [request.url for request in page.asked + again.asked if "guitar" in request.url.split("#")[0]]
    page.fill("#a", "Identify the topic.")
    page.click("#compare")
    until(page, "#map-a bdi", "Identify the topic.")
    page.go_back()
    until(page, "#map-a bdi", INSTRUCTION)
    assert page.input_value("#a") == INSTRUCTION


def test_texts_are_no_html(visit):
    page = visit(address_of(NASTY, a="<i>A</i><img src=y onerror=alert(3)>"))
    assert page.locator("main img, #results script, #results b, #results i").count() == 0
    assert NASTY[0] in page.inner_text("#near") + page.inner_text("#selected")
    assert page.inner_text("#map-a bdi") == "<i>A</i><img src=y onerror=alert(3)>"


def test_mistakes_are_said_in_words(visit):
    page = visit(address_of(["Rain.", "Sun."]), wait=False)
    assert page.inner_text("#error") == "Enter at least 3 texts, one a line."
    assert page.evaluate("document.activeElement.id") == "texts"
    assert page.get_attribute("#texts", "aria-invalid") == "true"
    page.fill("#texts", "\n".join(TEXTS * 11))
    page.click("#compare")
    assert page.inner_text("#error") == "This page compares up to 50 texts; there are 55."
    page.fill("#texts", "\n".join(TEXTS))
    page.fill("#b", " ")
    page.click("#compare")
    assert page.inner_text("#error") == "Enter instruction B."
    page.fill("#b", SECOND)
    page.click("#compare")
    finished(page)
    assert page.is_hidden("#error")
    assert page.get_attribute("#texts", "aria-invalid") is None


def test_errors_of_the_api_are_shown(visit):
    page = visit(address_of([*TEXTS[:3], "rain " * 60]), settings={"request_tokens": 50}, wait=False)
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == "A request may have 50 tokens, text 3 is beyond that; send less."
    page.route("**/v1/embeddings", lambda route: route.abort())
    page.click("#compare")
    until(page, "#error", re.compile("cannot be reached"))
    page.unroute("**/v1/embeddings")
    busy = {"status": 429, "headers": {"Retry-After": "7"}, "json": {"error": {"message": "the queue is full"}}}
    page.route("**/v1/embeddings", lambda route: route.fulfill(**busy))
    page.click("#compare")
    until(page, "#error", re.compile("Try again in 7 seconds"))
    page.unroute("**/v1/embeddings")
    page.route("**/v1/embeddings", lambda route: route.fulfill(status=502, body="<html>Bad gateway</html>"))
    page.click("#compare")
    until(page, "#error", "The server answered with status 502.")
    page.unroute("**/v1/embeddings")
    page.route("**/v1/explain", lambda route: route.fulfill(status=400, json={"error": {"message": "not explained"}}))
    page.fill("#texts", "Rain.\nRivers.\nRates.")
    page.click("#compare")
    until(page, "#words-a", "Not explained.")
    assert page.locator("#map-a [role=option]").count() == 3


def test_asks_for_a_key_where_the_server_does(visit):
    page = visit(address_of(TEXTS), settings={"api_key": "secret"}, wait=False)
    page.wait_for_selector("#key-field:not([hidden])")
    assert page.inner_text("#error") == "This server needs an API key."
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    until(page, "#error", "The server does not know this API key.")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    finished(page)
    assert page.is_hidden("#error")
    page.click("#copy")
    assert "secret" not in page.url
    page.reload()
    finished(page)


def test_a_newer_comparison_replaces_one_that_is_under_way(visit):
    page = visit(address_of(TEXTS))
    held = []
    page.route("**/v1/embeddings", lambda route: held.append(route) if not held else route.continue_())
    failed = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.fill("#a", "Identify the topic.")
    page.click("#compare")
    page.wait_for_selector("#results[aria-busy=true]")
    assert page.inner_text("#status") == "Reading 5 texts under 2 instructions…"
    page.fill("#a", "Identify the feeling.")
    page.click("#compare")
    until(page, "#map-a bdi", "Identify the feeling.")
    finished(page)
    assert failed == [page.base + "v1/embeddings"]
    assert page.is_hidden("#error")


@pytest.mark.real
@pytest.mark.slow
def test_pictures_of_the_docs(visit, tmp_path):
    """The first visit, with the shipped model: both instructions group the texts as they say."""
    from promptembedder.serving.models import open_models
    from promptembedder.serving.service import Service
    from promptembedder.serving.settings import ServeSettings

    folder = Path(PICTURES or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    with running(Service(open_models(["smollm2-135m"], {}, device="cpu", dtype="float32"), ServeSettings())) as base:
        for name, window in {
            "desktop": {"viewport": WIDE},
            "phone": {"viewport": PHONE, "is_mobile": True, "has_touch": True},
            "dark": {"viewport": WIDE, "color_scheme": "dark"},
        }.items():
            page = visit(at=base, **window)
            assert int(page.inner_text("#headline").split(" of 12 texts")[0]) >= 8
            groups = page.eval_on_selector_all(".groups", "all => all.map(one => one.textContent)")
            assert len(groups) == 2
            save(page, folder / f"serve-{name}.png", phone=name == "phone")
            page.context.close()


def save(page, path, *, phone):
    """A picture of few colours, small enough for a repository."""
    from PIL import Image

    clip = None
    if phone:
        top = page.evaluate("document.querySelector('.summary').getBoundingClientRect().top + scrollY - 16")
        clip = {"x": 0, "y": top, "width": PHONE["width"], "height": 1180}
    page.screenshot(path=path, full_page=True, clip=clip)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(200, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    assert path.stat().st_size < MOST_PICTURE_BYTES
