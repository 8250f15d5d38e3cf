"""Documents that anybody may have written: each is read as what it should be, or refused in one line.

Another kind of document is one more line in `DOCUMENTS`.
"""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bit_ray.cli.status import _lines
from bit_ray.config import MAX_DOCUMENT_BYTES, to_dict
from bit_ray.data.images.views import TrainView
from bit_ray.data.shards.manifest import Manifest, read_manifest
from bit_ray.data.stream.order import Order
from bit_ray.errors import BitRayError
from bit_ray.evaluation.subsets import load_subset
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import BestCheckpoint
from bit_ray.store import read_record
from bit_ray.studies.vtab_scores import TaskScore, load_score
from bit_ray.tracking.reference import ModelReference, parse_reference
from bit_ray.training.checkpoint.state import Position, read_checkpoint_record
from bit_ray.training.goodput import goodput
from bit_ray.training.plan import TrainPlan
from bit_ray.training.run import recorded_plan
from bit_ray.weights.package import ModelSpec, parse_description
from bit_ray.weights.tensor_files import Weights

DESCRIPTION = {
    "format": 1,
    "spec": {
        "model": "R1-1-1-1x0.5",
        "num_classes": 3,
        "class_names": ["crane", "crane", "ßü"],
        "multi_label": False,
        "resize_mode": "shorter_side",
        "resize_size": 40,
        "crop_size": 32,
        "input_range": [-1.0, 1.0],
        "recipe": {"base_lr": 0.003, "steps": [200, 300]},
        "provenance": {"manifest_digest": "ab12"},
    },
    "weights": {"file": "model.safetensors", "sha256": "0f" * 32, "num_bytes": 1000},
}
REFERENCE = {
    "name": "digits",
    "package_uri": "s3://bucket/runs/a/step-00000100",
    "description_sha256": "ab" * 32,
    "description": DESCRIPTION,
}


class Document(NamedTuple):
    """A kind of document."""

    valid: dict[str, Any]
    read: Callable[[bytes], Any]
    check: Callable[[Any], bool]
    """Whether what was read is fit for use."""


def usable_weights(weights: Weights) -> bool:
    return set(weights.sha256) <= set("0123456789abcdef") and len(weights.sha256) == 64 and "/" not in weights.file


def usable_model(read: tuple[ModelSpec, Weights]) -> bool:
    spec, weights = read
    return usable_weights(weights) and len(spec.class_names) == spec.num_classes and 32 <= spec.crop_size <= 16384


def usable_reference(reference: ModelReference) -> bool:
    digests = reference.sha256, reference.description_sha256
    place = reference.weights_uri
    return (
        all(len(digest) == 64 and digest.isalnum() for digest in digests)
        and place.startswith(("/", "file:///", "s3://", "gs://"))
        and not (place.startswith("s3://") and set(place) & set("?"))
        and 0 <= reference.num_bytes < 2**63
    )


SHARD = {"path": "shard-00000.parquet", "num_examples": 6, "num_bytes": 900, "sha256": "0f" * 32}
MANIFEST = {
    "name": "photos",
    "class_names": ["crane", "crane", "ßü"],
    "multi_label": False,
    "row_group_size": 4,
    "median_image_size": [375, 500],
    "num_examples": 8,
    "shards": [
        {**SHARD, "checksums": "0123abcd89ef4567"},
        {**SHARD, "path": "shard-00001.parquet", "num_examples": 2, "checksums": "00000000"},
    ],
    "optional_columns": ["annotation"],
    "convert_images": False,
    "plan_digest": "",
    "format": 2,
}
OLD_MANIFEST = {
    **{name: value for name, value in MANIFEST.items() if name != "optional_columns"},
    "num_examples": 6,
    "shards": [SHARD],
    "format": 1,
}
PLAN = TrainPlan(
    kind="finetune",
    model="R1-1-1-1x0.5",
    num_classes=3,
    manifest_digest="0f" * 32,
    num_examples=8,
    view=TrainView(crop="inception", crop_size=32),
    resize_mode="square",
    resize_size=32,
    loss="softmax",
    schedule=Schedule(base_lr=0.1, num_steps=4),
    global_batch_size=4,
)
RUN = {"digest": PLAN.digest, "shards": "SHARDS", "plan": to_dict(PLAN)}
TRAINING = {
    "format": 1,
    "progress": {
        "next_step": 3,
        "train_s": 1.5,
        "bad_images": [{"shard": "shard-00000.parquet", "row": 1, "id": "a.png", "reason": "truncated"}],
    },
    "plan_digest": PLAN.digest,
    "plan": to_dict(PLAN),
}
SUBSET = {"format": 1, "manifest_digest": "0f" * 32, "k": 1, "seed": 0, "ids": ["a", "b", "c"]}
SCORE = {
    "task": "svhn",
    "top_1": 0.5,
    "num_train": 800,
    "num_test": 100,
    "statement": "",
    "rule": {},
    "seconds": 1.0,
    "settings_digest": "d",
    "format": 1,
}


