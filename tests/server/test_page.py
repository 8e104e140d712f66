"""The page at `/` in a real browser: chromium with its driver, where the machine has them."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from table_engine import TableEngine
from web_server import Running, serving

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the dev extra")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

_BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    _BROWSER is None or _DRIVER is None,
    reason="no browser: apt-get install chromium chromium-driver",
)

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1100,1000",
)  # fmt: skip
_WAIT_S = 20

# What a drop from the desktop is to the page; a driver cannot drag a file in.
_DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], "sign.png", {type: "image/png"}));
document.getElementById("drop").dispatchEvent(
  new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engines = {"tiny": TableEngine(context=512), "small": TableEngine(context=512, letters="xyz ")}
    with serving(engines) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    options.binary_location = _BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path=_DRIVER)
        with webdriver.Chrome(options=options, service=service) as opened:
            yield opened


@pytest.fixture
def page(server: Running, browser: "webdriver.Chrome") -> "webdriver.Chrome":
    browser.get(server.url)
    _wait(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#models input")) == 2)
    return browser


def _wait(browser: "webdriver.Chrome", done) -> None:
    WebDriverWait(browser, _WAIT_S, poll_frequency=0.05).until(lambda _: done())


def _png(tmp_path: Path, colour: str) -> Path:
    path = tmp_path / f"{colour}.png"
    Image.new("RGB", (40, 30), colour).save(path)
    return path


def _ask(browser: "webdriver.Chrome") -> dict[str, str]:
    """Press the button and return each variant's answer once all are whole."""
    browser.find_element(By.ID, "send").click()
    chosen = len(browser.find_elements(By.CSS_SELECTOR, "#models input:checked"))
    whole = "article[data-done=true]"
    _wait(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, whole)) == chosen)
    return {
        card.find_element(By.TAG_NAME, "h2").text: card.find_element(By.CLASS_NAME, "text").text
        for card in browser.find_elements(By.TAG_NAME, "article")
    }


def test_an_image_is_chosen_and_the_variants_answer_side_by_side(
    page: "webdriver.Chrome", tmp_path: Path
) -> None:
    page.find_element(By.ID, "file").send_keys(str(_png(tmp_path, "red")))
    _wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#drop img"))
    page.find_elements(By.CSS_SELECTOR, "#models input")[1].click()
    answers = _ask(page)
    assert set(answers) == {"tiny", "small"}
    assert set(answers["tiny"]) <= set("abcdefgh ") and set(answers["small"]) <= set("xyz ")
    tops = {card.rect["y"] for card in page.find_elements(By.TAG_NAME, "article")}
    assert len(tops) == 1, "the answers stand one above the other"
    notes = [note.text for note in page.find_elements(By.CSS_SELECTOR, "article .facts")]
    assert all("tokens" in note and "first after" in note for note in notes), notes


def test_a_dropped_image_reaches_the_model(page: "webdriver.Chrome", tmp_path: Path) -> None:
    import base64

    answers = set()
    for colour in ("red", "white", "navy"):
        data = base64.b64encode(_png(tmp_path, colour).read_bytes()).decode()
        before = page.execute_script("return document.querySelector('#drop img')?.src ?? ''")
        page.execute_script(_DROP, data)
        shown = "return document.querySelector('#drop img')?.src ?? ''"
        _wait(page, lambda shown=shown, before=before: page.execute_script(shown) != before)
        answers.add(_ask(page)["tiny"])
    assert len(answers) > 1


def test_the_text_grows_while_it_comes_and_stop_ends_it(browser: "webdriver.Chrome") -> None:
    endless = TableEngine(slots=1, context=1_000_000)
    endless.eos_token_id = -1
    with serving({"tiny": endless}, max_new_tokens=900_000, context=1_000_000) as running:
        browser.get(running.url)
        _wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#models input"))
        browser.find_element(By.ID, "send").click()
        text = "return document.querySelector('article .text')?.textContent.length ?? 0"
        _wait(browser, lambda: browser.execute_script(text) > 0)
        first = browser.execute_script(text)
        _wait(browser, lambda: browser.execute_script(text) > first)
        browser.find_element(By.ID, "stop").click()
        _wait(browser, lambda: "stopped" in browser.find_element(By.TAG_NAME, "article").text)
        _wait(browser, lambda: running.endpoint._under_way == 0)
        _wait(browser, lambda: endless.held == {})


def test_a_refusal_is_shown_in_the_servers_words(page: "webdriver.Chrome") -> None:
    question = page.find_element(By.ID, "question")
    question.clear()
    question.send_keys("x" * 600)
    page.find_element(By.ID, "send").click()
    _wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "article .error"))
    assert "maximum context length is 512" in page.find_element(By.TAG_NAME, "article").text


def test_the_page_breaks_no_rule_of_its_policy(page: "webdriver.Chrome") -> None:
    page.get_log("browser")
    page.refresh()
    _wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#models input"))
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
