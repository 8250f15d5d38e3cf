import re
import zipfile

import numpy as np
import pytest
import torch

from bit_ray.errors import ModelError
from bit_ray.models.zoo import create_model
from bit_ray.weights.npz import load_npz, npz_architecture, save_npz

TINY = "R1-2-1-1x0.5"


def _random_model(name=TINY, num_classes=4, seed=0):
    torch.manual_seed(seed)
    model = create_model(name, num_classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.npz"
    save_npz(_random_model(), path)
    return path


def _rewrite(path, change):
    """Write the file again after ``change`` (in place) of its dict of arrays."""
    with np.load(path, allow_pickle=False) as arrays:
        arrays = dict(arrays)
    change(arrays)
    np.savez(path, **arrays)


def _official_names(units, num_classes):
    """The names and shapes that the authors' loader asks for, spelled out for width 0.5."""
    shapes = {"resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, 32)}
    channels = 32
    for block, count in enumerate(units, start=1):
        mid = 32 * 2 ** (block - 1)
        for unit in range(1, count + 1):
            prefix = f"resnet/block{block}/unit{unit:02d}/"
            for part, size, into, out in (("a", 1, channels, mid), ("b", 3, mid, mid), ("c", 1, mid, 4 * mid)):
                shapes[f"{prefix}{part}/standardized_conv2d/kernel"] = (size, size, into, out)
                shapes[f"{prefix}{part}/group_norm/gamma"] = (into,)
                shapes[f"{prefix}{part}/group_norm/beta"] = (into,)
            if unit == 1:
                shapes[f"{prefix}a/proj/standardized_conv2d/kernel"] = (1, 1, channels, 4 * mid)
            channels = 4 * mid
    shapes |= {"resnet/group_norm/gamma": (channels,), "resnet/group_norm/beta": (channels,)}
    return shapes | {
        "resnet/head/conv2d/kernel": (1, 1, channels, num_classes),
        "resnet/head/conv2d/bias": (num_classes,),
    }


def test_a_written_file_has_the_authors_names_and_layout(file):
    model = _random_model()
    with np.load(file, allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == _official_names((1, 2, 1, 1), 4)
        assert {arrays[name].dtype for name in arrays} == {np.dtype("float32")}
        kernel = arrays["resnet/block2/unit02/b/standardized_conv2d/kernel"]
        head = arrays["resnet/head/conv2d/kernel"]
    ours = model.stages[1][1].conv2.weight
    assert kernel[0, 2, 5, 7] == ours[7, 5, 0, 2].item()  # HWIO against OIHW, raw
    assert head[0, 0, 9, 3] == model.head.weight[3, 9].item()


def test_a_round_trip_is_exact(file, tmp_path):
    model = create_model(TINY, 4)
    load_npz(model, file)
    expected = _random_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    save_npz(model.to(memory_format=torch.channels_last), tmp_path / "again.npz")
    with np.load(file) as first, np.load(tmp_path / "again.npz") as second:
        assert first.files == second.files
        assert all(np.array_equal(first[name], second[name]) for name in first.files)


def test_bfloat16_weights_survive_the_file(tmp_path):
    model = _random_model().to(torch.bfloat16)
    save_npz(model, tmp_path / "m.npz")
    loaded = create_model(TINY, 4).to(torch.bfloat16)
    load_npz(loaded, tmp_path / "m.npz")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_the_name_variance_of_published_files_is_read(file):
    def vary(arrays):
        for number, name in enumerate(list(arrays)):
            varied = name.replace("/standardized_conv2d/", f"/standardized_conv2d_{number}/")
            arrays[varied] = arrays.pop(name)
        proj = next(name for name in arrays if "block3/unit01/a/proj" in name)
        arrays["resnet/block3/unit01/a/proj/conv2d/kernel"] = arrays.pop(proj)
        arrays["global_step"] = np.array(500)  # beside the network: left aside

    _rewrite(file, vary)
    model = create_model(TINY, 4)
    load_npz(model, file)
    assert npz_architecture(file) == ((1, 2, 1, 1), 0.5, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), _random_model().parameters(), strict=True))


def test_the_architecture_of_a_published_size_is_inferred(tmp_path):
    # Only the headers matter, so arrays of the right names and no memory to speak of.
    path = tmp_path / "headers.npz"
    units = (3, 4, 23, 3)
    arrays = {f"resnet/block{b}/unit{u:02d}/a/group_norm/gamma": [1.0] for b, n in enumerate(units, 1) for u in [1, n]}
    arrays["resnet/root_block/standardized_conv2d/kernel"] = np.zeros((7, 7, 3, 192), np.float32)
    arrays["resnet/head/conv2d/bias"] = np.zeros(21843, np.float32)
    np.savez(path, **arrays)
    assert npz_architecture(path) == (units, 3.0, 21843)


def test_head_zero_ignores_the_files_head_and_zeroes_ours(file):
    model = _random_model(num_classes=9, seed=1)
    load_npz(model, file, head="zero")
    source = _random_model()
    assert torch.equal(model.stages[3][0].conv3.weight, source.stages[3][0].conv3.weight)
    assert model.head.weight.shape == (9, 1024)
    assert model.head.weight.abs().sum() == 0
    assert model.head.bias.abs().sum() == 0


def test_a_file_without_a_head_loads_with_head_zero_only(file):
    def behead(arrays):
        del arrays["resnet/head/conv2d/kernel"], arrays["resnet/head/conv2d/bias"]

    _rewrite(file, behead)
    load_npz(create_model(TINY, 9), file, head="zero")
    assert npz_architecture(file) == ((1, 2, 1, 1), 0.5, 0)
    with pytest.raises(ModelError, match=r"no head; accepted: 4 classes, as in the model; pass head='zero'"):
        load_npz(create_model(TINY, 4), file)


def _refused(file, model=None, **options):
    """Return the message of the refusal, after checking that the model was left as it was."""
    model = model or _random_model(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError) as error:
        load_npz(model, file, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    message = str(error.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    assert message.count(";") >= 1  # what is accepted, or what to do
    return message


def test_another_depth_is_refused_by_name(tmp_path):
    path = tmp_path / "deep.npz"
    save_npz(_random_model("R26x0.5"), path)
    with torch.device("meta"):
        shallow, named = create_model(TINY, 4), create_model("R50x0.5", 4)
    with pytest.raises(ModelError) as error:
        load_npz(named, path)
    assert str(error.value) == (
        f"{path}: weights of R26x0.5 (units 2-2-2-2, width 0.5); accepted: those of the model, "
        f"R50x0.5 (units 3-4-6-3, width 0.5); "
        f"use create_model('R26x0.5', ...)"
    )
    with pytest.raises(ModelError, match=r"weights of R26x0\.5 .+ accepted: those of the model, R1-2-1-1x0\.5"):
        load_npz(shallow, path, head="zero")


def test_another_width_is_refused(file):
    message = _refused(file, _random_model("R1-2-1-1x1"))
    assert "weights of R1-2-1-1x0.5 (units 1-2-1-1, width 0.5); accepted: those of the model, R1-2-1-1x1" in message


def test_another_head_is_refused_with_the_remedy(file):
    message = _refused(file, _random_model(num_classes=7))
    assert "a head of 4 classes; accepted: 7 classes, as in the model; pass head='zero'" in message


def test_missing_and_unexpected_weights_are_refused(file):
    def rename(arrays):
        arrays["resnet/group_norm/delta"] = arrays.pop("resnet/group_norm/beta")

    _rewrite(file, rename)
    assert "file lacks 'resnet/group_norm/beta'" in _refused(file)
    _rewrite(file, lambda arrays: arrays.update({"resnet/group_norm/beta": arrays["resnet/group_norm/gamma"]}))
    assert "file has the unexpected 'resnet/group_norm/delta'" in _refused(file)


def test_one_weight_under_two_names_is_refused(file):
    root = "resnet/root_block/standardized_conv2d/kernel"
    _rewrite(file, lambda arrays: arrays.update({root.replace("conv2d", "conv2d_7"): arrays[root]}))
    assert "are the same weight" in _refused(file)


def test_a_wrong_shape_is_refused(file):
    name = "resnet/block2/unit01/b/standardized_conv2d/kernel"
    _rewrite(file, lambda arrays: arrays.update({name: arrays[name][:, :, :5]}))
    assert f"{name} has shape [3, 3, 5, 64]; accepted: [3, 3, 64, 64]" in _refused(file)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "V2"])
def test_weights_that_are_not_floating_point_are_refused(file, dtype):
    name = "resnet/group_norm/gamma"
    _rewrite(file, lambda arrays: arrays.update({name: np.zeros(arrays[name].shape, dtype)}))
    assert re.search(rf"{name} is .+; accepted: float16, float32 or float64", _refused(file))


def test_pickled_objects_are_refused_unread(file):
    name = "resnet/group_norm/gamma"
    _rewrite(file, lambda arrays: arrays.update({name: np.full(1024, None, object)}))
    assert f"{name} is object; accepted: float16, float32 or float64" in _refused(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such file" in _refused(tmp_path / "absent.npz")
    assert "not an .npz file" in _refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "odd.npz"
    path.write_bytes(content)
    assert "not an .npz file" in _refused(path)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(file, kept):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    assert "not an .npz file, or truncated" in _refused(file)


def test_damaged_weights_are_refused_before_anything_is_copied(file):
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo("resnet/group_norm/gamma.npy")
    data[member.header_offset + 2048] ^= 0xFF  # inside its 4096 bytes of floats
    file.write_bytes(data)
    assert "damaged .npz file" in _refused(file)


def test_an_npz_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, weights=np.zeros(3))
    assert "no 'resnet/root_block/standardized_conv2d/kernel'" in _refused(path)
    np.savez(path, **{"resnet/root_block/standardized_conv2d/kernel": np.zeros(3, np.float32)})
    assert "units 0-0-0-0" in _refused(path)


def test_an_unknown_head_policy_is_refused(file):
    with pytest.raises(ModelError, match="head: 'drop'; accepted: 'load' or 'zero'"):
        load_npz(create_model(TINY, 4), file, head="drop")


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def full_disk(stream, **arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(ModelError, match="cannot be written .No space left"):
        save_npz(_random_model(seed=3), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_write_into_a_missing_folder_is_refused(file, tmp_path):
    with pytest.raises(ModelError, match="cannot be written .Not a directory"):
        save_npz(_random_model(), file / "m.npz")
    with pytest.raises(ModelError, match="cannot be written .No such file or directory"):
        save_npz(_random_model(), tmp_path / "absent" / "m.npz")
