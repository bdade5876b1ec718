"""The real page in a real browser: Chromium, driven by Playwright, against a server of its own."""

import io
import re
import shutil
import time

import numpy as np
import pytest
from demo_server import demo_server
from PIL import Image

from htfa_jax.checkpoints.runs import DEMO

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
EXAMPLE = DEMO / "examples"
SECONDS = 20

pytest.importorskip("gradio", reason="the page's tests need the extra `test`")
pytest.importorskip("axe_playwright_python", reason="the page's tests need the extra `test`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"
    ),
    # One server and one browser for all of them.
    pytest.mark.xdist_group("page"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(URL, folder that its temporary files are in)."""
    temporary = tmp_path_factory.mktemp("temporary")
    with demo_server({"batch": 1, "upload_mb": 2}, TMPDIR=str(temporary)) as url:
        (private,) = temporary.iterdir()
        assert private.stat().st_mode & 0o777 == 0o700
        yield url, private
    assert not private.exists()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page. Afterwards its console holds no error, and nothing came from elsewhere."""
    url, noise, contexts = server[0], [], []

    def opened(width=1366, height=900, scheme="light"):
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("console", lambda m: noise.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: noise.append(str(error)))
        ours = (url, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(ours) else noise.append(r.url))
        page.goto(url)
        page.locator("#run").wait_for()
        page.get_by_text("Loading...").first.wait_for(state="detached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert noise == []


def violations(page):
    """What axe finds, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {n['html'][:150]}" for v in found for n in v["nodes"]]


def run_example(page, example="camera"):
    page.get_by_role("button", name=example, exact=True).click()
    page.locator(".compare").wait_for()
    page.locator("#attention figure").wait_for()


def send(page, field, name, content):
    """Chooses a file for an image, in place of the one that may be there."""
    kind = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator(f"#{field} input[type=file]").set_input_files(kind)


def told(page):
    """The newest message, which then is closed."""
    message = page.get_by_test_id("toast-body").last
    message.wait_for()
    text = message.inner_text()
    page.get_by_test_id("toast-close").last.click()
    message.wait_for(state="detached")
    return text


def png(size, color):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "png")
    return buffer.getvalue()


def downloaded(page, name):
    with page.expect_download() as download:
        page.get_by_role("button", name=name).click()
    return download.value.path()


@pytest.mark.parametrize(
    "width, height, scheme", [(1366, 900, "light"), (390, 844, "dark")], ids=["desk", "phone"]
)
def test_an_example_from_run_to_answer(open_page, width, height, scheme):
    page = open_page(width, height, scheme)
    assert violations(page) == []
    run_example(page)
    page.get_by_role("button", name="What's the object").click()
    page.locator("#chat .confidence").wait_for()
    talk = page.locator("#chat").inner_text()
    assert re.search(r"in the hand\?\s+camera\s+confidence (0\.\d\d|1\.00)", talk)
    assert "aligned by boxes" in page.locator("#facts").inner_text()
    for name in ("Where the object is", "Completion parameters", "Decoding parameters"):
        page.get_by_role("button", name=name).click()
    page.locator("#drawing canvas").first.wait_for()
    assert violations(page) == []
    page.get_by_role("tab", name="Maps").click()
    page.locator("#inside figure").nth(2).wait_for()
    assert violations(page) == []
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", color)[:3]))
    assert brightness < 150 if scheme == "dark" else brightness > 600


def test_own_images_a_talk_and_what_can_be_taken_along(open_page, server):
    page = open_page()
    send(page, "orig", "mine.png", png((90, 60), "orange"))
    page.locator("#orig img").wait_for()
    page.locator("#run").click()
    page.locator(".compare").wait_for()
    assert "reconstruction: own completion" in page.locator("#facts").inner_text()
    with Image.open(downloaded(page, "Download image")) as completed:
        assert completed.size == (90, 60)
    page.locator("#question textarea, #question input").fill("What <b>is</b> it?")
    page.locator("#ask").click()
    page.locator("#chat .confidence").wait_for()
    # Words are words.
    assert "What <b>is</b> it?" in page.locator("#chat").inner_text()
    page.get_by_role("button", name="How much").click()
    page.locator("#chat .confidence").nth(1).wait_for()
    report = downloaded(page, "Download report").read_text()
    assert "What &lt;b&gt;is" in report and "How much" in report and "<h2>mine</h2>" in report
    assert report.count("data:image/webp") >= 5 and "http://" not in report
    # With its visitor goes what was sent and what was made.
    kept = {path.name for path in server[1].rglob("*.png")}
    assert {"mine.png", "completed.png"} <= kept
    page.close()
    for _ in range(100):
        names = [path.name for path in server[1].rglob("*")]
        if "mine.png" not in names and not any(name.startswith("session_") for name in names):
            return
        time.sleep(0.1)
    raise AssertionError(names)


def test_a_click_and_the_sliders_choose_who_attends(open_page):
    page = open_page()
    run_example(page)
    figure = page.locator("#attention img")
    seen = [figure.get_attribute("src")]

    def changed():
        page.wait_for_function(
            "old => !old.includes(document.querySelector('#attention img')?.src ?? old[0])",
            arg=seen,
        )
        seen.append(figure.get_attribute("src"))

    place = page.locator("#place-image img")
    box = place.bounding_box()
    place.click(position={"x": box["width"] / 2, "y": 0.8 * box["height"]})
    changed()
    across, down = page.locator("#place input[type=range]").all()
    assert abs(int(across.input_value()) - 50) <= 2 and abs(int(down.input_value()) - 80) <= 2
    across.focus()
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    changed()
    assert abs(int(across.input_value()) - 20) <= 2


def test_the_keyboard_alone_suffices(open_page):
    page = open_page()

    def tab_to(condition, most=80):
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate(
                f"(() => {{ const e = document.activeElement; return {condition} }})()"
            ):
                return
        raise AssertionError(f"no way to {condition}")

    with page.expect_file_chooser():
        tab_to("e.closest('#orig') && e.tagName == 'BUTTON'")
        page.keyboard.press("Enter")
    tab_to("e.id == 'example-2'")
    page.keyboard.press("Enter")
    page.locator(".compare").wait_for()
    tab_to("e.closest('.compare')")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    at = page.locator(".compare").evaluate("e => getComputedStyle(e).getPropertyValue('--at')")
    assert at.strip() == "60%"
    tab_to("e.closest('#question')")
    page.keyboard.type("What's the object in the hand?")
    page.keyboard.press("Enter")
    page.locator("#chat .confidence").wait_for()
    assert "jar" in page.locator("#chat").inner_text()
    page.locator("#attention figure").wait_for()
    tab_to("e.closest('#place') && e.type == 'range'")


def test_what_goes_wrong_is_a_sentence(open_page):
    page = open_page()
    page.locator("#run").click()
    assert "image_orig is missing" in told(page)
    send(page, "orig", "letter.png", b"Dear model,")
    page.locator("#orig img").wait_for()
    page.locator("#run").click()
    assert "image_orig: letter.png is no image that can be read" in told(page)
    run_example(page)
    page.get_by_role("button", name="Where the object is").click()
    page.get_by_label("Box in the original").fill("1, 2, 3")
    page.locator("#run").click()
    assert "bbox_orig must be [x, y, w, h]" in told(page)
    page.get_by_label("Box in the original").fill("")
    page.locator("#ask").click()
    assert "a question is empty" in told(page)
    # After all that it still works.
    page.get_by_role("button", name="What color").click()
    page.locator("#chat .confidence").wait_for()


def test_only_what_is_drawn_is_replaced(open_page):
    page = open_page()
    buffer = io.BytesIO()
    with Image.open(EXAMPLE / "camera_image_orig.jpg") as image:
        original = image.convert("RGB").resize((224, 224))
    original.save(buffer, "png")
    send(page, "orig", "scene.png", buffer.getvalue())
    page.locator("#orig img").wait_for()
    page.get_by_role("button", name="Where the object is").click()
    page.get_by_role("button", name="Completion parameters").click()
    page.get_by_label("Replace only").check()
    page.locator("#run").click()
    assert "paste_back needs occluder_mask" in told(page)
    canvas = page.locator("#drawing canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=8)
    page.mouse.up()
    page.locator("#run").click()
    page.locator(".compare").wait_for()
    with Image.open(downloaded(page, "Download image")) as completed:
        differs = np.any(np.asarray(completed) != np.asarray(original), axis=-1)
    assert 20 < differs.sum() < 0.2 * differs.size
    rows, columns = np.nonzero(differs)
    assert abs(rows.mean() - 112) < 30 and abs(columns.mean() - 112) < 30
