"""Weights of other programs: found out, checked and read. Against the programs themselves: tests/reference."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bit_ray.errors import ConfigError, ModelError
from bit_ray.inference.classifier import load_model
from bit_ray.models.zoo import create_model
from bit_ray.training.initial_weights import read_init
from bit_ray.weights.class_names import label_names
from bit_ray.weights.foreign import build_network, foreign_spec
from bit_ray.weights.naming import NAMINGS, is_kernel, to_ours, to_theirs, weight_names
from bit_ray.weights.npz import save_npz
from bit_ray.weights.package import save_package
from bit_ray.weights.read import read_weights
from bit_ray.weights.write import named_tensors, write_weights

TINY = "R1-2-1-1x0.5"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model(TINY, 4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("ant\nbee\n\ncow\n dog \n")
    return str(path)


def _equal(tensors, model):
    expected = model.state_dict()
    return tensors.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in tensors.items())


def _big_vision(units, num_classes):
    """The names and shapes of big_vision:models/bit_paper.py at width 0.5, spelled out from its flax modules."""
    shapes = {"root_block/conv_root/kernel": (7, 7, 3, 32)}
    channels = 32
    for block, count in enumerate(units, start=1):
        mid = 32 * 2 ** (block - 1)
        for unit in range(1, count + 1):
            prefix = f"block{block}/unit{unit:02d}/"
            for n, size, into, out in ((1, 1, channels, mid), (2, 3, mid, mid), (3, 1, mid, 4 * mid)):
                shapes[f"{prefix}conv{n}/kernel"] = (size, size, into, out)
                shapes[f"{prefix}gn{n}/scale"] = shapes[f"{prefix}gn{n}/bias"] = (1, 1, 1, into)
            if unit == 1:
                shapes[f"{prefix}conv_proj/kernel"] = (1, 1, channels, 4 * mid)
            channels = 4 * mid
    shapes["norm-pre-head/scale"] = shapes["norm-pre-head/bias"] = (1, 1, 1, channels)
    return shapes | {"head/kernel": (channels, num_classes), "head/bias": (num_classes,)}


def _save_big_vision(model, path, prefix="params/", **extra):
    arrays = {f"{prefix}{name}": tensor.numpy() for name, tensor in named_tensors(model, "big_vision").items()}
    np.savez(path, **arrays, **extra)


def test_big_vision_names_and_shapes_are_its_modules(model):
    tensors = named_tensors(model, "big_vision")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == _big_vision((1, 2, 1, 1), 4)
    ours = model.stages[1][1].conv2.weight
    assert tensors["block2/unit02/conv2/kernel"][0, 2, 5, 7] == ours[7, 5, 0, 2]
    assert tensors["head/kernel"][9, 3] == model.head.weight[3, 9]


@pytest.mark.parametrize("prefix", ["params/", "opt/target/", ""])
def test_big_vision_checkpoints_are_read_and_their_optimizer_left_aside(tmp_path, model, prefix):
    beside = {"opt/0/mu/root_block/conv_root/kernel": np.zeros((7, 7, 3, 32), np.float32), "opt/0/count": np.ones(())}
    _save_big_vision(model, tmp_path / "model.npz", prefix, **beside)
    weights = read_weights(tmp_path / "model.npz")
    assert (weights.naming, weights.model, weights.num_classes) == ("big_vision", TINY, 4)
    assert _equal(weights.tensors, model)


def test_bfloat16_as_numpy_stores_it_is_read(tmp_path, model):
    arrays = {}
    for name, tensor in named_tensors(model, "big_vision").items():
        arrays[f"params/{name}"] = tensor.bfloat16().view(torch.int16).numpy().view(np.dtype("V2"))
    np.savez(tmp_path / "model.npz", **arrays)
    tensors = read_weights(tmp_path / "model.npz").tensors
    assert all(torch.equal(tensors[name], tensor.bfloat16().float()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("naming", ["bit_ray", "timm", "huggingface", "bit_pytorch"])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "DataParallel"])
def test_state_dicts_are_read_however_they_were_saved(tmp_path, model, naming, kind):
    tensors = named_tensors(model, naming)
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth.tar")
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "pth":
        torch.save(tensors, path)
    elif kind == "wrapped":
        torch.save({"step": 7, "model": tensors, "optim": {}}, path)
    else:
        torch.save({"step": 7, "model": {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
    weights = read_weights(path)
    assert (weights.naming, weights.model, weights.num_classes) == (naming, TINY, 4)
    assert _equal(weights.tensors, model)


@pytest.mark.parametrize("name", NAMINGS)
def test_each_naming_is_one_to_one_and_its_layout_undone(model, name):
    names = weight_names(NAMINGS[name], model.config.units)
    assert len(set(names.values())) == len(names) == len(model.state_dict())
    assert sum(map(is_kernel, names)) == 1 + 5 * 3 + 4
    for ours, tensor in model.state_dict().items():
        assert torch.equal(to_ours(NAMINGS[name], ours, to_theirs(NAMINGS[name], ours, tensor)), tensor)


def test_a_head_of_another_size_is_refused_with_the_remedy_or_replaced_by_zeros(tmp_path, model):
    torch.save(named_tensors(model, "timm"), tmp_path / "model.pth")
    weights = read_weights(tmp_path / "model.pth")
    with pytest.raises(ModelError, match=r"holds a head of 4 classes, wanted is one of 9; pass head='zero'"):
        build_network(weights, 9)
    network = build_network(weights, 9, head="zero")
    assert network.head.weight.shape == (9, 1024)
    assert not network.head.weight.any()
    assert torch.equal(network.root.weight, model.root.weight)
    with pytest.raises(ConfigError, match="accepted: 'load' or 'zero'"):
        build_network(weights, head="new")


def test_weights_without_a_head_give_features_and_say_so_when_asked_for_classes(tmp_path, model):
    tensors = {name: t for name, t in named_tensors(model, "timm").items() if "head" not in name}
    torch.save(tensors, tmp_path / "model.pth")
    weights = read_weights(tmp_path / "model.pth")
    assert weights.num_classes == 0
    assert not any(name.startswith("head") for name in weights.tensors)
    with pytest.raises(ModelError, match="holds no head"):
        load_model(tmp_path / "model.pth")
    with pytest.raises(ModelError, match="holds no head, wanted is one"):
        build_network(weights)
    image = np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8)
    save_npz(model, tmp_path / "nameless.npz")  # four classes without names
    headless, nameless = (load_model(tmp_path / name, features_only=True) for name in ("model.pth", "nameless.npz"))
    named = load_model(tmp_path / "nameless.npz", labels=["ant", "bee", "cow", "dog"])
    views = named.view(image)[None]
    expected = named.features_and_logits(views)[0]
    assert torch.equal(headless.features_and_logits(views)[0], expected)
    assert torch.equal(nameless.features_and_logits(views)[0], expected)


@pytest.mark.parametrize("kind", ["npz", "big_vision", "timm", "huggingface folder"])
def test_fine_tuning_starts_from_any_of_them_with_digest_and_parent(tmp_path, model, kind, labels):
    from hashlib import sha256

    if kind == "npz":
        path = tmp_path / "BiT.npz"
        save_npz(model, path)
    elif kind == "big_vision":
        path = tmp_path / "BiT.npz"
        _save_big_vision(model, path)
    elif kind == "timm":
        path = tmp_path / "BiT.safetensors"
        save_file(named_tensors(model, "timm"), path)
    else:
        path = tmp_path / "BiT"
        save_package(tmp_path / "saved", model, foreign_spec(_read(model, tmp_path), labels))
        saved = load_model(tmp_path / "saved")
        write_weights(saved.model, saved.spec, path, "huggingface")
    init = read_init(str(path), None)
    assert (init.model, init.parent) == (TINY, "BiT")
    file = path / "model.safetensors" if path.is_dir() else path
    assert init.digest == sha256(file.read_bytes()).hexdigest()
    assert all(torch.equal(init.tensors[n], t) for n, t in model.state_dict().items() if not n.startswith("head"))


def _read(model, folder):
    save_file(named_tensors(model, "timm"), folder / "for-spec.safetensors")
    return read_weights(folder / "for-spec.safetensors")


class _Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, model):
    torch.save({"state_dict": named_tensors(model, "timm"), "args": _Harmful()}, tmp_path / "model.pth")
    with pytest.raises(ModelError, match="not read as they could run code; a state dict; save it with torch.save"):
        read_weights(tmp_path / "model.pth")


def _without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("norm.bias"), r"lacks 'norm.bias'; exactly the 54 weights of R1-2-1-1x0.5 as timm names them"),
        (lambda t: t | {"stem.norm.weight": torch.ones(32)}, r"holds the unexpected 'stem.norm.weight'"),
        (lambda t: t | {"norm.running_mean": torch.ones(3)}, r"batch normalization; BiT has group normalization"),
        (lambda t: t | {"norm.bias": torch.ones(7)}, r"norm.bias is \[7\] float32; \[1024\] floating point"),
        (lambda t: t | {"norm.bias": torch.ones(1024, dtype=torch.int8)}, r"norm.bias is \[1024\] int8"),
        (lambda t: t | {"stem.conv.weight": torch.ones(40, 3, 7, 7)}, r"width: 0.625; a positive multiple of 0.5"),
        (lambda t: {"patch_embed.weight": torch.ones(3)}, r"holds patch_embed.weight...; the weights of BiT as"),
        (lambda t: {n: v for n, v in t.items() if "stages.3" not in n}, r"units 1-2-1-0; .* four stages"),
    ],
)
def test_what_is_not_a_whole_bit_network_is_refused_by_name(tmp_path, model, change, message):
    path = tmp_path / "model.safetensors"
    save_file(change(named_tensors(model, "timm")), path)
    with pytest.raises(ModelError, match=message) as error:
        read_weights(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.npz", "model.safetensors", "model.pth", "folder", "model.h5", "model.onnx"])
@pytest.mark.parametrize("damage", ["missing", "text", "truncated"])
def test_missing_and_damaged_files_are_one_line(tmp_path, model, name, damage):
    path = tmp_path / name
    if name == "folder":
        if damage != "missing":
            path.mkdir()
            (path / "config.json").write_text('{"model_type": "bit"}' if damage == "truncated" else "text")
    elif damage == "text":
        path.write_text("text")
    elif damage == "truncated":
        if name == "model.npz":
            _save_big_vision(model, path)
        elif name == "model.safetensors":
            save_file(named_tensors(model, "timm"), path)
        else:
            torch.save(named_tensors(model, "timm"), path)
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError) as error:
        read_weights(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_the_other_resnet_of_big_vision_is_told_apart(tmp_path):
    np.savez(tmp_path / "v1.npz", **{"params/conv_root/kernel": np.zeros((7, 7, 3, 64), np.float32)})
    with pytest.raises(ModelError, match="a ResNet-v1 of big_vision"):
        read_weights(tmp_path / "v1.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_type": "bottleneck"}, "layer_type: 'bottleneck'; 'preactivation' in BiT"),
        ({"global_padding": "SAME"}, "global_padding: 'SAME'; None in BiT"),
        ({"model_type": "vit"}, "model 'vit'; accepted: BiT of timm or Hugging Face"),
        ({"id2label": {"0": "a", "1": "b"}}, "2 class names for a head of 4 classes"),
        ({"id2label": {"0": "a", "7": "b"}}, "KeyError"),
    ],
)
def test_a_folder_of_another_network_is_refused(tmp_path, model, labels, change, message):
    write_weights(model, foreign_spec(_read(model, tmp_path), labels), tmp_path / "bit", "huggingface")
    config = json.loads((tmp_path / "bit" / "config.json").read_text())
    (tmp_path / "bit" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=re.escape(message)):
        read_weights(tmp_path / "bit")


def test_another_input_than_bits_is_refused(tmp_path, model, labels):
    write_weights(model, foreign_spec(_read(model, tmp_path), labels), tmp_path / "bit", "huggingface")
    place = tmp_path / "bit" / "preprocessor_config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}))
    assert load_model(tmp_path / "bit").spec.input_range == (0.0, 1.0)
    with pytest.raises(ModelError, match="made for pixels from 0 to 1; accepted: -1 to 1"):
        read_init(str(tmp_path / "bit"), None)
    place.write_text(json.dumps(config | {"image_mean": [0.485, 0.456, 0.406]}))
    with pytest.raises(ModelError, match="one value for all channels, 0.5 in BiT"):
        read_weights(tmp_path / "bit")


def test_weights_in_parts_are_read_together(tmp_path, model, labels):
    spec = foreign_spec(_read(model, tmp_path), labels)
    write_weights(model, spec, tmp_path / "bit", "huggingface")
    tensors = named_tensors(model, "huggingface")
    (tmp_path / "bit" / "model.safetensors").unlink()
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(places.values()):
        save_file({name: t for name, t in tensors.items() if places[name] == part}, tmp_path / "bit" / part)
    (tmp_path / "bit" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert _equal(read_weights(tmp_path / "bit").tensors, model)


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("BiT-M-R50x1.npz", ("shorter_side", 256, 224)),
        ("BiT-M-R50x1-ILSVRC2012.npz", ("square", 480, 480)),
        ("BiT-M-R50x1-CIFAR10.npz", ("square", 128, 128)),
    ],
)
def test_the_names_of_the_published_files_tell_the_view(tmp_path, model, labels, name, view):
    save_npz(model, tmp_path / name)
    spec = load_model(tmp_path / name, labels=labels).spec
    assert (spec.resize_mode, spec.resize_size, spec.crop_size) == view
    assert spec.class_names == ("ant", "bee", "cow", "dog")
    assert spec.input_range == (-1.0, 1.0)
    assert load_model(tmp_path / name, labels=labels, crop_size=96).spec.crop_size == 96


def test_a_saved_model_has_its_own_labels(tmp_path, model, labels):
    save_package(tmp_path / "saved", model, foreign_spec(_read(model, tmp_path), labels))
    with pytest.raises(ConfigError, match="labels: .*is a saved model, which has its own; leave it out"):
        load_model(tmp_path / "saved", labels=labels)


def test_weights_in_a_store_are_to_be_downloaded():
    with pytest.raises(ModelError, match="not on this machine; a local file; download it"):
        load_model("gs://bit_models/BiT-M-R50x1.npz")


def test_a_thousand_classes_are_those_of_ilsvrc():
    names = label_names(1000, model="m")
    assert (len(names), names[0], names[207], names[999]) == (1000, "tench", "golden retriever", "toilet tissue")


@pytest.mark.parametrize("num_classes", [21841, 21843])
def test_twenty_one_thousand_classes_are_those_of_imagenet21k(num_classes):
    from timm.data import ImageNetInfo

    names = label_names(num_classes, model="m")
    assert len(names) == num_classes
    info = ImageNetInfo("imagenet-21k-goog" if num_classes == 21843 else "imagenet-22k")
    synsets = info.label_names()
    assert names[synsets.index("n02099601")] == "golden retriever"  # WordNet's id of it
    assert synsets == sorted(synsets)


def test_a_head_of_21843_has_independent_scores(tmp_path):
    model = create_model("R1-1-1-1x0.5", 21843)
    save_npz(model, tmp_path / "BiT-M.npz")
    classifier = load_model(tmp_path / "BiT-M.npz")
    assert classifier.spec.multi_label
    [prediction] = classifier.predict(np.zeros((40, 40, 3), np.uint8), top_k=2)
    assert [score for _, score in prediction] == [0.5, 0.5]


def test_without_timm_the_21k_names_are_asked_for(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ModelError, match=r"timm holds, which is not installed; pip install timm, or .*--labels FILE"):
        label_names(21843, model="m")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.txt", "a\nb\n", "has 2 names, m has a head of 4 classes; one name for each class"),
        ("labels.json", '["a", 2]', "a JSON list of names, or an object"),
        ("labels.json", '{"0": "a", "2": "b"}', "a JSON list of names, or an object"),
        ("missing.txt", None, "No such file"),
    ],
)
def test_label_files_that_do_not_fit_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        label_names(4, tmp_path / name, model="m")


@pytest.mark.parametrize("content", ['["a", "b"]', '{"1": "b", "0": "a"}', '{"id2label": {"0": "a", "1": "b"}}'])
def test_label_files_may_be_json(tmp_path, content):
    (tmp_path / "labels.json").write_text(content)
    assert label_names(2, tmp_path / "labels.json", model="m") == ("a", "b")


def test_a_head_of_unknown_size_is_named_with_the_remedy(tmp_path, model):
    save_npz(model, tmp_path / "model.npz")
    with pytest.raises(ModelError, match=r"a head of 4 classes and no names for them; .*--labels FILE\), or fine-tune"):
        load_model(tmp_path / "model.npz")


def test_predict_takes_them_and_names_the_flag_that_is_missing(tmp_path, model, labels, capsys):
    from PIL import Image

    from bit_ray.cli.main import main

    save_npz(model, tmp_path / "model.npz")
    Image.new("RGB", (50, 40), (200, 10, 10)).save(tmp_path / "image.png")
    command = ["predict", str(tmp_path / "image.png"), "--model", str(tmp_path / "model.npz")]
    assert main(command) == 2
    assert "--labels FILE" in capsys.readouterr().err
    assert main([*command, "--labels", labels, "--crop-size", "64"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("ant", "bee", "cow", "dog"))


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("npz", "model.bin", "not the name of an .npz file"),
        ("safetensors", "model.bin", "not the name of a .safetensors file"),
        ("timm", "", "not an empty folder"),
    ],
)
def test_a_place_that_does_not_fit_is_refused_and_left_alone(tmp_path, model, labels, to, name, message):
    spec = foreign_spec(_read(model, tmp_path), labels)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=message):
        write_weights(model, spec, tmp_path / name, to)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ConfigError, match="rescale: on with npz"):
        write_weights(model, spec, tmp_path / "model.npz", "npz", rescale=True)
