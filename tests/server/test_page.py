"""The page at /, in a real browser: a picture, a question, the answer as it streams, its tiles, times and charts."""

import base64
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from vitrail.runtime import Runtime

from ..image_corpora import encoded
from .conftest import LiveServer, Settings, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "runtime/server/page.html"
RECEIPT = ROOT / "examples/receipt.png"
INJECTION = "<img src=x onerror=alert(1)>"


# --- what needs no browser ---


def test_the_page_is_one_file_that_loads_nothing_and_writes_no_markup():
    text = PAGE.read_text("utf-8")
    assert len(text) < 40_000
    for tag in ("script", "style"):
        assert len(re.findall(rf"<{tag}\b", text)) == len(re.findall(rf"<{tag}>", text)) == 1  # hashed by the server
    assert not re.findall(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function)\b", text)
    assert not re.findall(r"<[^>]*\s(?:on\w+|style)=", text)  # the policy would not run them
    urls = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"')]*", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)))
    assert {url for url in urls if "www.w3.org/2000/svg" not in url} == set()


def test_the_page_is_served_without_a_key_and_may_only_talk_to_its_server(make_server):
    server = make_server(api_key=["secret"])
    response = server.http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert "secret" not in response.text
    assert server.http.get("/metrics").status_code == 401


# --- a real browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "chromium and chromedriver are not installed"
        if os.environ.get("CI") in ("1", "true"):
            pytest.fail(missing)
        pytest.skip(missing)
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,1000"):
        options.add_argument(f"--{argument}")
    for argument in ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run"):
        options.add_argument(f"--{argument}")  # it would ask its maker's servers this and that
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def nano():
    runtime = Runtime.from_pretrained("nano", dtype="float32", device="cpu")
    server = LiveServer(runtime, Settings())
    wait_until(lambda: server.http.get("/health").json() == {"status": "ready"}, "the server is ready")
    yield server
    server.assert_nothing_is_held()
    server.close()


@pytest.fixture
def page(browser, nano):
    browser.get(nano.url)
    browser.set_window_size(1280, 1000)
    browser.get_log("browser")
    yield Page(browser)
    alarming = [
        entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "400" not in entry["message"]
    ]
    assert alarming == []  # no error of the script, nothing that the policy forbids


class Page:
    """The page by the names of its elements."""

    def __init__(self, browser):
        self.browser = browser

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def text(self, selector):
        return self.browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)

    def ask(self, question):
        self.find("#question").clear()
        self.find("#question").send_keys(question)
        self.find("#ask").click()

    def wait_for_answer(self):
        wait_until(lambda: self.text("#ask") == "Ask" and self.text("#answer"), "an answer", 60)
        return self.text("#answer")


def save_screenshot(browser, name):
    """For a person to look at, where VITRAIL_SCREENSHOTS names a folder."""
    folder = os.environ.get("VITRAIL_SCREENSHOTS")
    if folder:
        time.sleep(3)  # for the charts
        if name == "light":
            browser.set_window_size(1280, 1090)
        browser.save_screenshot(f"{folder}/{name}.png")


def test_a_picture_and_a_question_bring_an_answer_its_tiles_and_its_times(page, nano, tmp_path):
    page.find("#files").send_keys(str(RECEIPT))
    wait_until(lambda: page.all("figure img"), "the picture")
    page.ask("What is the total?")
    answer = page.wait_for_answer()
    expected = nano.service.runtime.generate("What is the total?", str(RECEIPT))
    assert answer == expected.text
    assert "$25.90" in expected.text
    columns, rows = nano.service.runtime.encode_image(str(RECEIPT)).grid
    grid = page.find("figure svg")
    assert grid.get_attribute("data-grid") == f"{columns}x{rows}"
    assert len(page.all("figure svg line")) == 2 * (columns - 1 + rows - 1)
    picture = page.find("figure img")
    assert {key: round(value) for key, value in grid.rect.items()} == {k: round(v) for k, v in picture.rect.items()}
    assert ("thumbnail" in page.text("figcaption")) == (expected.num_tiles[0] > columns * rows)
    stages = {
        one.get_attribute("data-stage"): float(one.text.split()[0].replace(",", "")) for one in page.all("[data-stage]")
    }
    assert list(stages) == ["queue", "preprocess", "vision", "prefill", "decode"]
    assert min(stages["vision"], stages["prefill"], stages["decode"]) > 0
    facts = page.text("#facts")
    assert f"{expected.usage.prompt_tokens} tokens read" in facts
    assert f"{len(expected.token_ids)} tokens written" in facts
    assert f"{expected.usage.image_tokens} of them from pictures" in facts
    wait_until(lambda: page.browser.execute_script("return speed.lines[0].values.some(value => value > 0)"), "a chart")
    assert "," in page.find("#speed polyline").get_attribute("points")
    assert page.text("#state") == "ready"
    assert page.text("#model") == "nano"
    page.browser.save_screenshot(str(tmp_path / "page.png"))
    save_screenshot(page.browser, "light")


