"""Names for the outputs of weights that came without: those of ImageNet, or the lines of a file."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from bit_ray.errors import ModelError

_NAMED = "1000 (ILSVRC-2012), 21841 and 21843 (ImageNet-21k)"


def label_names(
    num_classes: int, labels: str | os.PathLike[str] | Sequence[str] = "", *, model: str
) -> tuple[str, ...]:
    """Return a name for each output of a classifier.

    Args:
        num_classes: Its outputs. Without a file, 1000 gets ILSVRC-2012's names as torchvision lists them, 21843 those
            that the authors' ImageNet-21k heads were trained with, and 21841 all synsets of ImageNet-21k in the order
            of their ids; the latter two come from timm.
        labels: The names; or a text file with one per line, or a JSON list or object (index to name, as Hugging
            Face's ``id2label``).
        model: What the errors call the model.

    Raises:
        ModelError: no names are known for so many outputs, or the file has another number of names.
    """
    if labels:
        if isinstance(labels, str | os.PathLike):
            names, holder = _read(Path(labels)), f"{os.fspath(labels)} has "
        else:
            names, holder = tuple(labels), ""
        if len(names) != num_classes:
            raise ModelError(
                f"labels: {holder}{len(names)} names, {model} has a head of {num_classes} classes; one name for each "
                f"class; take the label file of these weights"
            )
        return names
    if num_classes == 1000:
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    if num_classes in (21841, 21843):
        return _imagenet21k(num_classes, model)
    raise ModelError(
        f"labels: {model} has a head of {num_classes} classes and no names for them; names are known for {_NAMED}; "
        f"give a file with one name per line (predict, or models export --format package, with --labels FILE), or "
        f"fine-tune the weights on your classes (--init)"
    )


def _imagenet21k(num_classes: int, model: str) -> tuple[str, ...]:
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        raise ModelError(
            f"labels: {model} has a head of {num_classes} classes, whose ImageNet-21k names timm holds, which is not "
            f"installed; pip install timm, or give a file with one name per line (--labels FILE)"
        ) from None
    return tuple(ImageNetInfo("imagenet-21k-goog" if num_classes == 21843 else "imagenet-22k").label_descriptions())


def _read(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ModelError(f"labels: {path}: {error.strerror}; a text file with one name per line; check it") from None
    except UnicodeDecodeError:
        raise ModelError(f"labels: {path}: not UTF-8 text; one name per line; convert it") from None
    if path.suffix != ".json":
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    try:
        names = json.loads(text)
        if isinstance(names, dict):
            names = in_order(names.get("id2label", names))
    except (ValueError, KeyError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"labels: {path}: accepted: a JSON list of names, or an object from 0, 1, ... to names; fix it"
        )
    return tuple(names)


def in_order(names: dict[str, str]) -> list[str]:
    """Return the names of a mapping from index to name.

    Raises:
        KeyError: the indices are not 0, 1, ...
    """
    return [names[str(index)] for index in range(len(names))]
