"""Weights in and out, against the programs whose formats they are: timm and Hugging Face transformers."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import StdConv2d as TimmStdConv2d
from timm.models.resnetv2 import ResNetV2 as TimmResNetV2
from transformers import AutoImageProcessor, BitConfig, BitForImageClassification

from bit_ray.models.zoo import create_model
from bit_ray.weights.folders import timm_name
from bit_ray.weights.foreign import build_network, foreign_spec
from bit_ray.weights.package import ModelSpec
from bit_ray.weights.read import read_weights
from bit_ray.weights.write import eps_effect, write_weights

SMALL = "R1-2-1-1x0.5"
NAMES = ("cat", "dog", "newt")


def _network(name=SMALL, num_classes=3, *, std=0.1, seed=0):
    """A network of random weights, kernels of the standard deviation given, with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    model = create_model(name, num_classes).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "gn" in key:
                parameter.copy_(0.2 * noise + (1.0 if key.endswith("weight") else 0.0))
            elif key.startswith("head"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(std * (noise + 0.3))
    return model


def _spec(name=SMALL, names=NAMES, **changes):
    settings = {
        "model": name,
        "num_classes": len(names),
        "class_names": names,
        "multi_label": False,
        "resize_mode": "shorter_side",
        "resize_size": 72,
        "crop_size": 64,
    }
    return ModelSpec(**settings | changes)


def _pixels(height=64, width=64):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _logits(model, pixels):
    with torch.inference_mode():
        out = model(pixels)
    return getattr(out, "logits", out)


def _small_timm(num_classes=3):
    def conv(*args, **kwargs):
        return TimmStdConv2d(*args, **kwargs, eps=1e-8)

    return TimmResNetV2([1, 2, 1, 1], width_factor=0.5, num_classes=num_classes, stem_type="fixed", conv_layer=conv)


@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_a_folder_for_timm_gives_timm_the_same_logits(tmp_path, size):
    model = _network()
    write_weights(model, _spec(), tmp_path / "timm", "timm")
    theirs = _small_timm().eval()
    theirs.load_state_dict(load_file(tmp_path / "timm" / "model.safetensors"))
    expected, logits = _logits(theirs, _pixels(*size)), _logits(model, _pixels(*size))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_timm_makes_a_published_size_of_the_folder_alone(tmp_path):
    model, spec = _network("R50x1"), _spec("R50x1")
    write_weights(model, spec, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(_logits(model, _pixels()), _logits(theirs, _pixels()), rtol=1e-4, atol=1e-5)
    view = timm.data.resolve_model_data_config(theirs)
    assert tuple(view["input_size"]) == (3, 64, 64)
    assert view["crop_pct"] == pytest.approx(64 / 72)
    assert tuple(view["mean"]) == tuple(view["std"]) == (0.5, 0.5, 0.5)
    assert view["interpolation"] == "bilinear"
    assert theirs.pretrained_cfg["label_names"] == list(NAMES)


@pytest.mark.parametrize("name", ["R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4"])
def test_timm_knows_the_names_of_the_published_sizes(name):
    assert timm_name(name) in timm.list_models("resnetv2_*_bit")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "folder"])
def test_what_timm_saves_is_read(tmp_path, kind):
    torch.manual_seed(0)
    theirs = _small_timm(5).eval()
    if kind == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "model.safetensors"
        save_file(theirs.state_dict(), path)
    elif kind == "pth":
        path = tmp_path / "model.pth"
        torch.save({"epoch": 3, "state_dict": theirs.state_dict()}, path)
    else:
        theirs = timm.create_model("resnetv2_50x1_bit", num_classes=5).eval()
        path = tmp_path / "folder"
        config = {"label_names": ["n1", "n2", "n3", "n4", "n5"], "label_descriptions": {"n2": "dog"}}
        timm.models.save_for_hf(theirs, path, model_config=config, safe_serialization=True)
    weights = read_weights(path)
    assert (weights.naming, weights.num_classes) == ("timm", 5)
    assert weights.model == ("R50x1" if kind == "folder" else SMALL)
    torch.testing.assert_close(
        _logits(build_network(weights), _pixels()), _logits(theirs, _pixels()), rtol=1e-4, atol=1e-5
    )
    if kind == "folder":
        spec = foreign_spec(weights)
        assert spec.class_names == ("n1", "dog", "n3", "n4", "n5")
        assert (spec.resize_mode, spec.resize_size, spec.crop_size) == ("shorter_side", 256, 224)
        assert spec.input_range == (-1.0, 1.0)


@pytest.mark.parametrize("name", [SMALL, "R1-1-1-1x1.5"])
@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_a_folder_for_hugging_face_gives_it_the_same_logits_and_names(tmp_path, name, size):
    model = _network(name)
    write_weights(model, _spec(name), tmp_path / "bit", "huggingface")
    theirs = BitForImageClassification.from_pretrained(tmp_path / "bit").eval()
    assert theirs.config.id2label == dict(enumerate(NAMES))
    expected, logits = _logits(theirs, _pixels(*size)), _logits(model, _pixels(*size))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("square", [True, False])
