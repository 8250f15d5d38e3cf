import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bit_ray import store
from bit_ray.errors import ConfigError, ModelError, StoreError
from bit_ray.models.zoo import create_model
from bit_ray.weights.fetch import download_package
from bit_ray.weights.package import ModelSpec, load_package, read_spec, save_package

NAME = "R1-1-1-1x0.5"


def _spec(**changes):
    settings = {
        "model": NAME,
        "num_classes": 3,
        "class_names": ("ant", "bee", "ßüß"),
        "multi_label": False,
        "resize_mode": "square",
        "resize_size": 160,
        "crop_size": 128,
        "recipe": {"base_lr": 0.003, "steps": [200, 300]},
        "provenance": {"manifest_digest": "abc"},
    }
    return ModelSpec(**settings | changes)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model(NAME, 3)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def package(tmp_path, model):
    save_package(tmp_path / "package", model, _spec())
    return tmp_path / "package"


def _refused(package):
    with pytest.raises(ModelError) as error:
        load_package(package)
    message = str(error.value)
    assert message.startswith(str(package))
    assert "\n" not in message
    return message


def _change_description(package, change):
    path = package / "model.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def test_a_package_comes_back_as_it_was(package, model):
    (package / "optimizer.safetensors").write_bytes(b"a checkpoint's own business")
    loaded, spec = load_package(package)
    assert spec == _spec()
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_the_description_names_the_weights_by_content(package):
    spec, weights = read_spec(package)
    data = (package / "model.safetensors").read_bytes()
    assert spec == _spec()
    assert weights.file == "model.safetensors"
    assert (weights.sha256, weights.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert sorted(path.name for path in package.iterdir()) == ["model.json", "model.safetensors"]


def test_training_a_loaded_model_leaves_the_file_alone(package):
    before = (package / "model.safetensors").read_bytes()
    loaded, _ = load_package(package)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(torch.randn(2, 3, 32, 32)).logsumexp(1).sum().backward()
    optimizer.step()
    assert not torch.equal(loaded.head.weight, load_package(package)[0].head.weight)
    assert (package / "model.safetensors").read_bytes() == before


def test_channels_last_and_bfloat16_models_are_saved(tmp_path, model):
    lowered = create_model(NAME, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    lowered.load_state_dict(model.state_dict())
    save_package(tmp_path, lowered, _spec())
    loaded, _ = load_package(tmp_path)
    assert torch.equal(loaded.root.weight, model.root.weight.bfloat16())


def test_a_missing_directory_and_one_without_a_model_are_refused(tmp_path):
    assert "no such directory" in _refused(tmp_path / "absent")
    assert "no model.json in it" in _refused(tmp_path)


def test_a_save_that_fails_half_way_leaves_no_model(tmp_path, package, model, monkeypatch):
    import bit_ray.weights.tensor_files

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bit_ray.weights.tensor_files, "save_file", full_disk)
    with pytest.raises(ModelError, match=r"cannot be written .+No space left on device"):
        save_package(tmp_path / "new", model, _spec())
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(ModelError, match=r"cannot be written"):
        save_package(package, model, _spec())
    assert [path.name for path in package.iterdir()] == ["model.safetensors"]
    assert "no model.json in it" in _refused(package)


def test_cut_off_weights_are_refused_by_size(package):
    path = package / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    message = _refused(package)
    assert f"{len(data) - 100} bytes; accepted: {len(data)}, as in model.json" in message


def test_changed_weights_are_refused_by_digest(package):
    path = package / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "SHA-256 " in _refused(package)


def test_absent_weights_are_refused(package):
    (package / "model.safetensors").unlink()
    assert "model.safetensors: cannot be read (No such file or directory)" in _refused(package)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_description_that_cannot_be_read_is_refused(package, content):
    (package / "model.json").write_bytes(content)
    assert "model.json: not a model description" in _refused(package)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["spec"].update(num_classes=4), "spec.class_names: 3 names for a head of 4 classes"),
        (lambda d: d["spec"].update(class_names=["a", "b"]), "spec.class_names: 2 names for a head of 3 classes"),
        (lambda d: d["spec"].update(model="R51x1"), "unknown name 'R51x1'"),
        (lambda d: d["spec"].update(crop_sise=1), "crop_sise"),
        (lambda d: d["weights"].update(file="../model.safetensors"), "a plain file name inside the package"),
        (lambda d: d["weights"].update(file="a\0b"), "a plain file name inside the package"),
        (lambda d: d["weights"].pop("sha256"), "weights.sha256: missing"),
        (lambda d: d.update(format=2), "format: given 2"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(package, change, said):
    _change_description(package, change)
    assert said in _refused(package)


def _swap_weights(package, change):
    """Change the tensors and record the new digest, as only a wrong writer would."""
    path = package / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    data = path.read_bytes()
    record = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    _change_description(package, lambda description: description["weights"].update(record))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("gn.bias"), "lacks 'gn.bias'; accepted: exactly the"),
        (lambda t: t.update(extra=torch.zeros(1)), "has the unexpected 'extra'"),
        (lambda t: t.update({"head.bias": torch.zeros(4)}), "head.bias is [4] float32; accepted: [3] floating point"),
        (lambda t: t.update({"head.bias": torch.zeros(3, dtype=torch.int64)}), "head.bias is [3] int64"),
    ],
)
def test_weights_that_do_not_fit_the_description_are_refused(package, change, said):
    _swap_weights(package, change)
    assert said in _refused(package)


