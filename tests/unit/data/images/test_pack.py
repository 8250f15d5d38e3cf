import io
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from bit_ray.data.images import decode_view as decoder
from bit_ray.data.images.decode import ImageError, decode_image
from bit_ray.data.images.decode_view import decode_train_view
from bit_ray.data.images.pack import make_seekable, shrink
from bit_ray.data.images.resize import train_view
from bit_ray.data.images.views import TrainView, example_keys, place_view, uniforms
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_rows, to_examples
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.errors import BitRayError, ConfigError

SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
VIEWS = {
    "inception": TrainView(crop="inception", crop_size=64),
    "resize_crop": TrainView(crop="resize_crop", resize_size=80, crop_size=64),
    "resize": TrainView(crop="resize", crop_size=96),
}


def picture(width, height, seed=0):
    """Smooth colours with edges and a little noise: chroma differs from pixel to pixel."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(seed)
    channels = [
        127 + 120 * np.sin(x / 9 + seed) * np.cos(y / 7),
        (x * 5 + y * 3) % 256,
        255 * ((x // 11 + y // 13) % 2),
    ]
    return (np.stack(channels, -1) * 0.9 + rng.integers(0, 25, (height, width, 3))).clip(0, 255).astype(np.uint8)


def encode(pixels, kind="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(width=150, height=100, subsampling="4:2:0", seed=0, **options):
    return encode(picture(width, height, seed), quality=88, subsampling=SUBSAMPLINGS[subsampling], **options)


def seekable(data):
    packed = make_seekable(data, decode_image(data))
    assert packed is not None
    return packed


def u(seed):
    return uniforms(seed, 0, example_keys(["x"]))[0]


def by_the_book(pixels, box, resized, window, size, flip):
    """The view by Pillow's pixels and torchvision's resize."""
    top, left, height, width = box
    cut = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)
    small = tvf.resize(cut, list(resized), antialias=True)[:, window[0] :, window[1] :][:, :size, :size]
    return (small.flip(-1) if flip else small).permute(1, 2, 0).numpy()


def decode(data, view, seed=0, convert=False):
    """Path and pixels, or the refusal."""
    out = np.zeros((view.crop_size, view.crop_size, 3), np.uint8)
    try:
        return decode_train_view(data, view, u(seed), out, convert=convert)[0], out
    except ImageError as error:
        return "refused", str(error)


def decode_slowly(data, view, seed=0, convert=False):
    try:
        return "full", train_view(decode_image(data, convert=convert), view, u(seed))
    except ImageError as error:
        return "refused", str(error)


@pytest.mark.usefixtures("extension")
def test_the_extension_is_built():
    assert decoder.FAST_PATH, "build it: gcc and libjpeg-turbo's headers are needed, see .ci/run"


@pytest.mark.parametrize("markers", ["none", "seekable", "every MCU", "row by row", "not in columns"])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.usefixtures("extension")
def test_any_box_is_bit_for_bit_the_crop_of_the_whole_image(subsampling, markers):
    from bit_ray.data.images import _jpeg

    rng = random.Random(f"{subsampling} {markers}")
    options = {"every MCU": {"restart_marker_blocks": 1}, "row by row": {"restart_marker_rows": 1}}.get(markers, {})
    options = {"restart_marker_blocks": 7} if markers == "not in columns" else options
    for width, height in ((300, 210), (97, 143), (233, 48), (41, 33), (9, 5), (1, 1)):
        data = jpeg(width, height, subsampling, seed=width, **options)
        if markers == "seekable":
            data = seekable(data)
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        for _ in range(20):
            h, w = rng.choice([1, height, rng.randint(1, height)]), rng.choice([1, width, rng.randint(1, width)])
            top, left = rng.choice([0, height - h, rng.randint(0, height - h)]), rng.randint(0, width - w)
            size = rng.choice([1, 7, 32, 64, 101])
            resized = rng.choice([(size, size), (size + 5, size + 30), (max(size, h), max(size, w))])
            window = rng.randint(0, resized[0] - size), rng.randint(0, resized[1] - size)
            flip = rng.random() < 0.5
            want = by_the_book(pixels, (top, left, h, w), resized, window, size, flip)
            for simd in (True, False):
                out = np.empty((size, size, 3), np.uint8)
                by_interval = _jpeg.view(data, (top, left, h, w), resized, window, flip, out, simd=simd)
                np.testing.assert_array_equal(
                    out, want, err_msg=f"{width}x{height} {(top, left, h, w)} {resized} {simd}"
                )
                assert by_interval == (_jpeg.header(data)[2] and markers != "none")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("path", ["partial", "indexed"])
@pytest.mark.usefixtures("extension")
def test_the_fast_path_trains_on_the_same_pixels_as_the_full_one(path, view, monkeypatch):
    data = jpeg(400, 300)
    data = seekable(data) if path == "indexed" else data
    fast = [decode(data, VIEWS[view], seed) for seed in range(20)]
    assert {taken for taken, _ in fast} == {path}
    assert len({out.tobytes() for _, out in fast}) > 1  # flips and boxes differ
    for seed, (_, out) in enumerate(fast):
        np.testing.assert_array_equal(out, decode_slowly(data, VIEWS[view], seed)[1])
    monkeypatch.setattr(decoder, "FAST_PATH", False)
    taken, out = decode(data, VIEWS[view])
    assert taken == "full"
    np.testing.assert_array_equal(out, fast[0][1])


OTHERS = {
    "progressive": jpeg(progressive=True),
    "grayscale": encode(picture(60, 40), mode="L"),
    "CMYK": encode(picture(60, 40), mode="CMYK"),
    "RGB, not YCbCr": encode(picture(60, 40), keep_rgb=True),
    "4:4:0": simplejpeg.encode_jpeg(picture(60, 40), colorsubsampling="440"),
    "4:1:1": simplejpeg.encode_jpeg(picture(60, 40), colorsubsampling="411"),
    "bytes behind the end": jpeg() + b"photographed by a telephone",
    "no end": jpeg()[:-2],
    "half of it": jpeg()[: len(jpeg()) // 2],
    "header alone": jpeg()[:40],
    "a PNG": encode(picture(60, 40), "PNG"),
    "nothing": b"",
    "text": b"\xff\xd8 not a JPEG \xff\xd9",
}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_kinds_take_the_full_path_with_its_refusals(kind, convert):
    taken, got = decode(OTHERS[kind], VIEWS["inception"], convert=convert)
    want_taken, want = decode_slowly(OTHERS[kind], VIEWS["inception"], convert=convert)
    assert taken == want_taken
    np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures("extension")
def test_a_file_cut_anywhere_is_refused_as_ever():
    for data in (jpeg(60, 40), seekable(jpeg(60, 40, "4:2:2"))):
        for size in range(0, len(data), 7):
            assert decode(data[:size], VIEWS["inception"]) == decode_slowly(data[:size], VIEWS["inception"])


@pytest.mark.usefixtures("extension")
def test_missing_markers_and_damage_under_the_box_take_the_full_path():
    data = seekable(jpeg(400, 300))
    marker = data.index(b"\xff\xd2")
    for damaged in (data[:marker] + data[marker + 2 :], data[:marker] + b"\xff\xd5" + data[marker + 2 :]):
        taken, got = decode(damaged, VIEWS["resize"])
        want_taken, want = decode_slowly(damaged, VIEWS["resize"])
        assert taken == want_taken
        np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures("extension")
def test_hostile_bytes_neither_crash_nor_change_what_is_trained_on():
    rng = random.Random(0)
    files = [jpeg(90, 70, s) for s in SUBSAMPLINGS] + [seekable(jpeg(200, 70, s)) for s in SUBSAMPLINGS]
    files.append(jpeg(90, 70, progressive=True))
    same = 0
    for seed in range(600):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice([1, 1, 3, 20])):
            at = rng.randrange(len(data) if rng.random() < 0.6 else 700)
            data[at % len(data)] = rng.choice([0, 1, 255, 0xD0, 0xD9, rng.randrange(256)])
        if rng.random() < 0.3:
            at = rng.randrange(len(data))
            del data[at : at + rng.randrange(1, 60)]
        got, want = decode(bytes(data), VIEWS["inception"], seed), decode_slowly(bytes(data), VIEWS["inception"], seed)
        # Below its box the fast path sees no damage that the full one refuses; it never refuses more.
        assert (got[0] == "refused") <= (want[0] == "refused")
        same += want[0] == "refused" or np.array_equal(got[1], want[1])
        if rng.random() < 0.3:
            make_seekable(bytes(data), np.zeros((1, 1, 3), np.uint8))
    assert same == 600


def test_a_bomb_is_refused_by_its_header():
    data = bytearray(jpeg(64, 64))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    assert decode(bytes(data), VIEWS["inception"])[1] == "65500 x 65500 pixels, a decompression bomb; " + (
        "accepted: at most 100000000 pixels"
    )


@pytest.mark.parametrize(
    ("box", "resized", "window", "size"),
    [
        ((0, 0, 101, 10), (32, 32), (0, 0), 32),
        ((-1, 0, 10, 10), (32, 32), (0, 0), 32),
        ((0, 2**31 - 1, 1, 1), (32, 32), (0, 0), 32),
        ((0, 0, 0, 0), (32, 32), (0, 0), 32),
        ((0, 0, 10, 10), (31, 32), (0, 0), 32),
        ((0, 0, 10, 10), (40, 40), (9, 0), 32),
        ((0, 0, 10, 10), (2**31 - 1, 2**31 - 1), (0, 0), 32),
        ((0, 0, 10, 10), (0, 0), (0, 0), 0),
    ],
)
@pytest.mark.usefixtures("extension")
def test_boxes_outside_of_the_image_are_errors(box, resized, window, size):
    from bit_ray.data.images import _jpeg

    with pytest.raises(ValueError, match="outside|no square"):
        _jpeg.view(jpeg(), box, resized, window, False, np.zeros((size, size, 3), np.uint8))


@pytest.mark.usefixtures("extension")
def test_threads_do_not_disturb_each_other():
    files = [jpeg(300, 200, seed=i) for i in range(4)]
    files += [seekable(data) for data in files] + [files[0][:-300] + b"\xff\xd9"]
    work = [(data, VIEWS["inception"], seed) for seed in range(12) for data in files]
    alone = [decode(*job) for job in work]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: decode(*job), work))
    assert [path for path, _ in together] == [path for path, _ in alone]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(alone, together, strict=True))


def segments(data):
    """(marker, body) of the header's segments, up to the scan."""
    found, at = [], 2
    while not found or found[-1][0] != 0xDA:
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1], data[at + 4 : at + 2 + size]))
        at += 2 + size
    return found


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.usefixtures("extension")
def test_making_a_file_seekable_loses_nothing(subsampling, progressive):
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    data = jpeg(
        500, 333, subsampling, progressive=progressive, exif=exif, icc_profile=b"profile" * 9000, comment=b"hello"
    )
    packed = seekable(data)
    for read in (simplejpeg.decode_jpeg, lambda data: np.asarray(Image.open(io.BytesIO(data)))):
        np.testing.assert_array_equal(read(packed), read(data))
    kept = [segment for segment in segments(data) if segment[0] >= 0xE0]
    assert [segment for segment in segments(packed) if segment[0] >= 0xE0] == kept
    assert len(kept) >= 4
    assert decode(packed, VIEWS["inception"])[0] == "indexed"
    assert make_seekable(packed, decode_image(packed)) == packed


