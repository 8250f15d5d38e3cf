"""Files of publishers in formats that can lie about themselves: MATLAB, zip, NumPy, NORB, HDF5."""

import gzip
import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from bit_ray.data.sources.mat import read_mat, whole_numbers
from bit_ray.data.sources.vtab.images import Files, read_entry
from bit_ray.data.sources.vtab.released import open_released
from bit_ray.data.sources.vtab.specialized import open_camelyon, opened_h5
from bit_ray.data.sources.vtab.structured import open_dsprites, read_norb
from bit_ray.data.sources.vtab.tasks import find_task
from bit_ray.errors import BitRayError, ConfigError


def refused(function, *arguments, **options):
    """The message of the error that the call ends with."""
    with pytest.raises(BitRayError) as raised:
        function(*arguments, **options)
    assert str(raised.value).isprintable()
    return str(raised.value)


def element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(kind, body, shape=(1, 1), name=b"labels"):
    header = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<ii", *shape)) + element(1, name)
    return element(14, header + body)


def mat(*variables):
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + b"".join(variables)


def packed(data, times=1):
    for _ in range(times):
        data = zlib.compress(data)
        data = struct.pack("<II", 15, len(data)) + data
    return data


ONE = element(9, struct.pack("<d", 1))


def nested(depth):
    found = matrix(6, ONE)
    for _ in range(depth):
        found = matrix(1, found)
    return found


