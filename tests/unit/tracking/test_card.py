from dataclasses import replace

import pytest

from bit_ray.tracking.card import MARK, MAX_DESCRIPTION, description, model_card
from bit_ray.weights.package import ModelSpec
from bit_ray.weights.tensor_files import Weights

SPEC = ModelSpec(
    model="R50x1",
    num_classes=3,
    class_names=("cat", "dog", "a|b *c*"),
    multi_label=False,
    resize_mode="shorter_side",
    resize_size=256,
    crop_size=224,
    recipe={"profile": "code", "boundaries": [200, 300], "mixup_alpha": 0.0, "random_flip": True, "view": {"size": 9}},
    provenance={
        "manifest_digest": "ab12",
        "config_digest": "cd34",
        "code_revision": "ef56",
        "parent": "models:/up@champion",
        "parent_digest": "0123",
        "data": "pets: 3,680 images of 37 classes",
        "run_id": "77aa",
    },
)
WEIGHTS = Weights(file="model.safetensors", sha256="f" * 64, num_bytes=94_123_456)
METRICS = {
    "test/top_1": 0.912345,
    "test/top_1_low": 0.9,
    "test/top_1_high": 0.925,
    "test/cross_entropy": 0.31,
    "test/ece": 0.0417,
    "test/num_examples": 3669.0,
    "train/images_seen": 256_000.0,
    "train/loss": 0.1,
}
PARAMS = {"shards": "s3://data/pets", "test_shards": "s3://data/pets-test", "init": "models:/up@champion"}


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0].strip()


def test_the_card_says_what_was_recorded() -> None:
    card = model_card("pets", SPEC, WEIGHTS, params=PARAMS, metrics=METRICS)
    assert card.startswith(
        f"{MARK}\n# pets\n\n3 classes, 91.2% top-1, from `models:/up@champion`. Image classifier: BiT"
    )
    assert [line[3:] for line in card.splitlines() if line.startswith("## ")] == [
        "Intended input",
        "Data",
        "Recipe",
        "Results",
        "Limits",
        "Provenance",
        "Use",
    ]
    assert "shorter side of 256 pixels and cropped to the central 224 x 224 pixels" in section(card, "Intended input")
    assert "0 to 255 become -1 to 1" in section(card, "Intended input")
    assert "Trained on `pets: 3,680 images of 37 classes`." in section(card, "Data")
    assert "`s3://data/pets`" in section(card, "Data")
    assert "256,000" in section(card, "Data")
    results = section(card, "Results")
    assert results.startswith("3,669 test images of `s3://data/pets-test`")
    assert "| top-1 | 91.23% | 90.00% to 92.50% |" in results
    assert "| cross-entropy (nats) | 0.3100 |  |" in results
    assert "train" not in results
    assert "off by 4.2% on average" in section(card, "Limits")
    for digest in ("f" * 64, "ab12", "cd34", "ef56", "models:/up@champion", "0123", "77aa"):
        assert f"`{digest}`" in section(card, "Provenance")
    assert "mlflow models serve -m 'models:/pets@champion' --env-manager local" in section(card, "Use")


def test_the_recipe_is_a_row_per_setting() -> None:
    recipe = section(model_card("pets", SPEC, WEIGHTS), "Recipe")
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in recipe.splitlines()[2:]]
    assert rows == [
        ("profile", "code"),
        ("boundaries", "200, 300"),
        ("mixup_alpha", "0.0"),
        ("random_flip", "yes"),
        ("view.size", "9"),
    ]


def test_the_same_model_has_the_same_card() -> None:
    first = model_card("pets", SPEC, WEIGHTS, params=PARAMS, metrics=METRICS)
    shuffled = dict(reversed(METRICS.items()))
    assert model_card("pets", SPEC, WEIGHTS, params=dict(reversed(PARAMS.items())), metrics=shuffled) == first


def test_what_was_not_recorded_is_said_to_be_missing() -> None:
    bare = replace(SPEC, recipe={}, provenance={}, resize_mode="square")
    card = model_card("pets", bare, WEIGHTS)
    assert section(card, "Data") == "Not recorded."
    assert section(card, "Recipe") == "Not recorded."
    assert section(card, "Results") == "No evaluation was recorded when this version was registered."
    assert "was not measured" in section(card, "Limits")
    assert "resized to 224 x 224 pixels without keeping its aspect ratio" in section(card, "Intended input")


def test_class_names_mean_nothing_to_markdown_and_many_are_counted() -> None:
    assert "Classes: cat, dog, a\\|b \\*c\\*." in model_card("pets", SPEC, WEIGHTS)
    many = replace(SPEC, num_classes=1000, class_names=tuple(f"class {i}" for i in range(1000)), multi_label=True)
    card = model_card("many", many, WEIGHTS)
    assert "class 19, and 980 more in `model.json`" in card
    assert "class 20" not in card
    assert "1,000 classes" in card
    assert "several labels per image" in card
    assert "sigmoid" in card


def test_no_password_of_a_uri_is_in_the_card() -> None:
    told = "s3://AK:PLAN/TED@bucket/x"
    spec = replace(SPEC, recipe={"init": told, "more": [told]}, provenance={"parent": told, "data": told})
    card = model_card("pets", spec, WEIGHTS, params={"shards": told, "test_shards": told}, metrics=METRICS)
    assert "PLAN" not in card
    assert "TED" not in card
    assert "Training shards: `s3://***@bucket/x`." in card


@pytest.mark.parametrize("length", [10, 4000, 6000])
def test_the_description_has_room_in_mlflow(length: int) -> None:
    card = model_card("pets", replace(SPEC, recipe={f"setting {i}": "x" * 20 for i in range(length // 30)}), WEIGHTS)
    text = description(card)
    assert len(text) <= MAX_DESCRIPTION
    assert text.startswith("3 classes, from `models:/up@champion`. Image classifier: ")
    if len(card) <= MAX_DESCRIPTION:
        assert card.endswith(text)
    else:
        assert text.endswith("(Shortened; the full card is README.md next to the weights.)\n")
        assert text.split("\n\n(Shortened")[0] in card


def test_choices_are_a_list_and_a_top_5_of_few_classes_is_left_out() -> None:
    spec = replace(SPEC, recipe={"choices": ["view: 32, no flips", "chosen: *head*"], "temperature": 2.48082047864029})
    metrics = {**METRICS, "test/top_5": 1.0}
    card = model_card("pets", spec, WEIGHTS, metrics=metrics)
    assert section(card, "Recipe").startswith("- view: 32, no flips\n- chosen: \\*head\\*\n\n|")
    assert "| temperature | 2.48082 |" in section(card, "Recipe")
    assert "top-5" not in card
    six = replace(spec, num_classes=6, class_names=tuple("abcdef"))
    assert "| top-5 | 100.00% |" in model_card("pets", six, WEIGHTS, metrics=metrics)
