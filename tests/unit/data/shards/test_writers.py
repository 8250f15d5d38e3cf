"""Writers of shard sets that meet each other, are killed, or run out of room: real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.verify import verify_shards
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.errors import DataError, StoreError

SMALL = {"name": "digits", "row_group_size": 16, "shard_examples": 128}

# Writes the digits, 300 in three shards, and waits in the middle of the second for a file, if it is given one.
WRITER = """
import os, sys, time
import numpy as np
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.data.sources.base import Example
from bit_ray.data.shards.write import write_shards
from bit_ray.cli.training import exit_status

output, gate, ending = sys.argv[1:]

class Part:
    def __init__(self, examples): self.examples = examples
    def __iter__(self):
        for number, example in enumerate(self.examples):
            if gate and gated() and number == 40:
                open(gate + ".reached", "w").close()
                while not os.path.exists(gate): time.sleep(0.01)
                if ending == "bad":
                    example = Example(example.id, example.image, (99,))
            yield example

seen = []
def gated(): return len(seen) == 2

class Slow(DigitsSource):
    def __len__(self): return 300
    def part(self, indices):
        seen.append(1)
        return Part(super().part(indices))

sys.exit(exit_status(lambda: write_shards(
    Slow("test"), output, name="digits", row_group_size=16, shard_examples=128)))
"""


class Subset(DigitsSource):
    def __len__(self):
        return 300


@contextmanager
def writer(output, gate="", ending="", **environment):
    """A process that writes; it is ended with the test, whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(output), str(gate), ending],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(path, process):
    deadline = time.monotonic() + 100
    while not Path(path).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process):
    error = process.communicate(timeout=100)[1]
    return process.returncode, error


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_second_start_ends_at_once_and_touches_nothing(tmp_path):
    write_shards(Subset("test"), tmp_path / "reference", **SMALL)
    output, gate = tmp_path / "set", tmp_path / "gate"
    with writer(output, gate) as first:
        wait_for(f"{gate}.reached", first)
        before = files(output)
        with writer(output) as second:
            status, error = ended(second)
        assert status == 2
        assert error.startswith(f"error: output: {output} is being written by PID {first.pid} of ")
        assert error.endswith("; wait until it has ended, or choose another output\n")
        assert error.count("\n") == 1
        assert files(output) == before
        gate.touch()
        assert ended(first) == (0, "")
    assert verify_shards(output).ok
    assert files(output) == files(tmp_path / "reference")


