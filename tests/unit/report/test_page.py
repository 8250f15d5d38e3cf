from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bit_ray.evaluation.evaluate import Evaluation
from bit_ray.evaluation.intervals import bootstrap_intervals
from bit_ray.evaluation.metrics import ClassificationMetrics
from bit_ray.inference.classifier import Classifier
from bit_ray.models.zoo import create_model
from bit_ray.plots.lines import plain
from bit_ray.plots.page import data_uri
from bit_ray.report.gallery import Shot
from bit_ray.report.page import Scores, render_model
from bit_ray.report.subject import Subject
from bit_ray.report.write import file_name
from bit_ray.tracking.listing import ListedModel
from bit_ray.tracking.recorded import RecordedRun
from bit_ray.weights.package import ModelSpec

MODEL = "R1-1-1-1x0.5"
FEW = settings(deadline=None, database=None, max_examples=5, suppress_health_check=list(HealthCheck))
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "a\u2028b\x00",
    "']]>",
    "${x}$",
)
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Reads a page, and checks that its tags are closed in order and that it can run and load nothing."""

    def __init__(self, html):
        super().__init__()
        self.open, self.found, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "link")
        assert not [name for name in values if name.startswith("on")]
        assert values.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert values.get("href", values.get("xlink:href", "#")).startswith(("#", "data:image/png;base64,"))
        self.found.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def subject(names=("a", "b", "c"), **changes):
    spec = ModelSpec(
        model=MODEL, num_classes=len(names), class_names=names, multi_label=False, resize_mode="square",
        resize_size=32, crop_size=32, provenance={"data": f"{names[0]}: 9 images", "run_name": names[-1]},
        recipe={"choices": [f"chosen: {names[0]}"], "rule": {"crop": 32}},
    )  # fmt: skip
    with torch.device("meta"):
        network = create_model(MODEL, len(names))
    given = {"name": names[0], "model": "models:/a@champion", "classifier": Classifier(network, spec)}
    return Subject(**{**given, "commands": {"The classes": "bit-ray predict 'a b'"}, **changes})


def scores(names=("a", "b", "c"), num_shots=2):
    metrics = ClassificationMetrics(len(names))
    draw = torch.Generator().manual_seed(0)
    metrics.update(torch.randn(60, len(names), generator=draw), torch.randint(0, len(names), (60,), generator=draw))
    evaluation = Evaluation(
        metrics=metrics.result(),
        intervals=bootstrap_intervals(metrics, num_resamples=50),
        calibration=metrics.calibration(),
        worst=(),
        confusion=metrics.confusion,
        class_names=names,
    )
    picture = data_uri(np.zeros((8, 8, 3), np.uint8))
    shots = [
        Shot(
            picture=picture, heat=picture, id=f"{names[0]}/1", true=names[0], predicted=names[1], confidence=0.9,
            right=False,
        )
    ] * num_shots  # fmt: skip
    return Scores("60 images of a set", evaluation, shots, [])


@pytest.mark.parametrize("names", [HOSTILE, ("a", "b")])
def test_names_of_any_kind_stay_text(names):
    page = Page(render_model(subject(names), scores(names)).decode())
    for name in names:
        assert " ".join(plain(name).split()) in page.text
    assert page.found.count("img") == 4
    assert page.found.count("svg") == 2


@FEW
@given(names=st.lists(st.text(min_size=1, max_size=40), min_size=2, max_size=5, unique=True).map(tuple))
def test_any_names_make_a_page(names):
    Page(render_model(subject(names), scores(names)).decode("utf-8"))


def test_without_images_the_page_is_whole_and_says_so():
    page = Page(render_model(subject(missing=("No run.",)), None, ("No test set.",)).decode())
    assert "Not here No run. No test set." in page.text
    assert "How well was not measured here." in page.text
    assert "How it was made chosen: a" in page.text
    assert "rule.crop" in page.text
    assert "svg" not in page.found


def test_records_of_a_run_are_shown():
    steps = tuple((step, 1 / (1 + step)) for step in range(50_000))
    run = RecordedRun(
        params={"val_share": "0.15"},
        metrics={"val/ece_before": 0.081, "val/ece": 0.034},
        sets={},
        curves={"train/loss": steps, "train/lr": steps},
    )
    version = ListedModel(
        name="a", version=7, aliases=("champion",), model=MODEL, num_classes=3, num_bytes=1, parent="",
        created=datetime(2026, 1, 2, tzinfo=UTC), weights_uri="/a",
    )  # fmt: skip
    html = render_model(subject(run=run, version=version), scores())
    page = Page(html.decode())
    assert "7, registered 2026-01-02" in page.text
    assert "calibration error of the validation images, before calibration 8.1%" in page.text
    assert "the same after it 3.4%" in page.text
    assert "val_share 0.15" in page.text
    assert page.found.count("svg") == 3
    assert len(html) < 500_000


def test_very_many_classes_and_settings_make_no_large_page():
    names = tuple(f"class {i} " + "x" * 300 for i in range(2000))
    run = RecordedRun(params={f"p{i}": "y" * 5000 for i in range(5000)}, metrics={}, sets={}, curves={})
    assert len(render_model(subject(names, run=run), scores(names, num_shots=0))) < 1_000_000


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Größe 2.1", "Größe 2.1.html"),
        ("../../etc/x", "etc-x.html"),
        ("/", "model.html"),
        ("..", "model.html"),
        ("a\x00b", "a-b.html"),
        ("x" * 300, "x" * 100 + ".html"),
    ],
)
def test_the_page_lies_in_the_current_folder_whatever_the_name(name, expected):
    assert file_name(name) == expected


def test_the_same_model_has_the_same_page():
    assert render_model(subject(), scores()) == render_model(subject(), scores())
