import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from bit_ray.errors import DataError, ModelError
from bit_ray.evaluation.metrics import MAX_CONFUSION_CLASSES, ClassificationMetrics


def draw(num_examples, num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_examples,), generator=generator)
    logits = torch.randn(num_examples, num_classes, generator=generator)
    logits[torch.arange(num_examples), labels] += 1.5
    return logits, labels


def measured(logits, labels, num_classes, batch_size=64, **settings):
    metrics = ClassificationMetrics(num_classes, **settings)
    for batch in zip(logits.split(batch_size), labels.split(batch_size), strict=True):
        metrics.update(*batch)
    return metrics


@pytest.mark.parametrize("num_classes", [6, 11, 40])
def test_metrics_agree_with_scikit_learn(num_classes):
    logits, labels = draw(1001, num_classes)  # 1001 = 15 batches of 64 and a rest of 41
    metrics = measured(logits, labels, num_classes)
    result = metrics.result()
    classes = range(num_classes)
    predicted = logits.argmax(dim=1)
    probabilities = logits.double().softmax(dim=1).numpy()
    assert result["num_examples"] == 1001
    assert result["top_1"] == pytest.approx(top_k_accuracy_score(labels, logits, k=1, labels=classes), abs=1e-12)
    assert result["top_5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=classes), abs=1e-12)
    assert result["cross_entropy"] == pytest.approx(log_loss(labels, probabilities, labels=classes), rel=1e-12)
    assert result["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    assert metrics.confusion.dtype == np.int64
    np.testing.assert_array_equal(metrics.confusion, confusion_matrix(labels, predicted, labels=classes))


def test_top_5_of_three_classes_is_always_right():
    logits, labels = draw(50, 3)
    assert measured(logits, labels, 3).result()["top_5"] == 1.0


def test_top_5_of_five_or_fewer_classes_counts_all_of_them():
    logits, labels = draw(200, 2)
    result = measured(logits, labels, 2).result()
    assert result["top_1"] < 1.0
    assert result["top_5"] == 1.0


def test_class_without_examples_is_left_out_of_the_mean():
    logits = torch.tensor([[3.0, 0, 0, 0], [3.0, 0, 0, 0], [3.0, 0, 0, 0], [0, 0, 3.0, 0]])
    labels = torch.tensor([0, 0, 2, 2])
    assert measured(logits, labels, 4).result()["mean_per_class"] == pytest.approx((1.0 + 0.5) / 2)


def test_equal_logits_rank_by_class_index():
    logits = torch.zeros(7, 7)
    metrics = measured(logits, torch.arange(7), 7)
    assert metrics.result()["top_1"] == pytest.approx(1 / 7)
    assert metrics.result()["top_5"] == pytest.approx(5 / 7)
    assert metrics.confusion[:, 0].tolist() == [1] * 7


def test_top_1_is_the_diagonal_of_the_confusion_even_with_ties():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(3, (500, 8), generator=generator).float()
    metrics = measured(logits, torch.randint(8, (500,), generator=generator), 8)
    assert np.trace(metrics.confusion) == metrics.num_top_1 == metrics.class_correct.sum()


def test_merged_parts_equal_the_whole_after_travelling():
    logits, labels = draw(300, 9)
    whole = measured(logits, labels, 9)
    total = ClassificationMetrics(9)
    for part in (slice(0, 1), slice(1, 130), slice(130, 130), slice(130, 300)):
        state = measured(logits[part], labels[part], 9).state()
        total.merge(ClassificationMetrics.from_state(pickle.loads(pickle.dumps(state))))
    assert total.result() == pytest.approx(whole.result(), rel=1e-14)
    np.testing.assert_array_equal(total.confusion, whole.confusion)


def test_state_is_a_copy():
    logits, labels = draw(10, 4)
    metrics = measured(logits, labels, 4)
    state = metrics.state()
    metrics.update(logits, labels)
    assert state["num_examples"] == 10
    assert state["confusion"].sum() == 10
    restored = ClassificationMetrics.from_state(state)
    restored.update(logits, labels)
    assert state["confusion"].sum() == 10


def test_cross_entropy_of_extreme_logits_is_exact():
    metrics = measured(torch.tensor([[1000.0, 0.0], [1000.0, 0.0]]), torch.tensor([0, 1]), 2)
    assert metrics.result()["cross_entropy"] == 500.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_type_is_taken(dtype):
    logits, labels = draw(100, 12)
    logits = logits.to(dtype)
    assert measured(logits, labels, 12).result() == measured(logits.double(), labels, 12).result()


def test_confusion_is_not_kept_for_very_many_classes():
    num_classes = MAX_CONFUSION_CLASSES + 1
    metrics = measured(torch.eye(num_classes)[:3], torch.tensor([0, 1, 5]), num_classes)
    assert metrics.confusion is None
    assert metrics.result()["top_1"] == pytest.approx(2 / 3)
    assert metrics.result()["mean_per_class"] == pytest.approx(2 / 3)
    assert "confusion" not in metrics.state()


def test_multi_label_counts_a_hit_on_any_label():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(203, 12, generator=generator)
    labels = (torch.rand(203, 12, generator=generator) < 0.15).long()
    labels[:3] = 0  # images without labels
    result = measured(logits, labels, 12, multi_label=True).result()
    order = np.argsort(-logits.numpy(), axis=1)
    hits = np.take_along_axis(labels.numpy(), order, axis=1)
    assert result["top_1"] == pytest.approx(hits[:, :1].any(axis=1).mean())
    assert result["top_5"] == pytest.approx(hits[:, :5].any(axis=1).mean())
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y = labels.numpy()
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(axis=1).mean()
    assert result["cross_entropy"] == pytest.approx(expected, rel=1e-10)
    assert "mean_per_class" not in result


def test_multi_label_merges_too():
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    labels = torch.eye(4)[torch.arange(20) % 4]
    part = measured(logits[:7], labels[:7], 4, multi_label=True)
    part.merge(ClassificationMetrics.from_state(measured(logits[7:], labels[7:], 4, multi_label=True).state()))
    assert part.result() == pytest.approx(measured(logits, labels, 4, multi_label=True).result(), rel=1e-14)


def test_images_without_labels_are_never_right_even_when_the_top_five_are_all_classes():
    result = measured(torch.zeros(2, 3), torch.tensor([[0, 0, 0], [1, 0, 0]]), 3, multi_label=True).result()
    assert (result["top_1"], result["top_5"]) == (0.5, 0.5)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_classes_are_refused(label):
    with pytest.raises(DataError, match=f"labels: {label}; 0 to 3"):
        ClassificationMetrics(4).update(torch.zeros(2, 4), torch.tensor([0, label]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    metrics = ClassificationMetrics(4)
    with pytest.raises(ModelError, match="not finite for 1 of 3 images"):
        metrics.update(logits, torch.tensor([0, 1, 2]))
    assert metrics.num_examples == 0


def test_head_of_another_size_is_refused():
    with pytest.raises(ModelError, match=r"logits: shape \[2, 5\]; \[batch, 4\]"):
        ClassificationMetrics(4).update(torch.zeros(2, 5), torch.tensor([0, 1]))


def test_labels_of_the_other_kind_are_refused():
    with pytest.raises(DataError, match=r"labels: shape \[2, 4\]; \[2\]"):
        ClassificationMetrics(4).update(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(DataError, match=r"labels: shape \[2\]; \[2, 4\]"):
        ClassificationMetrics(4, multi_label=True).update(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(DataError, match="other numbers than 0 and 1"):
        ClassificationMetrics(4, multi_label=True).update(torch.zeros(2, 4), torch.full((2, 4), 2))


def test_no_examples_have_no_result():
    metrics = ClassificationMetrics(4)
    metrics.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="num_examples: 0"):
        metrics.result()