def test_its_image_processor_makes_our_view(tmp_path, square):
    import numpy as np
    from PIL import Image

    from bit_ray.data.images.resize import eval_view

    view = {"resize_mode": "square", "resize_size": 64} if square else {}
    spec = _spec(**view)
    write_weights(_network(), spec, tmp_path / "bit", "huggingface")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "bit")
    ramp = np.linspace(0, 255, 120)[:, None, None] * np.linspace(0.2, 1, 150)[None, :, None] * np.array([1, 0.5, 0.2])
    image = ramp.astype(np.uint8)
    theirs = processor(Image.fromarray(image), return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    ours = eval_view(image, resize_mode=spec.resize_mode, resize_size=spec.resize_size, crop_size=spec.crop_size)
    assert theirs.shape == ours.shape
    # Two bilinear resizes of 8 bits, with roundings of their own; half a pixel's shift would be 1 or 2 levels of 255.
    assert np.abs(theirs - (ours / 127.5 - 1)).mean() < 0.6 / 127.5


@pytest.mark.parametrize("kind", ["folder", "bare model", "bin"])
def test_what_transformers_saves_is_read(tmp_path, kind):
    torch.manual_seed(0)
    config = BitConfig(
        embedding_size=32, hidden_sizes=[128, 256, 512, 1024], depths=[1, 2, 1, 1], id2label=dict(enumerate(NAMES))
    )
    theirs = BitForImageClassification(config).eval()
    path = tmp_path / "bit"
    if kind == "folder":
        theirs.save_pretrained(path)
    elif kind == "bin":
        path = tmp_path / "pytorch_model.bin"
        torch.save(theirs.state_dict(), path)
    else:
        theirs.bit.save_pretrained(path)
    weights = read_weights(path)
    assert (weights.naming, weights.model) == ("huggingface", SMALL)
    if kind == "bare model":
        assert weights.num_classes == 0
        with torch.inference_mode():
            features = build_network(weights, 3, head="zero").forward_features(_pixels())
            torch.testing.assert_close(features, theirs.bit(_pixels()).pooler_output.flatten(1), rtol=1e-4, atol=1e-5)
        return
    torch.testing.assert_close(
        _logits(build_network(weights), _pixels()), _logits(theirs, _pixels()), rtol=1e-5, atol=1e-5
    )
    if kind == "folder":
        assert foreign_spec(weights).class_names == NAMES


@pytest.mark.parametrize("to", ["timm", "huggingface", "safetensors", "npz", "package"])
def test_a_round_trip_keeps_every_bit_and_what_the_format_can_say(tmp_path, to):
    from bit_ray.inference.classifier import load_model

    model, spec = _network(), _spec(multi_label=to == "huggingface")
    path = tmp_path / {"npz": "model.npz", "safetensors": "model.safetensors"}.get(to, to)
    write_weights(model, spec, path, to)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(NAMES))
    again = load_model(path, labels=str(labels) if to == "npz" else "")
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert again.spec.class_names == NAMES
    if to != "npz":
        assert (again.spec.resize_mode, again.spec.resize_size, again.spec.crop_size) == ("shorter_side", 72, 64)
        assert again.spec.multi_label == spec.multi_label
    assert len(again.sha256) == 64


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_rescaled_kernels_undo_the_other_eps_where_kernels_are_tiny(tmp_path, to):
    model = _network(std=1e-4)
    assert eps_effect(model) > 0.1  # 1e-8 of variance against 1e-8 of eps
    assert eps_effect(_network(std=0.1)) < 1e-5
    differences = []
    for rescale in (False, True):
        path = tmp_path / f"{to}-{rescale}"
        write_weights(model, _spec(), path, to, rescale=rescale)
        if to == "timm":
            theirs = _small_timm().eval()
            theirs.load_state_dict(load_file(path / "model.safetensors"))
        else:
            theirs = BitForImageClassification.from_pretrained(path).eval()
        differences.append((_logits(theirs, _pixels()) - _logits(model, _pixels())).abs().max().item())
    assert differences[0] > 1e-3
    assert differences[1] < 1e-5


def test_the_configs_are_plain_json_that_a_person_can_read(tmp_path):
    write_weights(_network(), _spec(), tmp_path / "bit", "huggingface")
    config = json.loads((tmp_path / "bit" / "config.json").read_text())
    assert config["architectures"] == ["BitForImageClassification"]
    assert config["hidden_sizes"] == [128, 256, 512, 1024]
    assert config["label2id"] == {"cat": 0, "dog": 1, "newt": 2}
