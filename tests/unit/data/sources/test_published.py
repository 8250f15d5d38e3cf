"""Data sets by name, from small files in their publishers' own formats; torchvision's readers are the reference."""

import gzip
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from PIL import Image

from bit_ray.cli.main import main
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_tables, to_examples
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.archives import members, read_members
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.published.files import Download
from bit_ray.data.sources.published.names import NAMED, open_dataset
from bit_ray.errors import ConfigError, DataError
from bit_ray.locks import locked


def photo(i, size=(40, 30), kind="JPEG"):
    rng = np.random.default_rng(i)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, files, mode="w"):
    """Write a tar file of name -> bytes, directories first, as publishers' archives have them."""
    with tarfile.open(path, mode) as tar:
        for folder in sorted({name.rpartition("/")[0] for name in files} - {""}):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def unpack(path, folder):
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")


def read_all(source):
    return list(source.part(np.arange(len(source))))


def pixels(example):
    return np.asarray(Image.open(io.BytesIO(example.image)).convert("RGB"))


def one_line(raised):
    text = str(raised.value)
    assert "\n" not in text
    return text


NAMES = {10: [f"name{i}" for i in range(10)], 100: [f"fine{i:02d}" for i in range(100)]}


def cifar_files(num_classes, per_batch=6):
    """The Python version: pickles of protocol 2, data [N, 3072] uint8."""
    rng = np.random.default_rng(num_classes)

    def batch(i):
        labels = rng.integers(0, num_classes, per_batch).tolist()
        found = {"data": rng.integers(0, 256, (per_batch, 3072), np.uint8), "filenames": ["x.png"] * per_batch}
        if num_classes == 100:
            found |= {"fine_labels": labels, "coarse_labels": [label // 5 for label in labels]}
        else:
            found |= {"labels": labels, "batch_label": f"training batch {i} of 5"}
        return found

    if num_classes == 100:
        folder, names = "cifar-100-python", ["train", "test"]
        meta = ("meta", {"fine_label_names": NAMES[100], "coarse_label_names": ["a", "b"]})
    else:
        folder, names = "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        meta = ("batches.meta", {"label_names": NAMES[10], "num_vis": 3072})
    batches = {name: batch(i) for i, name in enumerate(names, 1)}
    return folder, batches, {f"{folder}/{k}": pickle.dumps(v, 2) for k, v in (*batches.items(), meta)}


@pytest.fixture(params=[10, 100])
def cifar(request, tmp_path):
    """Number of classes, and a folder with the Python version's archive."""
    folder, _, files = cifar_files(request.param)
    write_tar(tmp_path / f"cifar-{request.param}-python.tar.gz", files, "w:gz")
    return request.param, tmp_path


def torchvision_cifar(num_classes, root, train):
    base = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[num_classes]

    class Made(base):
        train_list = [[name, None] for name, _ in base.train_list]
        test_list = [[name, None] for name, _ in base.test_list]
        meta = {**base.meta, "md5": None}

    return Made(root, train=train)


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_is_what_torchvision_reads(cifar, split, as_folder, tmp_path):
    num_classes, folder = cifar
    archive = folder / f"cifar-{num_classes}-python.tar.gz"
    unpack(archive, folder if as_folder else tmp_path / "reference")
    reference = torchvision_cifar(num_classes, folder if as_folder else tmp_path / "reference", split == "train")
    if as_folder:
        archive.unlink()
    source = open_dataset(f"cifar{num_classes}", split, folder, check_size=False)
    examples = read_all(source)
    assert len(source) == len(reference) == len(examples)
    assert source.class_names == tuple(reference.classes)
    for example, (image, label) in zip(examples, reference, strict=True):
        assert np.array_equal(pixels(example), np.asarray(image))
        assert example.labels == (label,)
    assert [e.id for e in examples] == [f"cifar{num_classes}/{split}/{i:05d}" for i in range(len(examples))]


@pytest.mark.parametrize("num_classes", [10, 100])
def test_the_binary_version_of_cifar_gives_the_same_examples(num_classes, tmp_path):
    folder, batches, files = cifar_files(num_classes)
    write_tar(tmp_path / f"cifar-{num_classes}-python.tar.gz", files, "w:gz")
    binary = {}
    for name, batch in batches.items():
        columns = [batch["data"]]
        for key in ("labels", "fine_labels", "coarse_labels"):  # a row is coarse, fine, pixels
            if key in batch:
                columns.insert(0, np.array(batch[key], np.uint8)[:, None])
        binary[f"{name}.bin"] = np.concatenate(columns, axis=1).tobytes()
    top = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[num_classes]
    binary[{10: "batches.meta.txt", 100: "fine_label_names.txt"}[num_classes]] = "\n".join(NAMES[num_classes]).encode()
    other = tmp_path / "binary"
    other.mkdir()
    write_tar(other / f"cifar-{num_classes}-binary.tar.gz", {f"{top}/{k}": v for k, v in binary.items()}, "w:gz")
    name = f"cifar{num_classes}"
    for split in ("train", "test", "train+test"):
        python, other_version = (open_dataset(name, split, d, check_size=False) for d in (tmp_path, other))
        assert read_all(python) == read_all(other_version)
        assert python.identity == other_version.identity
        assert python.class_names == other_version.class_names
    assert len(open_dataset(name, "train+test", other, check_size=False)) == 6 * len(batches)


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (pickle.dumps({"data": Exploit(), "labels": []}, 2), r"names posix.system"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, 2)[:300], r"not a batch"),
        (pickle.dumps([1, 2], 2), "has list"),
        (pickle.dumps({"data": np.zeros((2, 100), np.uint8), "labels": [0, 1]}, 2), "3,072 bytes"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, 2), "one label per image"),
    ],
)
def test_a_batch_of_cifar_that_is_none_is_refused_and_nothing_of_it_is_run(tmp_path, monkeypatch, batch, reason):
    monkeypatch.chdir(tmp_path)
    _, _, files = cifar_files(10)
    write_tar(tmp_path / "cifar-10-python.tar.gz", files | {"cifar-10-batches-py/test_batch": batch}, "w:gz")
    with pytest.raises(DataError, match=reason) as raised:
        open_dataset("cifar10", "test", tmp_path, check_size=False)
    assert "test_batch" in one_line(raised)
    assert not (tmp_path / "exploited").exists()


