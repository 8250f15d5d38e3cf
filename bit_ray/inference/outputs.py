"""Predictions as rows of a file or of parts: their schema, and writing that never leaves an incomplete file."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from bit_ray import store
from bit_ray.claim import CLAIM_FILE
from bit_ray.errors import ConfigError, DataError
from bit_ray.inference.classifier import Classifier
from bit_ray.locks import scratch_directory, whole

SUMMARY_FILE = "_predictions.json"
"""Last file of a folder of parts."""

_ROWS_PER_GROUP = 8192
_BYTES_PER_GROUP = 2**26


def check_output(output: str, features: bool) -> Literal["csv", "parquet", "folder"]:
    """Check that an output may be written, and return its kind.

    Raises:
        ConfigError: It exists, has an unknown ending, or cannot hold features.
    """
    name = output if store.is_local(output) else output.partition("?")[0]  # ?endpoint_override=...
    if name.endswith("/"):
        if store.exists(store.join(output, SUMMARY_FILE)):
            given = f"{output} has finished predictions"
            raise ConfigError.of("output", given, "a new folder", "choose another, or delete it")
        return "folder"
    if not name.endswith((".csv", ".parquet")):
        accepted = "a file ending in .csv or .parquet, or a folder ending in /"
        raise ConfigError.of("output", repr(output), accepted, "rename it")
    if features and name.endswith(".csv"):
        raise ConfigError.of("features", f"given with output {output}", "Parquet for vectors", "name it .parquet")
    if store.exists(output):
        raise ConfigError.of("output", f"{output} exists", "a new file", "choose another name, or delete it")
    return "csv" if name.endswith(".csv") else "parquet"


def claim_of(output: str, kind: str) -> str:
    """Return the path of an output's claim: inside a folder, next to a file."""
    if kind == "folder":
        return store.join(store.absolute(output), CLAIM_FILE)
    if store.is_local(output):
        return f"{store.absolute(output)}.{CLAIM_FILE}"
    name, mark, query = output.partition("?")
    return f"{name}.{CLAIM_FILE}{mark}{query}"


def prediction_schema(classifier: Classifier, top_k: int, features: bool) -> pa.Schema:
    """Return the columns of the rows, as `bit_ray.inference.predict.predict_folder` describes them."""
    fields = [pa.field("path", pa.string())]
    for rank in range(1, min(top_k, classifier.spec.num_classes) + 1):
        fields += [pa.field(f"class_{rank}", pa.string()), pa.field(f"probability_{rank}", pa.float64())]
    if features:
        # Not of a fixed size: pyarrow cannot read a null of such a column from Parquet.
        fields.append(pa.field("features", pa.list_(pa.float32())))
    return pa.schema([*fields, pa.field("error", pa.string())])


def prediction_table(
    schema: pa.Schema,
    names: list[str],
    errors: list[str | None],
    results: list[tuple[npt.NDArray[Any], ...]],
    class_names: Sequence[str],
) -> pa.Table:
    """Return a row for each image.

    Args:
        schema: From `prediction_schema`.
        names: Of N images.
        errors: N reasons why an image cannot be read, None for those that can.
        results: Batches of the readable images: probabilities ``[B, k]``, class indices ``[B, k]`` and, if the schema
            has them, features ``[B, D]``.
        class_names: Names of all classes.
    """
    readable = np.array([error is None for error in errors])
    # Index of each row's result; null for a row without one.
    positions = pa.array(np.cumsum(readable) - 1, mask=~readable)
    columns: dict[str, pa.Array] = {"path": pa.array(names, pa.string()), "error": pa.array(errors, pa.string())}
    if results:
        best, classes, *features = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
        all_names = pa.array(class_names, pa.string())
        for k in range(best.shape[1]):
            columns[f"class_{k + 1}"] = all_names.take(pa.array(classes[:, k])).take(positions)
            columns[f"probability_{k + 1}"] = pa.array(best[:, k]).take(positions)
        for vectors in features:
            offsets = pa.array(np.arange(len(vectors) + 1) * vectors.shape[1], pa.int32())
            lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1), pa.float32()))
            columns["features"] = lists.take(positions)
    return pa.table(
        [columns[field.name] if field.name in columns else pa.nulls(len(names), field.type) for field in schema],
        schema=schema,
    )


def read_errors(path: str) -> pa.ChunkedArray:
    """Return the column ``error`` of a written part."""
    files, inner = store.filesystem(path)
    with store.explained(path):
        return pq.read_table(inner, columns=["error"], filesystem=files)["error"]


def write_file(output: str, kind: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write all rows into one file, which appears when it is complete."""
    with _whole(output) as path:
        options = pa.csv.WriteOptions(quoting_style="needed")
        writer = (
            pq.ParquetWriter(path, schema)
            if kind == "parquet"
            else pa.csv.CSVWriter(path, schema, write_options=options)
        )
        with writer:
            for table in _grouped(tables):
                writer.write_table(table)


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate tables until they have the rows of a row group, or 64 MiB."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(t.num_rows for t in waiting) >= _ROWS_PER_GROUP or sum(t.nbytes for t in waiting) >= _BYTES_PER_GROUP:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


@contextmanager
def _whole(output: str) -> Iterator[str]:
    """Yield a local path to write to, whose file becomes the output at the end; nothing is left after a failure."""
    if not store.is_local(output):
        with scratch_directory() as directory:
            path = os.path.join(directory, "predictions")
            yield path
            store.upload_file(path, output)
        return
    target = Path(store.filesystem(output)[1])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as unfinished:
            yield str(unfinished)
    except OSError as error:
        if type(error).__module__.startswith("ray."):  # Ray gives its errors the class of their cause as well
            raise
        raise DataError(f"{output}: cannot be written ({error.strerror or error}); choose a writable folder") from None