def test_weights_that_are_no_safetensors_are_refused(package):
    data = b"\x00" * 64
    (package / "model.safetensors").write_bytes(data)
    record = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    _change_description(package, lambda description: description["weights"].update(record))
    assert "not a safetensors file" in _refused(package)


def test_a_spec_of_another_model_is_not_saved(tmp_path, model):
    with pytest.raises(ModelError, match=r"the description says R1-1-1-1x0\.5 with 2 classes"):
        save_package(tmp_path / "new", model, _spec(num_classes=2, class_names=("a", "b")))
    assert not (tmp_path / "new").exists()


def test_a_name_that_no_file_can_hold_touches_nothing(package, model):
    before = {path.name: path.read_bytes() for path in package.iterdir()}
    for changes in ({"class_names": ("a", "b", "\ud800")}, {"recipe": {"by": "\udfff"}}):
        with pytest.raises(
            ConfigError, match=r"given .*ud800.*; accepted: text|surrogates not allowed; accepted: text"
        ):
            save_package(package, model, _spec(**changes))
    assert {path.name: path.read_bytes() for path in package.iterdir()} == before


def test_two_classes_may_have_one_name(tmp_path, model):
    save_package(tmp_path / "twice", model, _spec(class_names=("crane", "crane", "flip")))
    assert load_package(tmp_path / "twice")[1].class_names == ("crane", "crane", "flip")


def test_a_recipe_that_json_cannot_hold_touches_nothing(package, model):
    before = {path.name: path.read_bytes() for path in package.iterdir()}
    with pytest.raises(ConfigError):
        save_package(package, model, _spec(recipe={"lr": float("nan")}))
    assert {path.name: path.read_bytes() for path in package.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_names": ()}, "class_names: 0 names for a head of 3 classes"),
        ({"crop_size": 16}, "crop_size: 16; accepted: at least 32"),
        ({"resize_mode": "shorter_side", "resize_size": 100}, "resize_size: 100; accepted: at least crop_size"),
        ({"input_range": (1.0, -1.0)}, "input_range: (1.0, -1.0); accepted: low < high"),
        ({"input_range": (-1e308, 1e308)}, "both from -1000 to 1000"),
        ({"crop_size": 10**9, "resize_size": 10**9}, "crop_size: 1000000000; accepted: at most 16384"),
        ({"resize_size": 16385}, "resize_size: 16385; accepted: at most 16384"),
        ({"class_names": ("a", "", "b")}, "class_names: name 1 is empty"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(changes, said):
    with pytest.raises(ConfigError) as error:
        _spec(**changes)
    assert said in str(error.value)


def test_a_full_disk_is_that_of_the_copy_and_not_of_the_model(tmp_path, package, monkeypatch):
    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.pafs, "copy_files", full_disk)
    with pytest.raises(StoreError, match=r"^.*/copy: no space left; accepted: a disk with room for [\d,]+ bytes; make"):
        download_package(str(package), tmp_path / "copy", None)
    assert not (tmp_path / "copy").exists()
    assert load_package(package)