BREEDS = ["Abyssinian", "american_bulldog", "Bengal"]


def pets_archives(folder, images=None):
    names = [(f"{breed}_{i}", label) for label, breed in enumerate(BREEDS, 1) for i in range(1, 6)]
    photos = {f"images/{name}.jpg": photo(i) for i, (name, _) in enumerate(names)} if images is None else images
    # As in the publisher's archive: files beside the photographs that are none.
    write_tar(folder / "images.tar.gz", {"images/Abyssinian_101.mat": b"MATLAB", **photos}, "w:gz")
    rng = np.random.default_rng(0)
    lines = [f"{names[i][0]} {names[i][1]} 1 {names[i][1]}" for i in rng.permutation(len(names))]
    comments = "#Image CLASS-ID SPECIES BREED ID\n"
    annotations = {
        "annotations/README": b"read me",
        "annotations/list.txt": (comments + "\n".join(lines)).encode(),
        "annotations/trainval.txt": ("\n".join(lines[:8]) + "\n").encode(),
        "annotations/test.txt": ("\n".join(lines[8:]) + "\n").encode(),
    }
    write_tar(folder / "annotations.tar.gz", annotations, "w:gz")


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pets_are_what_torchvision_reads(tmp_path, split, as_folder):
    pets_archives(tmp_path)
    for name in ("images", "annotations"):
        unpack(tmp_path / f"{name}.tar.gz", tmp_path / "torchvision" / "oxford-iiit-pet")
    reference = torchvision.datasets.OxfordIIITPet(
        tmp_path / "torchvision", split={"train": "trainval", "test": "test"}[split]
    )
    place = tmp_path / "torchvision" if as_folder else tmp_path
    source = open_dataset("oxford_iiit_pet", split, place, check_size=False)
    assert source.class_names == tuple(reference.classes) == ("Abyssinian", "American Bulldog", "Bengal")
    for example, (image, label), path in zip(read_all(source), reference, reference._images, strict=True):
        assert np.array_equal(pixels(example), np.asarray(image))
        assert example.image == path.read_bytes()
        assert (example.labels, example.id) == ((label,), f"oxford_iiit_pet/{path.stem}")


