"""Classification metrics, added up batch by batch, if needed in several processes, without dropping an example.

The sums stay small for any number of examples, and are enough for `bit_ray.evaluation.intervals` as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from bit_ray.errors import DataError, ModelError

# 4096 x 4096 counts are 128 MiB, the most that should be sent between processes.
MAX_CONFUSION_CLASSES = 4096

NUM_CALIBRATION_BINS = 15
"""Bins of equal width in (0, 1], as in Guo et al. 2017 (arXiv 1706.04599), whose figures have 15."""

# Cross-entropies by size, 2 % apart from 1e-9 to 1e5: in a resample, each counts as the mean of its bin.
_LOSS_EDGES = np.geomspace(1e-9, 1e5, 1629)

_SUMS = ("num_examples", "num_top_1", "num_top_5", "sum_cross_entropy")
_ARRAYS = ("class_total", "class_correct", "class_top_5", "bin_total", "bin_correct", "bin_confidence")
_LOSSES = ("loss_total", "loss_sum")


class Outcomes(NamedTuple):
    """Prediction for each image of a batch, on the CPU."""

    predicted: npt.NDArray[np.int64]
    """``[B]``, the class of the largest logit."""
    confidence: npt.NDArray[np.float64]
    """``[B]``, its probability: softmax, or sigmoid with several labels per image."""
    right: npt.NDArray[np.bool_]
    """``[B]``, whether it is the label, or one of the labels."""


@dataclass(frozen=True)
class Calibration:
    """Confidence and accuracy of the predicted class, by confidence."""

    edges: npt.NDArray[np.float64]
    """``[M + 1]``, the limits of the bins; a bin includes its upper limit."""
    counts: npt.NDArray[np.int64]
    """``[M]``, images in each bin."""
    confidence: npt.NDArray[np.float64]
    """``[M]``, mean confidence in each bin; 0 in an empty one."""
    accuracy: npt.NDArray[np.float64]
    """``[M]``, share of right predictions in each bin; 0 in an empty one."""

    @property
    def error(self) -> float:
        """Expected calibration error: the mean of |accuracy - confidence| over images (Guo et al. 2017, eq. 3)."""
        return float(self.counts @ np.abs(self.accuracy - self.confidence) / self.counts.sum())


class ClassificationMetrics:
    """Top-1, top-5, cross-entropy, mean per-class accuracy, calibration and confusion over any number of batches.

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
        self.class_top_5: npt.NDArray[np.int64] = np.zeros(num_classes, np.int64)
        self.bin_total: npt.NDArray[np.int64] = np.zeros(NUM_CALIBRATION_BINS, np.int64)
        self.bin_correct: npt.NDArray[np.int64] = np.zeros(NUM_CALIBRATION_BINS, np.int64)
        self.bin_confidence: npt.NDArray[np.float64] = np.zeros(NUM_CALIBRATION_BINS)
        self.loss_total: npt.NDArray[np.int64] = np.zeros(len(_LOSS_EDGES) + 1, np.int64)
        self.loss_sum: npt.NDArray[np.float64] = np.zeros(len(_LOSS_EDGES) + 1)
        keeps_confusion = not multi_label and num_classes <= MAX_CONFUSION_CLASSES
        self.confusion: npt.NDArray[np.int64] | None = (
            np.zeros((num_classes, num_classes), np.int64) if keeps_confusion else None
        )
        """``[C, C] int64``, rows true and columns predicted; None with several labels or above 4096 classes."""

    @torch.no_grad()
    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> Outcomes:
        """Add one batch.

        Args:
            logits: ``[B, C]`` float, on any device.
            labels: ``[B] int64`` class indices, or ``[B, C]`` zeros and ones with several labels per image.

        Returns:
            The prediction for each of its images.

        Raises:
            DataError: A label outside the classes.
            ModelError: Logits of another number of classes, or not finite.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ModelError(
                f"logits: shape {list(logits.shape)}; accepted: [batch, {self.num_classes}], a column per class of the "
                "data set; evaluate a model with a head of this size"
            )
        batch = logits.shape[0]
        expected = (batch, self.num_classes) if self.multi_label else (batch,)
        if tuple(labels.shape) != expected:
            raise DataError(
                f"labels: shape {list(labels.shape)}; accepted: {list(expected)} when multi_label is "
                f"{self.multi_label}; use the kind of labels that the data set has"
            )
        if batch == 0:
            return Outcomes(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.bool_))
        logits = logits.to(torch.float64)
        labels = labels.to(logits.device)
        if broken := int((~logits.isfinite()).any(dim=1).sum()):
            raise ModelError(
                f"logits: not finite for {broken} of {batch} images; accepted: finite numbers; the weights are "
                "damaged, or the training diverged"
            )
        labels = labels if self.multi_label else labels.long()
        rank, losses = self._multi_label(logits, labels) if self.multi_label else self._single_label(logits, labels)
        predicted = _first_argmax(logits)
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(dim=1)
        outcomes = Outcomes(
            predicted.cpu().numpy(),
            probabilities.gather(1, predicted[:, None])[:, 0].cpu().numpy(),
            (rank == 0).cpu().numpy(),
        )
        within_5 = (rank < min(5, self.num_classes)).cpu().numpy()
        self.num_examples += batch
        self.num_top_1 += int(outcomes.right.sum())
        self.num_top_5 += int(within_5.sum())
        self.sum_cross_entropy += float(losses.sum())
        _add(_bins(outcomes.confidence), self.bin_total, (self.bin_correct, outcomes.right))
        np.add.at(self.bin_confidence, _bins(outcomes.confidence), outcomes.confidence)
        sizes = losses.cpu().numpy()
        buckets = np.searchsorted(_LOSS_EDGES, sizes)
        np.add.at(self.loss_total, buckets, 1)
        np.add.at(self.loss_sum, buckets, sizes)
        if not self.multi_label:
            true = labels.cpu().numpy()
            _add(true, self.class_total, (self.class_correct, outcomes.right), (self.class_top_5, within_5))
            if self.confusion is not None:
                np.add.at(self.confusion, (true, outcomes.predicted), 1)
        return outcomes

    def _single_label(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank of the label and cross-entropy, both ``[B]``."""
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            wrong = int(labels[(labels < 0) | (labels >= self.num_classes)][0])
            raise DataError(
                f"labels: {wrong}; accepted: 0 to {self.num_classes - 1}; the data set has other classes than the model"
            )
        return _rank(logits, labels), functional.cross_entropy(logits, labels, reduction="none")

    def _multi_label(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank of the best-ranked label and cross-entropy, both ``[B]``; without labels, a rank above every k."""
        targets = labels.to(torch.float64)
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise DataError("labels: numbers other than 0 and 1; accepted: one 0 or 1 per class; give multi-hot rows")
        best = _first_argmax(logits.masked_fill(targets == 0, -torch.inf))
        rank = torch.where(targets.any(dim=1), _rank(logits, best), self.num_classes)
        losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
        return rank, losses

    def merge(self, other: Self) -> None:
        """Add the counts of another process over other examples of the same data set."""
        assert (self.num_classes, self.multi_label) == (other.num_classes, other.multi_label)
        for name in _SUMS + _ARRAYS + _LOSSES:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if self.confusion is not None and other.confusion is not None:
            self.confusion = self.confusion + other.confusion

    def state(self) -> dict[str, Any]:
        """Return everything counted so far as numbers and NumPy arrays, to send to another process."""
        names = ("num_classes", "multi_label", *_SUMS, *_ARRAYS, *_LOSSES)
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
            nats per image, ``ece`` (the error of `calibration`), ``num_examples``. A class without examples is left out
            of ``mean_per_class``, which is missing with several labels per image.

        Raises:
            DataError: No example was counted.
        """
        if self.num_examples == 0:
            raise DataError("num_examples: 0; accepted: at least 1; the data set or the split is empty")
        result = {
            "top_1": self.num_top_1 / self.num_examples,
            "top_5": self.num_top_5 / self.num_examples,
            "cross_entropy": self.sum_cross_entropy / self.num_examples,
            "ece": self.calibration().error,
            "num_examples": float(self.num_examples),
        }
        if not self.multi_label:
            present = self.class_total > 0
            result["mean_per_class"] = float(np.mean(self.class_correct[present] / self.class_total[present]))
        return result

    def calibration(self) -> Calibration:
        """Return confidence against accuracy in 15 bins of equal width."""
        counts = np.maximum(self.bin_total, 1)
        edges = np.linspace(0, 1, NUM_CALIBRATION_BINS + 1)
        return Calibration(edges, self.bin_total.copy(), self.bin_confidence / counts, self.bin_correct / counts)


def _add(
    buckets: npt.NDArray[np.int64],
    total: npt.NDArray[np.int64],
    *marked: tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]],
) -> None:
    """Count the indices into ``total``, and into each other array those that are marked for it."""
    total += np.bincount(buckets, minlength=len(total))
    for counts, where in marked:
        counts += np.bincount(buckets[where], minlength=len(total))


def _bins(confidence: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the calibration bin of each confidence; a limit belongs to the bin below it."""
    edges = np.linspace(0, 1, NUM_CALIBRATION_BINS + 1)
    return np.clip(np.searchsorted(edges, confidence) - 1, 0, NUM_CALIBRATION_BINS - 1)


def _first_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index ``[B]`` of the largest logit, on every device the lowest one if several are equal."""
    return (logits == logits.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)


def _rank(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the number ``[B]`` of classes before the label: a larger logit, or an equal one of a lower index."""
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(dim=1)