@pytest.mark.parametrize(
    ("width", "subsampling", "interval"),
    [
        (500, "4:2:0", 8),  # 32 MCUs of 16 pixels: 8 are the fewest of a divisor that cover 96 pixels
        (500, "4:4:4", 21),  # 63 of 8
        (375, "4:2:0", 6),  # 24 of 16
        (200, "4:2:0", 13),  # 13 of 16, a prime
        (90, "4:2:0", 6),  # the whole row
    ],
)
@pytest.mark.usefixtures("extension")
def test_restart_intervals_cover_96_pixels_in_whole_columns(width, subsampling, interval):
    restart = dict(segments(seekable(jpeg(width, 40, subsampling))))[0xDD]
    assert int.from_bytes(restart, "big") == interval


@pytest.mark.usefixtures("extension")
def test_seekable_files_are_hardly_larger():
    files = [jpeg(500, 375, s, seed=seed) for s in SUBSAMPLINGS for seed in range(2)]
    assert sum(len(seekable(data)) for data in files) < 1.01 * sum(map(len, files))


@pytest.mark.parametrize("kind", ["grayscale", "CMYK", "RGB, not YCbCr", "4:4:0", "a PNG"])
@pytest.mark.usefixtures("extension")
def test_what_cannot_be_seekable_is_left_alone(kind):
    assert make_seekable(OTHERS[kind], decode_image(OTHERS[kind], convert=True)) is None