def test_a_list_that_names_an_absent_image_is_refused(tmp_path):
    pets_archives(tmp_path, {"images/Bengal_1.jpg": photo(0)})
    with pytest.raises(DataError, match=r"images.tar.gz: no \w+.jpg in it, but annotations/trainval.txt") as raised:
        open_dataset("oxford_iiit_pet", "train", tmp_path)
    one_line(raised)


def flowers_files(folder, num_images=24):
    photos = {f"jpg/image_{i:05d}.jpg": photo(i) for i in range(1, num_images + 1)}
    write_tar(folder / "102flowers.tgz", photos, "w:gz")
    rng = np.random.default_rng(1)
    order = rng.permutation(np.arange(1, num_images + 1))
    labels = rng.integers(1, 103, num_images)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    sets = {"trnid": order[None, :6], "valid": order[None, 6:12], "tstid": order[None, 12:]}
    scipy.io.savemat(folder / "setid.mat", {k: v.astype(np.uint16) for k, v in sets.items()})


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_flowers_are_what_torchvision_reads(tmp_path, split, as_folder):
    base = tmp_path / "flowers-102"
    base.mkdir()
    flowers_files(base)
    unpack(base / "102flowers.tgz", base)

    class Made(torchvision.datasets.Flowers102):
        _file_dict = {k: (name, None) for k, (name, _) in torchvision.datasets.Flowers102._file_dict.items()}

    reference = Made(tmp_path, split=split)
    if as_folder:
        (base / "102flowers.tgz").unlink()
    else:
        base = base.rename(tmp_path / "oxford_flowers102")
    source = open_dataset("oxford_flowers102", split, tmp_path, check_size=False)
    assert source.class_names == tuple(torchvision.datasets.Flowers102.classes)
    assert len(source.class_names) == 102
    files = [base / path.relative_to(tmp_path / "flowers-102") for path in reference._image_files]
    for example, label, path in zip(read_all(source), reference._labels, files, strict=True):
        assert example == Example(f"oxford_flowers102/{path.stem}", path.read_bytes(), (label,))


def test_training_and_validation_flowers_together(tmp_path):
    flowers_files(tmp_path)
    parts = [read_all(open_dataset("oxford_flowers102", s, tmp_path, check_size=False)) for s in ("train", "val")]
    both = open_dataset("oxford_flowers102", "train+val", tmp_path, check_size=False)
    assert read_all(both) == parts[0] + parts[1]
    with pytest.raises(DataError, match="12 images of 102 classes; accepted: 2,040 of 102"):
        open_dataset("oxford_flowers102", "train+val", tmp_path)


def test_published_sizes_are_those_of_the_table():
    # bit-facts and the publishers' pages, typed by hand
    assert {name: (dict(named.sizes), named.num_classes) for name, named in NAMED.items()} == {
        "cifar10": ({"train": 50_000, "test": 10_000}, 10),
        "cifar100": ({"train": 50_000, "test": 10_000}, 100),
        "oxford_iiit_pet": ({"train": 3_680, "test": 3_669}, 37),
        "oxford_flowers102": ({"train": 1_020, "val": 1_020, "test": 6_149}, 102),
        "imagenet2012": ({"train": 1_281_167, "val": 50_000}, 1_000),
        "imagenet21k": ({"train": None}, None),  # several editions
    }


def test_a_named_set_becomes_shards_and_any_part_is_read_alone(tmp_path):
    pets_archives(tmp_path)
    source = open_dataset("oxford_iiit_pet", "train+test", tmp_path, check_size=False)
    examples = read_all(source)
    order = np.random.default_rng(0).permutation(len(examples))
    part = pickle.loads(pickle.dumps(source.part(order[:5])))
    assert list(part) == [examples[i] for i in order[:5]]
    write_shards(source, tmp_path / "set", name="pets", row_group_size=2, shard_examples=4)
    manifest = read_manifest(tmp_path / "set")
    rows = [row for table in read_tables(str(tmp_path / "set"), manifest) for row in to_examples(table)]
    assert sorted(rows, key=lambda e: e.id) == sorted(examples, key=lambda e: e.id)
    assert manifest.class_names == source.class_names


