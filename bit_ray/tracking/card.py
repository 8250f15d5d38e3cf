"""The model card: what a model is, what it was trained on, how well it does and what it is not for, as Markdown.

Written only from the records of the saved model and its run: the same model has the same card, and what was not
recorded is named as missing, not made up. The headings follow Mitchell et al. 2019 (arXiv 1810.03993).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bit_ray.uris import shown_in
from bit_ray.weights.package import ModelSpec
from bit_ray.weights.tensor_files import Weights

CARD_FILE = "README.md"
MARK = "<!-- model card by bit_ray -->"
"""First line of every card: a README.md without it is not a card."""

MAX_DESCRIPTION = 5000
"""Most characters of a version's description in MLflow's databases."""

_NAMED_CLASSES = 20
_SHARES = {"top_1": "top-1", "top_5": "top-5", "mean_per_class": "mean per class", "ece": "calibration error (ECE)"}
_PROVENANCE = {
    "manifest_digest": "training data (manifest digest)",
    "config_digest": "settings (digest of the plan)",
    "parent": "started from",
    "parent_digest": "weights started from (SHA-256)",
    "code_revision": "bit_ray",
    "run_name": "run",
    "run_id": "MLflow run",
}


def model_card(
    name: str,
    spec: ModelSpec,
    weights: Weights,
    *,
    alias: str = "champion",
    params: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Return the model card.

    Args:
        name: Registered name of the model.
        spec: Its network, input and origin.
        weights: Its weights file.
        alias: By which it is used in the examples.
        params: Params of its MLflow run, of which ``shards``, ``test_shards`` and ``init`` are used.
        metrics: Last metrics of its MLflow run, of which ``test/...`` and ``train/...`` are used.
    """
    params, metrics = shown_in(params or {}), metrics or {}
    spec = replace(spec, recipe=shown_in(spec.recipe), provenance=shown_in(spec.provenance))
    sections = {
        "Intended input": _input(spec),
        "Data": _data(spec, params, metrics),
        "Recipe": _recipe(spec.recipe) or "Not recorded.",
        "Results": _results(spec, params, metrics),
        "Limits": _limits(spec, metrics),
        "Provenance": _table(_provenance(spec, weights)),
        "Use": _use(name, alias),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{MARK}\n# {name}\n\n{_summary(spec, metrics)}\n\n{body}\n"


def description(card: str) -> str:
    """Return the card as the description of a registered version, at most 5,000 characters.

    It begins with the summary, which lists of versions show; the mark and the name before it are left out.
    """
    card = card.split("\n\n", 1)[1]
    if len(card) <= MAX_DESCRIPTION:
        return card
    end = f"\n\n(Shortened; the full card is {CARD_FILE} next to the weights.)\n"
    return card[: MAX_DESCRIPTION - len(end)].rpartition("\n")[0] + end


def _summary(spec: ModelSpec, metrics: Mapping[str, float]) -> str:
    how = "several labels per image" if spec.multi_label else "one label per image"
    facts = [f"{spec.num_classes:,} {'class' if spec.num_classes == 1 else 'classes'}"]
    if "test/top_1" in metrics:
        facts.append(f"{metrics['test/top_1']:.1%} top-1")
    if parent := spec.provenance.get("parent"):
        facts.append(f"from {_code(parent)}")
    network = f"BiT ResNet-v2 `{spec.model}` (Kolesnikov et al., arXiv 1912.11370)"
    return f"{', '.join(facts)}. Image classifier: {network}, {how}."


def _input(spec: ModelSpec) -> str:
    size = f"{spec.crop_size} x {spec.crop_size} pixels"
    if spec.resize_mode == "square":
        view = f"resized to {size} without keeping its aspect ratio"
    else:
        view = f"resized to a shorter side of {spec.resize_size} pixels and cropped to the central {size}"
    low, high = spec.input_range
    scores = "independent probabilities (sigmoid)" if spec.multi_label else "probabilities that add up to 1 (softmax)"
    names = ", ".join(_inline(name) for name in spec.class_names[:_NAMED_CLASSES])
    more = spec.num_classes - _NAMED_CLASSES
    return _list(
        [
            f"One 8-bit RGB image of any size, {view}; pixel values 0 to 255 become {low:g} to {high:g}.",
            f"The output is {scores}, one for each class.",
            f"Classes: {names}{f', and {more:,} more in `model.json`' if more > 0 else ''}.",
        ]
    )


def _data(spec: ModelSpec, params: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    lines = []
    if data := spec.provenance.get("data"):
        # As code: in plain text MLflow makes an emoji of the :train: in digits:train:
        lines.append(f"Trained on {_code(data)}.")
    if shards := params.get("shards"):
        lines.append(f"Training shards: `{shards}`.")
    if (seen := metrics.get("train/images_seen")) is not None:
        lines.append(f"Images seen in training, with repetitions: {seen:,.0f}.")
    if init := (spec.provenance.get("parent") or params.get("init")):
        lines.append(f"Started from the weights `{init}`.")
    return _list(lines) if lines else "Not recorded."


def _recipe(recipe: Mapping[str, Any]) -> str:
    found = recipe.get("choices")
    choices = [_inline(str(choice)) for choice in found] if isinstance(found, list) else []
    table = _table([(key, _text(value)) for key, value in _flat(recipe) if key != "choices" or not choices])
    return "\n\n".join(filter(None, (_list(choices), table)))


def _results(spec: ModelSpec, params: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    test = {name.removeprefix("test/"): value for name, value in metrics.items() if name.startswith("test/")}
    if "top_1" not in test:
        return "No evaluation was recorded when this version was registered."
    rows = []
    for name, label in {**_SHARES, "cross_entropy": "cross-entropy (nats)"}.items():
        if name in test and (name != "top_5" or spec.num_classes > 5):
            form = "{:.2%}" if name in _SHARES else "{:.4f}"
            limits = [test.get(f"{name}_{end}") for end in ("low", "high")]
            interval = "" if None in limits else " to ".join(form.format(limit) for limit in limits)
            rows.append((label, form.format(test[name]), interval))
    where = f" of `{params['test_shards']}`" if params.get("test_shards") else ""
    count = f"{test['num_examples']:,.0f} test images" if "num_examples" in test else "Test images"
    table = _table(rows, ("metric", "value", "95 % interval"))
    return f"{count}{where}; intervals by bootstrap over the images.\n\n{table}"


def _limits(spec: ModelSpec, metrics: Mapping[str, float]) -> str:
    lines = []
    if not spec.multi_label:
        lines.append("It always predicts one of its classes, even for an image of something else.")
    lines.append("The results hold for images like those of the test set; other cameras, crops or times may do worse.")
    error = metrics.get("test/ece")
    if error is None:
        lines.append("The calibration of its probabilities was not measured.")
    else:
        lines.append(f"Its probabilities are off by {error:.1%} on average (ECE, 15 bins); see the reliability plot.")
    lines.append("It inherits the biases of the training images and labels, and of the weights it started from.")
    return _list(lines)


def _provenance(spec: ModelSpec, weights: Weights) -> list[tuple[str, str]]:
    rows = [("weights (SHA-256)", f"`{weights.sha256}`"), ("size", f"{weights.num_bytes:,} bytes, `{weights.file}`")]
    rows += [(label, f"`{spec.provenance[key]}`") for key, label in _PROVENANCE.items() if spec.provenance.get(key)]
    return rows


def _use(name: str, alias: str) -> str:
    uri = f"models:/{name}@{alias}"
    return (
        f"```\nbit-ray predict photo.jpg --model '{uri}'\n"
        f"bit-ray predict photos/ --model '{uri}' --output predictions.parquet\n"
        f"mlflow models serve -m '{uri}' --env-manager local\n```"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return str(float(f"{value:.6g}"))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "none" if value is None else str(value)


def _table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> str:
    if not rows:
        return ""
    header = header or ("",) * len(rows[0])
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _inline(text: str) -> str:
    """Return a name from the data as plain text: Markdown's special characters in it are escaped."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in " ".join(text.split()))


def _code(text: str) -> str:
    """Return a text from the data as code, without its backticks."""
    return f"`{' '.join(text.replace('`', '').split())}`"


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
