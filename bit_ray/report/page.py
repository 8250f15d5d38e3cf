"""The page of a model as HTML, from the model, its records and its scores."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

import bit_ray
from bit_ray.evaluation.evaluate import Evaluation
from bit_ray.plots.confusion import confusion_figure
from bit_ray.plots.curves import curve_figure
from bit_ray.plots.page import render_page, steady_style, svg
from bit_ray.plots.reliability import reliability_figure
from bit_ray.plots.style import short
from bit_ray.report.gallery import Shot
from bit_ray.report.subject import LOSS, RATE, Subject

_MOST_CLASSES, _MOST_ROWS, _MOST_LETTERS, _MOST_STEPS = 60, 200, 400, 1000
_METRICS = {
    "top_1": "top-1",
    "top_5": "top-5",
    "mean_per_class": "mean of the classes' top-1",
    "ece": "calibration error (ECE, 15 bins)",
    "cross_entropy": "cross-entropy (nats)",
}


class Scores(NamedTuple):
    """How good the model is on some images."""

    images: str
    """Which, in words."""
    evaluation: Evaluation
    worst: list[Shot]
    """The most confident errors."""
    surest: list[Shot]
    """The most confident right predictions, each of another class."""


class _Drawing(NamedTuple):
    title: str
    drawing: Markup
    caption: str


def render_model(subject: Subject, scores: Scores | None, missing: tuple[str, ...] = ()) -> bytes:
    """Return the page; the same arguments give the same bytes.

    Args:
        subject: The model.
        scores: None if there are no images to judge it by.
        missing: What is missing besides what the subject says, a sentence each.
    """
    spec, run = subject.classifier.spec, subject.run
    settings = [(short(key, 100), _text(value)) for key, value in run.params.items()][:_MOST_ROWS]
    return render_page(
        "report/page.html.jinja",
        subject=subject,
        summary=_summary(subject, scores),
        missing=(*subject.missing, *missing),
        facts=_facts(subject),
        choices=[short(str(choice), _MOST_LETTERS) for choice in _choices(spec.recipe)],
        recipe=[(key, value) for key, value in _flat(spec.recipe) if key != "choices"][:_MOST_ROWS],
        settings=settings,
        scores=scores,
        metrics=_metrics(subject, scores) if scores else [],
        drawings=list(_drawings(subject, scores)),
        version=bit_ray.__version__,
    ).encode()


def _summary(subject: Subject, scores: Scores | None) -> str:
    """Return the page in two sentences."""
    spec = subject.classifier.spec
    begin = f"It tells {spec.num_classes:,} classes apart" if spec.num_classes > 1 else "It has one class"
    if scores is None:
        return f"{begin}. How well was not measured here."
    found = scores.evaluation
    low, high = found.intervals["top_1"]
    return (
        f"{begin}, and is right on {found.metrics['top_1']:.1%} of {scores.images} (95 % interval: {low:.1%} to "
        f"{high:.1%})."
    )


def _facts(subject: Subject) -> list[tuple[str, str]]:
    spec, version = subject.classifier.spec, subject.version
    known = spec.provenance
    names = [short(name, 60) for name in spec.class_names[:_MOST_CLASSES]]
    more = spec.num_classes - len(names)
    size = f"{spec.crop_size} x {spec.crop_size} pixels"
    if spec.resize_mode == "square":
        view = f"the whole image, resized to {size}"
    else:
        view = f"the central {size} after a resize to a shorter side of {spec.resize_size}"
    facts = [("model", subject.model)]
    if version is not None:
        facts += [("version", f"{version.version}, registered {version.created:%Y-%m-%d}")]
    facts += [
        ("classes", ", ".join(names) + (f" and {more:,} more" if more > 0 else "")),
        ("labels", "several per image" if spec.multi_label else "one per image"),
        ("trained on", known.get("data", "not recorded")),
        ("started from", known.get("parent", "not recorded")),
        ("network", f"BiT ResNet-v2 {spec.model}"),
        ("sees", view),
        ("weights, SHA-256", subject.classifier.sha256 or "not a saved model"),
        ("run", " ".join(filter(None, (known.get("run_name"), known.get("run_id")))) or "not recorded"),
        ("made with", f"bit_ray {known['code_revision']}" if "code_revision" in known else "not recorded"),
    ]
    return [(name, short(value, 60 * _MOST_CLASSES)) for name, value in facts]


def _metrics(subject: Subject, scores: Scores) -> list[tuple[str, str, str]]:
    """Name, value and interval of each metric."""
    found, rows = scores.evaluation, []
    for name, label in _METRICS.items():
        if name not in found.metrics or (name == "top_5" and subject.classifier.spec.num_classes <= 5):
            continue
        form = "{:.4f}" if name == "cross_entropy" else "{:.1%}"
        limits = found.intervals.get(name, ())
        rows.append((label, form.format(found.metrics[name]), " to ".join(form.format(limit) for limit in limits)))
    recorded = subject.run.metrics
    if {"val/ece_before", "val/ece"} <= recorded.keys():
        before, after = recorded["val/ece_before"], recorded["val/ece"]
        rows.append(("calibration error of the validation images, before calibration", f"{before:.1%}", ""))
        rows.append(("the same after it", f"{after:.1%}", ""))
    return rows


def _drawings(subject: Subject, scores: Scores | None) -> Iterator[_Drawing]:
    curves = subject.run.curves
    if LOSS in curves:
        rates = dict(curves.get(RATE, ()))
        points = [(step, loss, rates.get(step, 0.0)) for step, loss in curves[LOSS]]
        # Of very many values, some at equal distances: the page stays small.
        points = points[:: -(-len(points) // _MOST_STEPS)]
        steps, losses, lrs = zip(*points, strict=True)
        with steady_style("curves"):
            yield _drawn(curve_figure(steps, losses, lrs), "curves", "Training loss and learning rate by step", "")
    if scores is None:
        return
    found = scores.evaluation
    if found.confusion is not None:
        with steady_style("confusion"):
            figure = confusion_figure(found.confusion, found.class_names)
            caption = "Rows are the true classes, columns the predicted ones."
            yield _drawn(figure, "confusion", "Which classes are confused with which", caption)
    with steady_style("reliability"):
        caption = (
            "Where the bars touch the diagonal, a probability means what it says: of the predictions at 80 %, 80 % are "
            "right."
        )
        yield _drawn(reliability_figure(found.calibration), "reliability", "Accuracy against confidence", caption)


def _drawn(figure: Figure, name: str, title: str, caption: str) -> _Drawing:
    return _Drawing(name, svg(figure, name, title), caption)


def _choices(recipe: Mapping[str, Any]) -> list[Any]:
    choices = recipe.get("choices", [])
    return choices[:_MOST_ROWS] if isinstance(choices, list) else []


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield short(f"{prefix}{key}", 100), _text(value)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return short(", ".join(map(str, value)), _MOST_LETTERS)
    return short(str(value), _MOST_LETTERS)