def zeros(num_bytes):
    """An array of zeros, a thousandth of its size when packed."""
    head = matrix(9, b"", (1, num_bytes))
    body = struct.pack("<II", 2, num_bytes)
    whole = struct.pack("<II", 14, len(head) - 8 + len(body) + num_bytes) + head[8:] + body
    stream = zlib.compressobj(1)
    data = stream.compress(whole) + b"".join(stream.compress(bytes(2**20)) for _ in range(num_bytes // 2**20))
    data += stream.flush()
    return struct.pack("<II", 15, len(data)) + data


MATS = {
    "arrays in arrays": (lambda: mat(nested(20_000)), "nested deeper"),
    "packed arrays in arrays": (lambda: mat(packed(nested(20_000))), "nested deeper"),
    "more cells than bytes": (lambda: mat(matrix(1, ONE, (100_000, 100_000))), "10,000,000,000 values in"),
    "more structures than bytes": (lambda: mat(matrix(2, ONE, (100_000, 100_000))), "10,000,000,000 values in"),
    "more numbers than bytes": (lambda: mat(matrix(6, ONE, (2**31 - 1, 2**31 - 1))), "values in"),
    "a negative shape": (lambda: mat(matrix(1, ONE, (-1, 1))), "values in"),
    "a sparse array": (lambda: mat(matrix(5, ONE)), "class 5"),
    "a function": (lambda: mat(matrix(16, ONE)), "class 16"),
    "an object": (lambda: mat(matrix(17, ONE)), "class 17"),
    "packed twice": (lambda: mat(packed(matrix(6, ONE), 2)), "compressed twice"),
    "an element beyond its end": (lambda: mat(matrix(6, struct.pack("<II", 9, 2**31) + bytes(8))), "after its end"),
    "a gigabyte of zeros": (lambda: mat(zeros(2**30 + 2**20)), "more than 1,073,741,824 bytes"),
    "text": (lambda: b"hello" * 99, "not a file of version 5"),
    "nothing": (lambda: b"", "."),
}


@pytest.mark.parametrize("name", MATS)
def test_a_matlab_file_that_lies_is_one_line(tmp_path, name):
    make, message = MATS[name]
    (tmp_path / "a.mat").write_bytes(make())
    # In a process of its own, in which a crash is seen.
    code = """
import sys, resource
from bit_ray.data.sources.mat import read_mat
from bit_ray.cli.training import exit_status
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
sys.exit(exit_status(lambda: read_mat(open(sys.argv[1], "rb").read(), "a.mat", "labels")))
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.mat"], capture_output=True, text=True, timeout=100)
    assert run.returncode == 2, run.stderr[-300:]
    assert run.stderr.startswith("error: a.mat: not readable as a MATLAB file (")
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_files_of_the_kinds_that_publishers_have_are_read_as_scipy_reads_them(compressed):
    buffer = io.BytesIO()
    rows = np.array(
        [(1, "n01", "tench, fish", 0), (2, "n02", "übung", 3)], [("ID", "O"), ("WNID", "O"), ("words", "O"), ("n", "O")]
    )
    given = {"labels": np.arange(1, 300, dtype=np.uint16)[None], "X": np.zeros((4, 4, 3, 2), np.uint8), "synsets": rows}
    scipy.io.savemat(buffer, given, do_compression=compressed)
    expected = scipy.io.loadmat(io.BytesIO(buffer.getvalue()), squeeze_me=True)
    found = read_mat(buffer.getvalue(), "a.mat", *given)
    for name in given:
        assert np.array_equal(found[name], expected[name])
        assert found[name].dtype == expected[name].dtype
    assert whole_numbers(found["labels"], "x").tolist() == list(range(1, 300))


@pytest.mark.parametrize("values", [[0.5], [np.nan], [np.inf], [1e300], ["a"], [{}]])
def test_variables_that_are_no_whole_numbers_are_one_line(values):
    assert refused(whole_numbers, np.array(values), "a.mat: labels").startswith(
        "a.mat: labels: values other than whole numbers"
    )


def zipped(path, name, data, **options):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data, **options)
    return path


def patched(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def test_files_of_a_zip_are_read_within_bounds(tmp_path):
    path = zipped(tmp_path / "a.zip", "lists/a.txt", bytes(2**21), compress_type=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        assert read_entry(archive, "lists/a.txt") == bytes(2**21)
        message = refused(read_entry, archive, "lists/a.txt", 2**20)
        assert message == f"{path}: lists/a.txt: 2,097,152 bytes; accepted: at most 1,048,576; fetch it again"
        assert refused(read_entry, archive, "none").startswith(f"{path}: no none in it")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        zipped(path, "a.txt", bytes(2**21), compress_type=method)
        assert f"a.txt: compressed by method {method}; accepted: stored or deflated" in refused(
            Files(path).read_text, "a.txt"
        )
    zipped(path, "a.txt", b"\xff")
    assert refused(Files(path).read_text, "a.txt").startswith(f"{path}: a.txt: not text in UTF-8; accepted: ")
    data = bytearray(zipped(path, "a.txt", b"abc").read_bytes())
    for place in (6, data.index(b"PK\x01\x02") + 8):
        data[place] |= 1  # encrypted
    path.write_bytes(data)
    assert "damaged or not a zip (" in refused(Files(path).read_text, "a.txt")
    os.unlink(path)
    os.mkfifo(path)
    assert refused(Files, path).startswith(f"{path}: a pipe")


DSPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 6)}", "for shape [1000000000000, 6]"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1, 6)}", "of object"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 6)}", "of float64"),
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 6)}", "latents_classes"),
        ("(" * 5000, "not an array of NumPy"),
        ("{'descr': __import__('os')}", "not an array of NumPy"),
    ],
)
def test_arrays_of_numpy_that_lie_are_one_line(tmp_path, header, message):
    (tmp_path / "dsprites").mkdir()
    text = header.encode().ljust(-(-(len(header) + 11) // 64) * 64 - 11) + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(48)
    zipped(tmp_path / "dsprites" / DSPRITES, "latents_classes.npy", data)
    found = refused(open_dsprites, find_task("dsprites-xpos"), tmp_path, "all")
    assert DSPRITES in found
    assert message in found


@pytest.mark.parametrize(
    "values",
    [(0x1E3D4C55, 3, 2**20, 2**20, 2**20), (0x1E3D4C55, 3, -1, 1, 1), (0x1E3D4C55, 3, 5, 5, 5), (1, 2, 3, 4, 5)],
)
def test_files_of_norb_that_lie_are_one_line(tmp_path, values):
    data = struct.pack("<5i", *values) + bytes(30)
    for name, content in (("a.mat", data), ("a.mat.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        assert refused(read_norb, tmp_path / name).startswith(f"{tmp_path / name}: not a complete file of NORB (")


def test_a_file_of_norb_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path):
    data = struct.pack("<5i", 0x1E3D4C55, 1, 2**25, 1, 1) + bytes(2**25)
    (tmp_path / "a.mat.gz").write_bytes(gzip.compress(data))
    assert "100 times its size" in refused(read_norb, tmp_path / "a.mat.gz")


def linked(file):
    file["x"] = h5py.ExternalLink("other.h5", "x")


def external(file):
    file.create_dataset("x", (2, 96, 96, 3), "u1", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def virtual(file):
    layout = h5py.VirtualLayout((2, 96, 96, 3), "u1")
    layout[:] = h5py.VirtualSource("other.h5", "x", (2, 96, 96, 3))
    file.create_virtual_dataset("x", layout)


@pytest.mark.parametrize(
    "make",
    [
        linked,
        external,
        virtual,
        lambda file: file.create_group("x"),
        lambda file: file.create_dataset("y", data=[1]),
        lambda file: file.create_dataset("x", data=["a", "b"]),
        lambda file: file.create_dataset("x", (10**9, 96, 96, 3), "u1", chunks=(10**5, 96, 96, 1)),
    ],
)
def test_an_hdf5_file_holds_its_pixels_itself(tmp_path, make):
    folder = tmp_path / "patch_camelyon"
    folder.mkdir()
    with h5py.File(folder / "camelyonpatch_level_2_split_test_x.h5", "w") as file:
        make(file)
    with h5py.File(folder / "camelyonpatch_level_2_split_test_y.h5", "w") as file:
        file["y"] = np.zeros((2, 1, 1, 1), np.uint8)
    message = refused(open_camelyon, find_task("patch_camelyon"), tmp_path, "test")
    assert message.startswith(f"{folder}/camelyonpatch_level_2_split_test_x.h5: ")


def test_lists_that_leave_their_folder_are_refused(tmp_path):
    folder = tmp_path / "dsprites-xpos"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "secret.png")
    for name in ("train800.txt", "val200.txt", "test.txt"):
        (folder / name).write_text("../secret.png 1\n")
    task = find_task("dsprites-xpos")
    assert "line 1: '../secret.png 1'; accepted: IMAGE LABEL" in refused(open_released, task, tmp_path, "train")
    (folder / "train800.txt").write_text(f"{tmp_path}/secret.png 1\n")
    assert "the image below the folder" in refused(open_released, task, tmp_path, "train")
    (folder / "train800.txt").write_bytes(b"\xff 1\n")
    assert "not text in UTF-8" in refused(open_released, task, tmp_path, "train")


def test_an_entry_without_a_name_in_a_zip_is_passed_over(tmp_path):
    path = zipped(tmp_path / "a.zip", "a.png", b"x")
    data = path.read_bytes()
    assert data.count(b"a.png") == 2
    # Five bytes of a comment in place of five of a name, in the directory at the end.
    at = data.rindex(b"a.png")
    header = bytearray(data[at - 46 : at])
    header[28:30], header[32:34] = bytes(2), (5).to_bytes(2, "little")
    path.write_bytes(data[: at - 46] + header + data[at:])
    with zipfile.ZipFile(path) as archive:
        assert [entry.filename for entry in archive.infolist()] == [""]
    assert Files(path).image_names == []


def test_a_missing_reader_is_named_as_the_package_that_an_index_has(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"h5py is not installed; run pip install h5py$"):
        opened_h5(tmp_path / "x.h5")