def test_what_is_missing_is_named_with_where_to_get_it_and_where_to_put_it(tmp_path):
    for name, files in (
        ("cifar10", ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]),
        ("cifar100", ["https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"]),
        ("oxford_iiit_pet", [f"https://www.robots.ox.ac.uk/~vgg/data/pets/data/{n}.tar.gz" for n in PETS_FILES]),
        ("oxford_flowers102", [f"https://www.robots.ox.ac.uk/~vgg/data/flowers/102/{n}" for n in FLOWERS_FILES]),
    ):
        with pytest.raises(DataError) as raised:
            open_dataset(name, "test", tmp_path)
        text = one_line(raised)
        assert all(file in text for file in files), text
        assert f"{tmp_path}/{name}" in text
        assert "--download" in text


PETS_FILES = ("images", "annotations")
FLOWERS_FILES = ("102flowers.tgz", "imagelabels.mat", "setid.mat")


class FileServer(BaseHTTPRequestHandler):
    """Serves ``files``, with ranges, and hangs up after ``cut`` bytes of an answer if that is set."""

    files: dict[str, bytes] = {}
    cut: int | None = None
    length = ""
    """What the server says of the length, if not the truth."""
    log: list[str | None] = []

    def do_GET(self):
        data = self.files.get(self.path.rpartition("/")[2])
        self.log.append(self.headers["Range"])
        if data is None:
            self.send_error(404, "Not Found")
            return
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start >= len(data):
            self.send_error(416, "Range Not Satisfiable")
            return
        self.send_response(206 if self.headers["Range"] else 200)
        self.send_header("Content-Length", self.length or str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    class Handler(FileServer):
        files, log = {}, []

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        Handler.url = f"http://127.0.0.1:{served.server_port}"
        yield Handler
        served.shutdown()
        thread.join()


def md5(data):
    return hashlib.md5(data).hexdigest()


def download(url, target, *, md5):
    Download(url, md5).fetch(target)


def test_a_download_continues_where_it_was_cut_and_has_its_name_only_when_whole(tmp_path, server):
    data = np.random.default_rng(0).bytes(100_000)
    server.files["a.tgz"] = data
    server.cut = 30_000
    target = tmp_path / "new" / "a.tgz"
    with pytest.raises(DataError, match=r"30,000 bytes are kept; the same command continues") as raised:
        download(f"{server.url}/a.tgz", target, md5=md5(data))
    one_line(raised)
    assert not target.exists()
    server.cut = None
    download(f"{server.url}/a.tgz", target, md5=md5(data))
    assert target.read_bytes() == data
    assert server.log == [None, "bytes=30000-"]
    assert [path.name for path in target.parent.iterdir()] == ["a.tgz"]


def test_a_download_that_was_whole_but_not_yet_named_is_not_repeated(tmp_path, server):
    data = bytes(1000)
    server.files["a.tgz"] = data
    (tmp_path / ".a.tgz.partial").write_bytes(data)
    download(f"{server.url}/a.tgz", tmp_path / "a.tgz", md5=md5(data))
    assert (tmp_path / "a.tgz").read_bytes() == data
    assert server.log == ["bytes=1000-"]


def test_another_file_than_the_publishers_is_refused(tmp_path, server):
    server.files["a.tgz"] = b"other"
    with pytest.raises(DataError, match=f"MD5 {md5(b'other')}; accepted: {md5(b'right')}, as published") as raised:
        download(f"{server.url}/a.tgz", tmp_path / "a.tgz", md5=md5(b"right"))
    one_line(raised)
    assert list(tmp_path.iterdir()) == []


def test_a_second_download_of_a_file_says_who_is_at_it(tmp_path, server):
    server.files["a.tgz"] = b"data"
    message = rf"a.tgz is being downloaded by PID {os.getpid()} .*; wait for it"
    with locked(tmp_path / ".a.tgz.lock", "", remedy=""), pytest.raises(ConfigError, match=message):
        download(f"{server.url}/a.tgz", tmp_path / "a.tgz", md5=md5(b"data"))
    assert server.log == []


def test_a_server_without_the_file_or_no_server_is_one_line(tmp_path, server):
    for url, reason in ((f"{server.url}/b.tgz", "Not Found"), ("http://127.0.0.1:9/b.tgz", "Connection refused")):
        with pytest.raises(DataError, match=reason) as raised:
            download(url, tmp_path / "b.tgz", md5="")
        assert "fetch it elsewhere and put it at" in one_line(raised)
        assert list(tmp_path.iterdir()) == []


def test_a_length_that_is_none_is_one_line(tmp_path, server):
    server.files["a.tgz"], server.length = b"data", "many"
    with pytest.raises(DataError, match="cannot be downloaded: the server reports a length of 'many'") as raised:
        download(f"{server.url}/a.tgz", tmp_path / "a.tgz", md5="")
    one_line(raised)
    assert list(tmp_path.iterdir()) == []


def test_cifar_is_downloaded_when_asked_for_and_only_then(tmp_path, server, monkeypatch):
    _, _, files = cifar_files(10)
    data = write_tar(tmp_path / "made.tar.gz", files, "w:gz").read_bytes()
    server.files["cifar-10-python.tar.gz"] = data
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{server.url}/cifar-10-python.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(data))
    with pytest.raises(DataError, match="cifar-10-python.tar.gz is not in"):
        open_dataset("cifar10", "test", tmp_path, check_size=False)
    assert server.log == []
    for _ in range(2):
        assert len(open_dataset("cifar10", "test", tmp_path, check_size=False, download=True)) == 6
    assert server.log == [None]
    assert (tmp_path / "cifar10" / "cifar-10-python.tar.gz").read_bytes() == data


