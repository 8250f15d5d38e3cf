"""CPU time from a JPEG file in memory to a training view in its place, ours next to the usual ways.

python benchmarks/decode.py

One process, one thread, 300 files of corpus.py, the same random boxes and flips for all, 224 pixels. Candidates take
turns, round after round, and the median round counts; CPU time, because it resists a busy machine. PSNR is against the
exact path, Pillow's crop and then its resize, image by image.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from typing import Literal

import numpy as np
import torch
import tyro
from corpus import make_corpus
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tvf

from bit_ray.data.images import _jpeg
from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.decode_view import decode_train_view
from bit_ray.data.images.pack import make_seekable, shrink
from bit_ray.data.images.views import Placement, TrainView, example_keys, place_view, uniforms

SIZE = 224
Candidate = Callable[[bytes, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time JPEG decoders."""

    corpus: str = ""
    """Folder of the corpus, new or that of an earlier run; empty: a temporary one."""
    num_images: int = 300
    """Files."""
    num_rounds: int = 5
    """Turns of every candidate."""
    boxes: Literal["inception", "torchvision"] = "inception"
    """Random boxes as training draws them (area from 5 %), or torchvision's, which are larger (area from 8 %)."""
    shorter_side: int = 256
    """Of the lossily packed files, pixels; their boxes round to other pixels, which PSNR counts as well."""


def pack(data: bytes) -> bytes:
    return make_seekable(data, decode_image(data)) or data


def pil(data: bytes, place: Placement) -> np.ndarray:
    top, left, height, width = place.box
    image = Image.open(BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if place.flip else image)


def pil_box(data: bytes, place: Placement) -> np.ndarray:
    top, left, height, width = place.box
    box = left, top, left + width, top + height
    image = Image.open(BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if place.flip else image)


def simplejpeg_v2(data: bytes, place: Placement) -> np.ndarray:
    return torchvision_v2(torch.from_numpy(decode_image(data)).permute(2, 0, 1), place)


def torchcodec_v2(data: bytes, place: Placement) -> np.ndarray:
    from torchcodec.decoders import decode_jpeg

    return torchvision_v2(decode_jpeg(data), place)


def nvimagecodec_v2() -> Callable[[bytes, Placement], np.ndarray]:
    """The only kept library that decodes a region, of its two halves the one without a GPU."""
    from nvidia import nvimgcodec

    decoder = nvimgcodec.Decoder(
        device_id=-99999,  # NVIMGCODEC_DEVICE_CPU_ONLY
        max_num_cpu_threads=1,
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
    )

    def view(data: bytes, place: Placement) -> np.ndarray:
        top, left, height, width = place.box
        region = nvimgcodec.Region(top, left, top + height, left + width)
        image = decoder.decode(nvimgcodec.CodeStream(data).get_sub_code_stream(region=region))
        pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)
        return torchvision_v2(pixels, place._replace(box=(0, 0, height, width)))

    return view


def torchvision_v2(image: torch.Tensor, place: Placement) -> np.ndarray:
    image = tvf.resized_crop(image, *place.box, [SIZE, SIZE], antialias=True)
    return (tvf.horizontal_flip(image) if place.flip else image).permute(1, 2, 0).numpy()


def psnr(image: np.ndarray, exact: np.ndarray) -> float:
    error = float(np.square(image.astype(np.float64) - exact).mean())
    return 10 * np.log10(255**2 / error) if error else float("inf")


def main(config: Config) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        paths = make_corpus(config.corpus or f"{scratch}/corpus", config.num_images)
        files = [path.read_bytes() for path in paths]
    seekable = [pack(data) for data in files]
    smaller = [pack(shrink(decode_image(data), config.shorter_side) or data) for data in files]
    view = TrainView(crop="inception", crop_size=SIZE)
    draws = uniforms(0, 0, example_keys([path.name for path in paths]))
    sizes = [Image.open(BytesIO(data)).size for data in files]
    places = [place_view(view, height, width, u) for (width, height), u in zip(sizes, draws, strict=True)]
    if config.boxes == "torchvision":
        torch.manual_seed(0)
        for i, (width, height) in enumerate(sizes):
            box = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3])
            places[i] = places[i]._replace(box=box)

    out = np.empty((SIZE, SIZE, 3), np.uint8)

    def ours(data: bytes, i: int) -> np.ndarray:
        if config.boxes == "inception":
            decode_train_view(data, view, draws[i], out, convert=False)
        else:
            _jpeg.header(data)
            _jpeg.view(data, *places[i], out)
        return out

    candidates: dict[str, tuple[list[bytes], Candidate]] = {
        "Pillow crop and resize": (files, lambda data, i: pil(data, places[i])),
        "Pillow resize(box=)": (files, lambda data, i: pil_box(data, places[i])),
        "simplejpeg + torchvision v2": (files, lambda data, i: simplejpeg_v2(data, places[i])),
        "torchcodec + torchvision v2": (files, lambda data, i: torchcodec_v2(data, places[i])),
        "ours": (files, ours),
        "ours, seekable": (seekable, ours),
    }
    if config.boxes == "inception":
        candidates[f"ours, seekable, shorter side {config.shorter_side}"] = (smaller, ours)
    if installed("nvidia-nvimgcodec-cu12"):
        by_region = nvimagecodec_v2()
        candidates["nvImageCodec region + torchvision v2"] = (files, lambda data, i: by_region(data, places[i]))
    if not installed("torchcodec"):
        del candidates["torchcodec + torchvision v2"]
    exact = [candidates["Pillow crop and resize"][1](data, i).copy() for i, data in enumerate(files)]
    quality = {
        name: [psnr(candidate(data, i), exact[i]) for i, data in enumerate(encoded)]
        for name, (encoded, candidate) in candidates.items()
    }
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(config.num_rounds):
        for name, (encoded, candidate) in candidates.items():
            start = time.process_time()
            for i, data in enumerate(encoded):
                candidate(data, i)
            rounds[name].append((time.process_time() - start) / len(encoded) * 1e3)
    milliseconds = {name: statistics.median(times) for name, times in rounds.items()}

    kilobytes = sum(map(len, files)) / len(files) / 1e3
    shrunk = sum(map(len, smaller)) / len(files) / 1e3
    growth = sum(map(len, seekable)) / sum(map(len, files)) - 1
    share = statistics.mean(p.box[2] * p.box[3] / (w * h) for p, (w, h) in zip(places, sizes, strict=True))
    names = ("torch", "torchvision", "pillow", "simplejpeg", "torchcodec", "nvidia-nvimgcodec-cu12")
    print(
        f"`python benchmarks/decode.py --boxes {config.boxes}`, {processor()}; Python {platform.python_version()}, ",
        end="",
    )
    print(", ".join(f"{name} {version(name)}" for name in names if installed(name)) + ";")
    print(f"{len(files)} files of {kilobytes:.1f} kB, seekable {growth:+.2%}, ", end="")
    print(f"smaller ones {shrunk:.1f} kB; boxes of {share:.0%} of the area.\n")
    print("|  | CPU ms/image | images/s/core | vs. Pillow | PSNR median, dB | PSNR worst, dB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    reference = milliseconds["Pillow crop and resize"]
    for name, ms in milliseconds.items():
        decibels = f"{statistics.median(quality[name]):.1f} | {min(quality[name]):.1f}".replace("inf", "exact")
        print(f"| {name} | {ms:.3f} | {1e3 / ms:,.0f} | {reference / ms:.2f} | {decibels} |")


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
