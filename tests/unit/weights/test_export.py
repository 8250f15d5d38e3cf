"""Exported programs, run by onnxruntime and by a reloaded torch.export, against the network they were made of."""

import contextlib
import functools
import io
import json
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from bit_ray.cli.main import main
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.errors import ConfigError, ModelError
from bit_ray.inference.classifier import Classifier
from bit_ray.inference.exported import compare
from bit_ray.models.resnet import StdConv2d
from bit_ray.models.zoo import create_model
from bit_ray.progress import console
from bit_ray.weights.export import export, load_exported, quantize
from bit_ray.weights.package import ModelSpec, save_package

NAME = "R1-1-1-1x0.5"
NAMES = ("ant", "bee", "cow")
SPEC = ModelSpec(
    model=NAME,
    num_classes=3,
    class_names=NAMES,
    multi_label=False,
    resize_mode="square",
    resize_size=40,
    crop_size=40,
)
PROGRAMS = [("onnx", "model.onnx"), ("torch", "model.pt2")]
# The traced one is 2 x 80 x 96; 32 is the smallest, where stage 4 is a single place.
SIZES = [(1, 32, 32), (2, 80, 96), (1, 64, 64), (5, 97, 130), (3, 224, 161), (1, 33, 480)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model(NAME, 3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gn" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.startswith("head"):
                parameter.normal_(std=0.1)
            else:
                parameter.copy_(0.05 * torch.randn_like(parameter) + 0.02)
    return model


@pytest.fixture(scope="module")
def by_command(model, shards, tmp_path_factory):
    """Folder of an int8 ONNX program made by the command, as large ones are: its weights beside it; what it printed."""
    folder = tmp_path_factory.mktemp("exported")
    save_package(folder / "saved", model, SPEC)
    command = ["models", "export", str(folder / "saved"), "--output", str(folder / "programs" / "int8-model.onnx")]
    command += ["--format", "onnx", "--int8", "--shards", shards, "--num-images", "20"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr("bit_ray.weights.export._LARGEST_PROTOBUF", 100_000)
        patch.setattr(console, "_width", 200)
        assert main(command) == 0
    return folder / "programs", printed.getvalue()


@pytest.fixture(scope="module")
def programs(model, by_command):
    folder, _ = by_command
    for kind, name in PROGRAMS:
        export(model, SPEC, folder / name, kind)
    export(model, SPEC, folder / "int8-model.pt2", "torch", int8=True)
    return folder


@pytest.fixture(scope="module")
def loaded(programs):
    """A program by its name; reading one takes a second."""
    return functools.cache(lambda name: load_exported(programs / name))


def _pixels(batch, height, width):
    # Dark at the border: where padding matters, what stands beside it is below zero.
    pixels = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels[:, :, :6] -= 1
    return pixels


def _logits(model, pixels):
    with torch.inference_mode():
        return model(pixels).numpy()


def test_a_baked_network_has_plain_convolutions_and_the_same_output(model):
    baked = model.baked()
    assert not any(isinstance(module, StdConv2d) for module in baked.modules())
    assert sum(isinstance(module, nn.Conv2d) for module in baked.modules()) == 1 + 4 * 4
    kernel = baked.stages[1][0].conv2.weight.flatten(1).double()
    torch.testing.assert_close(kernel.mean(1), torch.zeros(64).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(kernel.var(1, correction=0), torch.ones(64).double(), rtol=1e-5, atol=0)
    np.testing.assert_array_equal(_logits(baked, _pixels(2, 64, 64)), _logits(model, _pixels(2, 64, 64)))
    assert any(isinstance(module, StdConv2d) for module in model.modules())


@pytest.mark.parametrize(("kind", "name"), PROGRAMS)
@pytest.mark.parametrize("size", SIZES)
def test_a_program_gives_the_logits_at_any_batch_and_image_size(loaded, model, kind, name, size):
    pixels = _pixels(*size)
    expected = _logits(model, pixels)
    assert expected.std() > 0.1
    np.testing.assert_allclose(loaded(name).logits(pixels.numpy()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_no_optimization_of_onnxruntime_changes_padding_and_pooling(programs, model, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(programs / "model.onnx"), options, providers=["CPUExecutionProvider"])
    pixels = _pixels(1, 32, 48)
    [logits] = session.run(["logits"], {"pixels": pixels.numpy()})
    np.testing.assert_allclose(logits, _logits(model, pixels), rtol=0, atol=1e-4)


def test_an_onnx_file_is_valid_and_says_what_it_takes(programs):
    proto = onnx.load(programs / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(str(programs / "model.onnx"), providers=["CPUExecutionProvider"])
    [taken], [given] = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type) == ("pixels", "tensor(float)")
    assert taken.shape[1] == 3
    assert [isinstance(axis, str) for axis in taken.shape] == [True, False, True, True]
    assert given.name == "logits"
    assert given.shape[1] == 3
    spec = json.loads(session.get_modelmeta().custom_metadata_map["bit_ray.spec"])
    assert spec["class_names"] == list(NAMES)
    assert (spec["resize_mode"], spec["crop_size"], spec["input_range"]) == ("square", 40, [-1.0, 1.0])


@pytest.mark.parametrize(("kind", "name"), PROGRAMS)
def test_a_program_carries_its_spec(programs, loaded, kind, name):
    exported = loaded(name)
    assert exported.spec == SPEC
    assert exported.num_bytes == (programs / name).stat().st_size


def test_large_onnx_files_keep_their_weights_beside_them(by_command, loaded):
    folder, _ = by_command
    assert (folder / "int8-model.onnx").stat().st_size < 400_000
    beside = (folder / "int8-model.onnx.data").stat().st_size
    assert beside > 2_000_000
    # Its logits are compared with the others' below.
    assert loaded("int8-model.onnx").num_bytes == (folder / "int8-model.onnx").stat().st_size + beside


def test_int8_is_the_nearest_of_255_levels_per_output():
    weight = torch.tensor([[0.5, -1.0, 0.004], [0.0, 0.0, 0.0], [254.0, -20.0, 3.0]])
    rounded, scale = quantize(weight)
    assert rounded.dtype == torch.int8
    assert rounded.tolist() == [[64, -127, 1], [0, 0, 0], [127, -10, 2]]
    torch.testing.assert_close(scale, torch.tensor([1 / 127, 1.0, 2.0]))


@pytest.mark.parametrize("size", SIZES[:4])
def test_int8_programs_agree_with_each_other_and_nearly_with_the_network(loaded, model, size):
    pixels = _pixels(*size)
    expected = _logits(model, pixels)
    baked = model.baked()
    for module in baked.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            rounded, scale = quantize(module.weight.detach())
            module.weight.data = rounded.float() * scale.view(-1, *[1] * (rounded.ndim - 1))
    simulated = _logits(baked, pixels)
    for _, name in PROGRAMS:
        logits = loaded(f"int8-{name}").logits(pixels.numpy())
        np.testing.assert_allclose(logits, simulated, rtol=0, atol=1e-4)
    difference = np.abs(simulated - expected).mean()
    assert 1e-4 < difference < 0.1 * expected.std()


@pytest.mark.parametrize(("kind", "name"), PROGRAMS)
def test_int8_is_a_quarter_of_the_size(programs, loaded, kind, name):
    ratio = loaded(f"int8-{name}").num_bytes / loaded(name).num_bytes
    assert 0.25 < ratio < 0.32  # names and the graph stay
    if kind == "onnx":
        proto = onnx.load(programs / f"int8-{name}")
        onnx.checker.check_model(proto, full_check=True)
        assert sum(node.op_type == "DequantizeLinear" for node in proto.graph.node) == 1 + 4 * 4 + 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    from PIL import Image

    random = np.random.default_rng(0)

    def examples():
        for i in range(50):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(file, "PNG")
            yield Example(id=f"{i:03d}", image=file.getvalue(), labels=(i % 3,))

    uri = str(tmp_path_factory.mktemp("shards") / "set")
    write_shards(examples(), uri, name="noise", class_names=NAMES, row_group_size=16)
    return uri


def test_a_comparison_is_that_of_the_logits_of_the_first_images(loaded, model, shards):
    found = compare(Classifier(model, SPEC), loaded("int8-model.onnx"), shards, 40, batch_size=7)
    assert found.num_examples == 40
    from bit_ray.data.images.decode import decode_image
    from bit_ray.data.shards.manifest import read_manifest
    from bit_ray.data.shards.read import read_tables

    tables = list(read_tables(shards, read_manifest(shards)))
    images = [image for table in tables for image in table["image"].to_pylist()][:40]
    labels = np.array([names[0] for table in tables for names in table["labels"].to_pylist()][:40])
    pixels = np.stack([decode_image(image) for image in images]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    ours = _logits(model, torch.from_numpy(pixels))
    theirs = loaded("int8-model.onnx").logits(pixels)
    assert found.agreement == (ours.argmax(1) == theirs.argmax(1)).mean()
    assert found.top_1 == ((ours.argmax(1) == labels).mean(), (theirs.argmax(1) == labels).mean())
    assert found.mean_difference == pytest.approx(np.abs(ours - theirs).mean(), rel=1e-2)
    assert found.largest_difference == pytest.approx(np.abs(ours - theirs).max(), rel=1e-2)
    assert found.spread == pytest.approx(ours.std(), rel=1e-3)


def test_a_set_of_other_classes_gives_no_accuracy(loaded, model, shards):
    spec = ModelSpec(**vars(SPEC) | {"class_names": ("x", "y", "z")})
    found = compare(Classifier(model, spec), loaded("model.onnx"), shards, 1000)
    assert (found.num_examples, found.agreement, found.top_1) == (50, 1.0, None)


def test_the_command_exports_and_prints_the_loss(by_command, loaded):
    folder, shown = by_command
    assert sorted(path.name for path in folder.iterdir() if "int8" in path.name and ".onnx" in path.name) == [
        "int8-model.onnx", "int8-model.onnx.data"
    ]  # fmt: skip
    assert re.search(r"top-1 .*%; the model's .*%, loss -?\d+\.\d\d points", shown)
    assert "20 images" in shown
    assert loaded("int8-model.onnx").spec.class_names == NAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "onnx", "--int8"), "--shards: empty with int8; accepted: a shard set to measure the loss on"),
        (("--format", "npz", "--int8"), "--int8: given with format npz; accepted: with onnx and torch; leave it out"),
        (("--format", "timm", "--shards", "x"), "--shards: given with format timm"),
        (("--format", "torch"), "a name that ends in .pt2 for torch; rename it"),
        (("--format", "tflite"), "accepted: 'onnx'"),
    ],
)
def test_the_command_refuses_what_cannot_be(tmp_path, model, capsys, arguments, message):
    save_package(tmp_path / "saved", model, SPEC)
    command = ["models", "export", str(tmp_path / "saved"), "--output", str(tmp_path / "model.x"), *arguments]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model.x").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_line(tmp_path, model, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"{package}: not installed, .*pip install onnx onnxruntime onnxscript"):
        export(model, SPEC, tmp_path / "model.onnx", "onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_what_is_no_program_of_ours_is_refused(tmp_path, name):
    with pytest.raises(ModelError, match="no such file"):
        load_exported(tmp_path / name)
    (tmp_path / name).write_text("text")
    with pytest.raises(ModelError, match="not a model that bit_ray exported") as error:
        load_exported(tmp_path / name)
    assert "\n" not in str(error.value)


def test_an_ending_that_does_not_fit_is_refused(tmp_path, model):
    with pytest.raises(
        ConfigError, match=r"output: .*model.pt; accepted: a name that ends in .pt2 for torch; rename it"
    ):
        export(model, SPEC, tmp_path / "model.pt", "torch")