def as_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """Reading of a document that is a file of this name in a folder."""

    def read_bytes(data: bytes) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, name).write_bytes(data)
            return read(Path(folder))

    return read_bytes


def usable_manifest(manifest: Manifest) -> bool:
    assert len(manifest.digest) == 64
    order = Order(
        shard_sizes=tuple(shard.num_examples for shard in manifest.shards[:10]),
        row_group_size=manifest.row_group_size,
        global_batch_size=4,
        seed=0,
    )
    if order.num_examples < 10_000:
        assert len(list(order.rows_of_step(0))) == 4
    names = [shard.path for shard in manifest.shards]
    return all("/" not in name and not name.startswith(".") for name in names) and len(set(names)) == len(names)


START = {"first_step": 0, "device": "cpu", "precision": "fp32", "num_workers": 2, "micro_batch_size": 8}
RUNTIME = {"starts": [START]}
ATTEMPT = {
    "number": 1, "why": "the run begins", "num_workers": 2, "shares": [4, 4], "micro_batch_size": 4, "first_step": 0,
    "steps_lost": 0, "ended": "left", "last_step": 8, "waited_s": 0.5, "starting_s": 9.0, "productive_s": 3.0,
    "replayed_s": 0.0, "wall_s": 14.0,
}  # fmt: skip


NOW = {
    "unix_s": 1.7e9, "step": 9, "num_steps": 20, "attempt": 1, "num_workers": 2, "num_workers_wanted": 4,
    "goodput": 0.8, "still_s": 1.5, "checkpoint_age_s": 60.0, "metrics": {"train/loss": 2.5},
    "workers": [{"rank": 1, "host": "10.0.0.7", "step": 9, "phase": "computing", "seconds": 0.5}],
}  # fmt: skip


def read_score(folder: Path) -> TaskScore | None:
    return load_score(str(folder / "svhn.json"), "d")


DOCUMENTS = {
    "manifest.json": Document(MANIFEST, as_file("manifest.json", read_manifest), usable_manifest),
    "manifest.json, format 1": Document(OLD_MANIFEST, as_file("manifest.json", read_manifest), usable_manifest),
    "plan.json": Document(
        RUN, as_file("plan.json", lambda folder: recorded_plan(str(folder))), lambda read: len(read[0].digest) == 64
    ),
    "runtime.json": Document(
        RUNTIME,
        as_file("runtime.json", lambda folder: RunFolder(str(folder)).starts()),
        lambda starts: all(start.precision in ("fp32", "bf16") for start in starts),
    ),
    "attempts.json": Document(
        {"attempts": [ATTEMPT]},
        as_file("attempts.json", lambda folder: RunFolder(str(folder)).attempts()),
        lambda attempts: goodput(attempts).num_attempts == len(attempts),
    ),
    "planned.json": Document(
        {"seconds": 60.0, "low": 50.0, "high": 80.0, "source": "its first 40 steps"},
        as_file("planned.json", lambda folder: RunFolder(str(folder)).planned()),
        lambda planned: 0 < planned.low <= planned.high,
    ),
    "left_out.json": Document(
        {"batches": [{"step": 9, "why": "the loss was 9.1", "went_back": False, "images": ["a.png"]}]},
        as_file("left_out.json", lambda folder: RunFolder(str(folder)).left_out()),
        lambda batches: all(batch.step >= 0 for batch in batches),
    ),
    "best.json": Document(
        {"metric": "ridge_5_shot", "step": 9, "value": 0.5},
        as_file("best.json", lambda folder: read_record(BestCheckpoint, folder / "best.json")),
        lambda best: math.isfinite(best.value),
    ),
    "now.json": Document(
        NOW,
        as_file("now.json", lambda folder: RunFolder(str(folder)).where()),
        lambda now: isinstance(_lines(now), list),
    ),
    "training.json": Document(
        TRAINING, as_file("training.json", read_checkpoint_record), lambda record: isinstance(record.progress, Position)
    ),
    "subset": Document(
        SUBSET, as_file("s.json", lambda folder: load_subset(folder / "s.json", "0f" * 32)), lambda s: s.k
    ),
    "score of a task": Document(SCORE, as_file("svhn.json", read_score), lambda score: score.settings_digest == "d"),
    "model.json": Document(DESCRIPTION, lambda data: parse_description(data, "model.json"), usable_model),
    "reference.json": Document(REFERENCE, lambda data: parse_reference(data, "digits", 1), usable_reference),
}

