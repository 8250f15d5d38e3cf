import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image

from bit_ray import store
from bit_ray.errors import ConfigError, DataError, ModelError
from bit_ray.inference.classifier import Classifier, load_model
from bit_ray.models.zoo import create_model
from bit_ray.weights.package import ModelSpec, load_package, save_package

NAME = "R1-1-1-1x0.5"
NAMES = tuple("abcdefg")


def _spec(**changes):
    settings = {
        "model": NAME,
        "num_classes": 7,
        "class_names": NAMES,
        "multi_label": False,
        "resize_mode": "square",
        "resize_size": 40,
        "crop_size": 40,
    }
    return ModelSpec(**settings | changes)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model(NAME, 7)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    return model


@pytest.fixture
def classifier(model):
    return Classifier(model, _spec())


@pytest.fixture
def package(tmp_path, model):
    save_package(tmp_path / "package", model, _spec())
    return tmp_path / "package"


def _image(height=40, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _expected_logits(model, pixels):
    with torch.no_grad():
        return model((torch.from_numpy(pixels).permute(2, 0, 1)[None].float() - 127.5) / 127.5)[0]


def test_one_image_gives_its_classes_in_falling_probability(classifier, model):
    image = _image()
    probabilities = _expected_logits(model, image).softmax(0)
    [prediction] = classifier.predict(image, top_k=3)
    order = probabilities.argsort(descending=True)[:3]
    assert [name for name, _ in prediction] == [NAMES[index] for index in order]
    assert [score for _, score in prediction] == pytest.approx(probabilities[order].tolist(), abs=1e-5)
    [everything] = classifier.predict(image, top_k=100)
    assert sum(score for _, score in everything) == pytest.approx(1.0)
    assert len(everything) == 7


def test_a_multi_label_model_gives_independent_scores(model):
    image = _image()
    [prediction] = Classifier(model, _spec(multi_label=True)).predict(image, top_k=7)
    expected = dict(zip(NAMES, _expected_logits(model, image).sigmoid().tolist(), strict=True))
    assert dict(prediction) == pytest.approx(expected, abs=1e-5)


def test_paths_bytes_pillow_images_and_arrays_agree(classifier, tmp_path):
    pixels = _image()
    path = tmp_path / "image.png"
    path.write_bytes(_encoded(pixels))
    inputs = [path, str(path), path.read_bytes(), Image.open(path), pixels, pixels[::-1].copy()[::-1]]
    predictions = classifier.predict(inputs)
    assert len(predictions) == 6
    for prediction in predictions[1:]:
        assert [name for name, _ in prediction] == [name for name, _ in predictions[0]]
        assert [s for _, s in prediction] == pytest.approx([s for _, s in predictions[0]], abs=1e-6)


def test_batching_changes_nothing_and_keeps_the_order(classifier):
    images = [_image(20 + seed, 50 - seed, seed) for seed in range(7)]
    together = classifier.predict(iter(images), top_k=7, batch_size=3)
    alone = [classifier.predict(image, top_k=7)[0] for image in images]
    assert len({tuple(prediction) for prediction in together}) == 7
    for ours, theirs in zip(together, alone, strict=True):
        assert dict(ours) == pytest.approx(dict(theirs), abs=1e-5)
    assert classifier.predict([]) == []


def test_the_view_and_the_input_range_are_the_specs(model):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = _image()  # what a centre crop of the right height keeps
    spec = _spec(resize_mode="shorter_side", input_range=(0.0, 1.0))
    [prediction] = Classifier(model, spec).predict(wide, top_k=7)
    with torch.no_grad():
        logits = model(torch.from_numpy(wide[:, 40:80]).permute(2, 0, 1)[None].float() / 255)[0]
    assert dict(prediction) == pytest.approx(dict(zip(NAMES, logits.softmax(0).tolist(), strict=True)), abs=1e-5)


def test_logits_take_tensors_and_arrays_at_the_crop_size(classifier, model):
    batch = np.stack([_image(seed=1), _image(seed=2)])
    logits = classifier.logits(torch.from_numpy(batch))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, classifier.logits(batch))
    expected = torch.stack([_expected_logits(model, image) for image in batch])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert classifier.device == torch.device("cpu")


@pytest.mark.parametrize("shape", [(2, 32, 40, 3), (40, 40, 3), (1, 3, 40, 40)])
def test_logits_of_another_shape_or_type_are_refused(classifier, shape):
    with pytest.raises(DataError, match=r"batch: .+; accepted: \[B, 40, 40, 3\] uint8; resize the images first"):
        classifier.logits(np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match="float32; "):
        classifier.logits(torch.zeros(1, 40, 40, 3))


def _gray():
    return _encoded(_image()[:, :, 0])


