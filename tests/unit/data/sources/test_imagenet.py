"""ILSVRC-2012 and ImageNet-21k from small archives in the publisher's layout; torchvision is the reference."""

import io
import tarfile

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from PIL import Image

from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.published.names import open_dataset
from bit_ray.errors import DataError

# Number in the kit, WordNet id, words; the numbers follow another order than the ids, and words come twice.
SYNSETS = [
    (1, "n02119789", "kit fox, Vulpes macrotis"),
    (2, "n01440764", "tench, Tinca tinca"),
    (3, "n03126707", "crane"),
    (4, "n02012849", "crane"),
]
NAMES = tuple(f"{wnid} {words}" for _, wnid, words in sorted(SYNSETS, key=lambda row: row[1]))
KIT = "ILSVRC2012_devkit_t12"


def photo(i):
    rng = np.random.default_rng(i)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_bytes(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpack(data, folder):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")


def devkit(truth):
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows = [(float(n), wnid, words, "a gloss", 0.0, [], 0.0) for n, wnid, words in SYNSETS]
    rows.append((5.0, "n00001740", "entity", "the root", 2.0, [1.0, 2.0], 9.0))  # above the classes
    synsets = np.empty((len(rows), 1), [(name, object) for name in (*fields, "num_train_images")])
    for i, row in enumerate(rows):
        synsets[i, 0] = (*row, 1300.0)
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets})
    text = "".join(f"{number}\n" for number in truth)
    names = {"meta.mat": buffer.getvalue(), "ILSVRC2012_validation_ground_truth.txt": text.encode()}
    return tar_bytes({f"{KIT}/data/{name}": data for name, data in names.items()}, "w:gz")


@pytest.fixture
def archives(tmp_path):
    """A folder as the publisher distributes it, and the bytes of the archives."""
    inner = {}
    for number, wnid, _ in SYNSETS[::-1]:
        photos = {f"{wnid}_{i}.JPEG": photo(100 * number + i) for i in range(number + 1)}
        inner[f"{wnid}.tar"] = tar_bytes(photos)
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": photo(i) for i in (3, 1, 2, 5, 4)}
    data = {
        "ILSVRC2012_img_train.tar": tar_bytes(inner),
        "ILSVRC2012_img_val.tar": tar_bytes(val),
        f"{KIT}.tar.gz": devkit([4, 2, 2, 1, 3]),
    }
    (tmp_path / "imagenet2012").mkdir()
    for name, content in data.items():
        (tmp_path / "imagenet2012" / name).write_bytes(content)
    return tmp_path, data


def examples(source):
    found = list(source.part(np.arange(len(source))))
    return {e.id: (e.image, *e.labels) for e in found}


@pytest.fixture
def reference(archives, tmp_path, monkeypatch):
    """Torchvision's reader of the same archives."""

    def read(split):
        known = {k: (name, None) for k, (name, _) in torchvision.datasets.imagenet.ARCHIVE_META.items()}
        monkeypatch.setattr(torchvision.datasets.imagenet, "ARCHIVE_META", known)
        root = tmp_path / "reference"
        root.mkdir(exist_ok=True)
        for name, content in archives[1].items():
            (root / name).write_bytes(content)
        return torchvision.datasets.ImageNet(root, split)

    return read


@pytest.mark.parametrize("split", ["train", "val"])
def test_ilsvrc_is_what_torchvision_reads_without_being_unpacked(archives, reference, split):
    folder, _ = archives
    found = reference(split)
    expected = {path.rpartition("/")[2].removesuffix(".JPEG"): label for path, label in found.imgs}
    source = open_dataset("imagenet2012", split, folder, check_size=False)
    read = examples(source)
    assert {id.removeprefix("imagenet2012/"): label for id, (_, label) in read.items()} == expected
    for path, _ in found.imgs:
        with open(path, "rb") as file:
            assert read["imagenet2012/" + path.rpartition("/")[2].removesuffix(".JPEG")][0] == file.read()
    assert source.class_names == NAMES
    assert [name.split(" ", 1)[1] for name in NAMES] == [", ".join(words) for words in found.classes]
    assert sorted(p.name for p in (folder / "imagenet2012").iterdir()) == sorted(archives[1])


def test_unpacked_ilsvrc_gives_the_same_examples(archives, reference):
    folder, data = archives
    whole = {split: examples(open_dataset("imagenet2012", split, folder, check_size=False)) for split in IMAGES}
    layouts = {"tars": folder / "tars", "flat": folder / "flat", "class folders": folder / "reference"}
    for layout in ("tars", "flat"):
        layouts[layout].mkdir()
        unpack(data[f"{KIT}.tar.gz"], layouts[layout])
        unpack(data["ILSVRC2012_img_train.tar"], layouts[layout] / "train")
        unpack(data["ILSVRC2012_img_val.tar"], layouts[layout] / "val")
    for split in IMAGES:
        reference(split)
        (layouts["class folders"] / f"ILSVRC2012_img_{split}.tar").unlink()
    for place in layouts.values():
        for split in IMAGES:
            assert examples(open_dataset("imagenet2012", split, place, check_size=False)) == whole[split]


