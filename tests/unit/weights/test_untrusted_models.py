"""Weight files, model names and their companions that are damaged, or were made to cost or to break something."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bit_ray.errors import BitRayError, ModelError
from bit_ray.models.resnet import ResNetConfig
from bit_ray.models.zoo import create_model, model_config
from bit_ray.weights.class_names import label_names
from bit_ray.weights.foreign import build_network, foreign_spec
from bit_ray.weights.npz import load_npz, save_npz
from bit_ray.weights.package import ModelSpec, parse_description
from bit_ray.weights.read import SPEC_KEY, read_weights
from bit_ray.weights.write import named_tensors, write_weights

NAME = "R1-1-1-1x0.5"
SPEC = ModelSpec(
    model=NAME,
    num_classes=3,
    class_names=("a", "b", "c"),
    multi_label=False,
    resize_mode="square",
    resize_size=32,
    crop_size=32,
)
ROOT = "resnet/root_block/standardized_conv2d/kernel"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(NAME, 3)


def refusal(call, *arguments, **options):
    """The message of the refusal, which is one line of bounded length and comes soon."""
    started = time.process_time()
    with pytest.raises(BitRayError) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1200
    assert time.process_time() - started < 10
    return message


def use(path):
    """Everything that classifying with a file or folder of weights does before the first image."""
    weights = read_weights(path)
    spec = foreign_spec(
        weights, [str(i) for i in range(weights.num_classes)] if "class_names" not in weights.spec else ""
    )
    return build_network(weights), spec


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("R1000000-1-1-1x1", "units: (1000000, 1, 1, 1); accepted: at most 64 in a stage"),
        ("R1-1-1-65x0.5", "at most 64 in a stage"),
        ("R50x1000000", "width: 1e+06; accepted: a positive multiple of 0.5, at most 16"),
        ("R50x16.5", "at most 16"),
        ("R64-64-64-64x16", "parameters; accepted: at most 1e+10; choose a smaller network"),
        (f"R1-1-1-{'9' * 5000}x1", "unknown name"),
        (f"R1-1-1-1x{'9' * 5000}", "unknown name"),
        ("R1-1-1-١x1", "unknown name"),
        ("R50x1\n", "unknown name"),
        ("R\ud800", "unknown name"),
        (None, "unknown name 'None'"),
        (50, "unknown name '50'"),
    ],
)
def test_a_name_of_more_than_a_network_is_refused_before_anything_is_built(name, said):
    assert said in refusal(create_model, name, 10)


@pytest.mark.parametrize("num_classes", [1_000_001, 10**12, 10**5000], ids=["a few", "many", "unprintable"])
def test_more_classes_than_anything_has_are_refused(num_classes):
    assert "at most 1000000; check the class list" in refusal(create_model, "R50x1", num_classes)


def test_the_bounds_leave_room_for_all_that_was_published():
    assert model_config("R152x4", 30_000).num_parameters < 1.2e9  # JFT
    assert model_config("R152x4", 1_000_000).num_parameters < 1e10
    assert ResNetConfig(units=(64, 64, 64, 64), width=4, num_classes=2)


def test_a_description_of_such_a_network_is_refused():
    description = {
        "spec": {
            "model": "R1000000-1-1-1x1",
            "num_classes": 1,
            "class_names": ["a"],
            "multi_label": False,
            "resize_mode": "square",
            "resize_size": 32,
            "crop_size": 32,
        },
        "weights": {"file": "model.safetensors", "sha256": "0" * 64, "num_bytes": 1},
    }
    assert "at most 64 in a stage" in refusal(parse_description, json.dumps(description).encode(), "model.json")


def npy(header, data=b"", version=1):
    """A .npy file of any header."""
    text = header.encode("latin1")
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def header(shape, kind="<f4"):
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n"


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


BIG_VISION_ROOT = "root_block/conv_root/kernel"
ARRAYS = [ROOT, BIG_VISION_ROOT, f"params/{BIG_VISION_ROOT}"]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    "content",
    [
        npy(header((10**12,))),
        npy(header((10**30, 10**30))),
        npy(header((7, 7, 3, -64)), bytes(7 * 7 * 3 * 64 * 4)),
        npy(header((7, 7, 3, 10**9)), bytes(1000)),
        npy(header((10**12,)), version=2),
        npy(header((10**12,)), version=3),
        npy(header((10**12,)), version=9),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "(" * 5000),
        npy("-" * 9000 + "1"),
        npy("{'descr': ''' , 'shape"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1L"),
        npy(header("(1,)", "O"), pickle.dumps([1])),
        npy(header("(True, )")),
        npy("(1, 2)"),
        npy(header((2,), "<f16"), bytes(32)),
        npy(header((10**9,), "S0")),
        npy(header((1,), "M8[s]"), bytes(8)),
        npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", bytes(4)),
        b"no array at all",
        b"",
    ],
    ids=map(str, range(20)),
)
def test_an_array_that_is_not_what_its_header_says_is_refused_unread(tmp_path, name, content):
    path = write_zip(tmp_path / "model.npz", [(f"{name}.npy", content)])
    refusal(use, path)
    refusal(load_npz, create_model(NAME, 3), path, head="zero")


@pytest.mark.parametrize("unit", ["99999999", "9" * 5000, "65"])
def test_an_npz_of_very_many_units_is_refused_before_anything_is_built(tmp_path, model, unit):
    save_npz(model, tmp_path / "model.npz")
    with zipfile.ZipFile(tmp_path / "model.npz", "a") as archive:
        archive.writestr(f"resnet/block1/unit{unit}/a/group_norm/gamma.npy", npy(header((1,)), bytes(4)))
    refusal(use, tmp_path / "model.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_npz_packed_in_a_way_that_numpy_does_not_is_refused(tmp_path, compression):
    content = npy(header((7, 7, 3, 64)), bytes(7 * 7 * 3 * 64 * 4))
    path = write_zip(tmp_path / "model.npz", [(f"{ROOT}.npy", content)], compression)
    assert "in a way that NumPy does not write" in refusal(use, path)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_size_that_no_packing_gives_is_refused(tmp_path, name):
    path = write_zip(tmp_path / "model.npz", [(f"{name}.npy", npy(header((10**10,))))], zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)  # unpacked, in the directory
    path.write_bytes(data)
    assert "cannot have 4294967294 bytes in this file" in refusal(use, path)


def test_an_array_that_is_there_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write_zip(tmp_path / "model.npz", [(f"params/{BIG_VISION_ROOT}.npy", npy(header((1,)), bytes(4)))] * 2)
    assert "is there twice" in refusal(use, path)


def test_big_endian_weights_are_read(tmp_path, model):
    save_npz(model, tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz") as arrays:
        np.savez(tmp_path / "big.npz", **{name: arrays[name].astype(">f4") for name in arrays.files})
    read = read_weights(tmp_path / "big.npz").tensors
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.items())


def tensors(model, naming="timm"):
    return dict(named_tensors(model, naming))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of quantized and sparse tensors
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: torch.zeros(1).expand(v.shape) for k, v in t.items()}, "more bytes than the file"),
        (lambda t: t | {5: torch.zeros(1)}, "not a state dict; accepted: names and tensors"),
        (lambda t: t | {"stem.conv.weight": torch.eye(3).to_sparse()}, "not a plain tensor; accepted: dense tensors"),
        (lambda t: t | {"stem.conv.weight": torch.zeros(32, 3, 7, 7, device="meta")}, "not a plain tensor"),
        (
            lambda t: t | {"stem.conv.weight": torch.quantize_per_tensor(torch.zeros(32), 1, 0, torch.qint8)},
            "not a plain",
        ),
        (lambda t: t | {"two\nlines": torch.zeros(1)}, r"'two\nlines'; accepted: exactly the"),
        (lambda t: t | {"x" * 100_000: torch.zeros(1)}, "xxx...; accepted: exactly the"),
        (lambda t: t | {"stem.conv.weight": torch.zeros((1,) * 60)}, "a kernel of four dimensions"),
        (lambda t: t | {"stem.conv.weight": torch.zeros(0, 3, 7, 7)}, "width: 0; accepted: a positive multiple"),
        (lambda t: t | {"head.fc.bias": torch.zeros(1_000_001)}, "num_classes: 1000001; accepted: at most 1000000"),
        (lambda t: {"two\nlines": torch.zeros(1)}, r"has two\nlines...; accepted: the weights of BiT"),
        (lambda t: {}, "has nothing...; accepted: the weights of BiT"),
        (lambda t: {"state_dict": {"model": t | {"odd": None}}}, "not a state dict"),
        (lambda t: [t], "not a state dict"),
        (lambda t: t["stem.conv.weight"], "not a state dict"),
    ],
    ids=map(str, range(15)),
)
def test_a_pytorch_file_that_is_no_plain_state_dict_is_refused(tmp_path, model, change, said):
    torch.save(change(tensors(model)), tmp_path / "weights.pth")
    assert said in refusal(use, tmp_path / "weights.pth")


def test_a_pytorch_file_that_unpacks_to_more_than_itself_is_refused(tmp_path, model):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors(model).items()}
    torch.save(zeros, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored:
        members = [(name, stored.read(name)) for name in stored.namelist()]
    path = write_zip(tmp_path / "packed.pth", members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "a compressed archive of" in refusal(use, path)


def test_a_prefix_that_repeats_without_end_is_refused_soon(tmp_path):
    save_file({"module." * 100_000 + "x": torch.zeros(1)}, tmp_path / "model.safetensors")
    refusal(use, tmp_path / "model.safetensors")


def test_a_state_dict_of_very_many_units_is_refused_before_anything_is_built(tmp_path, model):
    held = tensors(model)
    names = [name for name in held if name.startswith("stages.3.blocks.0.") and "downsample" not in name]
    more = {name.replace("blocks.0", f"blocks.{i}"): torch.zeros(1) for name in names for i in range(1, 70)}
    save_file(held | more, tmp_path / "model.safetensors")
    assert "at most 64 in a stage" in refusal(use, tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, '{"model": 5}', '{"a": 1e999}', "\x00"])
def test_metadata_that_describes_no_model_is_refused(tmp_path, model, text):
    save_file(tensors(model, "bit_ray"), tmp_path / "model.safetensors", metadata={SPEC_KEY: text})
    assert f"metadata {SPEC_KEY}" in refusal(use, tmp_path / "model.safetensors")


def folder(tmp_path, model, to="huggingface", config=None, processor=None, index=None):
    """A folder of weights with files written over: a dict is merged into what is there, text replaces it."""
    place = tmp_path / to
    write_weights(model, SPEC, place, to)
    for name, change in (("config.json", config), ("preprocessor_config.json", processor)):
        if isinstance(change, dict):
            change = json.dumps(json.loads((place / name).read_text()) | change)
        if change is not None:
            (place / name).write_text(change)
    if index is not None:
        (place / "model.safetensors").rename(place / "part.safetensors")
        (place / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    return place


def test_weights_in_parts_are_those_that_lie_in_the_folder(tmp_path, model):
    place = folder(tmp_path, model, index={"weight_map": {"a": "part.safetensors"}})
    assert use(place)[1].class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        5,
        {"weight_map": 5},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 5}},
        {"weight_map": {"a": ["part.safetensors"]}},
        {"weight_map": {"a": "../part.safetensors"}},
        {"weight_map": {"a": "/tmp/part.safetensors"}},
        {"weight_map": {"a": "sub/part.safetensors"}},
        {"weight_map": {"a": "pytorch_model.bin"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": "missing.safetensors"}},
        {"weight_map": {"a": "nul\0.safetensors"}},
        {"weight_map": {"a": "two\nlines.safetensors"}},
        {"weight_map": {"a": "x" * 250 + ".safetensors"}},
        "{",
        "not JSON",
        "[" * 100_000,
        "9" * 5000,
    ],
    ids=map(str, range(21)),
)
def test_an_index_of_anything_but_files_in_its_folder_is_refused(tmp_path, model, index):
    (tmp_path / "part.safetensors").write_bytes(b"outside")
    message = refusal(use, folder(tmp_path, model, index=index))
    assert "outside" not in message


def test_a_file_outside_of_the_folder_is_not_opened(tmp_path, model):
    save_file(tensors(model, "huggingface"), tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        place = folder(tmp_path / str(len(name)), model, index={"weight_map": {"a": name}})
        assert "files in this folder" in refusal(use, place)


@pytest.mark.parametrize(
    ("to", "config", "processor"),
    [
        ("huggingface", None, {"image_std": [0, 0, 0]}),
        ("huggingface", None, {"image_std": [1e-320] * 3}),
        ("huggingface", None, {"image_std": [float("nan")] * 3}),
        ("huggingface", None, {"image_std": [float("inf")] * 3}),
        ("huggingface", None, {"image_std": [-0.5] * 3}),
        ("huggingface", None, {"image_mean": [1e308] * 3}),
        ("huggingface", None, {"image_mean": [10**400] * 3}),
        ("huggingface", None, {"image_mean": ["0.5"] * 3}),
        ("huggingface", None, {"image_mean": [True] * 3}),
        ("huggingface", None, {"image_mean": [None] * 3}),
        ("huggingface", None, {"image_mean": []}),
        ("huggingface", None, {"image_mean": "abc"}),
        ("huggingface", None, {"image_mean": 0.5}),
        ("huggingface", None, {"image_mean": [[]] * 3}),
        ("huggingface", None, {"size": 224}),
        ("huggingface", None, {"size": {"height": "224"}}),
        ("huggingface", None, {"size": {"height": 1e9}}),
        ("huggingface", None, {"size": {"height": -1}}),
        ("huggingface", None, {"size": {"shortest_edge": None}}),
        ("huggingface", None, {"size": {"shortest_edge": 40}, "crop_size": 7, "do_center_crop": True}),
        ("huggingface", None, {"size": {"shortest_edge": 40}, "crop_size": {}, "do_center_crop": True}),
        ("huggingface", None, "[]"),
        ("huggingface", None, "[" * 100_000),
        ("huggingface", {"id2label": {"0": 1, "1": 2, "2": 3}}, None),
        ("huggingface", {"id2label": {"0": "a", "1": None, "2": "c"}}, None),
        ("huggingface", {"id2label": {"0": "a", "5": "b", "2": "c"}}, None),
        ("huggingface", {"id2label": {"0": "\ud800", "1": "b", "2": "c"}}, None),
        ("huggingface", {"id2label": ["a", "b", "c"]}, None),
        ("huggingface", {"id2label": 5}, None),
        ("huggingface", {"id2label": {"0": "a"}}, None),
        ("huggingface", {"model_type": "\ud800\n"}, None),
        ("huggingface", {"model_type": ["x" * 10_000]}, None),
        ("huggingface", {"layer_type": "two\nlines" * 1000}, None),
        ("huggingface", "[" * 100_000, None),
        ("huggingface", "9" * 5000, None),
        ("timm", {"pretrained_cfg": {"input_size": []}}, None),
        ("timm", {"pretrained_cfg": {"input_size": 224}}, None),
        ("timm", {"pretrained_cfg": {"input_size": [3, 224, "224"]}}, None),
        ("timm", {"pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0}}, None),
        ("timm", {"pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 1e-300}}, None),
        ("timm", {"pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": float("nan")}}, None),
        ("timm", {"pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": "a"}}, None),
        ("timm", {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.0] * 3}}, None),
        ("timm", {"pretrained_cfg": []}, None),
        ("timm", {"pretrained_cfg": None}, None),
        ("timm", {"label_names": 5}, None),
        ("timm", {"label_names": [1, 2, 3]}, None),
        ("timm", {"label_names": [["a"], "b", "c"]}, None),
        ("timm", {"label_names": "ab\ud800"}, None),
        ("timm", {"label_names": ["a", "b", "c"], "label_descriptions": {"a": 5}}, None),
        ("timm", {"label_names": ["a", "b", "c"], "label_descriptions": [5]}, None),
        ("timm", {"architecture": 5}, None),
    ],
    ids=map(str, range(52)),
)
def test_a_config_that_cannot_be_right_is_refused_by_name(tmp_path, model, to, config, processor):
    place = folder(tmp_path, model, to, config, processor)
    assert "config.json: " in refusal(use, place) or (config is None and to == "huggingface")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "accepted: a JSON list of names"),
        (b'["a", 2, "c"]', "accepted: a JSON list of names"),
        (b'{"id2label": 5}', "accepted: a JSON list of names"),
        (b'{"id2label": {"a": "b"}}', "accepted: a JSON list of names"),
        (b'{"0": "a", "1": ["b"], "2": "c"}', "accepted: a JSON list of names"),
        (b'["a", "\\ud800", "c"]', "name 1 is '\\ud800'; accepted: text"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"9" * 5000, "accepted: a JSON list of names"),
    ],
)
def test_a_label_file_of_anything_but_names_is_refused(tmp_path, content, said):
    (tmp_path / "labels.json").write_bytes(content)
    assert said in refusal(label_names, 3, tmp_path / "labels.json", model="m")


def test_a_label_file_that_is_no_file_or_absurdly_large_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    assert "fifo.txt: no file" in refusal(label_names, 3, tmp_path / "fifo.txt", model="m")
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(10**11)
    assert "100000000000 bytes, more than" in refusal(label_names, 3, tmp_path / "large.txt", model="m")
    many = [""] * 1_000_001
    assert "1000001 names; accepted: at most 1000000" in refusal(label_names, 3, many, model="m")


@pytest.mark.parametrize("names", [["a", 2, "c"], [None] * 3, ["a", "\udfff", "c"]])
def test_names_that_are_no_text_are_refused(names):
    assert "accepted: text; correct it" in refusal(label_names, 3, names, model="m")


WRITE = """
import resource, signal, sys
from pathlib import Path
from bit_ray.errors import BitRayError
from bit_ray.weights.export import export
from bit_ray.weights.package import ModelSpec
from bit_ray.weights.write import write_weights
from bit_ray.models.zoo import create_model

