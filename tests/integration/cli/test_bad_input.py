"""Every bad input, through the `bit-ray` command: status 2, one line that says what to do, nothing half-done left."""

import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from s3_server import Bucket

from bit_ray.cli.main import main
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.models.zoo import create_model
from bit_ray.weights.npz import save_npz
from bit_ray.weights.package import ModelSpec, save_package

NETWORK = "R1-1-1-1x0.5"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of 150 images in 4 shards."""
    place = tmp_path_factory.mktemp("bad-input") / "shards"
    write_shards(GlyphSource("s", examples_per_class=3), place, name="glyphs", row_group_size=8, shard_examples=40)
    return place


@pytest.fixture
def shards(whole: Path, folder: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, folder / "shards")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> str:
    """A saved model of two classes."""
    torch.manual_seed(0)
    spec = ModelSpec(
        model=NETWORK,
        num_classes=2,
        class_names=("a", "b"),
        multi_label=False,
        resize_mode="square",
        resize_size=32,
        crop_size=32,
    )
    save_package(folder / "model", create_model(NETWORK, 2), spec)
    return str(folder / "model")


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], folder: Path) -> Callable[..., str]:
    """Run a command that must fail, and return its error without ``error: ``; nothing may be left of it."""

    def run(*arguments: str, shows: str | None = None) -> str:
        before = files(folder)
        capfd.readouterr()
        status = main(arguments)
        out, err = capfd.readouterr()
        assert status == 2, (out, err)
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        if shows is not None:
            assert shows in out
        assert files(folder) == before
        return err.removeprefix("error: ").strip()

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def pretrain(shards: object, *more: str) -> list[str]:
    small = ["--model", NETWORK, "--recipe.epochs", "2", "--recipe.decay-epochs", "1", "--recipe.warmup-steps", "1"]
    batch = ["--recipe.global-batch-size", "12", "--recipe.crop-size", "32", "--runtime.num-workers", "2"]
    return ["pretrain", "--name", "run", "--shards", str(shards), *small, *batch, *more]


def finetune(shards: object, *more: str) -> list[str]:
    return ["finetune", "--name", "run", "--shards", str(shards), *more]


# Shard sets


@pytest.mark.parametrize("place", ["nowhere", "nowhere/file.csv"])
def test_no_such_data_set(place: str, refused: Callable[..., str]) -> None:
    for command in (
        pretrain(place),
        finetune(place, "--model", NETWORK),
        ["shards", "verify", place],
        ["shards", "inspect", place],
    ):
        error = refused(*command)
        assert error.startswith(f"{place}: no such path; ")


def test_no_such_source(refused: Callable[..., str]) -> None:
    error = refused("shards", "write", "nowhere/file.csv", "output")
    assert error.startswith("nowhere/file.csv: no such path; ")
    error = refused("shards", "write", "cifar", "output")  # a word may be meant as the name of a published set
    assert error.startswith("cifar: neither a path nor a set by name; accepted: ")
    assert "did you mean cifar10?" in error


def test_a_half_written_set(shards: Path, refused: Callable[..., str]) -> None:
    (shards / "manifest.json").unlink()
    assert "manifest.json" in refused(*pretrain(shards))


def damaged(shards: Path, how: str) -> Path:
    shard = sorted(shards.glob("*.parquet"))[1]
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(b"" if how == "empty" else shard.read_bytes()[:-1000])
    return shard


@pytest.mark.parametrize("how", ["empty", "truncated", "missing"])
def test_a_damaged_shard(how: str, shards: Path, refused: Callable[..., str]) -> None:
    size = sorted(shards.glob("*.parquet"))[1].stat().st_size
    shard = damaged(shards, how)
    left = {"missing": "missing", "empty": "0 bytes", "truncated": f"{size - 1000:,} bytes"}[how]
    found = f"{left}; accepted: {size:,} bytes"
    error = refused(*pretrain(shards))
    assert error.startswith(f"{shard}: {found}")
    assert f"run bit-ray shards verify {shards}" in error
    assert refused(*finetune(shards, "--model", NETWORK)).startswith(f"{shard}: {found}")

    error = refused("shards", "verify", str(shards), shows=shard.name)
    assert error.startswith(f"{shards}: damaged (")
    assert "restore the shards or write the set again" in error


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_started_here")
def test_a_damaged_shard_met_by_a_ray_task(
    shards: Path, refused: Callable[..., str], model_of_shards: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shard = damaged(shards, "truncated")
    # The failed run stays in MLflow, as it should, and therefore elsewhere.
    storage = tmp_path_factory.mktemp("runs")
    error = refused("evaluate", "--model", model_of_shards, "--shards", str(shards), "--storage", str(storage))
    assert error.startswith(f"{shard}: ")


@pytest.fixture
def model_of_shards(shards: Path) -> str:
    manifest = read_manifest(shards)
    spec = ModelSpec(
        model=NETWORK,
        num_classes=manifest.num_classes,
        class_names=manifest.class_names,
        multi_label=False,
        resize_mode="square",
        resize_size=32,
        crop_size=32,
    )
    save_package(shards.parent / "model-of-shards", create_model(NETWORK, manifest.num_classes), spec)
    return str(shards.parent / "model-of-shards")


def test_a_label_outside_the_class_list(folder: Path, shards: Path, refused: Callable[..., str]) -> None:
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    (folder / "list.csv").write_text("path,label\nimage.png,horse\n")
    (folder / "classes.txt").write_text("cat\ndog\n")
    error = refused("shards", "write", "list.csv", "output", "--class-names", "classes.txt")
    assert error.startswith(
        "list.csv: row 1: label 'horse' is outside the class list; accepted: one of 2 classes (cat, "
    )

    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["class_names"] = manifest["class_names"][:10]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    error = refused("shards", "verify", str(shards), shows="label")
    assert "accepted" in error


# Images


def cmyk(path: Path) -> None:
    Image.new("CMYK", (8, 8)).save(path, "JPEG")


def gray(path: Path) -> None:
    Image.new("L", (8, 8)).save(path, "PNG")


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(path, "PNG")


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def bomb(path: Path) -> None:
    """20,000 x 20,000 black pixels: 1.2 GB in 1.2 MB, and no memory to write them."""
    side = 20_000
    packer = zlib.compressobj(9)
    zeros = bytes(side * 3 + 1) * 16  # of 16 rows, each with its filter byte
    first = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = struct.pack(">I", (len(zeros) * side // 16 % 65521 << 16) + 1)
    pixels = first + again * (side // 16 - 1) + b"\x03\x00" + adler

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("make", "reason", "convertible"),
    [
        (cmyk, "CMYK", True),
        (gray, "grayscale", True),
        (sixteen_bit, "16-bit", True),
        (animated, "animated", True),
        (zero_bytes, "zero bytes", False),
        (bomb, "400000000 pixels, a decompression bomb", False),
    ],
)
def test_a_bad_image(
    make: Callable[[Path], None], reason: str, convertible: bool, folder: Path, model: str, refused: Callable[..., str]
) -> None:
    (folder / "images" / "class").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8)).save(folder / "images" / "class" / f"{i}.png")
    bad = folder / "images" / "class" / "bad.png"
    make(bad)
    for command in (
        ["shards", "write", "images", "output"],
        ["predict", "images/class/0.png", "images/class/bad.png", "--model", model],
    ):
        error = refused(*command)
        assert "class/bad.png" in error
        assert reason in error
        assert ("--convert" in error) is convertible
        if not convertible:
            refused(*command, "--convert-images" if command[0] == "shards" else "--convert")
    assert main(["shards", "write", "images", "output", "--on-bad", "skip"]) == 0
    assert read_manifest("output").num_examples == 3
    assert [row["id"] for row in json.loads((folder / "output" / "skipped.json").read_text())] == ["class/bad.png"]


def test_no_such_image(model: str, refused: Callable[..., str]) -> None:
    assert "nowhere.png: no such file" in refused("predict", "nowhere.png", "--model", model)


# Settings and models


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (
            ["--recipe.global-batch-size", "1"],
            "--runtime.num-workers: 2; accepted: at most 1, the images in a global batch",
        ),
        (["--runtime.num-workers", "13"], "--runtime.num-workers: 13; accepted: at most "),
        (
            ["--recipe.warmup-steps", "500"],
            "--recipe.warmup-steps: 500; accepted: 0 to 24, because 2 epochs of 150 images are 25 steps of 12; ",
        ),
        (["--model", "R50"], "--model: unknown name 'R50'; accepted: R26x1, "),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_settings_that_do_not_fit(
    more: list[str], error: str, dry: list[str], whole: Path, refused: Callable[..., str]
) -> None:
    assert error in refused(*pretrain(whole, *more, *dry))


def test_a_head_that_does_not_fit(whole: Path, model: str, refused: Callable[..., str]) -> None:
    error = refused("evaluate", "--model", model, "--shards", str(whole))
    assert error.startswith(f"--shards: {whole} has 50 classes that are not those of the model's head (2); accepted: ")


def test_test_shards_of_other_classes(whole: Path, folder: Path, refused: Callable[..., str]) -> None:
    write_shards(GlyphSource("s", examples_per_class=1), folder / "other", name="other")
    place = folder / "other" / "manifest.json"
    place.write_text(place.read_text().replace("U+", "V+"))
    error = refused(*finetune(whole, "--model", NETWORK, "--test-shards", str(folder / "other")))
    assert error.startswith(
        f"--test-shards: {folder / 'other'} has 50 classes that are not those of the training shards"
    )


def test_an_npz_of_another_depth(whole: Path, folder: Path, refused: Callable[..., str]) -> None:
    save_npz(create_model("R1-1-1-1x1", 5), folder / "weights.npz")
    error = refused(*finetune(whole, "--init", "weights.npz", "--model", "R1-1-2-1x1"))
    assert error == "--model: R1-1-2-1x1, but the weights in weights.npz are of R1-1-1-1x1; leave it out"


@pytest.mark.parametrize("damage", ["missing", "truncated", "not an npz"])
def test_damaged_weights(damage: str, whole: Path, folder: Path, refused: Callable[..., str]) -> None:
    if damage != "missing":
        save_npz(create_model("R1-1-1-1x1", 5), folder / "weights.npz")
        data = (folder / "weights.npz").read_bytes()
        (folder / "weights.npz").write_bytes(data[: len(data) // 2] if damage == "truncated" else b"text")
    assert "weights.npz" in refused(*finetune(whole, "--init", "weights.npz"))


def test_a_model_that_is_not_registered(whole: Path, folder: Path, refused: Callable[..., str]) -> None:
    uri = "models:/no-such-model@champion"
    for command in (
        finetune(whole, "--init", uri),
        ["evaluate", "--model", uri, "--shards", str(whole)],
        ["predict", "image.png", "--model", uri],
        ["models", "pull", uri, "--output", "pulled"],
    ):  # no registry at all, and none is made
        assert "no such file; accepted: the server, or sqlite:///FILE, that has the record" in refused(*command)

    from mlflow import MlflowClient

    (folder / "bit_ray_runs").mkdir()
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'bit_ray_runs' / 'mlflow.db'}")
    client.create_registered_model("such-model")
    for command in (finetune(whole, "--init", uri), ["models", "pull", uri, "--output", "pulled"]):
        assert refused(*command) == f"{uri}: no model of that name; accepted: such-model; see bit-ray models list"


def test_mlflow_that_cannot_be_reached_is_said_at_once(
    whole: Path, shards: Path, model_of_shards: str, refused: Callable[..., str]
) -> None:
    unreachable = ["--tracking.uri", "http://127.0.0.1:1"]
    for command in (
        pretrain(whole, *unreachable),
        finetune(whole, "--model", NETWORK, *unreachable),
        ["evaluate", "--model", model_of_shards, "--shards", str(shards), *unreachable],
        ["models", "list", *unreachable],
    ):
        error = refused(*command)
        assert error.startswith(
            "--tracking.uri: http://127.0.0.1:1: cannot be reached (connection refused); start the "
        )


def test_a_refusal_as_seen_from_a_shell(folder: Path, shards: Path) -> None:
    damaged(shards, "truncated")
    command = [str(Path(sys.executable).with_name("bit-ray")), *pretrain("shards")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"pretrain on shards \(\d+ images\)\n", done.stdout)
    assert done.stderr.startswith("error: shards/shard-00001.parquet: ")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["shards"]


@pytest.mark.cluster
def test_no_such_bucket_or_key(s3: Bucket, refused: Callable[..., str]) -> None:
    for place in (s3.uri("nothing"), "s3://no-such-bucket/shards"):
        assert refused("shards", "verify", place).startswith(f"{place}")
    assert s3.keys() == []


# Transfer


def test_class_counts_that_differ_between_train_and_test(
    whole: Path, folder: Path, refused: Callable[..., str]
) -> None:
    write_shards("digits:test", folder / "digits", name="digits")
    for dry in ([], ["--dry-run"]):
        error = refused(*finetune(whole, "--model", NETWORK, "--test-shards", "digits", *dry))
        assert error.startswith("--test-shards: digits has 10 classes that are not those of the training shards (50); ")
        assert error.endswith("; write it again with --class-names SHARDS, the training shards (class_names)")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_more_shots_than_a_class_has(dry: list[str], whole: Path, refused: Callable[..., str]) -> None:
    error = refused(*finetune(whole, "--model", NETWORK, "--shots", "4", *dry))
    assert error.startswith("--shots: 4; accepted: at most 3, the number of examples of class 0 ('U+")
    assert error.endswith("; lower it or add examples")
    error = refused(*finetune(whole, "--model", NETWORK, "--shots", "-1", *dry))
    assert error == "--shots: -1; accepted: a whole number of at least 0; raise it"


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_shots_of_a_multi_label_set(dry: list[str], folder: Path, refused: Callable[..., str]) -> None:
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    (folder / "list.csv").write_text("path,label\nimage.png,cat;dog\n")
    assert main(["shards", "write", "list.csv", "animals", "--multi-label"]) == 0
    error = refused(*finetune("animals", "--model", NETWORK, "--shots", "1", *dry))
    assert error.startswith(
        "--shots: 1 of a set with several labels per image; accepted: 0: a few-shot subset needs one label per image; "
    )


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (
            ["--rule.crop", "16"],
            "--rule.crop: 16; accepted: at least 32 pixels; the network halves its input five times",
        ),
        (
            ["--rule.crop", "64", "--rule.resize", "48"],
            "--rule.resize: 48; accepted: at least crop (64); a crop cannot be larger than ",
        ),
        (["--rule.warmup-steps", "500"], "--rule.warmup-steps: 500; accepted: 0 to 499 in a run of 500 steps; "),
        (
            ["--rule.mixup-alpha", "0.1", "--rule.batch-size", "33"],
            "--rule.batch-size: 33; accepted: an even number, because MixUp mixes pairs; add one",
        ),
        (["--norm-batch", "32"], f"--norm-batch: 32, but {NETWORK} has no BatchNorm; accepted: 0; leave it out"),
        (["--runtime.num-workers", "513"], "--runtime.num-workers: 513; accepted: at most 512, the images in a "),
        (["--subset-seed", "-1"], "--subset-seed: -1; accepted: a whole number of at least 0; raise it"),
        (["--rule.momentum", "1"], "--rule.momentum: 1.0; accepted: 0 to below 1"),
        (["--rule.regime", "tiny"], "--rule.regime: given 'tiny' (str); accepted: "),
        (["--train", "stages:5"], "--train: 'stages:5'; accepted: all, head, norm_bias, stages:K (the last K, 1 to 4)"),
        (
            ["--train", "head"],
            "--train: head, but init is empty; accepted: all, or weights to start from; give one of them",
        ),
        (
            ["--runtime.num-workers", "1", "--runtime.micro-batch-size", "7", "--rule.mixup-alpha", "0.1"],
            "--runtime.micro-batch-size: 7; accepted: an even number, because MixUp mixes pairs",
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_transfer_settings_that_do_not_fit(
    more: list[str], error: str, dry: list[str], whole: Path, refused: Callable[..., str]
) -> None:
    assert refused(*finetune(whole, "--model", NETWORK, *more, *dry)).startswith(error)


def test_a_model_for_other_input(whole: Path, shards: Path, folder: Path, refused: Callable[..., str]) -> None:
    manifest = read_manifest(whole)
    spec = ModelSpec(
        model=NETWORK,
        num_classes=manifest.num_classes,
        class_names=manifest.class_names,
        multi_label=True,
        resize_mode="square",
        resize_size=32,
        crop_size=32,
        input_range=(0.0, 1.0),
    )
    save_package(folder / "model", create_model(NETWORK, manifest.num_classes), spec)
    error = refused(*finetune(whole, "--init", "model"))
    assert (
        error == "model: made for pixels from 0 to 1; accepted: -1 to 1, as for all BiT weights; choose other weights"
    )
    error = refused("evaluate", "--model", "model", "--shards", str(shards))
    assert error.startswith(
        f"--shards: {shards} has one label per image; accepted: a set with several labels per image, as the model was "
    )


@pytest.mark.parametrize("more", [[], ["--shots", "2"]])
def test_a_dry_run_of_transfer_shows_the_whole_resolution_and_leaves_nothing(
    more: list[str], whole: Path, model: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    small = ["--rule.num-steps", "250", "--rule.batch-size", "32", "--rule.crop", "48", "--rule.resize", "56"]
    micro = ["--runtime.num-workers", "2", "--runtime.micro-batch-size", "8"]
    train = ["--train", "adapters:4", "--rule.mixup-alpha", "0.1", "--no-random-flip"]
    assert main([*finetune(whole, "--init", model, *small, *micro, *train, *more), "--dry-run"]) == 0
    shown = " ".join(capfd.readouterr().out.replace("│", " ").split())
    number = 100 if more else 150
    for fact in (
        f"profile code, small regime: N = {number}, images of about 32 x 32 pixels; replaced: resize, crop, num_steps,",
        f"250 steps of 32 images, {250 * 32 / number:.2f} passes",
        "0 from step 0, 0.003 from step 50, 0.0003 from step 101, 3e-05 from step 151, 3e-06 from step 201",
        "warm-up 50 steps",
        "resize to 56 x 56, random crop 48 x 48 pixels, no flips; test: resize to 48 x 48",
        "MixUp alpha 0.1, one lambda per step",
        "2 workers x 2 micro-batches x 8 images",
        "adapters:4: ",
        "8,000 in all",
        "s of training steps, at 2 workers x ",
        "images/s, measured with 8 images a pass on one CPU thread",
    ):
        assert fact in shown, fact
    assert ("2 of each class, 100 images, drawn by seed 0" in shown) is bool(more)
    assert files(folder) == before
