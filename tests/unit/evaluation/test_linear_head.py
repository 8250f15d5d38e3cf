"""The linear head against scikit-learn, its folds, its temperature and its comparison."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

from bit_ray.errors import DataError
from bit_ray.evaluation.linear_head import clearly_better, fit_linear_head, fit_temperature
from bit_ray.evaluation.metrics import ClassificationMetrics


@pytest.fixture(scope="module")
def digits():
    """Random features of handwritten digits: 300 to train on, the others to test."""
    pixels, labels = load_digits(return_X_y=True)
    kernel = np.random.default_rng(0).normal(size=(64, 128))
    features = np.maximum(pixels @ kernel / 30, 0).astype(np.float32) + 5
    order = np.random.default_rng(1).permutation(len(labels))
    return features[order], labels[order].astype(np.int64)


def test_it_is_as_accurate_as_cross_validated_logistic_regression(digits):
    features, labels = digits
    train, test = slice(0, 300), slice(300, None)
    head = fit_linear_head(features[train], labels[train], 10)
    found = float((head.logits(features[test]).argmax(1) == labels[test]).mean())
    peer = LogisticRegressionCV(cv=5, max_iter=200, use_legacy_attributes=False, l1_ratios=(0,))
    expected = peer.fit(features[train], labels[train]).score(features[test], labels[test])
    assert found >= expected - 0.003
    assert head.right.shape == (300,)
    assert abs(head.accuracy - found) < 0.05


@pytest.mark.parametrize("num_train", [100, 600])  # fewer and more examples than features
def test_its_coefficients_are_those_of_the_same_strength(digits, num_train):
    features, labels = digits[0][:num_train], digits[1][:num_train]
    head = fit_linear_head(features, labels, 10)
    mean = features.mean(0, dtype=np.float64)
    scale = np.sqrt(((features - mean) ** 2).mean())
    peer = LogisticRegression(C=head.inverse_strength, max_iter=5000, tol=1e-7)
    peer.fit((features - mean) / scale, labels)
    expected = log_softmax(((features - mean) / scale) @ peer.coef_.T + peer.intercept_, axis=1)
    found = log_softmax(head.logits(features), axis=1)
    assert np.abs(np.exp(found) - np.exp(expected)).max() < 0.01


def test_two_classes_and_features_without_variance():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    features = np.stack([labels + rng.normal(0, 0.1, 40), np.full(40, 7.0)], axis=1).astype(np.float32)
    head = fit_linear_head(features, labels, 2)
    assert head.kernel.shape == (2, 2)
    assert head.accuracy == 1.0
    assert (head.logits(features).argmax(1) == labels).all()


@pytest.mark.parametrize(("labels", "num_classes"), [([0, 0, 0, 1], 2), ([0, 0, 0, 0], 1), ([0, 0, 1, 1], 3)])
def test_a_class_that_cannot_be_cross_validated_is_refused(labels, num_classes):
    with pytest.raises(DataError, match="accepted: at least 2 of each of at least 2 classes"):
        fit_linear_head(np.zeros((4, 3), np.float32), np.array(labels), num_classes)


def calibration_error(logits, labels):
    metrics = ClassificationMetrics(logits.shape[1], multi_label=False)
    metrics.update(torch.from_numpy(logits), torch.from_numpy(labels))
    return metrics.result()["ece"]


def test_the_folds_calibrate_better_than_a_few_validation_images(digits):
    features, labels = digits
    errors = []
    for draw in range(5):
        order = np.random.default_rng(draw).permutation(len(labels))
        train, val, test = np.split(order, [120, 146])
        head = fit_linear_head(features[train], labels[train], 10, seed=draw)
        logits = head.logits(features[val]).astype(np.float64)
        few = fit_temperature(logits, labels[val])
        pooled = np.concatenate([logits, head.held_out])
        more = fit_temperature(pooled, np.concatenate([labels[val], head.labels]))
        scored = head.logits(features[test])
        errors.append([calibration_error(scored / value, labels[test]) for value in (few, more, 1)])
    few, more, none = np.mean(errors, axis=0)
    assert more < few - 0.01
    assert more < none
    assert np.max(errors, axis=0)[1] < 0.06
    assert (head.held_out.argmax(1) == head.labels).tolist() == head.right.tolist()


def test_a_temperature_that_gains_nothing_for_sure_is_left_out():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2000, 5))
    labels = np.array([rng.choice(5, p=np.exp(row)) for row in log_softmax(logits, axis=1)])
    found = np.array([fit_temperature(logits[i : i + 20], labels[i : i + 20]) for i in range(0, 2000, 20)])
    assert (found == 1).mean() > 0.5
    assert fit_temperature(logits[:20] * 8, labels[:20]) > 3


def test_the_temperature_undoes_a_scale():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (5000, 4))
    chances = np.exp(log_softmax(logits, axis=1))
    labels = np.array([rng.choice(4, p=row) for row in chances])
    assert fit_temperature(logits * 3, labels) == pytest.approx(3, rel=0.1)
    assert fit_temperature(logits, labels) == pytest.approx(1, rel=0.1)


def test_a_few_images_that_are_all_right_do_not_ask_for_certainty():
    logits = np.eye(3)[np.arange(30) % 3] * 4.0
    temperature = fit_temperature(logits, np.arange(30) % 3)
    confidence = np.exp(log_softmax(logits / temperature, axis=1)).max()
    assert confidence == pytest.approx(1 - 1 / 32, abs=0.002)


def test_a_difference_counts_from_two_standard_errors_on():
    than = np.zeros(100, bool)
    assert not clearly_better(np.arange(100) < 4, than)  # 4 gained, none lost: 2 standard errors
    assert clearly_better(np.arange(100) < 5, than)
    assert not clearly_better(than, than)
