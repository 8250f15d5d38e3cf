"""`bit-ray train` on crops of photographs, next to a support vector machine on their thumbnails.

    pip install scikit-image
    python benchmarks/photographs.py --init bit_ray_runs/glyphs-m/step-00001500   # the weights that `make run` makes

Six photographs of scikit-image (brick, grass, gravel, stars, tissue, fur) are the classes: crops of 64 pixels at random
places, in gray and with a random exposure, so that neither colour nor brightness tells the class (`--colour` leaves
both as they are). Those for test come from the right third of each photograph, the others from its left part.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage import data
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import bit_ray

_CLASSES = {
    "brick": "brick",
    "fur": "chelsea",
    "grass": "grass",
    "gravel": "gravel",
    "stars": "hubble_deep_field",
    "tissue": "immunohistochemistry",
}
_SIDE, _THUMBNAIL = 64, 16


def write_crops(folder: Path, num_train: int, num_test: int, seed: int, *, colour: bool) -> None:
    """Write ``train/CLASS`` and ``test/CLASS``."""
    for label, (name, photograph) in enumerate(_CLASSES.items()):
        image = np.asarray(Image.fromarray(getattr(data, photograph)()).convert("RGB" if colour else "L"), np.float64)
        height, width = image.shape[:2]
        border = width * 2 // 3
        for part, left, right, count in (("train", 0, border, num_train), ("test", border, width, num_test)):
            directory = folder / part / name
            directory.mkdir(parents=True)
            draw = np.random.default_rng((seed, label, part == "test"))
            for i in range(count):
                x, y = draw.integers(left, right - _SIDE + 1), draw.integers(0, height - _SIDE + 1)
                crop = image[y : y + _SIDE, x : x + _SIDE]
                if not colour:
                    crop = (crop - crop.mean()) / max(crop.std(), 1) * draw.uniform(20, 60) + draw.uniform(90, 165)
                Image.fromarray(crop.clip(0, 255).astype(np.uint8)).save(directory / f"{i:03d}.png")


def thumbnails(folder: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    pixels, labels = [], []
    for label, name in enumerate(_CLASSES):
        for path in sorted((folder / name).iterdir()):
            small = Image.open(path).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
            pixels.append(np.asarray(small, np.float32).ravel() / 255)
            labels.append(label)
    return np.stack(pixels), np.array(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", required=True)
    parser.add_argument("--method", default="head", help="as in bit-ray train")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--train", type=int, default=45, help="images per class")
    parser.add_argument("--test", type=int, default=22, help="images per class")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the crops")
    parser.add_argument("--colour", action="store_true", help="leave colour and exposure as they are")
    arguments = parser.parse_args()
    found = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "crops")
            write_crops(folder, arguments.train, arguments.test, seed, colour=arguments.colour)
            pixels, labels = thumbnails(folder / "train")
            grid = {"C": [0.1, 1, 10, 100], "gamma": ["scale", 0.01, 0.1]}
            machine = GridSearchCV(SVC(), grid, cv=5).fit(pixels, labels)
            result = bit_ray.train(
                folder,
                name=f"photographs-{seed}",
                init=arguments.init,
                method=arguments.method,
                minutes=arguments.minutes,
                storage=f"{temporary}/runs",
            )
            assert result is not None
            found.append((machine.score(*thumbnails(folder / "test")), result.metrics["top_1"]))
            print(
                f"draw {seed}: support vector machine {found[-1][0]:.1%}, bit-ray train {found[-1][1]:.1%}", flush=True
            )
    svm, network = (float(np.mean(scores)) for scores in zip(*found, strict=True))
    count = arguments.test * len(_CLASSES)
    print(
        f"mean of {arguments.seeds} draws, {count} test images each: thumbnails {svm:.1%}, bit-ray train {network:.1%}"
    )


if __name__ == "__main__":
    main()