# What json.dumps cannot write, by the text that stands for it.
RAW = {
    '"<deep list>"': "[" * 100_000 + "]" * 100_000,
    '"<deep mapping>"': '{"a":' * 100_000 + "1" + "}" * 100_000,
    '"<deep enough>"': "[" * 400 + "]" * 400,
    '"<digits>"': "9" * 5000,
    '"<exponent>"': "1e999",
    '"<NaN>"': "NaN",
}
VALUES = st.one_of(
    st.sampled_from([json.loads(name) for name in RAW]),
    st.sampled_from([None, True, 0, -1, 2**31, 2**63, 10**4000, -(10**300), 1e308, 5e-324, -0.0, "", " ", ".", ".."]),
    st.sampled_from(["\ud800", "a\0b", "a\nb\u2028c", "\x1b[2J", "x" * 100_000, "../../x", "/etc/passwd", "a\\b", "*"]),
    st.sampled_from(
        ["s3://AK:SE/CRET@b/x", "s3://b/x?endpoint_override=h", "http://h/x", "file://h/x", "s3://b#f", "s3:///"]
    ),
    st.sampled_from(
        ["0F" * 32, "0f" * 32 + "\n", "٣" * 64, "/" + "a" * 63, "R1000-1-1-1x1", "R50x1e9", "R9x9", "square"]
    ),
    st.text(st.characters(), max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    ),
)


def places(tree: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values of a tree, its own last."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [deeper for key, value in pairs for deeper in places(value, (*way, key))] + [way]


@st.composite
def changed(draw: st.DrawFn, valid: dict[str, Any]) -> bytes:
    """A valid document with up to three values replaced, removed, or put under another name."""
    tree = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(0, 3))):
        *way, last = draw(st.sampled_from(places(tree)[:-1] or [("x",)]))
        holder = tree
        for key in way:
            holder = holder[key]
        ways = ["replace", "replace", "replace", "remove", "rename"]
        what = draw(st.sampled_from(ways)) if tree else "replace"
        value = draw(VALUES) if what == "replace" else holder[last]
        if what != "replace":
            del holder[last]
        if what == "replace":
            holder[last] = value
        elif what == "rename" and isinstance(holder, dict):
            holder[draw(st.text(st.characters(), max_size=8) | st.just("y" * 100_000))] = value
    text = json.dumps(tree, ensure_ascii=draw(st.booleans()))
    for name, raw in RAW.items():
        text = text.replace(name, raw)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn, valid: dict[str, Any]) -> bytes:
    """The bytes of a valid document cut off, or some of them replaced."""
    data = bytearray(json.dumps(valid, indent=draw(st.sampled_from([None, 2]))).encode())
    if draw(st.booleans()):
        return bytes(data[: draw(st.integers(0, len(data)))])
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def documents(valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=200), damaged(valid), changed(valid), changed(valid))


def refusal(document: Document, data: bytes) -> str:
    """What is said of a document, empty if it is accepted and fit for use."""
    try:
        read = document.read(data)
    except BitRayError as error:
        said = str(error)
        assert len(said.splitlines()) == 1
        assert len(said) < 1000
        said.encode()
        return said
    assert document.check(read)
    return ""


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_valid_document_is_read(kind: str) -> None:
    document = DOCUMENTS[kind]
    assert refusal(document, json.dumps(document.valid).encode()) == ""


