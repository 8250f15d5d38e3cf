import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, spearmanr
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize

from bit_ray.errors import ConfigError, DataError
from bit_ray.evaluation.frozen import episodes, knn_predict, logme, probe_features, ridge_predict


def blobs(n, d, num_classes=6, spread=2.5, seed=0):
    """Overlapping clusters, so that predictions are neither all right nor all wrong; scales differ by feature."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(num_classes, d))
    labels = np.arange(n) % num_classes
    x = centers[labels] + spread * generator.normal(size=(n, d))
    return (x * np.geomspace(0.3, 3, d) + 0.1).astype(np.float32), labels


@pytest.mark.parametrize(("n", "d"), [(300, 20), (12, 40), (41, 40)], ids=["primal", "dual", "nearly square"])
@pytest.mark.parametrize("l2", [2.0**10, 0.5])
def test_ridge_predicts_what_an_independent_solver_predicts(n, d, l2):
    train, labels = blobs(n, d)
    test, truth = blobs(500, d, seed=1)
    predicted = ridge_predict(train, labels, test, 6, l2)

    x, z = train.astype(np.float64), test.astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, z = (np.c_[(part - mean) / std, np.full(len(part), 100.0)] for part in (x, z))
    targets = 2.0 * np.eye(6)[labels] - 1
    sklearn = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(x, targets).predict(z)
    # Least squares on the rows themselves and sqrt(l2) * I below them: the penalty as data.
    weights, *_ = np.linalg.lstsq(
        np.r_[x, np.sqrt(l2) * np.eye(d + 1)], np.r_[targets, np.zeros((d + 1, 6))], rcond=None
    )
    np.testing.assert_allclose(z @ weights, sklearn, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(predicted, sklearn.argmax(1))
    assert 0.3 < np.mean(predicted == truth) < 1  # chance is 1/6


def test_a_feature_that_is_constant_in_the_subset_does_not_break_ridge():
    train, labels = blobs(60, 8)
    train[:, 3] = 5
    assert set(ridge_predict(train, labels, train, 6)) == set(range(6))


@pytest.mark.parametrize("neighbors", [1, 2, 10])
def test_neighbours_vote_as_in_scikit_learn(neighbors):
    train, labels = blobs(90, 12)
    test, truth = blobs(5000, 12, seed=1)  # more than a chunk
    expected = KNeighborsClassifier(neighbors, metric="cosine").fit(train, labels).predict(test)
    predicted = knn_predict(train, labels, test, 6, neighbors)
    np.testing.assert_array_equal(predicted, expected)
    assert 0.2 < np.mean(predicted == truth) < 1


def test_leaving_one_out_no_example_is_its_own_neighbour():
    x, labels = blobs(90, 12)
    near = normalize(x.astype(np.float64)) @ normalize(x.astype(np.float64)).T
    np.fill_diagonal(near, -2)
    expected = labels[near.argmax(1)]
    np.testing.assert_array_equal(knn_predict(x, labels, x, 6, 1, leave_one_out=True), expected)
    np.testing.assert_array_equal(knn_predict(x, labels, x, 6, 1), labels)


@pytest.mark.parametrize(("n", "d"), [(60, 5), (24, 50)])
def test_logme_is_the_largest_evidence(n, d):
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 3
    x = (np.eye(3)[labels] @ generator.normal(size=(3, d)) + generator.normal(size=(n, d))).astype(np.float32)

    def evidence(log_alpha_beta, y):
        """Of y ~ N(0, I / beta + X X^T / alpha), by scipy."""
        alpha, beta = np.exp(np.clip(log_alpha_beta, -30, 30))
        covariance = np.eye(n) / beta + x.astype(np.float64) @ x.T / alpha
        return multivariate_normal(np.zeros(n), covariance, allow_singular=True).logpdf(y)

    best = []
    for c in range(3):
        y = (labels == c).astype(np.float64)
        starts = [(a, b) for a in (0, 3, 6) for b in (0, 3)]
        found = [minimize(lambda p, y=y: -evidence(p, y), start, method="Nelder-Mead") for start in starts]
        best.append(-min(result.fun for result in found) / n)
    assert logme(x, labels, 3) == pytest.approx(np.mean(best), abs=1e-5)


def test_logme_rises_with_what_the_features_say_of_the_labels():
    spreads = [1.0, 2.0, 4.0, 8.0]
    for n in (200, 30):
        scores = [logme(*blobs(n, 40, spread=spread), 6) for spread in spreads]
        assert spearmanr(spreads, scores).statistic == -1
        assert np.all(np.isfinite(scores))


def test_both_probes_score_every_subset():
    x, labels = blobs(120, 12)
    test, truth = blobs(300, 12, seed=1)
    subsets = {1: [np.arange(6), np.arange(6, 12)], 5: [np.arange(30)]}
    one, five = probe_features(x, labels, subsets, test, truth, 6, neighbors=10)
    assert (one.k, len(one.ridge), len(one.knn), five.k) == (1, 2, 2, 5)
    assert one.ridge[1] == np.mean(ridge_predict(x[6:12], labels[6:12], test, 6) == truth)
    # No more neighbours than examples of a class.
    assert five.knn == (np.mean(knn_predict(x[:30], labels[:30], test, 6, 5) == truth),)


def test_an_episode_is_classified_as_by_nearest_centroids():
    x, labels = blobs(200, 12, num_classes=10)
    found = episodes(x, labels, ways=5, shots=3, queries=4, num_episodes=20, seed=7)
    unit = normalize(x.astype(np.float64))
    expected = []
    for episode in range(20):
        generator = np.random.default_rng((7, episode))
        support, query = [], []
        for c in generator.choice(np.arange(10), 5, replace=False):
            places = generator.choice(np.flatnonzero(labels == c), 7, replace=False)
            support, query = [*support, *places[:3]], [*query, *places[3:]]
        model = NearestCentroid().fit(unit[support], labels[support])
        expected.append(model.score(unit[query], labels[query]))
    assert found.values == pytest.approx(expected, abs=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.interval == pytest.approx(1.96 * np.std(expected, ddof=1) / np.sqrt(20))
    assert 0.3 < found.mean < 1
    assert episodes(x, labels, shots=3, queries=4, num_episodes=20, seed=8).values != found.values


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"ways": 7}, DataError, "ways: 7; accepted: at most 6, the number of classes with images; lower it"),
        (
            {"shots": 6},
            DataError,
            "shots: 6 with 15 queries; accepted: together at most 20, the number of examples of class 0 ('crane'); "
            "lower shots or queries",
        ),
        (
            {"num_episodes": 1},
            ConfigError,
            "num_episodes: 1; accepted: at least 2, for an interval; the literature has 600",
        ),
        ({"shots": 0}, ConfigError, "shots: 0; accepted: a whole number of at least 1; raise it"),
    ],
)
def test_episodes_that_cannot_be_drawn_are_one_line(settings, kind, message):
    x, labels = blobs(120, 12)
    with pytest.raises(kind) as caught:
        episodes(x, labels, **settings, class_names=("crane", "ibis", "stork", "heron", "egret", "bittern"))
    assert str(caught.value) == message
