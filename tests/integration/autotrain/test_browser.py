"""What a person sees: the pages of a trained model in a real browser, from its report to MLflow's pages of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from mlflow import MlflowClient
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import bit_ray
from bit_ray.plots.lines import Line, LinePlot
from bit_ray.studies.report import Report, Table, render
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.recorded import run_page

pytestmark = [pytest.mark.cluster, pytest.mark.browser]

DESKTOP, PHONE = 1200, 390
PATIENCE_S = 60  # of a busy machine


class Browser:
    """One browser, which can reach this machine alone."""

    def __init__(self):
        options = webdriver.ChromeOptions()
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb"]
        arguments += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        arguments += ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium's sandbox does not work for root
        for argument in arguments:
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def open(self, url, width=DESKTOP):
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # of the page before
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(url)

    def wait(self, condition):
        """What the condition returns, once it is true."""
        return WebDriverWait(self.driver, PATIENCE_S).until(lambda _: self._now(condition))

    @staticmethod
    def _now(condition):
        with suppress(Exception):  # a page that is being drawn has elements that go away
            return condition()

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def texts(self, css):
        return [element.text for element in self.all(css)]

    def text(self):
        return self.driver.find_element(By.TAG_NAME, "body").text

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Addresses that the page has asked since it was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def is_drawn(self, css):
        """Whether all of these pictures have pixels."""
        script = "return [...document.querySelectorAll(arguments[0])].map((i) => i.complete && i.naturalWidth > 0)"
        found = self.driver.execute_script(script, css)
        return bool(found) and all(found)

    def overflow(self):
        """Pixels by which the page is wider than the window."""
        return self.driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )


@pytest.fixture(scope="module")
def browser():
    opened = Browser()
    yield opened
    opened.driver.quit()


@pytest.fixture(scope="module")
def trained(photos, start, mlflow_server, tmp_path_factory):
    """Storage and result of a linear head, recorded on a server."""
    storage = tmp_path_factory.mktemp("runs")
    tracking = TrackingConfig(uri=mlflow_server.uri)
    return storage, bit_ray.train(
        photos, name="seen", init=start, method="head", storage=str(storage), tracking=tracking
    )


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_the_report_is_whole_and_asks_nothing_of_anybody(browser, trained, width):
    _, result = trained
    browser.open(f"file://{result.report}", width)
    assert browser.texts("h1") == ["seen"]
    headings = browser.texts("h2")
    expected = ["What it is", "How good it is", "Where it is right, and most sure of it", "Figures", "How it was made"]
    assert [heading for heading in headings if heading in expected] == expected
    assert {"Use it", "What to expect"} <= set(headings)
    assert browser.is_drawn("img")
    assert len(browser.all(".shot img")) >= 6
    assert len(browser.all("svg")) == 2
    assert "bit-ray predict IMAGE --model models:/seen" in browser.text()
    assert browser.overflow() == 0
    assert browser.complaints() == []
    assert {url.partition(":")[0] for url in browser.requests()} <= {"file", "data"}


def test_the_page_of_a_study_is_whole_and_asks_nothing_of_anybody(browser, tmp_path):
    plot = LinePlot(
        name="loss",
        title="Loss falls",
        x_label="step",
        y_label="loss",
        lines=(Line(label="<script>a</script>", x=(0.0, 1.0), y=(2.0, 1.0)),),
    )
    table = Table(title="Top-1", header=("rate", "top-1"), rows=(("<img src=x>", "84.1%"),))
    numbers = tuple(f"0.{number}91 ± 0.0323" for number in range(9))
    many = Table(
        title="Results",
        header=("weight_decay", *(f"loss/{number}" for number in range(9)), "at the end"),
        rows=(("0.0001", *numbers, "cannot tell yet"),),
    )
    report = Report(
        title="Rates", command="bit-ray rates", findings=("One leads.",), tables=(table, many), plots=(plot,)
    )
    path = tmp_path / "report.html"
    path.write_bytes(render(report)["report.html"])
    for width in (DESKTOP, PHONE):
        browser.open(f"file://{path}", width)
        assert browser.texts("h1") == ["Rates"]
        assert browser.texts("td")[:2] == ["<img src=x>", "84.1%"]
        [drawing] = browser.all("svg")
        assert drawing.size["width"] > 300
        frame = drawing.find_element(By.XPATH, "..")
        goes_on = frame.get_property("scrollWidth") > frame.get_property("clientWidth")
        content = "return getComputedStyle(arguments[0], '::before').content"
        assert goes_on == ("goes on" in browser.driver.execute_script(content, frame))
        assert drawing.get_attribute("aria-labelledby") == "loss_title"
        assert len(browser.all("#loss_title")) == len(browser.all("figcaption")) == 1
        # A row of short texts is a line, also where the table is wider than the window.
        assert max(row.size["height"] for row in browser.all("tbody tr")) < 50
        assert browser.overflow() == 0
        assert browser.complaints() == []
        assert {url.partition(":")[0] for url in browser.requests()} == {"file"}


def test_the_demo_classifies_what_is_dropped_and_ends_by_ctrl_c(browser, trained, photos):
    storage, result = trained
    command = [sys.executable, "-m", "bit_ray.cli.main", "demo", f"{storage}/seen"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert started.stdout.readline() == f"demo of {storage}/seen/model\n"
        line = started.stdout.readline()
        url = line.split()[1]
        assert line.startswith("seen: http://127.0.0.1:")
        for width in (DESKTOP, PHONE):
            browser.open(url, width)
            assert browser.texts("h1") == ["seen"]
            browser.driver.find_element(By.ID, "file").send_keys(str(photos / "n° 1" / "1.png"))
            classes = browser.wait(lambda: len(browser.texts(".class")) == 3 and browser.texts(".class"))
            shares = [float(text.split()[-1].removesuffix("%")) for text in classes]
            assert sum(shares) == pytest.approx(100, abs=0.2)
            assert {text.rpartition("\n")[0] for text in classes} == {"n° 0", "n° 1", "n° 2"}
            assert browser.wait(lambda: browser.is_drawn("#heat"))
            assert browser.overflow() == 0
        # By the keyboard: the heat of another class, and the image alone.
        first = browser.all("#heat")[0].get_attribute("src")
        second = browser.all(".class")[1]
        second.send_keys("\n")
        assert second.get_attribute("aria-pressed") == "true"
        other = browser.all("#heat")[0]
        assert classes[1].split("\n")[0] in other.get_attribute("alt")
        assert other.get_attribute("src") != first
        browser.all("#switch")[0].send_keys(" ")
        assert other.get_attribute("alt") == "The image as the model sees it"
        assert browser.complaints() == []
        assert all(address.startswith((url, "data:")) for address in browser.requests())
        # What is no image is a sentence, and the page goes on.
        browser.driver.find_element(By.ID, "file").send_keys(str(photos / "readme.txt"))
        message = browser.wait(lambda: browser.texts("[role=alert]") != [""] and browser.texts("[role=alert]"))
        assert message == [
            "This is no image that can be read: not an image of a known format, or its header is damaged."
        ]
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == 130
        assert started.stderr.read() == "interrupted\n"
    finally:
        started.kill()
        started.communicate()


def test_mlflows_pages_show_the_run_its_sets_and_its_pictures(browser, trained, mlflow_server):
    _, result = trained
    page = run_page(mlflow_server.uri, result.run_id)
    browser.open(page.url)
    shown = browser.wait(lambda: "seen train" in browser.text() and browser.text())
    assert re.search(r"seen train \(\w+\)\s+Training\s+\+1\s", shown)  # the test set is folded away behind it
    assert "test/top_1" in shown
    assert "val_share" in shown
    assert "top-1 on 18 test images of 3 classes" in shown
    browser.open(f"{page.url}/artifacts/evaluation/confusion.png")
    assert browser.wait(lambda: browser.is_drawn("img[src^='blob:'], img[src^='data:']"))
    browser.open(page.url.partition("/runs/")[0] + "/runs")
    assert browser.wait(lambda: "seen" in [line.strip() for line in browser.text().splitlines()])


def test_mlflows_page_of_the_version_shows_the_card_with_its_commands(browser, trained, mlflow_server):
    _, result = trained
    browser.open(f"{mlflow_server.uri}/#/models/seen/versions/{result.version.version}")
    [code] = browser.wait(lambda: [text for text in browser.texts("pre code, pre") if "bit-ray predict" in text][:1])
    assert "bit-ray predict photo.jpg --model 'models:/seen@champion'" in code
    shown = browser.text()
    assert "3 classes, " in shown
    assert "<!--" not in shown
    client = MlflowClient(mlflow_server.uri)
    assert client.get_model_version("seen", "1").run_id == result.run_id
