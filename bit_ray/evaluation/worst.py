"""The predictions that say most about a model: a few of any number of images, collected while it is evaluated."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bit_ray.evaluation.metrics import Outcomes

NUM_WORST = 24
NUM_SUREST = 12
_THUMBNAIL = 128


@dataclass(frozen=True)
class WorstPrediction:
    """An image that was classified wrongly; in `SurestPredictions` rightly."""

    id: str
    """Id of the example in its set."""
    labels: tuple[int, ...]
    """Its true class."""
    predicted: int
    """The predicted class."""
    confidence: float
    """Probability of the predicted class."""
    pixels: npt.NDArray[np.uint8]
    """The model's input, ``[H, W, 3] uint8``, at most 128 pixels wide and high."""


class WorstPredictions:
    """The ``capacity`` most confident errors so far, the most confident first, ties by id; mergeable."""

    def __init__(self, capacity: int = NUM_WORST) -> None:
        self.capacity = capacity
        self.items: list[WorstPrediction] = []

    def update(
        self,
        outcomes: Outcomes,
        ids: Sequence[str],
        labels: Sequence[Sequence[int]],
        pixels: npt.NDArray[np.uint8],
    ) -> None:
        """Add the errors of a batch.

        Args:
            outcomes: Predictions for its B images.
            ids: Their ids.
            labels: Their class indices.
            pixels: ``[B, H, W, 3] uint8``.
        """
        enough = self.items[-1].confidence if len(self.items) == self.capacity else 0.0
        found: list[int] = np.flatnonzero(self._wanted(outcomes) & (outcomes.confidence >= enough)).tolist()
        # Only those that may be kept get a thumbnail.
        chosen = self._first(sorted(found, key=lambda i: (-outcomes.confidence[i], ids[i])), outcomes.predicted)
        self._keep(
            WorstPrediction(
                ids[i],
                tuple(labels[i]),
                int(outcomes.predicted[i]),
                float(outcomes.confidence[i]),
                _thumbnail(pixels[i]),
            )
            for i in chosen
        )

    def merge(self, items: Iterable[WorstPrediction]) -> None:
        """Add the items of another process that saw other examples."""
        self._keep(items)

    def _keep(self, items: Iterable[WorstPrediction]) -> None:
        self.items = heapq.nsmallest(self.capacity, [*self.items, *items], key=_order)

    def _wanted(self, outcomes: Outcomes) -> npt.NDArray[np.bool_]:
        return ~outcomes.right

    def _first(self, order: list[int], predicted: npt.NDArray[np.int64]) -> list[int]:
        """Those of a batch that may be kept, of its images in their order."""
        return order[: self.capacity]


class SurestPredictions(WorstPredictions):
    """The most confident right prediction of each class, of the ``capacity`` classes where it is most confident."""

    def __init__(self, capacity: int = NUM_SUREST) -> None:
        super().__init__(capacity)

    def _wanted(self, outcomes: Outcomes) -> npt.NDArray[np.bool_]:
        return outcomes.right

    def _first(self, order: list[int], predicted: npt.NDArray[np.int64]) -> list[int]:
        return list({int(predicted[i]): i for i in reversed(order)}.values())

    def _keep(self, items: Iterable[WorstPrediction]) -> None:
        # The last of a class counts: that of the most confident.
        order = sorted([*self.items, *items], key=_order, reverse=True)
        self.items = heapq.nsmallest(self.capacity, {item.predicted: item for item in order}.values(), key=_order)


def _order(item: WorstPrediction) -> tuple[Any, ...]:
    return -item.confidence, item.id


def _thumbnail(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if max(pixels.shape[:2]) <= _THUMBNAIL:
        return pixels.copy()  # not a view that would keep its whole batch
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.array(image)