IMAGES = ("train", "val")


def test_ilsvrc_of_another_size_is_refused_and_what_is_missing_is_named(archives, tmp_path):
    with pytest.raises(DataError, match="14 images of 4 classes; accepted: 1,281,167 of 1,000, as published"):
        open_dataset("imagenet2012", "train", archives[0])
    with pytest.raises(DataError, match="5 images of 4 classes; accepted: 50,000 of 1,000, as published"):
        open_dataset("imagenet2012", "val", archives[0])
    (archives[0] / "imagenet2012" / "ILSVRC2012_img_train.tar").unlink()
    for place, missing in ((tmp_path / "nothing", KIT), (archives[0], "ILSVRC2012_img_train.tar")):
        for download in (False, True):
            with pytest.raises(DataError, match=f"{missing}.* is not in {place}/imagenet2012") as raised:
                open_dataset("imagenet2012", "train", place, download=download)
            assert "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php" in str(raised.value)
            assert "\n" not in str(raised.value)
            assert ("--download cannot fetch it" in str(raised.value)) == download


def test_an_image_of_no_class_is_refused(archives):
    path = archives[0] / "imagenet2012" / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar_bytes({"ILSVRC2012_val_00000006.JPEG": photo(0)}))
    with pytest.raises(DataError, match=r"ILSVRC2012_val_00000006.JPEG: unknown class; accepted: .*4 classes"):
        open_dataset("imagenet2012", "val", archives[0])
    path = archives[0] / "imagenet2012" / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_bytes({"n00000001.tar": tar_bytes({"n00000001_1.JPEG": photo(0)})}))
    with pytest.raises(DataError, match="n00000001_1.JPEG: unknown class"):
        open_dataset("imagenet2012", "train", archives[0])


def test_a_cut_inside_an_archive_of_archives_is_noticed(archives):
    path = archives[0] / "imagenet2012" / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:-12_000])
    with pytest.raises(DataError, match="damaged or incomplete tar file"):
        open_dataset("imagenet2012", "train", archives[0])


def test_imagenet_21k_in_all_its_layouts(tmp_path):
    photos = {wnid: {f"{wnid}_{i}.JPEG": photo(i) for i in range(2)} for wnid in ("n02", "n01", "n03")}
    tars = {f"{wnid}.tar": tar_bytes(files) for wnid, files in photos.items()}
    whole = {f"winter21_whole/{name}": data for name, data in tars.items()}
    for name in ("tars", "folders", "whole", "compressed"):
        (tmp_path / name / "imagenet21k").mkdir(parents=True)
    for name, data in tars.items():
        (tmp_path / "tars" / "imagenet21k" / name).write_bytes(data)
        unpack(data, tmp_path / "folders" / "imagenet21k" / name.removesuffix(".tar"))
    (tmp_path / "whole" / "imagenet21k" / "winter21_whole.tar").write_bytes(tar_bytes(whole))
    (tmp_path / "compressed" / "imagenet21k" / "winter21_whole.tar.gz").write_bytes(tar_bytes(whole, "w:gz"))
    expected = {
        f"imagenet21k/{name.removesuffix('.JPEG')}": (data, ("n01", "n02", "n03").index(wnid))
        for wnid, files in photos.items()
        for name, data in files.items()
    }
    for name in ("tars", "folders", "whole", "compressed"):
        source = open_dataset("imagenet21k", "train", tmp_path / name)
        assert source.class_names == ("n01", "n02", "n03")
        assert examples(source) == expected

    place = tmp_path / "whole"
    listed = open_dataset("imagenet21k", "train", place, class_names=("n03", "n00", "n02", "n01"))
    assert {id: label for id, (_, label) in examples(listed).items()} == {
        id: (3, 2, 0)[label] for id, (_, label) in expected.items()
    }
    with pytest.raises(DataError, match="class n02 is not in the class list; accepted: one of its 2 WordNet ids"):
        open_dataset("imagenet21k", "train", place, class_names=("n03", "n01"))
    with pytest.raises(DataError, match="winter21_whole.tar is not in .*https://image-net.org/download-images.php"):
        open_dataset("imagenet21k", "train", tmp_path / "none")
    report = write_shards("imagenet21k:train", tmp_path / "set", name="21k", data_dir=place)
    assert report.num_examples == 6
