"""Names for the outputs of weights without class names: those of ImageNet, or the lines of a file."""

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bit_ray.errors import ModelError, brief
from bit_ray.models.network import MAX_CLASSES

_LARGEST_TEXT = 50_000_000  # bytes; a million names of 50
_NAMED = "1000 (ILSVRC-2012), 21841 and 21843 (ImageNet-21k)"


def label_names(
    num_classes: int, labels: str | os.PathLike[str] | Sequence[str] = "", *, model: str
) -> tuple[str, ...]:
    """Return a name for each output of a classifier.

    Args:
        num_classes: Its outputs. Without a file, 1000 outputs get ILSVRC-2012's names as torchvision lists them, 21843
            those of the authors' ImageNet-21k heads, and 21841 all synsets of ImageNet-21k in the order of their ids;
            the latter two come from timm.
        labels: The names; or a text file with one per line, or a JSON list or object (index to name, as Hugging
            Face's ``id2label``).
        model: Name of the model in errors.

    Raises:
        ModelError: No names are known for so many outputs, or the file has another number of names.
    """
    if labels:
        if isinstance(labels, str | os.PathLike):
            try:
                names, holder = _read(Path(labels)), f"{os.fspath(labels)} has "
            except ModelError as error:
                raise error.about("labels") from None
        else:
            names, holder = class_names(labels, "labels"), ""
        if len(names) != num_classes:
            given = f"{holder}{len(names)} names, but {model} has a head of {num_classes} classes"
            raise ModelError.of("labels", given, "one name for each class", "use the label file of these weights")
        return names
    if num_classes == 1000:
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    if num_classes in (21841, 21843):
        return _imagenet21k(num_classes, model)
    given = f"{model} has a head of {num_classes} classes and no names for them; known names: for {_NAMED}"
    remedy = (
        "give a file with one name per line (predict, or models export --format package, with --labels FILE), or "
        "fine-tune the weights on your classes (--init)"
    )
    raise ModelError.of("labels", given, remedy=remedy)


def _imagenet21k(num_classes: int, model: str) -> tuple[str, ...]:
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        given = f"{model} has a head of {num_classes} classes; their names come with timm, which is not installed"
        remedy = "run pip install timm, or give a file with one name per line (--labels FILE)"
        raise ModelError.of("labels", given, remedy=remedy) from None
    return tuple(ImageNetInfo("imagenet-21k-goog" if num_classes == 21843 else "imagenet-22k").label_descriptions())


def _read(path: Path) -> tuple[str, ...]:
    accepted = "a text file with one name per line"
    try:
        text = read_text(path)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; accepted: {accepted}; check it") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not UTF-8 text; accepted: one name per line; convert it") from None
    except ValueError as error:
        raise ModelError(f"{path}: {error}; accepted: {accepted}; check it") from None
    if path.suffix != ".json":
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    try:
        names = json.loads(text)
        if isinstance(names, dict):
            names = in_order(names.get("id2label", names))
    except (ValueError, KeyError, TypeError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{path}: other JSON; accepted: a JSON list of names, or an object of names; correct it")
    return class_names(names, str(path))


def read_text(path: Path) -> str:
    """Return the text of a file, UTF-8.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a file, is not UTF-8 text, or is larger than any list of names.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
        raise ValueError("no file")
    if about.st_size > _LARGEST_TEXT:
        raise ValueError(f"{about.st_size} bytes, more than {_LARGEST_TEXT}")
    return path.read_text(encoding="utf-8-sig")


def class_names(names: Iterable[Any], where: str) -> tuple[str, ...]:
    """Check class names; ``where`` says whose, in errors.

    Raises:
        ModelError: There are too many, or one is not a text that can be written.
    """
    checked = tuple(names)
    if len(checked) > MAX_CLASSES:
        raise ModelError(f"{where}: {len(checked)} names; accepted: at most {MAX_CLASSES}; check the file")
    for index, name in enumerate(checked):
        if not isinstance(name, str) or any("\ud800" <= character <= "\udfff" for character in name):
            raise ModelError(f"{where}: name {index} is {brief(name)}; accepted: text; correct it")
    return checked


def in_order(names: Mapping[str, Any]) -> list[Any]:
    """Return the names of a mapping from index to name.

    Raises:
        KeyError: The indices are not 0, 1, ...
    """
    return [names[str(index)] for index in range(len(names))]
