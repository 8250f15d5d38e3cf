"""Which images train, which choose and which test: the split of a folder into parts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bit_ray.autotrain.scan import PARTS, Found, Part, Scan
from bit_ray.errors import DataError, brief

_LEAST = {"train": 2, "val": 1, "test": 1}


def split(scan: Scan, val_share: float, test_share: float, seed: int) -> dict[Part, list[Found]]:
    """Divide a folder's images into parts: those it has itself, and the missing ones drawn from train.

    Of each class the shares are drawn by the seed; copies of one image stay together, near-duplicates too, and in train
    if they are in several classes. A class's draw does not depend on the other classes.

    Args:
        scan: The folder.
        val_share: Share of a class that is drawn for val, where there is none.
        test_share: The same for test.
        seed: Of the draw.

    Raises:
        DataError: a class has too few images.
    """
    given = {image.part for image in scan.images if image.part is not None}
    parts: dict[Part, list[Found]] = {
        part: [image for image in scan.images if image.part == part] for part in ("val", "test")
    }
    pool = [image for image in scan.images if image.part in (None, "train")]
    shares: dict[Part, float] = {"test": test_share, "val": val_share}
    drawn = {part: share for part, share in shares.items() if part not in given}
    labels_of = defaultdict(set)
    for image in pool:
        labels_of[image.original].add(image.label)
    train: list[Found] = []
    for label, name in enumerate(scan.class_names):
        members: dict[str, list[Found]] = {}
        for image in pool:
            if image.label == label:
                members.setdefault(image.original, []).append(image)
        total = sum(map(len, members.values()))
        least = _LEAST["train"] + sum(_LEAST[part] for part in drawn)
        free = [same for digest, same in members.items() if len(labels_of[digest]) == 1]
        if len(members) < least or len(free) < least - _LEAST["train"]:
            elsewhere = len(members) - len(free)
            also = f", {elsewhere} of them also in other classes" if elsewhere else ""
            below = "train" in given  # its folder
            if damaged := sum(path.split("/")[below] == name for path, _ in scan.unreadable):
                also += f", and {damaged:,} that cannot be read"
            images = "1 different image" if len(members) == 1 else f"{len(members)} different images"
            raise DataError(
                f"class {brief(name)}: {images}{also}; accepted: at least {least}, of which "
                f"{' and '.join(f'one is for {part}' for part in drawn) or 'all are for train'}; add some, or remove "
                "the class"
            )
        fixed = [same for digest, same in members.items() if len(labels_of[digest]) > 1]
        words = np.random.PCG64(np.random.SeedSequence((seed, label))).random_raw(len(free))
        order = [free[i] for i in np.argsort(words, kind="stable")]
        later = list(drawn)
        for part, share in drawn.items():
            later.remove(part)
            kept = sum(_LEAST[other] for other in later)
            kept += max(0, _LEAST["train"] - len(fixed))
            wanted = max(_LEAST[part], round(share * total))
            taken: list[Found] = []
            # What is more than is wanted stays in train, unless there is nothing smaller.
            large: list[list[Found]] = []
            while len(taken) < wanted and len(order) + len(large) > kept and order:
                same = order.pop()
                if len(taken) + len(same) <= wanted:
                    taken += same
                else:
                    large.append(same)
            if not taken:
                smallest = min(large, key=len)
                large.remove(smallest)
                taken = smallest
            order += reversed(large)
            parts[part] += taken
        train += [image for same in fixed + order for image in same]
    parts["train"] = train
    return {part: sorted(parts[part], key=lambda image: image.path) for part in PARTS}


def split_apart(scan: Scan) -> Scan:
    """Return a folder of which near-duplicates need not stay together."""
    return replace(scan, images=tuple(replace(image, group="") for image in scan.images))


def without_copies(parts: Mapping[Part, Sequence[Found]]) -> dict[Part, list[Found]]:
    """Return the parts without copies and near-duplicates of what is in an earlier one of train, val and test."""
    seen: set[str] = set()
    left: dict[Part, list[Found]] = {}
    for part in PARTS:
        left[part] = [image for image in parts[part] if image.original not in seen]
        seen |= {image.original for image in parts[part]}
    return left


def num_shared(parts: Mapping[Part, Sequence[Found]]) -> int:
    """Images of val and test that are in an earlier part, or whose near-duplicates are."""
    left = without_copies(parts)
    return sum(len(parts[part]) - len(left[part]) for part in PARTS)