def test_the_command_says_what_it_downloads_and_decompresses(tmp_path, server, monkeypatch, capfd):
    made = tmp_path / "made"
    made.mkdir()
    flowers_files(made)
    server.files |= {path.name: path.read_bytes() for path in made.iterdir()}
    known = {k: (name, md5(server.files[name])) for k, (name, _) in torchvision.datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", known)
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_download_url_prefix", f"{server.url}/")
    monkeypatch.chdir(tmp_path)
    arguments = ["shards", "write", "oxford_flowers102:train+val", "set", "--no-check-size"]
    assert main(arguments) == 2
    assert "102flowers.tgz and" in capfd.readouterr().err
    assert main([*arguments, "--download"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert f"{server.url}/102flowers.tgz: downloading" in out
    assert "102flowers.tgz: decompressing it to 102flowers.tar, once" in out
    assert read_manifest("set").num_examples == 12
    folder = tmp_path / "bit_ray_runs" / "datasets" / "oxford_flowers102"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*server.files, "102flowers.tar"])


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "folder"])
def test_members_are_found_and_read_whatever_their_names(tmp_path, kind):
    files = {f"top/{'n' * 150}/{i}.bin": bytes([i]) * (i * 300) for i in range(6)} | {"top/ü b.txt": b"x"}
    path = write_tar(tmp_path / f"a.{kind.replace('folder', 'tar')}", files, "w:gz" if kind == "tar.gz" else "w")
    if kind == "folder":
        unpack(path, tmp_path / "folder")
        path = tmp_path / "folder"
    found = {}
    for member in members(path):
        with open(member.file, "rb") as file:
            file.seek(member.offset)
            found[member.name] = file.read(member.length)
    assert found == files
    assert read_members(path, ["top/ü b.txt"]) == {"top/ü b.txt": b"x"}
    if kind == "tar.gz":
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.gz"]


@pytest.mark.parametrize("cut", [10 * 1024, 512 * 9, 512 * 7, 512 * 8 + 100, 100])
def test_a_tar_file_that_was_cut_short_anywhere_is_refused(tmp_path, cut):
    files = {f"{i}.bin": bytes([i]) * 1000 for i in range(3)}  # 1536 bytes each, the end mark from 4608 on
    path = write_tar(tmp_path / "a.tar", files)
    assert len(list(members(path))) == 3
    data = path.read_bytes()
    if cut < len(data):
        path.write_bytes(data[: min(cut, 4608)])
        with pytest.raises(DataError, match="damaged or incomplete tar file") as raised:
            list(members(path))
        assert str(path) in one_line(raised)


