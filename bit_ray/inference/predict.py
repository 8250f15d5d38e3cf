"""Classify any number of images over the cluster, into one file or a folder of parts, by Ray Data.

Each actor has the model, on a GPU if there is one, and takes part after part of the input: it reads and decodes a few
images ahead of the network in threads. No process keeps pixels or features of more than one part. Images that cannot be
read become rows with a reason.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from bit_ray import store
from bit_ray.claim import CLAIM_FILE, claimed
from bit_ray.cluster.session import cluster, quiet_ray_data
from bit_ray.cluster.slots import Resources
from bit_ray.config import digest
from bit_ray.data.images.decode import ImageError
from bit_ray.errors import ConfigError, root_cause
from bit_ray.inference.classifier import Classifier, load_model
from bit_ray.inference.inputs import FileImage, Images, ShardImage, ahead, open_images
from bit_ray.inference.outputs import (
    SUMMARY_FILE,
    check_output,
    claim_of,
    prediction_schema,
    prediction_table,
    read_errors,
    write_file,
)

OUTPUT_PLAN_FILE = "_plan.json"
_NUM_REASONS = 5
_MOST_THREADS = 32


@dataclass(frozen=True, kw_only=True)
class PredictReport:
    """What was written."""

    output: str
    """File, or folder of parts."""
    num_images: int
    """Rows."""
    num_unreadable: int
    """Rows with a reason instead of classes."""
    reasons: tuple[tuple[str, int], ...]
    """The most frequent reasons, with counts."""
    others: Mapping[str, int]
    """Files that were left out because their endings are not those of images, by ending."""
    num_features: int
    """Length of the feature vectors, 0 without."""
    seconds: float
    """Seconds from the start of the cluster to the last row."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What an actor does with a part."""

    top_k: int
    convert: bool
    features: bool
    batch_size: int
    num_threads: int
    folder: str
    """Folder in which parts are written; empty: they are returned."""


def predict_folder(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str] | Classifier,
    output: str | os.PathLike[str],
    *,
    top_k: int = 5,
    features: bool = False,
    convert: bool = False,
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    tracking_uri: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PredictReport:
    """Classify a folder of images, a list of files and folders, or a shard set.

    The output has a row for each image, in the order of the input: ``path`` (as given; of a shard set the example's
    id), ``class_1``, ``probability_1`` ... ``class_k``, ``probability_k``, the best first, ``features`` if asked for,
    and ``error``, why an image could not be read, else null.

    Args:
        images: Local paths or URIs; in a folder, files with the endings of images count.
        model: What `load_model` takes, or its result.
        output: A file ending in ``.csv`` or ``.parquet``, or a folder ending in ``/``. The actors write
            ``part-*.parquet`` files into the folder; ``_predictions.json`` is written last. A file appears when it is
            complete; the same call continues an interrupted folder.
        top_k: Classes to name for each image, at most all.
        features: Write the pooled features before the head as well, ``[D] float32``; Parquet only.
        convert: Convert images that are not plain 8-bit RGB instead of reporting them.
        batch_size: Images per forward pass.
        device: ``auto``: GPUs if the cluster has any.
        tracking_uri: MLflow's URI, for ``models:/...``.
        progress: Called with (images done, images in all).

    Raises:
        ConfigError: A setting that cannot work; the output exists, has an unknown ending, or is being written.
        DataError: No image; a store that cannot be reached; a damaged shard.
        ModelError: There is no such model.
    """
    start = time.monotonic()
    output = str(output)
    kind = check_output(output, features)
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError.of(name, value, "at least 1", f"for example {name}=5")
    opened = open_images([str(images)] if isinstance(images, (str, os.PathLike)) else [str(image) for image in images])
    remedy = "wait for it, stop it, or choose another output"
    with claimed(claim_of(output, kind), f"{output} is being written", field="output", remedy=remedy):
        classifier = model if isinstance(model, Classifier) else load_model(model, tracking_uri=tracking_uri)
        convert = convert or opened.convert
        folder = store.absolute(output) if kind == "folder" else ""
        settings = _Settings(
            top_k=top_k, convert=convert, features=features, batch_size=batch_size, num_threads=1, folder=folder
        )
        if kind == "folder":
            _begin_folder(folder, opened, classifier, settings)
        tally = _Tally(len(opened), progress)
        with cluster() as resources:
            tables = _tables(classifier, opened, settings, resources, device)
            if kind == "folder":
                for table in tables:
                    tally.add(table)
            else:
                write_file(output, kind, map(tally.add, tables), prediction_schema(classifier, top_k, features))
        report = PredictReport(
            output=output,
            num_images=tally.done,
            num_unreadable=sum(tally.reasons.values()),
            reasons=tuple(tally.reasons.most_common(_NUM_REASONS)),
            others=opened.others,
            num_features=classifier.model.num_features if features else 0,
            seconds=time.monotonic() - start,
        )
        assert report.num_images == len(opened)
        if kind == "folder":
            summary = {"num_images": report.num_images, "num_unreadable": report.num_unreadable}
            store.write_json(store.join(folder, SUMMARY_FILE), {**summary, "num_parts": opened.num_parts})
        return report


