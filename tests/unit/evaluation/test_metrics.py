import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from torchmetrics.classification import MulticlassCalibrationError

from bit_ray.errors import DataError, ModelError
from bit_ray.evaluation import intervals
from bit_ray.evaluation.intervals import bootstrap_intervals
from bit_ray.evaluation.metrics import MAX_CONFUSION_CLASSES, ClassificationMetrics
from bit_ray.evaluation.worst import SurestPredictions, WorstPredictions


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
    with pytest.raises(DataError, match=f"labels: {label}; accepted: 0 to 3"):
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
    with pytest.raises(ModelError, match=r"logits: shape \[2, 5\]; accepted: \[batch, 4\]"):
        ClassificationMetrics(4).update(torch.zeros(2, 5), torch.tensor([0, 1]))


def test_labels_of_the_other_kind_are_refused():
    with pytest.raises(DataError, match=r"labels: shape \[2, 4\]; accepted: \[2\]"):
        ClassificationMetrics(4).update(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(DataError, match=r"labels: shape \[2\]; accepted: \[2, 4\]"):
        ClassificationMetrics(4, multi_label=True).update(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(DataError, match="numbers other than 0 and 1"):
        ClassificationMetrics(4, multi_label=True).update(torch.zeros(2, 4), torch.full((2, 4), 2))


def test_no_examples_have_no_result():
    metrics = ClassificationMetrics(4)
    metrics.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="num_examples: 0"):
        metrics.result()


def sharp(num_examples, num_classes, seed=0):
    """Logits of a model that is surer than it is right."""
    logits, labels = draw(num_examples, num_classes, seed)
    return 3 * logits, labels


@pytest.mark.parametrize("num_classes", [2, 10])
def test_calibration_agrees_with_torchmetrics_and_scikit_learn(num_classes):
    logits, labels = sharp(2003, num_classes)
    calibration = measured(logits, labels, num_classes).calibration()
    probabilities = logits.double().softmax(dim=1)
    reference = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")
    assert calibration.error == pytest.approx(float(reference(probabilities, labels)), abs=1e-6)
    assert calibration.error > 0.05
    confidence, predicted = probabilities.max(dim=1)
    accuracies, confidences = calibration_curve((predicted == labels).int(), confidence, n_bins=15)
    used = calibration.counts > 0
    np.testing.assert_allclose(calibration.accuracy[used], accuracies, rtol=1e-12)
    np.testing.assert_allclose(calibration.confidence[used], confidences, rtol=1e-12)
    assert calibration.counts.sum() == 2003
    assert measured(logits, labels, num_classes).result()["ece"] == calibration.error


def test_a_limit_of_the_bins_belongs_to_the_bin_below_and_certainty_to_the_last():
    logits = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]], dtype=torch.float64).log()
    logits = torch.cat([logits, torch.tensor([[800.0, 0.0]], dtype=torch.float64)])
    calibration = measured(logits, torch.tensor([1, 0, 0, 0]), 2).calibration()
    assert calibration.counts.tolist() == [0] * 7 + [1, 1, 0, 0, 1, 0, 0, 1]  # 0.5, 9/15, 12/15, 1


def test_calibration_of_several_labels_is_that_of_the_best_class():
    logits = torch.tensor([[2.0, -1.0], [2.0, -1.0]])
    calibration = measured(logits, torch.tensor([[1, 0], [0, 1]]), 2, multi_label=True).calibration()
    assert calibration.error == pytest.approx(1 / (1 + np.exp(-2)) - 0.5)


def values_of(logits, labels):
    """Each example's part in each metric."""
    rank = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return {"top_1": (rank < 1).double(), "top_5": (rank < 5).double(), "cross_entropy": losses}


def test_intervals_agree_with_the_bootstrap_of_scipy_over_the_examples():
    logits, labels = sharp(400, 12)
    metrics = measured(logits, labels, 12)
    found = bootstrap_intervals(metrics, num_resamples=20_000)
    generator = np.random.default_rng(1)
    settings = {"n_resamples": 20_000, "method": "percentile", "random_state": generator}
    for name, values in values_of(logits, labels).items():
        expected = stats.bootstrap((values.numpy(),), np.mean, batch=2000, **settings).confidence_interval
        width = expected.high - expected.low
        # Two draws of 20,000: the limits' own standard error is 1 % of the width, a step of the accuracy 1/400.
        assert found[name] == pytest.approx(tuple(expected), abs=0.05 * width + 1 / 400 * (name != "cross_entropy"))
        assert found[name][0] < metrics.result()[name] < found[name][1]


def test_the_interval_of_the_mean_per_class_agrees_with_resampled_scikit_learn():
    logits, labels = sharp(300, 6)
    labels[:150] = 0  # unequal classes
    low, high = bootstrap_intervals(measured(logits, labels, 6), num_resamples=4000)["mean_per_class"]
    predicted = logits.argmax(dim=1).numpy()
    generator = np.random.default_rng(2)
    samples = [generator.integers(0, 300, 300) for _ in range(2000)]
    scores = [balanced_accuracy_score(labels.numpy()[rows], predicted[rows]) for rows in samples]
    expected = np.quantile(scores, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.08 * (expected[1] - expected[0]))


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        right = torch.from_numpy(generator.random(200) < 0.7)
        logits = torch.stack([right, ~right], dim=1).double()
        low, high = bootstrap_intervals(measured(logits, torch.zeros(200, dtype=torch.long), 2))["top_1"]
        hits += low <= 0.7 <= high
    assert 0.91 <= hits / 400 <= 0.98  # 95 % less the bootstrap's own narrowness; standard error 1.1 %


