"""Which weights to start from, how to show them the images, and the linear head on their frozen features.

Every candidate is judged by the cross-validated accuracy of a linear head on the training images. The simplest one
stays unless another is better by two standard errors of the paired difference.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bit_ray.data.shards.manifest import Manifest
from bit_ray.errors import BitRayError, ModelError
from bit_ray.evaluation.linear_head import LinearHead, clearly_better, fit_linear_head
from bit_ray.inference.classifier import Classifier, load_model
from bit_ray.inference.features import read_features
from bit_ray.models.network import Network
from bit_ray.models.zoo import create_model
from bit_ray.tracking.listing import ListedModel
from bit_ray.tracking.registry import list_models
from bit_ray.training.initial_weights import InitialWeights, read_init
from bit_ray.weights.known import known_weights

DEFAULT_WEIGHTS = "bit_m_r50x1"
_MOST_CANDIDATES = 8
# A view's cost grows with its area; larger ones than the network's own.
_ENLARGED = (1.5, 2.0, 3.0, 4.0)
_LARGEST_VIEW = 480
_STEP = 32

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Weights with a view, and the best linear head on their features."""

    uri: str
    classifier: Classifier
    """The network as it sees the images; its own head is not used."""
    head: LinearHead
    inverted: bool
    """Whether the first kernel is negated, so that the network sees each image as its negative."""
    seconds: float
    """What the features of the training images took."""

    @property
    def size(self) -> int:
        """Side of the view, pixels."""
        return self.classifier.spec.crop_size


def invert(network: Network) -> Network:
    """Return a copy of a network that sees each image as its negative: the kernel of its first convolution is negated.

    Pixels are scaled to -1..1, the padding is 0 and the convolution has no bias, so this is exact.
    """
    inverted = copy.deepcopy(network)
    first = inverted.convolutions()[0]
    assert isinstance(first, nn.Conv2d)
    assert first.bias is None
    first.weight.data.neg_()
    return inverted


def initial_weights(start: Start, uri: str) -> InitialWeights:
    """Return the start's weights, negated where it sees negatives."""
    init = read_init(start.uri, uri)
    if not start.inverted:
        return init
    network: Network = start.classifier.model
    tensors = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    return replace(init, tensors=tensors, parent=f"{init.parent}, inverted")


def with_head(start: Start) -> Network:
    """Return the start's network with its linear head."""
    num_classes = len(start.head.bias)
    network = create_model(start.classifier.spec.model, num_classes)
    tensors = {name: t for name, t in start.classifier.model.state_dict().items() if not name.startswith("head.")}
    tensors["head.weight"] = torch.from_numpy(start.head.kernel)
    tensors["head.bias"] = torch.from_numpy(start.head.bias)
    network.load_state_dict(tensors)
    return network.to(start.classifier.device)


