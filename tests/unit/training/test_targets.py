"""The targets that classification makes of the rows of a batch."""

import pytest
import torch

from bit_ray.data.images.views import Placement
from bit_ray.data.stream.rows import HOLE, Row
from bit_ray.training.objectives.classify import Classification

WHOLE = Placement((0, 0, 40, 40), (32, 32), (0, 0), False)


def rows(*labels: tuple[int, ...] | None) -> list[Row]:
    """Rows with these labels; None: a hole."""
    return [HOLE if of_row is None else Row(of_row, b"", WHOLE) for of_row in labels]


def same(targets: torch.Tensor, expected: torch.Tensor) -> bool:
    return targets.dtype == expected.dtype and torch.equal(targets, expected)


def test_softmax_targets_are_class_indices_with_minus_one_in_holes() -> None:
    targets = Classification(loss="softmax", num_classes=5).targets(rows((3,), None, (0,), (4,)))
    assert same(targets, torch.tensor([3, -1, 0, 4], dtype=torch.int64))


def test_sigmoid_targets_are_zeros_and_ones_with_minus_one_in_holes() -> None:
    targets = Classification(loss="sigmoid", num_classes=4).targets(rows((), None, (2,), (0, 3)))
    expected = [[0, 0, 0, 0], [-1, -1, -1, -1], [0, 0, 1, 0], [1, 0, 0, 1]]
    assert same(targets, torch.tensor(expected, dtype=torch.int8))


@pytest.mark.parametrize("shape", [("softmax", (3,)), ("sigmoid", (3, 7))])
def test_a_batch_of_holes_is_all_minus_one(shape: tuple[str, tuple[int, ...]]) -> None:
    loss, size = shape
    targets = Classification(loss="softmax" if loss == "softmax" else "sigmoid", num_classes=7).targets([HOLE] * 3)
    assert targets.shape == size
    assert (targets == -1).all()


def test_annotations_do_not_change_the_targets_of_classification() -> None:
    objective = Classification(loss="softmax", num_classes=3)
    plain = rows((1,), (2,))
    annotated = [row._replace(annotation=b"[1, 2, 3, 4]") for row in plain]
    assert same(objective.targets(annotated), objective.targets(plain))
