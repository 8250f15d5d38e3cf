"""What a folder has in it, how it is split, and which folders are refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import photo
from PIL import Image

from bit_ray.autotrain.config import TrainConfig
from bit_ray.autotrain.look import look
from bit_ray.autotrain.scan import PARTS, Found, Scan, scan_folder
from bit_ray.autotrain.split import num_shared, split, without_copies
from bit_ray.errors import DataError


def picture(path, seed=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


def classes(folder, names=("cats", "dogs"), count=6, first=0):
    for label, name in enumerate(names):
        for i in range(count):
            picture(folder / name / f"{i}.png", seed=first + 100 * label + i)


def test_everything_in_a_folder_is_counted_and_named(tmp_path):
    classes(tmp_path, ("äpfel & birnen", "dogs"))
    picture(tmp_path / "dogs/gray.png", 1, "L")
    picture(tmp_path / "dogs/palette.gif", 2, "P")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "dogs/phone.jpg", 3, exif=exif)
    (tmp_path / "dogs/copy.png").write_bytes((tmp_path / "dogs/1.png").read_bytes())
    (tmp_path / "dogs/bad.jpg").write_bytes(b"no image")
    (tmp_path / "dogs/live.HEIC").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    picture(tmp_path / ".hidden/thumb.png")
    found = scan_folder(str(tmp_path))
    assert found.class_names == ("dogs", "äpfel & birnen")
    assert len(found.images) == 16
    assert found.kinds == {"grayscale": 1, "palette": 1, "stored sideways": 1}
    assert found.unreadable == (("dogs/bad.jpg", "not an image of a known format, or its header is damaged"),)
    assert found.others == {".heic": 1, ".txt": 1}
    assert found.num_duplicates == 1
    assert {image.part for image in found.images} == {None}


def test_parts_are_found_by_name(tmp_path):
    classes(tmp_path / "Training")
    classes(tmp_path / "valid", first=1000)
    classes(tmp_path / "test", ("cats",), first=2000)
    found = scan_folder(str(tmp_path))
    parts = split(found, 0.15, 0.2, 0)
    assert {part: len(images) for part, images in parts.items()} == {"train": 12, "val": 12, "test": 6}
    assert all(image.path.startswith("valid/") for image in parts["val"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no image in it; accepted: files ending in"),
        (["a.txt", "b.heic"], r"no image in it \(1 .heic \(convert to JPEG\), 1 .txt\); accepted"),
        (["0.png", "1.png"], r"2 images lie directly in it; .*; give the folder above, or make class folders"),
        (["0.png", "cats/1.png", "dogs/2.png"], r"1 image lies directly in it; .*; move '0.png' into a class's folder"),
        (["animals/cats/1.png", "animals/dogs/2.png"], r"one class, 'animals'; .*; did you mean .*/animals\?"),
        (["cats/1.png"], r"one class, 'cats'; accepted: at least two; add another class"),
        (["train/cats/1.png", "cats/1.png"], r"has the folders cats, train; accepted: .*; move or rename"),
        (["test/cats/1.png", "test/dogs/1.png"], r"has the folders test; accepted: .*; move or rename"),
        (["train/1.png", "train/cats/1.png"], r"train: 1 image lies directly in it"),
        (
            ["train/1.png", "test/1.png", "test/2.png"],
            r"test: 2 images lie directly in it; .* if test is a class, rena",
        ),
        (
            ["train/cats/1.png", "train/dogs/1.png", "test/cows/1.png"],
            r"test: class 'cows' is not in train; accepted: the classes of train",
        ),
    ],
)
def test_a_folder_of_another_shape_is_one_line(tmp_path, files, message):
    for i, name in enumerate(files):
        if name.endswith(".png"):
            picture(tmp_path / name, i)
        else:
            (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=message) as refused:
        scan_folder(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_folder_of_nothing_but_damaged_files_says_so_of_the_first(tmp_path):
    for name in ("cats/0.jpg", "dogs/0.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of 2 images can be read; the first, cats/0.jpg: not an image"):
        scan_folder(str(tmp_path))
    with pytest.raises(DataError, match="no such folder; accepted: a folder with a folder of images for each class"):
        scan_folder(str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"0.jpg: a file; accepted: a folder with .*; give the folder"):
        scan_folder(str(tmp_path / "cats/0.jpg"))


def a_scan(counts, copies=()):
    images, number = [], 0
    for label, count in enumerate(counts):
        for i in range(count):
            images.append(Found(path=f"{label}/{i}.png", label=label, part=None, sha256=f"{number}"))
            number += 1
    images += [
        Found(path=f"{label}/copy-{i}.png", label=label, part=None, sha256=sha256)
        for i, (label, sha256) in enumerate(copies)
    ]
    names = tuple(f"class {label}" for label in range(len(counts)))
    return Scan(folder="x", class_names=names, images=tuple(images), unreadable=(), others={})


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(4, 30), min_size=2, max_size=4),
    copied=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=8),
    shares=st.tuples(st.floats(0.01, 0.49), st.floats(0.01, 0.49)),
    seed=st.integers(0, 5),
)
def test_a_split_gives_each_class_to_each_part_and_no_image_to_two(counts, copied, shares, seed):
    copies = [(label % len(counts), str(number % sum(counts))) for label, number in copied]
    scan = a_scan(counts, copies)
    try:
        parts = split(scan, *shares, seed)
    except DataError:
        labels_of = {image.sha256: set() for image in scan.images}
        for image in scan.images:
            labels_of[image.sha256].add(image.label)
        assert any(len(labels) > 1 for labels in labels_of.values()), (
            "only copies in several classes make one too small"
        )
        return
    everything = [image for part in PARTS for image in parts[part]]
    assert sorted(everything, key=lambda image: image.path) == sorted(scan.images, key=lambda image: image.path)
    assert num_shared(parts) == 0
    for label in range(len(counts)):
        for part, least in (("train", 2), ("val", 1), ("test", 1)):
            assert len({image.sha256 for image in parts[part] if image.label == label}) >= least, (label, part)
    assert split(scan, *shares, seed) == parts


def test_a_split_follows_the_seed_and_the_shares():
    scan = a_scan([100, 40])
    parts = split(scan, 0.15, 0.2, 0)
    assert {part: len(images) for part, images in parts.items()} == {"train": 91, "val": 21, "test": 28}
    assert split(scan, 0.15, 0.2, 1) != parts


def test_a_class_of_one_image_is_refused_with_what_it_lacks():
    with pytest.raises(
        DataError, match="class 'class 1': 1 different image; accepted: at least 4, of which one is for"
    ):
        split(a_scan([10, 1]), 0.15, 0.2, 0)


def test_a_class_of_damaged_files_is_refused_with_their_number():
    damaged = tuple((f"1/{i}.png", "damaged") for i in range(12))
    scan = replace(a_scan([10, 1]), class_names=("0", "1"), unreadable=(("0/a.png", "damaged"), *damaged))
    with pytest.raises(DataError, match="class '1': 1 different image, and 12 that cannot be read; accepted: at least"):
        split(scan, 0.15, 0.2, 0)
    images = tuple(replace(image, part="train") for image in scan.images)
    parts = replace(scan, images=images, unreadable=tuple((f"train/{path}", "damaged") for path, _ in damaged))
    with pytest.raises(DataError, match="class '1': 1 different image, and 12 that cannot be read; accepted: at least"):
        split(parts, 0.15, 0.2, 0)


def test_a_class_of_which_too_much_is_in_another_is_refused_with_how_much():
    images = [Found(path=f"{label}/{i}", label=label, part=None, sha256=f"{i}") for label in (0, 1) for i in range(6)]
    scan = Scan(folder="x", class_names=("a", "b"), images=tuple(images), unreadable=(), others={})
    with pytest.raises(DataError, match="class 'a': 6 different images, 6 of them also in other classes; accepted: "):
        split(scan, 0.15, 0.2, 0)


def test_copies_in_another_part_are_counted_and_left_out_on_request():
    train = [Found(path="train/0/a.png", label=0, part="train", sha256="a")]
    test = [Found(path=f"test/0/{name}.png", label=0, part="test", sha256=name) for name in "ab"]
    parts = {"train": train, "val": [], "test": test}
    assert num_shared(parts) == 1
    assert [image.sha256 for image in without_copies(parts)["test"]] == ["b"]


def test_near_duplicates_stay_together_and_those_of_two_classes_are_named(tmp_path, capsys):
    for label, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        for i in range(8):
            photo(100 * label + i).save(tmp_path / name / f"{i}.png")
    photo(0).resize((90, 68)).save(tmp_path / "cats/small.jpg", quality=60)
    photo(0).crop((6, 4, 234, 174)).save(tmp_path / "cats/cropped.png")
    photo(1).save(tmp_path / "dogs/mislabelled.jpg", quality=50)
    found = scan_folder(str(tmp_path))
    groups = {image.path: image.original for image in found.images}
    assert groups["cats/0.png"] == groups["cats/small.jpg"] == groups["cats/cropped.png"]
    assert groups["cats/1.png"] == groups["dogs/mislabelled.jpg"]
    assert len(set(groups.values())) == 16
    assert (found.num_duplicates, found.num_near_duplicates) == (0, 3)
    for seed in range(10):
        parts = split(found, 0.15, 0.2, seed)
        assert num_shared(parts) == 0
        assert {"cats/1.png", "dogs/mislabelled.jpg"} <= {image.path for image in parts["train"]}
    looked = look(TrainConfig(folder=str(tmp_path)))
    shown = " ".join(capsys.readouterr().out.split())
    assert "near-duplicates of other images (resized, recompressed or cropped): 3, such as" in shown
    assert "alike, with different labels: cats/1.png and dogs/mislabelled.jpg" in shown
    assert "alike, with different labels: cats/1.png and dogs/mislabelled.jpg" in looked.notes


def test_near_duplicates_between_given_parts_are_counted_and_left_out_on_request(tmp_path, capsys):
    for part, first in (("train", 0), ("val", 20), ("test", 40)):
        for label, name in enumerate(("cats", "dogs")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                photo(first + 100 * label + i).save(tmp_path / part / name / f"{i}.png")
    photo(0).save(tmp_path / "test/cats/again.jpg", quality=70)
    looked = look(TrainConfig(folder=str(tmp_path)))
    shown = " ".join(capsys.readouterr().out.split())
    assert "images of val and test whose copies or near-duplicates are in train or val: 1; " in shown
    assert len(looked.parts["test"]) == 7
    looked = look(TrainConfig(folder=str(tmp_path), drop_duplicates=True))
    assert [image.path for image in looked.parts["test"] if image.label == 0] == [
        f"test/cats/{i}.png" for i in range(3)
    ]


def test_a_class_of_frames_of_one_film_is_split_nevertheless_and_it_is_said(tmp_path, capsys):
    for label, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        for i in range(8):
            image = photo(100) if label else photo(i)
            image.crop((i % 4, i // 4, 236 + i % 4, 178 + i // 4)).save(tmp_path / name / f"{i}.png")
    looked = look(TrainConfig(folder=str(tmp_path)))
    assert sum(map(len, looked.parts.values())) == 16
    shown = " ".join(capsys.readouterr().out.split())
    assert "near-duplicates are not kept in one part: class dogs: 1 different image;" in shown.replace("'", "")


def test_a_large_group_of_copies_stays_in_train():
    scan = a_scan([20, 20], [(0, "0")] * 30)
    for seed in range(10):
        parts = split(scan, 0.15, 0.2, seed)
        assert all(len(parts[part]) < 20 for part in ("val", "test"))
