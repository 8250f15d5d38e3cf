import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bit_ray.data.shards.build import ShardPlan, build_shard
from bit_ray.data.shards.fetch import local_shard
from bit_ray.data.shards.footer import SCHEMA, LayoutError, footer_length, read_footer, shard_schema
from bit_ray.data.shards.manifest import Manifest, read_manifest, write_manifest
from bit_ray.data.shards.read import index_rows, read_rows, read_tables, row_group_checksums, to_examples
from bit_ray.data.shards.row_group import checksum
from bit_ray.data.shards.thrift import read_struct, write_struct
from bit_ray.data.shards.verify import verify_shards
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example

PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}
OLD = Path(__file__).parents[3] / "assets" / "shards_format_1"


def png(i):
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 12, 3), i * 20, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shard_bytes(num_rows=29, row_group_size=4, optional_columns=()):
    schema = shard_schema(optional_columns)
    values = {
        "id": [f"é{i}" for i in range(num_rows)],
        "image": [bytes([i]) * (17 * i) for i in range(num_rows)],
        "labels": [list(range(i % 3)) for i in range(num_rows)],
    }
    values |= {name: [bytes(i) for i in range(num_rows)] for name in optional_columns}
    buffer = io.BytesIO()
    table = pa.table([pa.array(values[field.name], field.type) for field in schema], schema=schema)
    pq.write_table(table, buffer, row_group_size=row_group_size, **PLAIN)
    return buffer.getvalue()


@pytest.mark.parametrize("optional_columns", [(), ("annotation",), ("annotation", "fingerprint"), ("fingerprint",)])
def test_a_footer_says_what_pyarrow_says(optional_columns):
    data = shard_bytes(optional_columns=optional_columns)
    footer = read_footer(data[-footer_length(data) :], len(data))
    metadata = pq.read_metadata(io.BytesIO(data))
    assert footer.columns == (*SCHEMA.names, *optional_columns)
    assert len(footer.groups) == metadata.num_row_groups == 8
    for i, group in enumerate(footer.groups):
        theirs = metadata.row_group(i)
        assert group.num_rows == theirs.num_rows
        columns = [theirs.column(j) for j in range(theirs.num_columns)]
        assert group.chunks == tuple((c.data_page_offset, c.total_compressed_size, c.num_values) for c in columns)
    assert footer.groups[-1].stop == len(data) - footer_length(data)


def test_a_struct_is_written_as_it_was_read():
    data = shard_bytes()
    footer = data[-footer_length(data) :]
    fields, length = read_struct(footer, 0)
    again = bytearray()
    write_struct(again, fields)
    assert bytes(again) == footer[:length]


def test_columns_of_another_kind_or_order_are_no_shard():
    for schema in (
        pa.schema([SCHEMA.field("image"), SCHEMA.field("id"), SCHEMA.field("labels")]),
        pa.schema([*SCHEMA, pa.field("annotation", pa.binary())]),
        pa.schema([*SCHEMA, pa.field("annotation", pa.int32(), nullable=False)]),
        pa.schema([*SCHEMA, pa.field("boxes", pa.binary(), nullable=False)]),
        shard_schema(("fingerprint", "annotation")),
    ):
        buffer = io.BytesIO()
        pq.write_table(schema.empty_table(), buffer, **PLAIN)
        data = buffer.getvalue()
        with pytest.raises(LayoutError, match="columns .*, not those of a shard"):
            read_footer(data[-footer_length(data) :], len(data))


FLIP_EVERY_BYTE = """
import os, sys
from bit_ray.data.shards.read import index_rows
from bit_ray.errors import DamagedShardError

path, start = sys.argv[1], int(sys.argv[2])
data = bytearray(open(path, "rb").read())
refused = 0
for at in range(start, len(data)):
    flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
    with open(path + ".new", "wb") as file:
        file.write(flipped)
    os.replace(path + ".new", path)
    try:
        index_rows(path, at % 8)
    except DamagedShardError as error:
        assert "\\n" not in str(error)
        refused += 1
print(refused, len(data) - start)
"""


