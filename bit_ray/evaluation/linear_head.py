"""A linear classifier of frozen features as a model's head: L2-regularised softmax regression, by cross-validation.

The features are centred and scaled by one number, so that a strength of the regularisation means the same for every
network. What is fitted is folded back into a kernel and a bias for the features as they are.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax
from sklearn.model_selection import StratifiedKFold

from bit_ray.errors import DataError

_NUM_FOLDS = 5
_INVERSE_STRENGTHS = tuple(float(value) for value in np.logspace(-3, 2, 6))
# The path ends after so many strengths in a row that are worse than the best.
_PATIENCE = 2
_MAX_ITERATIONS = 100
_GRADIENT = 2e-4
_TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """A fitted head, and what cross-validation says of it."""

    kernel: npt.NDArray[np.float32]
    """``[C, D]``."""
    bias: npt.NDArray[np.float32]
    """``[C]``."""
    inverse_strength: float
    """The chosen inverse strength of the regularisation: scikit-learn's C, for features of variance 1."""
    right: npt.NDArray[np.bool_]
    """``[N]`` whether each example was classified correctly by the head that was fitted without its fold."""
    held_out: npt.NDArray[np.float64]
    """``[N, C]`` log probabilities of each example by that head."""
    labels: npt.NDArray[np.int64]
    """``[N]`` what the examples are."""

    @property
    def accuracy(self) -> float:
        """Cross-validated top-1, a fraction of 1."""
        return float(self.right.mean())

    def logits(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Map features ``[N, D]`` to logits ``[N, C]``."""
        return features @ self.kernel.T + self.bias


def fit_linear_head(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], num_classes: int, *, seed: int = 0
) -> LinearHead:
    """Fit a head to features, with the regularisation that does best in stratified cross-validation.

    The strengths are tried from the strongest on; each fit starts from the one before. Of those with the same accuracy
    the one with the lowest cross-entropy is taken.

    Args:
        features: ``[N, D]``.
        labels: ``[N]`` class indices.
        num_classes: C.
        seed: Of the folds.

    Raises:
        DataError: A class has fewer than 2 examples, or there is only one class.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if num_classes < 2 or counts.min() < 2:
        scarce = int(counts.argmin())
        raise DataError(
            f"class {scarce}: {counts[scarce]} examples of {num_classes} classes; accepted: at least 2 of each of at "
            "least 2 classes; add some, or remove the class"
        )
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    scale = float(np.sqrt((centred**2).mean())) or 1.0
    x, basis = centred / scale, None
    if len(x) < x.shape[1]:
        # The regularisation does not change under rotation, and the examples span at most N dimensions.
        u, s, basis = np.linalg.svd(x, full_matrices=False)
        x = u * s
    x = x.astype(np.float32)
    folds = StratifiedKFold(min(_NUM_FOLDS, int(counts.min())), shuffle=True, random_state=seed)
    held_out = [held for _, held in folds.split(x, labels)]
    used = np.ones((len(held_out), len(x)), np.float32)
    for fold, held in enumerate(held_out):
        used[fold, held] = 0
    best: tuple[float, float] | None = None
    chosen, right, since = _INVERSE_STRENGTHS[0], np.zeros(len(x), bool), 0
    held_out_scores = np.zeros((len(x), num_classes))
    kernels, biases = np.zeros((len(used), num_classes, x.shape[1])), np.zeros((len(used), num_classes))
    for strength in _INVERSE_STRENGTHS:
        kernels, biases = _fit(x, labels, used, strength, kernels, biases)
        scores = np.empty((len(x), num_classes))
        for kernel, bias, held in zip(kernels, biases, held_out, strict=True):
            scores[held] = log_softmax(x[held] @ kernel.T + bias, axis=1)
        found = scores.argmax(1) == labels
        score = float(found.mean()), float(scores[np.arange(len(x)), labels].mean())
        if best is None or score > best:
            best, chosen, right, since = score, strength, found, 0
            held_out_scores = scores
            start = kernels.mean(0, keepdims=True), biases.mean(0, keepdims=True)
        else:
            since += 1
            if since == _PATIENCE:
                break
    kernels, biases = _fit(x, labels, np.ones((1, len(x)), np.float32), chosen, *start)
    kernel, bias = kernels[0], biases[0]
    if basis is not None:
        kernel = kernel @ basis
    kernel = kernel / scale
    bias = bias - kernel @ mean
    return LinearHead(
        kernel=kernel.astype(np.float32),
        bias=bias.astype(np.float32),
        inverse_strength=chosen,
        right=right,
        held_out=held_out_scores,
        labels=labels,
    )


def fit_temperature(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> float:
    """Return the temperature by which logits ``[N, C]`` are divided for the lowest cross-entropy (Guo et al., 2017).

    Targets are smoothed by 1 / (N + 2), as Platt (1999) does: else a few images that are all classified correctly would
    ask for infinite confidence. It is 1 unless the gain is larger than its standard error over the images.
    """
    num_examples, num_classes = logits.shape
    targets = np.full(logits.shape, 1 / (num_examples + 2) / (num_classes - 1))
    targets[np.arange(num_examples), labels] = 1 - 1 / (num_examples + 2)

    def cross_entropies(temperature: float) -> npt.NDArray[np.float64]:
        return -np.asarray((targets * log_softmax(logits / temperature, axis=1)).sum(1), np.float64)

    found = minimize_scalar(
        lambda log_temperature: cross_entropies(np.exp(log_temperature)).mean(),
        bounds=tuple(np.log(_TEMPERATURES)),
        method="bounded",
    )
    temperature = float(np.exp(found.x))
    gain = cross_entropies(1.0) - cross_entropies(temperature)
    return temperature if gain.mean() > gain.std() / num_examples**0.5 else 1.0


def clearly_better(right: npt.NDArray[np.bool_], than: npt.NDArray[np.bool_]) -> bool:
    """Return whether one classifier beats another on the same examples by two standard errors of the difference."""
    gained, lost = int((right & ~than).sum()), int((than & ~right).sum())
    return gained - lost > 2 * (gained + lost) ** 0.5


def _fit(
    x: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    used: npt.NDArray[np.float32],
    inverse_strength: float,
    kernels: npt.NDArray[np.float64],
    biases: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Fit F heads at once by L-BFGS, each to the examples that it uses; one matrix product serves all of them.

    Args:
        x: ``[N, D]``.
        labels: ``[N]``.
        used: ``[F, N]`` 1 where a head uses an example, else 0.
        inverse_strength: Of the regularisation of the kernels; biases have none.
        kernels: ``[F, C, D]`` to start from.
        biases: ``[F, C]`` to start from.

    Returns:
        Kernels and biases.
    """
    num_heads, num_classes, num_features = kernels.shape
    weight = used / used.sum(1, keepdims=True)
    decay = 1 / (inverse_strength * used.sum(1))
    rows = np.arange(len(x))

    def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        kernels, biases = _unpacked(flat, num_heads, num_classes, num_features)
        logits = x @ kernels.reshape(-1, num_features).T.astype(np.float32)
        scores = log_softmax(logits.reshape(len(x), num_heads, num_classes) + biases.astype(np.float32), axis=2)
        loss = -float((scores[rows, :, labels] * weight.T).sum(dtype=np.float64))
        loss += float((decay[:, None, None] * kernels**2).sum()) / 2
        error = np.exp(scores)
        error[rows, :, labels] -= 1
        error *= weight.T[:, :, None]
        by_kernel = (error.reshape(len(x), -1).T @ x).reshape(kernels.shape) + decay[:, None, None] * kernels
        return loss, np.concatenate([by_kernel.ravel(), error.sum(0, dtype=np.float64).ravel()])

    start = np.concatenate([kernels.ravel(), biases.ravel()])
    options = {"maxiter": _MAX_ITERATIONS, "gtol": _GRADIENT, "ftol": 1e-9}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return _unpacked(found.x, num_heads, num_classes, num_features)


def _unpacked(
    flat: npt.NDArray[np.float64], num_heads: int, num_classes: int, num_features: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    size = num_heads * num_classes * num_features
    return flat[:size].reshape(num_heads, num_classes, num_features), flat[size:].reshape(num_heads, num_classes)