def test_a_writer_that_was_killed_is_no_obstacle_and_its_scratch_files_go_but_nobody_elses(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    gates = {name: tmp_path / f"{name}.gate" for name in ("killed", "alive")}
    environment = {"TMPDIR": str(scratch)}
    with writer(tmp_path / "killed", gates["killed"], **environment) as killed:
        wait_for(f"{gates['killed']}.reached", killed)
        os.kill(killed.pid, signal.SIGKILL)
        assert ended(killed)[0] == -signal.SIGKILL
    (left,) = scratch.iterdir()
    assert [path.name for path in left.iterdir()] == ["shard-00001.parquet"]
    with writer(tmp_path / "alive", gates["alive"], **environment) as alive:
        wait_for(f"{gates['alive']}.reached", alive)
        (kept,) = scratch.iterdir()
        assert kept != left
        assert kept.stat().st_mode & 0o777 == 0o700
        with writer(tmp_path / "killed", **environment) as again:
            assert ended(again) == (0, "")
        assert list(scratch.iterdir()) == [kept]
        gates["alive"].touch()
        assert ended(alive) == (0, "")
    assert list(scratch.iterdir()) == []
    assert files(tmp_path / "killed") == files(tmp_path / "alive")


# Writes three shards, of which the last is larger than the first two, where no file may be larger than the limit: as
# on a disk that is full.
LIMITED = """
import io, resource, sys
import numpy as np
from PIL import Image
from bit_ray.data.sources.base import Example
from bit_ray.data.shards.write import write_shards
from bit_ray.cli.training import exit_status

output, limit = sys.argv[1], int(sys.argv[2])

def photo(side, i):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()

examples = [Example(f"e{i}", photo(10 if i < 16 else 140, i), (0,)) for i in range(24)]

def write():
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    report = write_shards(examples, output, name="x", class_names=["a"], row_group_size=8, shard_examples=8)
    print(report.num_resumed)

sys.exit(exit_status(write))
"""


def write_limited(output, limit, scratch):
    command = [sys.executable, "-c", LIMITED, str(output), str(limit)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


def test_a_full_folder_for_temporary_files_is_named_and_finished_shards_are_kept(tmp_path):
    scratch, output = tmp_path / "scratch", tmp_path / "set"
    scratch.mkdir()
    run = write_limited(output, 100_000, scratch)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: TMPDIR: {scratch}: a shard cannot be written there (")
    assert run.stderr.endswith("; finished shards are kept: run the same command again to continue\n")
    assert run.stderr.count("\n") == 1
    assert list(scratch.iterdir()) == []
    assert sorted(files(output)) == ["_writing.json", "shard-00000.parquet", "shard-00001.parquet"]
    run = write_limited(output, 0, scratch)
    assert (run.returncode, run.stdout, run.stderr) == (0, "2\n", "")
    assert verify_shards(output).ok


def test_a_folder_for_temporary_files_that_takes_nothing_leaves_nothing(tmp_path):
    run = write_limited(tmp_path / "set", 1000, tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: TMPDIR: {tmp_path}: ")
    assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


class InTheWay(Subset):
    """While the third shard is read, its place in the output is taken by a folder, so that it cannot be put there."""

    def __init__(self, split, output, error=None):
        super().__init__(split)
        self.output, self.error, self.parts = output, error, 0

    def part(self, indices):
        self.parts += 1
        if self.parts == 3 and self.output is not None:
            (self.output / "shard-00002.parquet").mkdir()
        examples = super().part(indices)
        if self.parts == 3 and self.error is not None:
            return [*examples, Example("bad", b"none", (0,))]
        return examples


def test_a_store_that_fails_late_in_a_first_run_leaves_the_finished_shards_to_be_continued(tmp_path):
    output = tmp_path / "set"
    with pytest.raises(StoreError, match="finished shards are kept: run the same command again to continue$") as raised:
        write_shards(InTheWay("test", output), output, **SMALL)
    assert str(raised.value).startswith(f"{output}/shard-00002.parquet: ")
    (output / "shard-00002.parquet").rmdir()
    assert sorted(files(output)) == ["_writing.json", "shard-00000.parquet", "shard-00001.parquet"]
    assert json.loads(files(output)["_writing.json"])["done"][1]["index"] == 1
    assert write_shards(InTheWay("test", None), output, **SMALL).num_resumed == 2
    write_shards(Subset("test"), tmp_path / "reference", **SMALL)
    assert read_manifest(output).digest == read_manifest(tmp_path / "reference").digest
    assert verify_shards(output).ok


def test_data_that_are_refused_late_in_a_first_run_leave_nothing(tmp_path):
    with pytest.raises(DataError, match="^bad: not an image"):
        write_shards(InTheWay("test", None, "bad"), tmp_path / "set", **SMALL)
    assert not (tmp_path / "set").exists()


def test_a_shard_that_vanishes_while_the_others_are_written_is_written_again_by_the_next_run(tmp_path):
    output = tmp_path / "set"

    def remove(done, total):
        if done == 300:
            (output / "shard-00000.parquet").unlink()

    with pytest.raises(StoreError, match=r"shard-00000.parquet: written, but missing or truncated now; .* continue$"):
        write_shards(Subset("test"), output, progress=remove, **SMALL)
    assert not (output / "manifest.json").exists()
    assert write_shards(Subset("test"), output, **SMALL).num_resumed == 2
    assert verify_shards(output).ok
