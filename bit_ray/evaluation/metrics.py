"""Classification metrics, added up batch by batch, in several processes if need be, without dropping an example."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from bit_ray.errors import DataError, ModelError

# 4096 x 4096 counts are 128 MiB, as much as should travel between processes.
MAX_CONFUSION_CLASSES = 4096

_SUMS = ("num_examples", "num_top_1", "num_top_5", "sum_cross_entropy")
_ARRAYS = ("class_total", "class_correct")


class ClassificationMetrics:
    """Top-1, top-5, cross-entropy, mean per-class accuracy and confusion over any number of batches.

    With several labels per image, an image counts as right when the predicted class (or one of the five best) is among
    its labels, cross-entropy is the sigmoid's, summed over classes, and there is neither a mean per class nor a
    confusion table. An image without labels is never right. Equal logits rank by class index, lowest first.
    """

    def __init__(self, num_classes: int, multi_label: bool = False):
        assert num_classes >= 1
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.num_examples = 0
        self.num_top_1 = 0
        self.num_top_5 = 0
        self.sum_cross_entropy = 0.0
        self.class_total: npt.NDArray[np.int64] = np.zeros(num_classes, np.int64)
        self.class_correct: npt.NDArray[np.int64] = np.zeros(num_classes, np.int64)
        keeps_confusion = not multi_label and num_classes <= MAX_CONFUSION_CLASSES
        self.confusion: npt.NDArray[np.int64] | None = (
            np.zeros((num_classes, num_classes), np.int64) if keeps_confusion else None
        )
        """``[C, C] int64``, rows true and columns predicted; None with several labels or above 4096 classes."""

    @torch.no_grad()
    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add one batch.

        Args:
            logits: ``[B, C]`` float, on any device.
            labels: ``[B] int64`` class indices, or ``[B, C]`` zeros and ones with several labels per image.

        Raises:
            DataError: a label outside the classes.
            ModelError: logits of another number of classes, or not finite.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ModelError(
                f"logits: shape {list(logits.shape)}; [batch, {self.num_classes}], a column per class of the data set; "
                "evaluate with a model whose head fits"
            )
        batch = logits.shape[0]
        expected = (batch, self.num_classes) if self.multi_label else (batch,)
        if tuple(labels.shape) != expected:
            raise DataError(
                f"labels: shape {list(labels.shape)}; {list(expected)} when multi_label is {self.multi_label}; "
                "evaluate with the kind of labels that the data set has"
            )
        if batch == 0:
            return
        logits = logits.to(torch.float64)
        labels = labels.to(logits.device)
        if broken := int((~logits.isfinite()).any(dim=1).sum()):
            raise ModelError(
                f"logits: not finite for {broken} of {batch} images; finite numbers; the weights are broken or diverged"
            )
        if self.multi_label:
            self._update_multi_label(logits, labels)
        else:
            self._update_single_label(logits, labels)
        self.num_examples += batch

    def _update_single_label(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        labels = labels.long()
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            wrong = int(labels[(labels < 0) | (labels >= self.num_classes)][0])
            raise DataError(
                f"labels: {wrong}; 0 to {self.num_classes - 1}; the data set has other classes than the model"
            )
        rank = _rank(logits, labels)
        self._count(rank)
        self.sum_cross_entropy += float(functional.cross_entropy(logits, labels, reduction="sum"))
        true = labels.cpu().numpy()
        correct = (rank == 0).cpu().numpy()
        self.class_total += np.bincount(true, minlength=self.num_classes)
        self.class_correct += np.bincount(true[correct], minlength=self.num_classes)
        if self.confusion is not None:
            np.add.at(self.confusion, (true, _first_argmax(logits).cpu().numpy()), 1)

    def _update_multi_label(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        targets = labels.to(torch.float64)
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise DataError("labels: other numbers than 0 and 1; one 0 or 1 per class; give them as multi-hot rows")
        # The best-ranked of an image's labels decides; without labels, a rank beyond every k.
        best = _first_argmax(logits.masked_fill(targets == 0, -torch.inf))
        rank = torch.where(targets.any(dim=1), _rank(logits, best), self.num_classes)
        self._count(rank)
        self.sum_cross_entropy += float(functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum"))

    def _count(self, rank: torch.Tensor) -> None:
        self.num_top_1 += int((rank < 1).sum())
        self.num_top_5 += int((rank < min(5, self.num_classes)).sum())

    def merge(self, other: Self) -> None:
        """Add what another process counted over other examples of the same data set."""
        assert (self.num_classes, self.multi_label) == (other.num_classes, other.multi_label)
        for name in _SUMS + _ARRAYS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if self.confusion is not None and other.confusion is not None:
            self.confusion = self.confusion + other.confusion

    def state(self) -> dict[str, Any]:
        """Return everything counted so far as numbers and NumPy arrays, to send to another process."""
        names = ("num_classes", "multi_label", *_SUMS, *_ARRAYS)
        state = {name: getattr(self, name) for name in names}
        if self.confusion is not None:
            state["confusion"] = self.confusion
        return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in state.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the metrics whose `state` this is."""
        metrics = cls(state["num_classes"], state["multi_label"])
        for name in state.keys() - {"num_classes", "multi_label"}:
            value = state[name]
            setattr(metrics, name, value.copy() if isinstance(value, np.ndarray) else value)
        return metrics

    def result(self) -> dict[str, float]:
        """Return the metrics over all examples so far.

        Returns:
            ``top_1``, ``top_5`` (the best min(5, C)) and ``mean_per_class`` as fractions of 1, ``cross_entropy`` in
            nats per image, ``num_examples``. A class without examples is left out of ``mean_per_class``, which is
            missing with several labels per image.

        Raises:
            DataError: no example was counted.
        """
        if self.num_examples == 0:
            raise DataError("num_examples: 0; at least 1 to evaluate; the data set or the split is empty")
        result = {
            "top_1": self.num_top_1 / self.num_examples,
            "top_5": self.num_top_5 / self.num_examples,
            "cross_entropy": self.sum_cross_entropy / self.num_examples,
            "num_examples": float(self.num_examples),
        }
        if not self.multi_label:
            present = self.class_total > 0
            result["mean_per_class"] = float(np.mean(self.class_correct[present] / self.class_total[present]))
        return result


def _first_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index ``[B]`` of the largest logit, the lowest one among equals, on every device."""
    return (logits == logits.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)


def _rank(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Number ``[B]`` of classes that come before the label: a larger logit, or an equal one of a lower index."""
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(dim=1)