def test_no_damage_to_a_footer_ends_the_process(tmp_path):
    data = shard_bytes()
    path = tmp_path / "shard.parquet"
    path.write_bytes(data)
    start = len(data) - footer_length(data)
    command = [sys.executable, "-c", FLIP_EVERY_BYTE, str(path), str(start)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, tried = map(int, done.stdout.split())
    assert tried == footer_length(data)
    assert refused > tried / 4


def test_the_checksum_is_that_of_xxh3():
    # https://github.com/Cyan4973/xxHash/blob/dev/tests/sanity_test_vectors.h: no bytes, seed 0: 2D06800538D394C2.
    assert checksum([]) == "38d394c2"
    assert checksum([b"ab", b"c"]) == checksum([memoryview(b"abc")]) != checksum([b"abd"])


def test_a_set_of_format_1_is_read_as_ever(tmp_path):
    manifest = read_manifest(OLD)
    assert (manifest.format, manifest.num_examples, manifest.class_names) == (1, 10, ("ant", "bee", "cat"))
    examples = [example for table in read_tables(str(OLD), manifest) for example in to_examples(table)]
    assert examples == [Example(f"é{i}.png", png(i), (i % 3,)) for i in range(10)]
    assert verify_shards(OLD).ok
    assert index_rows(OLD / manifest.shards[0].path, 1)["id"].to_pylist() == [f"é{i}.png" for i in range(4, 8)]
    assert manifest.digest == "7d7c0033970fcc2784edb669722946e75eee8e5f358e7fa5823c16334f1447fc"
    # Written today, the same examples have the same row groups; the footers name the version of pyarrow.
    write_shards(examples, tmp_path, name="old", class_names=manifest.class_names, row_group_size=4, shard_examples=8)
    assert read_manifest(tmp_path).format == 2
    for shard in read_manifest(tmp_path).shards:
        assert shard.checksums == row_group_checksums(OLD / shard.path)


def test_annotations_and_fingerprints_are_written_read_and_verified(tmp_path):
    plan = ShardPlan(
        output=str(tmp_path),
        num_classes=2,
        multi_label=True,
        row_group_size=4,
        convert_images=False,
        on_bad="error",
        optional_columns=("annotation", "fingerprint"),
    )
    examples = [Example(f"e{i}", png(i), (0, 1), bytes([i]) * i, b"f" * (i % 2)) for i in range(6)]
    shard = build_shard(plan, 0, examples).shard
    manifest = Manifest(
        name="boxes",
        class_names=("ant", "bee"),
        multi_label=True,
        row_group_size=4,
        median_image_size=(9, 12),
        num_examples=6,
        shards=(shard,),
        optional_columns=plan.optional_columns,
    )
    write_manifest(tmp_path, manifest)
    columns = ("id", "image", "labels", "annotation", "fingerprint")
    assert to_examples(read_rows(str(tmp_path), read_manifest(tmp_path), 0, [0, 1], columns)) == examples
    plain = [replace(example, annotation=b"", fingerprint=b"") for example in examples]
    assert to_examples(read_rows(str(tmp_path), manifest, 0, [0, 1])) == plain
    assert index_rows(tmp_path / shard.path, 1, shard.checksum(1))["id"].to_pylist() == ["e4", "e5"]
    assert verify_shards(tmp_path).ok
    write_manifest(tmp_path, replace(manifest, optional_columns=()))
    assert verify_shards(tmp_path).counts == {"columns": 1}
    # A flipped bit of an annotation is found like any other.
    with local_shard(tmp_path / shard.path) as (_, file):
        last = file.footer.groups[1].stop - 1
    data = bytearray((tmp_path / shard.path).read_bytes())
    data[last] ^= 1
    (tmp_path / shard.path).write_bytes(data)
    assert verify_shards(tmp_path).counts == {"columns": 1, "checksum": 2}
