"""What a request to a served model may hold, without a server."""

import base64
import io
import math
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from PIL import Image

from bit_ray.errors import ConfigError
from bit_ray.inference.classifier import Classifier
from bit_ray.inference.serving import Limits, ServedClassifier
from bit_ray.models.zoo import create_model
from bit_ray.weights.package import ModelSpec

NAMES = ("a", "b", "c")
LIMITS = Limits(max_pixels=10_000, max_images=5, max_image_bytes=20_000)


def served(limits=LIMITS):
    spec = ModelSpec(
        model="R1-1-1-1x0.5",
        num_classes=3,
        class_names=NAMES,
        multi_label=False,
        resize_mode="shorter_side",
        resize_size=32,
        crop_size=32,
    )
    torch.manual_seed(0)
    return ServedClassifier(Classifier(create_model(spec.model, spec.num_classes), spec), limits)


SERVED = served()


def image(height=40, width=40, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def frame(*images):
    return pd.DataFrame({"image": pd.Series(images, dtype=object)})


def refused(said, request, params=None, by=SERVED):
    """Check that a request is answered by status 400 and one line."""
    with pytest.raises(MlflowException) as error:
        by.predict(request, params)
    assert error.value.get_http_status_code() == 400
    assert said in error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) < 400


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "images[1]: NoneType; accepted: the bytes of an image file, or its base64"),
        (math.nan, "images[1]: float; accepted"),
        (7, "images[1]: int; accepted"),
        ([b"x"], "images[1]: list; accepted"),
        (np.zeros(3), "images[1]: ndarray; accepted"),
        ("\ud800", "images[1]: text that is not base64"),
        ("no base64!", "images[1]: text that is not base64"),
        ("", "images[1]: zero bytes"),
        (b"", "images[1]: zero bytes"),
        (b"no image", "images[1]: not an image of a known format"),
        (base64.b64encode(b"no image").decode(), "images[1]: not an image of a known format"),
        (image(200, 200), "images[1]: 200 x 200 pixels, a decompression bomb; accepted: at most 10000 pixels"),
        (bytes(20_001), "images[1]: 20001 bytes; accepted: at most 20000"),
        (base64.b64encode(bytes(20_001)).decode(), "images[1]: 20001 bytes; accepted: at most 20000"),
    ],
)
def test_what_is_no_image_is_the_fault_of_the_request(given, said):
    refused(said, frame(image(), given))


@pytest.mark.parametrize("top_k", ["x", None, math.nan, 0, -1, 2.5, True, [5], "9" * 10_000])
def test_a_top_k_that_is_no_count_is_the_fault_of_the_request(top_k):
    refused("top_k: ", frame(image()), {"top_k": top_k})


@pytest.mark.parametrize("convert", ["false", None, 1, math.nan, []])
def test_a_convert_that_is_neither_true_nor_false_is_the_fault_of_the_request(convert):
    refused("convert: ", frame(image()), {"convert": convert})


@pytest.mark.parametrize(
    "request_",
    [
        pd.DataFrame({"photo": [image()]}),
        pd.DataFrame([[image(), image()]], columns=["image", "image"]),
        pd.DataFrame(),
        {"image": [image()]},
        [image()],
        None,
    ],
)
def test_a_request_without_one_column_of_images_is_refused(request_):
    refused("request: not a table with one column 'image'", request_)


def test_a_request_of_no_or_too_many_images_is_refused():
    refused("request: 0 images; accepted: 1 to 5", frame())
    refused("request: 6 images; accepted: 1 to 5", frame(*[image()] * 6))
    assert len(SERVED.predict(frame(*[image()] * 5))) == 5


def test_bytes_and_base64_are_the_same_image():
    data = image()
    answers = SERVED.predict(frame(data, bytearray(data), base64.b64encode(data), base64.b64encode(data).decode()))
    assert len(answers) == 4
    assert answers["probability"].nunique() == 1


@pytest.mark.parametrize("top_k", [1, np.int64(2), 3, 10**30])
def test_a_top_k_beyond_the_classes_names_them_all(top_k):
    [classes] = SERVED.predict(frame(image()), {"top_k": top_k, "convert": np.True_})["classes"]
    assert len(classes) == min(top_k, 3)


def test_images_of_a_request_are_decoded_one_at_a_time():
    side = 1000
    data = image(side, side)
    by = served(Limits())
    by.predict(frame(data))
    tracemalloc.start()
    try:
        by.predict(frame(*[data] * 40))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 3 * side * side  # of NumPy's memory; 40 images would be 40 times 3 MB


def test_an_image_of_24_megapixels_is_served_unless_the_limit_is_lower():
    data = image(4000, 6000, "JPEG")
    assert len(served(Limits()).predict(frame(data))) == 1
    refused("6000 x 4000 pixels, a decompression bomb", frame(data), by=served(Limits(max_pixels=23_000_000)))


def test_limits_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("BIT_RAY_SERVING_MAX_PIXELS", "123")
    monkeypatch.setenv("BIT_RAY_SERVING_MAX_IMAGES", "4")
    monkeypatch.setenv("BIT_RAY_SERVING_MAX_IMAGE_BYTES", "")
    assert Limits.from_environment() == Limits(max_pixels=123, max_images=4)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1e6", "²", "1" * 5000, "1\n"])
def test_a_limit_that_is_no_count_is_refused(value, monkeypatch):
    monkeypatch.setenv("BIT_RAY_SERVING_MAX_IMAGES", value)
    with pytest.raises(
        ConfigError, match="^BIT_RAY_SERVING_MAX_IMAGES: .*; accepted: (a whole number of )?at least 1; "
    ) as error:
        Limits.from_environment()
    assert "\n" not in str(error.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(), items, max_size=3),
    max_leaves=5,
)
IMAGES = st.lists(ANYTHING | st.sampled_from([image(), base64.b64encode(image()).decode()]), max_size=6)
PARAMS = st.none() | st.dictionaries(st.sampled_from(["top_k", "convert", "other"]), ANYTHING | st.just(2), max_size=3)


def status(images, params):
    """Status of the answer, and the message or the table."""
    try:
        return 200, SERVED.predict(frame(*images), params)
    except MlflowException as error:
        return error.get_http_status_code(), error.message


@given(images=IMAGES, params=PARAMS)
@settings(max_examples=300, deadline=None)
def test_any_request_is_answered_or_refused_in_one_line(images, params):
    code, answer = status(images, params)
    assert code in (200, 400)
    assert "\n" not in answer if code == 400 else len(answer) == len(images)
