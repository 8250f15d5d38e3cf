"""The page of a model, from its name to the file."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from bit_ray import store
from bit_ray.data.shards.manifest import MANIFEST, Manifest, read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.errors import BitRayError, ConfigError
from bit_ray.evaluation.evaluate import Evaluation, check_classes, evaluate_model
from bit_ray.locks import scratch_directory, whole
from bit_ray.progress import console, follow
from bit_ray.report.config import ModelReportConfig
from bit_ray.report.gallery import gallery
from bit_ray.report.page import Scores, render_model
from bit_ray.report.subject import Subject, find_subject
from bit_ray.tracking.address import tracking_uri
from bit_ray.weights.package import ModelSpec

_NUM_SHOTS = 12


def report_model(config: ModelReportConfig) -> Path:
    """Write the page of a model, completely or not at all; return where.

    Raises:
        BitRayError: Anything the user can fix.
    """
    uri = tracking_uri(config.tracking.uri, config.storage)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject = find_subject(config.model, storage=config.storage, tracking_uri=uri, device=device)
    path = Path(config.output or file_name(subject.name))
    if path.is_dir() or not path.absolute().parent.is_dir():
        given = f"{path}: {'a folder' if path.is_dir() else 'its folder does not exist'}"
        raise ConfigError.of("output", given, "a file in a folder that exists")
    with _opened(config.images or _test_set(subject), subject.classifier.spec, required=bool(config.images)) as opened:
        if isinstance(opened, str):
            page = render_model(subject, None, (opened,))
        else:
            try:
                page = _scored(subject, *opened, config.num_images)
            except BitRayError as error:
                if config.images:
                    raise
                page = render_model(subject, None, (f"The recorded test set cannot be read: {error}",))
    try:
        with whole(path) as unfinished:
            unfinished.write_bytes(page)
    except OSError as error:
        raise ConfigError.of("output", f"{path}: cannot be written ({error.strerror})", "a writable folder") from None
    return path


def file_name(name: str) -> str:
    """Return the default name of the page in the current folder; a model that somebody else made may have any name."""
    plain = re.sub(r"[^\w. -]+", "-", name).strip(" .-")
    return f"{plain[:100] or 'model'}.html"


def _scored(subject: Subject, shards: str, manifest: Manifest, num_images: int) -> bytes:
    indices = None
    if manifest.num_examples > num_images:
        drawn = np.random.default_rng(0).choice(manifest.num_examples, num_images, replace=False)
        indices = np.sort(drawn).astype(np.int64)
    count = manifest.num_examples if indices is None else len(indices)
    console.print(f"{subject.name}: scoring {count:,} images of {manifest.name}")
    evaluation = evaluate_model(subject.classifier, shards, manifest, None, indices=indices)
    return evaluated_page(subject, shards, manifest, evaluation)


def evaluated_page(subject: Subject, shards: str, manifest: Manifest, evaluation: Evaluation) -> bytes:
    """Return the page of a model that was just evaluated on a set, or on some of its images."""
    count = int(evaluation.metrics["num_examples"])
    images = f"{count:,} images" + (
        f" drawn from the {manifest.num_examples:,}" if count < manifest.num_examples else ""
    )
    shots = [
        gallery(subject.classifier, shards, manifest, items[:_NUM_SHOTS])
        for items in (evaluation.worst, evaluation.surest)
    ]
    return render_model(subject, Scores(f"{images} of {manifest.name}", evaluation, *shots))


def _test_set(subject: Subject) -> str:
    """Return the URI of the set that the model's run was tested on; empty if no set is recorded."""
    return subject.run.sets.get("test") or subject.run.params.get("test_shards", "")


@contextmanager
def _opened(images: str, spec: ModelSpec, *, required: bool) -> Iterator[tuple[str, Manifest] | str]:
    """Yield a shard set to score on and its manifest; or the reason why there is no set, where one is not required.

    Raises:
        BitRayError: It is required and cannot be used.
    """
    remedy = "give some with --images FOLDER"
    if not images:
        yield f"No test set is recorded, so there are no scores and no pictures; {remedy}."
        return
    try:
        shards = store.absolute(images)
        if not store.exists(store.join(shards, MANIFEST)) and not required:
            yield f"The recorded test set {images} is not there, so there are no scores and no pictures; {remedy}."
            return
    except BitRayError as error:
        if required:
            raise
        yield f"The recorded test set cannot be read ({error}); {remedy}."
        return
    if store.exists(store.join(shards, MANIFEST)):
        yield shards, _checked(shards, spec, images)
        return
    with scratch_directory() as directory:
        written = str(directory / "images")
        with follow("read") as progress:
            write_shards(
                images,
                written,
                name=Path(images).name,
                class_names=spec.class_names,
                convert_images=True,
                upright=spec.upright,
                on_bad="skip",
                progress=progress,
            )
        yield written, _checked(written, spec, images)


def _checked(shards: str, spec: ModelSpec, given: str) -> Manifest:
    """Return the manifest of a set of the model's classes."""
    manifest = read_manifest(shards)
    try:
        check_classes(spec, manifest, given)
    except ConfigError as error:
        raise error.renamed("images") from None
    return manifest