@pytest.mark.parametrize("kind", DOCUMENTS)
@settings(deadline=None, database=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(choice=st.data())
def test_any_document_is_read_as_what_it_should_be_or_refused_in_one_line(kind: str, choice: st.DataObject) -> None:
    document = DOCUMENTS[kind]
    refusal(document, choice.draw(documents(document.valid)))


# The manifest of a set of 300 million images has more bytes than that.
@pytest.mark.parametrize("kind", [kind for kind in DOCUMENTS if "manifest" not in kind])
def test_a_document_that_is_too_large_is_refused_before_it_is_parsed(kind: str) -> None:
    document = DOCUMENTS[kind]
    data = json.dumps(document.valid).encode()
    assert "64,000,000" in refusal(document, data.ljust(MAX_DOCUMENT_BYTES + 1))
    assert refusal(document, data.ljust(MAX_DOCUMENT_BYTES)) == ""


def put(tree: dict[str, Any], way: str, value: Any) -> bytes:
    """The document with the value at a dotted way."""
    tree = json.loads(json.dumps(tree))
    *holders, last = way.split(".")
    holder = tree
    for name in holders:
        holder = holder[name]
    holder[last] = value
    return json.dumps(tree).encode()


BAD_MODEL = [
    *(
        ("weights.sha256", value)
        for value in ("", "ab12", "0F" * 32, "0f" * 32 + "\n", "/" + "a" * 63, "../" + "a" * 61)
    ),
    *(("weights.num_bytes", value) for value in (-1, 2**63, 1.5, True)),
    *(
        ("weights.file", value)
        for value in ("", ".", "..", "a/b", "/a", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\ud800", "x" * 256)
    ),
    *(("spec.crop_size", value) for value in (31, 16385, 10**9)),
    *(("spec.resize_size", value) for value in (31, 16385, 10**9)),
    *(("spec.input_range", value) for value in ([1.0, 1.0], [-1e308, 1e308], [0.0, 1001.0], [-1001.0, 0.0])),
    *(("spec.class_names", value) for value in (["a", "", "c"], ["a", "b"], ["a", "b", "\ud800"], ["a", "b", 3])),
    *(("spec.recipe", value) for value in ({"a": "\udfff"}, {"\ud800": 1}, [])),
    ("spec.provenance", {"a": 1}),
]
BAD_REFERENCE = [
    *((f"description.{way}", value) for way, value in BAD_MODEL),
    *(("description_sha256", value) for value in ("", "ab12", "AB" * 32, "b/../..", 7)),
    *(("name", value) for value in ("", " ", "a/b", "a:b", "a\nb", "x" * 257, "\ud800", None)),
    *(
        ("package_uri", value)
        for value in (
            *("", "runs/a", "~/a", "../a", "http://h/x", "ftp://h/x", "file://host/x", "s3:/b/x", "s3://", "s3:///x"),
            *("s3://b?x", "s3://b/x?", "s3://b/x?endpoint_override=h:9&scheme=http", "gs://b/x?scheme=http"),
            *("s3://AK:PLAN/TED@b/x", "s3://AK:PLANTED@b/x", "s3://me@b/x", "s3://b:9/x", "gs://me@b/x", "s3://b#f/x"),
            *("s3://anonymous@b/x", "/a\0b", "/a\nb", "/a\u2028b", "/\ud800", "/" + "x" * 4096, "s3://b/\x1b[2J", 7),
        )
    ),
]


BAD_PLAN = [
    *(("plan.model", value) for value in ("", "R50", "R50x1 ", "a\0b", "R9-9-9-9x99999", 7)),
    *(("plan.num_classes", value) for value in (0, -1, 2**40)),
]


@pytest.mark.parametrize(
    ("kind", "way", "value"),
    [
        *(("model.json", *bad) for bad in BAD_MODEL),
        *(("reference.json", *bad) for bad in BAD_REFERENCE),
        *(("plan.json", *bad) for bad in BAD_PLAN),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(kind: str, way: str, value: Any) -> None:
    said = refusal(DOCUMENTS[kind], put(DOCUMENTS[kind].valid, way, value))
    assert way.rsplit(".", 1)[-1] in said or "surrogates not allowed" in said
    assert "PLAN" not in said
    assert "TED" not in said


@pytest.mark.parametrize(
    ("kind", "way", "value"),
    [
        ("model.json", "spec.class_names", ["a", "a", "a"]),  # as two thousand of ImageNet-21k's
        ("model.json", "spec.class_names", ["a\nb", " ", "😀"]),
        ("model.json", "spec.input_range", [0.0, 255.0]),
        ("model.json", "spec.resize_size", 16384),
        ("model.json", "weights.num_bytes", 2**63 - 1),
        ("model.json", "weights.file", "gewichte (ß) #1.safetensors"),
        ("reference.json", "name", "bit-m R50x1.v2"),
        ("reference.json", "package_uri", "/home/me/runs, what?/a#1@b:c"),
        ("reference.json", "package_uri", "file:///home/me/a"),
        ("reference.json", "package_uri", "s3://bucket"),
        ("reference.json", "package_uri", "s3://my.bucket-1/runs/a#1 b%/c@2"),
        ("reference.json", "package_uri", "gs://anonymous@bucket/x"),
    ],
)
def test_a_value_within_its_bounds_is_accepted(kind: str, way: str, value: Any) -> None:
    assert refusal(DOCUMENTS[kind], put(DOCUMENTS[kind].valid, way, value)) == ""


def test_a_reference_of_the_first_version_had_no_name() -> None:
    reference = {name: value for name, value in REFERENCE.items() if name != "name"}
    assert parse_reference(json.dumps(reference).encode()).uri == "models:/unnamed"