def _cut_off_pillow_image():
    data = _encoded(_image(200, 200))
    return Image.open(io.BytesIO(data[: len(data) // 2]))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (_gray, "grayscale; accepted: 8-bit RGB; pass convert=True"),
        (lambda: _encoded(np.zeros((8, 8, 4), np.uint8)), "alpha; accepted"),
        (lambda: b"", "zero bytes; accepted: a complete image"),
        (lambda: b"hello", "not an image"),
        (lambda: _encoded(_image(64, 64), "JPEG")[:500], "accepted: a complete image"),
        (lambda: Path("absent.jpg"), "(absent.jpg): No such file or directory"),
        (lambda: "/", "(/): Is a directory"),
        (lambda: Image.new("L", (40, 40)), "Pillow image of mode L; accepted: RGB; pass image.convert('RGB')"),
        (_cut_off_pillow_image, "truncated or damaged"),
        (lambda: np.zeros((40, 40), np.uint8), "array [40, 40] uint8; accepted: [H, W, 3] uint8"),
        (lambda: np.zeros((2, 40, 40, 3), np.uint8), "pass several images as a list"),
        (lambda: np.zeros((40, 40, 3), np.float32), "array [40, 40, 3] float32"),
        (lambda: np.zeros((0, 40, 3), np.uint8), "array [0, 40, 3]"),
        (lambda: 7, "int; accepted: a path, bytes, a Pillow image or a numpy array"),
        (lambda: None, "NoneType; accepted: a path, bytes, a Pillow image or a numpy array"),
        (lambda: "a\0b", "('a\\x00b'): not a path; accepted: a readable image file"),
        (lambda: "two\nlines", "('two\\nlines'): No such file or directory"),
        (lambda: "a" * 5000, "aaa...): File name too long"),
        (lambda: "\ud800", "('\\ud800'): not a path"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(classifier, image, said):
    with pytest.raises(DataError) as error:
        classifier.predict([_image(), image()])
    message = str(error.value)
    assert message.startswith("images[1]")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("images", [None, 7, 1.5])
def test_what_is_neither_an_image_nor_several_is_named(classifier, images):
    with pytest.raises(DataError, match=rf"^images\[0\]: {type(images).__name__}; accepted: a path, bytes, "):
        classifier.predict(images)


@pytest.mark.parametrize(("setting", "value"), [("top_k", "x"), ("top_k", None), ("top_k", 2.5), ("batch_size", True)])
def test_what_is_no_count_is_refused(classifier, setting, value):
    with pytest.raises(
        ConfigError, match=f"^{setting}: {value!r}; accepted: a whole number of at least 1; for example"
    ):
        classifier.predict(_image(), **{setting: value})


def test_a_convert_that_is_neither_true_nor_false_is_refused(classifier):
    with pytest.raises(ConfigError, match="^convert: 'no'; accepted: true or false; for example convert=True"):
        classifier.predict(_image(), convert="no")


def test_max_pixels_limits_what_is_decoded(classifier):
    classifier.predict(_encoded(_image(50, 60)), max_pixels=3000)
    with pytest.raises(DataError, match=r"^images\[0\]: 60 x 50 pixels, a decompression bomb; accepted: at most 2999"):
        classifier.predict(_encoded(_image(50, 60)), max_pixels=2999)


def test_convert_takes_a_gray_image_as_three_equal_channels(classifier):
    gray = np.repeat(_image()[:, :, :1], 3, axis=2)
    converted = classifier.predict(_gray(), convert=True)
    assert dict(converted[0]) == pytest.approx(dict(classifier.predict(gray)[0]), abs=1e-6)


@pytest.mark.parametrize("setting", ["top_k", "batch_size"])
def test_counts_below_one_are_refused(classifier, setting):
    with pytest.raises(ConfigError, match=f"{setting}: 0; accepted: a whole number of at least 1"):
        classifier.predict(_image(), **{setting: 0})


def test_a_head_that_does_not_match_the_class_names_is_refused(model):
    with pytest.raises(ModelError, match="the head has 7 classes, the spec 2 class names"):
        Classifier(model, _spec(num_classes=2, class_names=("a", "b")))


def assert_same(predictions, expected):
    """The same classes and probabilities, up to rounding: weights that lie elsewhere in memory take another kernel."""
    assert [[name for name, _ in best] for best in predictions] == [[name for name, _ in best] for best in expected]
    for best, wanted in zip(predictions, expected, strict=True):
        assert [p for _, p in best] == pytest.approx([p for _, p in wanted], rel=1e-5, abs=1e-9)


def test_a_local_package_is_loaded_by_path_or_file_uri(package, classifier):
    image = _image()
    for uri in (package, str(package), f"file://{package}"):
        loaded = load_model(uri)
        assert loaded.spec == _spec()
        assert_same(loaded.predict(image), classifier.predict(image))


def test_a_missing_directory_a_damaged_package_and_an_unknown_place_are_refused(package, tmp_path):
    accepted = "a saved model, models:/NAME@ALIAS, or a name that bit-ray models known lists"
    with pytest.raises(ModelError, match=rf"absent: no such directory; accepted: {accepted}; check the path$"):
        load_model(tmp_path / "absent")
    with pytest.raises(DataError, match=r"scheme http://"):
        load_model("http://example.com/model")
    with pytest.raises(ConfigError, match=r"device: 'gpu'; accepted: a device that torch has here") as error:
        load_model(package, device="gpu")
    assert "\n" not in str(error.value)
    (package / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model.safetensors: 0 bytes; accepted: \d+, as in model.json"):
        load_model(package)


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, tmp_path, monkeypatch):
    """The URI of a new bucket, with the cache in a folder of its own."""
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in (settings | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BIT_RAY_CACHE", str(tmp_path / "cache"))
    files, _ = store.filesystem("s3://any/path?allow_bucket_creation=true")
    name = f"bucket-{tmp_path.name.replace('_', '-').lower()}"
    files.create_dir(name)
    return f"s3://{name}"


def _upload(package, uri):
    for file in package.iterdir():
        store.upload_file(file, store.join(uri, file.name))


def test_a_remote_package_is_fetched_once_and_kept_by_digest(package, bucket, tmp_path, classifier):
    (package / "optimizer.bin").write_bytes(b"not part of the model")
    _upload(package, f"{bucket}/models/one")
    image = _image()
    assert_same(load_model(f"{bucket}/models/one").predict(image), classifier.predict(image))
    [cached] = (tmp_path / "cache" / "models").iterdir()
    assert sorted(path.name for path in cached.iterdir()) == ["model.json", "model.safetensors"]
    load_package(cached)

    # From the cache: the weights are gone from the store, the description is not.
    store.delete_files([f"{bucket}/models/one/model.safetensors"])
    assert_same(load_model(f"{bucket}/models/one/").predict(image), classifier.predict(image))


def test_a_damaged_cache_is_fetched_again(package, bucket, tmp_path, classifier):
    _upload(package, f"{bucket}/one")
    load_model(f"{bucket}/one")
    [cached] = (tmp_path / "cache" / "models").iterdir()
    (cached / "model.safetensors").write_bytes(b"rot")
    assert_same(load_model(f"{bucket}/one").predict(_image()), classifier.predict(_image()))
    load_package(cached)


def test_a_flipped_bit_in_the_cache_is_found_and_the_package_fetched_again(package, bucket, tmp_path, classifier):
    _upload(package, f"{bucket}/one")
    load_model(f"{bucket}/one")
    [cached] = (tmp_path / "cache" / "models").iterdir()
    weights = bytearray((cached / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (cached / "model.safetensors").write_bytes(weights)
    assert_same(load_model(f"{bucket}/one").predict(_image()), classifier.predict(_image()))
    load_package(cached)


def test_a_package_is_kept_in_the_cache_that_is_named(package, bucket, tmp_path):
    _upload(package, f"{bucket}/one")
    load_model(f"{bucket}/one", cache=tmp_path / "named")
    [kept] = (tmp_path / "named").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["model.json", "model.safetensors"]
    assert not (tmp_path / "cache").exists()


def test_what_a_killed_process_had_fetched_is_removed_from_the_cache(package, bucket, tmp_path):
    _upload(package, f"{bucket}/one")
    left = tmp_path / "cache" / "models" / f".another.{'0' * 32}.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    load_model(f"{bucket}/one")
    assert [path.name.startswith(".") for path in left.parent.iterdir()] == [False]


def test_a_remote_package_that_is_missing_or_damaged_leaves_no_cache(package, bucket, tmp_path):
    with pytest.raises(
        ModelError, match=r"s3://.+/absent/model.json: no such .+; accepted: a saved model, with a model.json"
    ):
        load_model(f"{bucket}/absent")
    data = bytearray((package / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (package / "model.safetensors").write_bytes(data)
    _upload(package, f"{bucket}/one")
    with pytest.raises(ModelError, match=r"^s3://.+/one: .+SHA-256 ") as error:
        load_model(f"{bucket}/one")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_predict_works_where_ray_and_mlflow_cannot_be_imported(package, tmp_path):
    (tmp_path / "image.png").write_bytes(_encoded(_image(60, 50)))
    script = """
import sys
sys.modules["ray"] = sys.modules["mlflow"] = None
import bit_ray
[prediction] = bit_ray.load_model(sys.argv[1]).predict(sys.argv[2], top_k=2)
print(len(prediction), [name for name in sys.modules if name.split(".")[0] in ("ray", "mlflow")])
"""
    command = [sys.executable, "-c", script, str(package), str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.stdout == "2 ['ray', 'mlflow']\n", done.stderr