def test_shrinking_keeps_the_aspect_and_the_picture():
    y, x = np.mgrid[0:400, 0:600]
    smooth = np.stack([x * 0.4, y * 0.6, (x + y) * 0.25], -1).astype(np.uint8)
    small = decode_image(shrink(smooth, 256))
    assert small.shape == (256, 384, 3)
    want = np.asarray(Image.fromarray(smooth).resize((384, 256), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(small - want).mean() < 1.5
    assert shrink(smooth[:256], 256) is None
    assert shrink(smooth[:, :100], 256) is None


SMALL = {"name": "test", "row_group_size": 4, "shard_examples": 4}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for i in range(6):
        (tmp_path / "images" / "cat" / f"{i}.jpg").write_bytes(jpeg(200, 100 + 20 * i, seed=i))
    (tmp_path / "images" / "cat" / "drawn.png").write_bytes(encode(picture(60, 40), "PNG"))
    return tmp_path / "images"


def images(uri):
    manifest = read_manifest(uri)
    tables = [read_rows(str(uri), manifest, i, [0]) for i in range(len(manifest.shards))]
    return {example.id: example.image for table in tables for example in to_examples(table)}


@pytest.mark.usefixtures("extension")
def test_a_set_is_written_seekable(folder, tmp_path):
    report = write_shards(folder, tmp_path / "set", seekable=True, **SMALL)
    assert (report.num_examples, report.num_seekable, report.num_shrunk) == (7, 6, 0)
    plain = write_shards(folder, tmp_path / "plain", **SMALL)
    assert plain.num_seekable == 0
    packed = images(tmp_path / "set")
    for id, data in images(tmp_path / "plain").items():
        assert (packed[id] == data) == id.endswith(".png")
        np.testing.assert_array_equal(decode_image(packed[id]), decode_image(data))
    again = write_shards(folder, tmp_path / "set", seekable=True, **SMALL)
    assert (again.num_resumed, again.num_seekable) == (2, None)
    with pytest.raises(BitRayError, match="has the shard set '.*' already"):
        write_shards(folder, tmp_path / "set", **SMALL)


@pytest.mark.usefixtures("extension")
def test_a_set_is_written_smaller_and_seekable(folder, tmp_path):
    report = write_shards(folder, tmp_path / "set", seekable=True, shorter_side=128, **SMALL)
    assert (report.num_shrunk, report.num_seekable) == (4, 6)  # heights 140 to 200; the PNG is small
    shapes = {id: decode_image(data).shape[:2] for id, data in images(tmp_path / "set").items()}
    assert sorted(shapes.values()) == [(40, 60), (100, 200), (120, 200), (128, 128), (128, 142), (128, 160), (128, 183)]
    assert read_manifest(tmp_path / "set").median_image_size[0] == 128


@pytest.mark.usefixtures("extension")
def test_an_interrupted_seekable_set_is_not_finished_plain(tmp_path):
    def stopping():
        for i in range(6):
            yield Example(f"e{i}", jpeg(120, 90, seed=i), (0,))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(stopping(), tmp_path / "set", class_names=["cat"], seekable=True, **SMALL)
    with pytest.raises(BitRayError, match="seekable was True, now None"):
        write_shards(stopping(), tmp_path / "set", class_names=["cat"], **SMALL)


@pytest.mark.usefixtures("extension")
def test_packing_that_cannot_work_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="shorter_side: 20; accepted: 64"):
        write_shards(folder, tmp_path / "set", shorter_side=20, **SMALL)
    monkeypatch.setitem(sys.modules, "bit_ray.data.images._jpeg", None)
    monkeypatch.delattr("bit_ray.data.images._jpeg")
    with pytest.raises(ConfigError, match="seekable: the JPEG extension is missing .*apt-get install"):
        write_shards(folder, tmp_path / "set", seekable=True, **SMALL)
    assert not (tmp_path / "set").exists()


def test_placement_takes_no_more_than_the_size():
    for name, view in VIEWS.items():
        for seed in range(10):
            placement = place_view(view, 300, 400, u(seed))
            want = train_view(picture(400, 300), view, u(seed))
            got = by_the_book(picture(400, 300), *placement[:3], view.crop_size, placement.flip)
            np.testing.assert_array_equal(got, want, err_msg=name)