def test_intervals_of_merged_parts_are_those_of_the_whole_and_repeat():
    logits, labels = sharp(300, 9)
    total = ClassificationMetrics(9)
    for part in (slice(0, 101), slice(101, 300)):
        state = measured(logits[part], labels[part], 9).state()
        total.merge(ClassificationMetrics.from_state(pickle.loads(pickle.dumps(state))))
    expected = bootstrap_intervals(measured(logits, labels, 9))
    assert set(expected) == {"top_1", "top_5", "mean_per_class", "cross_entropy"}
    for name, interval in bootstrap_intervals(total).items():
        assert interval == pytest.approx(expected[name], rel=1e-12)
    assert bootstrap_intervals(total, seed=1) != expected
    assert total.calibration().error == pytest.approx(measured(logits, labels, 9).calibration().error, rel=1e-12)


def test_what_travels_stays_small_however_many_examples_there_are():
    small, large = (len(pickle.dumps(measured(*draw(n, 10), 10).state())) for n in (10, 20_000))
    assert large == pytest.approx(small, rel=0.01)
    assert large < 50_000


def test_intervals_of_certain_results_and_several_labels():
    metrics = measured(torch.eye(4) * 50, torch.arange(4), 4)
    found = bootstrap_intervals(metrics)
    assert found["top_5"] == (1.0, 1.0)  # of four classes
    exact = stats.binomtest(4, 4).proportion_ci(0.95)
    assert found["top_1"] == found["mean_per_class"] == pytest.approx(tuple(exact))
    never = bootstrap_intervals(measured(torch.eye(6), (torch.arange(6) + 1) % 6, 6))
    assert never["top_1"] == pytest.approx(tuple(stats.binomtest(0, 6).proportion_ci(0.95)))
    several = measured(torch.eye(4), torch.eye(4), 4, multi_label=True)
    assert set(bootstrap_intervals(several)) == {"top_1", "top_5", "cross_entropy"}
    with pytest.raises(DataError, match="num_examples: 0"):
        bootstrap_intervals(ClassificationMetrics(4))


def test_intervals_of_many_classes_need_no_table_of_all_resamples(monkeypatch):
    logits, labels = sharp(500, 40)
    whole = bootstrap_intervals(measured(logits, labels, 40))
    monkeypatch.setattr(intervals, "_MOST_COUNTS", 1000)  # 8 resamples at a time
    assert bootstrap_intervals(measured(logits, labels, 40)) == whole


def errors_of(logits, labels, capacity, batch_size=64, offset=0, kept=WorstPredictions):
    metrics, worst = ClassificationMetrics(logits.shape[1]), kept(capacity)
    for start in range(0, len(labels), batch_size):
        rows = slice(start, start + batch_size)
        ids = [f"{offset + i:05d}" for i in range(len(labels))[rows]]
        pixels = np.zeros((len(ids), 8, 8, 3), np.uint8)
        worst.update(metrics.update(logits[rows], labels[rows]), ids, labels[rows, None].tolist(), pixels)
    return worst


def test_the_worst_predictions_are_the_most_confident_errors_of_all():
    logits, labels = sharp(700, 5)
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    wrong = [i for i in confidence.argsort(descending=True).tolist() if predicted[i] != labels[i]]
    whole = errors_of(logits, labels, 24)
    assert [item.id for item in whole.items] == [f"{i:05d}" for i in wrong[:24]]
    assert [item.predicted for item in whole.items] == predicted[wrong[:24]].tolist()
    assert [item.labels for item in whole.items] == [(int(labels[i]),) for i in wrong[:24]]
    parts = WorstPredictions(24)
    for start, stop in ((500, 700), (0, 7), (7, 500)):
        parts.merge(errors_of(logits[start:stop], labels[start:stop], 24, batch_size=9, offset=start).items)
    assert [item.id for item in parts.items] == [item.id for item in whole.items]


def test_the_surest_predictions_are_the_most_confident_right_ones_a_class_each():
    logits, labels = sharp(700, 9)
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    surest = {}
    for i in confidence.argsort(descending=True, stable=True).tolist():
        if predicted[i] == labels[i]:
            surest.setdefault(int(labels[i]), f"{i:05d}")
    assert len(surest) == 9
    whole = errors_of(logits, labels, 6, kept=SurestPredictions)
    assert [item.id for item in whole.items] == list(surest.values())[:6]
    parts = SurestPredictions(6)
    for start, stop in ((500, 700), (0, 7), (7, 500)):
        part = errors_of(logits[start:stop], labels[start:stop], 6, 9, start, SurestPredictions)
        parts.merge(part.items)
    assert [item.id for item in parts.items] == [item.id for item in whole.items]


def test_equal_confidences_are_kept_by_id_whatever_the_order():
    logits, labels = torch.tensor([[1.0, 0.0]]).repeat(30, 1), torch.ones(30, dtype=torch.long)
    expected = [f"{i:05d}" for i in range(4)]
    for parts in (((0, 30),), ((20, 30), (0, 20))):
        worst = WorstPredictions(4)
        for start, stop in parts:
            worst.merge(errors_of(logits[start:stop], labels[start:stop], 4, batch_size=3, offset=start).items)
        assert [item.id for item in worst.items] == expected


def test_a_worst_prediction_holds_a_small_picture_of_its_own():
    pixels = np.arange(2 * 300 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 300, 200, 3)
    metrics, worst = ClassificationMetrics(2), WorstPredictions(2)
    worst.update(metrics.update(torch.eye(2), torch.tensor([1, 1])), ["a", "b"], [[1], [1]], pixels)
    assert [item.id for item in worst.items] == ["a"]
    assert worst.items[0].pixels.shape == (128, 85, 3)
    small = WorstPredictions(2)
    small.update(metrics.update(torch.eye(2), torch.tensor([1, 1])), ["a", "b"], [[1], [1]], pixels[:, :32, :32])
    assert small.items[0].pixels.base is None
