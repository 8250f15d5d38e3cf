"""Scores of frozen features, in seconds and without training: few-shot ridge, nearest neighbours, LogME, episodes.

Features are ``[N, D]`` float arrays, the input of the network's head; labels are ``[N]`` class indices.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bit_ray.errors import ConfigError, DataError

RIDGE_L2 = 2.0**10
_BIAS = 100.0
_EPS = 1e-5
_CHUNK = 4096
QUERIES = 15

Array = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]


def ridge_predict(train: Array, labels: Labels, test: Array, num_classes: int, l2: float = RIDGE_L2) -> Labels:
    """Classify by ridge regression on one-hot targets of -1 and 1, in closed form.

    Features are standardised by mean and standard deviation (plus 1e-5) of the training examples. A constant feature of
    100 is the bias; it is so large that the penalty hardly affects it (big_vision:evaluators/fewshot_lsr.py).

    Args:
        train: ``[N, D]`` features.
        labels: ``[N]`` class indices.
        test: ``[M, D]`` features.
        num_classes: Number of classes C.
        l2: Penalty on the squared weights.

    Returns:
        ``[M]`` the class of the largest output; the lowest class if several are equal.
    """
    x, z = _tensor(train), _tensor(test)
    mean, std = x.mean(0), x.std(0, correction=0) + _EPS
    x, z = _with_bias((x - mean) / std), _with_bias((z - mean) / std)
    y = torch.full((len(x), num_classes), -1.0, dtype=x.dtype)
    y[torch.arange(len(x)), torch.from_numpy(labels)] = 1.0
    if x.shape[0] >= x.shape[1]:
        eigenvalues, q = torch.linalg.eigh(x.T @ x)
        left, right = q, q.T @ (x.T @ y)
    else:  # the same weights from the smaller matrix of inner products
        eigenvalues, q = torch.linalg.eigh(x @ x.T)
        left, right = x.T @ q, q.T @ y
    weights = (left / (eigenvalues + l2)) @ right
    return (z @ weights).argmax(1).numpy()


def knn_predict(
    train: Array, labels: Labels, test: Array, num_classes: int, neighbors: int, *, leave_one_out: bool = False
) -> Labels:
    """Classify by the majority of the nearest training examples, by cosine; the lowest class if several are equal.

    Args:
        train: ``[N, D]`` features.
        labels: ``[N]`` class indices.
        test: ``[M, D]`` features.
        num_classes: Number of classes C.
        neighbors: How many vote, at most N.
        leave_one_out: ``test`` is ``train``, and no example is its own neighbour.

    Returns:
        ``[M]`` class indices.
    """
    x, z, votes = _unit(_tensor(train)), _unit(_tensor(test)), torch.from_numpy(labels)
    assert 1 <= neighbors <= len(x) - leave_one_out, (neighbors, len(x))
    predicted = []
    for start in range(0, len(z), _CHUNK):
        likeness = z[start : start + _CHUNK] @ x.T
        if leave_one_out:
            rows = torch.arange(len(likeness))
            likeness[rows, rows + start] = -torch.inf
        nearest = votes[likeness.topk(neighbors, dim=1).indices]
        counts = torch.zeros(len(nearest), num_classes, dtype=torch.int64)
        counts.scatter_add_(1, nearest, torch.ones_like(nearest))
        predicted.append((counts == counts.amax(1, keepdim=True)).to(torch.uint8).argmax(1))
    return torch.cat(predicted).numpy()


def logme(features: Array, labels: Labels, num_classes: int) -> float:
    """Log marginal evidence per example of a Bayesian linear regression on each one-hot column, averaged over classes.

    The score of You et al., "LogME" (arXiv 2102.11005): higher predicts a better transfer. Weights have the prior
    N(0, 1/alpha), targets the noise 1/beta. For a given ratio t = alpha/beta the best beta is known in closed form. So
    only one number is searched, on a grid and then by golden section, instead of iterating over two.

    Args:
        features: ``[N, D]``.
        labels: ``[N]`` class indices.
        num_classes: Number of classes C.
    """
    x = _tensor(features)
    n = len(x)
    y = torch.zeros(n, num_classes, dtype=x.dtype)
    y[torch.arange(n), torch.from_numpy(labels)] = 1.0
    # Eigenvectors of the smaller of X^T X and X X^T give the squared singular values and the projections of y.
    if n >= x.shape[1]:
        squares, v = torch.linalg.eigh(x.T @ x)
        squares = squares.clamp_min(0.0)
        projected = (v.T @ (x.T @ y)).square() / squares.clamp_min(torch.finfo(x.dtype).tiny)[:, None]
    else:
        squares, u = torch.linalg.eigh(x @ x.T)
        squares = squares.clamp_min(0.0)
        projected = (u.T @ y).square()
    keep = squares > squares.amax() * max(x.shape) * torch.finfo(x.dtype).eps
    squares, projected = squares[keep], projected[keep]  # [R], [R, C]
    total = y.square().sum(0)
    outside = (total - projected.sum(0)).clamp_min(0.0)

    def evidence(log_t: torch.Tensor) -> torch.Tensor:
        """``[K, C]`` -> ``[K, C]``, at the best beta."""
        t = log_t.exp()[:, None]  # [K, 1, C]
        inside = (projected * (t / (t + squares[:, None]))).sum(1)
        beta = n / (inside + outside).clamp_min(torch.finfo(x.dtype).tiny)
        log_det = torch.log1p(squares[:, None] / t).sum(1)
        return 0.5 * (n * beta.log() - n * np.log(2 * np.pi) - n - log_det)

    middle = float(squares.mean().log())
    grid = torch.linspace(middle - 25, middle + 25, 101, dtype=x.dtype)
    values = torch.cat([evidence(t.expand(1, num_classes)) for t in grid])  # row by row: memory is R x C
    best = grid[values.argmax(0)]
    step = float(grid[1] - grid[0])
    low, high = best - step, best + step
    golden = (5**0.5 - 1) / 2
    for _ in range(40):
        a, b = high - golden * (high - low), low + golden * (high - low)
        left = (evidence(a[None]) > evidence(b[None]))[0]
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    return float(evidence(((low + high) / 2)[None]).mean() / n)


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """Top-1 of both probes with one number of examples per class, over the draws."""

    k: int
    """Examples per class."""
    ridge: tuple[float, ...]
    """Ridge regression, a fraction of 1 for each draw."""
    knn: tuple[float, ...]
    """Nearest neighbours, a fraction of 1 for each draw."""


def probe_features(
    train: Array,
    labels: Labels,
    subsets: Mapping[int, Sequence[Labels]],
    test: Array,
    test_labels: Labels,
    num_classes: int,
    *,
    neighbors: int = 10,
) -> list[ProbeScore]:
    """Score features by both probes on every subset.

    Args:
        train: ``[N, D]`` features.
        labels: ``[N]`` class indices.
        subsets: Examples per class k -> for each draw the indices of its examples in ``train``.
        test: ``[M, D]`` features.
        test_labels: ``[M]`` class indices.
        num_classes: Number of classes C.
        neighbors: Neighbours that vote, at most k of them.
    """
    scores = []
    for k, draws in subsets.items():
        ridge, knn = [], []
        for chosen in draws:
            x, y = train[chosen], labels[chosen]
            ridge.append(_accuracy(ridge_predict(x, y, test, num_classes), test_labels))
            knn.append(_accuracy(knn_predict(x, y, test, num_classes, min(neighbors, k)), test_labels))
        scores.append(ProbeScore(k=k, ridge=tuple(ridge), knn=tuple(knn)))
    return scores


@dataclass(frozen=True, kw_only=True)
class EpisodeScore:
    """Accuracy over episodes."""

    mean: float
    """Mean over the episodes, a fraction of 1."""
    interval: float
    """Half the width of the 95 % interval of that mean: 1.96 standard errors."""
    values: tuple[float, ...]
    """Accuracy of each episode."""


def episodes(
    features: Array,
    labels: Labels,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = QUERIES,
    num_episodes: int = 600,
    seed: int = 0,
    class_names: Sequence[str] = (),
) -> EpisodeScore:
    """N-way K-shot episodes on frozen features, classified by the nearest class mean.

    Each episode draws ``ways`` classes and, of each, ``shots`` support and ``queries`` query examples. Features are
    scaled to length 1; a query gets the class whose mean support feature is nearest (Euclidean distance). An episode's
    draw depends only on the seed and the number of the episode.

    Args:
        features: ``[N, D]``.
        labels: ``[N]`` class indices.
        ways: Classes of an episode.
        shots: Support examples per class.
        queries: Query examples per class.
        num_episodes: Episodes.
        seed: 0 or more.
        class_names: All class names, for messages.

    Raises:
        ConfigError: A number out of range.
        DataError: Fewer classes than ``ways``, or a class with too few examples.
    """
    classes = np.unique(labels)
    for name, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError.of(name, value, f"a whole number of at least {least}", "raise it")
    if num_episodes < 2:
        raise ConfigError.of("num_episodes", num_episodes, "at least 2, for an interval", "the literature has 600")
    if ways > len(classes):
        raise DataError.of("ways", ways, f"at most {len(classes)}, the number of classes with images", "lower it")
    members = {int(c): np.flatnonzero(labels == c) for c in classes}
    for c, of_class in members.items():
        if len(of_class) < shots + queries:
            name = f"class {c} ({class_names[c]!r})" if class_names else f"class {c}"
            given = f"{shots} with {queries} queries"
            accepted = f"together at most {len(of_class)}, the number of examples of {name}"
            raise DataError.of("shots", given, accepted, "lower shots or queries")
    x = _unit(_tensor(features)).numpy()
    truth = np.repeat(np.arange(ways), queries)
    values = []
    for episode in range(num_episodes):
        generator = np.random.default_rng((seed, episode))
        drawn = [
            generator.choice(members[int(c)], shots + queries, replace=False)
            for c in generator.choice(classes, ways, replace=False)
        ]
        support = np.stack([x[of_class[:shots]].mean(0) for of_class in drawn])
        query = np.concatenate([x[of_class[shots:]] for of_class in drawn])
        # |q - s|^2 without |q|^2, which is the same for all classes.
        distance = (support**2).sum(1) - 2 * query @ support.T
        values.append(_accuracy(distance.argmin(1), truth))
    return EpisodeScore(
        mean=statistics.fmean(values),
        interval=1.96 * statistics.stdev(values) / num_episodes**0.5,
        values=tuple(values),
    )


def _accuracy(predicted: npt.NDArray[np.integer], truth: npt.NDArray[np.integer]) -> float:
    return float(np.mean(predicted == truth))


def _tensor(features: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(features, np.float64))


def _with_bias(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.full((len(x), 1), _BIAS, dtype=x.dtype)], 1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Return rows scaled to length 1; a row of zeros is not changed."""
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