def _begin_folder(folder: str, images: Images, classifier: Classifier, settings: _Settings) -> None:
    """Record what the folder will have, or check that an earlier call recorded the same."""
    plan = {
        "images": images.digest,
        "weights_sha256": classifier.sha256,
        "class_names_sha256": digest(list(classifier.spec.class_names)),
        "top_k": settings.top_k,
        "convert": settings.convert,
        "features": settings.features,
    }
    path = store.join(folder, OUTPUT_PLAN_FILE)
    if store.exists(path):
        begun = store.read_json(path)
        changed = [name for name, value in plan.items() if not isinstance(begun, dict) or begun.get(name) != value]
        if changed:
            given = f"{folder} was begun with other {', '.join(changed)}"
            raise ConfigError.of("output", given, "the same settings", "choose another folder")
    elif [name for name in store.list_files(folder) if name != CLAIM_FILE]:
        raise ConfigError.of("output", f"{folder} is not empty", "a new or empty folder", "choose another")
    else:
        store.write_json(path, plan)


def _tables(
    classifier: Classifier, images: Images, settings: _Settings, resources: Resources, device: str
) -> Iterator[pa.Table]:
    """Yield the tables that the actors return, in the order of the parts."""
    use_gpu = device != "cpu" and resources.most_gpus > 0
    if device == "cuda" and not use_gpu:
        raise ConfigError.of("device", "cuda, but the cluster has no GPU", "auto or cpu", "choose one")
    slots = resources.slots_for(images.num_parts, use_gpu=use_gpu)
    # A network on a GPU needs all the other cores; one on a CPU core needs a thread that waits for files.
    threads = min(_MOST_THREADS, max(2, resources.most_cpus // resources.most_gpus)) if use_gpu else 2
    settings = replace(settings, num_threads=threads)
    shared = ray.put((classifier.state(), images, settings))
    quiet_ray_data()
    # Not ray.data.range, whose read tasks would want CPUs that the actors hold, nor from_arrow, which starts workers to
    # ask them for the size of each table.
    parts = [{"part": part} for part in range(images.num_parts)]
    dataset = ray.data.from_items(parts, override_num_blocks=len(parts))
    dataset = dataset.map_batches(
        _Predictor,
        fn_constructor_args=([shared],),  # in a list, so that actors fetch it and the driver does not
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(slots, images.num_parts)),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.raise_original_map_exception = True  # otherwise the cause is lost
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        raise root_cause(error) or error from None


class _Predictor:
    """An actor's state: the network, and threads that read and decode ahead of it."""

    def __init__(self, shared: list[Any]) -> None:
        state, self.images, self.settings = ray.get(shared[0])
        on_gpu = ray.get_gpu_ids() and torch.cuda.is_available()
        self.classifier = Classifier.from_state(state, "cuda" if on_gpu else "cpu")
        self.pool = ThreadPoolExecutor(self.settings.num_threads, thread_name_prefix="predict-decode")
        self.schema = prediction_schema(self.classifier, self.settings.top_k, self.settings.features)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Classify a part."""
        (part,) = batch["part"].to_pylist()
        if not self.settings.folder:
            return self._rows(part)
        path = store.join(self.settings.folder, f"part-{part:05d}.parquet")
        if store.exists(path):  # written before an interruption
            reasons = read_errors(path)
        else:
            table = self._rows(part)
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            store.write_bytes(path, sink.getvalue())
            reasons = table["error"]
        return pa.table({"error": reasons})

    def _rows(self, part: int) -> pa.Table:
        names: list[str] = []
        errors: list[str | None] = []
        results: list[tuple[npt.NDArray[Any], ...]] = []
        views: list[npt.NDArray[np.uint8]] = []
        window = 2 * self.settings.batch_size
        for name, view, reason in ahead(self.pool, self._view, self.images.part(part), window):
            names.append(name)
            errors.append(reason)
            if view is not None:
                views.append(view)
            if len(views) == self.settings.batch_size:
                results.append(self._run(views))
                views = []
        if views:
            results.append(self._run(views))
        return prediction_table(self.schema, names, errors, results, self.classifier.spec.class_names)

    def _view(self, image: FileImage | ShardImage) -> tuple[str, npt.NDArray[np.uint8] | None, str | None]:
        encoded = image.read()
        if encoded.data is None:
            return encoded.name, None, encoded.reason
        try:
            pixels = self.classifier.decode(encoded.data, convert=self.settings.convert)
        except ImageError as error:
            remedy = "; set convert (--convert-images) to convert it" if error.convertible else ""
            return encoded.name, None, f"{error.reason}{remedy}"
        return encoded.name, self.classifier.view(pixels), None

    def _run(self, views: list[npt.NDArray[np.uint8]]) -> tuple[npt.NDArray[Any], ...]:
        features, logits = self.classifier.features_and_logits(np.stack(views))
        best, classes = self.classifier.best(logits, self.settings.top_k)
        outputs = (best, classes, features) if self.settings.features else (best, classes)
        return tuple(output.cpu().numpy() for output in outputs)


class _Tally:
    """Counts the rows of the tables that pass through it."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.total, self.progress = total, progress
        self.done = 0
        self.reasons: Counter[str] = Counter()

    def add(self, table: pa.Table) -> pa.Table:
        """Count the rows of a table and return it."""
        self.done += table.num_rows
        self.reasons.update(table["error"].drop_null().to_pylist())
        if self.progress is not None:
            self.progress(self.done, self.total)
        return table