def choose_start(
    init: str,
    crop_size: int,
    shards: str,
    manifest: Manifest,
    *,
    tracking_uri: str,
    own_name: str,
    seed: int,
    seconds: float,
    device: str,
    say: Say,
) -> Start:
    """Choose weights, view and head for a shard set.

    Args:
        init: The only weights to try; empty: all that are at hand, else the authors' smallest.
        crop_size: The only view to try, pixels; 0: the network's own, and larger ones.
        shards: The training images.
        manifest: Their manifest.
        tracking_uri: Of the registry.
        own_name: Registered name of what is being trained, whose earlier versions are no candidates.
        seed: Of the folds.
        seconds: What larger views may take.
        device: Of the networks.
        say: Is told each choice with its reason.

    Raises:
        ModelError: there are no such weights, or none at hand and none can be fetched.
        DataError: a class has fewer than two images.
    """

    def features_of(classifier: Classifier, uri: str, inverted: bool) -> Start:
        began = time.monotonic()
        found = read_features(classifier, shards, manifest)
        taken = time.monotonic() - began
        head = fit_linear_head(found.features, found.labels, manifest.num_classes, seed=seed)
        return Start(uri, classifier, head, inverted, taken)

    def seen_at(start: Classifier, size: int) -> Classifier:
        spec = replace(start.spec, resize_mode="square", resize_size=size, crop_size=size)
        return Classifier(start.model, spec, start.sha256)

    uris, others = ([init], "") if init else _candidates(tracking_uri, own_name)
    tried: list[Start] = []
    refused: list[BitRayError] = []
    for uri in uris:
        try:
            classifier = _load(uri, tracking_uri, device)
        except BitRayError as error:
            if init or len(uris) == 1:
                raise
            refused.append(error)
            continue
        if not init and classifier.spec.provenance.get("manifest_digest") == manifest.digest:
            continue  # it was trained on these images
        size = crop_size or classifier.spec.crop_size
        tried.append(features_of(seen_at(classifier, size), uri, inverted=False))
    if not tried:
        first = f" ({refused[0]})" if refused else ""
        raise ModelError.of("init", f"no weights at hand can be used{first}", "weights to start from", "give some")
    best = max(tried, key=lambda start: start.head.accuracy)
    for reason in refused:
        say(f"left out: {reason}")
    say(_reason(best, tried, others, given=bool(init)))

    negative = Classifier(invert(best.classifier.model), best.classifier.spec, best.classifier.sha256)
    turned = features_of(negative, best.uri, inverted=True)
    if clearly_better(turned.head.right, best.head.right):
        say(
            f"polarity: the weights see the negative of each image, {turned.head.accuracy:.1%} instead of "
            f"{best.head.accuracy:.1%} by cross-validation; predictions do the same"
        )
        best = turned

    height, width = manifest.median_image_size
    spent, own = 0.0, best.size
    for factor in () if crop_size else _ENLARGED:
        size = min(_LARGEST_VIEW, round(own * factor / _STEP) * _STEP)
        cost = best.seconds * (size / best.size) ** 2
        if size <= best.size or size > 1.5 * max(height, width) or spent + cost > seconds:
            continue
        larger = features_of(seen_at(best.classifier, size), best.uri, best.inverted)
        spent += larger.seconds
        if clearly_better(larger.head.right, best.head.right):
            say(
                f"view: {size} pixels, {larger.head.accuracy:.1%} instead of {best.head.accuracy:.1%} with {best.size} "
                "by cross-validation"
            )
            best = larger
    if best.size == own:
        why = "as given" if crop_size else "as the weights were trained; no larger one that there is time for is better"
        say(f"view: {own} pixels, {why}")
    return best


def _load(uri: str, tracking_uri: str, device: str) -> Classifier:
    classifier = load_model(uri, tracking_uri=tracking_uri, device=device, features_only=True)
    if classifier.spec.input_range != (-1.0, 1.0):
        raise ModelError(f"{uri}: made for another range of pixels; accepted: -1 to 1, as for all BiT weights")
    return classifier


def _candidates(tracking_uri: str, own_name: str) -> tuple[list[str], str]:
    """Return the weights at hand, or else those that can be fetched; and in words what is not tried."""
    newest: dict[str, ListedModel] = {}
    for model in list_models(tracking_uri):
        if model.name != own_name:
            newest.setdefault(model.name, model)
    registered = sorted(newest.values(), key=lambda model: model.created, reverse=True)
    fetched = [weights for weights in known_weights() if weights.path.is_file()]
    uris = [f"models:/{model.name}/{model.version}" for model in registered[:_MOST_CANDIDATES]]
    uris += [weights.name for weights in fetched]
    if not uris:
        return [DEFAULT_WEIGHTS], ""
    if fetched:
        return uris, ""
    [default] = [weights for weights in known_weights() if weights.name == DEFAULT_WEIGHTS]
    return uris, f"not tried, as it is not on this machine: --init {DEFAULT_WEIGHTS}, {default.num_bytes / 1e6:,.0f} MB"


def _reason(best: Start, tried: Sequence[Start], others: str, *, given: bool) -> str:
    accuracy = f"{best.head.accuracy:.1%} by cross-validation with a linear head"
    if given:
        why = f"as given; {accuracy}"
    elif len(tried) == 1:
        why = f"the only weights at hand; {accuracy}"
    else:
        rest = sorted((start for start in tried if start is not best), key=lambda start: -start.head.accuracy)
        why = f"{accuracy}, before " + ", ".join(f"{start.uri} {start.head.accuracy:.1%}" for start in rest[:3])
    return f"start: {best.uri} ({best.classifier.spec.model}), {why}" + (f"; {others}" if others else "")