UNNAMED = """
return [...document.querySelectorAll("button, input, select, textarea")]
  .filter((one) => one.offsetParent && !one.labels?.length && !one.textContent && !one.ariaLabel).map((one) => one.id);
"""


def test_the_page_works_by_keyboard_in_the_dark_and_on_a_telephone(page):
    from selenium.webdriver import ActionChains, Keys

    page.browser.set_window_size(500, 900)
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.find("#files").send_keys(str(RECEIPT))
    wait_until(lambda: page.all("figure img"), "the picture")
    page.find("#theme").click()
    channels = page.browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")
    assert max(map(int, channels[:3])) < 60
    page.find("#question").send_keys("What is the total?" + Keys.ENTER)
    assert "$25.90" in page.wait_for_answer()
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    order = []
    page.browser.execute_script("document.querySelector('#theme').focus()")
    for _ in range(8):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        focused = page.browser.switch_to.active_element
        order.append(focused.get_attribute("id") or focused.get_attribute("aria-label"))
    assert order == ["key-button", "Remove receipt.png", "files", "question", "tiles", "tokens", "temperature", "ask"]
    assert page.browser.execute_script(UNNAMED) == []
    save_screenshot(page.browser, "narrow")
    page.find("figure .remove").click()
    assert page.all("figure") == []


DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], arguments[1], { type: "image/png" }));
dispatchEvent(arguments[2] === "drop" ? new DragEvent("drop", { dataTransfer: data, cancelable: true })
                                      : new ClipboardEvent("paste", { clipboardData: data, cancelable: true }));
"""


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_pictures_may_be_dropped_and_pasted_and_names_are_no_markup(page, way):
    data = base64.b64encode(RECEIPT.read_bytes()).decode()
    page.browser.execute_script(DROP, data, INJECTION, way)
    page.browser.execute_script(DROP, data, "second.png", way)
    wait_until(lambda: len(page.all("figure img")) == 2, "two pictures")
    assert INJECTION in [image.get_attribute("alt") for image in page.all("figure img")]
    assert len(page.all("img")) == 2


def test_what_the_server_writes_is_text(page, nano, monkeypatch):
    from vitrail.runtime.server import chat

    event = chat.event

    def marked(content):
        for choice in content.get("choices", []):
            choice["delta"] |= {"content": INJECTION}
        return event(content)

    monkeypatch.setattr(chat, "event", marked)
    page.ask("Say it.")
    assert INJECTION in page.wait_for_answer()
    assert page.all("#answer *") == []


def test_errors_are_told_and_the_next_question_is_answered(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(encoded_half())
    page.find("#files").send_keys(str(bad))
    wait_until(lambda: page.all("figure img"), "the picture")
    page.ask("What is it?")
    assert "image 1: cannot decode" in page.wait_for_answer()
    assert "error" in page.find("#answer").get_attribute("class")
    page.find("figure .remove").click()
    page.find("#files").send_keys(str(RECEIPT))
    wait_until(lambda: page.all("figure img"), "the picture")
    page.ask("What is the total?")
    assert "$25.90" in page.wait_for_answer()
    assert "error" not in page.find("#answer").get_attribute("class")


def encoded_half():
    from PIL import Image

    data = encoded(Image.effect_noise((64, 64), 50), "PNG")
    return data[: len(data) // 2]


def test_an_answer_can_be_stopped_and_the_engine_lets_go(page, nano, monkeypatch):
    step = nano.engine._step

    def slow():
        time.sleep(0.05)
        step()

    monkeypatch.setattr(nano.engine, "_step", slow)
    page.find("#files").send_keys(str(RECEIPT))
    wait_until(lambda: page.all("figure img"), "the picture")
    page.ask("What is the total? " * 3)
    wait_until(lambda: page.text("#answer") and page.text("#ask") == "Stop", "the answer begins")
    page.find("#ask").click()
    wait_until(lambda: page.text("#ask") == "Ask", "the page is at rest")
    assert page.text("#facts") == "stopped"
    nano.assert_nothing_is_held()


def test_a_key_is_asked_for_where_there_is_one(browser, make_server):
    server = make_server(api_key=["opens"])
    browser.get(server.url)
    page = Page(browser)
    wait_until(lambda: page.find("#key").is_displayed(), "the key's field")
    page.find("#key").send_keys("opens")
    wait_until(lambda: page.text("#state") == "ready", "the page is let in")
    page.ask("Hello?")
    page.wait_for_answer()
    assert "error" not in page.find("#answer").get_attribute("class")
    assert server.http.get("/", headers={"Host": "evil.example"}).status_code == 403
