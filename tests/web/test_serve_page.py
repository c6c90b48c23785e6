"""The web page in a real headless Chromium against the real application over a real model; Ray is not needed here.

`DERMRAY_SCREENSHOTS=FOLDER` keeps the pictures that the tests take.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.auth import Access, _digest
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig
from tests.serving import CLASSES, DummyBackend, listening, local_app, photograph, save_index, save_tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs a browser: install Debian's chromium and chromium-driver"
)
WAIT_S = 20
TOKEN = "a-token-of-16-characters"
DESKTOP = (1180, 860)
PHONE = (390, 844)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    model, second = save_tiny_model(folder / "tiny"), save_tiny_model(folder / "second", CLASSES[:3], seed=1)
    with listening(local_app([model, second], index=save_index(folder, model))) as url:
        yield url


@pytest.fixture
def guarded() -> Iterator[str]:
    """The application over a backend without weights, behind a token."""
    access = Access((_digest(TOKEN),))
    with listening(create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=access)) as url:
        yield url


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, url: str) -> Page:
    return Page(driver, url)


@pytest.fixture
def keep(driver: webdriver.Chrome, tmp_path: Path) -> Callable[[str], Path]:
    folder = Path(os.environ.get("DERMRAY_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str) -> Path:
        path = folder / f"{name}.png"
        assert driver.save_screenshot(str(path))
        return path

    return save


class Page:
    """The page as a person meets it."""

    def __init__(self, driver: webdriver.Chrome, url: str, size: tuple[int, int] = DESKTOP) -> None:
        self.driver = driver
        self.resize(size)
        driver.get_log("browser")
        driver.get(url)
        self.until(lambda: len(self.chips()) == len(CLASSES))

    def resize(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def until(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, WAIT_S).until(lambda _: condition())

    def one(self, identity: str):
        return self.driver.find_element(By.ID, identity)

    def chips(self) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll('#chips li span')].map((one) => one.textContent)"
        )

    def ranking(self) -> dict[str, float]:
        # In one call: the page replaces its rows when an answer comes.
        rows = self.driver.execute_script(
            "return [...document.querySelectorAll('#ranking li')].map((row) =>"
            " [row.querySelector('.label').textContent, row.querySelector('.value').textContent])"
        )
        return {label: float(value.removesuffix("%").removeprefix("<")) for label, value in rows}

    def upload(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        self.one("file").send_keys(str(path))

    def idle(self) -> bool:
        return self.one("results").get_attribute("aria-busy") == "false"

    def complaints(self) -> list[str]:
        """What the console says in red, but for the HTTP refusals that a test provokes."""
        entries = self.driver.get_log("browser")
        return [e["message"] for e in entries if e["level"] == "SEVERE" and "status of 400" not in e["message"]]


def test_the_page_names_the_model_its_classes_and_its_purpose(page, keep):
    assert Select(page.one("picker")).first_selected_option.text == "tiny"
    assert page.chips() == list(CLASSES)
    assert "not a diagnosis" in page.driver.find_element(By.CLASS_NAME, "notice").text
    page.until(lambda: page.one("health").get_attribute("class") == "dot ready")
    assert not page.one("again").is_enabled()
    keep("serve_page")
    # A violated content policy, a missing file or a script's error would stand here.
    assert page.complaints() == []


def test_an_upload_is_ranked(page, keep, tmp_path):
    page.upload(tmp_path / "lesion.jpg", photograph(2, size=(400, 520)))
    page.until(lambda: page.ranking() and page.idle())
    ranking = page.ranking()
    assert set(ranking) == set(CLASSES)
    assert list(ranking.values()) == sorted(ranking.values(), reverse=True)
    assert sum(ranking.values()) == pytest.approx(100, abs=0.5)
    assert page.one("preview").is_displayed()
    # Shown whole: a picture that its frame cuts would mislead.
    assert page.one("preview").rect["height"] <= page.one("photo").rect["height"]
    assert page.one("elapsed").text.endswith(" ms")
    assert "Answered by tiny" in page.one("foot").text
    assert page.one("status").get_attribute("textContent").startswith("Most probable of 5: ")
    assert not page.one("error").is_displayed()
    assert page.complaints() == []
    keep("serve_page_result")


def test_no_malignancy_stands_under_benign(driver, keep, tmp_path):
    model = save_tiny_model(tmp_path / "model")
    both = ["melanocytic", "non-melanocytic"]
    tree = {
        "root": ["proliferations", "inflammatory"],
        "proliferations": ["benign", "malignant"],
        "benign": both,
        "malignant": both,
        "melanocytic": ["melanoma", "melanocytic nevus", "Lump of either kind"],
        "non-melanocytic": ["Basal cell carcinoma"],
        "inflammatory": ["psoriasis", "acne vulgaris", "vitiligo"],
    }
    (model / "ontology.json").write_text(json.dumps(tree), encoding="utf-8")
    with listening(local_app([model])) as url:
        page = Page(driver, url)
        for name in ("BCC", "lump of either kind"):
            page.one("condition").send_keys(name, Keys.ENTER)
        page.upload(tmp_path / "lesion.jpg", photograph(2, size=(400, 520)))
        page.until(lambda: len(page.ranking()) == 7 and page.idle())
        keep("serve_page_branches")
        rows = driver.execute_script(
            "return [...document.querySelectorAll('#ranking li')].map((row) =>"
            " [row.querySelector('.label').textContent, row.querySelector('.path')?.textContent ?? ''])"
        )
    shown = dict(rows)
    assert shown["melanoma"] == "proliferations \u203a malignant \u203a melanocytic"
    assert shown["BCC"] == "proliferations \u203a malignant \u203a non-melanocytic"
    assert shown["melanocytic nevus"] == "proliferations \u203a benign \u203a melanocytic"
    assert shown["lump of either kind"] == "proliferations \u203a melanocytic"


def test_concepts_and_neighbours_stand_beside_the_ranking(page, tmp_path):
    page.upload(tmp_path / "lesion.jpg", photograph(5))
    page.until(lambda: page.ranking() and page.idle())
    chips = page.driver.find_elements(By.CSS_SELECTOR, "#concept-list li")
    assert len(chips) == 12
    scores = [float(chip.find_element(By.TAG_NAME, "b").text.removesuffix(" %")) for chip in chips]
    assert scores == sorted(scores, reverse=True)
    hits = page.driver.find_elements(By.CSS_SELECTOR, "#neighbour-list li")
    assert len(hits) == 8
    # The photograph itself is in the index.
    assert (hits[0].get_attribute("title"), hits[0].find_element(By.CLASS_NAME, "value").text) == ("caption 5", "1.00")
    loaded = "return [...document.querySelectorAll('#neighbour-list img')].every((one) => one.naturalWidth > 0)"
    page.until(lambda: page.driver.execute_script(loaded))
    assert page.complaints() == []


def test_words_find_images_by_keyboard(page, keep):
    page.one("query").send_keys("silvery scale on an elbow", Keys.ENTER)
    page.until(lambda: len(page.driver.find_elements(By.CSS_SELECTOR, "#found li")) == 12)
    assert page.one("search-status").text == "12 images nearest to “silvery scale on an elbow”, by cosine"
    page.driver.execute_script("arguments[0].scrollIntoView()", page.one("search"))
    keep("serve_page_search")
    assert page.complaints() == []


def test_another_model_brings_its_classes_and_ranks_again(page, tmp_path):
    page.upload(tmp_path / "lesion.jpg", photograph(1))
    page.until(lambda: page.ranking() and page.idle())
    Select(page.one("picker")).select_by_visible_text("second")
    page.until(lambda: "Answered by second" in page.one("foot").text and page.idle())
    assert page.chips() == list(CLASSES[:3])
    assert set(page.ranking()) == set(CLASSES[:3])
    # The index was made by the first one.
    assert not page.one("search").is_displayed()
    assert not page.one("neighbours").is_displayed()


def test_a_service_with_tokens_asks_for_one(driver, guarded):
    driver.get(guarded)
    wait = WebDriverWait(driver, WAIT_S)
    dialog, token = driver.find_element(By.ID, "token-dialog"), driver.find_element(By.ID, "token")
    wait.until(lambda _: dialog.is_displayed())
    token.send_keys("wrong", Keys.ENTER)
    wait.until(lambda _: driver.find_element(By.ID, "token-refused").is_displayed())
    token.send_keys(TOKEN, Keys.ENTER)
    wait.until(lambda _: driver.find_element(By.ID, "model-name").text == "dummy v3 @champion")
    assert not dialog.is_displayed()
    assert driver.execute_script("return localStorage.length") == 0


def test_a_bad_file_is_explained_and_the_next_one_works(page, keep, tmp_path):
    page.upload(tmp_path / "notes.jpg", b"this is text")
    page.until(lambda: page.one("error").is_displayed() and page.idle())
    assert page.one("error").text.startswith("This file is not an image.")
    assert page.one("error").get_attribute("role") == "alert"
    assert not page.one("ranking").is_displayed()
    # Nothing to preview, so the invitation is back.
    page.until(lambda: page.one("prompt").is_displayed() and not page.one("preview").is_displayed())
    keep("serve_page_error")
    page.upload(tmp_path / "lesion.png", photograph(kind="PNG"))
    page.until(lambda: page.ranking() and page.idle())
    assert not page.one("error").is_displayed()
    assert page.complaints() == []


def test_the_list_is_edited_by_keyboard_and_ranked_again(page, tmp_path):
    page.upload(tmp_path / "lesion.jpg", photograph(1))
    page.until(lambda: page.ranking() and page.idle())
    page.one("condition").send_keys("rosacea, <b>wart</b>", Keys.ENTER)
    assert page.chips()[:2] == ["rosacea", "<b>wart</b>"]
    assert page.one("count").text == str(len(CLASSES) + 2)
    page.driver.find_element(By.CSS_SELECTOR, "[aria-label='Remove vitiligo']").send_keys(Keys.ENTER)
    assert "vitiligo" not in page.chips()
    # The focus stays in the list, so that the next one can be removed too.
    assert page.driver.switch_to.active_element.get_attribute("aria-label").startswith("Remove ")
    assert "stale" in page.one("results").get_attribute("class")
    page.one("again").send_keys(Keys.ENTER)
    page.until(lambda: "rosacea" in page.ranking() and page.idle())
    assert set(page.ranking()) == (set(CLASSES) - {"vitiligo"}) | {"rosacea", "<b>wart</b>"}
    page.one("reset").click()
    assert page.chips() == list(CLASSES)
    page.one("clear").click()
    assert page.chips() == []
    assert not page.one("again").is_enabled()


def test_a_long_ranking_is_shown_in_part(page, tmp_path):
    page.one("condition").send_keys(",".join(f"condition {i}" for i in range(20)), Keys.ENTER)
    page.upload(tmp_path / "lesion.jpg", photograph(1))
    page.until(lambda: page.ranking() and page.idle())
    assert len(page.ranking()) == 8
    page.one("more").click()
    assert len(page.ranking()) == 20 + len(CLASSES)


def test_a_phone_needs_no_sideways_scrolling(driver, url, keep, tmp_path):
    page = Page(driver, url, PHONE)
    page.upload(tmp_path / "lesion.jpg", photograph(2, size=(400, 480)))
    page.until(lambda: page.ranking() and page.idle())
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert driver.execute_script(wide) == 0
    photo, results = (page.driver.find_element(By.CSS_SELECTOR, f".{name}").rect for name in ("photo", "results"))
    assert photo["x"] == results["x"]
    assert photo["y"] < results["y"]
    assert keep("serve_page_phone").stat().st_size > 10_000


def test_dark_mode_follows_the_system(page, keep, tmp_path):
    colour = "return getComputedStyle(document.documentElement).backgroundColor"
    light = page.driver.execute_script(colour)
    feature = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    try:
        assert page.driver.execute_script(colour) != light
        page.upload(tmp_path / "lesion.jpg", photograph(2, size=(480, 400)))
        page.until(lambda: page.ranking() and page.idle())
        keep("serve_page_dark")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_keyboard_reaches_the_photograph(page):
    page.driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    for _ in range(4):
        if page.driver.switch_to.active_element.get_attribute("id") == "file":
            break
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert page.driver.switch_to.active_element.get_attribute("id") == "file"
    outline = page.driver.execute_script("return getComputedStyle(document.getElementById('photo')).outlineStyle")
    assert outline == "solid"


def test_the_api_reference_is_drawn_from_the_specification_and_its_examples_work(driver, url, keep, tmp_path):
    driver.get_log("browser")
    driver.get(f"{url}/docs")
    WebDriverWait(driver, WAIT_S).until(lambda d: d.find_elements(By.CSS_SELECTOR, ".operation"))
    paths = [one.text for one in driver.find_elements(By.CSS_SELECTOR, ".operation code")]
    assert {"/v1/embeddings", "/v1/classify", "/v1/models", "/healthz", "/readyz", "/metrics"} <= set(paths)
    assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []
    keep("serve_docs")
    examples = [one.text for one in driver.find_elements(By.CSS_SELECTOR, ".reference pre code")]
    assert len(examples) >= 12
    (tmp_path / "photo.jpg").write_bytes(photograph(size=(3000, 2400)) + bytes(5_000_000))
    for example in examples:
        done = subprocess.run(["bash", "-c", example], cwd=tmp_path, capture_output=True, timeout=60, check=False)
        if "/v1/admin/" in example:
            # Nobody administers this service.
            assert json.loads(done.stdout)["error"]["code"] == "not_an_administrator"
        elif "/v1/predict" in example:
            # The model that is served here is of a kind that does not.
            assert json.loads(done.stdout)["error"]["code"] == "not_answered"
        else:
            assert done.returncode == 0, example
            assert b'"error"' not in done.stdout, (example, done.stdout[:200])


def test_a_foreign_page_reaches_nothing_through_the_browser(driver):
    """By a form, a script and a picture of a page on another port of this machine, which is the same site."""
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig())
    script = "fetch(TARGET + '/v1/embeddings', {method: 'POST', mode: 'no-cors', body: '{\"input\": \"a\"}'})"
    foreign = FastAPI()
    with listening(app) as url, listening(foreign) as elsewhere:
        page = (
            f"<title>foreign</title><form method=post enctype=text/plain action='{url}/v1/admin/models/dummy/rollback'>"
            f"<input name=x></form><img id=i src='{url}/assets/icon.svg'><script>{script.replace('TARGET', repr(url))}"
            f".then(() => fetch('{url}/v1/models')).catch(() => document.forms[0].submit())</script>"
        )
        foreign.add_api_route("/", lambda: HTMLResponse(page))
        driver.get(elsewhere)
        WebDriverWait(driver, WAIT_S).until(lambda d: d.current_url.endswith("/rollback"))
        assert "cross_site" in driver.page_source
        failures = app.state.service.metrics.render([]).decode()
    refused = [line for line in failures.splitlines() if 'failures_total{code="cross_site"' in line]
    assert sum(float(line.rpartition(" ")[2]) for line in refused) == 2