@pytest.mark.parametrize("data", [b"", b"no archive", gzip.compress(b"no archive", mtime=0), None])
def test_a_damaged_compressed_archive_is_refused_and_leaves_nothing_half_done(tmp_path, data):
    path = tmp_path / "102flowers.tgz"
    flowers_files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if data is None else data)
    with pytest.raises(DataError, match="damaged or incomplete tar file") as raised:
        open_dataset("oxford_flowers102", "train", tmp_path, check_size=False)
    one_line(raised)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_archive_that_changes_after_it_was_opened_is_noticed(tmp_path):
    flowers_files(tmp_path)
    source = open_dataset("oxford_flowers102", "test", tmp_path, check_size=False)
    tar = tmp_path / "102flowers.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(DataError, match="too short") as raised:
        read_all(source)
    one_line(raised)


def test_a_name_or_split_that_is_mistyped_is_one_line(tmp_path):
    for name, split, reason in (
        ("cifar-10", "train", "did you mean cifar10"),
        ("cifar10", "validation", "accepted: cifar10:train, cifar10:test"),
        ("cifar10", "train+train", "no such split"),
        ("cifar10", "", "no such split"),
    ):
        with pytest.raises(DataError, match=reason) as raised:
            open_dataset(name, split, tmp_path)
        one_line(raised)
    with pytest.raises(DataError, match="accepted: a local folder"):
        open_dataset("cifar10", "train", "s3://bucket/data")


def test_the_command_writes_a_set_by_name(tmp_path, monkeypatch, capfd):
    _, batches, files = cifar_files(10)
    write_tar(tmp_path / "cifar-10-python.tar.gz", files, "w:gz")
    monkeypatch.chdir(tmp_path)
    arguments = ["shards", "write", "cifar10:test", "set", "--data-dir", "."]
    assert main(arguments) == 2
    assert capfd.readouterr().err == (
        "error: cifar10:test: 6 images of 10 classes; accepted: 10,000 of 10, as published; fetch the set again, or "
        "give --no-check-size (check_size=False)\n"
    )
    assert not (tmp_path / "set").exists()
    assert main([*arguments, "--no-check-size"]) == 0
    manifest = read_manifest("set")
    assert (manifest.name, manifest.class_names) == ("cifar10:test", tuple(NAMES[10]))
    rows = [row for table in read_tables("set", manifest) for row in to_examples(table)]
    found = [row.labels[0] for row in sorted(rows, key=lambda row: row.id)]
    assert found == batches["test_batch"]["labels"]
    assert main([*arguments, "--no-check-size"]) == 0  # written already
    assert "there already" in capfd.readouterr().out


def test_the_example_of_the_documentation_runs(tmp_path):
    text = (Path(__file__).parents[4] / "docs" / "datasets.md").read_text()
    example = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[-1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e"], input=example, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "shards" / "tiny").num_examples == 100
    assert Image.open(tmp_path / "tiny.png").size[0] > 100


def test_images_that_are_gray_or_cut_short_are_named_left_out_or_converted(tmp_path):
    gray, alpha = io.BytesIO(), io.BytesIO()
    Image.new("L", (40, 40)).save(gray, "JPEG")
    Image.new("RGBA", (40, 40)).save(alpha, "PNG")  # a PNG named .jpg, as some of the publisher's are
    wrong = {"Abyssinian_1": gray.getvalue(), "american_bulldog_2": alpha.getvalue(), "Bengal_3": photo(7)[:400]}
    photos = {f"{breed}_{i}": photo(i) for breed in BREEDS for i in range(1, 6)}
    pets_archives(tmp_path, {f"images/{name}.jpg": data for name, data in (photos | wrong).items()})
    source = open_dataset("oxford_iiit_pet", "train+test", tmp_path, check_size=False)
    with pytest.raises(DataError, match=r"^oxford_iiit_pet/\w+: \w+.*; 2 more bad images.*--convert-images") as raised:
        write_shards(source, tmp_path / "set", name="pets")
    one_line(raised)
    reasons = dict(write_shards(source, tmp_path / "skip", name="pets", on_bad="skip").skipped)
    assert {id.rpartition("/")[2]: reason.split(" ")[0] for id, reason in reasons.items()} == {
        "Abyssinian_1": "grayscale",
        "american_bulldog_2": "alpha",
        "Bengal_3": "truncated",
    }
    report = write_shards(source, tmp_path / "converted", name="pets", on_bad="skip", convert_images=True)
    assert [id for id, _ in report.skipped] == ["oxford_iiit_pet/Bengal_3"]
    assert report.num_examples == 14