spec = ModelSpec(model="R1-1-1-1x0.5", num_classes=1, class_names=("a",), multi_label=False, resize_mode="square",
                 resize_size=32, crop_size=32)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in ("npz.npz", "safetensors.safetensors", "package", "timm", "torch.pt2"):
    path = Path(sys.argv[1], name)
    to = path.stem
    try:
        (export if to == "torch" else write_weights)(create_model(spec.model, 1), spec, path, to)
    except BitRayError as error:
        print("refused:", error)
print(sorted(file.name for file in path.parent.rglob("*") if file.is_file()))
"""


def test_where_no_more_can_be_written_it_is_one_line_and_nothing_is_left(tmp_path):
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    # Python would write half of a compiled module, and leave it in the environment.
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = r"refused: [^\n]+cannot be written \([^\n]*too large[^\n]*\n"
    assert re.fullmatch(f"({line}){{5}}\\[\\]\n", done.stdout), done.stdout + done.stderr


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(max_size=8), items, max_size=3),
    max_leaves=8,
)
NUMBERS = st.lists(st.integers(-2, 300) | st.floats(), min_size=0, max_size=4)
CONFIG = st.fixed_dictionaries(
    {},
    optional={
        "model_type": st.just("bit") | ANYTHING,
        "architecture": st.just("resnetv2_50x1_bit") | ANYTHING,
        "id2label": ANYTHING | st.dictionaries(st.sampled_from(["0", "1", "2"]), ANYTHING, max_size=3),
        "problem_type": ANYTHING,
        "layer_type": st.just("preactivation") | ANYTHING,
        "pretrained_cfg": ANYTHING
        | st.fixed_dictionaries(
            {},
            optional={
                "input_size": ANYTHING | NUMBERS,
                "crop_pct": ANYTHING | st.floats(0, 1),
                "crop_mode": st.just("squash") | ANYTHING,
                "mean": NUMBERS,
                "std": NUMBERS,
                "label_names": ANYTHING | st.lists(st.text(), max_size=4),
                "label_descriptions": ANYTHING,
            },
        ),
    },
)
PROCESSOR = st.fixed_dictionaries(
    {},
    optional={
        "size": ANYTHING | st.dictionaries(st.sampled_from(["height", "shortest_edge"]), ANYTHING, max_size=2),
        "crop_size": ANYTHING | st.dictionaries(st.sampled_from(["height"]), ANYTHING, max_size=1),
        "do_center_crop": ANYTHING,
        "image_mean": ANYTHING | NUMBERS,
        "image_std": ANYTHING | NUMBERS,
    },
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def used_or_refused(path):
    """None, or the message."""
    try:
        network, spec = use(path)
    except BitRayError as error:
        return str(error)
    assert network.config.num_classes == spec.num_classes
    return None


@pytest.fixture(scope="module")
def places(tmp_path_factory, model):
    """A folder of each program, the files of which are written over."""
    top = tmp_path_factory.mktemp("places")
    return {to: folder(top, model, to) for to in ("huggingface", "timm")}


@given(to=st.sampled_from(["huggingface", "timm"]), config=CONFIG, processor=PROCESSOR, all_new=st.booleans())
@FUZZ
def test_any_config_is_used_or_refused_in_one_line(places, to, config, processor, all_new):
    place = places[to]
    if not all_new:
        kind = {"model_type": "bit"} if to == "huggingface" else {"architecture": "resnetv2_x_bit"}
        config = config | kind
    (place / "config.json").write_text(json.dumps(config))
    (place / "preprocessor_config.json").write_text(json.dumps(processor))
    assert "\n" not in (used_or_refused(place) or "")


@given(index=ANYTHING | st.fixed_dictionaries({"weight_map": ANYTHING | st.dictionaries(st.text(), ANYTHING)}))
@FUZZ
def test_any_index_is_refused_in_one_line(tmp_path_factory, index):
    place = tmp_path_factory.mktemp("index")
    (place / "config.json").write_text('{"model_type": "bit"}')
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    message = used_or_refused(place)
    assert message is not None
    assert "\n" not in message


def read_or_refused(labels):
    try:
        return label_names(3, labels, model="m")
    except ModelError as error:
        return str(error)


@given(content=st.binary() | ANYTHING.map(lambda x: json.dumps(x).encode()), suffix=st.sampled_from([".json", ".txt"]))
@FUZZ
def test_any_label_file_is_three_names_or_refused_in_one_line(tmp_path, content, suffix):
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(content)
    result = read_or_refused(path)
    if isinstance(result, str):
        assert "\n" not in result
    else:
        assert len(result) == 3
        assert [name.encode().decode() for name in result] == list(result)


SHAPE = st.lists(st.integers(-1, 2**70) | st.integers(0, 70), max_size=5).map(tuple)
KIND = st.sampled_from(["<f4", ">f8", "<f2", "|O", "V2", "S0", "<U9", "c8", "?", "M8", "[('a','f4')]", "", "f4,f4"])
NPY = st.builds(
    npy,
    st.text("{}()[]'\",:-0123456789desc rforta_hpFlTu<f\n\\#L", max_size=80) | st.builds(header, SHAPE, KIND),
    st.binary(max_size=64),
    st.sampled_from([1, 1, 1, 2, 3]),
)


@given(root=NPY | st.binary(max_size=100), name=st.sampled_from(ARRAYS), other=NPY, deflated=st.booleans())
@FUZZ
def test_any_npz_is_refused_in_one_line(tmp_path, root, name, other, deflated):
    prefix = name.removesuffix(ROOT).removesuffix(BIG_VISION_ROOT)
    members = [(f"{name}.npy", root), (f"{prefix}block1/unit01/conv1/kernel.npy", other)]
    packing = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    message = used_or_refused(write_zip(tmp_path / "model.npz", members, packing))
    assert message is not None
    assert "\n" not in message


TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "F4", "F8_E8M0", "BOOL", "I64", "C64", "X"])
        | ANYTHING,
        "shape": st.lists(st.integers(-1, 2**65), max_size=4) | st.just([16]) | ANYTHING,
        "data_offsets": st.just([0, 64]) | st.lists(st.integers(-1, 2**65), max_size=3) | ANYTHING,
    },
)
TENSOR_NAMES = st.sampled_from(["stem.conv.weight", "root.weight", "__metadata__"]) | st.text(max_size=9)


@given(
    header=st.dictionaries(TENSOR_NAMES, TENSOR | ANYTHING, max_size=3), length=st.none() | st.integers(0, 2**64 - 1)
)
@FUZZ
def test_any_safetensors_header_is_refused_in_one_line(tmp_path, header, length):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))
    message = used_or_refused(path)
    assert message is not None
    assert "\n" not in message


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    """One small file of each format."""
    top = tmp_path_factory.mktemp("files")
    small = {name: tensor.new_zeros(tensor.shape) for name, tensor in tensors(model).items() if tensor.numel() < 600}
    torch.save(small, top / "new.pth")
    torch.save(small, top / "old.pth", _use_new_zipfile_serialization=False)
    save_file(small, top / "small.safetensors")
    np.savez(top / "small.npz", **{ROOT: np.zeros((7, 7, 3, 1), np.float32), "resnet/group_norm/gamma": np.zeros(4)})
    return [(path.suffix, path.read_bytes()) for path in sorted(top.iterdir())]


@given(which=st.integers(0, 3), edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8))
@FUZZ
def test_any_damage_to_a_file_is_refused_in_one_line(tmp_path, files, which, edits):
    suffix, data = files[which]
    damaged = bytearray(data)
    for place, value in edits:
        at = place % len(damaged) if place % 2 else place % min(len(damaged), 400)
        damaged[-1 - at if place % 3 else at] = value
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(damaged)
    message = used_or_refused(path)
    assert message is not None
    assert "\n" not in message
