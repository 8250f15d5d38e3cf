"""A saved model ready for use: images in, class names and probabilities out."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bit_ray import store
from bit_ray.data.images.decode import MAX_PIXELS, ImageError, decode_image, orientation, turn
from bit_ray.data.images.resize import eval_view
from bit_ray.errors import ConfigError, DataError, ModelError, brief
from bit_ray.models.network import Network
from bit_ray.models.zoo import create_model
from bit_ray.weights.fetch import fetch_package
from bit_ray.weights.foreign import build_network, foreign_spec
from bit_ray.weights.location import foreign_path
from bit_ray.weights.package import ModelSpec, load_package, read_spec
from bit_ray.weights.read import read_weights

ImageInput = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
"""An image: a file's path, a file's bytes, a Pillow image in mode RGB, or an array ``[H, W, 3] uint8``."""

Prediction = list[tuple[str, float]]
"""(class name, probability), the most probable first."""

ClassifierState = tuple[dict[str, Tensor], ModelSpec]
"""Tensors by name, on the CPU, and what the network is."""


class Classifier:
    """A network with the settings that it needs to classify images."""

    def __init__(self, model: Network, spec: ModelSpec, sha256: str = "") -> None:
        if model.config.num_classes != spec.num_classes:
            given = f"the head has {model.config.num_classes} classes, the spec {spec.num_classes} class names"
            raise ModelError.of("num_classes", given, "equal numbers", "pass the spec of this model")
        self.model = model.eval()
        self.spec = spec
        self.sha256 = sha256
        """Digest of the weights file; empty for a model that was not loaded from a file."""

    def state(self) -> ClassifierState:
        """Data from which another process makes the same classifier."""
        return {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}, self.spec

    @classmethod
    def from_state(cls, state: ClassifierState, device: str) -> "Classifier":
        """Return the classifier of a `state`, on a torch device."""
        tensors, spec = state
        network = create_model(spec.model, spec.num_classes)
        network.load_state_dict(tensors)
        return cls(network.to(device), spec)

    @property
    def device(self) -> torch.device:
        """Device of the network, to which images are copied."""
        return next(self.model.parameters()).device

    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        top_k: int = 5,
        *,
        convert: bool = False,
        batch_size: int = 32,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Prediction]:
        """Classify one image or several.

        Args:
            images: One image or an iterable of images, each a path, encoded bytes, a Pillow image or an array.
            top_k: Classes to name for each image, at most all.
            convert: Convert encoded images that are not plain 8-bit RGB to it instead of refusing them; see
                `bit_ray.data.images.decode`.
            batch_size: Images that are classified at a time; they are decoded one at a time.
            max_pixels: Most pixels of an encoded image.

        Returns:
            One list of (class name, probability) for each image: softmax, or sigmoid of a multi-label model.

        Raises:
            DataError: An image is missing, damaged, or not RGB; the message says which one.
            ConfigError: ``top_k`` or ``batch_size`` is not an integer of at least 1, or ``convert`` is not a bool.
        """
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ConfigError.of(name, brief(value), "a whole number of at least 1", f"for example {name}=5")
        if not isinstance(convert, (bool, np.bool_)):
            raise ConfigError.of("convert", brief(convert), "true or false", "for example convert=True")
        if isinstance(images, (str, os.PathLike, bytes, Image.Image, np.ndarray)) or not isinstance(images, Iterable):
            images = [images]
        views = self._views(images, convert, max_pixels)
        predictions: list[Prediction] = []
        while batch := list(islice(views, batch_size)):
            best, classes = self.best(self.logits(np.stack(batch)), top_k)
            for row_scores, row_classes in zip(best.tolist(), classes.tolist(), strict=True):
                names = (self.spec.class_names[index] for index in row_classes)
                predictions.append(list(zip(names, row_scores, strict=True)))
        return predictions

    def best(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Return the most probable classes of ``[B, num_classes]`` logits, best first.

        Returns:
            Probabilities ``[B, k] float64``, softmax or sigmoid, and class indices ``[B, k] int64``; k is ``top_k`` or
            the number of classes if that is smaller.
        """
        logits = logits.double()
        scores = logits.sigmoid() if self.spec.multi_label else logits.softmax(dim=1)
        best, classes = scores.topk(min(top_k, self.spec.num_classes), dim=1)
        return best, classes

    def view(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize an image ``[H, W, 3] uint8`` to the network's input, ``[crop_size, crop_size, 3] uint8``."""
        spec = self.spec
        return eval_view(image, resize_mode=spec.resize_mode, resize_size=spec.resize_size, crop_size=spec.crop_size)

    @torch.inference_mode()
    def logits(self, batch: Tensor | npt.NDArray[np.uint8]) -> Tensor:
        """Run the network on images already at the crop size.

        Args:
            batch: ``[B, crop_size, crop_size, 3] uint8``.

        Returns:
            ``[B, num_classes] float32`` on `device`.

        Raises:
            DataError: The batch has another shape or type.
        """
        return self.model(self._input(batch)).float()

    @torch.inference_mode()
    def features_and_logits(self, batch: Tensor | npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Run the network on images already at the crop size, and return the head's input as well.

        Args:
            batch: ``[B, crop_size, crop_size, 3] uint8``.

        Returns:
            Pooled features ``[B, D] float32`` and logits ``[B, num_classes] float32``, on `device`.

        Raises:
            DataError: The batch has another shape or type.
        """
        features = self.model.forward_features(self._input(batch))
        return features.float(), self.model.forward_head(features).float()

    @torch.inference_mode()
    def feature_map(self, batch: Tensor | npt.NDArray[np.uint8]) -> Tensor:
        """Run the network on images already at the crop size, and return what is averaged to their features.

        Args:
            batch: ``[B, crop_size, crop_size, 3] uint8``.

        Returns:
            ``[B, D, h, w] float32`` on `device`.

        Raises:
            DataError: The batch has another shape or type.
            NotImplementedError: The network has no such map.
        """
        return self.model.forward_map(self._input(batch)).float()

    def _input(self, batch: Tensor | npt.NDArray[np.uint8]) -> Tensor:
        """Check a batch and return it as the network's input, on its device."""
        batch = torch.as_tensor(batch)
        size = self.spec.crop_size
        if batch.ndim != 4 or batch.shape[1:] != (size, size, 3) or batch.dtype != torch.uint8:
            raise DataError(
                f"batch: {list(batch.shape)} {str(batch.dtype).removeprefix('torch.')}; accepted: "
                f"[B, {size}, {size}, 3] uint8; resize the images first, or use predict"
            )
        low, high = self.spec.input_range
        # Copied to the device as uint8, float only there; the permuted view is channels_last without a copy.
        pixels = batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2).to(next(self.model.parameters()).dtype)
        return pixels * ((high - low) / 255) + low

    def decode(self, data: bytes, *, convert: bool = False, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
        """Decode an image to ``[H, W, 3] uint8`` as the model was trained: converted and turned upright, or not.

        Args:
            data: Its bytes.
            convert: Convert what is not plain 8-bit RGB, even if the training did not.
            max_pixels: Most pixels.

        Raises:
            ImageError: It is refused.
        """
        pixels = decode_image(data, convert=convert or self.spec.convert_images, max_pixels=max_pixels)
        if self.spec.upright and (stored := orientation(data)) > 1:
            pixels = turn(pixels, stored)
        return pixels

    def _views(self, images: Iterable[ImageInput], convert: bool, max_pixels: int) -> Iterator[npt.NDArray[np.uint8]]:
        for index, image in enumerate(images):
            yield self.view(self._pixels(image, f"images[{index}]", convert, max_pixels))

    def _pixels(self, image: ImageInput, where: str, convert: bool, max_pixels: int) -> npt.NDArray[np.uint8]:
        """Return ``[H, W, 3] uint8`` or raise a DataError that starts with ``where``."""
        if isinstance(image, (str, os.PathLike)):
            path = os.fsdecode(image)
            where = f"{where} ({path if path.isprintable() and len(path) <= 200 else brief(path)})"
            try:
                image = Path(path).read_bytes()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "not a path"
                raise DataError(f"{where}: {reason}; accepted: a readable image file; check the path") from None
        if isinstance(image, bytes):
            try:
                return self.decode(image, convert=convert, max_pixels=max_pixels)
            except ImageError as error:
                convert_it = "8-bit RGB; pass convert=True (--convert-images) to convert"
                remedy = convert_it if error.convertible else "a complete image; replace it"
                raise DataError(f"{where}: {error.reason}; accepted: {remedy}") from None
        if isinstance(image, Image.Image):
            if image.mode != "RGB":
                raise DataError(f"{where}: Pillow image of mode {image.mode}; accepted: RGB; pass image.convert('RGB')")
            try:
                return np.array(image)
            except MemoryError:
                raise
            except Exception as error:  # Pillow reads lazily, and raises almost anything on damaged input
                reason = " ".join(str(error).split())[:200]
                given = f"truncated or damaged ({reason})"
                raise DataError(f"{where}: {given}; accepted: a complete image; replace it") from None
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
                raise DataError(
                    f"{where}: array {list(image.shape)} {image.dtype}; accepted: [H, W, 3] uint8 in RGB; convert it, "
                    f"and pass several images as a list"
                )
            return image
        raise DataError(f"{where}: {type(image).__name__}; accepted: a path, bytes, a Pillow image or a numpy array")


def load_model(
    uri: str | os.PathLike[str],
    *,
    tracking_uri: str | None = None,
    device: str = "cpu",
    labels: str | Sequence[str] = "",
    crop_size: int = 0,
    features_only: bool = False,
    cache: Path | None = None,
) -> Classifier:
    """Load a saved model, or the weights of another program, for use.

    Args:
        uri: A directory (a local path, ``s3://...`` or ``gs://...``), or ``models:/NAME@ALIAS`` or
            ``models:/NAME/VERSION`` in the MLflow registry; or a local file or folder of BiT weights of the authors,
            big_vision, timm or Hugging Face (see `bit_ray.weights.read`); or a name, such as ``bit_m_r50x1``,
            ``timm/NAME`` or ``hf://ORG/NAME`` (see `bit_ray.weights.known`).
        tracking_uri: MLflow's URI; only for ``models:/``, by default MLflow's own setting.
        device: A torch device, ``cpu`` or ``cuda``.
        labels: Class names, or the file that has them one per line, for weights of another program; by default those
            of their folder, or else ImageNet's (see `bit_ray.weights.class_names.label_names`).
        crop_size: Side of the squares that images are resized to, pixels, for weights of another program; 0: as their
            folder or the file's name says (see `bit_ray.weights.foreign.foreign_spec`).
        features_only: Weights of another program may lack a head, or names for its classes; they get a head of zeros.
        cache: Folder where a saved model from a store is kept; by default ``models`` in
            `bit_ray.store.cache_folder`.

    Returns:
        The classifier. A saved model's weights are verified against their recorded digest.

    Raises:
        ModelError: There is no such model, or it is damaged, or has no classifier, or no names for its classes.
        ConfigError: The device does not exist, or ``labels`` or ``crop_size`` is set for a saved model, which has its
            own.
    """
    try:
        target = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        accepted = f"a device that torch has here, such as 'cpu' ({error})"
        raise ConfigError.of("device", repr(device), accepted) from None
    if foreign := foreign_path(os.fspath(uri)):
        weights = read_weights(foreign)
        spec = foreign_spec(weights, labels, crop_size, features_only=features_only)
        network = build_network(weights, spec.num_classes, head="zero" if features_only else "load")
        return Classifier(network.to(target), spec, weights.sha256)
    names = labels if isinstance(labels, str) else f"{len(labels)} names"
    for name, value in (("labels", names), ("crop_size", crop_size)):
        if value:
            given = f"{value}, but {os.fspath(uri)} is a saved model, which has its own"
            raise ConfigError.of(name, given, remedy="leave it out")
    model, spec, digest = _load(os.fspath(uri), tracking_uri, cache)
    return Classifier(model.to(target), spec, digest)


def _load(uri: str, tracking_uri: str | None, cache: Path | None) -> tuple[Network, ModelSpec, str]:
    if uri.startswith("models:/"):
        from bit_ray.tracking.fetch import fetch
        from bit_ray.tracking.reference import find

        directory = fetch(find(uri, tracking_uri), cache)
    elif store.is_local(uri):
        directory = Path(store.filesystem(uri)[1])
    else:
        directory = fetch_package(uri, cache)
    return *load_package(directory), read_spec(directory)[1].sha256
